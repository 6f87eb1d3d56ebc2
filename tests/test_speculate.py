"""Drafts change no token: whatever is proposed, the answer is that of one token at a time."""

import random
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi import load
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.errors import KimiError
from mlx_kimi.generation import drafts, lookup, speculate
from mlx_kimi.generation.decode import decode, prefill
from mlx_kimi.generation.drafts import SIZES
from mlx_kimi.generation.generate import stream_generate
from mlx_kimi.generation.lookup import MATCHES, Draft, Lookup
from mlx_kimi.generation.sample import Sampler, Sampling
from mlx_kimi.generation.speculate import FAILURES, PAUSE, Speculation, expected, speculation_for
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.budget import Budget
from mlx_kimi.model import cache as caches
from mlx_kimi.model.kimi_linear import KimiLinear
from tests.assertions import assert_close

SAMPLINGS = [
    Sampling(),
    Sampling(temp=1.0, seed=3),
    Sampling(temp=0.8, seed=5, top_k=20, top_p=0.9, repetition_penalty=1.3),
]
PROMPT = [5, 6, 7, 8] * 5
Models = Callable[[str], KimiLinear]


class Guesses:
    """A drafter that knows the answer, and says each token of it right with probability p."""

    def __init__(self, answer: Sequence[int], p: float, vocab: int, seed: int = 0) -> None:
        self.answer, self.p, self.vocab = answer, p, vocab
        self.random, self.count = random.Random(seed), 0

    def add(self, tokens: Sequence[int]) -> None:
        assert list(tokens) == self.answer[self.count : self.count + len(tokens)]
        self.count += len(tokens)

    def propose(self, limit: int) -> Draft:
        right = self.answer[self.count : self.count + self.random.randint(1, limit)]
        wrong = [(t + 1) % self.vocab if self.random.random() > self.p else t for t in right]
        return Draft(wrong, MATCHES[0]) if wrong else Draft([], 0)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft is tried whenever there is one."""
    monkeypatch.setattr(speculate, "PAYS", 0.0)
    monkeypatch.setattr(speculate, "FAILURES", 10**9)
    monkeypatch.setattr(drafts.Learned, "cost", lambda self, T: 1.0)


def decoded(
    model: KimiLinear, sampling: Sampling, limit: int, speculation: Speculation | None = None
) -> tuple[list[int], TokenState]:
    state = TokenState(model, snapshot_every=None)
    hidden, _ = prefill(state, PROMPT)
    sampler = Sampler(sampling, PROMPT, model.config.vocab_size)
    return list(decode(state, hidden, sampler, limit, speculation)), state


# ------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.temp}")
def test_random_drafts_change_nothing(
    model: Models, always: None, sampling: Sampling, p: float
) -> None:
    tiny = model("tiny")
    plain, expected_state = decoded(tiny, sampling, 60)
    drafter = Guesses(plain, p, tiny.config.vocab_size)
    speculation = Speculation(drafter)
    found, state = decoded(tiny, sampling, 60, speculation)
    assert found == plain
    assert state.ids == expected_state.ids == PROMPT + plain[:-1]
    for ours, other in zip(state.entries, expected_state.entries, strict=True):
        assert ours.lengths == other.lengths
        for a, b in zip(ours.arrays(), other.arrays(), strict=True):
            if a.shape == b.shape:  # (a tail may have spare rows)
                assert_close("state", a, b, 1e-4)
    counts = speculation.counts
    assert counts.steps > 5 and counts.proposed >= counts.steps
    assert (counts.accepted == 0) == (p == 0) and (counts.accepted == counts.proposed) == (p == 1)


@pytest.mark.slow
def test_an_always_wrong_drafter_changes_no_token_of_2000(model: Models, always: None) -> None:
    tiny = model("tiny")
    plain, _ = decoded(tiny, SAMPLINGS[1], 2000)
    speculation = Speculation(Guesses(plain, 0.0, tiny.config.vocab_size))
    assert decoded(tiny, SAMPLINGS[1], 2000, speculation)[0] == plain
    assert speculation.counts.steps > 1000 and not speculation.counts.accepted


@pytest.mark.slow
def test_prompts_of_the_pocket_model_have_the_same_answers_on_and_off(
    always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafts after matches of a token or two: its answers are too short for longer ones."""
    monkeypatch.setattr(lookup, "MATCHES", (2, 1))
    monkeypatch.setattr(drafts, "LIKELY", {2: 0.5, 1: 0.5})
    model, tokenizer = load(pocket_folder())
    rng, accepted = random.Random(1), 0
    words = "the sun moon river stone bird 7 12 red blue when where is name list of".split()
    for number in range(50):
        said = " ".join(rng.choices(words, k=rng.randint(4, 12)))
        prompt = f"Repeat this twice: {said}. {said}." if number % 2 else f"What is {said}?"
        options: dict[str, Any] = {"temp": 0.8, "seed": number} if number % 3 else {}
        found = []
        for how in ("off", "auto"):
            chunks = stream_generate(
                model, tokenizer, prompt, max_tokens=24, speculate=how, **options
            )
            *_, last = found_chunks = list(chunks)
            found.append([chunk.token for chunk in found_chunks])
        assert found[0] == found[1], prompt
        assert last.stats.drafts is not None
        accepted += last.stats.drafts.accepted
    assert accepted > 20, "or little was tried"


@pytest.mark.parametrize("ends", ["limit", "token", "closed"])
def test_an_end_within_a_draft_leaves_the_state_of_plain_decoding(
    model: Models, always: None, ends: str
) -> None:
    tiny = model("tiny")
    plain, _ = decoded(tiny, SAMPLINGS[1], 40)
    for count in range(2, 20):
        state = TokenState(tiny, snapshot_every=None)
        hidden, _ = prefill(state, PROMPT)
        sampler = Sampler(SAMPLINGS[1], PROMPT, tiny.config.vocab_size)
        speculation = Speculation(Guesses(plain, 1.0, tiny.config.vocab_size))
        stream = decode(state, hidden, sampler, count if ends == "limit" else 40, speculation)
        found = []
        for token in stream:
            found.append(token)
            if len(found) == count and ends == "token":
                break
            if len(found) == count and ends == "closed":
                stream.close()  # type: ignore[attr-defined]
        del stream
        assert found == plain[:count]
        read = plain[: count - 1] if ends == "limit" else plain[:count]
        assert state.ids == PROMPT + read
        # The next question goes on from there as if it had been read at once.
        asked, _ = prefill(state, [*state.ids, 9, 9])
        fresh = TokenState(tiny, snapshot_every=None)
        assert_close("next", asked, prefill(fresh, [*PROMPT, *read, 9, 9])[0], 1e-4)


def test_interrupted_within_a_step_nothing_has_happened(
    model: Models, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = model("tiny")
    plain, _ = decoded(tiny, SAMPLINGS[0], 20)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "logsumexp", lambda *a, **k: interrupted())
    state = TokenState(tiny, snapshot_every=None)
    prefill(state, PROMPT)
    before = [np.array(a) for a in caches.arrays(state.entries)]
    sampler = Sampler(SAMPLINGS[0], PROMPT, tiny.config.vocab_size)
    with pytest.raises(KeyboardInterrupt):
        state.step_with_drafts(plain[0], plain[1:4], sampler)
    assert state.ids == PROMPT
    for a, b in zip(caches.arrays(state.entries), before, strict=True):
        assert np.array_equal(np.array(a), b)


def test_not_a_number_within_a_draft_is_named(
    model: Models, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = model("tiny")
    plain, _ = decoded(tiny, SAMPLINGS[0], 20)
    logits = KimiLinear.logits

    def with_nan(self: KimiLinear, hidden: mx.array) -> mx.array:
        found = logits(self, hidden)
        bad = mx.arange(found.shape[1]) == 2
        return mx.where(bad[None, :, None], mx.nan, found) if found.ndim == 3 else found

    monkeypatch.setattr(KimiLinear, "logits", with_nan)
    state = TokenState(tiny, snapshot_every=None)
    prefill(state, PROMPT)
    sampler = Sampler(SAMPLINGS[0], PROMPT, tiny.config.vocab_size)
    read, _ = state.step_with_drafts(plain[0], [plain[1] + 1, 0, 0], sampler)
    assert read == plain[:1], "what is not kept may be anything"
    with pytest.raises(KimiError, match="NaN or"):
        state.step_with_drafts(plain[1], plain[2:6], sampler)
    assert state.ids == PROMPT + plain[:1]


def test_another_answer_ends_this_one(model: Models, always: None) -> None:
    tiny = model("tiny")
    plain, state = decoded(tiny, SAMPLINGS[0], 30)
    hidden, _ = prefill(state, PROMPT)
    sampler = Sampler(SAMPLINGS[0], PROMPT, tiny.config.vocab_size)
    speculation = Speculation(Guesses(plain, 1.0, tiny.config.vocab_size))
    first = decode(state, hidden, sampler, 30, speculation)
    assert [next(first) for _ in range(3)] == plain[:3]
    prefill(state, [1, 2, 3])
    with pytest.raises(KimiError, match="another answer has begun"):
        list(first)
    assert state.ids == [1, 2, 3]


@pytest.mark.parametrize("slots", [8, 10**6], ids=["few experts", "all experts"])
def test_under_a_memory_budget_only_where_it_holds_all_experts(
    monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Else each token of a draft would read experts of its own."""
    loading = import_module("mlx_kimi.loading.load")
    slots_for = loading.slots_for
    monkeypatch.setattr(loading, "slots_for", lambda *a: min(slots, slots_for(*a)))
    model, tokenizer = load(pocket_folder(), Budget(8 * 10**9))
    assert model.offload and model.offload.holds_all == (slots > 8)
    *_, last = stream_generate(model, tokenizer, PROMPT, max_tokens=3, speculate="auto")
    assert (last.stats.drafts is not None) == (slots > 8)


def test_speculate_is_auto_or_off(talker: Path) -> None:
    model, tokenizer = load(talker)
    with pytest.raises(KimiError, match="speculate must be auto or off but is 'on'"):
        next(stream_generate(model, tokenizer, PROMPT, speculate="on"))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- lookup
def test_lookup_finds_the_latest_place_of_the_longest_match() -> None:
    """But for the few whose place in a table another n-gram of the same hash has taken."""
    rng, times, same = random.Random(0), 0, 0
    for alphabet in (2, 5, 300):
        tokens = [rng.randrange(alphabet) for _ in range(3000)]
        known, count = Lookup(tokens[:1500]), 1500
        while count < len(tokens):
            more = rng.randint(1, 40)
            known.add(tokens[count : count + more])
            count = min(count + more, len(tokens))
            found, wanted = known.propose(7), searched(tokens[:count], 7)
            times, same = times + 1, same + (found == wanted)
            if found != wanted:
                assert found.match < wanted.match
                assert not found.tokens or found == searched(tokens[:count], 7, (found.match,))
    assert same > 0.97 * times


def searched(tokens: list[int], limit: int, matches: Sequence[int] = MATCHES) -> Draft:
    end = len(tokens)
    for n in matches:
        places = (p for p in range(end - 1, n - 1, -1) if tokens[p - n : p] == tokens[end - n :])
        place = next(places, None)
        if place is not None:
            period = end - place
            return Draft([tokens[place + i % period] for i in range(limit)], n)
    return Draft([], 0)


def test_two_ngrams_of_one_hash_are_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_slot(self: Lookup, n: int, start: int, end: int) -> np.ndarray:
        return np.zeros(end - start, np.int64)

    monkeypatch.setattr(Lookup, "_slots", one_slot)
    assert Lookup([1, 2, 3, 4, 9, 8, 7, 6, 1, 2, 3, 4]).propose(3) == Draft([], 0)


# ---------------------------------------------------------------------------------------- policy
def measured(costs: dict[int, float]) -> Speculation:
    speculation = Speculation(Guesses([1] * 100, 1.0, 5))
    for T, seconds in costs.items():
        for _ in range(4):
            speculation.took(T, seconds)
    return speculation


def test_a_draft_is_as_long_as_pays() -> None:
    cheap = measured({1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2})
    assert cheap.learned.cost(8) == pytest.approx(1.2)
    assert max(len(cheap.propose(50).tokens) for _ in range(20)) == SIZES[-1] - 1
    dear = measured({1: 1.0, 2: 2.2, 4: 4.5, 8: 9.0})
    assert not any(dear.propose(50).tokens for _ in range(20))
    assert expected(0.5, 3) == 1.75


def test_what_fails_is_tried_less_and_then_not_for_a_while() -> None:
    speculation = measured({1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2})
    for _ in range(FAILURES):
        draft = Draft([1, 1, 1], MATCHES[0])
        speculation.learn(draft, 0)
    assert not any(speculation.propose(50).tokens for _ in range(20))
    for _ in range(PAUSE):
        speculation.took(1, 1.0)
    assert any(speculation.propose(50).tokens for _ in range(20))
    for _ in range(30):
        speculation.learn(Draft([1, 1, 1], MATCHES[0]), 0)
        speculation.took(8, 1.2)
    speculation._paused = 0
    assert not any(speculation.propose(50).tokens for _ in range(20))


def test_what_one_answer_of_a_state_learned_is_known_to_the_next(model: Models) -> None:
    tiny = model("tiny")
    state = TokenState(tiny)
    first, second = (speculation_for(state, "auto", [1] * 20) for _ in range(2))
    assert first is not None and second is not None and first.propose(3).tokens
    for _ in range(40):
        first.learn(Draft([1, 1, 1], MATCHES[0]), 0)
    assert not second.propose(3).tokens
    other = speculation_for(TokenState(tiny), "auto", [1] * 20)
    assert other is not None and other.propose(3).tokens
