"""Many tokens' attention to a block of columns: float64 -> naive_mla_prefill -> mla_prefill."""

from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels.attention import merge_attention
from mlx_kimi.metal_kernels.kernel import use_backend
from mlx_kimi.metal_kernels.mla_prefill import (
    KERNEL,
    Expanded,
    mla_prefill,
    naive_mla_prefill,
    unsupported_reason,
)
from mlx_kimi.metal_kernels.tuning import BASE, NVIDIA, PrefillShape
from tests.assertions import assert_close, assert_same_bits, numbers
from tests.kernel_cases import assert_all_close, emulator, linter, on_the_emulator

pytestmark = on_the_emulator
# Float32 against float64: sums of up to a hundred products, and exp of their scores.
LARGEST, RMS = 2e-5, 5e-6
SHAPES = [BASE.prefill, NVIDIA.prefill, PrefillShape(24, 8)]
of_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Sizes(NamedTuple):
    H: int = 2
    nope: int = 32
    shared: int = 32
    v: int = 32
    lora: int = 8


class Case(Expanded):
    def run(
        self, shape: PrefillShape | None = None, dtype: mx.Dtype | None = None
    ) -> tuple[mx.array, mx.array]:
        return mla_prefill(self, dtype or self.x.dtype, shape)

    def naive(self) -> tuple[mx.array, mx.array]:
        return naive_mla_prefill(self, self.x.dtype)

    def columns(self, start: int, stop: int) -> "Case":
        """With these columns alone."""
        cut = slice(start, stop)
        return self._replace(
            keys=self.keys[:, :, cut],
            latents=self.latents[:, cut],
            values=self.values[:, :, cut],
            offset=self.offset - start,
        )


def case(
    T: int = 20,
    S: int = 20,
    offset: int | None = None,
    B: int = 1,
    sizes: Sizes | None = None,
    dtype: mx.Dtype = mx.float32,
    spread: float = 1.0,
) -> Case:
    """At random; `spread` is about the standard deviation of the scores."""
    H, nope, shared, v, lora = sizes or Sizes()
    rng = np.random.default_rng([T, S, B, H, nope, shared, v])
    shapes = [
        (B, T, H * (nope + shared) + lora + shared),
        (B, H, S, nope),
        (B, S, lora + shared),
        (B, H, S, v),
    ]
    arrays = [mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
    offset = S - T if offset is None else offset
    return Case(*(x.astype(dtype) for x in arrays), spread * (nope + shared) ** -0.5, offset)


def oracle(given: Case) -> tuple[np.ndarray, np.ndarray]:
    """In float64, from the definition."""
    x, keys, latents, values = (numbers(a) for a in given[:4])
    B, T, _ = x.shape
    _, H, S, nope = keys.shape
    shared = (x.shape[-1] - latents.shape[-1]) // H - nope
    q = x[..., : H * (nope + shared)].reshape(B, T, H, -1)
    scores = np.einsum("bthd,bhsd->bths", q[..., :nope], keys)
    scores += np.einsum("bthd,bsd->bths", q[..., nope:], latents[..., -shared:])
    seen = np.arange(S) <= np.arange(T)[:, None] + given.offset
    scores = np.where(seen[:, None], given.scale * scores, -np.inf)
    highest = np.maximum(scores.max(-1, keepdims=True), -1e30)
    shares = np.exp(scores - highest)
    total = np.maximum(shares.sum(-1, keepdims=True), 1e-30)
    outputs = np.einsum("bths,bhsv->bthv", shares / total, values)
    return outputs, (highest + np.log(total))[..., 0]


def assert_is_oracle(
    given: Case, shape: PrefillShape | None = None, largest: float = LARGEST, rms: float = RMS
) -> None:
    outputs, lse = given.run(shape)
    expected, expected_lse = oracle(given)
    assert_all_close(given.x.dtype, largest, rms, outputs=(outputs, expected))
    assert_all_close(mx.float32, largest, lse=(lse, expected_lse))


# ------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("T, offset", [(1, 19), (20, 0), (20, -7), (5, 40)])
def test_the_naive_form_equals_the_definition(T: int, offset: int) -> None:
    given = case(T, 20, offset, B=2)
    for found, expected in zip(given.naive(), oracle(given), strict=True):
        assert_close("naive", found, expected, LARGEST)


@of_shape
@pytest.mark.parametrize("T", [1, 7, 8, 9, 17, 70])
@pytest.mark.parametrize("past", [0, 5, 40])
def test_equals_the_definition_at_every_length(shape: PrefillShape, T: int, past: int) -> None:
    assert_is_oracle(case(T, past + T), shape)


@of_shape
@pytest.mark.parametrize("S", [1, 8, 15, 33])
@pytest.mark.parametrize("offset", [-30, -9, -1, 0, 3, 100])
def test_a_token_sees_the_columns_up_to_its_own(shape: PrefillShape, S: int, offset: int) -> None:
    """Blocks before and among the tokens; none of them sees one of the first kind."""
    assert_is_oracle(case(20, S, offset), shape)


@of_shape
@pytest.mark.parametrize("offset", range(-3, 33))
def test_no_token_sees_the_next_wherever_blocks_end(shape: PrefillShape, offset: int) -> None:
    assert_is_oracle(case(20, 60, offset), shape)


@of_shape
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(3, 64, 32, 96, 16),
        Sizes(1, 32, 64, 32, 0),
        Sizes(4, 64, 64, 64, 128),  # the pocket model's
        Sizes(1, 128, 64, 128, 512),  # a head of the 48B
    ],
    ids=str,
)
@pytest.mark.parametrize("B", [1, 2])
def test_equals_the_definition_at_every_shape(shape: PrefillShape, sizes: Sizes, B: int) -> None:
    assert_is_oracle(case(11, 30, B=B, sizes=sizes), shape)


@of_shape
@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_large_scores_do_not_overflow(shape: PrefillShape, direction: int) -> None:
    given = case(12, 40)
    size = mx.linspace(1, 100, 40)[::direction, None]
    given = given._replace(keys=given.keys * size, x=given.x * 10)
    # A score of 3000 is rounded to 2e-4, and so is its exponential.
    assert_is_oracle(given, shape, 1e-3, 1e-3)


# Shares and the output are rounded, each by at most half of 2^-8 (2^-11) of itself.
@of_shape
@pytest.mark.parametrize("dtype, rms", [(mx.float16, 4e-4), (mx.bfloat16, 3e-3)])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_rounds_shares_and_outputs_in_16_bits(
    shape: PrefillShape, dtype: mx.Dtype, rms: float, spread: float
) -> None:
    given = case(20, 60, sizes=Sizes(2, 64, 32, 64, 16), dtype=dtype, spread=spread)
    assert_is_oracle(given, shape, 8e-3, rms)


@of_shape
def test_any_blocks_are_one_softmax(shape: PrefillShape) -> None:
    given = case(40, 70)
    ends = [0, 8, 25, 31, 64, 70]
    parts = [given.columns(*pair).run(shape, mx.float32) for pair in pairwise(ends)]
    output, log_total = parts[0][0], parts[0][1][..., None]
    for more, log_more in parts[1:]:
        log_total, output = merge_attention(log_total, output, log_more[..., None], more)
    expected, logs = oracle(given)
    assert_close("outputs", output, expected, LARGEST, RMS)
    assert_close("log totals", log_total[..., 0], logs, LARGEST)


@of_shape
@pytest.mark.parametrize("p", [1, 8, 13])
def test_later_columns_leave_earlier_tokens_bit_identical(shape: PrefillShape, p: int) -> None:
    given, other = case(30, 30), case(30, 30, spread=2)
    swap = [
        mx.concatenate([a[..., :p, :], 100 * b[..., p:, :]], axis=-2)
        for a, b in zip(given[1:4], other[1:4], strict=True)
    ]
    changed, _ = given._replace(keys=swap[0], latents=swap[1], values=swap[2]).run(shape)
    assert_same_bits("outputs", changed[:, :p], given.run(shape)[0][:, :p])


# --------------------------------------------------------------------------------- work and text
def test_no_score_leaves_the_registers() -> None:
    """What is written does not grow with the columns."""
    written = []
    for S in (32, 64):
        case(8, S).run(BASE.prefill)
        written.append(emulator(KERNEL).counts["device_bytes_written"])
    assert written[0] == written[1] == 8 * 2 * (32 + 1) * 4


@of_shape
def test_columns_after_the_last_token_cost_nothing(shape: PrefillShape) -> None:
    T, S, (queries, block) = 50, 90, shape
    case(T, S, 0).run(shape)
    seen = [min(S, first + queries) for first in range(0, T, queries)]
    blocks = sum(-(-columns // block) for columns in seen)
    tiles = block // 8 * queries // 8 * (32 + 32 + 32) // 8  # of a block: keys and values
    assert emulator(KERNEL).counts["matrix_products"] == 2 * blocks * tiles


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_every_version_of_metal_takes_the_text(dtype: mx.Dtype) -> None:
    with use_backend(linter(large=set(KERNEL.inputs))):
        case(dtype=dtype).run()


def test_says_what_it_does_not_take() -> None:
    assert unsupported_reason(512, 128, 64, 128) is None
    assert unsupported_reason(510, 128, 64, 128) == "kv_lora_rank = 510 is not a multiple of 4"
    assert unsupported_reason(512, 48, 64, 128) == "qk_nope_head_dim = 48 is not a multiple of 32"
    assert unsupported_reason(512, 128, 8, 128) == "qk_rope_head_dim = 8 is not a multiple of 32"
    assert unsupported_reason(512, 128, 64, 0) == "v_head_dim = 0 is not a multiple of 32"
