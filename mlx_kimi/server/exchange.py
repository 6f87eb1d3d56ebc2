"""The events of all answers to one request, and what ends them early: the client leaves, the
server stops."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import anyio
from starlette.types import Receive

from mlx_kimi.server.engine import Event, Finished, Ticket


class Gone(Exception):
    """The client has left."""


class Stopping(Exception):
    """The server stops, and waits no longer for answers."""


class Answered(NamedTuple):
    """An event of one of the answers."""

    choice: int
    event: Event


class Exchange:
    """The tickets of one request. Leaving it cancels what is not finished."""

    def __init__(self, tickets: Sequence[Ticket], receive: Receive) -> None:
        self._tickets, self._receive = tickets, receive
        self._events: asyncio.Queue[Answered | Gone | Stopping] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self.open = set(range(len(tickets)))  # answers that are not over

    async def __aenter__(self) -> Exchange:
        pumps = [self._pump(choice, ticket) for choice, ticket in enumerate(self._tickets)]
        self._tasks = [asyncio.create_task(each) for each in (*pumps, self._watch())]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for ticket in self._tickets:
            ticket.cancel()
        for task in self._tasks:
            task.cancel()

    def stop(self) -> None:
        """Wait no longer."""
        self._events.put_nowait(Stopping())

    def close(self, choice: int) -> None:
        """An answer is over, whatever else would come of it."""
        self.open.discard(choice)
        self._tickets[choice].cancel()

    async def next(self, seconds: float | None = None) -> Answered | None:
        """The next event of an open answer; None when there is none for so long.

        Raises:
            Gone: the client has left.
            Stopping: the server stops.
        """
        with anyio.move_on_after(seconds):
            while True:
                found = await self._events.get()
                if isinstance(found, Exception):
                    raise found
                if found.choice in self.open:
                    if isinstance(found.event, Finished):
                        self.open.discard(found.choice)
                    return found
        return None

    async def _pump(self, choice: int, ticket: Ticket) -> None:
        async for event in ticket.events():
            self._events.put_nowait(Answered(choice, event))

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(Gone())
