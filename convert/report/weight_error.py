"""Relative errors of quantized matrices, by family."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import mlx.core as mx

from mlx_kimi.checkpoint.tensors import Tensor
from mlx_kimi.convert.blocks import TensorReader
from mlx_kimi.convert.report.slices import read
from mlx_kimi.model.weights import Weights

SLICE = 64 * 2**20  # bytes of float32 of one matrix that are in memory at once

REST = "rest"  # norms, convolutions, decays and biases: they change where --dtype is given
# The first family decides that ends like the module. The order is that of the computation.
FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "embeddings": ("model.embed_tokens",),
        "q, k, v": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "gates": tuple(f"self_attn.{x}_proj" for x in ("f_a", "f_b", "g_a", "g_b", "b")),
        "latents": tuple(
            f"self_attn.{x}" for x in ("kv_a_proj_with_mqa", "embed_q", "unembed_out")
        ),
        "o": ("self_attn.o_proj",),
        "router": ("mlp.gate",),
        "experts gate": ("switch_mlp.gate_proj",),
        "experts up": ("switch_mlp.up_proj",),
        "experts down": ("switch_mlp.down_proj",),
        "dense or shared": tuple(f"{x}_proj" for x in ("gate", "up", "down")),
        "lm_head": ("lm_head",),
        REST: ("",),
    }
)


@dataclass
class Squares:
    """Sums over all elements, in float64."""

    difference: float = 0.0
    whole: float = 0.0

    def add(self, expected: mx.array, found: mx.array) -> None:
        """Two arrays of one shape."""
        self.difference += float(mx.square(found - expected).sum())
        self.whole += float(mx.square(expected).sum())

    @property
    def relative(self) -> float:
        """||found - expected|| / ||expected||; 0 where both are zero."""
        return math.sqrt(self.difference / self.whole) if self.whole else float(self.difference > 0)


def family(tensor: Tensor) -> str:
    """Which of FAMILIES `tensor` belongs to."""
    return next(name for name, ends in FAMILIES.items() if tensor.module.endswith(ends))


def weight_errors(
    source: TensorReader, out: TensorReader, tensors: Iterable[Tensor]
) -> dict[str, float]:
    """||q - w|| / ||w|| (Frobenius) of each family among `tensors`, in FAMILIES' order."""
    sums: dict[str, Squares] = {}
    for tensor in tensors:
        squares = sums.setdefault(family(tensor), Squares())
        step = max(1, SLICE // (4 * math.prod(tensor.shape[1:])))
        for first in range(0, tensor.shape[0], step):
            count = min(step, tensor.shape[0] - first)
            squares.add(*(_plain(reader, tensor, first, count) for reader in (source, out)))
            mx.clear_cache()
    return {name: sums[name].relative for name in FAMILIES if name in sums}


def _plain(reader: TensorReader, tensor: Tensor, first: int, count: int) -> mx.array:
    arrays = read(reader, tensor, first, count)
    if not tensor.matrix:
        return arrays[tensor.name]
    return Weights(arrays, reader.config).linear(tensor.module).dequantized().astype(mx.float32)
