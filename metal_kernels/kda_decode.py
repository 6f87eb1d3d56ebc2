"""A token or a few of a KDA layer, between its input projections and its output projection.

    q | k | v = silu(conv(...))      q, k normalised      alpha = exp(-exp(A_log) softplus(f_b f))
    S <- S diag(alpha)      S <- S + sigmoid(b) (v - S k) k^T      y = norm(S q) sigmoid(g_b g)

The kernel rounds once, at the output. The ops form rounds after each step in a 16-bit dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_kimi.metal_kernels.kda_gate import forget_gate
from mlx_kimi.metal_kernels.kda_sequential import kda_step
from mlx_kimi.metal_kernels.kernel import Kernel
from mlx_kimi.metal_kernels.matrix import Matrix

LANES = 4  # that share a row
SIZES = (32, 64, 128)


class DecodeWeights(NamedTuple):
    """What a layer brings to its decode step."""

    taps: mx.array  # [K, 3 * H * D], the present token's last
    f_b: Matrix  # [H * D, rank]
    g_b: Matrix
    A_log: mx.array  # [H]
    dt_bias: mx.array  # [H, D]
    norm: mx.array  # [D]
    eps: float


def naive_kda_decode(
    x: mx.array, weights: DecodeWeights, tail: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Apply a layer to the next T tokens of each of B texts.

    Args:
        x: [B * T, 3 * H * D + 2 * rank + H], the input projections: q | k | v, f_a, g_a, b. A
            text's tokens are neighbours.
        tail: [B, K - 1, 3 * H * D], the last tokens of q | k | v.
        state: [B, H, D, D] float32, as in `naive_kda`.

    Returns:
        y [B * T, H * D] in x's dtype, for the output projection; the next tail; the next state.
    """
    B, H, D, _ = state.shape
    T = len(x) // B
    if T > 1:
        outputs = []
        for t in range(T):
            y, tail, state = naive_kda_decode(x[t::T], weights, tail, state)
            outputs.append(y)
        return mx.stack(outputs, axis=1).reshape(len(x), -1), tail, state
    rank = weights.f_b.columns
    ends = [3 * H * D, 3 * H * D + rank, 3 * H * D + 2 * rank]
    qkv, f, g, b = mx.split(x, ends, axis=-1)
    window = mx.concatenate([tail, qkv[:, None]], axis=1)  # [B, K, 3 * H * D]
    qkv = (window * weights.taps).sum(axis=1)
    q, k, v = mx.split((qkv * mx.sigmoid(qkv)).reshape(B, 3 * H, D), 3, axis=1)
    alpha = forget_gate(weights.f_b.times(f).reshape(B, 1, H, D), weights.A_log, weights.dt_bias)[
        :, 0
    ]
    beta = mx.sigmoid(b.astype(mx.float32))
    q, k = (mx.fast.rms_norm(y, None, 1e-6 / D) * D**-0.5 for y in (q, k))
    o, state = kda_step(q * D**-0.5, k, v, alpha, beta, state)  # o [B, H, D]
    gate = mx.sigmoid(weights.g_b.times(g).astype(mx.float32)).reshape(B, H, D)
    y = mx.fast.rms_norm(o, weights.norm, weights.eps) * gate
    return y.astype(x.dtype).reshape(B, -1), mx.contiguous(window[:, 1:]), state


KERNEL = Kernel(
    "kda_decode",
    inputs=(
        *("x", "taps", "tail", "f_b", "f_scales", "f_biases", "g_b", "g_scales", "g_biases"),
        *("A_log", "dt_bias", "norm", "state", "eps", "tokens"),
    ),
    outputs=("y", "new_tail", "new_state"),
)


def kda_decode(
    x: mx.array, weights: DecodeWeights, tail: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """`naive_kda_decode` in one launch, for the sizes that `unsupported_reason` allows."""
    B, H, D, _ = state.shape
    f_b, g_b = weights.f_b, weights.g_b
    y, tail, state = KERNEL(
        inputs=[
            *(x, weights.taps, tail.astype(x.dtype)),
            *f_b.buffers(),
            *g_b.buffers(),
            *(weights.A_log, weights.dt_bias, weights.norm),
            *(state.astype(mx.float32), weights.eps, len(x) // B),
        ],
        template=[
            *(("H", H), ("D", D), ("Rank", f_b.columns), ("Taps", weights.taps.shape[0])),
            *(*f_b.storage("F"), *g_b.storage("G")),
        ],
        grid=(LANES * D, H, B),
        threadgroup=(LANES * D, 1, 1),
        output_shapes=[(len(x), H * D), tail.shape, state.shape],
        output_dtypes=[x.dtype, x.dtype, mx.float32],
    )
    return y, tail, state


KERNELS = (KERNEL,)


def unsupported_reason(weights: DecodeWeights, D: int) -> str | None:
    """Why `kda_decode` does not take a layer with these weights; None: it does."""
    f_b, g_b = weights.f_b, weights.g_b
    if D not in SIZES:
        return f"D = {D} is not among {SIZES}"
    if f_b.columns != g_b.columns:
        return "f_b and g_b differ in rank"
    for name, matrix in (("f_b", f_b), ("g_b", g_b)):
        if why := matrix.unsupported_reason(name):
            return why
    if f_b.columns % 16:
        return f"the rank {f_b.columns} of f_b and g_b is not a multiple of 16"
    if weights.taps.shape[0] < 2:
        return "the convolution has one tap"
    return None
