"""The forget gate of Kimi Delta Attention: how much of each channel survives a token."""

from __future__ import annotations

import mlx.core as mx

from mlx_kimi.metal_kernels.fused import fused

GATES = ("softplus",)


def forget_gate(
    f: mx.array, A_log: mx.array, dt_bias: mx.array, kind: str = "softplus"
) -> mx.array:
    """`exp(-exp(A_log) * softplus(f + dt_bias))`: the decay of each channel, in [0, 1].

    Args:
        f: [B, T, H, D], the output of f_b_proj.
        A_log: [H]; dt_bias: [H, D].
        kind: the form of the gate. Kernels take it as a template value.

    Returns:
        [B, T, H, D] float32.
    """
    if kind not in GATES:
        raise ValueError(f"[forget_gate] kind must be one of {GATES} but is {kind!r}.")
    return _softplus_gate(f, A_log, dt_bias)


@fused(shapeless=True)
def _softplus_gate(f: mx.array, A_log: mx.array, dt_bias: mx.array) -> mx.array:
    rate = mx.exp(A_log.astype(mx.float32))[:, None]
    return mx.exp(-rate * mx.logaddexp(f.astype(mx.float32) + dt_bias, 0.0))
