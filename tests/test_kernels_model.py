"""The model with kernels, on the emulator, against the model in MLX operations."""

import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.cli import check, info
from mlx_kimi.loading.load import load, load_model
from mlx_kimi.metal_kernels import kda_decode, mla_decode, mla_prefill, sorted_experts
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.metal_kernels.tuning import BASE, Choices, ExpertForm, default_tuning
from mlx_kimi.model import mla
from mlx_kimi.model.cache import LatentCache
from mlx_kimi.model.kimi_linear import KimiLinear
from tests.assertions import assert_close
from tests.kernel_cases import FORMATS, emulator
from tests.processes import live_memory
from tests.reference_backend import reference_backend

SPLIT = 1e-4  # of the largest logit: the two ways differ by rounding in float32


def with_kernels(model: KimiLinear, ids: mx.array, prompt: int) -> mx.array:
    """The logits of `ids`, of which the first `prompt` are one call and each other token is one."""
    cuts = [prompt, *range(prompt + 1, ids.shape[1])] if prompt else range(1, ids.shape[1])
    cache = model.make_cache()
    with use_backend(emulator):
        logits = [model(part, cache) for part in mx.split(ids, list(cuts), axis=1)]
        mx.eval(logits)
    return mx.concatenate(logits, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "odd"])
@pytest.mark.parametrize("prompt", [0, 5, 33])
def test_kernels_give_the_same_logits(
    model: Callable[[str], KimiLinear], name: str, prompt: int
) -> None:
    ids = mx.random.randint(0, 64, (2, prompt + 3), key=mx.random.key(0))
    logits = with_kernels(model(name), ids, prompt)
    assert_close("logits", logits, model(name)(ids), SPLIT)


@pytest.mark.slow
def test_a_quantized_model_decodes_in_the_decode_kernels(quantized: Callable[..., Path]) -> None:
    model = load_model(quantized("tiny"))
    kernels = (kda_decode.KERNEL, mla_decode.QUERY, mla_decode.ATTEND, mla_decode.OUTPUT)
    for kernel in kernels:
        emulator(kernel).counts = {}
    ids = mx.array([[3, 1, 4, 1, 5]])
    assert_close("logits", with_kernels(model, ids, 0), model(ids), SPLIT)
    assert all(emulator(kernel).counts for kernel in kernels)


def test_unequal_rows_give_the_same_logits(model: Callable[[str], KimiLinear]) -> None:
    """A row without a new token, which only the ops form of the decode step knows."""
    ids = mx.random.randint(0, 64, (2, 7), key=mx.random.key(1))
    caches = [model("odd").make_cache() for _ in range(2)]
    expected = [model("odd")(ids, caches[0], [7, 4]), model("odd")(ids[:, :1], caches[0], [0, 1])]
    with use_backend(emulator):
        ours = [model("odd")(ids, caches[1], [7, 4]), model("odd")(ids[:, :1], caches[1], [0, 1])]
        mx.eval(ours)
    assert_close("first", ours[0][1, :4], expected[0][1, :4], SPLIT)
    assert_close("second", ours[1][1], expected[1][1], SPLIT)


def pocket_layer(dtype: mx.Dtype) -> mla.MultiHeadLatentAttention:
    pocket = load_model(pocket_folder())
    pocket.set_dtype(dtype)
    mixers = [layer.self_attn for layer in pocket.layers]
    return next(x for x in mixers if isinstance(x, mla.MultiHeadLatentAttention))


@pytest.mark.slow
@pytest.mark.parametrize("columns", [2048, 24])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(
    "dtype, largest, rms", [(mx.float32, 2e-5, 5e-6), (mx.bfloat16, 1e-2, 5e-3)]
)
def test_many_tokens_of_an_mla_layer_meet_blocks_of_columns(
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    bits: int | None,
    dtype: mx.Dtype,
    largest: float,
    rms: float,
) -> None:
    """(In 16 bits the two forms round at other places.)"""
    layer = pocket_layer(dtype)
    hidden, heads = layer.in_proj.parts[0].matrix.columns, layer.embed_q.weight.shape[0]
    x = mx.random.normal((2, 320, hidden), key=mx.random.key(0)).astype(dtype)
    monkeypatch.setattr(mla, "EXPANDED", columns * 2 * heads)
    emulator(mla_prefill.KERNEL).counts = {}
    results = []
    for backend in (None, emulator):
        entry = LatentCache(bits=bits)
        with use_backend(None):
            layer(x[:, :280], entry)  # a frozen segment and a tail
        with use_backend(backend), monkeypatch.context() as patch:
            patch.setattr(mla, "expanding_pays", lambda T, _: T >= 40)
            results.append(layer(x[:, 280:], entry))
            mx.eval(results)
    assert emulator(mla_prefill.KERNEL).counts
    assert results[1].dtype == dtype
    assert_close("o", *results, largest, rms)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pocket", "odd"])
def test_mla_prefill_takes_texts_of_unlike_lengths(
    model: Callable[[str], KimiLinear], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of any model but those whose sizes are no multiple of 32, which are computed otherwise."""
    network = load_model(pocket_folder()) if name == "pocket" else model(name)
    monkeypatch.setattr(mla, "expanding_pays", lambda T, _: T >= 5)
    ids = mx.random.randint(0, 64, (2, 9), key=mx.random.key(1))
    expected = network(ids, lengths=[9, 6])
    emulator(mla_prefill.KERNEL).counts = {}
    with use_backend(emulator):
        ours = network(ids, lengths=[9, 6])
        mx.eval(ours)
    assert bool(emulator(mla_prefill.KERNEL).counts) == (name == "pocket")
    assert_close("first", ours[0], expected[0], SPLIT)
    assert_close("second", ours[1, :6], expected[1, :6], SPLIT)


@pytest.mark.slow
def test_memory_of_expanded_blocks_does_not_grow_with_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, peaks = pocket_layer(mx.float32), []
    hidden, heads = layer.in_proj.parts[0].matrix.columns, layer.embed_q.weight.shape[0]
    monkeypatch.setattr(mla, "EXPANDED", 64 * heads)
    for context in (1000, 4000):
        entry = LatentCache()
        entry.append(mx.random.normal((1, context, layer.width)))
        x = mx.random.normal((1, 200, hidden))
        mx.eval(x, entry.arrays())
        mx.clear_cache()
        mx.reset_peak_memory()
        before = live_memory()
        with use_backend(reference_backend):
            mx.eval(layer(x, entry))
        peaks.append(mx.get_peak_memory() - before)
    # Keys and values of 3000 more latents would be 6 MB, and 47 outputs in float32 9 MB; a merge of
    # segments, which may pass by, takes 3.1 MB.
    assert peaks[1] - peaks[0] < 4e6


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels in `check`, for fewer tokens than its 171: an emulator takes its time."""
    monkeypatch.setattr(mla, "expanding_pays", lambda T, _: T >= 53)
    chosen = Choices(default_tuning()._replace(expand_from=53))
    monkeypatch.setattr(Choices, "default", staticmethod(lambda: chosen))


@pytest.mark.slow
def test_check_compares_the_kernels_with_the_ops_form(few_are_many: None) -> None:
    pocket, tokenizer = load(pocket_folder())
    assert list(check._kernels(pocket, tokenizer)) == [("none run here", None)]
    emulator(mla_prefill.KERNEL).counts = {}
    with use_backend(emulator):
        ((found, wrong),) = check._kernels(pocket, tokenizer)
    assert wrong is None and "of the largest logit" in found
    assert emulator(mla_prefill.KERNEL).counts
    # In float32 both round the same numbers: far below the tolerance for 16 bits.
    assert float(found.split("by ")[1].split(" of")[0]) < SPLIT


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("kda_chunk_scan", "kda_sequential", "mla_prefill", "mla_output", "expert_down"),
        *("expert_tiles_gate_up", "expert_vectors_down"),
    ],
)
def test_check_finds_a_wrong_kernel(name: str, few_are_many: None) -> None:
    """In whichever part of the text it runs."""
    pocket, tokenizer = load(pocket_folder())

    def wrong_in_one(kernel: Kernel) -> Launch:
        run = emulator(kernel, schedules=(0,))  # (others find whether the order matters)
        if kernel.name != name:
            return run
        return lambda **launch: [y * 0 if i == 0 else y for i, y in enumerate(run(**launch))]

    with use_backend(wrong_in_one):
        ((_, wrong),) = check._kernels(pocket, tokenizer)
    assert wrong == f"expected at most {check.KERNEL_TOLERANCE}"


def test_info_names_the_kernels_that_the_pocket_model_uses() -> None:
    pocket = load_model(pocket_folder(), lazy=True)
    with use_backend(emulator):
        text = "\n".join(info._kernels(pocket))
    for name in ("kda_decode", "kda_sequential", "kda_chunk", "mla_attend", "expert_gate_up"):
        assert name in text
    assert re.search(
        r"^ +9 to 52 tokens +fast  expert_select, expert_order, expert_vectors$", text, re.M
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode, bits, group", FORMATS)
def test_prompts_of_every_stored_format_have_the_logits_of_mlx(
    quantized: Callable[..., Path],
    mode: str,
    bits: int,
    group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On forced tokens: a prompt whose experts are vectors, one in tiles, then token by token."""
    model = load_model(quantized("tiny", group, bits, mode))
    (many,) = {layer.mlp.many_tokens for layer in model.layers[1:2]}
    forms = (ExpertForm(0, "vectors"), ExpertForm(3, "tiles", 2))
    monkeypatch.setattr(sorted_experts, "tuning", lambda: BASE._replace(experts=forms))
    few, more = many.first_tokens(model.config.num_experts_per_token)
    ids = mx.random.randint(0, 64, (1, few + more + 2), key=mx.random.key(bits))
    names: set[str] = set()

    def noted(kernel: Kernel) -> Launch:
        names.add(kernel.name)
        return emulator(kernel)

    cache = model.make_cache()
    with use_backend(noted):
        parts = mx.split(ids, [few, few + more, few + more + 1], axis=1)
        logits = mx.concatenate([model(part, cache) for part in parts], axis=1)
        mx.eval(logits)
    assert {"expert_vectors_down", "expert_tiles_down", "expert_down"} <= names
    assert_close("logits", logits, model(ids), SPLIT)
