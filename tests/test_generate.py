"""Prompts to streams: stop conditions, contexts that are read once, and what is refused."""

import inspect
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, get_type_hints

import mlx.core as mx
import numpy as np
import pytest

import mlx_kimi
from mlx_kimi import load, load_model
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.errors import KimiError
from mlx_kimi.generation.answer import Chunk, StopStrings
from mlx_kimi.generation.generate import Options, generate, prompt_ids, stream_generate
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import Tokenizer

PROMPT = "Which words are names? 中文 🎉"


@pytest.fixture(scope="module")
def loaded(talker: Path) -> tuple[KimiLinear, Tokenizer]:
    return load(talker)


def ids_of(chunks: list[Chunk]) -> list[int]:
    return [chunk.token for chunk in chunks]


def naive_greedy(model: KimiLinear, ids: list[int], count: int) -> list[int]:
    """Greedy tokens with no cache at all."""
    start = len(ids)
    for _ in range(count):
        ids = [*ids, int(mx.argmax(model(mx.array([ids]))[0, -1]))]
    return ids[start:]


@pytest.mark.slow
def test_greedy_tokens_are_those_of_the_model_without_a_cache(loaded) -> None:
    model, tokenizer = loaded
    chunks = list(stream_generate(*loaded, PROMPT, max_tokens=12))
    assert ids_of(chunks) == naive_greedy(model, prompt_ids(model, tokenizer, PROMPT), 12)


@pytest.mark.slow
def test_the_text_is_that_of_the_tokens(loaded) -> None:
    for seed in range(5):  # a random model emits many half characters
        chunks = list(stream_generate(*loaded, PROMPT, max_tokens=60, temp=1.5, seed=seed))
        ids = [token for token in ids_of(chunks) if token not in loaded[1].stop_ids]
        assert "".join(chunk.text for chunk in chunks) == loaded[1].decode(ids)


def test_the_last_chunk_alone_says_why_it_ended(loaded) -> None:
    chunks = list(stream_generate(*loaded, PROMPT, max_tokens=7))
    assert [chunk.finish_reason for chunk in chunks] == [None] * 6 + ["length"]
    assert [chunk.stats.generated_tokens for chunk in chunks] == list(range(1, 8))


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(loaded, monkeypatch) -> None:
    full = list(stream_generate(*loaded, PROMPT, max_tokens=9))
    monkeypatch.setattr(loaded[1], "stop_ids", frozenset({full[5].token}))
    first = ids_of(full).index(full[5].token)
    chunks = list(stream_generate(*loaded, PROMPT, max_tokens=9))
    assert ids_of(chunks) == ids_of(full)[: first + 1]
    assert chunks[-1].finish_reason == "stop"
    assert "".join(c.text for c in chunks) == loaded[1].decode(ids_of(full)[:first])


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 16, 100])
def test_the_prefill_step_does_not_change_the_answer(loaded, step: int) -> None:
    whole = generate(*loaded, PROMPT, max_tokens=10)
    assert generate(*loaded, PROMPT, max_tokens=10, prefill_step=step) == whole


@pytest.mark.slow
def test_a_seed_makes_sampling_reproducible(loaded) -> None:
    def run(seed: int | None) -> list[int]:
        return ids_of(list(stream_generate(*loaded, PROMPT, max_tokens=20, temp=1, seed=seed)))

    assert run(5) == run(5)
    assert run(5) != run(6)
    chunks = list(stream_generate(*loaded, PROMPT, max_tokens=20, temp=1))
    assert ids_of(chunks) == run(chunks[0].stats.seed), "a drawn seed is reported"


def test_progress_names_every_prefill_step(loaded) -> None:
    seen: list[tuple[int, int]] = []
    count = len(prompt_ids(*loaded, PROMPT))
    generate(*loaded, PROMPT, max_tokens=1, prefill_step=10, progress=lambda *now: seen.append(now))
    assert seen == [(done, count) for done in range(0, count, 10)]


@pytest.mark.alone
def test_host_time_is_work_before_a_step_is_submitted_and_no_waiting(loaded, monkeypatch) -> None:
    logits = KimiLinear.logits
    added = 0.02  # seconds

    def host_time(delay: Callable[[], None]) -> float:
        def delayed(model: KimiLinear, hidden: mx.array) -> mx.array:
            delay()
            return logits(model, hidden)

        monkeypatch.setattr(KimiLinear, "logits", delayed)
        *_, last = stream_generate(*loaded, PROMPT, max_tokens=11)
        assert last.stats.decode_time > 9 * added
        return last.stats.host_time

    def work() -> None:
        end = time.thread_time() + added
        while time.thread_time() < end:
            pass

    assert host_time(work) >= 10 * added
    assert host_time(lambda: time.sleep(added)) < 5 * added


def test_a_prompt_may_be_text_messages_or_ids(loaded) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    ids = prompt_ids(*loaded, PROMPT)
    assert prompt_ids(*loaded, messages) == prompt_ids(*loaded, ids) == ids


# --------------------------------------------------------------------------------------- state
def conversation(turns: int) -> list[dict[str, str]]:
    said = [f"word {n} and sentence {n * n}" for n in range(2 * turns - 1)]
    return [{"role": "assistant" if n % 2 else "user", "content": s} for n, s in enumerate(said)]


def fresh(loaded, messages) -> list[int]:
    return ids_of(list(stream_generate(*loaded, messages, max_tokens=8)))


@pytest.mark.slow
def test_a_state_reads_a_conversation_once(loaded) -> None:
    state = TokenState(loaded[0])
    messages = [{"role": "user", "content": "the first question"}]
    for turn in range(4):
        chunks = list(stream_generate(*loaded, messages, max_tokens=8, state=state))
        assert ids_of(chunks) == fresh(loaded, messages)
        if turn:
            assert chunks[0].stats.cached_tokens > 0
        messages.append({"role": "assistant", "content": "".join(c.text for c in chunks)})
        messages.append({"role": "user", "content": f"and question {turn}"})


@pytest.mark.slow
def test_an_edited_conversation_goes_on_from_what_is_still_true(loaded) -> None:
    state, rng = TokenState(loaded[0]), Random(1)
    for _ in range(12):
        messages = conversation(rng.randint(1, 5))
        messages[-1]["content"] += " again" * rng.randint(0, 2)
        chunks = list(stream_generate(*loaded, messages, max_tokens=8, state=state))
        assert ids_of(chunks) == fresh(loaded, messages)


def test_the_same_prompt_twice_is_read_once(loaded) -> None:
    state = TokenState(loaded[0])
    first = list(stream_generate(*loaded, PROMPT, max_tokens=6, state=state))
    second = list(stream_generate(*loaded, PROMPT, max_tokens=6, state=state))
    assert ids_of(first) == ids_of(second)
    assert second[0].stats.cached_tokens == second[0].stats.prompt_tokens


@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_answer_that_is_broken_off_leaves_the_state_sound(loaded, after: int) -> None:
    state, (model, tokenizer) = TokenState(loaded[0]), loaded
    stream = stream_generate(*loaded, PROMPT, max_tokens=20, state=state)
    said = [next(stream).token for _ in range(after)]
    stream.close()
    assert state.ids == prompt_ids(model, tokenizer, PROMPT) + said
    longer = [*state.ids, 40, 41]
    chunks = list(stream_generate(*loaded, longer, max_tokens=6, state=state))
    assert chunks[0].stats.cached_tokens == len(longer) - 2
    assert ids_of(chunks) == naive_greedy(model, longer, 6)


def test_an_interrupt_within_a_step_leaves_the_state_as_it_was(loaded, monkeypatch) -> None:
    state, model = TokenState(loaded[0]), loaded[0]
    list(stream_generate(*loaded, PROMPT, max_tokens=3, state=state))
    before = list(state.ids)
    last = type(model.layers[-1])
    whole, calls = last.attend, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 2:  # some layers have moved on, the others have not
            raise KeyboardInterrupt
        return whole(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(last, "attend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream_generate(*loaded, [*before, 40], max_tokens=3, state=state))
    assert state.ids == before
    chunks = list(stream_generate(*loaded, [*before, 40], max_tokens=6, state=state))
    assert ids_of(chunks) == naive_greedy(model, [*before, 40], 6)


@pytest.mark.slow
def test_ctrl_c_while_waiting_for_a_token_leaves_the_state_sound(loaded) -> None:
    model, _ = loaded
    delays = [0.002 * n for n in range(1, 12)]
    interrupted = 0
    for delay in delays:
        state = TokenState(model)
        timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT))
        stream = stream_generate(*loaded, PROMPT, max_tokens=400, state=state)
        next(stream)
        try:
            timer.start()
            for _ in stream:
                pass
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        assert state.entries[0].lengths == (len(state.ids),)
        longer = [*state.ids, 40, 41]
        chunks = list(stream_generate(*loaded, longer, max_tokens=2, state=state))
        assert ids_of(chunks) == naive_greedy(model, longer, 2)
    assert interrupted == len(delays)


# ---------------------------------------------------------------------------------- stop strings
def test_stop_strings_cut_the_same_however_the_text_arrives() -> None:
    rng = Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=20))
        stop = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        ends = [place for place in map(text.find, stop) if place >= 0]
        matcher, out, rest = StopStrings(stop), "", text
        while rest and not matcher.met:
            size = rng.randint(1, 4)
            out, rest = out + matcher.add(rest[:size]), rest[size:]
        out += matcher.finish()
        if not ends:
            assert out == text
        else:  # the stop string that was complete first ends it; a later one may begin earlier
            assert matcher.met and any(text.startswith(s, len(out)) for s in stop)
            assert text.startswith(out)


def test_a_stop_string_ends_the_answer_before_itself(loaded) -> None:
    chunks = list(stream_generate(*loaded, PROMPT, max_tokens=30))
    text = "".join(chunk.text for chunk in chunks)
    stop = text[8:11]
    assert generate(*loaded, PROMPT, max_tokens=30, stop=[stop]) == text[: text.index(stop)]


# ------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([1] * 4096, {}, "4,096 tokens but the model's context"),
        ([1] * 1_000_000, {}, "1,000,000 tokens"),
        ([-1], {}, "the prompt has -1"),
        ([10**9], {}, "the prompt has 1000000000"),
        ("hi", {"max_tokens": 0}, "max_tokens must be at least 1 but is 0"),
        ("hi", {"prefill_step": -5}, "prefill_step must be from 1 to 65,536 but is -5"),
        ("hi", {"prefill_step": 70_000}, "prefill_step must be from 1 to 65,536 but is 70,000"),
        ("hi", {"latent_bits": 4}, "latent_bits must be 8 where they are given but are 4"),
        ("hi", {"temp": -0.1}, "temp must be 0, or from 0.001"),
        ("hi", {"temp": float("nan")}, "temp must be"),
        ("hi", {"temp": float("inf")}, "temp must be"),
        ("hi", {"temp": 1e-40}, "temp must be"),
        ("hi", {"repetition_penalty": float("inf")}, "repetition_penalty must be"),
        ("hi", {"top_p": 0.0}, "top_p must be above 0"),
        ("hi", {"top_k": -1}, "top_k must be at least 0"),
        ("hi", {"min_p": 1.5}, "min_p must be from 0 to 1"),
        ("hi", {"repetition_penalty": 0.0}, "repetition_penalty must be from 0.01"),
        ("hi", {"seed": -3}, "seed must be"),
    ],
)
def test_what_cannot_be_answered_is_one_line(loaded, prompt, options, said) -> None:
    with pytest.raises(KimiError) as caught:
        generate(*loaded, prompt, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_context_window_ends_an_answer(loaded) -> None:
    limit = loaded[0].config.model_max_length
    chunks = list(stream_generate(*loaded, [1] * (limit - 3), max_tokens=50))
    assert len(chunks) == 3 and chunks[-1].finish_reason == "length"


# ------------------------------------------------------------------------------------ the library
@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"bytes", "the prompt must be text, messages or token ids but is of type bytes"),
        ({"role": "user"}, "the prompt must be text, messages or token ids but is of type dict"),
        (7, "the prompt must be text, messages or token ids but is of type int"),
        ([1, 2.0], "token 1 of the prompt must be an integer but is of type float"),
        ([True], "token 0 of the prompt must be an integer but is of type bool"),
        ([1, "a"], "token 1 of the prompt must be an integer but is of type str"),
        ([{"role": "human", "content": "x"}], "message 0 of the prompt must have a role of system"),
        ([{"role": "user"}], "message 0 of the prompt must have content, a string, but has None"),
        (
            [{"role": "user", "content": "x"}, "y"],
            "message 1 of the prompt must be a dict but is of type str",
        ),
        (
            [{"role": "user", "content": b"x"}],
            "message 0 of the prompt must have content, a string, but has of type bytes",
        ),
        ([], "the prompt is empty"),
        (mx.array([1.0]), "token 0 of the prompt must be an integer but is of type float"),
    ],
)
def test_what_is_no_prompt_is_named(talker: Path, prompt: Any, said: str) -> None:
    with pytest.raises(KimiError) as error:
        generate(*load(talker), prompt, max_tokens=1)
    assert str(error.value).startswith(said)


def test_prompts_may_be_arrays_and_a_stop_one_string(talker: Path) -> None:
    model, tokenizer = load(talker)
    ids = [5, 6, 7]
    expected = generate(model, tokenizer, ids, max_tokens=20)
    assert generate(model, tokenizer, mx.array(ids), max_tokens=20) == expected
    assert generate(model, tokenizer, list(np.array(ids)), max_tokens=20) == expected
    part = expected[2:5]
    stopped = generate(model, tokenizer, ids, max_tokens=20, stop=part)
    assert stopped == generate(model, tokenizer, ids, max_tokens=20, stop=[part])
    assert stopped == expected[: expected.index(part)]


def test_options_are_those_of_stream_generate() -> None:
    typed = set(get_type_hints(Options))
    named = inspect.signature(stream_generate).parameters.values()
    assert typed == {p.name for p in named if p.kind is p.KEYWORD_ONLY}


def test_the_package_exports_what_a_program_needs() -> None:
    for name in mlx_kimi.__all__:
        assert getattr(mlx_kimi, name).__name__ == name
    assert (Path(mlx_kimi.__file__).parent / "py.typed").is_file()


def test_without_a_folder_the_pocket_model_is_loaded() -> None:
    model, _ = load()
    assert model.config == load_model(pocket_folder(), lazy=True).config
