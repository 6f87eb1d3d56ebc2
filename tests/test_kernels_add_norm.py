"""The residual addition with its norm, on the emulator, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels.add_norm import add_norm_kernel, naive_add_norm
from mlx_kimi.metal_kernels.kernel import use_backend
from tests.assertions import assert_close, assert_same_bits, numbers
from tests.kernel_cases import DTYPES, linter, on_the_emulator

pytestmark = on_the_emulator
EPS = 1e-5
# A sum of squares in float32; in 16 bits the norm is rounded once (naive: twice) of the same sum.
RMS = {mx.float32: 5e-7, mx.float16: 4e-4, mx.bfloat16: 3e-3}


def case(shape: tuple[int, ...], dtype: mx.Dtype, size: float = 1.0) -> list[mx.array]:
    rng = np.random.default_rng(list(shape))
    x, part = (mx.array(rng.standard_normal(shape, np.float32) * size) for _ in range(2))
    weight = mx.array(1 + rng.standard_normal(shape[-1:], np.float32) / 4)
    return [a.astype(dtype) for a in (x, part, weight)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2304), (1, 1, 1), (2, 3, 72), (5, 31), (3, 256), (1, 257)], ids=str
)
def test_equals_float64(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    x, part, weight = case(shape, dtype)
    total, normed = add_norm_kernel(x, part, weight, EPS)
    assert total.dtype == normed.dtype == dtype and total.shape == normed.shape == shape
    assert_same_bits("sum", total.astype(mx.float32), (x + part).astype(mx.float32))
    kept = numbers(total)
    factor = np.sqrt((kept**2).mean(-1, keepdims=True) + EPS)
    assert_close("normed", normed, kept / factor * numbers(weight), 4 * RMS[dtype], RMS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 50.0])
def test_equals_the_ops_form(dtype: mx.Dtype, size: float) -> None:
    given = case((2, 1, 320), dtype, size)
    ours, naive = add_norm_kernel(*given, EPS), naive_add_norm(*given, EPS)
    assert_same_bits("sum", *(pair[0].astype(mx.float32) for pair in (ours, naive)))
    assert_close("normed", ours[1], naive[1], 4 * RMS[dtype], 2 * RMS[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_version_of_metal_takes_the_text(dtype: mx.Dtype) -> None:
    with use_backend(linter()):
        add_norm_kernel(*case((1, 64), dtype), EPS)
