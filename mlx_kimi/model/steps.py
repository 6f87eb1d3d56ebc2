"""Going back within a forward pass of several tokens: to the state after the first few of them.

A recurrent state cannot be cut back. What its layer projected from the tokens is kept instead, a
few rows, and the recurrence runs again from the state before, with the other tokens as padding,
which neither decays a state nor writes to it. Latents are appended again, fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_kimi.metal_kernels.kda import kda
from mlx_kimi.metal_kernels.kda_prepare import Projected, kda_prepare
from mlx_kimi.model.cache import CacheEntry, KDACache, LatentCache


@dataclass(frozen=True)
class KDAStep:
    """A KDA layer's part of a pass."""

    lengths: tuple[int, ...]  # of the cache before
    projected: Projected
    state: mx.array  # before

    def keep_first(self, entry: KDACache, n: int) -> None:
        """Make `entry` what it is after the first n tokens."""
        rows = self.projected.x.shape[0]
        given = kda_prepare(self.projected._replace(lengths=mx.array([n] * rows)))
        _, entry.state = kda(given.q, given.k, given.v, given.alpha, given.beta, self.state)
        entry.conv_tail = given.tail
        entry.lengths = _longer(self.lengths, rows, n)


@dataclass(frozen=True)
class LatentStep:
    """An MLA layer's part of a pass."""

    before: LatentCache
    latents: mx.array  # [B, S, latent | shared key], with those of the T new tokens among them
    first: int  # where these are

    def keep_first(self, entry: LatentCache, n: int) -> None:
        """Make `entry` what it is after the first n tokens."""
        entry.restore(self.before)
        entry.append(self.latents[:, self.first : self.first + n], None)
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
