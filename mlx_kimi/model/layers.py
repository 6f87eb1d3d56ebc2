"""What layers share: norms and the MLP."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.metal_kernels.add_norm import KERNEL, add_norm_kernel
from mlx_kimi.metal_kernels.fused import compiles, fused, silu
from mlx_kimi.metal_kernels.kernel import not_running
from mlx_kimi.model.linear import FusedLinear

if TYPE_CHECKING:
    from mlx_kimi.model.weights import Weights
    from mlx_kimi.offload.optimistic import Residency


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`."""

    def __init__(self, weight: mx.array, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        if compiles():
            return mx.fast.rms_norm(x, self.weight, self.eps)
        scaled, eps = self._of_sums
        squares = mx.square(x.astype(mx.float32)).sum(axis=-1, keepdims=True)
        return (x * mx.rsqrt(squares + eps) * scaled).astype(x.dtype)

    @cached_property
    def _of_sums(self) -> tuple[mx.array, mx.array]:
        """The weight and eps for the sum of squares in place of their mean: an operation less.

        On CPU, rms_norm is seven operations of MLX, and each costs a token more than its numbers.
        """
        width = self.weight.shape[-1]
        constants = self.weight * width**0.5, mx.array(width * self.eps)
        mx.eval(constants)
        return constants

    def add_norm(self, x: mx.array, residual: mx.array | None) -> tuple[mx.array, mx.array]:
        """x, residual [..., hidden] -> the norm of their sum, and the sum, in one launch.

        residual: None before the first layer, where x alone is the sum.
        """
        if residual is None:
            return self(x), x
        if not_running(KERNEL):
            total = residual + x
            return self(total), total
        total, normed = add_norm_kernel(residual, x, self.weight, self.eps)
        return normed, total


@fused(shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`."""
    return silu(gate) * up


class MLP(nn.Module):
    """`down(silu(gate x) * up x)`: the dense layers and the shared experts."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.gate_up = FusedLinear([[weights.linear("gate_proj")], [weights.linear("up_proj")]])
        self.down_proj = weights.linear("down_proj")

    def norm_and_forward(
        self, norm: RMSNorm, x: mx.array, residual: mx.array, residency: Residency | None
    ) -> tuple[mx.array, mx.array]:
        """x, residual [B, T, hidden] -> the MLP of the norm of their sum, and the sum."""
        normed, residual = norm.add_norm(x, residual)
        return self(normed), residual

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., hidden] -> [..., hidden]. On one of several ranks, its part of the sum."""
        gate, up = self.gate_up(x)
        return self.down_proj(swiglu(gate, up))
