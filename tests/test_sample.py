"""Samplers against the distributions they stand for."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.generation.sample import Sampler, Sampling

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


def test_the_penalty_lowers_tokens_of_the_prompt_and_of_the_answer() -> None:
    sampler = Sampler(Sampling(repetition_penalty=10.0), [0], len(LOGITS))
    tokens = [int(sampler(mx.array(LOGITS)[None]).item()) for _ in range(3)]
    assert tokens == [4, 1, 0]  # then all that are left are worse than 2.0 / 10
