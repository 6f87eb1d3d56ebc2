"""A request of tokens, and the events that answer it: what the engine's thread and others share."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from threading import Condition
from typing import Literal, NamedTuple

from mlx_kimi.constraints.constraint import Constraint
from mlx_kimi.defaults import MAX_TOKENS
from mlx_kimi.errors import KimiError
from mlx_kimi.generation.sample import Sampling

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """A prompt of token ids and what is wanted of its answer.

    Attributes:
        ids: the prompt.
        boundaries: lengths of prefixes of `ids` whose states are worth keeping: after the system
            message and tools, at the ends of messages, before the generation prompt.
        max_tokens: the answer's length at most; the context window may end it earlier.
        logprobs: None: none; else so many top alternatives beside the drawn token's own logprob.
        client: who asks. Clients take turns.
        stop_ids: tokens that end the answer; the one drawn is the answer's last token.
        wants_progress: whether to tell how much of the prompt is read.
        constraint: what the answer must obey.
    """

    ids: tuple[int, ...]
    boundaries: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    max_tokens: int = MAX_TOKENS
    logprobs: int | None = None
    client: str = ""
    stop_ids: frozenset[int] = frozenset()
    wants_progress: bool = False
    constraint: Constraint | None = None


class Progress(NamedTuple):
    """So many of the prompt's tokens have been read, those of the prefix cache included."""

    read: int
    total: int


class Started(NamedTuple):
    """The prompt is read. `why` says in words why the prefix cache held no more of it."""

    prompt_tokens: int
    cached_tokens: int
    why: str


class Token(NamedTuple):
    """A token that was drawn. Natural logarithms of the model's own distribution, which no
    temperature, penalty or filter has changed; `top` likeliest first. None where none are wanted.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Finished(NamedTuple):
    """The answer is over."""

    reason: Reason


class Failed(NamedTuple):
    """There is no answer, or no more of it."""

    error: KimiError


# In order: Progress*, Started, Token*, Finished; Failed may come at any place and is the last.
Event = Progress | Started | Token | Finished | Failed


class Ticket:
    """The events of one request. They come from the engine's thread; one reader takes them."""

    def __init__(self, request: Request, wake: Callable[[], None] = lambda: None) -> None:
        """`wake` tells the engine that something was asked of it."""
        self.request = request
        self._wake = wake
        self._events: deque[Event] = deque()
        self._changed = Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: asyncio.Event | None = None
        self._is_cancelled = False
        self._is_closed = False

    def cancel(self) -> None:
        """Ask for no more tokens: the last event soon follows. From any thread, at any time."""
        self._is_cancelled = True
        self._wake()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    @property
    def is_closed(self) -> bool:
        """Whether the last event was put."""
        return self._is_closed

    def put(self, event: Event) -> None:
        """For the engine: add an event. After the last one nothing is added."""
        with self._changed:
            if self._is_closed:
                return
            self._events.append(event)
            self._is_closed = is_last(event)
            self._changed.notify_all()
            if self._loop is not None and self._arrived is not None:
                try:
                    self._loop.call_soon_threadsafe(self._arrived.set)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    self._loop = None

    def __iter__(self) -> Iterator[Event]:
        """All events, waiting for each; for a thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events)
                event = self._events.popleft()
            yield event
            if is_last(event):
                return

    async def events(self) -> AsyncIterator[Event]:
        """All events, waiting for each; for a task."""
        with self._changed:
            self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        while True:
            self._arrived.clear()
            while self._events:
                event = self._events.popleft()
                yield event
                if is_last(event):
                    return
            await self._arrived.wait()


def is_last(event: Event) -> bool:
    """Whether no event follows."""
    return isinstance(event, (Finished, Failed))
