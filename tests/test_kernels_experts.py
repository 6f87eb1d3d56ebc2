"""The expert kernels on the emulator, against float64, with no finding."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels.add_norm import add_norm_kernel
from mlx_kimi.metal_kernels.experts import (
    DOWN,
    GATE_UP,
    SwiGLUWeights,
    add_norm_scores,
    expert_combine,
    expert_mlp,
    expert_select,
    naive_expert_select,
    unsupported_reason,
)
from mlx_kimi.metal_kernels.kernel import use_backend
from mlx_kimi.metal_kernels.matrix import Matrix
from tests.assertions import assert_close, assert_same_bits, numbers
from tests.kernel_cases import FORMATS, exact, linter, matrix, on_the_emulator

pytestmark = on_the_emulator
# One rounding of the output and one of what stands between the two launches, on top of float32.
LARGEST = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1.2e-2}


def random_matrix(
    shape: tuple[int, ...], bits: int, group: int, dtype: mx.Dtype, mode: str = "affine"
) -> Matrix:
    return matrix(mx.random.normal(shape) * shape[-1] ** -0.5, bits, group, dtype, mode)


def gated(
    lead: tuple[int, ...], N: int, K: int, bits: int, group: int, dtype: mx.Dtype
) -> SwiGLUWeights:
    return SwiGLUWeights(
        random_matrix((*lead, N, K), bits, group, dtype),
        random_matrix((*lead, N, K), bits, group, dtype),
        random_matrix((*lead, K, N), bits, group, dtype),
    )


ROUTER = Matrix(mx.zeros((4, 64)))


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    g = gate @ x
    return down @ (g / (1 + np.exp(-g)) * (up @ x))


def oracle(x, experts, weights, routed: SwiGLUWeights, shared: SwiGLUWeights | None) -> np.ndarray:
    stacks = [exact(m) for m in (routed.gate, routed.up, routed.down)]
    rows = []
    for row, chosen, shares in zip(numbers(x), experts.tolist(), numbers(weights), strict=True):
        y = sum(
            w * swiglu(row, *(s[e] for s in stacks)) for e, w in zip(chosen, shares, strict=True)
        )
        if shared is not None:
            y = y + swiglu(row, *(exact(m) for m in (shared.gate, shared.up, shared.down)))
        rows.append(y)
    return np.array(rows)


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize(
    ("B", "K", "N", "shared_N", "bits", "shared_bits", "group"),
    [
        (1, 64, 32, 32, 4, 4, 32),
        (2, 320, 64, 128, 4, 8, 64),  # a row ends with idle lanes
        (1, 2304, 64, 64, 4, 4, 64),  # the 48B's hidden size: nine steps
        (1, 256, 128, 128, 4, 4, 128),
        (1, 128, 64, 64, 8, 0, 64),
        (3, 128, 128, 0, 0, 0, 64),
        (8, 64, 64, 64, 8, 4, 32),
    ],
)
def test_experts_equal_float64(B, K, N, shared_N, bits, shared_bits, group, dtype) -> None:
    mx.random.seed(B + K)
    routed = gated((5,), N, K, bits, group, dtype)
    shared = gated((), shared_N, K, shared_bits, group, dtype) if shared_N else None
    x = mx.random.normal((B, K)).astype(dtype)
    experts = mx.argsort(mx.random.uniform(shape=(B, 5)), axis=-1)[:, :3].astype(mx.int32)
    weights = mx.random.uniform(shape=(B, 3))
    assert unsupported_reason(ROUTER, routed, shared, 3) is None
    y = expert_mlp(x, experts, weights, routed, shared)
    assert y.dtype == dtype
    expected = oracle(x, experts, weights, routed, shared)
    assert_close("experts", y, expected, LARGEST[dtype])


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("mode, bits, group", FORMATS)
def test_experts_of_every_format_equal_float64(
    mode: str, bits: int, group: int, dtype: mx.Dtype
) -> None:
    """Gate as the format says, up and the shared expert's matrices in others."""
    mx.random.seed(bits)
    K, N = 384, 128
    how = (bits, group, dtype, mode)
    routed = SwiGLUWeights(
        random_matrix((5, N, K), *how),
        random_matrix((5, N, K), 4, 64, dtype),
        random_matrix((5, K, N), *how),
    )
    shared = SwiGLUWeights(
        random_matrix((N, K), 0, 64, dtype),
        random_matrix((N, K), *how),
        random_matrix((K, N), 3, 32, dtype),
    )
    x = mx.random.normal((2, K)).astype(dtype)
    experts = mx.array([[4, 0, 2], [1, 4, 3]], mx.int32)
    weights = mx.random.uniform(shape=(2, 3))
    assert unsupported_reason(ROUTER, routed, shared, 3) is None
    y = expert_mlp(x, experts, weights, routed, shared)
    assert_close("experts", y, oracle(x, experts, weights, routed, shared), LARGEST[dtype])


def scored(
    B: int, E: int, W: int, bits: int, dtype: mx.Dtype, group: int = 32, mode: str = "affine"
) -> tuple:
    """The arguments of add_norm_scores; a router is float32 in every folder."""
    mx.random.seed(E + W)
    x, part, weight = (mx.random.normal(s).astype(dtype) for s in ((B, W), (B, W), (W,)))
    return x, part, weight, 1e-5, random_matrix((E, W), bits, group, mx.float32, mode)


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize(
    ("B", "E", "W", "bits"),
    [(1, 256, 2304, 0), (3, 5, 72, 0), (2, 18, 320, 8), (8, 16, 64, 4), (1, 2, 7168, 0)],
)
def test_scores_are_float32_whatever_the_dtype(B, E, W, bits, dtype) -> None:
    x, part, weight, eps, gate = scored(B, E, W, bits, dtype)
    total, normed, logits = add_norm_scores(x, part, weight, eps, gate)
    expected = add_norm_kernel(x, part, weight, eps)
    assert_same_bits("sum", total.astype(mx.float32), expected[0].astype(mx.float32))
    assert_close("normed", normed, expected[1], LARGEST[dtype])
    assert logits.dtype == mx.float32
    assert_close("logits", logits, numbers(normed) @ exact(gate).T, 2e-5, 5e-6)


@pytest.mark.parametrize("mode, bits, group", FORMATS)
def test_routers_of_every_format_score(mode: str, bits: int, group: int) -> None:
    x, part, weight, eps, gate = scored(2, 7, 384, bits, mx.bfloat16, group, mode)
    _, normed, logits = add_norm_scores(x, part, weight, eps, gate)
    assert_close("logits", logits, numbers(normed) @ exact(gate).T, 2e-5, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_metal_would_take_the_text_of_the_scores(bits: int) -> None:
    for dtype in LARGEST:
        with use_backend(linter(large={"gate", "gate_scales", "gate_biases"})):
            add_norm_scores(*scored(1, 6, 64, bits, dtype))


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize(("N", "k", "W", "shared"), [(1, 8, 2304, True), (5, 2, 36, False)])
def test_outputs_are_combined_in_float32(N, k, W, shared, dtype) -> None:
    mx.random.seed(W)
    y = mx.random.normal((N * k, W)).astype(dtype)
    places = mx.argsort(mx.random.uniform(shape=(N * k,))).reshape(N, k)
    weights = mx.random.uniform(shape=(N, k))
    beside = mx.random.normal((N, W)).astype(dtype) if shared else None
    expected = (numbers(y)[np.array(places)] * numbers(weights)[..., None]).sum(1)
    expected = expected + numbers(beside) if beside is not None else expected
    combined = expert_combine(y, places, weights, beside)
    assert combined.dtype == dtype
    assert_close("combined", combined, expected, LARGEST[dtype] / 2)
    with use_backend(None):  # (which rounds before the shared expert is added)
        assert_close("ops", expert_combine(y, places, weights, beside), expected, LARGEST[dtype])


@pytest.mark.slow
def test_metal_would_take_the_text_of_the_combination() -> None:
    for dtype in LARGEST:
        y, weights = mx.zeros((4, 16), dtype), mx.ones((2, 2))
        with use_backend(linter(large={"y", "shared"})):
            expert_combine(y, mx.zeros((2, 2), mx.int32), weights, y[:2])


# Only the choice and its weights can have fewer than 8 elements: B * TopK.
ALWAYS_LARGE = {*GATE_UP.inputs, *DOWN.inputs} - {"experts", "weights"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_metal_would_take_the_text(dtype: mx.Dtype, bits: int) -> None:
    routed = gated((5,), 32, 64, bits, 32, dtype)
    shared = gated((), 32, 64, 4, 32, dtype)
    x, experts, weights = mx.ones((1, 64), dtype), mx.zeros((1, 3), mx.int32), mx.ones((1, 3))
    with use_backend(linter(large=ALWAYS_LARGE)):
        expert_mlp(x, experts, weights, routed, shared)
        expert_mlp(x, experts, weights, routed, None)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 4])
def test_metal_would_take_the_text_of_the_choice(groups: int) -> None:
    with use_backend(linter()):
        expert_select(mx.zeros((1, 16)), mx.zeros((16,)), 2, groups, 1, True, 1.0)


@pytest.mark.parametrize(
    ("B", "E", "top_k", "groups", "best", "renormalize"),
    [
        (1, 256, 8, 1, 1, True),
        (3, 16, 4, 4, 2, False),
        (2, 6, 3, 1, 1, True),
        (2, 64, 6, 8, 3, True),
        (1, 33, 1, 1, 1, True),
    ],
)
def test_the_choice_is_that_of_the_ops_form(B, E, top_k, groups, best, renormalize) -> None:
    mx.random.seed(E)
    logits, bias = mx.random.normal((B, E)), mx.random.normal((E,)) * 0.05
    how = (top_k, groups, best, renormalize, 2.446)
    experts, weights = expert_select(logits, bias, *how)
    expected_experts, expected_weights = naive_expert_select(logits, bias, *how)
    assert experts.tolist() == expected_experts.tolist()
    assert_close("weights", weights, expected_weights, 1e-6)


def test_of_equal_scores_the_first_expert_is_chosen() -> None:
    experts, _ = expert_select(mx.zeros((1, 70)), mx.zeros((70,)), 3, 1, 1, True, 1.0)
    assert experts.tolist() == [[0, 1, 2]]


def test_what_is_outside_the_domain_is_named() -> None:
    routed = gated((4,), 32, 64, 4, 32, mx.float32)
    gate = routed.gate._replace(bits=7)
    other = SwiGLUWeights(gate, routed.up, routed.down)
    assert "gate has 7 bits, not among" in str(unsupported_reason(ROUTER, other, None, 2))
    odd = SwiGLUWeights(random_matrix((4, 30, 64), 4, 32, mx.float32), routed.up, routed.down)
    assert "multiple of 4 rows" in str(unsupported_reason(ROUTER, odd, None, 2))
    assert unsupported_reason(ROUTER, routed, None, 16) == "16 experts a token are more than 15"
    assert unsupported_reason(ROUTER, routed, None, 15) is None
    assert "wider than 7168" in str(
        unsupported_reason(Matrix(mx.zeros((4, 7200))), routed, None, 2)
    )
    narrow = Matrix(mx.zeros((4, 60)))
    assert "router is no multiple" in str(unsupported_reason(narrow, routed, None, 2))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("numbers", [0, 1, 2, 20, 39])
def test_experts_exist_however_many_logits_are_not_numbers(numbers: int, groups: int) -> None:
    """An expert beyond the last would be read from foreign memory: the emulator would say so."""
    rng = np.random.default_rng(numbers)
    logits = np.full((2, 40), np.nan, np.float32)
    for row in logits:
        row[rng.choice(40, numbers, replace=False)] = rng.standard_normal(numbers)
    routed = gated((40,), 32, 32, 4, 32, mx.float32)
    experts, weights = expert_select(mx.array(logits), mx.zeros((40,)), 3, groups, 2, True, 1.0)
    y = expert_mlp(mx.ones((2, 32)), experts, weights, routed, None)
    ids = np.array(experts)
    assert ids.min() >= 0 and ids.max() < 40 and y.shape == (2, 32)
