"""A request that was understood: what the engine is asked, and how its answers are spelled."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from mlx_kimi.server.answers import Step, Whole
from mlx_kimi.server.engine import Progress, Request, Token
from mlx_kimi.server.reader import AnswerReader
from mlx_kimi.server.record import Usage
from mlx_kimi.server.validation import CommonBody
from mlx_kimi.text.tokenizer import Tokenizer

Json = dict[str, Any]


class Reply(ABC):
    """One of the API's two kinds of completion.

    Attributes:
        requests: for the engine, `each` of them for one prompt.
        readers: of their answers.
        begun: when the request came, by `time.perf_counter`.
    """

    kind: str  # of the whole answer
    chunk_kind: str
    prefix: str  # of ids

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
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created, self.begun = int(time.time()), time.perf_counter()
        self._cached: int | None = None  # tokens that were read before the first slice

    @abstractmethod
    def choice(self, number: int, whole: Whole) -> Json:
        """A whole answer."""

    @abstractmethod
    def parts(self, step: Step) -> list[Json]:
        """What a step adds to an answer: choices of a stream's chunks."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[Token]) -> Json | None:
        """What is told of these tokens; None where it is not asked for."""

    def whole(self, answers: Sequence[Whole], usage: Usage) -> Json:
        """All answers."""
        choices = [self.choice(number, each) for number, each in enumerate(answers)]
        return {**self._head(self.kind), "choices": choices, "usage": usage.body}

    def chunks(self, step: Step) -> list[Json]:
        """The chunks of a stream that a step gives."""
        return [self._chunk([part]) for part in self.parts(step)]

    def progress(self, event: Progress) -> Json:
        """How much of the prompt is read, as llama.cpp tells it."""
        if self._cached is None:
            self._cached = event.read
        told = {
            "total": event.total,
            "cache": self._cached,
            "processed": event.read,
            "time_ms": round((time.perf_counter() - self.begun) * 1000),
        }
        return {**self._chunk([]), "prompt_progress": told}

    def usage(self, usage: Usage) -> Json:
        """The last chunk of a stream that asked for it."""
        return {**self._head(self.chunk_kind), "choices": [], "usage": usage.body}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head(self.chunk_kind), "choices": choices}
        return {**chunk, "usage": None} if self.body.wants_usage else chunk

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
