"""A request that was understood: what the engine is asked, and how its answers are spelled."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from mlx_kimi.server.answers import Step, Whole
from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.server.engine import Progress, Request, Token
from mlx_kimi.server.reader import AnswerReader
from mlx_kimi.server.record import Usage
from mlx_kimi.server.sse import comment, event
from mlx_kimi.server.validation import CommonBody
from mlx_kimi.text.tokenizer import Tokenizer

Json = dict[str, Any]


class Reply(ABC):
    """One of the APIs' kinds of answers, whole or as the events of a stream.

    Attributes:
        requests: for the engine, `each` of them for one prompt.
        readers: of their answers.
        begun: when the request came, by `time.perf_counter`.
    """

    def __init__(
        self,
        body: CommonBody,
        model: str,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        readers: Sequence[AnswerReader],
    ) -> None:
        self.body, self.requests, self.readers = body, requests, readers
        self.each = body.choices
        self._tokenizer, self._model = tokenizer, model
        self._created, self.begun = int(time.time()), time.perf_counter()

    @abstractmethod
    def whole(self, answers: Sequence[Whole], usage: Usage) -> Json:
        """All answers."""

    def opening(self) -> list[bytes]:
        """What a stream begins with, before the prompt is read."""
        return []

    @abstractmethod
    def events(self, step: Step) -> list[bytes]:
        """What a step adds."""

    def progress(self, progress: Progress) -> list[bytes]:
        """How much of the prompt is read."""
        return []

    def keepalive(self) -> bytes:
        """What is sent where nothing else was for a while."""
        return comment("still at it")

    @abstractmethod
    def closing(self, answers: Sequence[Whole], usage: Usage) -> list[bytes]:
        """What a stream ends with."""

    def failed(self, error: ApiError, request: str) -> bytes:
        """What a stream ends with that cannot go on. `request`: the id of the request."""
        return event(error.body)

    def spelled(self, token: Token) -> Json:
        """A token with its logprob, and the likeliest in its place, as OpenAI tells them."""
        top = [self._spelled(id, logprob) for id, logprob in token.top]
        return {**self._spelled(token.id, token.logprob), "top_logprobs": top}

    def _spelled(self, id: int, logprob: float | None) -> Json:
        spelling = self._tokenizer.bytes_of(id)
        text = spelling.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(spelling)}
