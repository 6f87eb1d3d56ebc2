"""Contexts: what is kept, what may be gone back to, and what that costs."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_kimi import load
from mlx_kimi.generation.context import TokenState, common_prefix
from mlx_kimi.generation.generate import stream_generate
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import LatentCache
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import Tokenizer
from tests.assertions import assert_close


@pytest.fixture(scope="module")
def loaded(talker: Path) -> tuple[KimiLinear, Tokenizer]:
    return load(talker)


def answer(loaded, context: TokenState, ids: list[int], count: int = 4, **options) -> int:
    """Generate after `ids`; how many of them were not read again."""
    *_, last = stream_generate(*loaded, ids, max_tokens=count, context=context, **options)
    return last.stats.cached_tokens


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 5, 3]) == 1


def test_turns_begin_and_end_with_a_snapshot(loaded) -> None:
    context = TokenState(loaded[0])
    answer(loaded, context, [1] * 20)
    end_of_answer = len(context.ids)
    answer(loaded, context, [*context.ids, *[2] * 10])
    assert [s.length for s in context.snapshots] == [20, end_of_answer, end_of_answer + 10]


def test_any_kept_state_is_gone_back_to_without_reading(loaded) -> None:
    context = TokenState(loaded[0])
    ends = []
    for turn in range(5):
        answer(loaded, context, [*context.ids, *[turn + 1] * 10])
        ends.append(list(context.ids))
    for end in reversed(ends[:-1]):
        assert answer(loaded, context, [*end, 70, 71]) == len(end)


def test_long_turns_have_snapshots_within(loaded) -> None:
    context = TokenState(loaded[0], every=16)
    answer(loaded, context, [1] * 50, count=40, prefill_step=8)
    assert [s.length for s in context.snapshots] == [16, 32, 48, 50, 66, 82]
    assert answer(loaded, context, [*[1] * 40, 9]) == 32


@pytest.mark.slow
def test_the_memory_of_snapshots_is_bounded(loaded) -> None:
    one = sum(a.nbytes for a in caches.arrays(_after(loaded, 40).entries))
    context = TokenState(loaded[0], memory=3 * one)
    for turn in range(30):
        answer(loaded, context, [*context.ids, *[turn + 1] * 10], count=2)
        assert context.snapshot_bytes <= context.memory
    lengths = [s.length for s in context.snapshots]
    assert 2 <= len(lengths) < 30
    assert lengths[-1] > len(context.ids) - 12, "the newest is kept"


def _after(loaded, count: int) -> TokenState:
    context = TokenState(loaded[0])
    answer(loaded, context, [1] * count, count=2)
    return context


def test_what_snapshots_share_counts_once(loaded) -> None:
    context = _after(loaded, 600)
    context.snapshots.clear()
    context.keep()
    context.snapshots.append(replace(context.snapshots[0], length=1))
    held = [entry for entry in context.entries if isinstance(entry, LatentCache)]
    frozen = sum(a.nbytes for entry in held for s in entry.frozen for a in s.arrays())
    assert frozen > 0
    everything = sum(a.nbytes for a in caches.arrays(context.entries))
    assert context.snapshot_bytes == everything - frozen


def test_a_state_gone_back_to_is_that_of_its_tokens(loaded) -> None:
    model, _ = loaded
    context = TokenState(model, every=8)
    answer(loaded, context, list(range(1, 60)), prefill_step=4)
    ids = [*range(1, 30), 80, 81, 82]
    assert context.rewind_to_prefix_of(ids) is None
    hidden = context.forward(mx.array([ids[len(context.ids) :]]))
    # float32, and splits of a sequence differ by rounding alone
    assert_close("logits", model.logits(hidden[:, -1]), model(mx.array([ids]))[:, -1], 1e-4)
