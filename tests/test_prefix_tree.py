"""The tree of states: what a prompt goes on from, what that takes, and what is forgotten first."""

import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.model.cache import KDACache
from mlx_kimi.server import prefix_tree
from mlx_kimi.server.prefix_tree import Node, PrefixTree, State, as_array, common_prefix

KB = 1024


def state(size: int = KB, shared: mx.array | None = None, hidden: bool = False) -> State:
    """One that takes so many bytes, and those of `shared`."""
    own = mx.zeros((size // 4,))
    entry = KDACache((1,), own, mx.zeros((0,)) if shared is None else shared)
    return State([entry], mx.zeros((1, 1, 0)) if hidden else None)


def tree_of(texts: list[list[int]], memory: int = 1 << 30) -> PrefixTree:
    tree = PrefixTree(memory)
    for text in texts:
        tree.insert(as_array(text), state())
    return tree


def test_common_prefix() -> None:
    for first, second, count in (([], [1], 0), ([1, 2, 3], [1, 2], 2), ([1, 2, 3], [1, 5, 3], 1)):
        assert common_prefix(as_array(first), as_array(second)) == count


@pytest.mark.parametrize(
    ("prompt", "known", "why"),
    [
        ([9], 0, "no earlier prompt begins with these tokens"),
        ([1, 2, 3, 4, 5, 6], 4, "what follows token 4 is new"),
        ([1, 2, 3, 9], 2, "differs from what was read at token 3"),
        ([1, 2, 7], 2, "differs from what was read at token 2"),
        ([1, 2, 3, 4], 2, "no state is kept where it ends"),
        ([1, 2, 8, 8], 4, "all of it was read before"),
        ([1], 0, "no state is kept where it ends"),
    ],
)
def test_a_prompt_goes_on_from_the_latest_state_of_its_tokens(prompt, known, why) -> None:
    tree = tree_of([[1, 2], [1, 2, 3, 4]])
    tree.insert(as_array([1, 2, 8, 8]), state(hidden=True))
    found = tree.find(as_array(prompt))
    assert (found.length, found.why) == (known, why)


def test_it_finds_what_a_search_of_all_texts_finds() -> None:
    choose = random.Random(0)
    tree, texts = PrefixTree(1 << 30), set[tuple[int, ...]]()
    for _ in range(150):
        text = tuple(choose.randrange(3) for _ in range(choose.randrange(1, 9)))
        prompt = tuple(choose.randrange(3) for _ in range(choose.randrange(1, 9)))
        tree.insert(as_array(text), state(4))
        texts.add(text)
        fitting = [t for t in texts if len(t) < len(prompt) and prompt[: len(t)] == t]
        found = tree.find(as_array(prompt))
        assert found.length == max(map(len, fitting), default=0)
        shared = max(common_prefix(as_array(t), as_array(prompt)) for t in texts)
        assert found.shared == shared
        assert tree.states == len(texts)


def test_arrays_that_states_share_count_once() -> None:
    tree, latents = PrefixTree(1 << 30), mx.zeros((4 * KB // 4,))
    tree.insert(as_array([1]), state(KB, latents))
    tree.insert(as_array([1, 2]), state(KB, latents))
    tree.insert(as_array([1, 2]), state(KB))  # (it is there already)
    assert (tree.bytes, tree.states) == (6 * KB, 2)
    tree.clear(5 * KB)
    assert (tree.bytes, tree.states) == (5 * KB, 1)
    tree.clear(0)
    assert (tree.bytes, tree.states, tree.evicted) == (0, 0, 2)


def test_a_prompt_hears_that_its_state_was_evicted() -> None:
    tree = tree_of([[1, 2, 3]], memory=KB)
    tree.insert(as_array([4] * 10), state())
    found = tree.find(as_array([1, 2, 3, 4]))
    assert (found.length, found.why) == (0, "its state after token 3 was evicted for memory")


def ask(tree: PrefixTree, ids: np.ndarray, prompt: int, *answer: int) -> int:
    """A request that keeps states at these lengths of its text; what it need not read."""
    found = tree.find(ids[:prompt])
    tree.use(found)
    tree.insert(ids[:prompt], state())
    for length in answer:
        tree.insert(ids[:length], State(state().entries, is_answer=True))
    return found.length


def test_side_requests_and_sub_agents_do_not_evict_a_long_conversation() -> None:
    """Six states fit. Of the conversation no more is read again than its answer of 100 tokens, and
    what agents begin with is not read again."""
    tree, choose = PrefixTree(6 * KB), np.random.default_rng(0)
    system = choose.integers(5, 700, 25_000, np.int32)
    talk = np.concatenate([system, choose.integers(5, 700, 5_000, np.int32)])
    tree.insert(system, state())
    ask(tree, talk, len(talk) - 100, len(talk))
    for _ in range(20):
        for _ in range(5):  # titles
            title = choose.integers(5, 700, 500, np.int32)
            assert ask(tree, title, 490, 500) == 0
        agent = np.concatenate([system, choose.integers(5, 700, 1_000, np.int32)])
        assert ask(tree, agent, len(agent) - 100, len(agent)) == len(system)
        for _ in range(3):
            agent = np.concatenate([agent, choose.integers(5, 700, 300, np.int32)])
            assert ask(tree, agent, len(agent) - 100, len(agent)) >= len(system)
        known = len(talk)
        talk = np.concatenate([talk, choose.integers(5, 700, 300, np.int32)])
        assert ask(tree, talk, len(talk) - 100, len(talk)) >= known - 100
        assert tree.bytes <= tree.memory


def test_an_answer_that_no_prompt_repeats_goes_before_the_conversation_that_does_not() -> None:
    tree, choose = PrefixTree(4 * KB), np.random.default_rng(0)
    talk = choose.integers(5, 700, 3_000, np.int32)
    for _ in range(30):
        known = len(talk)
        answered = np.concatenate([talk, choose.integers(5, 700, 100, np.int32)])
        ask(tree, answered, known, len(answered))
        talk = np.concatenate([talk, choose.integers(5, 700, 120, np.int32)])  # written otherwise
        assert tree.find(talk).length == known


def nodes(tree: PrefixTree) -> list[Node]:
    return list(prefix_tree._below(tree._root))


def test_texts_without_a_state_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "TOKENS_REMEMBERED", 5_000)
    tree, choose = PrefixTree(2 * KB), np.random.default_rng(0)
    for _ in range(100):
        text = choose.integers(5, 700, 400, np.int32)
        ask(tree, text, 390, 400)
        assert sum(len(node.ids) for node in nodes(tree)) <= 5_000 + 400
        assert tree.find(np.append(text, 5)).length >= 390 and tree.states == 2


def test_what_is_remembered_stays_small_however_many_texts_come() -> None:
    """Of few tokens, that part at random places: an eviction looks at every node."""
    tree, choose = PrefixTree(20 * KB), np.random.default_rng(0)
    trunk = choose.integers(5, 700, 60, np.int32)
    for _ in range(500):
        own = choose.integers(5, 700, 20, np.int32)
        text = np.concatenate([trunk[: choose.integers(1, 60)], own])
        ask(tree, text, len(text) - 3, len(text))
        assert tree._nodes <= 2 * tree.states + prefix_tree.NODES_REMEMBERED
    held = nodes(tree)
    assert len(held) == tree._nodes
    assert sum(len(node.ids) for node in held) == tree._tokens
    for node in held:
        assert node.parent is not None and node.parent.children[int(node.ids[0])] is node
        assert node.length == node.parent.length + len(node.ids)


def test_the_states_that_a_long_conversation_leaves_behind_are_forgotten() -> None:
    tree, choose = PrefixTree(4 * KB), np.random.default_rng(0)
    talk = choose.integers(5, 700, 10, np.int32)
    for turn in range(300):
        talk = np.concatenate([talk, choose.integers(5, 700, 4, np.int32)])
        known = ask(tree, talk, len(talk) - 2, len(talk))
        assert known >= (len(talk) - 8 if turn else 0)
        assert tree._nodes <= 2 * tree.states + prefix_tree.NODES_REMEMBERED
    assert tree._tokens == len(talk)


def test_so_many_states_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "MOST_STATES", 8)
    tree, choose = PrefixTree(1 << 30), np.random.default_rng(0)
    for _ in range(20):
        ask(tree, choose.integers(5, 700, 30, np.int32), 30)
        assert tree.states <= 8
    assert tree.states == 8
