"""What chat and text completions of OpenAI's API share: choices, and streams of chunks."""

from __future__ import annotations

import secrets
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from mlx_kimi.server.answers import Step, Whole
from mlx_kimi.server.engine import Progress, Token
from mlx_kimi.server.record import Usage
from mlx_kimi.server.reply import Json, Reply
from mlx_kimi.server.sse import DONE, event


class Completion(Reply):
    """Answers as choices."""

    kind: str  # of the whole answer
    chunk_kind: str
    prefix: str  # of ids

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
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
        choices = [self.choice(number, each) for number, each in enumerate(answers)]
        return {**self._head(self.kind), "choices": choices, "usage": usage.body}

    def events(self, step: Step) -> list[bytes]:
        return [event(self._chunk([part])) for part in self.parts(step)]

    def progress(self, progress: Progress) -> list[bytes]:
        """How much of the prompt is read, as llama.cpp tells it."""
        if self._cached is None:
            self._cached = progress.read
        told = {
            "total": progress.total,
            "cache": self._cached,
            "processed": progress.read,
            "time_ms": round((time.perf_counter() - self.begun) * 1000),
        }
        return [event({**self._chunk([]), "prompt_progress": told})]

    def closing(self, answers: Sequence[Whole], usage: Usage) -> list[bytes]:
        if not self.body.wants_usage:
            return [DONE]
        last = {**self._head(self.chunk_kind), "choices": [], "usage": usage.body}
        return [event(last), DONE]

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head(self.chunk_kind), "choices": choices}
        return {**chunk, "usage": None} if self.body.wants_usage else chunk

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
