"""What came of drafts: counts of one answer, and what is learned for the next."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

from mlx_kimi.metal_kernels.kernel import is_traced

SIZES = (2, 4, 8)  # tokens of a step with drafts
LIKELY = {16: 0.95, 8: 0.85, 4: 0.6}  # that a draft token is right, by its match, before any is
FADES = 0.9  # weight of the drafts before, with each
PRIOR = 4.0  # drafts' worth of LIKELY
# Of a token's time that each more takes, before a step of that size is measured: in the kernels of
# one token, and in operations, which take every token by itself.
SLOPE, SLOPE_OF_OPERATIONS = 0.3, 0.6
KEPT_TIMES = 9


@dataclass
class Drafts:
    """Counts."""

    steps: int = 0  # with drafts
    proposed: int = 0  # tokens
    accepted: int = 0

    def __add__(self, other: Drafts) -> Drafts:
        return Drafts(
            self.steps + other.steps,
            self.proposed + other.proposed,
            self.accepted + other.accepted,
        )


class Learned:
    """How often drafts were right, by their match, and what steps of each size took here."""

    def __init__(self) -> None:
        self._slope = SLOPE if is_traced() else SLOPE_OF_OPERATIONS
        self._tried = dict.fromkeys(LIKELY, PRIOR)
        self._right = {match: PRIOR * p for match, p in LIKELY.items()}
        # The first of each size, which may compile kernels, is left out.
        self._times: dict[int, deque[float]] = {T: deque(maxlen=KEPT_TIMES) for T in (1, *SIZES)}
        self._seen: set[int] = set()

    def likely(self, match: int) -> float:
        """The probability that a draft token after such a match is right, if those before are."""
        return self._right[match] / self._tried[match]

    def cost(self, T: int) -> float:
        """A step of T tokens takes so many times as long as one of one token."""
        own, one = self._times[T], self._times[1]
        if own and one:
            return statistics.median(own) / statistics.median(one)
        return 1 + self._slope * (T - 1)

    def took(self, T: int, seconds: float) -> None:
        """Note what a step of T tokens took."""
        if T in self._seen:
            self._times[T].append(seconds)
        self._seen.add(T)

    def came_of(self, match: int, tokens: int, right: int) -> None:
        """Note how many tokens of a draft were right."""
        tried = right + (right < tokens)
        self._tried[match] = FADES * self._tried[match] + tried
        self._right[match] = FADES * self._right[match] + right
