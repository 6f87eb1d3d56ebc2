"""The kernels of mlx_kimi reach the emulator and its lint through `use_backend`."""

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import LintError

from mlx_kimi.metal_kernels.kda_sequential import KERNEL, kda_sequential_kernel, naive_kda
from mlx_kimi.metal_kernels.kernel import use_backend
from tests.assertions import assert_close
from tests.emulated import emulator, linter


def test_emulator_is_a_backend() -> None:
    rng = np.random.default_rng(0)
    q, k, v, alpha = (mx.array(rng.random((1, 3, 2, 32)).astype(np.float32) / 6) for _ in range(4))
    beta, state = mx.ones((1, 3, 2)), mx.array(rng.random((1, 2, 32, 32)).astype(np.float32))
    with use_backend(emulator):
        o, after = kda_sequential_kernel(q, k, v, alpha, beta, state)
    expected, expected_after = naive_kda(q, k, v, alpha, beta, state)
    assert_close("o", o, expected, 1e-6)
    assert_close("state", after, expected_after, 1e-6)
    assert emulator(KERNEL).counts["device_bytes_written"] == 4 * (o.size + after.size)


@pytest.mark.slow
def test_linter_is_a_backend() -> None:
    q = mx.zeros((1, 1, 1, 32))
    with use_backend(linter(large=KERNEL.inputs)):
        kda_sequential_kernel(q, q, q, q, q[..., 0], mx.zeros((1, 1, 32, 32)))
    with use_backend(linter()), pytest.raises(LintError, match="^kda_sequential: "):
        kda_sequential_kernel(q, q, q, q, q[..., 0], mx.zeros((1, 1, 32, 32)))
