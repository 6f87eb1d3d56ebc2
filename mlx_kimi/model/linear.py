"""Matrices that multiply activations: plain or quantized, single or stacked, alone or fused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kimi.checkpoint.config import Quantization
from mlx_kimi.metal_kernels.matmul import gather_times_transposed, plain_pays, times_transposed
from mlx_kimi.metal_kernels.matrix import Matrix


class Linear(nn.Module):
    """`x W^T`. W is [..., out, in]: leading axes are a stack, of experts or of heads.

    A quantized W is kept as MLX packs it: `weight` uint32, `scales` and (in affine mode) `biases`.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.quantization = quantization
        if quantization is not None:
            self.scales: Any = scales
            if biases is not None:
                self.biases: Any = biases

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    @property
    def matrix(self) -> Matrix:
        """As kernels take it."""
        q = self.quantization
        if q is None:
            return Matrix(self.weight)
        how = (q.group_size, q.bits, q.mode)
        return Matrix(self.weight, self.scales, self.get("biases"), *how)

    def _format(self) -> dict[str, Any]:
        assert self.quantization is not None
        q = self.quantization
        return {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}

    def _plain_for(self, rows: int) -> bool:
        """Whether the product with so many rows is one of plain matrices."""
        return self.quantization is None or plain_pays(rows, self._size)

    @cached_property
    def _size(self) -> int:
        """Elements of W."""
        q = self.quantization
        return self.weight.size if q is None else self.weight.size * 32 // q.bits

    @cached_property
    def _is_refused_by_mlx(self) -> bool:
        """Whether MLX's product on NVIDIA GPUs does not take this quantized matrix.

        It multiplies stacks in some cases of one row only. With 128 columns or fewer in W it reads
        beyond its rows: results may be NaN, and with 64 rows of x the whole process may fail.
        """
        return mx.cuda.is_available() and (self.weight.ndim > 2 or self.matrix.columns <= 128)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., T, in] -> [..., T, out]; a stack of W multiplies the matching stack of x."""
        if self.quantization is None:
            return times_transposed(x, self.weight)
        if self._plain_for(x.shape[-2]):
            return times_transposed(x, self.dequantized())
        if self._is_refused_by_mlx:
            return times_transposed(x, self._plain)
        return mx.quantized_matmul(
            x, self.weight, self.scales, self.get("biases"), transpose=True, **self._format()
        )

    def from_outputs(self, y: mx.array) -> mx.array:
        """`y W`: y [..., T, out] -> [..., T, in]."""
        if self._plain_for(y.shape[-2]):
            return y @ self.dequantized()
        if self._is_refused_by_mlx:
            return y @ self._plain
        return mx.quantized_matmul(
            y, self.weight, self.scales, self.get("biases"), transpose=False, **self._format()
        )

    def gather(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., T, in] times the members `indices` [...] of the stack -> [..., T, out]."""
        if self._plain_for(indices.size // self.weight.shape[0]):
            return gather_times_transposed(x, self.dequantized(), indices, sorted_indices)
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            lhs_indices=None if sorted_indices else _rows_in_order(x.shape[:-2], *indices.shape),
            rhs_indices=indices,
            transpose=True,
            sorted_indices=sorted_indices,
            **self._format(),
        )

    def member(self, index: int) -> Linear:
        """One matrix of the stack, where it lies."""
        parts = (self.weight, self.get("scales"), self.get("biases"))
        weight, scales, biases = (
            None if part is None else part[index : index + 1].squeeze(0) for part in parts
        )
        assert weight is not None
        return Linear(weight, scales, biases, self.quantization)

    def rows(self, ids: mx.array) -> mx.array:
        """The rows `ids` [...] of W -> [..., in]: an embedding table's look-up."""
        if self.quantization is None:
            return self.weight[ids]
        biases = self.get("biases")
        return mx.dequantize(
            self.weight[ids],
            self.scales[ids],
            None if biases is None else biases[ids],
            **self._format(),
        )

    @cached_property
    def _plain(self) -> mx.array:
        """W itself, kept: what MLX refuses is small, 96 MB in the 48B."""
        plain = self.dequantized()
        mx.eval(plain)  # (a graph that is being compiled would keep it for itself)
        return plain

    def dequantized(self) -> mx.array:
        """W itself, in the dtype of its scales."""
        if self.quantization is None:
            return self.weight
        return mx.dequantize(self.weight, self.scales, self.get("biases"), **self._format())


@lru_cache(maxsize=64)
def _rows_in_order(rows: tuple[int, ...], *indices: int) -> mx.array:
    """For each of the `indices` of a product its place among the `rows` of x.

    Left to itself MLX makes them anew for every product.
    """
    places = np.arange(prod(rows), dtype=np.uint32).reshape(rows)
    return mx.array(np.broadcast_to(places, indices))


class FusedLinear(nn.Module):
    """Matrices that multiply the same x, side by side in one where they are stored alike."""

    def __init__(self, groups: Sequence[Sequence[Linear]]) -> None:
        """Each group of matrices gives one output: theirs, one after another."""
        super().__init__()
        parts = [part for group in groups for part in group]
        self.sizes = [len(group) for group in groups]
        widths = [sum(part.out_features for part in group) for group in groups]
        self.ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
        self.width = sum(widths)
        self.parts = [_join(parts)] if _alike(parts) else parts

    def __call__(self, x: mx.array) -> list[mx.array]:
        """x [..., in] -> one [..., out] for each group."""
        if len(self.parts) == 1:
            return list(mx.split(self.joined(x), self.ends, axis=-1))
        outputs = iter([part(x) for part in self.parts])
        return [mx.concatenate([next(outputs) for _ in range(n)], axis=-1) for n in self.sizes]

    def members(self) -> list[Linear]:
        """The matrices of groups of one matrix each; of a joined one, views of its rows."""
        assert set(self.sizes) == {1}
        if len(self.parts) > 1:
            return self.parts
        whole = self.parts[0]

        def rows(name: str) -> list[Any]:
            array = whole.get(name)
            none = [None] * len(self.sizes)
            return none if array is None else list(mx.split(array, self.ends, axis=-2))

        parts = zip(rows("weight"), rows("scales"), rows("biases"), strict=True)
        return [Linear(w, s, b, whole.quantization) for w, s, b in parts]

    def joined(self, x: mx.array) -> mx.array:
        """All outputs in one array, one after another."""
        if len(self.parts) == 1:
            return self.parts[0](x)
        return mx.concatenate([part(x) for part in self.parts], axis=-1)


def _alike(parts: Sequence[Linear]) -> bool:
    first = parts[0]
    return all(
        part.quantization == first.quantization and part.weight.dtype == first.weight.dtype
        for part in parts
    )


def _join(parts: Sequence[Linear]) -> Linear:
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> mx.array | None:
        arrays: list[Any] = [part.get(name) for part in parts]
        return None if arrays[0] is None else mx.concatenate(arrays, axis=-2)

    weight = joined("weight")
    assert weight is not None
    return Linear(weight, joined("scales"), joined("biases"), parts[0].quantization)
