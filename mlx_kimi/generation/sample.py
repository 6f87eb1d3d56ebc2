"""Logits -> the next token, on the device."""

from __future__ import annotations

import copy
import math
import numbers
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_kimi.errors import OptionError
from mlx_kimi.user_files import shown

if TYPE_CHECKING:
    from mlx_kimi.constraints.constraint import Matcher


SEEDS = 1 << 64
BLOCK = 512  # tokens, of `categorical`


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen of those that may follow. The order is: repetition penalty,
    temperature, top-k, top-p, min-p.

    `temp` 0 takes the most likely token. `top_k` 0, `top_p` 1, `min_p` 0 and
    `repetition_penalty` 1 leave the distribution as it is. `seed` None takes 32 random bits.

    Raises:
        OptionError: one is out of its range, or of another type.
    """

    temp: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if (name, value) != ("seed", None):
                check_number(name, value, int if name in ("top_k", "seed") else float)
        rules = (
            ("temp", self.temp == 0 or 1e-3 <= self.temp <= 1e3, "0, or from 0.001 to 1000"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 1e-2 <= self.repetition_penalty <= 1e2, "from 0.01 to 100"),
            ("seed", self.seed is None or 0 <= self.seed < SEEDS, "from 0 to 2^64 - 1"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise OptionError(name, f"must be {rule} but is {getattr(self, name)}")


def check_number(name: str, value: object, kind: type[int] | type[float]) -> None:
    """Refuse an option that is no integer, or no number, as `kind` says."""
    fits = isinstance(value, numbers.Integral if kind is int else numbers.Real)
    if not fits or isinstance(value, bool):
        what = "an integer" if kind is int else "a number"
        raise OptionError(name, f"must be {what} but is {shown(value)}")


class Draw(NamedTuple):
    """A token of each row that was drawn, and that the device may still be computing."""

    token: mx.array  # [B]
    lse: mx.array  # [B], the logsumexp of its logits: finite unless one is NaN or +infinity


class Sampler:
    """Chooses one token after another; the same seed and logits give the same tokens, with any
    version of MLX.

    Attributes:
        matcher: what the tokens must obey; each must be taken by `take` before the next is drawn.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab_size: int,
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling, self.matcher = sampling, matcher
        self._taken = 0  # tokens
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._drawn = 0  # tokens, of the answer
        self._seen: mx.array | None = None
        if sampling.repetition_penalty != 1:
            seen = mx.zeros((vocab_size,), mx.bool_)
            seen[mx.array(list(prompt))] = True
            self._seen = seen

    def __call__(self, logits: mx.array) -> mx.array:
        """logits [1, vocab] -> token [1]; nothing is computed yet."""
        if self.matcher is not None:
            self.matcher.go_back(self._taken)  # where this is drawn again
            logits = masked(logits, [self.matcher.mask])
        return _next_tokens(logits, [self])

    def take(self, token: int) -> bool:
        """Let what the tokens must obey go on by one; False: it may not follow."""
        if self.matcher is None:
            return True
        self.matcher.go_back(self._taken)
        is_taken = self.matcher.take(token)
        self._taken += is_taken
        return is_taken

    def skip(self, tokens: Sequence[int]) -> None:
        """Go on as if these had been drawn."""
        self._drawn += len(tokens)
        if self._seen is not None and tokens:
            seen = self._seen[...]  # another array: the first may be held elsewhere
            seen[mx.array(list(tokens))] = True
            self._seen = seen


class BatchSampler:
    """Chooses a token for each of several rows: the one that the row's own `Sampler` would choose.

    Rows join and leave between two calls.
    """

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        """The rows go on where `samplers` are; those are not changed."""
        self._rows = [copy.copy(sampler) for sampler in samplers]

    def join(self, other: BatchSampler) -> None:
        """Add the other's rows behind these."""
        self._rows += other.copy()._rows

    def copy(self) -> BatchSampler:
        """The same rows, which go on by themselves."""
        return BatchSampler(self._rows)

    def take(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._rows = [self._rows[row] for row in rows]

    def __call__(self, logits: mx.array) -> mx.array:
        """logits [B, vocab] -> tokens [B]; nothing is computed yet."""
        return _next_tokens(logits, self._rows)


def _next_tokens(logits: mx.array, samplers: Sequence[Sampler]) -> mx.array:
    """logits [B, vocab] -> the next token of each sampler [B], which goes on behind it."""
    logits = logits.astype(mx.float32)
    penalized = [row for row, s in enumerate(samplers) if s._seen is not None]
    if penalized:
        seen = mx.stack([s._seen for s in samplers if s._seen is not None])
        options = [samplers[row].sampling for row in penalized]
        less_likely = _penalized(_rows(logits, penalized), seen, options)
        logits = _with_rows(logits, penalized, less_likely)
    tokens = mx.argmax(logits, axis=-1)
    sampled = [row for row, s in enumerate(samplers) if s.sampling.temp]
    if sampled:
        options = [samplers[row].sampling for row in sampled]
        u = mx.array([uniforms(samplers[row].seed, samplers[row]._drawn) for row in sampled])
        tokens = _with_rows(tokens, sampled, _draw(_rows(logits, sampled), options, u))
    for row, sampler in enumerate(samplers):
        sampler._drawn += 1
        if sampler._seen is not None:
            sampler._seen = sampler._seen | (mx.arange(sampler._seen.size) == tokens[row])
    return tokens


def later_seed(seed: int | None, number: int) -> int | None:
    """The seed of another answer, so many after the one with this; 0 follows the largest."""
    return (seed + number) % SEEDS if seed is not None and number else seed


def uniforms(seed: int, position: int) -> tuple[float, float]:
    """Two random numbers between 0 and 1 for the token at this position of an answer.

    They are words of Philox4x64 (Salmon et al., 2011) under the seed as its key, at `position` as
    its counter: no token's depend on how the ones before were drawn. Odd multiples of 2^-24, which
    float32 holds, are as far from 0, where the first token would be taken however unlikely it is,
    as from 1.
    """
    word = int(np.random.Philox(key=seed, counter=position).random_raw())
    first, second = word >> 41, word >> 18 & 0x7FFFFF
    return (first + 0.5) * 2.0**-23, (second + 0.5) * 2.0**-23


def categorical(logits: mx.array, u: mx.array) -> mx.array:
    """logits [B, vocab] float32, `uniforms` [B, 2] -> a token of each row [B], by the softmax.

    By the inverse of the cumulative distribution: first of blocks of tokens, then of the tokens of
    the block. Sums over a whole vocabulary would lose each p below 2^-24 of what came before it.
    (`mx.random.categorical` loses them, differs between versions of MLX, and takes one key for all
    rows.)
    """
    B, vocab = logits.shape
    p = mx.exp(logits - logits.max(axis=-1, keepdims=True))
    if missing := -vocab % BLOCK:
        p = mx.pad(p, [(0, 0), (0, missing)])
    p = p.reshape(B, -1, BLOCK)
    block = _inverse_cdf(p.sum(axis=-1), u[:, :1])
    members = mx.take_along_axis(p, block[..., None], axis=1)[:, 0]
    return (block * BLOCK + _inverse_cdf(members, u[:, 1:]))[:, 0]


def _inverse_cdf(p: mx.array, u: mx.array) -> mx.array:
    """p [B, N] of any sum, u [B, 1] -> in each row the first [B, 1] up to which more than u is.

    Never one whose p is 0, wherever rounding makes a sum larger or smaller than the one before.
    """
    cdf = mx.where(p > 0, mx.cumsum(p, axis=-1), 0)
    return mx.argmax(cdf > u * cdf.max(axis=-1, keepdims=True), axis=-1, keepdims=True)


def masked(logits: mx.array, masks: Sequence[np.ndarray | None]) -> mx.array:
    """logits [B, vocab] with -inf for tokens whose bit is not in the row's mask, if it has one.

    A mask is [words] uint32; a vocabulary may go beyond it, with tokens that are never drawn.
    """
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return logits
    vocab = logits.shape[-1]
    allowed = np.zeros((len(rows), vocab), np.bool_)
    for place, mask in enumerate(mask for mask in masks if mask is not None):
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab]
        allowed[place, : len(bits)] = bits
    may_follow = mx.array(allowed)
    return _with_rows(logits, rows, mx.where(may_follow, _rows(logits, rows), -mx.inf))


def _with_rows(whole: mx.array, rows: list[int], new: mx.array) -> mx.array:
    """`whole` [B, ...] with `new` in place of these rows."""
    if len(rows) == whole.shape[0]:
        return new
    changed = whole[...]  # another array: what is assigned to it is not seen through the first
    changed[mx.array(rows)] = new.astype(whole.dtype)
    return changed


def _rows(whole: mx.array, rows: list[int]) -> mx.array:
    """These rows of `whole` [B, ...], in order."""
    return whole if len(rows) == whole.shape[0] else whole[mx.array(rows)]


def _column(values: Iterable[float]) -> mx.array:
    return mx.array(list(values), mx.float32)[:, None]


def _penalized(logits: mx.array, seen: mx.array, options: Sequence[Sampling]) -> mx.array:
    """logits [B, vocab] float32, those of tokens in `seen` [B, vocab] made less likely."""
    penalty = _column(s.repetition_penalty for s in options)
    lower = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(seen, lower, logits)


def _draw(logits: mx.array, options: Sequence[Sampling], u: mx.array) -> mx.array:
    """logits [B, vocab] float32, `uniforms` [B, 2] -> a token of each row [B], by its options."""
    logits = logits / _column(s.temp for s in options)
    rows = [row for row, s in enumerate(options) if s.top_k or s.top_p < 1 or s.min_p]
    if not rows:
        return categorical(logits, u)
    those = [options[row] for row in rows]
    order, likely = _likely(_rows(logits, rows), those)
    place = categorical(likely, _rows(u, rows))
    tokens = mx.take_along_axis(order, place[:, None], axis=-1)[:, 0]
    return _with_rows(categorical(logits, u), rows, tokens)


def _likely(logits: mx.array, options: Sequence[Sampling]) -> tuple[mx.array, mx.array]:
    """logits [B, vocab] float32 -> tokens, most likely first, and their logits, both [B, vocab].

    The logit is -inf where a row's top-k, top-p or min-p exclude a token. The first always stays.
    """
    vocab = logits.shape[-1]
    order = mx.argsort(-logits, axis=-1)
    logits = mx.take_along_axis(logits, order, axis=-1)
    p = mx.softmax(logits, axis=-1)
    keep = mx.ones(p.shape, mx.bool_)
    if any(s.top_k for s in options):
        counts = mx.array([min(s.top_k or vocab, vocab) for s in options])[:, None]
        keep = keep & (mx.arange(vocab) < counts)
        p = mx.where(keep, p, 0)
        cut = p / p.sum(axis=-1, keepdims=True)
        p = mx.where(mx.array([bool(s.top_k) for s in options])[:, None], cut, p)
    if any(s.top_p < 1 for s in options):
        before = mx.cumsum(p, axis=-1) - p  # the share of the tokens that are more likely
        # (of a row without: what rounding makes of a share may reach 1)
        keep = keep & (before < _column(s.top_p if s.top_p < 1 else math.inf for s in options))
    if any(s.min_p for s in options):
        keep = keep & (p >= _column(s.min_p for s in options) * p[..., :1])
    return order, mx.where(keep, logits, -mx.inf)
