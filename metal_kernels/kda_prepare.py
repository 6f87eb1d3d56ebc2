"""What stands before and behind the delta rule of many tokens, between a layer's projections.

    q | k | v = silu(convolution)      q <- q / |q| / sqrt(D)      k <- k / |k|
    alpha = exp(-exp(A_log) softplus(f + dt_bias))      beta = sigmoid(b)
    y = o / sqrt(mean(o^2) + eps) * norm * sigmoid(g)

The kernels round once, where they store. The ops form rounds after each step in a 16-bit dtype.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import mlx.core as mx

from mlx_kimi.metal_kernels.fused import compiles, fused, silu
from mlx_kimi.metal_kernels.kda_gate import forget_gate
from mlx_kimi.metal_kernels.kernel import Kernel, not_running

RUN = 16  # tokens of a simdgroup, which reads Taps - 1 more
SIZES = (64, 128)


class Projected(NamedTuple):
    """What a layer's projections give for T tokens, what it remembers, and its parameters."""

    x: mx.array  # [B, T, width], the input projections: q | k | v, others, and last b [H]
    f: mx.array  # [B, T, H * D], the decay's second projection
    taps: mx.array  # [K, 3 * H * D], the convolution, the present token's last
    tail: mx.array  # [B, K - 1, 3 * H * D], the last tokens of q | k | v
    lengths: mx.array | None  # [B] int32, how many tokens of each row are valid; None: all T
    A_log: mx.array  # [H]
    dt_bias: mx.array  # [H, D]


class Prepared(NamedTuple):
    """The arguments of the delta rule, but for its state, and the convolution's next tail."""

    q: mx.array  # [B, T, H, D], normalised and scaled
    k: mx.array  # [B, T, H, D], normalised
    v: mx.array
    alpha: mx.array  # [B, T, H, D] float32, 1 for padding
    beta: mx.array  # [B, T, H] float32, 0 for padding
    tail: mx.array  # [B, K - 1, 3 * H * D]


def kda_prepare(given: Projected) -> Prepared:
    """`naive_kda_prepare`, in a kernel where kernels run and take heads of this size."""
    if unsupported_reason(given.x.shape[-1], given.dt_bias.shape[-1]):
        return naive_kda_prepare(given)
    return kda_prepare_kernel(given)


def kda_finish(o: mx.array, g: mx.array, norm: mx.array, eps: float) -> mx.array:
    """`naive_kda_finish`, in a kernel where kernels run and take heads of this size."""
    form = naive_kda_finish if unsupported_reason(0, o.shape[-1]) else kda_finish_kernel
    return form(o, g, norm, eps)


def unsupported_reason(width: int, D: int) -> str | None:
    """Why the kernels do not take heads of D channels in rows of `width`; None: they do."""
    if why := not_running(PREPARE, FINISH):
        return why
    if D not in SIZES:
        return f"D = {D} is not among {SIZES}"
    return f"{width} outputs of the input projections are no multiple of 4" if width % 4 else None


def prepared_by(width: int, D: int) -> tuple[str, str]:
    """What runs for many tokens, and why."""
    why = unsupported_reason(width, D)
    return ("ops form", why) if why else ("kda_prepare, kda_finish", "around the delta rule")


# ------------------------------------------------------------------------------------- operations
def naive_kda_prepare(given: Projected) -> Prepared:
    """Make the arguments of the delta rule."""
    x, f, taps, tail, lengths, A_log, dt_bias = given
    B, T, _ = x.shape
    H, D = dt_bias.shape
    qkv, _, b = mx.split(x, [3 * H * D, x.shape[-1] - H], axis=-1)
    qkv, tail = short_convolution(qkv, taps, tail, lengths)
    qk, v = mx.split(qkv.reshape(B, T, 3 * H, D), [2 * H], axis=2)
    q, k = mx.split(l2_normalised(qk), 2, axis=2)
    alpha = forget_gate(f.reshape(B, T, H, D), A_log, dt_bias)
    beta = mx.sigmoid(b.astype(mx.float32))
    if lengths is not None:  # padding neither decays the state nor writes to it
        valid = mx.arange(T) < lengths[:, None]
        alpha = mx.where(valid[..., None, None], alpha, 1)
        beta = mx.where(valid[..., None], beta, 0)
    return Prepared(q * D**-0.5, k, v, alpha, beta, tail)


def naive_kda_finish(o: mx.array, g: mx.array, norm: mx.array, eps: float) -> mx.array:
    """`rms_norm(o) * sigmoid(g)`: o [B, T, H, D] float32, g [B, T, H * D] -> as g."""
    y = _gated(mx.fast.rms_norm(o, norm, eps), g.reshape(o.shape))
    return y.astype(g.dtype).reshape(g.shape)


@fused(shapeless=True)
def _gated(o: mx.array, gate: mx.array) -> mx.array:
    return o * mx.sigmoid(gate.astype(mx.float32))


def l2_normalised(x: mx.array, scale: float = 1.0) -> mx.array:
    """`scale * x / sqrt(sum(x^2) + 1e-6)` over the last axis.

    Where functions are compiled, rms_norm is one launch: it divides by sqrt(mean + eps), so its eps
    is 1e-6 / D and D^-1/2 is left to multiply.
    """
    width = x.shape[-1]
    if compiles():
        return mx.fast.rms_norm(x, None, 1e-6 / width) * (scale * width**-0.5)
    squares = mx.square(x.astype(mx.float32)).sum(axis=-1, keepdims=True)
    y = (x * mx.rsqrt(squares + 1e-6)).astype(x.dtype)
    return y if scale == 1 else y * scale


def short_convolution(
    x: mx.array, taps: mx.array, tail: mx.array, lengths: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Causal depthwise convolution over time, then SiLU.

    x [B, T, C] after `tail` [B, K - 1, C] -> convolved x, and the new tail. `lengths` [B] are the
    tokens of each row that are valid; padding never enters the tail.
    """
    T, keep = x.shape[1], taps.shape[0] - 1
    window = mx.concatenate([tail, x], axis=1)  # [B, K - 1 + T, C]
    if T == 1:
        y = (window * taps).sum(axis=1, keepdims=True)
    else:
        y = window[:, :T] * taps[0]
        for tap in range(1, keep + 1):
            y = y + window[:, tap : tap + T] * taps[tap]
    return silu(y), _last_valid(window, keep, T, lengths)


def _last_valid(window: mx.array, keep: int, T: int, lengths: mx.array | None) -> mx.array:
    """The last `keep` valid tokens of each row of `window` [B, keep + T, C]."""
    if lengths is None:
        return mx.contiguous(window[:, T:])
    places = lengths[:, None] + mx.arange(keep)  # the tail itself comes before x's first token
    return mx.take_along_axis(window, places[..., None], axis=1)


# ---------------------------------------------------------------------------------------- kernels
PREPARE = Kernel(
    "kda_prepare",
    inputs=("x", "f", "taps", "tail", "lengths", "A_log", "dt_bias", "T"),
    outputs=("q", "k", "v", "alpha", "beta", "new_tail"),
    wide=("x", "f", "q", "k", "v", "alpha", "beta"),
)


def kda_prepare_kernel(given: Projected) -> Prepared:
    """`naive_kda_prepare` in one launch, for the sizes that `unsupported_reason` allows."""
    x, f, taps, tail, lengths, A_log, dt_bias = given
    B, T, width = x.shape
    H, D = dt_bias.shape
    heads = (B, T, H, D)
    return Prepared(
        *PREPARE(
            inputs=[
                *(x, f, taps, tail.astype(x.dtype)),
                A_log if lengths is None else lengths.astype(mx.int32),  # (A_log: never read)
                *(A_log, dt_bias, T),
            ],
            template=[
                *(("H", H), ("D", D), ("Width", width), ("Taps", taps.shape[0]), ("Run", RUN)),
                ("Padded", lengths is not None),
            ],
            grid=(32, 4 * H, B * -(-T // RUN)),
            threadgroup=(32, 4, 1),
            output_shapes=[heads, heads, heads, heads, (B, T, H), tail.shape],
            output_dtypes=[*[x.dtype] * 3, mx.float32, mx.float32, x.dtype],
        )
    )


FINISH = Kernel(
    "kda_finish",
    inputs=("o", "g", "norm", "eps"),
    outputs=("y",),
    wide=("o", "g", "y"),
)


def kda_finish_kernel(o: mx.array, g: mx.array, norm: mx.array, eps: float) -> mx.array:
    """`naive_kda_finish` in one launch, for the sizes that `unsupported_reason` allows."""
    B, T, H, D = o.shape
    (y,) = FINISH(
        inputs=[o, g, norm, eps],
        template=[("H", H), ("D", D)],
        grid=(32, H, B * T),
        threadgroup=(32, gcd(4, H), 1),
        output_shapes=[g.shape],
        output_dtypes=[g.dtype],
    )
    return y
