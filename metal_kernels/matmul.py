"""Matrix products in the form that the device multiplies fastest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

# Rows from which copying a matrix costs less than it saves on CPU.
COPY_FROM = 16
LARGEST_COPY = 1 << 28  # elements (1 GiB in float32)
# Rows from which MLX's products with quantized matrices are slower on NVIDIA GPUs than making the
# plain matrix first: on an H200 by 1.45 at 512 rows, by 2.3 at 2048.
CUDA_PLAIN_FROM = 256


def copy_pays(rows: int, size: int) -> bool:
    """Whether a matrix of `size` elements should be laid out anew before it multiplies `rows`.

    On CPU the BLAS of MLX's wheel is twice as fast when the right side lies in memory as it is
    multiplied, and two to three times as fast as products with quantized matrices.
    """
    return COPY_FROM <= rows and size <= LARGEST_COPY and mx.default_device() == mx.Device(mx.cpu)


_ALL_PLAIN: ContextVar[bool] = ContextVar("all plain", default=False)


@contextmanager
def plain_products() -> Iterator[None]:
    """Within, every quantized matrix becomes plain before it multiplies: the form to compare with.

    It needs none of MLX's kernels for quantized products, each of which takes an NVIDIA GPU up to
    50 seconds to compile.
    """
    token = _ALL_PLAIN.set(True)
    try:
        yield
    finally:
        _ALL_PLAIN.reset(token)


def plain_pays(rows: int, size: int) -> bool:
    """Whether a quantized matrix of `size` elements should become plain to multiply `rows`."""
    if _ALL_PLAIN.get():
        return True
    if mx.default_device() == mx.Device(mx.cpu):
        return copy_pays(rows, size)
    return mx.cuda.is_available() and CUDA_PLAIN_FROM <= rows and size <= LARGEST_COPY


def times_transposed(x: mx.array, w: mx.array) -> mx.array:
    """`x w^T` for x [..., T, in], w [..., out, in]."""
    w = w.swapaxes(-1, -2)
    return x @ (mx.contiguous(w) if copy_pays(x.shape[-2], w.size) else w)


def gather_times_transposed(
    x: mx.array, w: mx.array, indices: mx.array, sorted_indices: bool
) -> mx.array:
    """`x w[index]^T` for x [..., T, in], w [E, out, in] and the `indices` [...] of x's rows.

    An axis of one row made by indexing has any stride, and MLX 0.32.4's product of sorted rows on
    NVIDIA GPUs takes that for the distance of rows (benchmarks/gather_mm_sorted.py): the rows are
    given ordinary strides, which moves nothing.
    """
    w = w.swapaxes(-1, -2)
    if copy_pays(indices.size // w.shape[0], w.size):
        w = mx.contiguous(w)
    x = x.reshape(-1).reshape(x.shape)
    return mx.gather_mm(x, w, rhs_indices=indices, sorted_indices=sorted_indices)
