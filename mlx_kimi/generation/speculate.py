"""Decode with drafts: a step reads a token and guesses of what follows it, where that pays.

A draft is kept as far as the sampler's own draws equal it, so that the answer is that of one token
at a time, up to the roundings of a step of several tokens.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

import mlx.core as mx

from mlx_kimi.errors import KimiError
from mlx_kimi.generation.drafts import Drafts
from mlx_kimi.generation.lookup import MATCHES, Draft, Drafter, Lookup
from mlx_kimi.generation.sample import Draw, Sampler
from mlx_kimi.generation.token_state import TokenState

Speculate = Literal["auto", "off"]
SPECULATE = ("auto", "off")
SIZES = (2, 4, 8)  # tokens of a step with drafts
PAYS = 1.05  # so many times as many tokens a second, by what is known, for a draft to be tried
LIKELY = {16: 0.95, 8: 0.85, 4: 0.6}  # that a draft token is right, by its match, before any is
FADES = 0.9  # weight of the drafts before, with each
PRIOR = 4.0  # drafts' worth of LIKELY
SLOPE = 0.3  # of a token's time that each more takes, before a step of that size is measured
KEPT_TIMES = 9
FAILURES, PAUSE = 3, 32  # drafts in a row of which nothing is right, and tokens without any then


class Speculation:
    """Which drafts to try: by their match, how often such were right, and what steps cost here."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.counts = Drafts()
        self._tried = {match: PRIOR for match in MATCHES}
        self._right = {match: PRIOR * p for match, p in LIKELY.items()}
        # The first of each size, which may compile kernels, is left out.
        self._times: dict[int, deque[float]] = {T: deque(maxlen=KEPT_TIMES) for T in (1, *SIZES)}
        self._seen: set[int] = set()
        self._failures = self._paused = 0

    def propose(self, limit: int) -> Draft:
        """What to try to read after the latest token, at most `limit` tokens; none: no draft."""
        if self._paused or limit < 1:
            return Draft([], 0)
        found = self.drafter.propose(min(limit, SIZES[-1] - 1))
        if not found.tokens:
            return found
        p = self._right[found.match] / self._tried[found.match]
        sizes = [T for T in SIZES if T - 1 <= len(found.tokens)]
        gain, size = max(((expected(p, T) / self.cost(T), T) for T in sizes), default=(0.0, 0))
        return Draft(found.tokens[: size - 1], found.match) if gain > PAYS else Draft([], 0)

    def cost(self, T: int) -> float:
        """A step of T tokens takes so many times as long as one of one token."""
        own, one = self._times[T], self._times[1]
        if own and one:
            return statistics.median(own) / statistics.median(one)
        return 1 + SLOPE * (T - 1)

    def took(self, T: int, seconds: float) -> None:
        """Note what a step of T tokens took."""
        if T in self._seen:
            self._times[T].append(seconds)
        self._seen.add(T)
        self._paused = max(self._paused - T, 0)

    def learn(self, draft: Draft, right: int) -> None:
        """Note how many tokens of a draft were right."""
        self.counts.steps += 1
        self.counts.proposed += len(draft.tokens)
        self.counts.accepted += right
        tried = right + (right < len(draft.tokens))
        self._tried[draft.match] = FADES * self._tried[draft.match] + tried
        self._right[draft.match] = FADES * self._right[draft.match] + right
        self._failures = 0 if right else self._failures + 1
        if self._failures == FAILURES:
            self._failures, self._paused = 0, PAUSE


def expected(p: float, T: int) -> float:
    """Tokens of a step of T, whose drafts are right with probability p if those before are."""
    return sum(p**i for i in range(T))


def speculation_for(
    state: TokenState, speculate: Speculate, ids: Sequence[int]
) -> Speculation | None:
    """What decodes after the prompt `ids`; None: one token at a time.

    Where experts are read from files, a step of several tokens reads more of them.
    """
    if speculate not in SPECULATE:
        raise KimiError(f"speculate must be {' or '.join(SPECULATE)} but is {speculate!r}")
    offload = state.model.offload
    if speculate == "off" or not (offload is None or offload.holds_all):
        return None
    return Speculation(Lookup(ids))


def decode_with_drafts(
    speculation: Speculation, state: TokenState, hidden: mx.array, sampler: Sampler, limit: int
) -> Iterator[int]:
    """As `decode` without a memory budget: up to `limit` tokens, all but the last read by `state`.

    While nothing repeats, the device draws the next token before this one is known, as `decode`
    lets it. Where something does, the token is awaited first.
    """
    with state.turn_of(hidden):
        draw = state.first_draw(hidden, sampler)
    known: int | None = None  # the token of `draw`, once it is awaited
    while limit > 1:
        with state.turn_of(hidden):
            if known is None and speculation.propose(limit - 1).tokens:
                known, draw = _awaited(state, draw, sampler, speculation)
            most = min(limit - 2, state.room - 1)
            draft = speculation.propose(most) if known is not None else Draft([], 0)
            began = time.perf_counter()
            if known is not None and draft.tokens:
                tokens, draw = state.step_with_drafts(known, draft.tokens, sampler)
                speculation.took(1 + len(draft.tokens), time.perf_counter() - began)
                speculation.learn(draft, len(tokens) - 1)
                speculation.drafter.add(tokens[1:])
                known, draw = _awaited(state, draw, sampler, speculation)
            else:
                token, draw = state.step(draw, sampler, is_known=known is not None)
                speculation.took(1, time.perf_counter() - began)
                if known is None:
                    speculation.drafter.add([token])
                tokens, known = [token], None
        yield from _handed_out(state, hidden, tokens)
        limit -= len(tokens)
    if known is None:
        with state.turn_of(hidden):
            known, _ = state.awaited(draw, sampler)
    yield known


def _awaited(
    state: TokenState, draw: Draw, sampler: Sampler, speculation: Speculation
) -> tuple[int, Draw]:
    token, draw = state.awaited(draw, sampler)
    speculation.drafter.add([token])
    return token, draw


def _handed_out(state: TokenState, hidden: mx.array, tokens: list[int]) -> Iterator[int]:
    """Each token; where the caller wants no more, those after it have not been read."""
    for number, token in enumerate(tokens, 1):
        try:
            yield token
        except GeneratorExit:
            with state.turn:
                if state.answering is hidden:
                    state.take_back(len(tokens) - number)
            raise
