"""Samplers against the distributions they stand for."""

import random
import re

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.launches import launches
from mlx_kimi.errors import OptionError
from mlx_kimi.generation.sample import (
    BatchSampler,
    Sampler,
    Sampling,
    categorical,
    later_seed,
    uniforms,
)

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 1.5], np.float32)
DRAWS = 4000


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


def kept(p: np.ndarray, keep: list[int]) -> np.ndarray:
    q = np.zeros_like(p)
    q[keep] = p[keep]
    return q / q.sum()


P = softmax(LOGITS)  # most likely first: 0, 4, 1, 2, 3
HOT = softmax(LOGITS / 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temp": 1.0}, P),
        ({"temp": 2.0}, HOT),
        ({"temp": 1.0, "top_k": 2}, kept(P, [0, 4])),
        ({"temp": 1.0, "top_k": 1}, kept(P, [0])),
        ({"temp": 1.0, "top_k": 99}, P),
        ({"temp": 1.0, "top_k": 10**21}, P),
        ({"temp": 1.0, "top_p": 0.01}, kept(P, [0])),
        ({"temp": 1.0, "top_p": float(P[0] + P[4] / 2)}, kept(P, [0, 4])),
        ({"temp": 1.0, "min_p": 0.3}, kept(P, [0, 4, 1])),
        ({"temp": 2.0, "top_k": 3, "min_p": 0.7}, kept(HOT, [0, 4])),
        ({"temp": 1.0, "top_k": 3, "top_p": 0.7}, kept(P, [0, 4])),
        ({"temp": 0.0, "top_k": 3}, kept(P, [0])),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options, expected) -> None:
    sampler = Sampler(Sampling(seed=1, **options), [], len(LOGITS))
    tokens = mx.concatenate([sampler(mx.array(LOGITS)[None]) for _ in range(DRAWS)])
    shares = np.bincount(np.array(tokens), minlength=len(LOGITS)) / DRAWS
    # Five standard deviations of a share over DRAWS draws.
    bound = 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9
    assert (np.abs(shares - expected) <= bound).all(), (shares, expected)


def test_unlikely_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should() -> None:
    vocab, each = 163_840, 1e-8
    tail = each * (vocab - 1)
    logits = mx.log(mx.array([1 - tail] + [each] * (vocab - 1)))[None]
    high = [0.99 + 0.01 * n / 200 for n in range(200)]  # the tail is the highest 0.16 %
    tokens = [categorical(logits, mx.array([[x, 0.5]])) for x in high]
    blocks = np.array(mx.concatenate(tokens)) // 512
    # Of what the last 0.16 % of [0, 1) mean: 320 blocks alike, whose shares float32 rounds.
    expected = [max(0, x - (1 - tail)) / tail * 320 for x in high]
    assert np.abs(blocks - np.floor(expected)).max() <= 1
    assert blocks.max() > 300


@pytest.mark.parametrize("vocab", [2, 511, 512, 1500, 163_840])
@pytest.mark.parametrize("u", [(0.0, 0.0), (1 - 2**-24, 1 - 2**-24), (0.0, 1 - 2**-24)])
def test_what_may_not_follow_is_never_drawn(vocab: int, u: tuple[float, float]) -> None:
    logits = mx.random.normal((4, vocab), key=mx.random.key(vocab)) * 5
    choose = np.random.default_rng(vocab)
    allowed = choose.random((4, vocab)) < [[0.5], [0.01], [0.99], [0.0]]
    allowed[:, [0, -1]] = False
    allowed[np.arange(4), choose.integers(0, vocab, 4)] = True
    logits = mx.where(mx.array(allowed), logits, -mx.inf)
    tokens = np.array(categorical(logits, mx.array([u] * 4)))
    assert allowed[np.arange(4), tokens].all()


def test_a_seed_means_the_same_tokens_in_later_releases() -> None:
    logits = mx.array(np.linspace(0, 6, 4000, dtype=np.float32))[None]
    sampler = Sampler(Sampling(temp=1.0, seed=7), [], 4000)
    tokens = [int(sampler(logits).item()) for _ in range(8)]
    assert uniforms(7, 0) == (0.8720734715461731, 0.35969477891921997)
    assert tokens == [3764, 2495, 1512, 3094, 2171, 3438, 3737, 3283]


def test_sixteen_rows_take_as_many_launches_as_one() -> None:
    def count(rows: int) -> int:
        samplers = [Sampler(Sampling(temp=1.0, seed=row), [], 4096) for row in range(rows)]
        return sum(launches(BatchSampler(samplers)(mx.zeros((rows, 4096)))).values())

    assert count(16) == count(1) <= 24


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("seed", 1.5, "must be an integer but is 1.5"),
        ("seed", True, "must be an integer but is True"),
        ("seed", 2**64, "must be from 0 to 2^64 - 1 but is 18446744073709551616"),
        ("top_k", 2.7, "must be an integer but is 2.7"),
        ("top_k", None, "must be an integer but is None"),
        ("temp", "1", "must be a number but is '1'"),
        ("min_p", float("nan"), "must be from 0 to 1 but is nan"),
    ],
)
def test_another_type_or_value_is_named(option: str, value: object, rule: str) -> None:
    with pytest.raises(OptionError, match=f"^{option} {re.escape(rule)}$"):
        Sampling(**{option: value})


def test_after_the_largest_seed_comes_the_smallest() -> None:
    assert [later_seed(2**64 - 2, number) for number in range(4)] == [2**64 - 2, 2**64 - 1, 0, 1]
    assert later_seed(2**64, 0) == 2**64, "whoever gave it is told of it"


def test_uniforms_are_never_0_nor_1_in_float32() -> None:
    drawn = np.array([uniforms(5, position) for position in range(3000)])
    assert (drawn.astype(np.float32) == drawn).all() and ((0 < drawn) & (drawn < 1)).all()
    assert (drawn * 2**24 % 2 == 1).all()
    # Uniform: the mean of 6,000 numbers errs by 0.289 / 77; five times that.
    assert abs(drawn.mean() - 0.5) < 0.019 and abs(drawn.std() - 12**-0.5) < 0.01


def test_the_penalty_lowers_tokens_of_the_prompt_and_of_the_answer() -> None:
    sampler = Sampler(Sampling(repetition_penalty=10.0), [0], len(LOGITS))
    tokens = [int(sampler(mx.array(LOGITS)[None]).item()) for _ in range(3)]
    assert tokens == [4, 1, 0]  # then all that are left are worse than 2.0 / 10


OPTIONS = [
    Sampling(),
    Sampling(repetition_penalty=1.4),
    Sampling(temp=1.0, seed=1),
    Sampling(temp=0.7, seed=2, top_k=20),
    Sampling(temp=1.3, seed=3, top_p=0.9, repetition_penalty=1.1),
    Sampling(temp=0.9, seed=4, min_p=0.02),
    Sampling(temp=2.0, seed=5, top_k=300, top_p=0.8, min_p=0.01, repetition_penalty=0.8),
    Sampling(temp=1.0, seed=2**63, top_k=10**21),
]


def test_a_row_draws_what_its_sampler_draws_alone_whoever_joins_and_leaves() -> None:
    vocab, choose = 500, random.Random(0)
    logits = mx.random.normal((60, vocab), key=mx.random.key(0)) * 3
    prompts = [[place, 7 * place] for place in range(len(OPTIONS))]
    alone = [Sampler(s, ids, vocab) for s, ids in zip(OPTIONS, prompts, strict=True)]
    rows = [0, 1, 2]
    batch = BatchSampler([Sampler(OPTIONS[row], prompts[row], vocab) for row in rows])
    drawn: list[list[int]] = [[] for _ in OPTIONS]
    for step in range(60):
        missing = [row for row in range(len(OPTIONS)) if row not in rows]
        if missing and choose.random() < 0.5:
            row = choose.choice(missing)  # it was here before, perhaps: it goes on
            sampler = Sampler(OPTIONS[row], prompts[row], vocab)
            sampler.skip(drawn[row])
            batch.join(BatchSampler([sampler]))
            rows.append(row)
        if len(rows) > 1 and choose.random() < 0.4:
            kept = choose.sample(range(len(rows)), len(rows) - 1)
            batch.take(kept)
            rows = [rows[place] for place in kept]
        given = mx.stack([mx.roll(logits[step], 13 * row) for row in rows])
        tokens = batch(given).tolist()
        assert tokens == [
            alone[row](given[place : place + 1]).item() for place, row in enumerate(rows)
        ]
        for row, token in zip(rows, tokens, strict=True):
            drawn[row].append(token)
    assert min(map(len, drawn)) > 5
