"""The delta rule: float64 recurrence -> naive_kda -> kda_chunk, at gates of every strength."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels.kda import kda
from mlx_kimi.metal_kernels.kda_chunk import CHUNK, kda_chunk
from mlx_kimi.metal_kernels.kda_gate import forget_gate
from mlx_kimi.metal_kernels.kda_prepare import l2_normalised, short_convolution
from mlx_kimi.metal_kernels.kda_sequential import naive_kda
from tests.assertions import assert_close, assert_same_bits, numbers
from tests.kda_cases import GATES, Inputs, case, recurrence

# Worst float32 error observed over all cases is 1.1e-6 rms and 2e-6 of the maximum; the rest is
# margin for exp (a few ulp) and the order of sums.
RMS, LARGEST = 5e-6, 2e-5
PER_TOKEN = 1e-4  # of a token's own maximum: differences of cumulated gates err by 5e-3 here


FORMS: dict[str, Callable[..., Any]] = {
    "naive": naive_kda,
    "chunk": kda_chunk,
    "chunk64": lambda *arguments: kda_chunk(*arguments, chunk=64),
    "chosen": kda,
}
of_form = pytest.mark.parametrize("form", FORMS)


def assert_is_recurrence(form: str, inputs: Inputs) -> None:
    o, state = FORMS[form](*inputs.arrays())
    oracle, last = recurrence(inputs)
    assert o.dtype == state.dtype == mx.float32
    assert_close("state", state, last, LARGEST, RMS)
    assert_close("output", o, oracle, LARGEST, RMS)
    error = np.abs(numbers(o) - oracle).max((0, 2, 3))
    size = np.abs(oracle).max((0, 2, 3)) + 1e-3 * np.abs(oracle).max()
    assert (error / size).max() <= PER_TOKEN


@pytest.mark.slow
@of_form
@pytest.mark.parametrize("gates", GATES)
def test_equals_the_recurrence_at_gates_of_every_strength(form: str, gates: str) -> None:
    assert_is_recurrence(form, case(gates))


@of_form
@pytest.mark.parametrize("gates", ["idn", "repeated", "opposite"])
@pytest.mark.parametrize("T", [16, 17, 64])
def test_equals_the_recurrence_for_repeated_keys(form: str, gates: str, T: int) -> None:
    inputs = case(gates, T=T)
    assert_is_recurrence(form, inputs._replace(beta=np.ones_like(inputs.beta)))


@pytest.mark.parametrize("form", ["naive", "chunk", "chosen"])
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 250])
def test_equals_the_recurrence_at_every_length(form: str, T: int) -> None:
    assert_is_recurrence(form, case("logu", B=2, T=T, H=3, Dk=32))


@pytest.mark.parametrize("form", ["naive", "chunk"])
@pytest.mark.parametrize(
    "B, H, Dk, Dv", [(1, 1, 32, 32), (3, 1, 64, 64), (2, 3, 128, 128), (1, 3, 32, 48)]
)
def test_equals_the_recurrence_at_every_shape(form: str, B: int, H: int, Dk: int, Dv: int) -> None:
    assert_is_recurrence(form, case("swch", B=B, T=37, H=H, Dk=Dk, Dv=Dv))


@pytest.mark.parametrize("form", ["naive", "chunk"])
def test_equals_the_recurrence_over_a_long_text(form: str) -> None:
    assert_is_recurrence(form, case("swch", T=3000 if form == "chunk" else 500, H=1, Dk=32))


@of_form
def test_takes_inputs_of_16_bits(form: str) -> None:
    inputs = case("typ", T=40)
    rounded = [mx.array(x).astype(mx.bfloat16) for x in inputs[:3]]
    o, _ = FORMS[form](*rounded, *inputs.arrays()[3:])
    exact = Inputs(*(np.array(x.astype(mx.float32)) for x in rounded), *inputs[3:])
    assert_close("output", o, recurrence(exact)[0], LARGEST, RMS)


@pytest.mark.parametrize("gates", ["typ", "logu", "idn"])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_two_calls_split_at_a_chunk_are_one_call_bit_for_bit(gates: str, chunks: int) -> None:
    inputs = case(gates, T=100)
    whole, last = kda_chunk(*inputs.arrays())
    first, state = kda_chunk(*inputs.cut(0, chunks * CHUNK).arrays())
    second, state = kda_chunk(*inputs.cut(chunks * CHUNK).arrays()[:-1], state)
    assert_same_bits("outputs", mx.concatenate([first, second], axis=1), whole)
    assert_same_bits("state", state, last)


@of_form
@pytest.mark.parametrize("split", [1, 7, 33])
def test_two_calls_split_anywhere_equal_the_recurrence(form: str, split: int) -> None:
    inputs = case("swch", T=60)
    oracle, last = recurrence(inputs)
    first, state = FORMS[form](*inputs.cut(0, split).arrays())
    second, state = FORMS[form](*inputs.cut(split).arrays()[:-1], state)
    assert_close("outputs", mx.concatenate([first, second], axis=1), oracle, LARGEST, RMS)
    assert_close("state", state, last, LARGEST, RMS)


@of_form
@pytest.mark.parametrize("p", [1, 8, 21, 64])
def test_later_tokens_leave_earlier_outputs_bit_identical(form: str, p: int) -> None:
    inputs = case("typ", T=100)
    other = case("m1000", T=100, seed=1)
    tokens = zip(inputs[:-1], other[:-1], strict=True)
    changed = Inputs(*(np.concatenate([a[:, :p], b[:, p:]], 1) for a, b in tokens), inputs.state)
    before, _ = FORMS[form](*inputs.arrays())
    after, _ = FORMS[form](*changed.arrays())
    assert_same_bits("outputs", after[:, :p], before[:, :p])
    assert not np.array_equal(np.array(after[:, p:]), np.array(before[:, p:]))


@of_form
@pytest.mark.parametrize("T", [1, 15, 16, 50])
def test_inert_tokens_leave_the_state_bit_unchanged(form: str, T: int) -> None:
    inputs = case("large", T=T)
    inert = inputs._replace(log_alpha=0 * inputs.k, beta=0 * inputs.beta)
    _, state = FORMS[form](*inert.arrays())
    assert_same_bits("state", state, inputs.state)


@of_form
def test_inert_tokens_after_real_ones_leave_the_state_bit_unchanged(form: str) -> None:
    inputs = case("typ", T=64)
    real = (np.arange(64) < 37)[:, None]
    log_alpha = np.where(real[..., None], inputs.log_alpha, 0)
    padded = inputs._replace(log_alpha=log_alpha, beta=np.where(real, inputs.beta, 0))
    _, state = FORMS[form](*padded.arrays())
    _, shorter = FORMS[form](*padded.cut(0, 48).arrays())
    assert_same_bits("state", state, shorter)
    assert_close("state", state, recurrence(inputs.cut(0, 37))[1], LARGEST, RMS)


# ------------------------------------------------------------------- what stands before the rule
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("rate", [-8, 0, 4])
def test_the_forget_gate_is_the_published_formula(size: float, rate: int) -> None:
    rng = np.random.default_rng(0)
    f = (size * rng.standard_normal((2, 5, 3, 8))).astype(np.float32)
    A_log = (rate + rng.standard_normal(3)).astype(np.float32)
    dt_bias = rng.standard_normal((3, 8), np.float32)
    logs = -np.exp(A_log.astype(float))[:, None] * np.logaddexp(f + dt_bias.astype(float), 0)
    alpha = forget_gate(mx.array(f), mx.array(A_log), mx.array(dt_bias))
    assert alpha.dtype == mx.float32 and 0 <= alpha.min().item() and alpha.max().item() <= 1
    # eps is 6e-8; exp and log1p err by a few ulp, and exp turns its argument's error, at most
    # 80 * eps where the result is not 0, into a relative one.
    assert_close("alpha", alpha, np.exp(logs), 5e-6)


def test_the_forget_gate_names_a_gate_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        forget_gate(mx.zeros((1, 1, 1, 1)), mx.zeros((1,)), mx.zeros((1, 1)), "sigmoid")


@pytest.mark.parametrize("scale", [1.0, 128**-0.5])
def test_l2_norm_adds_1e_6_to_the_sum_of_squares(scale: float) -> None:
    sizes = np.array([0, 1e-6, 1e-4, 1, 1e3])[:, None]
    x = sizes * np.random.default_rng(0).standard_normal((5, 128))
    expected = scale * x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    ours = l2_normalised(mx.array(x.astype(np.float32)), scale)
    for row in range(len(sizes)):
        assert_close(f"{sizes[row]}", ours[row], expected[row], 1e-6)


def convolved(x: np.ndarray, weight: np.ndarray, before: np.ndarray) -> np.ndarray:
    """silu(sum_j weight[:, j] x[t - K + 1 + j]) in float64, for one row [T, C]."""
    window = np.concatenate([before, x]).astype(np.float64)
    K = weight.shape[1]
    y = np.stack([(window[t : t + K] * weight.T).sum(0) for t in range(len(x))])
    return y / (1 + np.exp(-y))


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("T", [1, 2, 5, 30])
def test_convolution_continues_over_unequal_rows(K: int, T: int) -> None:
    rng = np.random.default_rng(T)
    weight = rng.standard_normal((8, K)).astype(np.float32)
    taps = mx.array(weight.T)
    x, y = rng.standard_normal((2, 3, T, 8)).astype(np.float32)
    lengths = [T, 0, T // 2]
    nothing = mx.zeros((3, K - 1, 8))
    first, tail = short_convolution(mx.array(x), taps, nothing, mx.array(lengths))
    early, tail = short_convolution(mx.array(y[:, : T // 2]), taps, tail, None)
    late, _ = short_convolution(mx.array(y[:, T // 2 :]), taps, tail, None)
    second = mx.concatenate([early, late], axis=1)
    for row, n in enumerate(lengths):
        text = np.concatenate([x[row, :n], y[row]])
        expected = convolved(text, weight, np.zeros((K - 1, 8)))
        ours = np.concatenate([np.array(first[row, :n]), np.array(second[row])])
        assert_close(f"row {row}", ours, expected, 1e-6)
