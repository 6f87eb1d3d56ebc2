"""The residual addition and the norm that follows it, in one launch.

s = x + part      normed = s / sqrt(mean(s^2) + eps) * weight
"""

from __future__ import annotations

import mlx.core as mx

from mlx_kimi.metal_kernels.kernel import Kernel

MOST_THREADS = 256  # of a row


def naive_add_norm(
    x: mx.array, part: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """`s = x + part` and `s / sqrt(mean(s^2) + eps) * weight`, all [..., W] of one dtype."""
    x = x + part
    return x, mx.fast.rms_norm(x, weight, eps)


KERNEL = Kernel(
    "add_norm",
    inputs=("x", "part", "weight", "eps"),
    outputs=("sum", "normed"),
    wide=("x", "part", "sum", "normed"),
)


def add_norm_kernel(
    x: mx.array, part: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """`naive_add_norm` in one launch; any width, any number of rows."""
    W = x.shape[-1]
    threads = min(MOST_THREADS, -(-W // 32) * 32)
    total, normed = KERNEL(
        inputs=[x, part, weight, eps],
        template=[("OutT", x.dtype), ("W", W), ("Threads", threads)],
        grid=(threads, x.size // W, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape, x.shape],
        output_dtypes=[x.dtype, x.dtype],
    )
    return total, normed
