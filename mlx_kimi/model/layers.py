"""What layers share: norms and the MLP."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.metal_kernels.add_norm import add_norm
from mlx_kimi.model.linear import FusedLinear

if TYPE_CHECKING:
    from mlx_kimi.model.weights import Weights


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`."""

    def __init__(self, weight: mx.array, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: mx.array, part: mx.array | None) -> tuple[mx.array, mx.array]:
        """`x + part`, and the norm of it. None: there is nothing to add."""
        return (x, self(x)) if part is None else add_norm(x, part, self.weight, self.eps)


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`."""
    return nn.silu(gate) * up


class MLP(nn.Module):
    """`down(silu(gate x) * up x)`: the dense layers and the shared experts."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.gate_up = FusedLinear([[weights.linear("gate_proj")], [weights.linear("up_proj")]])
        self.down_proj = weights.linear("down_proj")

    def after(self, norm: RMSNorm, x: mx.array, part: mx.array) -> tuple[mx.array, mx.array]:
        """x, part [B, T, hidden] -> `x + part`, and the MLP of its norm."""
        x, normed = norm.of_sum(x, part)
        return x, self(normed)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self.gate_up(x)
        return self.down_proj(swiglu(gate, up))
