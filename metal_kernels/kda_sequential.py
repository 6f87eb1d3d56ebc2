"""The delta rule of Kimi Delta Attention, one token after another (arXiv 2510.26692, equation 1).

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T
    o_t = S_t^T q_t

Every other form of this operator answers to `naive_kda`.
"""

from __future__ import annotations

from math import gcd

import mlx.core as mx

from mlx_kimi.metal_kernels.fused import fused
from mlx_kimi.metal_kernels.kernel import Kernel

ROWS = 8  # of the state, of a lane, which has 4 elements of each
SIZES = (32, 64, 128)


def naive_kda(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    alpha: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """Apply the delta rule to T tokens.

    Args:
        q, k: [B, T, H, Dk], convolved and L2-normalised; q scaled by Dk^-1/2.
        v: [B, T, H, Dv].
        alpha: [B, T, H, Dk], the decay of each channel, in [0, 1]; not its log.
        beta: [B, T, H], how much of each value is written.
        state: [B, H, Dv, Dk] float32, the transpose of the paper's S_0.

    Returns:
        o [B, T, H, Dv] float32, and the state after the last token.
    """
    outputs, T = [], q.shape[1]
    for token in zip(*(mx.split(x, T, axis=1) for x in (q, k, v, alpha, beta)), strict=True):
        q, k, v, alpha, beta = (x.squeeze(1) for x in token)
        o, state = kda_step(q, k, v, alpha, beta, state)
        outputs.append(mx.expand_dims(o, 1))
    return mx.concatenate(outputs, axis=1), state


@fused()
def kda_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    alpha: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """One token of `naive_kda`: arguments and o without the axis T."""
    q, k, v, alpha, beta = (x.astype(mx.float32) for x in (q, k, v, alpha, beta))
    decayed = state * mx.expand_dims(alpha, 2)  # [B, H, Dv, Dk]
    delta = mx.expand_dims(beta, 2) * (v - _read(decayed, k))  # [B, H, Dv]
    state = decayed + mx.expand_dims(delta, 3) * mx.expand_dims(k, 2)
    return _read(state, q), state


def _read(state: mx.array, x: mx.array) -> mx.array:
    """`state x`: [B, H, Dv, Dk], [B, H, Dk] -> [B, H, Dv].

    On CPU, MLX multiplies a row by a matrix four times as fast as a matrix by a column.
    """
    return (mx.expand_dims(x, 2) @ state.swapaxes(2, 3)).squeeze(2)


KERNEL = Kernel(
    "kda_sequential",
    inputs=("q", "k", "v", "alpha", "beta", "state", "T"),
    outputs=("o", "new_state"),
)


def kda_sequential_kernel(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    alpha: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """`naive_kda` in one launch, for the sizes that `unsupported_reason` allows.

    q, k and v are of any float dtype.
    """
    B, T, H, Dk = k.shape
    Dv = v.shape[-1]
    groups = Dv * Dk // (32 * ROWS * 4)
    o, state = KERNEL(
        inputs=[q, k, v, *(x.astype(mx.float32) for x in (alpha, beta, state)), T],
        template=[("H", H), ("Dk", Dk), ("Dv", Dv)],
        grid=(32, groups, B * H),
        threadgroup=(32, gcd(4, groups), 1),
        output_shapes=[v.shape, state.shape],
        output_dtypes=[mx.float32, mx.float32],
    )
    return o, state


KERNELS = (KERNEL,)


def unsupported_reason(Dk: int, Dv: int, sizes: tuple[int, ...] = SIZES) -> str | None:
    """Why a kernel for heads of these `sizes` does not take these; None: it does."""
    if Dk in sizes and Dv in sizes:
        return None
    return f"Dk = {Dk} and Dv = {Dv} are not both among {sizes}"
