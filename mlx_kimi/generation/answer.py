"""Tokens -> the chunks of an answer: text, stop conditions, counts and times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx

from mlx_kimi.generation.drafts import Drafts
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.offload.stats import Counts
from mlx_kimi.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
LEAST_TIMED = 8  # tokens: fewer tell no speed


@dataclass(frozen=True)
class Stats:
    """Counts and speeds of one answer so far. Times are in seconds."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, those that were read before
    generated_tokens: int
    time_to_first_token: float
    decode_time: float  # from the first token to the latest
    host_time: float  # this thread's CPU time to queue the steps after the first token's
    peak_memory: int  # bytes
    seed: int
    experts: Counts | None = None  # of the tokens after the first; None without a memory budget
    drafts: Drafts | None = None  # None: one token at a time

    @property
    def prompt_speed(self) -> float | None:
        """Prompt tokens read a second, the drawing of the first token included; None of fewer
        than `LEAST_TIMED`."""
        return _speed(self.prompt_tokens - self.cached_tokens, self.time_to_first_token)

    @property
    def generation_speed(self) -> float | None:
        """Tokens a second after the first; None of fewer than `LEAST_TIMED`: the device computes a
        token while the one before it is handled, so that two may come at once."""
        return _speed(self.generated_tokens - 1, self.decode_time)


def _speed(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens >= LEAST_TIMED and seconds > 0 else None


@dataclass(frozen=True)
class Chunk:
    """What one token adds to the answer."""

    text: str  # may be empty: half a character, or what may be the beginning of a stop string
    token: int
    finish_reason: FinishReason | None  # on the last chunk
    stats: Stats


class Answer:
    """Turns tokens into chunks: text, stop conditions, counts and times."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        limit: int,
        prompt_tokens: int,
        seed: int,
        state: TokenState,
        drafts: Drafts | None = None,
    ) -> None:
        """`limit`: tokens at most. `state`: what reads them, for the costs in `Stats`."""
        self.detokenizer = tokenizer.detokenizer()
        self.stop_ids = tokenizer.stop_ids
        self.stop = StopStrings(stop)
        self.limit, self.prompt_tokens, self.seed = limit, prompt_tokens, seed
        self.cached_tokens = self.count = 0
        self.started = time.perf_counter()
        self.first = self.latest = 0.0
        self._drafts = drafts
        self._state, self._host_time_before = state, state.host_time
        self._counts = state.model.offload.counts if state.model.offload else None
        self._counts_at_first = Counts()

    def add(self, token: int) -> Chunk:
        """What the next token adds."""
        self.count += 1
        if self._counts and self.count == 1:
            self._counts_at_first = replace(self._counts)
        self.latest = time.perf_counter()
        self.first = self.first or self.latest
        reason: FinishReason | None = "length" if self.count >= self.limit else None
        text = ""
        if token in self.stop_ids:
            reason = "stop"
        else:
            text = self.stop.add(self.detokenizer.add(token))
        if reason:
            text += self.stop.add(self.detokenizer.finish()) + self.stop.finish()
        if self.stop.met:
            reason = "stop"
        return Chunk(text, token, reason, self._stats())

    def _stats(self) -> Stats:
        return Stats(
            self.prompt_tokens,
            self.cached_tokens,
            self.count,
            self.first - self.started,
            self.latest - self.first,
            self._state.host_time - self._host_time_before,
            mx.get_peak_memory(),
            self.seed,
            None if self._counts is None else self._counts - self._counts_at_first,
            None if self._drafts is None else replace(self._drafts),
        )


class StopStrings:
    """Passes text on up to the first stop string, holding back what may be the beginning of one.

    Attributes:
        found: the stop string that is met.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = [text for text in stop if text]
        self.held = ""
        self.found: str | None = None

    @property
    def met(self) -> bool:
        """Whether the text is over."""
        return self.found is not None

    def add(self, text: str) -> str:
        """The text that is certainly part of the answer; `met` once a stop string is complete."""
        if self.met:
            return ""
        self.held += text
        places = [(place, s) for s in self.stop if (place := self.held.find(s)) >= 0]
        if places:
            place, self.found = min(places)
            return self._release(place)
        longest = max(
            (n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0
        )
        return self._release(len(self.held) - longest)

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        return "" if self.met else self._release(len(self.held))

    def _release(self, count: int) -> str:
        text, self.held = self.held[:count], self.held[count:]
        return text
