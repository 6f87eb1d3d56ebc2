"""Going back within a forward pass of several tokens: to the state after the first few of them.

A recurrent state cannot be cut back. What its layer projected from the tokens is kept instead, a
few rows, and the recurrence runs again from the state before, over the first tokens alone. Latents
are appended again, fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_kimi.model.cache import CacheEntry, KDACache, LatentCache


@dataclass(frozen=True)
class KDAStep:
    """A KDA layer's part of a pass."""

    lengths: tuple[int, ...]  # of the cache before
    replay: Callable[[int], tuple[mx.array, mx.array]]  # n -> conv_tail, state after n tokens
    projected: mx.array | None = None  # what `replay` is made of, in a graph

    def keep_first(self, entry: KDACache, n: int) -> None:
        """Make `entry` what it is after the first n tokens."""
        entry.conv_tail, entry.state = self.replay(n)
        entry.lengths = _longer(self.lengths, len(entry.state), n)


@dataclass(frozen=True)
class LatentStep:
    """An MLA layer's part of a pass."""

    before: LatentCache
    latents: mx.array  # [B, T, latent | shared key] of the new tokens,
    in_tail: bool  # or [B, TAIL, ...], a tail with these in their places

    def keep_first(self, entry: LatentCache, n: int) -> None:
        """Make `entry` what it is after the first n tokens."""
        entry.restore(self.before)
        if self.in_tail:
            entry.grow_tail(self.latents, n)
        else:
            entry.append(self.latents[:, :n])
        entry.lengths = _longer(self.before.lengths, len(self.latents), n)


Step = KDAStep | LatentStep


def keep_first(cache: Sequence[CacheEntry], steps: Sequence[Step], n: int) -> None:
    """Take back all but the first n tokens, at least one, of the pass that `steps` are of.

    It may be done again, with another n.
    """
    for entry, step in zip(cache, steps, strict=True):
        if isinstance(step, KDAStep):
            assert isinstance(entry, KDACache)
            step.keep_first(entry, n)
        else:
            assert isinstance(entry, LatentCache)
            step.keep_first(entry, n)


def _longer(lengths: tuple[int, ...], rows: int, n: int) -> tuple[int, ...]:
    return tuple(length + n for length in lengths or (0,) * rows)
