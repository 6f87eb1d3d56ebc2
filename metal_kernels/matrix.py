"""A matrix as a kernel takes it: plain, or quantized by MLX in any of its modes."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx


def with_scales(*names: str) -> tuple[str, ...]:
    """The names of each matrix's `buffers` in a kernel."""
    return tuple(part for name in names for part in (name, f"{name}_scales", f"{name}_biases"))


BITS = (0, 2, 3, 4, 5, 6, 8)  # that kernels take; 0: plain


class Matrix(NamedTuple):
    """W [..., out, in] of `x W^T`; leading axes are a stack."""

    weight: mx.array
    scales: Any = None  # [..., out, in / group_size]
    biases: Any = None
    group_size: int = 32
    bits: int = 0  # 0: plain
    mode: str = "affine"  # MLX's name; all others are small floats, without biases

    @property
    def rows(self) -> int:
        return self.weight.shape[-2]

    @property
    def columns(self) -> int:
        """Unpacked."""
        return self.weight.shape[-1] * 32 // self.bits if self.bits else self.weight.shape[-1]

    def storage(self, name: str = "") -> tuple[tuple[str, int], tuple[str, int]]:
        """Template values: {name}Bits, 0 where it is plain, and {name}Group."""
        return (f"{name}Bits", self.bits), (f"{name}Group", self.group_size)

    def unsupported_reason(self, name: str) -> str | None:
        """Why kernels do not take this matrix, called `name`; None: they do."""
        return None if self.bits in BITS else f"{name} has {self.bits} bits, not among {BITS}"

    def buffers(self) -> list[mx.array]:
        """Weight, scales, biases; of a plain matrix thrice the weight: two are never read."""
        return [self.weight if part is None else part for part in self[:3]]

    def times(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""
        if not self.bits:
            return x @ self.weight.swapaxes(-1, -2)
        return mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, True, self.group_size, self.bits, self.mode
        )
