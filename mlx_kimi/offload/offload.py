"""A model in less memory than it has weights: routed experts come from the files on demand."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_kimi.offload.expert_cache import EMPTY, ExpertCache
from mlx_kimi.offload.expert_files import ExpertFiles, ExpertStack
from mlx_kimi.offload.optimistic import OptimisticResidency
from mlx_kimi.offload.read_pool import ReadPool
from mlx_kimi.offload.stats import Counts


class ExpertOffload:
    """The expert caches of all layers, the threads that fill them, and what that has cost.

    Attributes:
        bounds_context: whether the budget, and not the model, says how long a text may be.
        expert_caches: by the path of the stacks, `model.layers.3.mlp.switch_mlp`.
        slots: of each expert cache.
        prefill_step: tokens that the budget has room to read at once.
        optimistic: decodes a token as if its experts were in memory, and verifies it after.
    """

    def __init__(
        self,
        files: ExpertFiles,
        layers: Mapping[str, list[ExpertStack]],
        slots: int,
        buffers: int,
        prefill_step: int,
        bounds_context: bool = False,
    ) -> None:
        """`buffers`: bytes that MLX may keep of freed arrays, to use them again."""
        self.bounds_context, self.prefill_step = bounds_context, prefill_step
        self.slots, self.counts, self.readers = slots, Counts(), ReadPool()
        weakref.finalize(self, _close, files, self.readers)
        CACHE_LIMIT.while_alive(self, buffers)
        experts = max((len(s.places) for stacks in layers.values() for s in stacks), default=0)
        slot_table = np.full((len(layers), experts), EMPTY)
        scores = np.zeros((len(layers), experts))
        self.expert_caches = {
            path: ExpertCache(stacks, slots, self.readers, self.counts, *rows)
            for (path, stacks), *rows in zip(layers.items(), slot_table, scores, strict=True)
        }
        for cache in self.expert_caches.values():
            if cache.holds_all:
                cache.fill()
        partial = [cache for cache in self.expert_caches.values() if not cache.holds_all]
        self.optimistic = OptimisticResidency(partial, self.counts, slot_table, scores)

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a slot of its own, which is never written again."""
        return all(cache.holds_all for cache in self.expert_caches.values())

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The stacks of all expert caches by their names in the MLX layout."""
        caches = self.expert_caches.values()
        return {name: array for cache in caches for name, array in cache.arrays.items()}


class CacheLimit:
    """While any `ExpertOffload` lives, MLX keeps as few bytes of freed arrays as all allow."""

    def __init__(self) -> None:
        self._limits: dict[int, int] = {}
        self._before = 0

    def while_alive(self, owner: object, limit: int) -> None:
        number = max(self._limits, default=0) + 1
        before = mx.set_cache_limit(min([limit, *self._limits.values()]))
        self._before = self._before if self._limits else before
        self._limits[number] = limit
        weakref.finalize(owner, self._one_less, number)

    def _one_less(self, number: int) -> None:
        del self._limits[number]
        mx.set_cache_limit(min(self._limits.values(), default=self._before))


CACHE_LIMIT = CacheLimit()  # the limit is the process's


def _close(files: ExpertFiles, readers: ReadPool) -> None:
    readers.close()
    files.close()
