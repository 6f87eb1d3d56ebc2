"""The engine: requests of token ids in, events out, from any thread."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_kimi.constraints.constraint import constraint_for
from mlx_kimi.errors import ContextFull, KimiError, OptionError
from mlx_kimi.generation import drafts, lookup
from mlx_kimi.generation.generate import prompt_ids, stream_generate
from mlx_kimi.generation.sample import Sampling
from mlx_kimi.loading import load as load_module
from mlx_kimi.loading.budget import Budget
from mlx_kimi.loading.load import load
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.server import engine as engine_module
from mlx_kimi.server.batch import Batch
from mlx_kimi.server.engine import (
    Engine,
    Event,
    Failed,
    Finished,
    OutOfMemory,
    Progress,
    QueueFull,
    Request,
    Started,
    Ticket,
    Token,
)
from mlx_kimi.server.job import Job, Tally
from mlx_kimi.server.prefill import Prefill, late_in_a_text, measured_slice, stops
from mlx_kimi.server.prefix_tree import as_array
from mlx_kimi.server.turns import Turns
from mlx_kimi.text.tokenizer import Tokenizer
from tests.agent_conversation import SMALL, Recorded
from tests.engine_clients import run_clients
from tests.test_speculate import always  # noqa: F401 (a fixture)

PROMPT = tuple(range(5, 45))


@pytest.fixture(scope="module")
def loaded(talker: Path) -> tuple[KimiLinear, Tokenizer]:
    return load(talker)


@pytest.fixture(scope="module")
def pocket() -> tuple[KimiLinear, Tokenizer]:
    return load()


@pytest.fixture
def one_step_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows of short answers meet, though prompts are slow to read here."""
    monkeypatch.setattr(engine_module, "DECODE_SHARE", 0.0)


@pytest.fixture
def engine(loaded) -> Iterator[Engine]:
    engine = Engine(loaded[0], prefill_slice=64)
    engine.start()
    yield engine
    engine.stop(0)


def rows_of_steps(engine: Engine) -> set[int]:
    """How many rows its steps have, from now on."""
    sizes = set[int]()
    step = engine._batch.step

    def counted() -> None:
        sizes.add(len(engine._batch.jobs))
        step()

    engine._batch.step = counted  # type: ignore[method-assign]
    return sizes


def alone(loaded, request: Request) -> list[int]:
    """The tokens that `stream_generate` gives, which stop where the request says."""
    tokens = []
    options = {"max_tokens": request.max_tokens, **vars(request.sampling)}
    for chunk in stream_generate(*loaded, request.ids, **options):
        tokens.append(chunk.token)
        if chunk.token in request.stop_ids or chunk.finish_reason == "length":
            break
    return tokens


def answered(loaded, requests: list[Request], **options: Any) -> list[list[Event]]:
    """The events of requests that an engine of their own is given at once."""
    engine = Engine(loaded[0], **{"prefill_slice": 64} | options)
    tickets = [engine.submit(request) for request in requests]
    engine.start()
    try:
        return [list(ticket) for ticket in tickets]
    finally:
        engine.stop(0)


def started(events: list[Event]) -> Started:
    return next(event for event in events if isinstance(event, Started))


def tokens(events: list[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temp=1.0, seed=3)], ids=["greedy", "sampled"]
)
def test_an_answer_is_that_of_stream_generate(loaded, engine: Engine, sampling: Sampling) -> None:
    first = alone(loaded, Request(PROMPT, sampling=sampling, max_tokens=12))
    request = Request(PROMPT, sampling=sampling, max_tokens=12, stop_ids=frozenset(first[7:8]))
    events = list(engine.submit(request))
    assert isinstance(events[0], Started) and events[0].prompt_tokens == len(PROMPT)
    assert tokens(events) == alone(loaded, request)
    last = tokens(events)[-1]
    assert events[-1] == Finished("stop" if last in request.stop_ids else "length")


def test_events_come_to_a_task(loaded, engine: Engine) -> None:
    async def all_events() -> list[Event]:
        return [event async for event in engine.submit(Request(PROMPT, max_tokens=5)).events()]

    events = asyncio.run(all_events())
    assert tokens(events) == alone(loaded, Request(PROMPT, max_tokens=5))
    assert events[-1] == Finished("length")


def test_a_prompt_that_cannot_be_answered_is_refused(loaded, engine: Engine) -> None:
    limit = loaded[0].config.model_max_length
    with pytest.raises(ContextFull, match=f"{limit:,}"):
        engine.submit(Request((5,) * limit))
    with pytest.raises(KimiError, match="empty"):
        engine.submit(Request(()))
    with pytest.raises(KimiError, match="from 0 to"):
        engine.submit(Request((5, loaded[0].config.vocab_size)))
    assert engine.status().counters.refused == 3


def test_options_out_of_range_are_refused(loaded) -> None:
    for name, value in (("prefill_slice", 0), ("prefill_slice", 10**6), ("latent_bits", 7)):
        with pytest.raises(OptionError, match=f"{name} must be .* {value:,}"):
            Engine(loaded[0], **{name: value})


def test_more_than_may_wait_are_refused(loaded) -> None:
    engine = Engine(loaded[0], queue_limit=2)
    for _ in range(2):
        engine.submit(Request(PROMPT, max_tokens=1))
    with pytest.raises(QueueFull, match="2 requests wait") as refused:
        engine.submit(Request(PROMPT, max_tokens=1))
    assert refused.value.retry_after >= 1
    engine.start()
    engine.stop(30)


def test_a_cancelled_answer_ends(engine: Engine) -> None:
    ticket = engine.submit(Request(PROMPT, max_tokens=10_000))
    events = iter(ticket)
    while not isinstance(next(events), Token):
        pass
    ticket.cancel()
    assert list(events)[-1] == Finished("cancelled")
    assert engine.submit(Request(PROMPT, max_tokens=1))


def test_stopping_ends_what_runs_and_waits(loaded) -> None:
    engine = Engine(loaded[0])
    tickets = [engine.submit(Request(PROMPT, max_tokens=10_000)) for _ in range(2)]
    engine.start()
    engine.stop(0.2)
    assert [list(ticket)[-1] for ticket in tickets] == [Finished("cancelled")] * 2
    with pytest.raises(KimiError, match="stopp"):
        engine.submit(Request(PROMPT))


def test_a_thread_that_dies_fails_all_tickets(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(loaded[0])
    tickets = [engine.submit(Request(PROMPT)) for _ in range(3)]
    monkeypatch.setattr(engine, "_work", lambda: 1 / 0)
    engine.start()
    for ticket in tickets:
        (event,) = ticket
        assert isinstance(event, Failed) and "division" in str(event.error)
    assert engine.status().state == "failed"
    with pytest.raises(KimiError, match="division"):
        engine.submit(Request(PROMPT))


@pytest.mark.usefixtures("emulated")
def test_kernels_run_in_its_thread() -> None:
    pocket = load()  # nobody has used it: not even what it holds was evaluated by a first use
    requests = [Request(PROMPT[:length], max_tokens=3) for length in (40, 22, 3)]
    answers = [tokens(events) for events in answered(pocket, requests, speculate="auto")]
    assert answers == [alone(pocket, request) for request in requests]


# ------------------------------------------------------------------------------- rows
SAMPLINGS = [
    Sampling(),
    Sampling(temp=1.0, seed=3),
    Sampling(temp=0.8, seed=4, top_k=40),
    Sampling(temp=1.2, seed=5, top_p=0.9, repetition_penalty=1.2),
]


@pytest.mark.slow
def test_eight_requests_that_join_and_leave_at_random_answer_as_alone(
    pocket, one_step_a_slice
) -> None:
    choose = random.Random(7)
    requests = [
        Request(
            tuple(choose.randrange(5, 700) for _ in range(choose.randrange(3, 90))),
            sampling=SAMPLINGS[number % 4],
            max_tokens=choose.randrange(3, 20),
            logprobs=choose.choice([None, 0, 3]),
            stop_ids=pocket[1].stop_ids,
        )
        for number in range(8)
    ]
    expected = [alone(pocket, request) for request in requests]
    engine = Engine(pocket[0], prefill_slice=32, rows=5)
    sizes = rows_of_steps(engine)
    engine.start()
    try:
        tickets = []
        for request in requests:
            tickets.append(engine.submit(request))
            threading.Event().wait(choose.random() / 5)
        events = [list(ticket) for ticket in tickets]
    finally:
        engine.stop(0)
    assert list(map(tokens, events)) == expected
    assert len(sizes) > 1, "rows joined and left"
    for request, got in zip(requests, events, strict=True):
        for event in got:
            if isinstance(event, Token):
                assert (event.logprob is None) == (request.logprobs is None)
                assert len(event.top) == (request.logprobs or 0)
                values = [value for _, value in event.top]
                assert values == sorted(values, reverse=True) and all(v <= 0 for v in values)
                if not request.sampling.temp and event.top:
                    assert (event.id, event.logprob) == event.top[0]


def test_the_same_seed_gives_the_same_answer_and_none_another(loaded) -> None:
    seeded = Request(PROMPT, sampling=Sampling(temp=1.0, seed=9), max_tokens=8)
    any_seed = Request(PROMPT, sampling=Sampling(temp=1.0), max_tokens=8)
    first, second, *others = map(tokens, answered(loaded, [seeded, seeded, any_seed, any_seed]))
    assert first == second
    assert len({tuple(other) for other in (first, *others)}) == 3


def test_rows_of_packed_latents_answer_as_alone(loaded, one_step_a_slice) -> None:
    """Prompts of more than 256 tokens have frozen latents, which are packed to 8 bits."""
    requests = [
        Request(
            tuple((7 * n + 13 * place) % 540 + 5 for place in range(270 + 20 * n)),
            max_tokens=12,
            client=str(n),
        )
        for n in range(3)
    ]
    options: dict[str, Any] = {"max_tokens": 12, "latent_bits": 8, "prefill_step": 64}
    expected = [
        [chunk.token for chunk in stream_generate(*loaded, request.ids, **options)]
        for request in requests
    ]
    events = answered(loaded, requests, latent_bits=8)
    assert list(map(tokens, events)) == expected


# -------------------------------------------------------------------------------- drafts
SORT = "Sort 812 77 344 9."


def guessed(
    loaded, requests: list[Request], **options: Any
) -> tuple[list[list[Event]], dict[str, int]]:
    """The events of requests, one after another, of an engine with drafts, and its counters."""
    engine = Engine(loaded[0], prefill_slice=64, speculate="auto", **options)
    engine.start()
    try:
        events = [list(engine.submit(request)) for request in requests]
    finally:
        engine.stop(0)
    return events, vars(engine.status().counters)


@pytest.fixture
def short_matches(always: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(lookup, "MATCHES", (2, 1))
    monkeypatch.setattr(drafts, "LIKELY", {2: 0.5, 1: 0.5})


def test_drafts_change_no_answer_of_a_lone_row(pocket, short_matches: None) -> None:
    model, tokenizer = pocket
    schema = {"type": "array", "items": {"enum": ["one", "two"]}, "minItems": 4, "maxItems": 4}
    obeys = constraint_for(tokenizer, json_schema=schema)
    texts = [SORT, "What is Kimi Linear?", "What is 12 + 30?"]
    requests = [
        Request(
            tuple(prompt_ids(model, tokenizer, text)),
            sampling=SAMPLINGS[number % 4],
            max_tokens=40,
            logprobs=2,
            stop_ids=tokenizer.stop_ids,
            constraint=obeys if number % 2 else None,
        )
        for number, text in enumerate(texts * 3)
    ]
    expected = [answered(pocket, [request])[0] for request in requests]
    events, counters = guessed(pocket, requests)
    assert counters["drafted_tokens"] > counters["accepted_tokens"] > 20
    for request, ours, plain in zip(requests, events, expected, strict=True):
        assert tokens(ours) == tokens(plain) and ours[-1] == plain[-1], request
        for one, other in zip(ours, plain, strict=True):
            if isinstance(one, Token) and isinstance(other, Token):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_an_answer_goes_on_from_what_drafts_left(pocket, short_matches: None) -> None:
    """Its end lies within a draft, or a limit ends it; the next turn reads what is new."""
    model, tokenizer = pocket
    ids = tuple(prompt_ids(model, tokenizer, SORT))
    (plain,) = answered(pocket, [Request(ids, max_tokens=40, stop_ids=tokenizer.stop_ids)])
    for most in (2, 3, 5, 8, 40):
        first = Request(ids, max_tokens=most, stop_ids=tokenizer.stop_ids)
        longer = (*ids, *tokens(plain)[:most], *ids)
        (told, turn), counters = guessed(pocket, [first, Request(longer, max_tokens=4)])
        assert tokens(told) == tokens(plain)[:most] and counters["drafted_tokens"]
        read_all_but = len(longer) - started(turn).cached_tokens
        assert read_all_but <= len(ids) + 1, most
        (cold,) = answered(pocket, [Request(longer, max_tokens=4)])
        assert tokens(turn) == tokens(cold)


def test_rows_that_join_a_row_with_drafts_change_nothing(pocket, short_matches: None) -> None:
    model, tokenizer = pocket
    ids = tuple(prompt_ids(model, tokenizer, SORT))
    requests = [
        Request(ids[n:], max_tokens=30, sampling=Sampling(temp=1, seed=n), client=str(n))
        for n in range(3)
    ]
    expected = [tokens(answered(pocket, [request])[0]) for request in requests]
    engine = Engine(model, prefill_slice=64, speculate="auto")
    engine.start()
    try:
        tickets = []
        for request in requests:
            tickets.append(engine.submit(request))
            threading.Event().wait(0.05)
        assert [tokens(list(ticket)) for ticket in tickets] == expected
    finally:
        engine.stop(0)


def test_a_step_with_a_draft_that_fails_changes_no_answer(
    pocket, short_matches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = pocket
    request = Request(tuple(prompt_ids(model, tokenizer, SORT)), max_tokens=20)
    (expected,) = answered(pocket, [request])
    hidden, failed = type(model).hidden, list[int]()

    def failing(self: KimiLinear, ids: mx.array, *rest: Any, **options: Any) -> mx.array:
        if options.get("steps") is not None and not failed:
            failed.append(ids.shape[1])
            raise RuntimeError("planted")
        return hidden(self, ids, *rest, **options)

    monkeypatch.setattr(type(model), "hidden", failing)
    monkeypatch.setattr(engine_module, "leave_out_what_failed", lambda *_: None)
    (events,), _ = guessed(pocket, [request])
    assert failed
    assert tokens(events) == tokens(expected)


# ------------------------------------------------------------------------------- prompts
def test_states_are_kept_at_boundaries_but_not_close_together() -> None:
    assert stops((), 0, 100) == [100]
    assert stops((), 50, 100) == [], "too near to where it went on from"
    assert stops((10, 200, 230, 300, 395), 0, 400) == [10, 200, 300, 395]
    assert stops((10, 200), 200, 270) == [270]
    assert stops((), 0, 9000) == [4096, 8192, 9000]


def test_a_turn_reads_what_is_new_and_draws_what_it_would_draw_cold(loaded) -> None:
    engine = Engine(loaded[0], prefill_slice=64)
    engine.start()
    try:
        first = Request(PROMPT * 4, boundaries=(150,), max_tokens=6, logprobs=4)
        answer = tokens(list(engine.submit(first)))
        longer = (*first.ids, *answer, 7, 8, 9)
        warm = list(engine.submit(Request(longer, max_tokens=4, logprobs=4)))
        edited = (*first.ids[:155], 9, *first.ids[156:])
        told = list(engine.submit(Request(edited, max_tokens=2)))
    finally:
        engine.stop(0)
    assert started(warm).cached_tokens == len(first.ids) + len(answer)
    assert "is new" in started(warm).why
    assert started(told).cached_tokens == 150
    assert started(told).why == "differs from what was read at token 155"
    (cold,) = answered(loaded, [Request(longer, max_tokens=4, logprobs=4)])
    assert started(cold).why == "no earlier prompt begins with these tokens"
    for hit, read in zip(warm, cold, strict=True):
        if isinstance(hit, Token) and isinstance(read, Token):
            assert hit.id == read.id
            # Both are float32 sums of the same terms in other orders: 1e-4 of a logprob.
            assert dict(hit.top) == pytest.approx(dict(read.top), abs=1e-4)


def test_equal_prompts_at_once_are_read_once(loaded) -> None:
    ids = tuple(range(5, 305))
    requests = [
        Request(ids, boundaries=(290,), max_tokens=3, client=client) for client in ("a", "a", "b")
    ]
    other = Request((700, *ids), max_tokens=3, client="c")
    engine = Engine(loaded[0], prefill_slice=64)
    tickets = [engine.submit(request) for request in (*requests, other)]
    engine.start()
    events = [list(ticket) for ticket in tickets]
    engine.stop(0)
    assert engine.status().counters.read_tokens == 300 + 10 + 10 + 301
    assert [started(told).cached_tokens for told in events] == [0, 290, 290, 0]
    assert tokens(events[0]) == tokens(events[1]) == tokens(events[2])


def test_progress_is_told_to_who_wants_it(loaded) -> None:
    (told,) = answered(loaded, [Request(PROMPT * 4, wants_progress=True, max_tokens=1)])
    assert told[:4] == [Progress(read, 160) for read in (0, 64, 128, 160)]
    assert [type(event) for event in told[4:]] == [Started, Token, Finished]


def test_clients_take_turns_and_each_is_served_as_it_came() -> None:
    turns = Turns()
    jobs = [
        Job(Ticket(Request((1,), client=name[0])), 1, 0, Tally())
        for name in ("a1", "a2", "a3", "b1", "c1", "b2")
    ]
    for job in jobs:
        turns.add(job)
    order = []
    while job := turns.next(lambda job: job is not jobs[3] or len(order) > 2):
        order.append(jobs.index(job))
        turns.remove(job)
    a1, a2, a3, b1, c1, b2 = range(6)
    assert order == [a1, b2, c1, a2, b1, a3], "b1 had to wait, and b2 went before it"
    assert not turns and not list(turns)


def test_a_long_prompt_lets_others_go_on(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two slices every running answer gets a token; a short prompt need not wait."""
    monkeypatch.setattr(engine_module, "TURN_SECONDS", 0.0)
    engine = Engine(loaded[0], prefill_slice=64)
    log = list[str]()
    for owner, name, said in ((Prefill, "read_slice", "slice"), (Batch, "step", "step")):
        method = getattr(owner, name)

        def logged(*given: Any, method: Any = method, said: str = said) -> Any:
            log.append(said)
            return method(*given)

        monkeypatch.setattr(owner, name, logged)
    engine.start()
    running = engine.submit(Request(PROMPT, max_tokens=1000, client="a"))
    events = iter(running)
    while not isinstance(next(events), Token):
        pass
    del log[:]
    long = engine.submit(Request(tuple(range(5, 505)) * 2, max_tokens=1, client="b"))
    short = engine.submit(Request(PROMPT[::-1], max_tokens=1, client="c"))
    list(short)
    assert log.count("slice") <= 4 and not long.is_closed
    list(long)
    running.cancel()
    engine.stop(5)
    slices = [place for place, said in enumerate(log) if said == "slice"]
    assert len(slices) >= 1000 // 64 + 2
    assert all(after - before > 1 for before, after in zip(slices, slices[1:], strict=False))


def test_the_length_of_slices_is_measured(pocket) -> None:
    later = late_in_a_text(pocket[0].config)
    assert 5 < later < 50, "this model is small: attention is most of a long text's work"
    seconds: dict[float, int] = {0.0: 2048, 0.1 / later / 64: 256, 1.0: 16}
    for one, expected in seconds.items():
        assert measured_slice(pocket[0], None, lambda count, one=one: one * count) == expected


# ------------------------------------------------------------------------------- ends
def until(condition: Callable[[], bool]) -> None:
    """Wait, for half a minute at most."""
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come true")


def test_a_cancelled_request_frees_its_place_wherever_it_is(loaded) -> None:
    engine = Engine(loaded[0], prefill_slice=32, rows=2)
    engine.start()
    decoding = engine.submit(Request(PROMPT, max_tokens=10_000))
    until(lambda: engine.status().decoding == 1)
    ids = tuple(range(5, 505)) * 8
    reading = engine.submit(Request(ids, max_tokens=1, wants_progress=True))
    events = iter(reading)
    while next(events) < Progress(96, len(ids)):
        pass
    queued = engine.submit(Request(PROMPT[::-1], max_tokens=1))
    until(lambda: engine.status().queued == 1)
    for ticket in (queued, reading, decoding):
        ticket.cancel()
        ticket.cancel()
    assert list(events)[-1] == Finished("cancelled")
    assert [list(ticket)[-1] for ticket in (queued, decoding)] == [Finished("cancelled")] * 2
    until(lambda: (s := engine.status()).queued + s.reading + s.decoding == 0)
    assert engine._tree.find(as_array(ids)).length >= 96, "what was read is not read again"
    engine.stop(0)
    assert engine.status().counters.cancelled == 3
    assert engine.status().state == "stopped"


@pytest.mark.parametrize("place", ["prefill", "decode"])
def test_too_little_memory_ends_one_request(
    loaded, monkeypatch: pytest.MonkeyPatch, one_step_a_slice, place: str
) -> None:
    requests = [Request(PROMPT[n:] * 3, max_tokens=8, client=str(n)) for n in range(3)]
    expected = [alone(loaded, request) for request in requests]
    message = "[METAL] Command buffer execution failed: Insufficient Memory (00000008)."
    fails(monkeypatch, 2 if place == "prefill" else 3, message, place)
    events = answered(loaded, requests)
    failed = [told for told in events if isinstance(told[-1], Failed)]
    assert len(failed) == 1 and "memory is too small" in str(failed[0][-1].error)
    for told, wanted in zip(events, expected, strict=True):
        assert told in failed or tokens(told) == wanted


def fails(monkeypatch: pytest.MonkeyPatch, at: int, message: str, place: str) -> None:
    """The call number `at` of `KimiLinear.hidden` for a prompt, or for several rows, fails once."""
    hidden, calls = KimiLinear.hidden, [0]

    def once(self: KimiLinear, ids: mx.array, *given: Any, **named: Any) -> mx.array:
        counts = ids.shape[0] > 1 if place == "decode" else ids.shape[1] > 1
        calls[0] += counts
        if counts and calls[0] == at:
            raise RuntimeError(message)
        return hidden(self, ids, *given, **named)

    monkeypatch.setattr(KimiLinear, "hidden", once)


@pytest.mark.parametrize("place", ["prefill", "decode"])
def test_a_kernel_that_fails_changes_no_answer(
    loaded, monkeypatch: pytest.MonkeyPatch, one_step_a_slice, tmp_path, place: str
) -> None:
    monkeypatch.setenv("MLX_KIMI_CACHE", str(tmp_path))
    monkeypatch.setattr(loaded[0], "choices", loaded[0].choices)
    stop_ids = loaded[1].stop_ids
    requests = [
        Request(PROMPT[n:] * 3, sampling=SAMPLINGS[n], max_tokens=8, logprobs=1, stop_ids=stop_ids)
        for n in range(3)
    ]
    expected = [alone(loaded, request) for request in requests]
    message = "[metal::Device] Unable to load kernel custom_kernel_kda_decode_3f"
    fails(monkeypatch, 2, message, place)
    events = answered(loaded, requests)
    assert list(map(tokens, events)) == expected
    assert [sum(isinstance(e, Started) for e in told) for told in events] == [1, 1, 1]
    assert list(loaded[0].choices.off) == ["kda_decode"]


def test_a_lost_gpu_ends_all_requests(loaded, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("MLX_KIMI_CACHE", str(tmp_path))
    message = "[METAL] Command buffer execution failed: Caused GPU Hang Error (00000003)."
    fails(monkeypatch, 1, message, "prefill")
    events = answered(loaded, [Request(PROMPT, max_tokens=2)] * 2)
    assert ["the GPU failed" in str(told[-1].error) for told in events] == [True, True]


def test_logits_that_are_no_numbers_end_their_row_alone(
    loaded, monkeypatch: pytest.MonkeyPatch, one_step_a_slice
) -> None:
    requests = [Request(PROMPT[n:] * 3, max_tokens=8) for n in range(3)]
    expected = [alone(loaded, request) for request in requests]
    logits, calls = KimiLinear.logits, [0]

    def broken(self: KimiLinear, hidden: mx.array) -> mx.array:
        found = logits(self, hidden)
        calls[0] += found.shape[0] == 3
        if found.shape[0] == 3 and calls[0] == 2:
            found = mx.concatenate([found[:1], found[1:2] * mx.nan, found[2:]])
        return found

    monkeypatch.setattr(KimiLinear, "logits", broken)
    first, second, third = answered(loaded, requests)
    assert isinstance(second[-1], Failed) and "NaN" in str(second[-1].error)
    assert [tokens(first), tokens(third)] == [expected[0], expected[2]]
    assert tokens(second) == expected[1][: len(tokens(second))]


def memory_of(loaded, *requests: Request) -> int:
    """Bytes that just hold such rows together, and what a step works in."""
    guard = Engine(loaded[0], prefill_slice=64)._guard
    rows = sum(guard.of(len(request.ids) + request.max_tokens) for request in requests)
    return guard.memory - guard.for_rows + rows


def test_what_cannot_fit_into_the_memory_is_refused(loaded) -> None:
    request = Request(PROMPT, max_tokens=100)
    engine = Engine(loaded[0], memory=memory_of(loaded, request), prefill_slice=64)
    assert engine.submit(request)
    with pytest.raises(OutOfMemory, match="of 40 tokens and an answer of 4,056 take .* are free"):
        engine.submit(Request(PROMPT, max_tokens=10**6))
    with pytest.raises(OutOfMemory, match="of 140 tokens and an answer of 1 take"):
        engine.submit(Request(PROMPT * 3 + PROMPT[:20], max_tokens=1))


def test_rows_wait_for_memory(loaded) -> None:
    """Two rows do not fit together: one after the other, and the tree makes room."""
    requests = [Request(PROMPT[n:], max_tokens=20, client=str(n)) for n in range(3)]
    memory = memory_of(loaded, *requests[:1])
    engine = Engine(loaded[0], prefill_slice=64, memory=memory)
    tickets = [engine.submit(request) for request in requests]
    most = [0]
    step = engine._batch.step

    def counted() -> None:
        most[0] = max(most[0], len(engine._batch.jobs))
        step()

    engine._batch.step = counted  # type: ignore[method-assign]
    engine.start()
    events = [list(ticket) for ticket in tickets]
    engine.stop(0)
    assert [told[-1] for told in events] == [Finished("length")] * 3 and most == [1]
    assert engine.status().tree_states == 0


def test_many_clients_who_come_and_go(loaded) -> None:
    """Counters are the sums of what was told, nothing hangs, and the tree keeps its bound."""
    engine = Engine(loaded[0], prefill_slice=64, rows=6, tree_memory=4 << 20)
    engine.start()
    sums = run_clients(engine, clients=40, turns=2, seed=1)
    engine.stop(0)
    status = engine.status()
    assert sums == {name: getattr(status.counters, name) for name in sums}
    assert sums["submitted"] == 80 and sums["cached_tokens"] > 0 and not sums["failed"]
    assert status.tree_bytes <= 4 << 20 and status.queued + status.reading + status.decoding == 0


def test_under_a_memory_budget_one_row_runs_at_a_time(
    talker: Path, loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "slots_for", lambda *_: 4)  # of 8 experts
    streamed = load(talker, Budget(8 << 30))
    requests = [Request(PROMPT[n:], max_tokens=6, client=str(n)) for n in range(3)]
    expected = [alone(loaded, request) for request in requests]
    engine = Engine(streamed[0], prefill_slice=10**4, tree_memory=64 << 20)
    assert engine.status().prefill_slice == streamed[0].offload.prefill_step
    sizes = rows_of_steps(engine)
    tickets = [engine.submit(request) for request in requests]
    engine.start()
    answers = [tokens(list(ticket)) for ticket in tickets]
    again = list(engine.submit(Request((*PROMPT, *answers[0], 9), max_tokens=1)))
    engine.stop(0)
    assert answers == expected and sizes == {1}
    assert started(again).cached_tokens == len(PROMPT) + 5, "the last token was not read"


def test_tickets_are_read_by_tasks_while_the_engine_dies(loaded, monkeypatch) -> None:
    engine = Engine(loaded[0], prefill_slice=64)

    async def all_of(ticket: Ticket) -> list[Event]:
        return [event async for event in ticket.events()]

    async def both() -> list[list[Event]]:
        tickets = [engine.submit(Request(PROMPT, max_tokens=100)) for _ in range(2)]
        tasks = [asyncio.create_task(all_of(ticket)) for ticket in tickets]
        await asyncio.sleep(0.05)
        monkeypatch.setattr(engine._batch, "step", lambda: 1 / 0)
        engine.start()
        return await asyncio.wait_for(asyncio.gather(*tasks), 30)

    for events in asyncio.run(both()):
        assert isinstance(events[-1], Failed) and "division" in str(events[-1].error)


@pytest.mark.slow
def test_an_agent_reads_its_new_tokens_and_no_more_than_64_others(loaded, one_step_a_slice) -> None:
    """28 tools, 20 rounds, two sub-agents and a title beside them, an edit in the middle."""
    engine = Engine(loaded[0], prefill_slice=256)
    engine.start()
    names = list[str]()
    try:
        for turn in Recorded(range(10, 500), SMALL).turns():
            events = list(engine.submit(turn.request))
            turn.answer = tokens(events)
            told = started(events)
            names.append(turn.name)
            is_first = names.count(turn.name) == 1 and turn.name in ("main", "title")
            assert is_first == (turn.new == told.prompt_tokens)
            assert told.prompt_tokens - told.cached_tokens <= turn.new + 64, turn.name
    finally:
        engine.stop(0)
    assert names.count("main") == 20 and names.count("main edited") == 1
    assert names.count("agent 1") == names.count("agent 2") == 4 and "title" in names
    assert engine.status().counters.evicted == 0
