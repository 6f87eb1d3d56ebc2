"""Experts from the files: the same bits whatever is in memory, clear errors when files fail."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_kimi import load, stream_generate
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.cli.grammar import COMMANDS
from mlx_kimi.errors import ContextFull, KimiError
from mlx_kimi.generation.decode import prefill
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.budget import Budget
from mlx_kimi.loading.load import load_model
from mlx_kimi.loading.memory import BUFFERS, LEAST_BUFFERS
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.model import cache as caches
from mlx_kimi.model import moe
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.offload import offload
from mlx_kimi.offload.expert_cache import ExpertCache
from mlx_kimi.offload.expert_files import OpenFile
from mlx_kimi.offload.lrfu import LRFU
from mlx_kimi.offload.read_pool import ReadPool
from mlx_kimi.text.tokenizer import load_tokenizer
from tests.assertions import assert_close, assert_same_bits
from tests.emulated import emulator
from tests.reference_backend import reference_backend

GB = 10**9
ROOMY = Budget(8 * GB)
Streamed = Callable[[Path, int], KimiLinear]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Streamed:
    """`streamed(folder, slots)`: a model with so many slots a layer, whatever their size."""

    def made(folder: Path, slots: int) -> KimiLinear:
        monkeypatch.setattr(import_module("mlx_kimi.loading.load"), "slots_for", lambda *_: slots)
        return load_model(folder, budget=ROOMY)

    return made


@pytest.fixture
def pocket(tmp_path: Path) -> Path:
    """The pocket model's files, to be damaged."""
    return Path(shutil.copytree(pocket_folder(), tmp_path / "pocket"))


def ids(count: int, vocab: int = 200, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def run(model: KimiLinear, parts: list[list[int]]) -> np.ndarray:
    """The logits of a text read in parts, float32 [1, T, vocab]."""
    cache = model.make_cache()
    logits = []
    for part in parts:
        logits.append(model(mx.array([part]), cache))
        mx.eval(logits[-1], caches.arrays(cache))
    return np.array(mx.concatenate(logits, axis=1))


def split(text: list[int], *lengths: int) -> list[list[int]]:
    ends = np.cumsum([0, *lengths])
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)] + [
        [t] for t in text[ends[-1] :]
    ]


# ------------------------------------------------------------------------------- the same bits
TEXT = split(ids(110), 64, 1, 2, 17)  # then 26 single tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits"),
    [("tiny", None), ("odd", None), ("grouped", None), ("tiny", 4), ("grouped", 3)],
)
def test_every_number_of_slots_gives_the_bits_of_the_whole_model(
    streamed: Streamed,
    folder: Callable[..., Path],
    quantized: Callable[..., Path],
    name: str,
    bits: int | None,
) -> None:
    path = folder(name) if bits is None else quantized(name, bits=bits)
    whole = load_model(path)
    expected = run(whole, TEXT)
    config = whole.config
    for slots in sorted({config.num_experts_per_token, config.num_experts - 1, config.num_experts}):
        model = streamed(path, slots)
        assert_same_bits(f"{slots} slots", run(model, TEXT), expected)
        counts = model.offload.counts
        assert counts.lookups > 0
        assert (counts.misses == 0) == (slots == config.num_experts)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 7, 31])
def test_the_pocket_model_streams_with_the_bits_of_the_whole_one(
    streamed: Streamed, slots: int
) -> None:
    expected = run(load_model(pocket_folder()), TEXT)
    model = streamed(pocket_folder(), slots)
    assert_same_bits("logits", run(model, TEXT), expected)
    assert_same_bits("again, with other experts in memory", run(model, TEXT), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_formats_without_biases_stream(
    streamed: Streamed, quantized: Callable[..., Path], mode: str
) -> None:
    path = quantized("tiny", 32 if mode == "mxfp4" else 16, 4, mode)
    few, all_of_them = (run(streamed(path, slots), TEXT) for slots in (3, 8))
    assert_same_bits("logits", few, all_of_them)
    # MLX's product of one such matrix adds in another order than that of gathered ones.
    assert_close("logits", few, run(load_model(path), TEXT), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 9])
def test_the_expert_kernels_take_slots(streamed: Streamed, slots: int) -> None:
    """One token takes the kernels' way; here the reference computes."""
    model, whole = streamed(pocket_folder(), slots), load_model(pocket_folder())
    launched = []

    def backend(kernel):  # type: ignore[no-untyped-def]
        launched.append(kernel.name)
        return reference_backend(kernel)

    text = [[t] for t in ids(12)]
    with use_backend(backend):
        ours = run(model, text)
        assert launched.count("expert_gate_up") == 7 * len(text)
        assert_same_bits("logits", ours, run(whole, text))
    assert model.offload.counts.misses > 2 * slots


@pytest.mark.slow
def test_a_token_whose_experts_are_there_is_one_graph(streamed: Streamed) -> None:
    """And one that needs a file goes layer by layer; both are right, whatever came before."""
    model, whole = streamed(pocket_folder(), 20), load_model(pocket_folder())
    launched: list[str] = []

    def backend(kernel: Kernel) -> Launch:
        launched.append(kernel.name)
        return reference_backend(kernel)

    counts, steps, extra = model.offload.counts, [], []
    cache, other = model.make_cache(), whole.make_cache()
    with use_backend(backend, traced=True):
        for token in [*ids(4), *[7] * 12, *ids(6, seed=4), *[7] * 8]:
            read, asked = counts.misses, counts.lookups
            launched.clear()
            logits = model(mx.array([[token]]), cache)
            steps.append((counts.misses > read, bool(launched)))
            extra.append(counts.lookups - asked - 2 * 7)
            mx.eval(logits, caches.arrays(cache))
            with use_backend(backend):
                expected = whole(mx.array([[token]]), other)
            assert_close("logits", logits, expected, 1e-4)  # (MLX joins operations of a graph)
    assert steps.count((False, False)) > 8  # nothing read, nothing launched from Python
    assert any(read and launches for read, launches in steps[16:])
    assert sum(extra) == 2 * 7  # once, to warm up
    assert cache[0].lengths == other[0].lengths


@pytest.mark.slow
@pytest.mark.parametrize("slots", [20, 32])
@pytest.mark.parametrize("B", [1, 2])
def test_what_the_expert_kernels_refuse_streams_in_graphs(
    streamed: Streamed, monkeypatch: pytest.MonkeyPatch, slots: int, B: int
) -> None:
    monkeypatch.setattr(moe, "unsupported_reason", lambda *_: "they have other bits")
    model, whole = streamed(pocket_folder(), slots), load_model(pocket_folder())
    cache, other = model.make_cache(), whole.make_cache()
    for token in [3, 5, *[7] * 12, 9, 9]:
        with use_backend(reference_backend, traced=True):
            logits = model(mx.array([[token]] * B), cache)
            mx.eval(logits, caches.arrays(cache))
        with use_backend(reference_backend):
            assert_close("logits", logits, whole(mx.array([[token]] * B), other), 1e-4)


@pytest.mark.parametrize("after", [9, 18, 27])
def test_an_interrupted_read_makes_no_assumption_wrong(
    streamed: Streamed, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Some of a token's experts arrived, others did not: the table that graphs get must be new."""
    model = streamed(pocket_folder(), 20)
    optimistic, cache = model.offload.optimistic, next(iter(model.offload.expert_caches.values()))
    cache.slot_ids(np.array([0, 1]))
    before = np.array(optimistic.slot_tables()[0])
    wait, calls = ReadPool.wait, iter(range(100))

    def failing(*arguments):  # type: ignore[no-untyped-def]
        if next(calls) == 1:  # the second expert
            raise KeyboardInterrupt
        return wait(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ReadPool, "wait", failing)
        with pytest.raises(KeyboardInterrupt):
            cache.slot_ids(np.array([after, after + 1]))
    assert cache.slot_table[after] != before[after]
    chosen = np.full((7, 2), after)
    assert not optimistic.verify([mx.array(chosen)])  # of a graph that was given the old table
    assert np.array(optimistic.slot_tables()[0])[after] == cache.slot_table[after]


@pytest.mark.slow
def test_batches_and_padding_stream(streamed: Streamed) -> None:
    model, whole = streamed(pocket_folder(), 4), load_model(pocket_folder())
    tokens = mx.array([ids(20, seed=1), ids(20, seed=2)])
    for lengths in (None, [20, 13]):
        assert_same_bits("logits", model(tokens, None, lengths), whole(tokens, None, lengths))


@pytest.mark.slow
def test_two_threads_on_one_model_take_turns(streamed: Streamed) -> None:
    """A step of one wrote slots that the other's step still read: a third of the answers wrong."""
    model = streamed(pocket_folder(), 4)
    tokenizer = load_tokenizer(pocket_folder())
    prompts = [ids(9, seed=seed) for seed in range(4)]

    def answer(prompt: list[int]) -> list[int]:
        return [c.token for c in stream_generate(model, tokenizer, prompt, max_tokens=8)]

    expected = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(answer, prompts * 3)) == expected * 3


@pytest.mark.slow
def test_what_is_not_evaluated_yet_keeps_its_experts(streamed: Streamed) -> None:
    """A lazy graph that reads slots is submitted before they are written again."""
    whole, model = load_model(pocket_folder()), streamed(pocket_folder(), 2)
    cache, other = whole.make_cache(), model.make_cache()
    text = ids(30)
    expected = [whole(mx.array([[t]]), cache) for t in text]
    ours = [model(mx.array([[t]]), other) for t in text]
    assert_same_bits("logits", mx.concatenate(ours), mx.concatenate(expected))


# --------------------------------------------------------------------------------- what is read
@pytest.mark.slow
def test_a_step_of_many_tokens_reads_each_expert_once(streamed: Streamed) -> None:
    model = streamed(pocket_folder(), 2)
    mx.eval(model(mx.array([ids(300)])))
    counts = model.offload.counts
    layers = len(model.offload.expert_caches)
    assert counts.lookups <= 32 * layers  # every expert of every layer at most
    assert counts.misses == counts.lookups
    mx.eval(model(mx.array([ids(300)])))  # what was worth most is there now
    assert counts.misses <= 2 * (counts.lookups // 2) - 2 * layers
    one_expert = (
        sum(
            stack.nbytes // (2 if stack.stored != stack.dtype else 1)
            for cache in model.offload.expert_caches.values()
            for stack in cache.stacks
        )
        // layers
    )
    assert counts.bytes_read == counts.misses * one_expert


@pytest.mark.slow
def test_only_the_last_step_of_a_prompt_asks_the_last_layer_for_experts(
    streamed: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = streamed(pocket_folder(), 4), load_model(pocket_folder())
    for_each, visited = ExpertCache.for_each_expert, []

    def noted(cache, *arguments):  # type: ignore[no-untyped-def]
        visited.append(cache)
        return for_each(cache, *arguments)

    monkeypatch.setattr(ExpertCache, "for_each_expert", noted)
    text = ids(70)
    last, _ = prefill(TokenState(model, snapshot_every=None), text, step=30)
    assert [visited.count(cache) for cache in model.offload.expert_caches.values()] == [3] * 6 + [1]
    assert_same_bits(
        "hidden", last, prefill(TokenState(whole, snapshot_every=None), text, step=30)[0]
    )
    assert_close("hidden", last, whole.hidden(mx.array([text]))[:, -1:], 1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("T", [12, 60])  # vectors, and tiles
def test_kernels_give_every_budget_the_bits_of_the_whole_model(streamed: Streamed, T: int) -> None:
    """In waves of experts, with the shared one alone, as in one launch of all."""
    models = [streamed(pocket_folder(), slots) for slots in (3, 6, 32)]
    models.append(load_model(pocket_folder()))
    x = mx.random.normal((1, T, 192), key=mx.random.key(T))
    launched: list[set[str]] = []

    def noted(kernel: Kernel) -> Launch:
        launched[-1].add(kernel.name)
        return emulator(kernel)

    outputs = []
    with use_backend(noted):
        for model in models:
            launched.append(set())
            outputs.append(model.layers[1].mlp(x))
            mx.eval(outputs[-1])
    form = "vectors" if T == 12 else "tiles"
    assert all({f"expert_{form}_gate_up", f"expert_{form}_down"} <= names for names in launched)
    assert ["expert_order" in names for names in launched] == [False, False, True, True]
    for y in outputs[:-1]:
        assert_same_bits("y", y, outputs[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
def test_kernels_give_every_budget_the_bits_of_a_few_tokens(
    streamed: Streamed, quantized: Callable[..., Path]
) -> None:
    """In as many launches as their experts need that have slots at the same time."""
    path, text = quantized("tiny"), split(ids(29), 12, 2, 8, 5)
    whole = load_model(path)
    expected, k = run(whole, text), whole.config.num_experts_per_token
    for slots in (k, k + 1, whole.config.num_experts):
        assert_same_bits(f"{slots} slots", run(streamed(path, slots), text), expected)


def test_a_few_tokens_have_slots_at_the_same_time(streamed: Streamed) -> None:
    model = streamed(pocket_folder(), 5)
    (cache, *_) = model.offload.expert_caches.values()
    chosen = np.array([[0, 1], [1, 2], [3, 0], [4, 5], [5, 4], [6, 7], [8, 9]])
    parts = [chosen[part] for part in cache.with_room(chosen)]
    assert np.array_equal(np.concatenate(parts), chosen) and [len(p) for p in parts] == [3, 3, 1]
    for part in parts:
        slots = cache.slot_ids(part)
        assert np.array_equal(cache.expert_in[slots], part)
    assert cache.counts.lookups == cache.counts.misses == 4 + 4 + 2


def test_what_is_worth_most_stays() -> None:
    worth = LRFU(np.zeros(5), decay=0.5)
    worth.note(np.array([[0, 1]]))
    worth.note(np.array([[0, 2], [3, 2]]))
    assert worth.scores.tolist() == [0.25 + 0.5, 0.25, 0.5 + 1, 1, 0]
    together = LRFU(np.zeros(5), decay=0.5)
    together.note(np.array([[0, 1], [0, 2], [3, 2]]))
    assert np.allclose(worth.scores, together.scores)
    layers = LRFU(np.zeros((2, 5)), decay=0.5)
    layers.note(np.array([[[0, 1], [0, 2], [3, 2]], [[4, 1], [0, 4], [3, 4]]]))
    assert layers.scores[0].tolist() == together.scores.tolist()
    assert layers.scores[1].tolist() == [0.5, 0.25, 0, 1, 0.25 + 0.5 + 1]


def test_the_least_worth_makes_room(streamed: Streamed) -> None:
    model = streamed(pocket_folder(), 3)
    cache = next(iter(model.offload.expert_caches.values()))
    for pair in ((0, 1), (0, 1), (0, 2), (5, 0)):
        cache.slot_ids(np.array(pair))
    assert sorted(cache.expert_in.tolist()) == [0, 1, 5]  # 1 was used twice, 2 once
    check_tables(cache)


def check_tables(cache: ExpertCache) -> None:
    for slot, expert in enumerate(cache.expert_in):
        assert expert < 0 or cache.slot_table[expert] == slot
    assert (cache.slot_table >= 0).sum() == (cache.expert_in >= 0).sum()


# ------------------------------------------------------------------------------ when files fail
def streaming_answer(folder: Path, damage: Callable[[Path], None], streamed: Streamed) -> str:
    """The error of an answer during which `damage` happens to the weights."""
    _, tokenizer = load(folder)
    stream = stream_generate(streamed(folder, 2), tokenizer, ids(20), max_tokens=50)
    next(stream)
    damage(folder / "model.safetensors")
    with pytest.raises(KimiError) as error:
        list(stream)
    return str(error.value)


def cut(file: Path) -> None:
    os.truncate(file, 100_000)


def write(file: Path) -> None:
    time.sleep(0.02)  # (times of files have a grain)
    with file.open("r+b") as opened:
        opened.seek(1_000_000)
        opened.write(b"other weights")


def write_and_set_the_time_back(file: Path) -> None:
    before = file.stat()
    write(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (os.remove, "was removed while the model is in use"),
        (cut, "was cut to 100,000 of "),
        (write, "was written to while the model is in use"),
        (write_and_set_the_time_back, "was written to while the model is in use"),
    ],
)
def test_a_file_that_changes_ends_the_answer(
    pocket: Path, streamed: Streamed, damage: Callable[[Path], None], said: str
) -> None:
    error = streaming_answer(pocket, damage, streamed)
    assert error.startswith(f"{pocket / 'model.safetensors'}: {said}")


@pytest.mark.slow
def test_another_name_or_other_rights_end_no_answer(
    pocket: Path, streamed: Streamed, tmp_path: Path
) -> None:
    file = pocket / "model.safetensors"
    _, tokenizer = load(pocket)
    stream = stream_generate(streamed(pocket, 2), tokenizer, ids(20), max_tokens=20)
    next(stream)
    time.sleep(0.02)  # (times of files have a grain)
    os.link(file, tmp_path / "another name")
    next(stream)
    file.chmod(0o600)
    list(stream)


@pytest.mark.alone
def test_a_disk_that_does_not_answer_ends_the_answer(
    pocket: Path, streamed: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(pocket, 2)
    model.offload.readers.stall = 0.2
    mx.eval(model(mx.array([ids(20)])))
    monkeypatch.setattr(OpenFile, "read", lambda *_: time.sleep(3))
    began = time.perf_counter()
    with pytest.raises(KimiError, match=r"layers\.\d+: expert \d+: the disk has not answered for"):
        run(model, [[t] for t in ids(20, seed=3)])
    assert time.perf_counter() - began < 2


@pytest.mark.slow
def test_a_slow_disk_is_waited_for(
    pocket: Path, streamed: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(load_model(pocket), TEXT[-4:])
    model, read = streamed(pocket, 2), OpenFile.read

    def slowly(*arguments) -> None:  # type: ignore[no-untyped-def]
        time.sleep(0.01)
        read(*arguments)

    monkeypatch.setattr(OpenFile, "read", slowly)
    assert_same_bits("logits", run(model, TEXT[-4:]), expected)
    assert model.offload.counts.stall_time > 0.1


@pytest.mark.alone
def test_a_program_ends_though_a_read_hangs() -> None:
    start = "ReadPool().start(lambda: time.sleep(60), [])"
    program = f"import time; from mlx_kimi.offload.read_pool import ReadPool; {start}"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    assert time.perf_counter() - began < 20


@pytest.mark.slow
@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 7, 40, 200])
def test_what_failed_or_was_interrupted_leaves_the_slots_right(
    pocket: Path,
    streamed: Streamed,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    after: int,
) -> None:
    expected = run(load_model(pocket), TEXT[:6])
    model, calls = streamed(pocket, 3), iter(range(10**6))
    place = (os, "preadv") if isinstance(failure, OSError) else (ReadPool, "wait")
    real = getattr(*place)

    def failing(*arguments):  # type: ignore[no-untyped-def]
        if next(calls) == after:
            raise failure
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(*place, failing)
        with pytest.raises((KimiError, KeyboardInterrupt)):
            run(model, TEXT)
    for cache in model.offload.expert_caches.values():
        check_tables(cache)
    assert_same_bits("logits", run(model, TEXT[:6]), expected)


# ---------------------------------------------------------------------------------- the budget
def test_a_budget_too_small_says_what_is_needed() -> None:
    with pytest.raises(KimiError, match=r"budget of 10.00 MB is too small: .* make [\d,]+ MB; a"):
        load_model(pocket_folder(), budget=Budget(GB // 100))


def test_an_answer_reads_no_more_at_once_than_the_budget_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = load(pocket_folder(), replace(ROOMY, prefill_step=16))
    seen: list[int] = []
    own = KimiLinear.hidden

    def hidden(self: KimiLinear, tokens: mx.array, *rest: Any) -> mx.array:
        seen.append(tokens.shape[1])
        return own(self, tokens, *rest)

    monkeypatch.setattr(KimiLinear, "hidden", hidden)
    monkeypatch.setattr(KimiLinear, "advance", lambda *given: mx.eval(hidden(*given)))
    list(stream_generate(model, tokenizer, ids(40), max_tokens=2))
    assert seen == [16, 16, 8, 1]


def test_a_budget_beyond_the_machine_is_refused() -> None:
    with pytest.raises(KimiError, match=r"a memory budget of 9000.00 GB is too large: this "):
        load_model(pocket_folder(), budget=Budget(9000 * GB))


def test_one_rank_of_several_has_no_budget() -> None:
    with pytest.raises(KimiError, match="is for a whole model, not one of 2 ranks"):
        load_model(pocket_folder(), shard=(0, 2), budget=ROOMY)


@pytest.mark.slow
def test_a_budget_has_room_for_a_context_and_no_more() -> None:
    model, tokenizer = load(pocket_folder(), Budget(8 * GB, context=64))
    assert model.config.model_max_length == 64
    rule = "--context must be more than the 70 tokens of the prompt but is 64"
    with pytest.raises(ContextFull, match=rule):
        list(stream_generate(model, tokenizer, ids(70)))


@pytest.mark.slow
def test_mlx_keeps_few_buffers_as_long_as_a_budget_lasts(
    streamed: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "CACHE_LIMIT", offload.CacheLimit())

    def limit() -> int:
        now = mx.set_cache_limit(0)
        mx.set_cache_limit(now)
        return now

    gc.collect()  # models that other tests left: the limit is the process's
    before = mx.set_cache_limit(3 * BUFFERS)
    try:
        first = streamed(pocket_folder(), 2)
        budget = replace(ROOMY, prefill_step=64)
        small = limit()
        monkeypatch.setattr(import_module("mlx_kimi.loading.load"), "slots_for", lambda *_: 2)
        second = load_model(pocket_folder(), budget=budget)
        assert LEAST_BUFFERS < limit() < small < BUFFERS, "as the work space is"
        del second
        gc.collect()
        assert limit() == small
        del first
        gc.collect()
        assert limit() == 3 * BUFFERS
    finally:
        mx.set_cache_limit(before)


MEASURED = """
import resource, sys
import mlx.core as mx
from mlx_kimi.loading.load import load_model
from mlx_kimi.loading.budget import Budget
from mlx_kimi.text.tokenizer import load_tokenizer
model = load_model(sys.argv[1], budget=Budget(int(sys.argv[2]), context=300))
cache = model.make_cache()
mx.eval(model(mx.array([list(range(12))]), cache))
for token in range(3):
    mx.eval(model(mx.array([[token]]), cache))
if sys.platform == "linux":  # where ru_maxrss of a new process begins with its parent's
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak, model.offload.slots)
"""


@pytest.mark.slow
def test_the_process_stays_within_its_budget(folder: Callable[..., Path]) -> None:
    path = folder("full_width")
    for budget, slots in ((2_400_000_000, range(8, 16)), (4 * GB, range(16, 17))):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(path), str(budget)],
            capture_output=True,
            text=True,
            check=True,
        )
        peak, found = map(int, done.stdout.split())
        assert found in slots
        assert peak < budget


# --------------------------------------------------------------------------------- the commands
@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options with which the commands stream; the pocket model alone would fit any budget."""
    monkeypatch.setattr(import_module("mlx_kimi.loading.load"), "slots_for", lambda *_: 6)
    return ["--memory-budget", "8GB"]


@pytest.mark.slow
def test_generate_says_what_reading_experts_cost(few_slots: list[str]) -> None:
    asked = ("What is KDA?", "--max-tokens", "20")
    plain = CliRunner().invoke(COMMANDS["generate"], asked)
    streamed = CliRunner().invoke(COMMANDS["generate"], [*asked, *few_slots])
    assert streamed.exit_code == 0
    assert streamed.stdout == plain.stdout
    assert re.search(
        r"experts \d\d\.\d% in memory, 0\.\d\d MB a token read, waited", streamed.stderr
    )
    assert "experts" not in plain.stderr
    result = CliRunner().invoke(COMMANDS["generate"], [*asked, *few_slots, "--json"])
    experts = json.loads(result.stdout)["experts"]
    assert experts["asked"] == 19 * 7 * 2
    assert 0 < experts["read"] < experts["asked"]


@pytest.mark.slow
def test_an_answer_goes_on_after_a_stop(few_slots: list[str]) -> None:
    model, tokenizer = load(pocket_folder(), ROOMY)
    whole = load_model(pocket_folder())
    state = TokenState(model)
    stream = stream_generate(model, tokenizer, "Sort: pear, fig, kiwi", state=state)
    first = [next(stream).token for _ in range(4)]
    stream.close()
    assert state.ids[-3:] == first[:3]  # the fourth is not read before it is asked for
    again = [
        c.token for c in stream_generate(model, tokenizer, [*state.ids, first[3]], state=state)
    ]
    expected = stream_generate(whole, tokenizer, "Sort: pear, fig, kiwi")
    assert first + again == [c.token for c in expected]


@pytest.mark.slow
def test_bench_measures_a_budget(few_slots: list[str]) -> None:
    result = CliRunner().invoke(
        COMMANDS["bench"], ["--contexts", "32", "--tokens", "4", *few_slots]
    )
    assert result.exit_code == 0
    assert re.search(r"experts \d\d\.\d% in memory", result.stdout)


def test_bench_measures_no_context_beyond_its_budget() -> None:
    options = ["--contexts", "60", "--tokens", "4", "--memory-budget", "8GB", "--context", "64"]
    result = CliRunner().invoke(COMMANDS["bench"], options)
    assert str(result.exception) == (
        "a context must have from 1 to 59 tokens but has 60: --context holds 64, and 5 follow"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--memory-budget", "10"), "'10' is no size with a unit (kB, MB, GB, KiB, MiB, GiB)"),
        (("--memory-budget", "-3GB"), "'-3GB' is no size with a unit"),
        (("--memory-budget", "many GB"), "'many GB' is no size with a unit"),
        (("--context", "100"), "--context is what --memory-budget leaves room for"),
        (("--memory-budget", "8GB", "--context", "0"), "0 is not in the range x>=1"),
    ],
)
def test_bad_budgets_are_one_line(options: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(COMMANDS["generate"], ["x", *options])
    assert result.exit_code == 2
    assert said in result.stderr
