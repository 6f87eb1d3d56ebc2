"""A request as the engine's thread works on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from secrets import randbits
from threading import Lock

import mlx.core as mx
import numpy as np

from mlx_kimi.errors import KimiError
from mlx_kimi.generation.sample import Sampler
from mlx_kimi.model.cache import CacheEntry
from mlx_kimi.server.prefix_tree import as_array
from mlx_kimi.server.ticket import Failed, Finished, Progress, Reason, Started, Ticket, Token

COUNTED = {"stop": "stopped", "length": "length", "cancelled": "cancelled"}  # by `Reason`


class Tally:
    """Sums that only grow, by name; from any thread."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}
        self._turn = Lock()

    def add(self, **more: int) -> None:
        with self._turn:
            for name, count in more.items():
                self._sums[name] = self._sums.get(name, 0) + count

    def sums(self) -> dict[str, int]:
        with self._turn:
            return dict(self._sums)


class Job:
    """One text: a prompt, and what was drawn after it. It can be read again from its tokens alone.

    Attributes:
        prompt: [T] int32.
        drawn: the answer's tokens so far.
        memory: bytes of its state, at its longest.
        entries: the cache after the first `read` tokens while the text is being read; None before
            that, and while it is a row of the batch.
        stops: lengths at which its state is kept while it is read.
        kept: the length of the latest state that the prefix tree was given.
        cached: tokens of it that the tree held when its reading began; `why` it held no more.
        hidden: [1, 1, hidden] of the last token, where the tree held all of the text.
    """

    def __init__(self, ticket: Ticket, limit: int, memory: int, tally: Tally) -> None:
        """`limit`: tokens that may be drawn."""
        self.ticket, self.limit, self.memory = ticket, limit, memory
        self.prompt = as_array(ticket.request.ids)
        self.drawn: list[int] = []
        self.entries: list[CacheEntry] | None = None
        self.stops: list[int] = []
        self.read = self.kept = self.cached = 0
        self.why = ""
        self.hidden: mx.array | None = None
        self._tally = tally
        self._has_started = self.has_failed = False
        self.began: float | None = None  # when its reading first began, on the monotonic clock
        sampling = ticket.request.sampling
        # With a seed that is known, the same can be drawn again.
        seed = randbits(32) if sampling.seed is None else sampling.seed
        self._sampling = replace(sampling, seed=seed)
        constraint = ticket.request.constraint
        self._matcher = constraint.begin() if constraint else None
        self._cannot_go_on: KimiError | None = None

    @property
    def ids(self) -> np.ndarray:
        """[T] int32: the prompt, and what was drawn."""
        return np.concatenate([self.prompt, as_array(self.drawn)]) if self.drawn else self.prompt

    @property
    def must_obey(self) -> bool:
        """Whether not every token may follow, now or later."""
        return self._matcher is not None

    @property
    def mask(self) -> np.ndarray | None:
        """Of the tokens that may follow: `Matcher.mask`."""
        if self._matcher is None or self._cannot_go_on is not None:
            return None
        return self._matcher.mask

    def learn(self, token: int) -> None:
        """Find out what may follow a token that was drawn, before it is told."""
        is_last = token in self.ticket.request.stop_ids or len(self.drawn) + 1 >= self.limit
        if self._matcher is None or is_last:
            return
        try:
            self._matcher.take(token)
            _ = self._matcher.mask
        except KimiError as error:
            self._cannot_go_on = error

    def may_take(self, token: int) -> bool:
        """Go on by a token of a draft in what must be obeyed; False: nothing may follow it."""
        if self.ends_with([token]):
            return False
        if self._matcher is None:
            return True
        try:
            may_follow = self._matcher.take(token)
            _ = self._matcher.mask
        except KimiError:
            return False
        return may_follow

    def ends_with(self, tokens: Sequence[int]) -> bool:
        """Whether the answer is over by the last of these."""
        return bool(tokens) and tokens[-1] in self.ticket.request.stop_ids

    def go_back(self, count: int) -> None:
        """Of what must be obeyed, to where so many tokens had been drawn."""
        if self._matcher is not None:
            self._matcher.go_back(count)

    def sampler(self, vocab_size: int) -> Sampler:
        """What draws the next token."""
        sampler = Sampler(self._sampling, self.prompt.tolist(), vocab_size)
        sampler.skip(self.drawn)
        return sampler

    def begin(self, entries: list[CacheEntry], read: int, hidden: mx.array | None) -> None:
        """Read on from a cache of the first `read` tokens; `hidden` if those are all."""
        self.entries, self.read, self.kept, self.hidden = entries, read, read, hidden
        self.began = self.began or time.monotonic()

    def begin_again(self) -> None:
        """Its state is lost, and so is a token that was not told."""
        self.entries = self.hidden = None
        self.go_back(len(self.drawn))

    # ------------------------------------------------------------------------------- telling
    def tell_progress(self) -> None:
        """How much of the prompt is read, if that is wanted."""
        if self.ticket.request.wants_progress and not self._has_started:
            self.ticket.put(Progress(min(self.read, len(self.prompt)), len(self.prompt)))

    def tell_started(self) -> None:
        """The prompt is read, for the first time or, after a failure, again."""
        if not self._has_started:
            self._has_started = True
            self._tally.add(prompt_tokens=len(self.prompt), cached_tokens=self.cached)
            self.ticket.put(Started(len(self.prompt), self.cached, self.why))

    def tell_token(
        self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]
    ) -> bool:
        """A token was drawn; whether the answer is over by that."""
        self.drawn.append(token)
        request = self.ticket.request
        if request.logprobs is None:
            logprob, top = None, ()
        self._tally.add(generated_tokens=1)
        self.ticket.put(Token(token, logprob, tuple(top[: request.logprobs])))
        if token in request.stop_ids:
            self.finish("stop")
        elif len(self.drawn) >= self.limit:
            self.finish("length")
        elif self._cannot_go_on is not None:
            self.fail(self._cannot_go_on)
        return self.ticket.is_closed

    def finish(self, reason: Reason) -> None:
        """The answer is over."""
        self._count(COUNTED[reason])
        self.ticket.put(Finished(reason))

    def fail(self, error: KimiError) -> None:
        """There is no answer, or no more of it."""
        self._count("failed")
        self.has_failed = True
        self.ticket.put(Failed(error))

    def _count(self, how: str) -> None:
        began = self.began or time.monotonic()
        took = int(1000 * (time.monotonic() - began))
        self._tally.add(**{how: 1, "milliseconds": took})
