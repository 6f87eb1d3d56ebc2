"""The answers to one request as deltas, counted in its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlx_kimi.server.api_errors import of_engine, stopping
from mlx_kimi.server.engine import Failed, Finished, Progress, Reason, Started, Token
from mlx_kimi.server.exchange import Exchange, Stopping
from mlx_kimi.server.reader import AnswerReader, Delta, FinishReason
from mlx_kimi.server.record import Record


class Step(NamedTuple):
    """What one event adds to one answer."""

    choice: int
    delta: Delta
    finish: FinishReason | None = None
    begins: bool = False  # the prompt is read


@dataclass
class Whole:
    """An answer that is complete."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)  # as a message has them
    finish: FinishReason = "stop"
    stop_string: str | None = None  # that ended it

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        for call in delta.calls:
            if call.id is not None:
                function = {"name": call.name, "arguments": ""}
                self.calls.append({"id": call.id, "type": "function", "function": function})
            self.calls[call.number]["function"]["arguments"] += call.arguments


class Answers:
    """Reads the events of all answers to one request.

    Attributes:
        found: what they say so far.
    """

    def __init__(
        self, exchange: Exchange, readers: Sequence[AnswerReader], record: Record, each: int
    ) -> None:
        """`each`: answers to one prompt, which is counted once."""
        self._exchange, self._readers = exchange, readers
        self._record, self._each = record, each
        self.found = [Whole() for _ in readers]

    @property
    def are_over(self) -> bool:
        return not self._exchange.open

    async def next(self, seconds: float | None = None) -> Step | Progress | None:
        """What happens next; None when nothing does for so long.

        Raises:
            ApiError: an answer failed, or the server stops.
            Gone: the client has left.
        """
        try:
            found = await self._exchange.next(seconds)
        except Stopping:
            raise stopping() from None
        if found is None:
            return None
        choice, event = found
        if isinstance(event, Progress):
            return event
        if isinstance(event, Failed):
            raise of_engine(event.error)
        if isinstance(event, Started):
            return self._started(choice, event)
        if isinstance(event, Finished):
            return self._finished(choice, event.reason)
        return self._token(choice, event)

    def _started(self, choice: int, event: Started) -> Step:
        if choice % self._each == 0:
            self._record.usage.prompt_tokens += event.prompt_tokens
            self._record.usage.cached_tokens += event.cached_tokens
        if choice == 0:
            self._record.why = event.why
            self._record.started_seconds = self._record.elapsed()
        return Step(choice, Delta(), begins=True)

    def _token(self, choice: int, token: Token) -> Step:
        if self._record.first_token_seconds is None:
            self._record.first_token_seconds = self._record.elapsed()
        self._record.usage.completion_tokens += 1
        reader = self._readers[choice]
        delta = reader.add(token)
        if not reader.is_over:
            return self._step(choice, delta)
        self._exchange.close(choice)
        return self._step(choice, delta, reader.reason("stop"))

    def _finished(self, choice: int, reason: Reason) -> Step:
        if reason == "cancelled":  # and not by us, who would not listen any longer
            raise stopping()
        delta = self._readers[choice].finish()
        return self._step(choice, delta, self._readers[choice].reason(reason))

    def _step(self, choice: int, delta: Delta, finish: FinishReason | None = None) -> Step:
        self.found[choice].add(delta)
        if finish is not None:
            self.found[choice].finish = finish
            self.found[choice].stop_string = self._readers[choice].stop_string
            self._record.finish.append(finish)
        return Step(choice, delta, finish)
