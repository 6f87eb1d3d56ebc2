"""One token without a stop at every layer, where all of its experts are likely to be in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from mlx_kimi.bank import EMPTY, Bank, Counts


class Assumption:
    """That every expert that a token chooses is in memory.

    A graph is given where each expert is, and gives back what was chosen. If all of that was there
    its result is right; else it is thrown away, and the token goes layer by layer.
    """

    def __init__(self, banks: Sequence[Bank], counts: Counts) -> None:
        """`banks` of all layers in their order, or none: then there is nothing to assume."""
        self._banks, self._counts, self._read = banks, counts, -1

    def is_likely(self) -> bool:
        """Whether nothing was read since this was asked last, before the step before."""
        before, self._read = self._read, self._counts.read
        return not self._banks or before == self._read

    def slots(self) -> list[mx.array]:
        """Where each expert is, [layers, experts] int32; those that are nowhere are in slot 0."""
        if not self._banks:
            return []
        return [mx.array(np.maximum(np.stack([b.slot_of for b in self._banks]), 0), mx.int32)]

    @contextmanager
    def made(self, slots: Sequence[mx.array]) -> Iterator[list[mx.array]]:
        """Within, layers believe `slots`; afterwards the list holds their choices, [layers, k]."""
        chosen: list[mx.array] = []
        for number, bank in enumerate(self._banks):
            bank.assumed = slots[0][number]
        try:
            yield chosen
            choices = [bank.chosen for bank in self._banks if bank.chosen is not None]
            chosen += [mx.concatenate(choices)] if choices else []
        finally:
            for bank in self._banks:
                bank.assumed = bank.chosen = None

    def held(self, chosen: Sequence[mx.array]) -> bool:
        """Whether it was right, once the device knows; if so, the uses of the experts are noted."""
        if not chosen:
            return True
        pairs = list(zip(self._banks, np.array(chosen[0]).astype(np.int64), strict=True))
        held = all((bank.slot_of[token] != EMPTY).all() for bank, token in pairs)
        if held:
            for bank, token in pairs:
                bank.note(token)
        return held
