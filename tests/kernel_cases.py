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

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
on_the_emulator = pytest.mark.usefixtures("emulated")


def matrix(values: Any, bits: int, group_size: int, dtype: mx.Dtype) -> Matrix:
    """A matrix of these values, plain if `bits` is 0."""
    w = mx.array(values).astype(dtype)
    return Matrix(*mx.quantize(w, group_size, bits), group_size, bits) if bits else Matrix(w)


def exact(W: Matrix) -> np.ndarray:
    """The matrix in float64."""
    if W.scales is None or W.biases is None:
        return numbers(W.weight)
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
