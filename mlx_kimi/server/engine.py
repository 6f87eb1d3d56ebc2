"""One thread that owns MLX, the model and all states, and answers requests of token ids."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field, replace
from threading import Condition, Thread
from typing import Literal

from mlx_kimi.defaults import PREFILL_STEP
from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.generation.decode import decode, prefill
from mlx_kimi.generation.generate import check_ids
from mlx_kimi.generation.sample import Sampler
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.server.ticket import (
    Event,
    Failed,
    Finished,
    Progress,
    Reason,
    Request,
    Started,
    Ticket,
    Token,
)

__all__ = [
    "Counters",
    "Engine",
    "Event",
    "Failed",
    "Finished",
    "OutOfMemory",
    "Progress",
    "QueueFull",
    "Reason",
    "Request",
    "Started",
    "Status",
    "Ticket",
    "Token",
]

QUEUE_LIMIT = 256  # requests that wait
ROWS = 16  # requests that are read or answered together
State = Literal["starting", "ready", "stopping", "stopped", "failed"]
_log = logging.getLogger(__name__)


class QueueFull(KimiError):
    """As many requests wait as may. `retry_after`: seconds until it is worth asking again."""

    def __init__(self, limit: int, retry_after: int) -> None:
        super().__init__(f"{limit:,} requests wait already; ask again in {retry_after} s")
        self.retry_after = retry_after


class OutOfMemory(KimiError):
    """A request whose prompt and answer do not fit into the memory."""


@dataclass(frozen=True)
class Counters:
    """Sums since the start, over all requests."""

    submitted: int = 0
    refused: int = 0  # the queue was full, or the request could never be answered
    stopped: int = 0  # finished with "stop"
    length: int = 0  # finished with "length"
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0  # of requests that started, as their `Started` says
    cached_tokens: int = 0  # of these, those that the prefix cache held
    read_tokens: int = 0  # of all prompts: what the model has read, other requests' included
    generated_tokens: int = 0  # each a `Token`
    evicted: int = 0  # states that the prefix cache gave up for memory


@dataclass(frozen=True)
class Status:
    """The engine at one moment."""

    state: State
    failure: str | None  # why it is "failed"
    prefill_slice: int  # prompt tokens that are read between two decode steps; 0: not known yet
    queued: int  # requests that wait
    reading: int  # whose prompts are being read
    decoding: int  # that are being answered
    tree_states: int  # that the prefix cache holds
    tree_bytes: int
    tree_memory: int  # bytes that it may hold
    counters: Counters = field(default_factory=Counters)


class Engine:
    """Answers requests of token ids with one model, in a thread of its own."""

    def __init__(
        self,
        model: KimiLinear,
        *,
        queue_limit: int = QUEUE_LIMIT,
        rows: int = ROWS,
        tree_memory: int | None = None,
        prefill_slice: int | None = None,
        latent_bits: int | None = None,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            queue_limit: requests that may wait.
            rows: requests that are read or answered at a time; one under a memory budget.
            tree_memory: bytes of the prefix cache; None: a share of what is free.
            prefill_slice: prompt tokens read between two decode steps; None: measured.
            latent_bits: of `KimiLinear.make_cache`.
        """
        self.model = model
        self._queue_limit, self._slice = queue_limit, prefill_slice or PREFILL_STEP
        self._latent_bits = latent_bits
        self._changed = Condition()
        self._queue: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._state: State = "starting"
        self._failure: str | None = None
        self._counters = Counters()
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    # --------------------------------------------------------------------------- from any thread
    def start(self) -> None:
        """Start the thread; requests may have been submitted before."""
        self._thread.start()

    def stop(self, patience: float) -> None:
        """Take no more requests, let those that run finish for `patience` seconds, cancel the
        rest, and end the thread."""
        with self._changed:
            if self._state in ("starting", "ready"):
                self._state = "stopping"
            self._changed.notify_all()
        self._thread.join(patience)
        with self._changed:
            for ticket in (*self._queue, self._running):
                if ticket is not None:
                    ticket.cancel()
        self._thread.join()

    def submit(self, request: Request) -> Ticket:
        """Queue a request.

        Raises:
            QueueFull: too many wait.
            ContextFull: the prompt fills the model's context.
            OutOfMemory: prompt and answer do not fit into the memory.
            KimiError: the prompt is empty or has ids that the model does not know, or the engine
                has stopped or failed.
        """
        ticket = Ticket(request, self._wake)
        try:
            check_ids(self.model, request.ids)
            with self._changed:
                if self._state not in ("starting", "ready"):
                    raise KimiError(self._failure or "the server is stopping")
                if len(self._queue) >= self._queue_limit:
                    raise QueueFull(self._queue_limit, 1)
                self._count(submitted=1)
                self._queue.append(ticket)
                self._changed.notify_all()
        except KimiError:
            self._count(refused=1)
            raise
        return ticket

    def status(self) -> Status:
        """The engine at this moment. Never waits for a step of the model."""
        with self._changed:
            running = int(self._running is not None)
            return Status(
                self._state,
                self._failure,
                self._slice,
                len(self._queue),
                0,
                running,
                0,
                0,
                0,
                self._counters,
            )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _count(self, **more: int) -> None:
        with self._changed:
            counts = {name: getattr(self._counters, name) + n for name, n in more.items()}
            self._counters = replace(self._counters, **counts)

    # --------------------------------------------------------------------------- the engine's own
    def _run(self) -> None:
        try:
            with self._changed:
                if self._state == "starting":
                    self._state = "ready"
            while self._take_next():
                assert self._running is not None
                self._answer(self._running)
        except BaseException as error:
            _log.exception("the engine's thread ended")
            self._end("failed", f"the engine failed: {in_words(error)}")  # type: ignore[arg-type]
        else:
            self._end("stopped", None)

    def _end(self, state: State, failure: str | None) -> None:
        with self._changed:
            self._state, self._failure = state, failure
            open_tickets = [t for t in (self._running, *self._queue) if t is not None]
            self._queue.clear()
            self._running = None
        for ticket in open_tickets:
            ticket.put(Failed(KimiError(failure or "the server has stopped")))

    def _take_next(self) -> bool:
        """Wait for a request; False: the engine stops."""
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._queue or self._state == "stopping")
            if self._queue:
                self._running = self._queue.popleft()
            return self._running is not None

    def _answer(self, ticket: Ticket) -> None:
        try:
            reason = self._finish_reason(ticket)
        except (KimiError, RuntimeError) as error:
            self._count(failed=1)
            is_known = isinstance(error, KimiError)
            ticket.put(Failed(error if is_known else KimiError(in_words(error))))  # type: ignore[arg-type]
            return
        names = {"stop": "stopped", "length": "length", "cancelled": "cancelled"}
        self._count(**{names[reason]: 1})
        ticket.put(Finished(reason))

    def _finish_reason(self, ticket: Ticket) -> Reason:
        request, ids = ticket.request, list(ticket.request.ids)
        if ticket.is_cancelled:
            return "cancelled"
        state = TokenState(self.model, self._latent_bits, snapshot_every=None)
        hidden, cached = prefill(state, ids, self._slice)
        ticket.put(Started(len(ids), cached, "nothing is kept yet"))
        self._count(prompt_tokens=len(ids), cached_tokens=cached, read_tokens=len(ids) - cached)
        sampler = Sampler(request.sampling, ids, self.model.config.vocab_size)
        limit = min(request.max_tokens, self.model.config.model_max_length - len(ids))
        for token in decode(state, hidden, sampler, limit):
            if ticket.is_cancelled:
                return "cancelled"
            self._count(generated_tokens=1)
            ticket.put(Token(token))
            if token in request.stop_ids:
                return "stop"
        return "length"
