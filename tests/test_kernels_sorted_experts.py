"""The experts of many tokens on the emulator, against float64, with no finding."""

from math import ceil

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels import sorted_experts as sorted_
from mlx_kimi.metal_kernels.experts import SwiGLUWeights
from mlx_kimi.metal_kernels.kernel import use_backend
from mlx_kimi.metal_kernels.matrix import Matrix
from mlx_kimi.metal_kernels.sorted_experts import (
    TILES_DOWN,
    TILES_GATE_UP,
    ManyTokens,
    expert_order,
    naive_expert_order,
    naive_sorted_down,
    naive_sorted_gate_up,
    sorted_down,
    sorted_experts,
    sorted_gate_up,
    stored_alike,
    unsupported_reason,
)
from mlx_kimi.metal_kernels.tuning import BASE, NVIDIA, ExpertForm
from tests.assertions import assert_close, assert_same_bits, numbers
from tests.kernel_cases import DTYPES, FORMATS, emulator, exact, linter, on_the_emulator
from tests.test_kernels_experts import gated, random_matrix

pytestmark = on_the_emulator
# One rounding to 16 bits: of the largest, half a unit in the last place; as rms less than a third
# of a unit. Or sums of float32.
LARGEST = {mx.float32: 2e-5, mx.float16: 2**-11, mx.bfloat16: 2**-8}
RMS = {mx.float32: 5e-6, mx.float16: 3e-4, mx.bfloat16: 2.4e-3}
VECTORS = ExpertForm(0, "vectors")
FORMS = (VECTORS, *(ExpertForm(0, "tiles", tiles) for tiles in (1, 2, 4)))
COUNTS = (0, 1, 7, 8, 9, 31, 32, 33)  # pairs of an expert


def pairs(counts: tuple[int, ...], top_k: int) -> mx.array:
    """[T, k] int32 that name expert e counts[e] times, in no order."""
    ids = np.repeat(np.arange(len(counts)), counts)
    ids = np.random.default_rng(len(ids)).permutation(ids)
    return mx.array(ids.reshape(-1, top_k).astype(np.int32))


def check(
    x: mx.array,
    experts: mx.array,
    routed: SwiGLUWeights,
    form: ExpertForm,
    shared: SwiGLUWeights | None = None,
) -> None:
    """Both products within one rounding of float64."""
    E, k, T, dtype = routed.gate.weight.shape[0], experts.shape[1], len(x), x.dtype
    order, _, starts = expert_order(experts, E)
    h = sorted_gate_up(x, order, starts, k, routed, shared, form)
    y = sorted_down(h, starts, T, routed, shared, form)
    assert h.dtype == dtype and y.dtype == dtype
    gate, up, down = (list(exact(m)) for m in (routed.gate, routed.up, routed.down))
    ids, rows = np.array(experts).reshape(-1)[np.array(order)], np.array(order) // k
    if shared is not None:  # as one more expert, whom every token chose
        for stack, matrix in zip(
            (gate, up, down), (shared.gate, shared.up, shared.down), strict=True
        ):
            stack.append(exact(matrix))
        ids, rows = np.append(ids, [E] * T), np.append(rows, np.arange(T))
    expected = []
    for expert, row in zip(ids, numbers(x)[rows], strict=True):
        g, u = gate[expert] @ row, up[expert] @ row
        expected.append(g / (1 + np.exp(-g)) * u)
    assert_close("h", h, np.array(expected), LARGEST[dtype], RMS[dtype])
    expected = [down[expert] @ row for expert, row in zip(ids, numbers(h), strict=True)]
    assert_close("y", y, np.array(expected), LARGEST[dtype], RMS[dtype])


@pytest.mark.parametrize("T, k, E", [(9, 1, 1), (1, 3, 5), (31, 8, 33), (65, 8, 256), (170, 3, 7)])
def test_pairs_are_sorted_by_expert(T: int, k: int, E: int) -> None:
    experts = mx.random.randint(0, E, (T, k), key=mx.random.key(T)).astype(mx.int32)
    for ours, naive in zip(expert_order(experts, E), naive_expert_order(experts, E), strict=True):
        assert ours.dtype == mx.int32
        assert ours.tolist() == naive.tolist()


@pytest.mark.parametrize(
    "form, skip",
    [(VECTORS, True), *((form, skip) for form in FORMS[1:] for skip in (True, False))],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_equal_float64(
    dtype: mx.Dtype, form: ExpertForm, skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorted_, "tuning", lambda: BASE._replace(skip_tiles=skip))
    experts = pairs(COUNTS, 1)
    routed = gated((len(COUNTS),), 64, 192, 4, 64, dtype)
    x = mx.random.normal((len(experts), 192), key=mx.random.key(form.tiles)).astype(dtype)
    check(x, experts, routed, form)


@pytest.mark.parametrize("T", [1, 8, 33, 60])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_shared_expert_stands_behind_the_routed_ones(form: ExpertForm, T: int) -> None:
    routed, shared = (gated(lead, 64, 128, 4, 64, mx.float32) for lead in ((3,), ()))
    assert stored_alike(routed, shared)
    experts = mx.random.randint(0, 3, (T, 2)).astype(mx.int32)
    check(mx.random.normal((T, 128)), experts, routed, form, shared)


def test_a_shared_expert_that_is_stored_otherwise_is_computed_apart() -> None:
    routed, alike = (gated(lead, 64, 128, 4, 64, mx.float32) for lead in ((3,), ()))
    assert ManyTokens(routed, alike, 3).has_shared(100, 2)
    assert not ManyTokens(routed, None, 3).has_shared(100, 2)
    for N, bits, group in ((128, 4, 64), (64, 8, 64), (64, 4, 32), (64, 0, 64)):
        shared = gated((), N, 128, bits, group, mx.float32)
        assert not ManyTokens(routed, shared, 3).has_shared(100, 2)
    one = SwiGLUWeights(alike.gate, alike.up, gated((), 64, 128, 8, 64, mx.float32).down)
    assert not ManyTokens(routed, one, 3).has_shared(100, 2)


@pytest.mark.parametrize(
    "counts, k",
    [
        ((0, 0, 70, 0), 2),  # one expert has every pair
        ((3,), 1),  # there is no other
        ((1,) * 33, 3),  # more experts than lanes
        ((9,), 3),  # (a token chooses an expert once; nothing here needs it)
    ],
)
def test_pairs_may_be_spread_in_any_way(counts: tuple[int, ...], k: int) -> None:
    experts = pairs(counts, k)
    routed = gated((len(counts),), 128, 64, 8, 32, mx.float32)
    for form in (VECTORS, FORMS[-1]):
        check(mx.random.normal((len(experts), 64)), experts, routed, form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode, bits, group", [*FORMATS, ("affine", 0, 64), ("affine", 4, 128)])
def test_every_stored_format_equals_float64(
    mode: str, bits: int, group: int, dtype: mx.Dtype
) -> None:
    """Gate as the format says, up in another."""
    K, N = 384, 128
    how = (bits, group, dtype, mode)
    up = random_matrix((3, N, K), 4 if bits != 4 else 0, 64, dtype)
    routed = SwiGLUWeights(random_matrix((3, N, K), *how), up, random_matrix((3, K, N), *how))
    experts = pairs((9, 4, 5), 2)
    for form in (VECTORS, FORMS[2]):
        check(mx.random.normal((len(experts), K)).astype(dtype), experts, routed, form)


@pytest.mark.parametrize("form", [VECTORS, FORMS[1], FORMS[3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_alone_and_among_others(
    dtype: mx.Dtype, form: ExpertForm
) -> None:
    """In any place, in any tile, and of any tile's size: its sums have one order."""
    routed = gated((3,), 64, 128, 4, 32, dtype)
    x = mx.random.normal((60, 128)).astype(dtype)
    experts = mx.random.randint(0, 3, (60, 2)).astype(mx.int32)

    def outputs(rows: list[int], form: ExpertForm) -> mx.array:
        y, places = sorted_experts(x[mx.array(rows)], experts[mx.array(rows)], routed, None, form)
        return y[places].astype(mx.float32)

    everyone = list(range(60))
    among = outputs(everyone, form)
    assert_same_bits("twice", outputs(everyone, form), among)
    if form.tiles:
        assert_same_bits("another tile", outputs(everyone, FORMS[2]), among)
    assert_same_bits("reversed", outputs(everyone[::-1], form)[::-1], among)
    for row in (0, 17, 59):
        assert_same_bits("alone", outputs([row], form)[0], among[row])


@pytest.mark.parametrize("k", [1, 4])
def test_the_naive_twins_say_the_same(k: int) -> None:
    routed = gated((5,), 64, 64, 4, 32, mx.float32)
    shared = gated((), 64, 64, 4, 32, mx.float32) if k == 4 else None
    x = mx.random.normal((20, 64))
    experts = mx.random.randint(0, 5, (20, k)).astype(mx.int32)
    order, _, starts = naive_expert_order(experts, 5)
    h = naive_sorted_gate_up(x, order, starts, k, routed, shared)
    y = naive_sorted_down(h, starts, 20, routed, shared)
    for form in FORMS:
        ours = sorted_gate_up(x, order, starts, k, routed, shared, form)
        assert_close("h", ours, h, 2e-5, 5e-6)
        ours = sorted_down(h, starts, 20, routed, shared, form)
        assert_close("y", ours, y, 2e-5, 5e-6)


@pytest.mark.parametrize("counts", [COUNTS, (5, 40, 1, 0, 2)])
def test_only_tiles_that_have_tokens_are_multiplied(counts: tuple[int, ...]) -> None:
    """The products of 8 x 8 x 8 are those of ceil(pairs / 8) tiles of each expert, and no more."""
    K, N, E = 128, 64, len(counts)
    routed, experts = gated((E,), N, K, 4, 32, mx.float32), pairs(counts, 1)
    order, _, starts = expert_order(experts, E)
    x = mx.random.normal((len(experts), K))
    h = sorted_gate_up(x, order, starts, 1, routed, None, FORMS[3])
    sorted_down(h, starts, len(x), routed, None, FORMS[3])
    found = [emulator(kernel).counts["matrix_products"] for kernel in (TILES_GATE_UP, TILES_DOWN)]
    tokens = sum(8 * ceil(count / 8) for count in counts)
    # (The emulator runs a launch in three schedules and counts one.)
    assert found == [tokens * 2 * K * N // 512, tokens * K * N // 512]


def test_the_form_follows_from_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    many = ManyTokens(gated((32,), 64, 64, 4, 32, mx.float32), None, 32)
    for tuning in (BASE, NVIDIA):
        assert tuning.experts[0].pairs_from == 0
        assert sorted(tuning.experts) == list(tuning.experts)
    forms = (ExpertForm(0, "tiles", 1), ExpertForm(4, "MLX"))
    monkeypatch.setattr(sorted_, "tuning", lambda: BASE._replace(experts=forms))
    assert many.first_tokens(8) == [9, 16]
    assert many.form(15, 8) == forms[0]
    assert many.form(16, 8) == forms[1]
    assert many.unsupported_reason(9, 8) is None
    assert many.unsupported_reason(16, 8) == "MLX's product is faster on this GPU"
    assert many.unsupported_reason(8, 8) == "8 tokens are not more than 8"


def test_two_tiles_are_most_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the review's estimate four would take more registers than an M1 has."""
    forms = (ExpertForm(0, "tiles", 4),)
    monkeypatch.setattr(sorted_, "tuning", lambda: BASE._replace(experts=forms))
    for bits in (0, 4):
        for dtype, most in ((mx.float32, 2), (mx.bfloat16, 4)):
            many = ManyTokens(gated((2,), 64, 64, bits, 32, dtype), None, 2)
            assert many.form(9, 1).tiles == most


def test_each_number_of_tokens_has_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few experts the second form may begin below 9 tokens."""
    monkeypatch.setattr(sorted_, "tuning", lambda: BASE)
    routed = gated((4,), 64, 64, 4, 32, mx.float32)
    for E, k in ((4, 2), (8, 8), (2, 1), (256, 8)):
        many = ManyTokens(routed, None, E)
        found = [tokens for tokens, _, _ in many.implementations(k)]
        few, more = ["9 tokens or more"], ["9 to 105 tokens", "106 tokens or more"]
        assert found == (more if E == 256 else few)


@pytest.mark.parametrize("form", [VECTORS, FORMS[3]], ids=str)
def test_the_shared_expert_is_added_wherever_it_is_computed(
    form: ExpertForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed, shared = (gated(lead, 64, 64, 4, 32, mx.float32) for lead in ((3,), ()))
    x, weights = mx.random.normal((20, 64)), mx.random.uniform(shape=(20, 2))
    experts = mx.random.randint(0, 3, (20, 2)).astype(mx.int32)
    many, outputs = ManyTokens(routed, shared, 3), []
    for together in (True, False):
        forms = (form._replace(shared=together),)
        monkeypatch.setattr(sorted_, "tuning", lambda forms=forms: BASE._replace(experts=forms))
        assert many.has_shared(20, 2) == together
        apart = None if together else many.shared_alone(x, 2)
        outputs.append(many(x, experts, weights, apart))
    assert_same_bits("y", *outputs)
    without = many(x, experts, weights, None)
    assert mx.abs(outputs[0] - without).max().item() > 0.1


def test_what_is_outside_the_domain_is_named() -> None:
    routed = gated((4,), 64, 128, 4, 32, mx.float32)
    assert unsupported_reason(routed) is None
    bits = routed.up._replace(bits=7)
    assert "up has 7 bits" in str(unsupported_reason(SwiGLUWeights(routed.gate, bits, routed.down)))
    odd = SwiGLUWeights(*[Matrix(mx.zeros((4, 96, 64)))] * 3)
    assert unsupported_reason(odd) == (
        "gate has 96 rows and 64 columns, which are not both multiples of 64"
    )
    with use_backend(None):
        assert ManyTokens(routed, None, 4).unsupported_reason(9, 2) == "nothing runs kernels here"


ALWAYS_LARGE = {*TILES_GATE_UP.inputs, *TILES_DOWN.inputs} - {"starts"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_metal_would_take_the_text(dtype: mx.Dtype, bits: int) -> None:
    routed, shared = (gated(lead, 64, 64, bits, 32, dtype) for lead in ((5,), ()))
    x = mx.ones((9, 64), dtype)
    experts = mx.zeros((9, 2), mx.int32)
    with use_backend(linter(large=ALWAYS_LARGE)):
        for form in FORMS:
            sorted_experts(x, experts, routed, shared, form)
