"""The compiled step of one token: the same numbers as layer by layer, however shapes change."""

import gc
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.chat.state_files import restore_states, write_state
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.load import load_model
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, is_traced, use_backend
from mlx_kimi.model import cache as caches
from mlx_kimi.model import kimi_linear
from mlx_kimi.model.cache import TAIL, CacheEntry, LatentCache
from mlx_kimi.model.compiled import CompiledStep
from mlx_kimi.model.kimi_linear import KimiLinear
from tests.assertions import assert_close
from tests.processes import live_memory
from tests.reference_backend import reference_backend

# Float32, added in another order: MLX joins operations in a compiled graph, and the reference
# divide attention otherwise than the ops form.
SAME = 1e-4


@pytest.fixture(scope="module")
def pocket() -> KimiLinear:
    return load_model(pocket_folder())


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """Kernels run on the reference backend; those that Python launched, by name."""
    names: list[str] = []

    def counting(kernel: Kernel) -> Launch:
        names.append(kernel.name)
        return reference_backend(kernel)

    with use_backend(counting, traced=True):
        yield names


def prompted(model: KimiLinear, B: int, length: int, bits: int | None = None) -> list[CacheEntry]:
    cache = model.make_cache(bits)
    with use_backend(None):
        model(ids(B, length), cache)
    mx.eval(caches.arrays(cache))
    return cache


def as_if_read(model: KimiLinear, length: int) -> list[CacheEntry]:
    """After so many tokens, nearly all of which left latents of zeros."""
    cache = prompted(model, 1, 3)
    for entry in cache:
        if isinstance(entry, LatentCache) and length > 3:
            entry.append(mx.zeros((1, length - 3, model.config.latent_width)))
        entry.lengths = (length,)
    return cache


def ids(B: int, T: int) -> mx.array:
    return mx.random.randint(0, 250, (B, T), key=mx.random.key(B + T))


def one_by_one(model: KimiLinear, tokens: mx.array, cache: list[CacheEntry]) -> np.ndarray:
    logits = []
    for t in range(tokens.shape[1]):
        logits.append(model(tokens[:, t : t + 1], cache))
        mx.eval(logits[-1], caches.arrays(cache))
    return np.array(mx.concatenate(logits, axis=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("B", "prompt", "bits"), [(1, 250, None), (2, 250, None), (1, 600, 8), (2, 3, None)]
)
def test_is_the_ops_form_across_the_freezing_of_a_tail(
    pocket: KimiLinear, launched: list[str], B: int, prompt: int, bits: int | None
) -> None:
    tokens = ids(B, 20)
    compiled, plain = prompted(pocket, B, prompt, bits), prompted(pocket, B, prompt, bits)
    ours = one_by_one(pocket, tokens, compiled)
    assert launched
    with use_backend(None):
        assert_close("logits", ours, one_by_one(pocket, tokens, plain), SAME)
    assert [entry.lengths for entry in compiled] == [entry.lengths for entry in plain]
    for one, other in zip(compiled, plain, strict=True):
        if isinstance(one, caches.LatentCache) and isinstance(other, caches.LatentCache):
            for text in range(B):
                mine, others = one.segments(text), other.segments(text)
                assert [s.size for s in mine] == [s.size for s in others]
                assert_close("latents", mine[-1].rows, others[-1].rows, SAME)


@pytest.mark.slow
def test_takes_a_large_batch(
    pocket: KimiLinear, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many tokens make a prefill step submit layers one by one, which a graph cannot."""
    B, token = 32, ids(32, 1)
    monkeypatch.setattr(kimi_linear, "PIECE_TOKENS", B)
    cache, plain = prompted(pocket, B, 2), prompted(pocket, B, 2)
    assert pocket.compiled.takes(cache)
    ours = pocket(token, cache)
    assert launched
    with use_backend(None):
        assert_close("logits", ours, pocket(token, plain), SAME)


@pytest.mark.slow
def test_latents_freeze_in_8_bits_as_layer_by_layer(pocket: KimiLinear) -> None:
    """(Not as in the ops form, which packs a full tail before it attends to it.)"""
    tokens = ids(1, 20)
    with use_backend(reference_backend, traced=True):
        compiled = one_by_one(pocket, tokens, prompted(pocket, 1, TAIL - 6, 8))
    with use_backend(reference_backend):
        apart = one_by_one(pocket, tokens, prompted(pocket, 1, TAIL - 6, 8))
    assert_close("logits", compiled, apart, 1e-6)


@pytest.mark.slow
def test_conversations_that_take_turns_keep_their_graphs(
    pocket: KimiLinear, launched: list[str]
) -> None:
    first, second = prompted(pocket, 1, 5), prompted(pocket, 1, TAIL + 5)
    for cache in (first, second):
        one_by_one(pocket, ids(1, 1), cache)
    built = len(launched)
    for cache in (first, second, first, second):
        one_by_one(pocket, ids(1, 1), cache)
    assert len(launched) == built


@pytest.mark.slow
def test_is_built_once_for_a_tail(pocket: KimiLinear, launched: list[str]) -> None:
    cache = prompted(pocket, 1, TAIL + 7)
    one_by_one(pocket, ids(1, 2), cache)
    built = len(launched)
    one_by_one(pocket, ids(1, 40), cache)
    assert len(launched) == built
    assert {name for name in launched} == {
        *("add_norm", "kda_decode", "mla_query", "mla_attend", "mla_output"),
        *("add_norm_scores", "expert_select", "expert_gate_up", "expert_down"),
    }


@pytest.mark.slow
def test_a_snapshot_is_where_it_was(pocket: KimiLinear, launched: list[str]) -> None:
    cache, tokens = prompted(pocket, 1, TAIL - 4), ids(1, 9)
    one_by_one(pocket, ids(1, 1), cache)
    saved = caches.snapshot(cache)
    first = one_by_one(pocket, tokens, cache)
    caches.restore(cache, saved)
    assert np.array_equal(one_by_one(pocket, tokens, cache), first)


@pytest.mark.slow
def test_a_state_on_disk_holds_no_spare_rows(
    pocket: KimiLinear, launched: list[str], tmp_path: Path
) -> None:
    state = TokenState(pocket)
    with use_backend(None):
        state.read(ids(1, TAIL + 9)[0].tolist())
    for t in range(5):
        state.read(ids(1, 5)[0, t : t + 1].tolist())
    assert state.ids == ids(1, TAIL + 9)[0].tolist() + ids(1, 5)[0].tolist()
    stored = write_state(tmp_path, state, 0)
    again = TokenState(pocket)
    restore_states(again, tmp_path, [stored])
    assert again.ids == state.ids
    tokens = ids(1, 3)
    expected = one_by_one(pocket, tokens, state.entries)
    assert_close("logits", one_by_one(pocket, tokens, again.entries), expected, SAME)


@pytest.mark.slow
def test_a_step_goes_on_from_many_tokens_and_they_from_a_step(
    pocket: KimiLinear, launched: list[str]
) -> None:
    tokens, cache = ids(1, 31), prompted(pocket, 1, 11)
    parts = [(0, 1), (1, 2), (2, 13), (13, 14), (14, 30), (30, 31)]
    logits = []
    for start, stop in parts:
        with use_backend(None) if stop - start > 1 else use_backend(reference_backend, traced=True):
            logits.append(pocket(tokens[:, start:stop], cache))
    with use_backend(None):
        expected = pocket(tokens, prompted(pocket, 1, 11))
    assert_close("logits", mx.concatenate(logits, axis=1), expected, SAME)


@pytest.mark.slow
def test_projections_apart_are_projections_in_one(
    pocket: KimiLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders whose parts are quantized differently keep them apart."""
    monkeypatch.setattr("mlx_kimi.model.linear._alike", lambda parts: len(parts) == 1)
    apart, tokens = load_model(pocket_folder()), ids(1, 40)
    assert len(apart.layers[0].self_attn.in_proj.parts) == 6
    assert len(pocket.layers[0].self_attn.in_proj.parts) == 1
    assert_close("logits", apart(tokens), pocket(tokens), SAME)


def test_what_cannot_be_traced_is_not(pocket: KimiLinear) -> None:
    cache = prompted(pocket, 1, 5)
    assert not pocket.compiled.takes(cache)  # nothing runs kernels
    for backend, traced in ((reference_backend, False), (None, True)):
        with use_backend(backend, traced):
            assert not is_traced() and not pocket.compiled.takes(cache)
    with use_backend(reference_backend, traced=True):
        assert pocket.compiled.takes(cache)
        assert not pocket.compiled.takes(pocket.make_cache())  # has read nothing
        with use_backend(None):
            unlike = pocket.make_cache()
            pocket(ids(2, 4), unlike, lengths=[4, 2])
        assert pocket.compiled.takes(unlike)


@pytest.mark.slow
def test_texts_of_unlike_contexts_are_the_texts_alone(
    pocket: KimiLinear, launched: list[str]
) -> None:
    """Across the freezing of one text's tail, with latents that two of them share."""
    whole = prompted(pocket, 1, TAIL + 40)
    texts = [prompted(pocket, 1, TAIL - 2), whole, caches.snapshot(whole), prompted(pocket, 1, 3)]
    batch = caches.join(texts)
    tokens = ids(4, 5)
    together = one_by_one(pocket, tokens, batch)
    assert launched
    with use_backend(None):
        for number, text in enumerate(texts):
            alone = one_by_one(pocket, tokens[number : number + 1], text)
            assert_close(f"text {number}", together[number : number + 1], alone, SAME)
    assert batch[0].lengths == tuple(text[0].lengths[0] for text in texts)


@pytest.mark.slow
def test_texts_that_come_and_go_take_a_graph_a_number(
    pocket: KimiLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 times a text joins or leaves, of contexts up to 5,000 tokens, as a GPU would run them."""
    traced: list[tuple[int, ...]] = []
    compile = mx.compile

    def counting(step: Any) -> Any:
        def traced_step(ids: mx.array, *given: Any) -> Any:
            traced.append(ids.shape)
            return step(ids, *given)

        return compile(traced_step)

    def zeros(kernel: Kernel) -> Launch:
        def launch(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            return list(map(mx.zeros, output_shapes, output_dtypes))

        return launch

    monkeypatch.setattr(mx, "compile", counting)
    monkeypatch.setattr("mlx_kimi.model.compiled.takes_addresses", lambda: True)
    monkeypatch.setattr(pocket, "compiled", CompiledStep(pocket))
    rng = random.Random(0)
    known = [as_if_read(pocket, length) for length in (3, 300, 1500, 5000)]
    batch = caches.snapshot(known[0])
    with use_backend(zeros, traced=True):
        for _ in range(200):
            count = len(batch[0].lengths)
            if count == 1 or (count < 16 and rng.random() < 0.55):
                batch = caches.join([batch, rng.choice(known)])
            else:
                stay = rng.sample(range(count), count - 1)
                batch = caches.take(batch, stay)
            count = len(batch[0].lengths)
            mx.eval(pocket.hidden(ids(count, 1), batch), caches.arrays(batch))
    assert {shape[0] for shape in traced} == set(range(1, 17))
    print(f"{len(traced)} graphs")
    assert len(traced) <= 2 * 16  # two classes of splits


def test_the_graph_does_not_keep_the_model(launched: list[str]) -> None:
    before = live_memory()
    with use_backend(None):
        model = load_model(pocket_folder())
    weights = mx.get_active_memory() - before
    one_by_one(model, ids(1, 2), prompted(model, 1, 5))
    alive = weakref.ref(model)
    gc.disable()  # whoever drops a model has its memory at once
    try:
        del model
        assert alive() is None
        assert mx.get_active_memory() - before < weights / 10
    finally:
        gc.enable()


def test_parts_one_after_another_are_the_whole_model(launched: list[str]) -> None:
    """Bit for bit, compiled as the whole model is: what ranks compute."""
    with use_backend(None):
        whole = load_model(pocket_folder())
        first, last = (load_model(pocket_folder(), part=part) for part in (range(5), range(5, 8)))
        of_parts, cache = (first.make_cache(), last.make_cache()), prompted(whole, 1, 3)
        last.hidden(first.hidden(ids(1, 3), of_parts[0]), of_parts[1])
    for token in ids(1, 4).T:
        launched.clear()
        expected = whole.hidden(token[None], cache)
        in_whole = sorted(launched)
        launched.clear()
        given = first.hidden(token[None], of_parts[0])
        assert given.shape == (2, 1, 1, whole.config.hidden_size)
        assert mx.array_equal(last.hidden(given, of_parts[1]), expected)
        assert sorted(launched) == in_whole  # once a graph is built, nothing
    assert [entry.lengths for part in of_parts for entry in part] == [e.lengths for e in cache]
