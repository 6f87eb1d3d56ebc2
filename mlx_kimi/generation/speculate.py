"""Decode with drafts: a step reads a token and guesses of what follows it, where that pays.

A draft is kept as far as the sampler's own draws equal it, so that the answer is that of one token
at a time, up to the roundings of a step of several tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import mlx.core as mx

from mlx_kimi.errors import KimiError
from mlx_kimi.generation.drafts import SIZES, Drafts, Learned
from mlx_kimi.generation.lookup import Draft, Drafter, Lookup
from mlx_kimi.generation.sample import Draw, Sampler
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.model import cache as caches

Speculate = Literal["auto", "off"]
SPECULATE = ("auto", "off")
PAYS = 1.05  # so many times as many tokens a second, by what is known, for a draft to be tried
FAILURES, PAUSE = 3, 32  # drafts in a row of which nothing is right, and tokens without any then


class Speculation:
    """Which drafts to try in one answer: by their match, how often such were right, and cost."""

    def __init__(self, drafter: Drafter, learned: Learned | None = None) -> None:
        """`learned`: of the answers before, and goes on with this one's."""
        self.drafter = drafter
        self.learned = learned or Learned()
        self.counts = Drafts()
        self._failures = self._paused = 0

    def propose(self, limit: int) -> Draft:
        """What to try to read after the latest token, at most `limit` tokens; none: no draft."""
        if self._paused or limit < 1:
            return Draft([], 0)
        found = self.drafter.propose(min(limit, SIZES[-1] - 1))
        if not found.tokens:
            return found
        p = self.learned.likely(found.match)
        sizes = [T for T in SIZES if T - 1 <= len(found.tokens)]
        gain, size = max(
            ((expected(p, T) / self.learned.cost(T), T) for T in sizes), default=(0.0, 0)
        )
        return Draft(found.tokens[: size - 1], found.match) if gain > PAYS else Draft([], 0)

    def took(self, T: int, seconds: float) -> None:
        """Note what a step of T tokens took."""
        self.learned.took(T, seconds)
        self._paused = max(self._paused - T, 0)

    def learn(self, draft: Draft, right: int) -> None:
        """Note how many tokens of a draft were right."""
        self.counts.steps += 1
        self.counts.proposed += len(draft.tokens)
        self.counts.accepted += right
        self.learned.came_of(draft.match, len(draft.tokens), right)
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
    return Speculation(Lookup(ids), state.learned)


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
            most = min(limit - 2, caches.room(state.entries) - 1)
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
