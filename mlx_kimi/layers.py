"""What KDA, MLA and MoE layers share: norms, the MLP and the short convolution."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.linear import FusedLinear
from mlx_kimi.metal_kernels.add_norm import add_norm

if TYPE_CHECKING:
    from mlx_kimi.weights import Weights


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


def l2_normalised(x: mx.array, scale: float = 1.0) -> mx.array:
    """`scale * x / sqrt(sum(x^2) + 1e-6)` over the last axis.

    rms_norm divides by sqrt(mean + eps), so its eps is 1e-6 / D and D^-1/2 is left to multiply.
    """
    width = x.shape[-1]
    return mx.fast.rms_norm(x, None, 1e-6 / width) * (scale * width**-0.5)


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

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self.gate_up(x)
        return self.down_proj(swiglu(gate, up))


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, then SiLU."""

    def __init__(self, weight: mx.array) -> None:
        """weight [C, K, 1]: K taps for each of C channels, the present token's last."""
        super().__init__()
        self.taps = mx.contiguous(weight[..., 0].swapaxes(0, 1))  # [K, C]

    def __call__(
        self, x: mx.array, tail: mx.array | None, lengths: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """x [B, T, C] after `tail` [B, K - 1, C] (None: zeros) -> convolved x, and the new tail.

        `lengths` [B] are the tokens of each row that are real; padding never enters the tail.
        """
        B, T, C = x.shape
        keep = self.taps.shape[0] - 1
        if tail is None:
            tail = mx.zeros((B, keep, C), x.dtype)
        window = mx.concatenate([tail, x], axis=1)  # [B, K - 1 + T, C]
        if T == 1:
            y = (window * self.taps).sum(axis=1, keepdims=True)
        else:
            y = window[:, :T] * self.taps[0]
            for tap in range(1, keep + 1):
                y = y + window[:, tap : tap + T] * self.taps[tap]
        return nn.silu(y), _last_real(window, keep, T, lengths)


def _last_real(window: mx.array, keep: int, T: int, lengths: mx.array | None) -> mx.array:
    """The last `keep` real tokens of each row of `window` [B, keep + T, C]."""
    if lengths is None:
        return mx.contiguous(window[:, T:])
    places = lengths[:, None] + mx.arange(keep)  # the tail itself comes before x's first token
    return mx.take_along_axis(window, places[..., None], axis=1)
