"""The engine: requests of token ids in, events out, from any thread."""

import asyncio
from collections.abc import Iterator

import pytest

from mlx_kimi.errors import ContextFull, KimiError
from mlx_kimi.generation.generate import stream_generate
from mlx_kimi.generation.sample import Sampling
from mlx_kimi.loading.load import load
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.server.engine import (
    Engine,
    Event,
    Failed,
    Finished,
    QueueFull,
    Request,
    Started,
    Token,
)
from mlx_kimi.text.tokenizer import Tokenizer

PROMPT = tuple(range(5, 45))


@pytest.fixture(scope="module")
def loaded() -> tuple[KimiLinear, Tokenizer]:
    return load()


@pytest.fixture
def engine(loaded) -> Iterator[Engine]:
    engine = Engine(loaded[0], prefill_slice=64)
    engine.start()
    yield engine
    engine.stop(0)


def alone(loaded, request: Request) -> list[int]:
    """The tokens that `stream_generate` gives, which stop where the request says."""
    s = request.sampling
    tokens = []
    for chunk in stream_generate(
        *loaded, request.ids, max_tokens=request.max_tokens, temp=s.temp, seed=s.seed
    ):
        tokens.append(chunk.token)
        if chunk.token in request.stop_ids or chunk.finish_reason == "length":
            break
    return tokens


def tokens(events: list[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temp=1.0, seed=3)], ids=["greedy", "sampled"]
)
def test_an_answer_is_that_of_stream_generate(loaded, engine: Engine, sampling: Sampling) -> None:
    request = Request(PROMPT, sampling=sampling, max_tokens=12, stop_ids=loaded[1].stop_ids)
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
    monkeypatch.setattr(engine, "_answer", lambda ticket: 1 / 0)
    engine.start()
    for ticket in tickets:
        (event,) = ticket
        assert isinstance(event, Failed) and "division" in str(event.error)
    assert engine.status().state == "failed"
    with pytest.raises(KimiError, match="division"):
        engine.submit(Request(PROMPT))
