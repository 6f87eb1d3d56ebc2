"""Going back within a step of several tokens: the state is that of the first of them alone."""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.loading.load import load_model
from mlx_kimi.metal_kernels.kernel import use_backend
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import TAIL, CacheEntry, KDACache, LatentCache
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.steps import Step, keep_first
from tests.assertions import assert_close, assert_same_bits
from tests.emulated import emulator
from tests.reference_backend import reference_backend

Models = Callable[[str], KimiLinear]
# Float32, in another order: several tokens take products of several rows, and chunks.
STATE_RMS, STATE_LARGEST, LOGITS = 5e-6, 5e-5, 1e-4
BACKENDS = {"operations": None, "kernels": emulator, "compiled": reference_backend}


@pytest.fixture(params=["operations", "compiled"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which form steps take; the emulator, which is slow, has a test of its own."""
    with use_backend(BACKENDS[request.param], traced=request.param == "compiled"):
        yield request.param


@pytest.fixture(scope="module")
def pocket() -> KimiLinear:
    return load_model(pocket_folder())


def ids(T: int, B: int = 1, seed: int = 0) -> mx.array:
    return mx.random.randint(0, 90, (B, T), key=mx.random.key(seed))


def prompted(
    model: KimiLinear, length: int, bits: int | None = None, B: int = 1
) -> list[CacheEntry]:
    cache = model.make_cache(bits)
    with use_backend(None):
        model(ids(length, B, 1), cache)
    mx.eval(caches.arrays(cache))
    return cache


def assert_same_state(one: list[CacheEntry], other: list[CacheEntry]) -> None:
    for number, (ours, expected) in enumerate(zip(one, other, strict=True)):
        where = f"layer {number}"
        assert ours.lengths == expected.lengths, where
        if isinstance(ours, KDACache):
            assert isinstance(expected, KDACache)
            assert_close(where, ours.state, expected.state, STATE_LARGEST, STATE_RMS)
            assert_close(where, ours.conv_tail, expected.conv_tail, STATE_LARGEST, STATE_RMS)
        else:
            assert isinstance(expected, LatentCache)
            for text in range(len(ours.lengths)):
                mine, others = ours.segments(text), expected.segments(text)
                assert [s.size for s in mine] == [s.size for s in others]
                for a, b in zip(mine, others, strict=True):
                    if a.latents.dtype != mx.uint32:  # (codes of 8 bits may differ by one)
                        assert_close(where, a.rows, b.rows, STATE_LARGEST, STATE_RMS)


def one_by_one(model: KimiLinear, tokens: mx.array, cache: list[CacheEntry]) -> list[mx.array]:
    logits = []
    for t in range(tokens.shape[1]):
        logits.append(model(tokens[:, t : t + 1], cache))
        mx.eval(logits[-1], caches.arrays(cache))
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("length", [5, TAIL - 3])
@pytest.mark.parametrize("T", [2, 5, 8])
def test_the_first_tokens_of_a_step_are_as_if_read_alone(
    pocket: KimiLinear, backend: str, T: int, length: int
) -> None:
    """Across the freezing of a tail, too, which a step may have to take back."""
    tokens, following = ids(T, seed=T), ids(2, seed=7)
    cache, steps = prompted(pocket, length), list[Step]()
    together = pocket.hidden(tokens, cache, steps=steps)
    assert len(steps) == len(cache)
    for n in (T, 1, T - 1):  # it may be asked again, and for more than before
        keep_first(cache, steps, n)
        expected = prompted(pocket, length)
        apart = one_by_one(pocket, tokens[:, :n], expected)
        assert_close("step", pocket.logits(together[:, n - 1 : n]), apart[-1], LOGITS)
        assert_same_state(cache, expected)
    ours = one_by_one(pocket, following, cache)
    for a, b in zip(ours, one_by_one(pocket, following, expected), strict=True):
        assert_close("what follows", a, b, LOGITS)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("B", [1, 2])
def test_random_steps_of_which_random_parts_are_kept(
    pocket: KimiLinear, backend: str, B: int, bits: int | None
) -> None:
    random_steps(pocket, B, bits, rounds=8)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 8])
def test_kernels_take_random_steps(pocket: KimiLinear, bits: int | None) -> None:
    with use_backend(emulator):
        random_steps(pocket, 1, bits, rounds=2)


@pytest.mark.parametrize(("B", "T"), [(1, 5), (2, 8)])
def test_a_few_tokens_of_a_prompt_are_read_as_those_of_a_step(
    pocket: KimiLinear, B: int, T: int
) -> None:
    tokens = ids(T, B)
    with use_backend(reference_backend, traced=True):
        caches_before = [prompted(pocket, 9, B=B) for _ in range(2)]
        read = pocket.hidden(tokens, caches_before[0])
        assert any(shapes[0] == (B, T) for shapes in pocket.compiled._graphs), "a graph took them"
        assert_same_bits("hidden", read, pocket.hidden(tokens, caches_before[1], steps=[]))


def random_steps(pocket: KimiLinear, B: int, bits: int | None, rounds: int) -> None:
    rng = np.random.default_rng(B)
    cache, plain = (prompted(pocket, TAIL - 20, bits, B) for _ in range(2))
    for round in range(rounds):
        T = int(rng.integers(2, 9))
        tokens, steps = ids(T, B, 10 + round), list[Step]()
        logits = pocket.logits(pocket.hidden(tokens, cache, steps=steps))
        n = int(rng.integers(1, T + 1))
        if n < T:
            keep_first(cache, steps, n)
        apart = mx.concatenate(one_by_one(pocket, tokens[:, :n], plain), axis=1)
        assert_close(f"round {round}", logits[:, :n], apart, 2e-2 if bits else LOGITS)
        if bits is None:
            assert_same_state(cache, plain)


@pytest.mark.slow
def test_a_snapshot_before_or_after_a_step_is_not_touched(pocket: KimiLinear, backend: str) -> None:
    cache, steps = prompted(pocket, 9), list[Step]()
    before = caches.snapshot(cache)
    pocket.hidden(ids(4), cache, steps=steps)
    after = caches.snapshot(cache)
    kept = [np.array(a) for a in caches.arrays(before) + caches.arrays(after)]
    keep_first(cache, steps, 2)
    one_by_one(pocket, ids(3), cache)
    for a, b in zip(caches.arrays(before) + caches.arrays(after), kept, strict=True):
        assert_same_bits("snapshot", a, b)


@pytest.mark.slow
def test_a_rows_bits_do_not_depend_on_the_others(pocket: KimiLinear, backend: str) -> None:
    tokens, other = ids(4, 2, 3), ids(4, 2, 4)
    other = mx.concatenate([tokens[:1], other[1:]])
    found = []
    for each in (tokens, other):
        cache, steps = prompted(pocket, 9, B=2), list[Step]()
        hidden = pocket.hidden(each, cache, steps=steps)[:1]
        keep_first(cache, steps, 2)
        found.append([hidden, *(a[:1] for a in caches.arrays(cache))])
    for a, b in zip(*found, strict=True):
        assert_same_bits("row 0", a, b)


def test_steps_are_of_several_unpadded_tokens(model: Models) -> None:
    tiny = model("tiny")
    for T, lengths in ((1, None), (3, [2])):
        with pytest.raises(ValueError, match=f"must be of 2 tokens or more, .* T is {T}"):
            tiny.hidden(ids(T), tiny.make_cache(), lengths, steps=[])


def test_from_nothing(model: Models) -> None:
    tiny = model("tiny")
    cache, expected, steps = tiny.make_cache(), tiny.make_cache(), list[Step]()
    tiny.hidden(ids(6), cache, steps=steps)
    keep_first(cache, steps, 2)
    tiny(ids(6)[:, :2], expected)
    assert_same_state(cache, expected)
