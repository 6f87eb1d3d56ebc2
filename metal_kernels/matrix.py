"""A matrix as a kernel takes it: plain, or packed by MLX in affine groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx


def with_scales(*names: str) -> tuple[str, ...]:
    """The names of each matrix's `buffers` in a kernel."""
    return tuple(part for name in names for part in (name, f"{name}_scales", f"{name}_biases"))


class Matrix(NamedTuple):
    """W [..., out, in] of `x W^T`; leading axes are a stack."""

    weight: mx.array
    scales: Any = None  # [..., out, in / group_size]
    biases: Any = None
    group_size: int = 32
    bits: int = 0  # 0: plain

    @property
    def rows(self) -> int:
        return self.weight.shape[-2]

    @property
    def columns(self) -> int:
        """Unpacked."""
        return self.weight.shape[-1] * 32 // self.bits if self.bits else self.weight.shape[-1]

    @property
    def is_affine(self) -> bool:
        """Plain, or quantized in the mode that has biases."""
        return not self.bits or self.biases is not None

    def buffers(self) -> list[mx.array]:
        """Weight, scales, biases; of a plain matrix thrice the weight: two are never read."""
        return [self.weight if part is None else part for part in self[:3]]

    def times(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""
        if not self.bits:
            return x @ self.weight.swapaxes(-1, -2)
        return mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, True, self.group_size, self.bits
        )
