"""A token or a few through the whole model, as a graph that is built once for many steps.

A step of one token of the 48B is 237 launches. To build them from Python, kernel by kernel, takes
the host longer than the GPU works on them. `mx.compile` keeps the graph for as long as what it is
given keeps its shapes. Latents are therefore given as addresses, and what lies where as numbers: a
graph serves any texts, as long as their number and the class of their splits stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_kimi.metal_kernels.kernel import backend, is_traced, takes_addresses
from mlx_kimi.metal_kernels.split_kv import SEGMENTS, SplitKVPlan
from mlx_kimi.model.cache import CacheEntry, KDACache, LatentCache, Segment, empty_cache
from mlx_kimi.model.forward_batch import ForwardBatch, is_few, rows_of
from mlx_kimi.model.kda import KimiDeltaAttention
from mlx_kimi.model.mla import MultiHeadLatentAttention
from mlx_kimi.model.steps import KDAStep, LatentStep, Step
from mlx_kimi.offload.optimistic import OptimisticResidency
from mlx_kimi.offload.stats import Counts

if TYPE_CHECKING:
    from mlx_kimi.model.kimi_linear import KimiLinear

NOTHING_OFFLOADED = OptimisticResidency((), Counts(), np.zeros((0, 0), np.int64), np.zeros((0, 0)))
MOST_GRAPHS = 32  # kept: one for each number of texts and of tokens, and class of splits
Arrays = list[list[mx.array]]  # of each entry
# ids (or x and residual), the plan's texts and launches, the cache's arrays, slot tables ->
# hidden, the cache's arrays (of several tokens also what going back needs), experts
Graph = Callable[
    [mx.array, mx.array, tuple[mx.array, ...], Arrays, list[mx.array]],
    tuple[mx.array, Arrays, list[mx.array]],
]


class CompiledStep:
    """`KimiLinear.run` for one token or a few of each row, where kernels run.

    The graph holds the model's weights as they were at its first use.
    """

    def __init__(self, model: KimiLinear) -> None:
        # The model owns this: a strong reference would be a cycle, and free the weights later.
        self._model = weakref.ref(model)
        self._graphs: dict[tuple[object, ...], Graph] = {}  # by shapes, the latest last
        self._warm: set[bool] = set()  # whether of several tokens

    def takes(self, cache: Sequence[CacheEntry], T: int = 1) -> bool:
        """Whether a graph may take the next T tokens: kernels run, every MLA layer has its kernel
        and room, and the experts are likely in memory."""
        return (
            is_traced()
            and is_few(len(cache[0].lengths), T)
            and all(
                entry.lengths and (not isinstance(entry, LatentCache) or entry.room >= T)
                for entry in cache
            )
            and MultiHeadLatentAttention not in self._without_kernels
            and (T == 1 or not self._without_kernels)
            and self._experts_are_known(len(cache[0].lengths) * T)
        )

    def _experts_are_known(self, tokens: int) -> bool:
        """Several tokens may need more experts than have slots: the host must know them."""
        offload = self._owner.offload
        return offload is None or (tokens == 1 and offload.optimistic.should_try())

    @cached_property
    def _without_kernels(self) -> set[type]:
        """The kinds of attention whose decode kernels cannot run."""
        attentions = [layer.self_attn for layer in self._owner.layers]
        return {type(a) for a in attentions if a.decode_unsupported_reason() is not None}

    def __call__(
        self, ids: mx.array, cache: Sequence[CacheEntry], steps: list[Step] | None = None
    ) -> mx.array:
        """ids [B, T] -> what `KimiLinear.hidden` gives; updates arrays, not lengths.

        A part that does not begin at layer 0 takes x and residual [2, B, T, hidden] for `ids`.
        """
        B, T = rows_of(ids)
        latents = next((entry for entry in cache if isinstance(entry, LatentCache)), LatentCache())
        plan = latents.plan(B, T)
        given = self._arrays(B, cache)
        pairs = zip(cache, given, strict=True)
        frozen = next((arrays[1:] for entry, arrays in pairs if entry is latents), [])
        frozen_shapes = (array.shape for array in frozen)
        shapes = (ids.shape, plan.capacities, *frozen_shapes, latents.bits, backend())
        graph = self._graphs.pop(shapes, None)
        if graph is None:
            self._warm_up(ids, cache)
            graph = _compiled(self._model, plan.capacities, latents.bits)
        slots = self._optimistic.slot_tables()
        hidden, arrays, choices = graph(ids, plan.texts, plan.launches, given, slots)
        self._graphs[shapes] = graph
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        if choices:
            mx.async_eval(hidden, arrays)
        if not self._optimistic.verify(choices):
            return self._layer_by_layer(ids, cache)
        for layer, entry, before, new in zip(self._owner.layers, cache, given, arrays, strict=True):
            if isinstance(entry, KDACache):
                assert isinstance(layer.self_attn, KimiDeltaAttention)
                if steps is not None:
                    steps.append(layer.self_attn.decode_step(entry.lengths, new[2], *before))
                entry.conv_tail, entry.state = new[:2]
            elif isinstance(entry, LatentCache):
                if steps is not None:
                    steps.append(LatentStep(entry.snapshot(), new[0], in_tail=True))
                entry.grow_tail(new[0], T)
        return hidden

    @property
    def _optimistic(self) -> OptimisticResidency:
        offload = self._owner.offload
        return offload.optimistic if offload else NOTHING_OFFLOADED

    @property
    def _owner(self) -> KimiLinear:
        model = self._model()
        assert model is not None
        return model

    def _arrays(self, B: int, cache: Sequence[CacheEntry]) -> Arrays:
        """What a step reads of each entry; of an MLA layer the tail first."""
        model = self._owner
        width, dtype = model.config.latent_width, model.norm.weight.dtype
        return [
            [entry.roomy_tail(B, width, dtype), *_frozen(entry)]
            if isinstance(entry, LatentCache)
            else entry.arrays()
            for entry in cache
        ]

    def _warm_up(self, ids: mx.array, cache: Sequence[CacheEntry]) -> None:
        """Run a step without a graph, which computes the arrays that layers cache at first use:
        within a graph they would be computed at every token."""
        several = rows_of(ids)[1] > 1
        if several not in self._warm:
            mx.eval(self._layer_by_layer(ids, [entry.snapshot() for entry in cache]))
            self._warm.add(several)

    def _layer_by_layer(self, ids: mx.array, cache: Sequence[CacheEntry]) -> mx.array:
        return self._owner.run(ids, cache, ForwardBatch())


def _frozen(entry: LatentCache) -> list[mx.array]:
    """What launches are given of the frozen latents.

    A GPU's own kernels take addresses, all of one shape, and as many as launches have room for, so
    that a graph does not depend on them.
    """
    if not takes_addresses():
        return entry.frozen_arrays
    found = entry.addresses
    return found + found[:1] * (-len(found) % SEGMENTS)


def _compiled(
    model: weakref.ReferenceType[KimiLinear], capacities: tuple[int, ...], bits: int | None
) -> Graph:
    def entry(kind: CacheEntry, arrays: list[mx.array]) -> CacheEntry:
        if isinstance(kind, KDACache):
            return KDACache((), *arrays)
        tail, *frozen = arrays
        # The plan says how full the tails are, and what of the frozen arrays is whose.
        B = len(tail)
        segments = tuple(map(Segment.whole, frozen))
        return LatentCache((), (segments, *[()] * (B - 1)), tail, (0,) * B, bits)

    def step(
        ids: mx.array,
        texts: mx.array,
        launches: tuple[mx.array, ...],
        arrays: Arrays,
        slot_tables: list[mx.array],
    ) -> tuple[mx.array, Arrays, list[mx.array]]:
        owner = model()
        assert owner is not None
        B, T = rows_of(ids)
        cache = [entry(*pair) for pair in zip(empty_cache(owner.kinds), arrays, strict=True)]
        optimistic = owner.offload.optimistic if owner.offload else NOTHING_OFFLOADED
        residency = optimistic.begin(slot_tables)
        steps: list[Step] | None = [] if T > 1 else None
        plan = SplitKVPlan(texts, launches, capacities, B)
        batch = ForwardBatch(plan=plan, residency=residency, steps=steps)
        hidden = owner.run(ids, cache, batch)
        arrays = [e.arrays() if isinstance(e, KDACache) else e.arrays()[-1:] for e in cache]
        for kept, taken in zip(arrays, steps or (), strict=False):
            if isinstance(taken, KDAStep):
                assert taken.projected is not None, "a graph's steps are of few tokens"
                kept.append(taken.projected)
        return hidden, arrays, residency.choices()

    graph: Graph = mx.compile(step)
    return graph
