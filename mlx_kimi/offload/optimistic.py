"""One token without a stop at every layer, where all of its experts are likely to be in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_kimi.offload.expert_cache import EMPTY, LRFU, Counts, ExpertCache


class OptimisticResidency:
    """That every expert that a token chooses is in memory.

    A graph is given where each expert is, and gives back what was chosen. If all of that was there
    its result is right; else it is thrown away, and the token goes layer by layer.
    """

    def __init__(
        self,
        banks: Sequence[ExpertCache],
        counts: Counts,
        slot_of: npt.NDArray[np.int64],
        worth: npt.NDArray[np.float64],
    ) -> None:
        """`banks` of all layers in their order, or none: then there is nothing to assume.

        slot_of, worth: [layers, experts], of which the banks have the rows.
        """
        self._banks, self._counts = banks, counts
        self._slot_of, self._worth = slot_of, LRFU(worth)
        self._layers = np.arange(len(banks))[:, None]
        self._read = -1
        self._given = np.full_like(slot_of, EMPTY)  # what `_slots` were made of
        self._slots: list[mx.array] = []

    def should_try(self) -> bool:
        """Whether nothing was read since this was asked last, before the step before."""
        before, self._read = self._read, self._counts.read
        return not self._banks or before == self._read

    def slots(self) -> list[mx.array]:
        """Of each layer where each expert is, [experts] int32; those that are nowhere: slot 0."""
        if self._banks and not (self._slots and np.array_equal(self._given, self._slot_of)):
            self._given = self._slot_of.copy()
            self._slots = [mx.array(row, mx.int32) for row in np.maximum(self._given, 0)]
        return self._slots

    @contextmanager
    def begin(self, slots: Sequence[mx.array]) -> Iterator[list[mx.array]]:
        """Within, layers believe `slots`; afterwards the list holds their choices, [layers, k]."""
        chosen: list[mx.array] = []
        for bank, where in zip(self._banks, slots, strict=True):
            bank.assumed = where
        try:
            yield chosen
            choices = [bank.chosen for bank in self._banks if bank.chosen is not None]
            chosen += [mx.concatenate(choices)] if choices else []
        finally:
            for bank in self._banks:
                bank.assumed = bank.chosen = None

    def verify(self, chosen: Sequence[mx.array]) -> bool:
        """Whether it was right, once the device knows; if so, the uses of the experts are noted."""
        if not chosen:
            return True
        experts = np.array(chosen[0])
        where = self._given[self._layers, experts]
        if (where == EMPTY).any() or (where != self._slot_of[self._layers, experts]).any():
            return False
        self._worth.note(experts[:, None])  # [layers, one token, k]
        self._counts.asked += experts.size
        return True
