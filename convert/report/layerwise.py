"""A model one layer at a time, read from its folder: the model's own layers, few experts at once.

Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.tensors import EMBEDDING, NORM, Join, Tensor, tensors
from mlx_kimi.convert.blocks import TensorReader
from mlx_kimi.convert.report.slices import Arrays, read, slices
from mlx_kimi.model.cache import CacheEntry, KDACache, LatentCache
from mlx_kimi.model.forward_batch import ForwardBatch
from mlx_kimi.model.kimi_linear import DecoderLayer
from mlx_kimi.model.layers import RMSNorm
from mlx_kimi.model.moe import Experts, MixtureOfExperts
from mlx_kimi.model.weights import Weights
from mlx_kimi.offload.optimistic import Residency

EXPERTS = 128 * 2**20  # bytes of float32 of the experts that are in memory at once
ROWS = 4096  # of the embedding, at once


class Layers:
    """The layers of one folder, each read when it is run."""

    def __init__(self, reader: TensorReader) -> None:
        self.reader, self.config = reader, reader.config
        self.tensors = {tensor.name: tensor for tensor in tensors(reader.config)}

    def of(self, number: int) -> list[Tensor]:
        """The tensors of layer `number`, from 0 on."""
        prefix = f"model.layers.{number}."
        return [tensor for name, tensor in self.tensors.items() if name.startswith(prefix)]

    def embedded(self, ids: mx.array) -> mx.array:
        """The embeddings of ids [B, T] in float32, [B, T, hidden]."""
        x = mx.zeros((*ids.shape, self.config.hidden_size))
        for first, table in slices(self.reader, self.tensors[EMBEDDING.name], ROWS):
            count = table.out_features
            inside = (ids >= first) & (ids < first + count)
            x = mx.where(inside[..., None], table.rows(mx.clip(ids - first, 0, count - 1)), x)
            mx.eval(x)
        return x

    def run(self, number: int, x: mx.array, batch: ForwardBatch) -> mx.array:
        """Run one layer on the residual stream, [B, T, hidden] -> [B, T, hidden]."""
        layer = self._layer(number)
        entry: CacheEntry = (
            KDACache() if self.config.layers[number].attention == "kda" else LatentCache()
        )
        y, residual = layer(x, None, entry, batch)
        y = residual + y
        mx.eval(y)
        mx.clear_cache()
        return y

    def normed(self, x: mx.array) -> mx.array:
        """The last norm of the residual stream, [B, T, hidden] -> [B, T, hidden]."""
        (weight,) = read(self.reader, self.tensors[NORM.name]).values()
        return RMSNorm(weight, self.config.rms_norm_eps)(x)

    def _layer(self, number: int) -> DecoderLayer:
        """The layer in float32, with only the first of its routed experts in memory."""
        arrays: Arrays = {}
        for tensor in self.of(number):
            arrays |= read(self.reader, tensor, 0, 1 if tensor.join is Join.STACK else None)
            mx.eval(arrays)
        weights = Weights(arrays, self.config, f"model.layers.{number}.")
        layer = DecoderLayer(self.config, self.config.layers[number], weights)
        mx.eval(layer.parameters())
        if isinstance(layer.mlp, MixtureOfExperts):
            stacks = [tensor for tensor in self.of(number) if tensor.join is Join.STACK]
            in_slices = ExpertsInSlices(layer.mlp, self.reader, stacks)
            layer.mlp = cast(Any, in_slices)  # it has the one method that a layer calls
        return layer


class ExpertsInSlices:
    """A mixture of experts that reads a few experts at a time, and runs them on their tokens."""

    def __init__(self, whole: MixtureOfExperts, reader: TensorReader, stacks: list[Tensor]) -> None:
        self.router, self.shared_experts = whole.router, whole.shared_experts
        self.reader, self.stacks = reader, stacks
        _, out, width = stacks[0].shape
        self.step = max(1, EXPERTS // (4 * len(stacks) * out * width))

    def norm_and_forward(
        self, norm: RMSNorm, x: mx.array, residual: mx.array, residency: Residency | None
    ) -> tuple[mx.array, mx.array]:
        """As `MixtureOfExperts.after_norm`, with all experts in turn."""
        normed, residual = norm.add_norm(x, residual)
        rows = normed.reshape(-1, x.shape[-1])
        y = mx.zeros_like(rows) if self.shared_experts is None else self.shared_experts(rows)
        experts, weights = self.router(rows)
        mx.eval(residual, y, experts, weights)
        chosen = np.array(experts)  # [N, k]
        for first, some in self._slices():
            token, place = map(
                mx.array, np.nonzero((chosen >= first) & (chosen < first + some.count))
            )
            if token.size:
                own = experts[token, place][:, None].astype(mx.int32) - first
                answers = some(rows[token], own, weights[token, place][:, None], None)
                y = y.at[token].add(answers)
                mx.eval(y)
            mx.clear_cache()
        return y.reshape(x.shape), residual

    def _slices(self) -> Iterator[tuple[int, Experts]]:
        count = self.stacks[0].shape[0]
        for first in range(0, count, self.step):
            arrays: Arrays = {}
            for tensor in self.stacks:
                arrays |= read(self.reader, tensor, first, min(self.step, count - first))
            path = self.stacks[0].module.rpartition(".")[0]
            yield first, Experts(Weights(arrays, self.reader.config, f"{path}."))
