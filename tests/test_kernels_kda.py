"""The delta rule's kernels on the emulator: float64 recurrence -> each kernel, with no finding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels import kda_chunk, kda_sequential
from mlx_kimi.metal_kernels.kda import chosen_implementation, kda
from mlx_kimi.metal_kernels.kda_chunk import CHUNK, kda_chunk_kernel
from mlx_kimi.metal_kernels.kda_sequential import kda_sequential_kernel
from mlx_kimi.metal_kernels.kernel import NO_BACKEND, use_backend
from mlx_kimi.metal_kernels.tuning import default_tuning, use_tuning
from tests.assertions import assert_close, assert_same_bits
from tests.kda_cases import GATES, Inputs, case, recurrence
from tests.kernel_cases import linter, on_the_emulator

pytestmark = on_the_emulator


class Form(NamedTuple):
    run: Callable[..., tuple[mx.array, mx.array]]
    largest: float
    rms: float


# float32: as in test_kda. float16 staging: rounding the staged operands errs by 1.1e-3 rms where
# keys repeat and nothing is forgotten, by 2e-4 elsewhere; the rest is margin.
FORMS = {
    "sequential": Form(kda_sequential_kernel, 2e-5, 5e-6),
    "chunk": Form(lambda *x: kda_chunk_kernel(*x, stage=mx.float32), 2e-5, 5e-6),
    "chunk16": Form(lambda *x: kda_chunk_kernel(*x, stage=mx.float16), 8e-3, 4e-3),
}
KERNELS = (kda_sequential.KERNEL, kda_chunk.GRAM, kda_chunk.SCAN)
ALWAYS_LARGE = {name for kernel in KERNELS for name in kernel.inputs} - {"beta"}
of_form = pytest.mark.parametrize("form", FORMS)
of_chunks = pytest.mark.parametrize("form", ["chunk", "chunk16"])


def assert_is_recurrence(form: str, inputs: Inputs) -> None:
    run, largest, rms = FORMS[form]
    o, state = run(*inputs.arrays())
    oracle, last = recurrence(inputs)
    assert o.dtype == state.dtype == mx.float32
    assert_close("state", state, last, largest, rms)
    assert_close("output", o, oracle, largest, rms)


@of_form
@pytest.mark.parametrize("gates", GATES)
def test_equals_the_recurrence_at_gates_of_every_strength(form: str, gates: str) -> None:
    assert_is_recurrence(form, case(gates, T=50, H=1))


@of_form
@pytest.mark.parametrize("gates", ["idn", "repeated"])
@pytest.mark.parametrize("T", [16, 17, 64])
def test_equals_the_recurrence_where_keys_are_identical(form: str, gates: str, T: int) -> None:
    assert_is_recurrence(form, case(gates, T=T, H=1))


@of_form
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 31, 33, 65])
def test_equals_the_recurrence_at_every_length(form: str, T: int) -> None:
    assert_is_recurrence(form, case("swch", T=T, H=1))


@of_form
@pytest.mark.parametrize(
    "B, H, Dk, Dv", [(2, 3, 64, 64), (3, 1, 64, 128), (1, 2, 128, 64), (1, 1, 128, 128)]
)
def test_equals_the_recurrence_at_every_shape(form: str, B: int, H: int, Dk: int, Dv: int) -> None:
    assert_is_recurrence(form, case("typ", B=B, T=18, H=H, Dk=Dk, Dv=Dv))


@pytest.mark.parametrize("Dk, Dv", [(32, 32), (32, 128), (64, 32)])
def test_the_sequential_kernel_takes_small_heads(Dk: int, Dv: int) -> None:
    assert_is_recurrence("sequential", case("typ", B=2, T=5, H=2, Dk=Dk, Dv=Dv))


@of_form
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_takes_inputs_of_16_bits(form: str, dtype: mx.Dtype) -> None:
    inputs = case("typ", T=20, H=2)
    rounded = [mx.array(x).astype(dtype) for x in inputs[:3]]
    o, state = FORMS[form].run(*rounded, *inputs.arrays()[3:])
    exact = Inputs(*(np.array(x.astype(mx.float32)) for x in rounded), *inputs[3:])
    oracle, last = recurrence(exact)
    assert_close("output", o, oracle, *FORMS[form][1:])
    assert_close("state", state, last, *FORMS[form][1:])


def test_the_chunk_kernel_stages_as_finely_as_its_values() -> None:
    inputs = case("typ", T=20, H=1).arrays()
    assert_same_bits("float32", kda_chunk_kernel(*inputs)[0], FORMS["chunk"].run(*inputs)[0])
    inputs[2] = inputs[2].astype(mx.float16).astype(mx.float32)
    coarse = FORMS["chunk16"].run(*inputs)[0]
    inputs[2] = inputs[2].astype(mx.float16)
    assert_same_bits("float16", kda_chunk_kernel(*inputs)[0], coarse)


@pytest.mark.slow
@of_form
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_every_version_of_metal_takes_the_text(form: str, dtype: mx.Dtype, D: int) -> None:
    inputs = case("typ", T=2, H=1, Dk=D).arrays()
    with use_backend(linter(large=ALWAYS_LARGE)):
        FORMS[form].run(*(x.astype(dtype) for x in inputs[:3]), *inputs[3:])


# --------------------------------------------------------------------------------- what is exact
@of_form
@pytest.mark.parametrize("gates", ["typ", "logu", "idn"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_two_calls_split_at_a_chunk_are_one_call(form: str, gates: str, chunks: int) -> None:
    assert_splits(form, case(gates, T=50, H=1), chunks * CHUNK)


@pytest.mark.parametrize("split", [1, 7, 19])
def test_two_sequential_calls_are_one_call_wherever_they_split(split: int) -> None:
    assert_splits("sequential", case("swch", T=20, H=1), split)


def assert_splits(form: str, inputs: Inputs, split: int) -> None:
    run = FORMS[form].run
    whole, last = run(*inputs.arrays())
    first, state = run(*inputs.cut(0, split).arrays())
    second, state = run(*inputs.cut(split).arrays()[:-1], state)
    assert_same_bits("outputs", mx.concatenate([first, second], axis=1), whole)
    assert_same_bits("state", state, last)


@pytest.mark.parametrize("B", [1, 2])
def test_segments_do_not_show(B: int) -> None:
    inputs = case("swch", B=B, T=70, H=1).arrays()
    o, state = kda_chunk_kernel(*inputs, segment=32)
    whole, last = kda_chunk_kernel(*inputs)
    assert_same_bits("outputs", o, whole)
    assert_same_bits("state", state, last)


def test_the_columns_of_a_simdgroup_do_not_show() -> None:
    inputs = case("swch", T=20, H=1).arrays()
    whole, last = kda_chunk_kernel(*inputs)
    with use_tuning(default_tuning()._replace(columns=16)):
        o, state = kda_chunk_kernel(*inputs)
    assert_same_bits("outputs", o, whole)
    assert_same_bits("state", state, last)


@of_form
def test_takes_views_of_larger_arrays(form: str) -> None:
    inputs = case("swch", B=2, T=18, H=1).arrays()
    views = [mx.repeat(x, 2, axis=1)[:, ::2] for x in inputs[:5]]
    for ours, plain in zip(
        FORMS[form].run(*views, inputs[5]), FORMS[form].run(*inputs), strict=True
    ):
        assert_same_bits("result", ours, plain)


@of_form
@pytest.mark.parametrize("p", [1, 8, 21, 32])
def test_later_tokens_leave_earlier_outputs_bit_identical(form: str, p: int) -> None:
    inputs, other = case("typ", T=40, H=1), case("m1000", T=40, H=1, seed=1)
    tokens = zip(inputs[:-1], other[:-1], strict=True)
    changed = Inputs(*(np.concatenate([a[:, :p], b[:, p:]], 1) for a, b in tokens), inputs.state)
    before, _ = FORMS[form].run(*inputs.arrays())
    after, _ = FORMS[form].run(*changed.arrays())
    assert_same_bits("outputs", after[:, :p], before[:, :p])
    assert not np.array_equal(np.array(after[:, p:]), np.array(before[:, p:]))


@of_form
@pytest.mark.parametrize("T", [1, 15, 16, 50])
def test_inert_tokens_leave_the_state_bit_unchanged(form: str, T: int) -> None:
    inputs = case("large", T=T, H=1)
    inert = inputs._replace(log_alpha=0 * inputs.k, beta=0 * inputs.beta)
    _, state = FORMS[form].run(*inert.arrays())
    assert_same_bits("state", state, inputs.state)


@of_form
@pytest.mark.parametrize("real", [1, 16, 37])
def test_inert_tokens_after_real_ones_change_nothing(form: str, real: int) -> None:
    inputs = case("typ", T=53, H=1)
    inputs.log_alpha[:, real:] = inputs.beta[:, real:] = 0
    o, state = FORMS[form].run(*inputs.arrays())
    shorter, last = FORMS[form].run(*inputs.cut(0, real).arrays())
    assert_same_bits("outputs", o[:, :real], shorter)
    assert_same_bits("state", state, last)


# ------------------------------------------------------------------------------------ the choice
@pytest.mark.parametrize(
    "T, Dk, Dv, name",
    [
        (1, 128, 128, "naive_kda"),
        (2, 128, 128, "kda_sequential_kernel"),
        (31, 32, 32, "kda_sequential_kernel"),
        (31, 48, 64, "kda_chunk"),
        (32, 64, 128, "kda_chunk_kernel"),
        (32, 32, 32, "kda_chunk"),
    ],
)
def test_chooses_by_the_number_of_tokens_and_the_domain(
    T: int, Dk: int, Dv: int, name: str
) -> None:
    form = chosen_implementation(T, Dk, Dv)
    assert form.name == name and form.why


def test_chooses_operations_where_nothing_runs_kernels() -> None:
    with use_backend(None):
        chosen = [chosen_implementation(T, 128, 128) for T in (2, 32)]
    assert [(form.name, form.why) for form in chosen] == [("kda_chunk", NO_BACKEND)] * 2


@pytest.mark.parametrize("T", [1, 5, 40])
def test_the_chosen_form_equals_the_recurrence(T: int) -> None:
    inputs = case("swch", T=T, H=1)
    o, state = kda(*inputs.arrays())
    oracle, last = recurrence(inputs)
    assert_close("output", o, oracle, *FORMS["chunk"][1:])
    assert_close("state", state, last, *FORMS["chunk"][1:])


@pytest.mark.parametrize("module", [kda_sequential, kda_chunk])
def test_a_kernel_says_which_heads_it_does_not_take(module: Any) -> None:
    assert module.unsupported_reason(128, 64) is None
    assert "Dv = 48" in module.unsupported_reason(64, 48)
