"""State is sound: snapshots hold, branches do not meet, and time and memory stay flat."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.loading.load import load_model
from mlx_kimi.metal_kernels.split_kv import SEGMENTS
from mlx_kimi.model import cache
from mlx_kimi.model.cache import CacheEntry, KDACache, LatentCache, Segment
from mlx_kimi.model.kimi_linear import KimiLinear
from tests.assertions import assert_close, assert_same_bits
from tests.checkpoints import published_config, write_checkpoint
from tests.processes import live_memory

Models = Callable[[str], KimiLinear]
STEPS = [1, 1, 1, 2, 5, 16, 17, 64, 180, 300]  # tokens


class Steps:
    """Random steps of one model, each a function of the generator's seed."""

    def __init__(self, model: KimiLinear, seed: int, B: int = 2) -> None:
        self.model, self.rng, self.B = model, random.Random(seed), B

    def ids(self, T: int) -> mx.array:
        vocab = self.model.config.vocab_size
        return mx.array([[self.rng.randrange(vocab) for _ in range(T)] for _ in range(self.B)])

    def take(self, entries: list[CacheEntry], count: int) -> list[np.ndarray]:
        """The logits of `count` random steps, some of them padded."""
        logits = []
        for _ in range(count):
            T = self.rng.choice(STEPS)
            lengths = [self.rng.randint(0, T) for _ in range(self.B)]
            padded = self.rng.random() < 0.3
            logits.append(self.model(self.ids(T), entries, lengths=lengths if padded else None))
            mx.async_eval(logits[-1], *cache.arrays(entries))
        return [np.array(x) for x in logits]


def assert_same_logits(ours: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> None:
    for step, (a, b) in enumerate(zip(ours, others, strict=True)):
        assert_same_bits(f"step {step}", a, b)


# ------------------------------------------------------------------------------- snapshots
@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 1, 4])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_a_restored_snapshot_gives_the_same_logits_bit_for_bit(
    model: Models, name: str, seed: int, before: int
) -> None:
    entries = model(name).make_cache()
    Steps(model(name), seed).take(entries, before)
    saved = cache.snapshot(entries)
    first = Steps(model(name), seed + 100).take(entries, 4)
    for _ in range(2):
        cache.restore(entries, saved)
        assert_same_logits(Steps(model(name), seed + 100).take(entries, 4), first)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_two_branches_of_a_snapshot_do_not_meet(model: Models, seed: int) -> None:
    tiny = model("tiny")
    trunk = tiny.make_cache()
    Steps(tiny, seed).take(trunk, 3)

    def branches() -> Iterator[tuple[list[CacheEntry], Steps]]:
        for number in (1, 2):
            yield cache.snapshot(trunk), Steps(tiny, 10 * seed + number)

    alone = [steps.take(entries, 6) for entries, steps in branches()]
    (one, steps_one), (two, steps_two) = branches()
    mixed: list[list[np.ndarray]] = [[], []]
    for _ in range(6):
        mixed[0] += steps_one.take(one, 1)
        mixed[1] += steps_two.take(two, 1)
    for ours, expected in zip(mixed, alone, strict=True):
        assert_same_logits(ours, expected)


@pytest.mark.slow
def test_a_snapshot_survives_taking_and_joining(model: Models) -> None:
    odd = model("odd")
    entries = odd.make_cache()
    Steps(odd, 1).take(entries, 2)
    saved = cache.snapshot(entries)
    expected = Steps(odd, 2).take(cache.snapshot(saved), 3)
    taken = cache.take(entries, [1])
    joined = cache.join([entries, taken])
    Steps(odd, 3, B=3).take(joined, 2)
    Steps(odd, 4, B=1).take(taken, 2)
    cache.restore(entries, saved)
    assert_same_logits(Steps(odd, 2).take(entries, 3), expected)


def test_a_snapshot_costs_no_memory(model: Models) -> None:
    entries = model("tiny").make_cache()
    Steps(model("tiny"), 0).take(entries, 5)
    mx.eval(cache.arrays(entries))
    before = live_memory()
    saved = [cache.snapshot(entries) for _ in range(100)]
    mx.eval([cache.arrays(x) for x in saved])
    assert mx.get_active_memory() == before


# ------------------------------------------------------------------------------- latent cache
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_latents_come_back_in_order_however_they_came(seed: int, B: int) -> None:
    rng = random.Random(seed)
    entry, texts = LatentCache(), [np.zeros(0, np.int64)] * B
    while len(texts[0]) < 9000:
        size = rng.choice([1, 1, 3, 255, 256, 257, 1000, 2048])
        latents = np.random.default_rng(len(texts[0])).integers(0, 1 << 30, (B, size))
        counts = [rng.randint(0, size) for _ in range(B)] if rng.random() < 0.3 else [size] * B
        entry.append(mx.array(latents[..., None]), None if counts == [size] * B else counts)
        texts = [
            np.concatenate([text, new[:n]])
            for text, new, n in zip(texts, latents, counts, strict=True)
        ]
        assert [entry.positions(b) for b in range(B)] == [len(text) for text in texts]
        assert all(held < cache.TAIL for held in entry.held)
    for b, text in enumerate(texts):
        whole = Segment.concatenate(entry.segments(b)).rows
        assert_same_bits("latents", whole[0, :, 0], text.astype(np.int64))


@pytest.fixture(scope="module")
def decoded() -> tuple[list[float], list[int], int]:
    """20,000 pipelined appends: CPU seconds and active bytes at each, and bytes of a latent."""
    width, entry = 144, LatentCache()
    seconds, active = [], []
    for token in range(20_000):
        seconds.append(time.process_time())  # of all threads; other programs do not count
        entry.append(mx.full((1, 1, width), token, mx.float32))
        mx.async_eval(*entry.arrays())
        active.append(mx.get_active_memory())
    mx.eval(entry.arrays())
    assert entry.positions(0) == 20_000
    return seconds, active, width * 4


@pytest.mark.alone
def test_appending_stays_flat_in_time(decoded: tuple[list[float], list[int], int]) -> None:
    seconds = decoded[0]
    early, late = seconds[3000] - seconds[1000], seconds[-1] - seconds[-2001]
    # A cache that is copied at every step takes 10 to 18 times as long; where three other programs
    # fight for two cores, equal work was seen to differ by 2.
    assert late < 4 * early


def test_appending_takes_the_memory_of_the_latents(
    decoded: tuple[list[float], list[int], int],
) -> None:
    _, active, latent = decoded
    grown = active[-1] - active[1999]
    # Besides the latents: tails of up to 256 tokens that steps in flight still read, and a merge
    # of segments, of which the last 2048 tokens may be held twice.
    room = (2048 + 8 * 256) * latent
    assert 18_000 * latent - room < grown < 18_000 * latent + room


def test_a_million_tokens_are_few_segments_and_few_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Latents are the numbers of their tokens, so that each copy says whose it was."""
    total = 1 << 20
    copies = np.zeros(total + 8192, np.int8)
    concatenate, freezing = Segment.concatenate, [False]
    freeze = cache._merged

    def counted(segments: Sequence[Segment]) -> Segment:
        if freezing[0] and len(segments) > 1:
            for segment in segments:
                first, last = segment.rows[0, 0, 0].item(), segment.rows[0, -1, 0].item()
                copies[first : last + 1] += 1
        return concatenate(segments)

    def frozen(old: tuple[Segment, ...], new: Segment) -> tuple[Segment, ...]:
        freezing[0] = True
        try:
            return freeze(old, new)
        finally:
            freezing[0] = False

    monkeypatch.setattr(Segment, "concatenate", staticmethod(counted))
    monkeypatch.setattr(cache, "_merged", frozen)
    rng, entry, start, most = random.Random(0), LatentCache(), 0, 0
    while start < total:
        sizes = rng.choice([[2048] * 20, [1] * 300, [256] * 9, [8192], [5, 700, 1300]])
        for size in sizes:
            entry.append(mx.arange(start, start + size)[None, :, None])
            start += size
        mx.eval(entry.arrays())
        most = max(most, len(entry.frozen[0]))
    assert most <= SEGMENTS
    assert 0 < copies.max() <= 5
    whole = concatenate(entry.segments(0)).rows[0, :, 0]
    assert mx.array_equal(whole, mx.arange(start))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 255, 256, 2048])
def test_segments_stay_few_for_appends_of_one_size(size: int) -> None:
    entry, tokens = LatentCache(), 60_000 if size < 256 else 1 << 20
    row = mx.zeros((1, size, 1), mx.int8)
    for step in range(tokens // size):
        entry.append(row)
        if step % 500 == 0:
            mx.eval(entry.arrays())
            assert len(entry.frozen[0]) <= SEGMENTS
    assert entry.positions(0) == tokens // size * size


def test_frozen_segments_are_left_alone_by_an_append() -> None:
    entry = LatentCache()
    entry.append(mx.zeros((1, 5000, 4)))
    before = entry.frozen[0]
    for _ in range(100):
        entry.append(mx.zeros((1, 1, 4)))
    assert all(a is b for a, b in zip(entry.frozen[0], before, strict=True))


@pytest.mark.parametrize("size", [256 + 200, 256 * 8 + 255])
def test_segments_keep_no_more_memory_than_their_own(size: int) -> None:
    """A slice keeps its whole parent alive: the parts of one append must be copies."""
    before = live_memory()
    entry = LatentCache()
    entry.append(mx.random.normal((1, size, 64)))
    mx.eval(entry.arrays())
    own = sum(array.nbytes for array in entry.arrays())
    assert own == size * 64 * 4
    # 16 KB: small arrays of earlier tests, which may go later than their last reference. A parent
    # that stayed alive would add at least as much as `own`.
    assert mx.get_active_memory() - before < 1.05 * own + 16_384


# --------------------------------------------------------------------------- texts of one batch
@pytest.mark.parametrize("seed", range(3))
def test_texts_that_come_and_go_keep_their_latents(seed: int) -> None:
    """Whatever is pooled, shared or dropped meanwhile; what nobody has any more is not kept."""
    rng = random.Random(seed)
    tokens = iter(range(1 << 30))

    def new(count: int) -> list[int]:
        return list(islice(tokens, count))

    def appended(entry: LatentCache, texts: list[list[int]], more: list[list[int]]) -> None:
        longest = max(map(len, more))
        rows = [[*ids, *[-1] * (longest - len(ids))] for ids in more]
        entry.append(mx.array(rows)[..., None], [len(ids) for ids in more])
        for text, ids in zip(texts, more, strict=True):
            text += ids
        entry.lengths = tuple(map(len, texts))

    def begun() -> tuple[LatentCache, list[list[int]]]:
        entry, texts = LatentCache(), [[]]
        for _ in range(rng.randint(1, 4)):
            appended(entry, texts, [new(rng.choice([5, 256, 700, 3000]))])
        return entry, texts

    entry, texts = begun()
    for _ in range(150):
        if len(texts) < 12 and rng.random() < 0.5:
            # A new text, or another one that goes on from the same tokens as one that is there.
            row = rng.randrange(len(texts))
            other, known = (entry.take([row]), [texts[row]]) if rng.random() < 0.3 else begun()
            entry, texts = LatentCache.join([entry, other]), [*texts, *map(list, known)]
        elif len(texts) > 1 and rng.random() < 0.5:
            stay = rng.sample(range(len(texts)), rng.randint(1, len(texts)))
            entry, texts = entry.take(stay), [texts[row] for row in stay]
        appended(entry, texts, [new(rng.choice([0, 1, 1, 1, 250])) for _ in texts])
        if rng.random() < 0.5 and entry.room:
            tail = np.array(entry.roomy_tail(len(texts), 1, mx.int32))
            for row, text in enumerate(texts):
                text += new(1)
                tail[row, entry.held[row]] = text[-1]
            entry.grow_tail(mx.array(tail))
            entry.lengths = tuple(map(len, texts))
        for row, text in enumerate(texts):
            whole = Segment.concatenate(entry.segments(row)).rows[0, :, 0].tolist()
            assert whole == text
        small = [a for a in entry.frozen_arrays if a.shape[1] <= cache.POOLED]
        assert len(small) <= SEGMENTS or len(texts) == 1
        unique = {(id(s.latents), s.start, s.size) for own in entry.frozen for s in own}
        used = sum(size for _, _, size in unique)
        assert sum(a.shape[1] for a in entry.frozen_arrays) <= 2 * used


def test_texts_that_join_share_what_they_have_read() -> None:
    """Nothing frozen is copied: not for a text that goes on from another's tokens."""
    entry = LatentCache()
    entry.append(mx.zeros((1, 5000, 4)))
    entry.lengths = (5000,)
    joined = LatentCache.join([entry, entry.snapshot(), entry.snapshot()])
    assert all(a is b for a, b in zip(joined.frozen_arrays, entry.frozen_arrays, strict=True))
    joined.append(mx.zeros((3, 300, 4)))
    assert [id(a) for a in entry.frozen_arrays] == [id(s.latents) for s in entry.frozen[0]]


# -------------------------------------------------------------------------------- whole models
@pytest.mark.slow
def test_a_kda_cache_is_constant_in_size(model: Models) -> None:
    entries = model("odd").make_cache()
    sizes = set()
    for T in (1, 1, 2, 3, 300, 1, 17):
        model("odd")(mx.zeros((2, T), mx.int32), entries)
        sizes.add(
            tuple(array.shape for x in entries if isinstance(x, KDACache) for array in x.arrays())
        )
    assert len(sizes) == 1


@pytest.mark.slow
def test_two_thousand_decode_steps_keep_memory_flat_but_for_latents(tmp_path: Path) -> None:
    live_memory()  # frees what earlier tests left
    two_layers = published_config(kda_layers=[1], full_attn_layers=[2])
    tiny = load_model(write_checkpoint(tmp_path, two_layers))
    entries, ids, active = tiny.make_cache(), mx.array([[1]]), []
    for _ in range(2000):
        logits = tiny(ids, entries)
        ids = mx.argmax(logits, axis=-1)
        mx.async_eval(ids, *cache.arrays(entries))
        active.append(mx.get_active_memory())
    latent = tiny.config.latent_width * 4  # bytes of a token in the one MLA layer
    # The tail of 256 tokens may be held by the steps in flight, of which there are few; what one
    # step leaves behind, even 100 bytes of graph, would be 180 KB.
    grown = max(active[-20:]) - min(active[200:220])
    assert grown < 1800 * latent + 8 * 256 * latent


@pytest.mark.slow
def test_decoding_leaves_a_state_that_another_form_continues(model: Models) -> None:
    """Many single steps and one pass end in the same state, not only in the same logits."""
    odd = model("odd")
    ids = mx.array(np.random.default_rng(0).integers(0, 203, (2, 70)))
    one, many = odd.make_cache(), odd.make_cache()
    odd(ids, one)
    for t in range(70):
        odd(ids[:, t : t + 1], many)
        mx.async_eval(cache.arrays(many))
    for number, (a, b) in enumerate(zip(one, many, strict=True)):
        for ours, other in zip(b.arrays(), a.arrays(), strict=True):
            # Two float32 runs of different forms, five layers deep.
            assert_close(f"layer {number}", ours, other, 1e-4)
