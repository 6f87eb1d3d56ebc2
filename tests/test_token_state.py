"""Contexts: what is kept, what may be gone back to, and what that costs."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_kimi import load
from mlx_kimi.errors import KimiError
from mlx_kimi.generation.generate import stream_generate
from mlx_kimi.generation.token_state import TokenState, common_prefix
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import LatentCache
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import Tokenizer
from tests.assertions import assert_close


@pytest.fixture(scope="module")
def loaded(talker: Path) -> tuple[KimiLinear, Tokenizer]:
    return load(talker)


def answer(loaded, state: TokenState, ids: list[int], count: int = 4, **options) -> int:
    """Generate after `ids`; how many of them were not read again."""
    *_, last = stream_generate(*loaded, ids, max_tokens=count, state=state, **options)
    return last.stats.cached_tokens


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 5, 3]) == 1


def test_turns_begin_and_end_with_a_snapshot(loaded) -> None:
    state = TokenState(loaded[0])
    answer(loaded, state, [1] * 20)
    end_of_answer = len(state.ids)
    answer(loaded, state, [*state.ids, *[2] * 10])
    assert [s.length for s in state.snapshots] == [20, end_of_answer, end_of_answer + 10]


def test_any_kept_state_is_gone_back_to_without_reading(loaded) -> None:
    state = TokenState(loaded[0])
    ends = []
    for turn in range(5):
        answer(loaded, state, [*state.ids, *[turn + 1] * 10])
        ends.append(list(state.ids))
    for end in reversed(ends[:-1]):
        assert answer(loaded, state, [*end, 70, 71]) == len(end)


def test_long_turns_have_snapshots_within(loaded) -> None:
    state = TokenState(loaded[0], snapshot_every=16)
    answer(loaded, state, [1] * 50, count=40, prefill_step=8)
    assert [s.length for s in state.snapshots] == [16, 32, 48, 50, 66, 82]
    assert answer(loaded, state, [*[1] * 40, 9]) == 32


@pytest.mark.slow
def test_the_memory_of_snapshots_is_bounded(loaded) -> None:
    one = sum(a.nbytes for a in caches.arrays(_after(loaded, 40).entries))
    state = TokenState(loaded[0], snapshot_memory=3 * one)
    for turn in range(30):
        answer(loaded, state, [*state.ids, *[turn + 1] * 10], count=2)
        assert state.snapshot_bytes <= state.snapshot_memory
    lengths = [s.length for s in state.snapshots]
    assert 2 <= len(lengths) < 30
    assert lengths[-1] > len(state.ids) - 12, "the newest is kept"


def _after(loaded, count: int) -> TokenState:
    state = TokenState(loaded[0])
    answer(loaded, state, [1] * count, count=2)
    return state


def test_what_snapshots_share_counts_once(loaded) -> None:
    state = _after(loaded, 600)
    state.snapshots.clear()
    state.take_snapshot()
    state.snapshots.append(replace(state.snapshots[0], length=1))
    held = [entry for entry in state.entries if isinstance(entry, LatentCache)]
    frozen = sum(array.nbytes for entry in held for array in entry.frozen_arrays)
    assert frozen > 0
    everything = sum(a.nbytes for a in caches.arrays(state.entries))
    assert state.snapshot_bytes == everything - frozen


def test_a_state_gone_back_to_is_that_of_its_tokens(loaded) -> None:
    model, _ = loaded
    state = TokenState(model, snapshot_every=8)
    answer(loaded, state, list(range(1, 60)), prefill_step=4)
    ids = [*range(1, 30), 80, 81, 82]
    assert state.rewind_to_prefix_of(ids) is None
    hidden = state.read(ids[len(state.ids) :])
    # float32, and splits of a sequence differ by rounding alone
    assert_close("logits", model.logits(hidden[:, -1]), model(mx.array([ids]))[:, -1], 1e-4)


# ----------------------------------------------------------------------------- whose turn it is
def test_an_answer_ends_where_another_has_begun_in_its_state(talker: Path) -> None:
    """It went on with the other's tokens, without a word."""
    model, tokenizer = load(talker)
    state = TokenState(model)
    options: dict[str, Any] = {"max_tokens": 6, "state": state}
    first = stream_generate(model, tokenizer, "about apples", **options)
    next(first)
    # (The same prompt once more begins with the same snapshot.)
    for prompt in ("about pears", "about pears"):
        second = stream_generate(model, tokenizer, prompt, **options)
        next(second)
        with pytest.raises(KimiError, match="another answer has begun in this state"):
            list(first)
        first = second
    alone = stream_generate(model, tokenizer, "about pears", max_tokens=6)
    assert [c.token for c in second] == [c.token for c in alone][1:]


def test_an_interrupted_prompt_ends_the_answer_before_it(talker: Path) -> None:
    """It went on behind the half of the other prompt that had been read."""
    model, tokenizer = load(talker)
    state = TokenState(model)
    first = stream_generate(model, tokenizer, "about apples", max_tokens=6, state=state)
    next(first)

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"state": state, "prefill_step": 4, "progress": interrupt}
    with pytest.raises(KeyboardInterrupt):
        next(stream_generate(model, tokenizer, "about pears and other fruit", **options))
    with pytest.raises(KimiError, match="another answer has begun in this state"):
        list(first)


def test_threads_on_one_state_wait_or_are_told(talker: Path) -> None:
    model, tokenizer = load(talker)
    prompts = [f"about {n} pears" for n in range(24)]

    def answer(prompt: str, state: TokenState | None) -> list[int] | None:
        try:
            stream = stream_generate(model, tokenizer, prompt, max_tokens=5, state=state)
            return [chunk.token for chunk in stream]
        except KimiError as error:
            assert "another answer has begun" in str(error)
            return None

    expected = [answer(prompt, None) for prompt in prompts]
    state = TokenState(model)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda prompt: answer(prompt, state), prompts))
    assert [one or two for one, two in zip(found, expected, strict=True)] == expected
    assert any(found), "some answers end"
