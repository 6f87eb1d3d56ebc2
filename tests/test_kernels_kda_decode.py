"""A KDA layer's decode step: float64 -> naive_kda_decode -> kda_decode, plain and quantized."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels import kda_decode as module
from mlx_kimi.metal_kernels.kda_decode import DecodeWeights, Matrix, kda_decode, naive_kda_decode
from mlx_kimi.metal_kernels.kernel import use_backend
from tests.assertions import assert_close, assert_same_bits, numbers
from tests.kernel_cases import (
    FORMATS,
    assert_all_close,
    exact,
    linter,
    matrix,
    on_the_emulator,
    sigmoid,
)

pytestmark = on_the_emulator
RMS, LARGEST = 5e-6, 2e-5
FORMS = {"naive": naive_kda_decode, "kernel": kda_decode}
of_form = pytest.mark.parametrize("form", FORMS)


class Case(NamedTuple):
    """The arguments of naive_kda_decode."""

    x: mx.array
    weights: DecodeWeights
    tail: mx.array
    state: mx.array


def case(
    B: int = 1,
    H: int = 2,
    D: int = 64,
    K: int = 4,
    rank: int | None = None,
    bits: int = 0,
    group_size: int = 32,
    dtype: mx.Dtype = mx.float32,
    rate: float = 0.0,
    mode: str = "affine",
    T: int = 1,
) -> Case:
    """A layer and T tokens at random; its decays are stronger as `rate` rises."""
    rank = rank or D
    rng = np.random.default_rng([B, H, D, K, rank, bits, group_size])

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    channels = 3 * H * D
    weights = DecodeWeights(
        mx.array(normal(K, channels)).astype(dtype),
        matrix(normal(H * D, rank) * rank**-0.5, bits, group_size, dtype, mode),
        matrix(normal(H * D, rank) * rank**-0.5, bits, group_size, dtype, mode),
        mx.array(normal(H) + rate),
        mx.array(normal(H, D) - 2),
        mx.array(1 + normal(D) / 4),
        1e-5,
    )
    x = mx.array(normal(B * T, channels + 2 * rank + H)).astype(dtype)
    tail = mx.array(normal(B, K - 1, channels)).astype(dtype)
    return Case(x, weights, tail, mx.array(normal(B, H, D, D)))


def oracle(given: Case) -> tuple[np.ndarray, np.ndarray]:
    """y and the next state in float64, from the published equations."""
    weights, S = given.weights, numbers(given.state)
    B, H, D, _ = S.shape
    rank = weights.f_b.columns
    x, taps = numbers(given.x), numbers(weights.taps)
    qkv, f, g, b = np.split(x, np.cumsum([3 * H * D, rank, rank]), axis=-1)
    window = np.concatenate([numbers(given.tail), qkv[:, None]], axis=1)
    qkv = (window * taps).sum(1)
    q, k, v = np.split((qkv * sigmoid(qkv)).reshape(B, 3 * H, D), 3, axis=1)
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    softplus = np.logaddexp((f @ exact(weights.f_b).T).reshape(B, H, D) + weights.dt_bias, 0)
    alpha = np.exp(-np.exp(numbers(weights.A_log))[:, None] * softplus)
    S = S * alpha[:, :, None]
    delta = sigmoid(b)[..., None] * (v - np.einsum("bhvk,bhk->bhv", S, k))
    S = S + delta[..., None] * k[:, :, None]
    o = np.einsum("bhvk,bhk->bhv", S, q * D**-0.5)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + weights.eps) * numbers(weights.norm)
    gate = sigmoid((g @ exact(weights.g_b).T).reshape(B, H, D))
    return (o * gate).reshape(B, -1), S


def assert_is_oracle(form: str, given: Case, largest: float = LARGEST, rms: float = RMS) -> None:
    y, tail, state = FORMS[form](*given)
    expected, last = oracle(given)
    assert_all_close(mx.float32, LARGEST, RMS, state=(state, last))
    assert_all_close(given.x.dtype, largest, rms, y=(y, expected))
    channels = tail.shape[-1]
    window = mx.concatenate([given.tail, given.x[:, None, :channels]], axis=1)
    assert_same_bits("tail", tail.astype(mx.float32), window[:, 1:].astype(mx.float32))


@of_form
@pytest.mark.parametrize("B, H, D, K", [(1, 1, 64, 2), (2, 3, 64, 4), (1, 2, 128, 4)])
def test_equals_the_equations_at_every_shape(form: str, B: int, H: int, D: int, K: int) -> None:
    assert_is_oracle(form, case(B=B, H=H, D=D, K=K))


@of_form
@pytest.mark.parametrize("rate", [-12.0, -4.0, 3.0, 6.0])
def test_equals_the_equations_at_decays_of_every_strength(form: str, rate: float) -> None:
    assert_is_oracle(form, case(rate=rate))


@of_form
@pytest.mark.parametrize("mode, bits, group_size", FORMATS)
def test_takes_quantized_matrices(form: str, mode: str, bits: int, group_size: int) -> None:
    given = case(H=1, rank=128, bits=bits, group_size=group_size, mode=mode)
    assert_is_oracle(form, given)


@of_form
@pytest.mark.parametrize("T", [2, 3, 8])
@pytest.mark.parametrize("B, H, D, K", [(1, 1, 64, 2), (2, 3, 64, 4), (1, 1, 128, 6)])
def test_several_tokens_are_one_after_another(
    form: str, T: int, B: int, H: int, D: int, K: int
) -> None:
    """Before their convolution is full, and after; a kernel's tokens have the bits of one."""
    given = case(B=B, H=H, D=D, K=K, T=T)
    y, tail, state = FORMS[form](*given)
    now = given
    for t in range(T):
        one = now._replace(x=given.x[t::T])
        expected, last = oracle(one)
        assert_all_close(mx.float32, LARGEST, RMS, y=(y[t::T], expected))
        alone, *memory = FORMS[form](*one)
        assert_same_bits(f"token {t}", y[t::T], alone)
        now = now._replace(tail=memory[0], state=memory[1])
    assert_same_bits("tail", tail, now.tail)
    assert_same_bits("state", state, now.state)


def test_takes_gates_that_are_stored_unlike_each_other() -> None:
    given = case(H=1, rank=128, bits=3)
    g_b = case(H=1, rank=128, bits=8, mode="mxfp8").weights.g_b
    assert_is_oracle("kernel", given._replace(weights=given.weights._replace(g_b=g_b)))


def test_takes_the_heads_of_the_48b() -> None:
    given = case(B=2, H=2, D=128, bits=4, group_size=64, dtype=mx.bfloat16)
    assert_is_oracle("kernel", given, 4e-3, 2.5e-3)


# The kernel rounds y once: by at most half of 2^-8, of each number itself.
@pytest.mark.parametrize("dtype, rms", [(mx.float16, 4e-4), (mx.bfloat16, 2.5e-3)])
@pytest.mark.parametrize("bits", [0, 4])
def test_rounds_once_in_16_bits(bits: int, dtype: mx.Dtype, rms: float) -> None:
    assert_is_oracle("kernel", case(B=2, bits=bits, dtype=dtype), 4e-3, rms)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_every_version_of_metal_takes_the_text(bits: int, dtype: mx.Dtype) -> None:
    with use_backend(linter(large={*module.KERNEL.inputs} - {"A_log"})):
        kda_decode(*case(bits=bits, dtype=dtype))


def test_a_slow_decay_is_not_lost() -> None:
    """1 + exp(-18) is 1 in float32; a softplus of zero would never forget."""
    given = case(H=1)
    weights = given.weights._replace(
        A_log=mx.array([8.0]), dt_bias=mx.zeros((1, 64)) - 18, f_b=Matrix(mx.zeros((64, 64)))
    )
    silent = mx.concatenate([given.x[:, :-1], mx.full((1, 1), -200.0)], axis=1)
    _, _, state = kda_decode(silent, weights, given.tail, given.state)
    fading = np.exp(-np.exp(8.0) * np.exp(-18.0))
    assert_close("state", state, fading * numbers(given.state), 2e-7)


def test_says_what_it_does_not_take() -> None:
    weights = case(bits=4).weights
    assert module.unsupported_reason(weights, 64) is None
    assert "D = 96" in str(module.unsupported_reason(weights, 96))
    other = weights._replace(g_b=case(rank=128).weights.g_b)
    assert "differ in rank" in str(module.unsupported_reason(other, 64))
