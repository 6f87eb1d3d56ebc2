"""One token without a stop at every layer, where all of its experts are likely to be in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_kimi.offload.expert_cache import EMPTY, ExpertCache
from mlx_kimi.offload.lrfu import LRFU
from mlx_kimi.offload.stats import Counts


@dataclass
class Residency:
    """The assumed slot of every expert, for a graph that cannot ask the host.

    It travels with the forward pass, and collects what the routers chose.

    Attributes:
        slot_tables: of each layer, [experts] int32: expert -> slot; 0 for one not in memory.
        chosen: the experts [1, k] that each layer's router chose, in the order of the layers.
    """

    slot_tables: Mapping[ExpertCache, mx.array]
    chosen: list[mx.array] = field(default_factory=list)

    def slot_ids(self, cache: ExpertCache, experts: mx.array) -> mx.array:
        """One token's experts [1, k] -> their slots [1, k], right if all of them are in memory."""
        self.chosen.append(experts)
        return self.slot_tables[cache][experts]

    def choices(self) -> list[mx.array]:
        """What was chosen in one array, [layers, k]; nothing if no layer asked."""
        return [mx.concatenate(self.chosen)] if self.chosen else []


class OptimisticResidency:
    """Decodes a token as if every expert that it chooses were in memory, and verifies it after.

    A graph is given where each expert is, and gives back what was chosen. If all of that was there
    its result is right; else it is thrown away, and the token goes layer by layer.
    """

    def __init__(
        self,
        caches: Sequence[ExpertCache],
        counts: Counts,
        slot_table: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float64],
    ) -> None:
        """`caches` of all layers in their order, or none: then every expert is in memory.

        slot_table, scores: [layers, experts], of which each cache has its row.
        """
        self._caches, self._counts = caches, counts
        self._current, self._lrfu = slot_table, LRFU(scores)
        self._layers = np.arange(len(caches))[:, None]
        self._misses, self._missed = 0, True
        self._given = np.full_like(slot_table, EMPTY)  # what `_slot_tables` were made of
        self._slot_tables: list[mx.array] = []

    def should_try(self) -> bool:
        """Whether the latest step had no miss: then the next is likely to have none either."""
        return not self._caches or not self._missed

    def end_step(self) -> None:
        """Note whether the step that ends here, of one token or many, had a miss."""
        self._misses, before = self._counts.misses, self._misses
        self._missed = self._misses > before

    def slot_tables(self) -> list[mx.array]:
        """Of each layer its table expert -> slot, [experts] int32; 0 for one not in memory."""
        if self._caches and not (self._slot_tables and np.array_equal(self._given, self._current)):
            self._given = self._current.copy()
            self._slot_tables = [mx.array(row, mx.int32) for row in np.maximum(self._given, 0)]
        return self._slot_tables

    def begin(self, slot_tables: Sequence[mx.array]) -> Residency:
        """The residency of one forward pass, from what `slot_tables` gave."""
        return Residency(dict(zip(self._caches, slot_tables, strict=True)))

    def verify(self, choices: Sequence[mx.array]) -> bool:
        """Whether every expert was where it was taken to be; waits for the device.

        If so, the uses of the experts are noted. `choices`: those of the step's residency.
        """
        if not choices:
            return True
        experts = np.array(choices[0])
        where = self._given[self._layers, experts]
        if (where == EMPTY).any() or (where != self._current[self._layers, experts]).any():
            return False
        self._lrfu.note(experts[:, None])  # [layers, one token, k]
        self._counts.lookups += experts.size
        return True
