"""What the tests of kernels share: the emulator, matrices at random and in float64, tolerances.

A file whose kernels run on the emulator says `pytestmark = on_the_emulator`.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels.matrix import Matrix
from tests.assertions import assert_close, numbers
from tests.emulated import emulator, linter

__all__ = ["emulator", "linter"]

# Every format that a folder may have: MLX's mode, bits, group size.
FORMATS = [
    *(("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)),
    *(("affine", bits, 128) for bits in (3, 5)),
    *(("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)),
]
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
on_the_emulator = pytest.mark.usefixtures("emulated")


def matrix(
    values: Any, bits: int, group_size: int, dtype: mx.Dtype, mode: str = "affine"
) -> Matrix:
    """A matrix of these values, plain if `bits` is 0."""
    w = mx.array(values).astype(dtype)
    if not bits:
        return Matrix(w)
    weight, scales, *biases = mx.quantize(w, group_size, bits, mode)
    return Matrix(weight, scales, *biases or [None], group_size, bits, mode)


def exact(W: Matrix) -> np.ndarray:
    """The matrix in float64."""
    if W.scales is None:
        return numbers(W.weight)
    if W.mode != "affine":  # exact in float32: a small float times a power of two, or another
        how = (W.group_size, W.bits, W.mode, None, mx.float32)
        return numbers(mx.dequantize(W.weight, W.scales, None, *how))
    scales, biases = (y.astype(mx.float32) for y in (W.scales, W.biases))
    return numbers(mx.dequantize(W.weight, scales, biases, W.group_size, W.bits))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def assert_all_close(
    dtype: mx.Dtype, largest: float, rms: float = np.inf, **pairs: tuple[mx.array, Any]
) -> None:
    """Each name's array is of this dtype and, within the tolerances, what the oracle says."""
    for name, (ours, oracle) in pairs.items():
        assert ours.dtype == dtype, name
        assert_close(name, ours, oracle, largest, rms)
