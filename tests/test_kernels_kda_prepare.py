"""What stands around the delta rule of many tokens: float64 -> the ops form -> the kernels."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels import kda_prepare as module
from mlx_kimi.metal_kernels.kda_prepare import (
    Prepared,
    Projected,
    kda_finish_kernel,
    kda_prepare_kernel,
    naive_kda_finish,
    naive_kda_prepare,
)
from mlx_kimi.metal_kernels.kernel import use_backend
from tests.assertions import assert_close, assert_same_bits, numbers
from tests.kernel_cases import assert_all_close, linter, on_the_emulator, sigmoid

pytestmark = on_the_emulator
# Float32 against float64, as for every operator: the exponent of a strong decay is a large number
# that was rounded. The kernels round once in 16 bits, by half of 2^-11 or 2^-8.
RMS = {mx.float32: 5e-6, mx.float16: 4e-4, mx.bfloat16: 2.5e-3}
LARGEST = {mx.float32: 2e-5, mx.float16: 1e-3, mx.bfloat16: 4e-3}
PREPARES = {"naive": naive_kda_prepare, "kernel": kda_prepare_kernel}
FINISHES = {"naive": naive_kda_finish, "kernel": kda_finish_kernel}
of_form = pytest.mark.parametrize("form", PREPARES)


def case(
    B: int = 1,
    T: int = 20,
    H: int = 2,
    D: int = 64,
    K: int = 4,
    between: int = 10,
    lengths: list[int] | None = None,
    dtype: mx.Dtype = mx.float32,
    rate: float = 1.0,
) -> Projected:
    rng = np.random.default_rng([B, T, H, D, K])

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, np.float32))

    width = 3 * H * D + between + H
    return Projected(
        normal(B, T, width).astype(dtype),
        normal(B, T, H * D).astype(dtype),
        (normal(K, 3 * H * D) * 0.5).astype(dtype),
        normal(B, K - 1, 3 * H * D).astype(dtype),
        None if lengths is None else mx.array(lengths),
        normal(H) + rate,
        normal(H, D) - 2,
    )


def oracle(given: Projected) -> Prepared:
    """In float64, from the published equations."""
    x, taps, tail = numbers(given.x), numbers(given.taps), numbers(given.tail)
    B, T, _ = x.shape
    H, D = given.dt_bias.shape
    K = len(taps)
    lengths = [T] * B if given.lengths is None else given.lengths.tolist()
    window = np.concatenate([tail, x[..., : 3 * H * D]], axis=1)
    qkv = sum(window[:, i : i + T] * taps[i] for i in range(K))
    q, k, v = np.split((qkv * sigmoid(qkv)).reshape(B, T, 3 * H, D), 3, axis=2)
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    softplus = np.logaddexp(numbers(given.f).reshape(B, T, H, D) + numbers(given.dt_bias), 0)
    alpha = np.exp(-np.exp(numbers(given.A_log))[:, None] * softplus)
    beta = sigmoid(x[..., -H:])
    for row, n in enumerate(lengths):
        alpha[row, n:], beta[row, n:] = 1, 0
    tails = np.stack([window[row, n : n + K - 1] for row, n in enumerate(lengths)])
    return Prepared(*map(mx.array, (q * D**-0.5, k, v, alpha, beta, tails)))


def assert_is_oracle(form: str, given: Projected) -> None:
    ours, expected = PREPARES[form](given), oracle(given)
    both = {name: (getattr(ours, name), getattr(expected, name)) for name in Prepared._fields}
    gate = {name: both.pop(name) for name in ("alpha", "beta")}
    del both["tail"]
    assert_all_close(given.x.dtype, LARGEST[given.x.dtype], RMS[given.x.dtype], **both)
    # float32 whatever the dtype of what they are made of
    assert_all_close(mx.float32, LARGEST[mx.float32], RMS[mx.float32], **gate)
    assert_same_bits("tail", ours.tail.astype(mx.float32), expected.tail.astype(mx.float32))


@of_form
@pytest.mark.parametrize("T", [1, 2, 3, 15, 16, 17, 33])
def test_equals_the_equations_at_every_length(form: str, T: int) -> None:
    assert_is_oracle(form, case(T=T))


@of_form
@pytest.mark.parametrize(("B", "H", "D", "K"), [(2, 1, 64, 2), (1, 3, 128, 4), (3, 2, 64, 3)])
def test_equals_the_equations_at_every_shape(form: str, B: int, H: int, D: int, K: int) -> None:
    assert_is_oracle(form, case(B=B, H=H, D=D, K=K, between=8 - H % 4))


@of_form
@pytest.mark.parametrize("lengths", [[18, 0, 5], [1, 2, 3], [17, 16, 15]], ids=str)
def test_padding_is_inert_and_leaves_the_tail(form: str, lengths: list[int]) -> None:
    assert_is_oracle(form, case(B=3, T=18, lengths=lengths))


@of_form
@pytest.mark.parametrize("rate", [-12.0, -4.0, 3.0, 6.0])
def test_equals_the_equations_at_decays_of_every_strength(form: str, rate: float) -> None:
    assert_is_oracle(form, case(rate=rate))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_the_kernel_rounds_once(dtype: mx.Dtype) -> None:
    assert_is_oracle("kernel", case(B=2, dtype=dtype))


@of_form
@pytest.mark.parametrize("dtype", RMS, ids=str)
@pytest.mark.parametrize(("B", "T", "H", "D"), [(1, 1, 2, 64), (2, 5, 3, 128)])
def test_the_gated_norm_is_the_equation(
    form: str, B: int, T: int, H: int, D: int, dtype: mx.Dtype
) -> None:
    rng = np.random.default_rng([B, T, H, D])
    o, g = (rng.standard_normal((B, T, H * D), np.float32) for _ in range(2))
    norm = mx.array(1 + rng.standard_normal(D, np.float32) / 4).astype(dtype)
    gate = mx.array(g).astype(dtype)
    y = FINISHES[form](mx.array(o).reshape(B, T, H, D), gate, norm, 1e-5)
    assert y.dtype == dtype and y.shape == gate.shape
    heads = o.reshape(B, T, H, D).astype(np.float64)
    normed = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-5) * numbers(norm)
    expected = normed.reshape(B, T, -1) * sigmoid(numbers(gate))
    assert_close("y", y, expected, LARGEST[dtype], RMS[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", RMS, ids=str)
def test_every_version_of_metal_takes_the_text(dtype: mx.Dtype) -> None:
    large = {*module.PREPARE.inputs, *module.FINISH.inputs} - {"lengths", "A_log"}
    with use_backend(linter(large=large)):
        kda_prepare_kernel(case(dtype=dtype))
        kda_finish_kernel(
            mx.zeros((1, 2, 2, 64)), mx.zeros((1, 2, 128), dtype), mx.ones(64, dtype), 1e-5
        )


def test_says_what_it_does_not_take() -> None:
    assert module.unsupported_reason(400, 128) is None
    assert module.unsupported_reason(400, 32) == "D = 32 is not among (64, 128)"
    assert "no multiple of 4" in str(module.unsupported_reason(402, 64))
    with use_backend(None):
        assert module.unsupported_reason(400, 128) is not None
