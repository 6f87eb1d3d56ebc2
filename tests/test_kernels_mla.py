"""An MLA layer's decode step: float64 -> naive_mla_decode -> mla_decode, and packed latents."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.metal_kernels import mla_decode as module
from mlx_kimi.metal_kernels import split_kv
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.metal_kernels.latents import CODE_WORDS, GROUP_WORDS, pack, unpack
from mlx_kimi.metal_kernels.mla_decode import LatentWeights, mla_decode, naive_mla_decode
from mlx_kimi.metal_kernels.split_kv import SEGMENTS, Part, SplitKVPlan, positions_of_a_split
from mlx_kimi.metal_kernels.tuning import BASE, MAX, NVIDIA, ULTRA, AttendShape
from tests.assertions import assert_close, assert_same_bits, numbers
from tests.kernel_cases import (
    FORMATS,
    assert_all_close,
    emulator,
    exact,
    linter,
    matrix,
    on_the_emulator,
)

pytestmark = on_the_emulator
# Float32 against float64: sums of up to a thousand products, and exp of their scores.
RMS, LARGEST = 5e-6, 2e-5
of_form = pytest.mark.parametrize("form", ["naive", "kernel"])
# Those of Apple and of NVIDIA GPUs, and one of 512 threads that reads each latent once.
SHAPES = [BASE.attend, NVIDIA.attend, AttendShape(32, 32, 8)]


class Sizes(NamedTuple):
    """Of a layer, as the config calls them."""

    H: int
    lora: int
    shared: int
    nope: int
    v: int


SMALL = Sizes(2, 32, 16, 32, 32)
POCKET = Sizes(4, 128, 64, 64, 64)
PUBLISHED = Sizes(32, 512, 64, 128, 128)  # the 48B's


class Case(NamedTuple):
    """The arguments of naive_mla_decode."""

    x: mx.array
    weights: LatentWeights
    tail: mx.array
    size: int
    segments: list[mx.array]

    def run(
        self, form: str = "kernel", columns: int | None = None, shape: AttendShape | None = None
    ) -> tuple[mx.array, mx.array]:
        if form == "naive":
            return naive_mla_decode(*self)
        sizes = [segment.shape[1] for segment in self.segments]
        tokens = len(self.x) // len(self.tail)
        texts, room, _ = self.tail.shape
        plan = SplitKVPlan.uniform(self.size, room, sizes, columns, tokens, texts)
        return mla_decode(self.x, self.weights, self.tail, plan, self.segments, shape)


def case(
    sizes: Sizes = SMALL,
    tail: int = 5,
    segments: Sequence[int] = (16, 24),
    B: int = 1,
    bits: int = 0,
    group_size: int = 32,
    dtype: mx.Dtype = mx.float32,
    packed: bool = False,
    spread: float = 1.0,
    spare: int = 11,
    mode: str = "affine",
    T: int = 1,
) -> Case:
    """A layer and T tokens at random; `spread` is about the standard deviation of its scores.

    The tail's `spare` rows, beyond the new latent's, hold what must not be read as numbers.
    """
    H, lora, shared, nope, v = sizes
    rng = np.random.default_rng([*sizes, tail, *segments, B, bits])

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    weights = LatentWeights(
        matrix(normal(H, lora, nope) * nope**-0.5, bits, group_size, dtype, mode),
        matrix(normal(H, v, lora) * lora**-0.5, bits, group_size, dtype, mode),
        mx.array(1 + normal(lora) / 4).astype(dtype),
        1e-6,
        spread * (lora + shared) ** -0.5,
    )
    latents = [mx.array(normal(B, size, lora + shared)).astype(dtype) for size in segments]
    x = normal(B * T, H * (nope + shared) + lora + shared)
    recent = np.full((B, tail + 1 + spare, lora + shared), np.nan, np.float32)
    recent[:, :tail] = normal(B, tail, lora + shared)
    return Case(
        mx.array(x).astype(dtype),
        weights,
        mx.array(recent).astype(dtype),
        tail + 1,
        [pack(x) for x in latents] if packed else latents,
    )


def oracle(given: Case) -> tuple[np.ndarray, np.ndarray]:
    """y and the new latent with its shared key in float64, from the published equations.

    The layer attends to its new latent as the cache keeps it: rounded to x's dtype.
    """
    x, weights = numbers(given.x), given.weights
    H, lora = weights.heads, weights.lora
    shared = weights.shared(x.shape[-1])
    q, latent, key = np.split(x, [-lora - shared, -shared], axis=-1)
    latent = latent / np.sqrt((latent**2).mean(-1, keepdims=True) + weights.eps)
    new = np.concatenate([latent * numbers(weights.norm), key], axis=-1)
    parts = [
        numbers(unpack(s, lora + shared) if s.dtype == mx.uint32 else s) for s in given.segments
    ]
    parts.append(numbers(given.tail[:, : given.size - 1]))
    kept = numbers(mx.array(new.astype(np.float32)).astype(given.x.dtype))
    latents = np.concatenate([*parts, kept[:, None]], axis=1)
    q = q.reshape(len(x), H, -1)
    absorbed = np.einsum("hln,bhn->bhl", exact(weights.embed_q), q[..., : weights.nope])
    scores = np.concatenate([absorbed, q[..., weights.nope :]], -1) @ latents.swapaxes(1, 2)
    shares = np.exp(weights.scale * (scores - scores.max(-1, keepdims=True)))
    o = shares @ latents[..., :lora] / shares.sum(-1, keepdims=True)
    return np.einsum("hvl,bhl->bhv", exact(weights.unembed_out), o).reshape(len(x), -1), new


def assert_is_oracle(
    form: str, given: Case, largest: float = LARGEST, rms: float = RMS, **how: Any
) -> None:
    y, tail = given.run(form, **how)
    expected, new = oracle(given)
    assert tail.shape == given.tail.shape
    newest = tail[:, given.size - 1]
    assert_all_close(given.x.dtype, largest, rms, y=(y, expected), new_latent=(newest, new))
    before, after = (t[:, : given.size - 1].astype(mx.float32) for t in (given.tail, tail))
    assert_same_bits("tail", after, before)


# ------------------------------------------------------------------------------------- numbers
@of_form
@pytest.mark.parametrize(
    "sizes",
    [
        SMALL,
        POCKET,
        Sizes(1, 32, 8, 8, 4),
        Sizes(5, 96, 24, 40, 56),  # no head tile is whole, no row of 32 channels
        Sizes(40, 64, 72, 16, 12),  # more heads and shared keys than one threadgroup or step takes
    ],
    ids=str,
)
@pytest.mark.parametrize("B", [1, 2])
def test_equals_the_equations_at_every_shape(form: str, sizes: Sizes, B: int) -> None:
    assert_is_oracle(form, case(sizes, B=B))


@pytest.mark.parametrize("shape", [*SHAPES, AttendShape(8, 64, 24)], ids=str)
@pytest.mark.parametrize("sizes", [POCKET, Sizes(12, 128, 64, 16, 8)], ids=str)
def test_equals_the_equations_however_the_work_is_divided(sizes: Sizes, shape: AttendShape) -> None:
    assert_is_oracle("kernel", case(sizes, B=2), shape=shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_takes_the_heads_of_the_48b(shape: AttendShape, packed: bool) -> None:
    given = case(PUBLISHED, 3, [24], bits=4, group_size=64, dtype=mx.bfloat16, packed=packed)
    assert_is_oracle("kernel", given, 4e-3, 2.5e-3, columns=16, shape=shape)


@of_form
@pytest.mark.parametrize("tail", [0, 1, 7, 8, 9, 255])
@pytest.mark.parametrize("segments", [[], [8], [16, 8, 8]], ids=str)
def test_equals_the_equations_at_every_length(form: str, tail: int, segments: list[int]) -> None:
    assert_is_oracle(form, case(tail=tail, segments=segments))


@pytest.mark.parametrize("spare", [0, 1, 64, 255])
@pytest.mark.parametrize("columns", [8, 64])
def test_room_in_the_tail_changes_nothing(spare: int, columns: int) -> None:
    assert_is_oracle("kernel", case(tail=8, spare=spare, B=2), columns=columns)


@pytest.mark.parametrize("columns", [8, 16, 64, None])
@pytest.mark.parametrize("packed", [False, True])
def test_any_number_of_splits_is_one_softmax(columns: int | None, packed: bool) -> None:
    given = case(POCKET, 21, [128, 24, 8], B=2, packed=packed, spread=3)
    assert_is_oracle("kernel", given, columns=columns)


@pytest.mark.parametrize("count", [SEGMENTS, SEGMENTS + 1, 2 * SEGMENTS + 3])
def test_takes_more_segments_than_a_launch_has_buffers(count: int) -> None:
    assert_is_oracle("kernel", case(tail=9, segments=[8, 16] + [8] * (count - 2), B=2))


@of_form
@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_large_scores_do_not_overflow(form: str, direction: int) -> None:
    given = case(tail=20, segments=[32])
    size = mx.linspace(1, 100, 32)[::direction, None]
    given = given._replace(segments=[given.segments[0] * size])
    # A score of 500 is rounded to 3e-5, and so is its exponential.
    how = {"columns": 16} if form == "kernel" else {}
    assert_is_oracle(form, given._replace(x=given.x * 10), 2e-4, 1e-4, **how)


@of_form
@pytest.mark.parametrize("mode, bits, group_size", FORMATS)
def test_takes_quantized_matrices(form: str, mode: str, bits: int, group_size: int) -> None:
    sizes = Sizes(2, 128, 16, 128, 8)
    assert_is_oracle(form, case(sizes, bits=bits, group_size=group_size, mode=mode))


@of_form
@pytest.mark.parametrize("sizes", [SMALL, POCKET, Sizes(3, 64, 24, 8, 8)], ids=str)
def test_reads_packed_latents(form: str, sizes: Sizes) -> None:
    assert_is_oracle(form, case(sizes, 13, [40, 8], B=2, packed=True))


def with_uneven_groups(rows: mx.array) -> mx.array:
    """Packed rows whose groups differ in scale and bias; one of each row has the scale 0."""
    words = np.array(rows)
    groups = words.reshape(-1, words.shape[-1] // GROUP_WORDS, GROUP_WORDS)
    lines = groups[..., CODE_WORDS:].view(np.float32)  # scale, bias
    rng = np.random.default_rng(7)
    lines *= rng.choice([0.1, 1.0, 3.0], lines.shape[:2])[..., None]
    lines[..., 1] += rng.uniform(-4, 4, lines.shape[:2])
    row = np.arange(len(lines))
    lines[row, row % lines.shape[1], 0] = 0
    return mx.array(words)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(12, 128, 72, 16, 8),  # shared keys in two groups, after two of latents
        Sizes(3, 96, 40, 8, 8),  # a group of latents and shared keys, and one of 8 shared keys
    ],
    ids=str,
)
def test_packed_channels_have_the_line_of_their_group(sizes: Sizes, shape: AttendShape) -> None:
    given = case(sizes, 13, [40, 8], B=2, packed=True, spread=0.5)
    given = given._replace(segments=[with_uneven_groups(s) for s in given.segments])
    assert_is_oracle("kernel", given, columns=16, shape=shape)


# The kernels round y once, and the new latent: by at most half of 2^-8, of each number itself. What
# they attend to is stored in 16 bits, which the oracle knows.
@pytest.mark.parametrize("dtype, rms", [(mx.float16, 4e-4), (mx.bfloat16, 2.5e-3)])
@pytest.mark.parametrize("bits, packed", [(0, False), (4, False), (4, True)])
def test_rounds_once_in_16_bits(bits: int, packed: bool, dtype: mx.Dtype, rms: float) -> None:
    given = case(POCKET, B=2, bits=bits, dtype=dtype, packed=packed, spread=4)
    assert_is_oracle("kernel", given, 4e-3, rms)


# ------------------------------------------------------------------------------- several tokens
def one_by_one(given: Case) -> tuple[np.ndarray, np.ndarray]:
    """The oracle of each token after another: y [B * T, H * v], and the tail."""
    B, T = len(given.tail), len(given.x) // len(given.tail)
    outputs, tail = [], given.tail
    for t in range(T):
        y, new = oracle(given._replace(x=given.x[t::T], tail=tail, size=given.size + t))
        place = (mx.arange(tail.shape[1]) == given.size + t - 1)[:, None]
        tail = mx.where(place, mx.array(new.astype(np.float32))[:, None].astype(tail.dtype), tail)
        outputs.append(y)
    return np.stack(outputs, axis=1).reshape(B * T, -1), numbers(tail)


@of_form
@pytest.mark.parametrize("T", [2, 3, 8])
@pytest.mark.parametrize("sizes", [SMALL, Sizes(5, 96, 24, 40, 56)], ids=str)
@pytest.mark.parametrize("B", [1, 2])
def test_each_of_several_tokens_sees_those_before_it(
    form: str, sizes: Sizes, T: int, B: int
) -> None:
    given = case(sizes, tail=13, B=B, T=T, spread=3)
    y, tail = given.run(form, **({"columns": 8} if form == "kernel" else {}))
    expected, kept = one_by_one(given)
    assert_all_close(mx.float32, LARGEST, RMS, y=(y, expected))
    held = given.size - 1 + T
    assert_close("tail", tail[:, :held], kept[:, :held], LARGEST, RMS)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tail, spare", [(0, 7), (1, 255), (8, 7), (248, 7)])
def test_several_tokens_have_the_bits_of_one_at_a_time(tail: int, spare: int, packed: bool) -> None:
    """Whatever the tail holds, empty or full after them: a token's bits are its own."""
    given = case(POCKET, tail, [128, 24, 8], B=2, packed=packed, spread=3, spare=spare, T=8)
    together, kept = given.run(columns=64)
    now = given.tail
    for t in range(8):
        one = given._replace(x=given.x[t::8], tail=now, size=given.size + t)
        y, now = one.run(columns=64)
        assert_same_bits(f"token {t}", together[t::8], y)
    assert_same_bits("tail", kept[:, : tail + 8], now[:, : tail + 8])


# ------------------------------------------------------------------------ texts of unlike contexts
class Unlike(NamedTuple):
    """Texts whose latents lie in arrays that some share, at other places and of other sizes."""

    given: Case  # `tail` and `segments` as launches take them; `size` means nothing
    held: list[int]
    parts: list[list[Part]]

    def plan(self, columns: int | None) -> SplitKVPlan:
        B, room, _ = self.given.tail.shape
        tokens = len(self.given.x) // B
        return SplitKVPlan.of([n + 1 for n in self.held], room, self.parts, columns, tokens)

    def run(self, form: str, columns: int | None) -> tuple[mx.array, mx.array]:
        x, weights, tail, _, segments = self.given
        plan = self.plan(columns)
        if form == "kernel":
            return mla_decode(x, weights, tail, plan, segments)
        queries, tail = module.naive_mla_query(x, weights, tail, plan)
        found = module.naive_mla_attend(queries, tail, plan, segments, weights.lora)
        return module.naive_mla_output(*found, plan, weights, x.dtype), tail

    def alone(self, text: int) -> Case:
        """A text by itself, with its latents in arrays of their own."""
        given, held = self.given, self.held[text]
        T = len(given.x) // len(given.tail)
        own = [given.segments[p.array][:, p.start : p.start + p.size] for p in self.parts[text]]
        x = given.x[text * T : (text + 1) * T]
        tail = given.tail[text : text + 1]
        return given._replace(x=x, tail=tail, size=held + 1, segments=own)


def unlike(T: int = 1, packed: bool = False, arrays: int = 3) -> Unlike:
    """Five texts: one without frozen latents, two that share all, one of many parts, a long one."""
    given = case(POCKET, 0, [40, 64, 24] + [8] * (arrays - 3), B=1, packed=packed, spread=3)
    held = [3, 0, 9, 17, 1]
    x = case(POCKET, 0, [], B=5, T=T).x
    tail = np.full((5, 30, 192), np.nan, np.float32)
    for text, n in enumerate(held):
        tail[text, :n] = np.random.default_rng(text).standard_normal((n, 192))
    everything = [Part(i, 0, s.shape[1]) for i, s in enumerate(given.segments)]
    shared = [Part(1, 16, 32), Part(0, 8, 8)]
    parts = [[], shared, shared, everything, [Part(1, 48, 16), Part(2, 0, 24), Part(0, 16, 24)]]
    return Unlike(given._replace(x=x, tail=mx.array(tail)), held, parts)


@of_form
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("arrays", [3, SEGMENTS + 4])
def test_each_text_sees_its_own_latents(form: str, T: int, packed: bool, arrays: int) -> None:
    texts = unlike(T, packed, arrays)
    y, tail = texts.run(form, 16)
    for text, held in enumerate(texts.held):
        expected, kept = one_by_one(texts.alone(text))
        own = y[text * T : (text + 1) * T]
        assert_all_close(mx.float32, LARGEST, RMS, y=(own, expected))
        assert_close("tail", tail[text, : held + T], kept[0, : held + T], LARGEST, RMS)


@pytest.mark.parametrize("T", [1, 4])
def test_a_text_has_the_same_bits_whatever_the_others_are(T: int) -> None:
    texts = unlike(T)
    y, _ = texts.run("kernel", 16)
    for text in range(len(texts.held)):
        alone, _ = texts.alone(text).run(columns=16)
        assert_same_bits(f"text {text}", y[text * T : (text + 1) * T], alone)


def test_room_for_more_splits_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in graphs, which have room to spare: what is not used is neither read nor written."""
    texts = unlike(2)
    expected, _ = texts.run("kernel", 16)

    def filling(kernel: Kernel) -> Launch:
        launch = emulator(kernel)
        return lambda **how: launch(**how, init_value=float("nan"))

    monkeypatch.setattr(split_kv, "is_traced", lambda: True)
    assert texts.plan(16).capacities == (64,)
    with use_backend(filling):
        y, _ = texts.run("kernel", 16)
        mx.eval(y)
    assert_same_bits("y", y, expected)


# --------------------------------------------------------------------------------- work and text
@pytest.mark.slow
def test_each_latent_is_read_once_for_all_heads() -> None:
    for packed, row in ((False, 2 * 576), (True, 9 * (64 + 8))):
        read = []
        for columns in (16, 32):
            given = case(PUBLISHED, 1, [columns], dtype=mx.bfloat16, packed=packed)
            given.run(columns=64, shape=AttendShape(32, 32, 8))
            read.append(emulator(module.ATTEND).counts["device_bytes_read"])
        # A packed row's scales and biases are read by every lane of their groups: 8 bytes by each 4
        # of the 16 simdgroups' lanes that hold a latent, and by 4 for each tile of a shared key.
        again = 8 * (16 * 4 + 8 * 4 - 9) if packed else 0
        assert read[1] - read[0] == 16 * (row + again)


def test_a_token_takes_three_launches() -> None:
    launched: list[str] = []

    def counting(kernel: Kernel) -> Launch:
        launched.append(kernel.name)
        return emulator(kernel)

    with use_backend(counting):
        case(segments=[8] * SEGMENTS).run()
        assert launched == ["mla_query", "mla_attend", "mla_output"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_every_version_of_metal_takes_the_text(packed: bool, bits: int, dtype: mx.Dtype) -> None:
    kernels = (module.QUERY, module.ATTEND, module.OUTPUT)
    with use_backend(linter(large={name for k in kernels for name in k.inputs} - {"m_and_l"})):
        case(POCKET, bits=bits, dtype=dtype, packed=packed).run()


def test_says_what_it_does_not_take() -> None:
    def of(sizes: Sizes, **how: Any) -> str | None:
        given = case(sizes, **how)
        return module.unsupported_reason(given.weights, given.x.shape[-1])

    assert of(PUBLISHED, bits=4) is None
    assert of(SMALL._replace(lora=48)) == "kv_lora_rank = 48 is not a multiple of 32 up to 512"
    assert of(SMALL._replace(lora=1024)) is not None
    assert of(SMALL._replace(nope=12)) == "qk_nope_head_dim = 12 is not a multiple of 8"
    assert of(SMALL._replace(shared=4)) == "qk_rope_head_dim = 4 is not a multiple of 8"
    assert of(SMALL._replace(v=6)) == "v_head_dim = 6 is not a multiple of 4"


@pytest.mark.parametrize("total", [1, 64, 65, 5000, 131_072, 200_000, 524_288, 1 << 20, 1 << 23])
@pytest.mark.parametrize("wanted", [of.splits for of in (BASE, MAX, ULTRA, NVIDIA)])
def test_splits_are_enough_and_not_too_many(total: int, wanted: int) -> None:
    columns = positions_of_a_split(total, wanted)
    splits = -(-total // columns)
    assert columns % 8 == 0
    # Every segment and the tail may end with a split that is not full.
    assert splits + 2 * SEGMENTS <= split_kv.MOST_SPLITS
    # (rounding up to 64 positions costs some)
    assert splits >= min(total // 64, wanted / 2)


# --------------------------------------------------------------------------------------- packing
@pytest.mark.parametrize("width", [576, 192, 48, 72])
def test_packing_errs_by_half_a_step(width: int) -> None:
    latents = mx.random.normal((2, 5, width), key=mx.random.key(0)) * 3
    rows = pack(latents)
    assert rows.nbytes == 2 * 5 * -(-width // 64) * (64 + 8)
    filled = np.pad(np.array(latents), [(0, 0), (0, 0), (0, -width % 64)]).reshape(2, 5, -1, 64)
    step = (filled.max(-1) - filled.min(-1)) / 255
    error = np.abs(np.array(unpack(rows, width)) - np.array(latents))
    error = np.pad(error, [(0, 0), (0, 0), (0, -width % 64)]).reshape(2, 5, -1, 64)
    # MLX moves a group's line by up to half a step, so that one of its ends is exact.
    assert (error.max(-1) <= 1.01 * step).all()
    assert np.sqrt((error**2).mean()) <= 1.05 * np.sqrt((step**2).mean() / 12)


def test_packing_keeps_latents_of_any_size() -> None:
    """Down to a span of 255 * 1e-7 in a group: MLX makes no finer steps."""
    for size in (1e-3, 1.0, 1e6, 1e30):
        latents = mx.random.normal((1, 3, 64), key=mx.random.key(1)) * size
        assert_close(f"{size:.0e}", unpack(pack(latents), 64), latents, 1e-2)
    assert not unpack(pack(mx.zeros((1, 3, 64))), 64).any()
