"""Drafts from the text itself: what followed the last time that the latest tokens stood in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

MATCHES = (16, 8, 4)  # tokens that must be alike, the longest tried first
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of well mixed bits
_SMALLEST = 1 << 10  # entries of a table


class Draft(NamedTuple):
    """Tokens that may follow, and how many before them are alike: 0 with no tokens."""

    tokens: list[int]
    match: int


class Drafter(Protocol):
    """Guesses what follows the tokens so far."""

    def add(self, tokens: Sequence[int]) -> None:
        """Take more tokens, in order."""

    def propose(self, limit: int) -> Draft:
        """Up to `limit` tokens that may come next."""


class Lookup:
    """A `Drafter`: the latest place where the longest of MATCHES stood before.

    A table for each length has the place behind the latest n-gram of a hash, 48 bytes a token in
    all. What it says is compared with the tokens: two of one hash cost a draft, none is wrong.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens = np.zeros(_SMALLEST, np.int32)
        self._count = self._indexed = 0
        self._tables: dict[int, npt.NDArray[np.int32]] = {}
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """Take more tokens: O(1) each."""
        end = self._count + len(tokens)
        if end > len(self._tokens) or not self._tables:
            size = _SMALLEST
            while size < end:
                size *= 2
            grown = np.zeros(size, np.int32)
            grown[: self._count] = self._tokens[: self._count]
            self._tokens, self._indexed = grown, 0
            self._tables = {n: np.zeros(4 * size, np.int32) for n in MATCHES}
        self._tokens[self._count : end] = tokens
        self._count = end
        # An n-gram is known once a token follows it: what ends the text finds earlier ones.
        for n in MATCHES:
            start = max(self._indexed, n)
            if start < end:
                places = np.arange(start, end, dtype=np.int32)
                self._tables[n][self._slots(n, start, end)] = places
        self._indexed = end

    def propose(self, limit: int) -> Draft:
        """What followed the longest match; no tokens where there is none."""
        end = self._count
        for n in MATCHES:
            if end < n:
                continue
            place = int(self._tables[n][self._slots(n, end, end + 1)[0]])
            latest = self._tokens[end - n : end]
            if place and np.array_equal(self._tokens[place - n : place], latest):
                # (What repeats with a period shorter than the draft goes on with it.)
                period = self._tokens[place : min(place + limit, end)].tolist()
                return Draft((period * -(-limit // len(period)))[:limit], n)
        return Draft([], 0)

    def _slots(self, n: int, start: int, end: int) -> npt.NDArray[np.int64]:
        """Of the n-grams before the places from `start` to `end`: where in the table they stand."""
        sums = np.zeros(end - start, np.uint64)
        for back in range(n, 0, -1):
            token = self._tokens[start - back : end - back].astype(np.uint64)
            sums = (sums ^ token) * _FACTOR
        table = self._tables[n]
        bits = np.uint64(64 - (len(table) - 1).bit_length())
        return (sums >> bits).astype(np.int64)
