"""Logits -> the next token, on the device."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlx_kimi.errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The order is: repetition penalty, temperature, top-k, top-p, min-p.

    `temp` 0 takes the most likely token. `top_k` 0, `top_p` 1, `min_p` 0 and
    `repetition_penalty` 1 leave the distribution as it is. `seed` None takes 32 random bits.
    """

    temp: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("temp", self.temp == 0 or 1e-3 <= self.temp <= 1e3, "0, or from 0.001 to 1000"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 1e-2 <= self.repetition_penalty <= 1e2, "from 0.01 to 100"),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 64, "from 0 to 2^64 - 1"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise OptionError(name, f"must be {rule} but is {getattr(self, name)}")


class Draw(NamedTuple):
    """A token that was drawn, and that the device may still be computing."""

    token: mx.array  # [1]
    lse: mx.array  # [1], the logsumexp of its logits: finite unless one is NaN or +infinity


class Sampler:
    """Chooses one token after another; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, prompt: list[int], vocab_size: int) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._key = mx.random.key(self.seed)
        self._seen: mx.array | None = None
        if sampling.repetition_penalty != 1:
            seen = mx.zeros((vocab_size,), mx.bool_)
            seen[mx.array(prompt)] = True
            self._seen = seen

    def __call__(self, logits: mx.array) -> mx.array:
        """logits [1, vocab] -> token [1]; nothing is computed yet."""
        s = self.sampling
        logits = logits.astype(mx.float32)
        if self._seen is not None:
            penalized = mx.where(
                logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty
            )
            logits = mx.where(self._seen, penalized, logits)
        token = mx.argmax(logits, axis=-1) if s.temp == 0 else self._draw(logits / s.temp)
        if self._seen is not None:
            self._seen = self._seen | (mx.arange(self._seen.size) == token)
        return token

    def _draw(self, logits: mx.array) -> mx.array:
        self._key, key = mx.random.split(self._key)
        s = self.sampling
        if s.top_k or s.top_p < 1 or s.min_p:
            logits = _filtered(logits, s)
        return mx.random.categorical(logits, key=key)


def _filtered(logits: mx.array, s: Sampling) -> mx.array:
    """logits [1, vocab] float32 with -inf where top-k, top-p or min-p exclude a token.

    The most likely token always stays.
    """
    order = mx.argsort(-logits, axis=-1)
    p = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1)  # most likely first
    keep = mx.ones(p.shape, mx.bool_)
    if s.top_k:
        keep = keep & (mx.arange(p.shape[-1]) < min(s.top_k, p.shape[-1]))
        p = mx.where(keep, p, 0)
        p = p / p.sum(axis=-1, keepdims=True)
    if s.top_p < 1:
        before = mx.cumsum(p, axis=-1) - p  # the share of the tokens that are more likely
        keep = keep & (before < s.top_p)
    if s.min_p:
        keep = keep & (p >= s.min_p * p[..., :1])
    place = mx.argsort(order, axis=-1)
    return mx.where(mx.take_along_axis(keep, place, axis=-1), logits, -mx.inf)
