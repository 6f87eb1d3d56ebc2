"""The author's tests: no Mac, no GPU. What is planted is found."""

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
import softmax
from metal_emulator import findings


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_emulator.metal_kernel)


@pytest.mark.parametrize("N", [1, 31, 128, 1000])
def test_softmax_is_that_of_numpy(N: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, N)).astype(np.float32)
    expected = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(softmax.softmax(mx.array(x)), expected, rtol=1e-5)


def run_changed(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    assert softmax.SOURCE.count(right) == 1
    monkeypatch.setattr(softmax, "SOURCE", softmax.SOURCE.replace(right, wrong))
    softmax.softmax(mx.zeros((3, 256)))


def test_a_forgotten_barrier_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found from the barriers between two accesses: no number need be wrong."""
    barrier = (
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // until every maximum has been read"
    )
    with pytest.raises(findings.Race, match="threads of one threadgroup") as found:
        run_changed(monkeypatch, barrier, "")
    assert found.value.buffer == "partial"


def test_a_step_too_far_is_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "i < N; i += THREADS) top"
    with pytest.raises(findings.OutOfBoundsDevice, match=r"line 8: .* x\[768\] of 768"):
        run_changed(monkeypatch, loop, loop.replace("<", "<="))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_metal_would_take_the_text(dtype: mx.Dtype) -> None:
    template = [("T", dtype), ("N", 100), ("THREADS", softmax.THREADS)]
    metal_emulator.lint("row_softmax", softmax.SOURCE, {"x": dtype}, {"y": dtype}, template)
