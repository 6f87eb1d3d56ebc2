"""Every rank has some heads and channels of all layers, and all add up after each half of a layer.

All ranks do the same in the same order: a sum that one of them does not ask for would be waited for
by the others. A step is therefore over on a rank before it hears of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_kimi.chat.state_files import kda_arrays, layer_entries, token_arrays
from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import CacheEntry, KDACache, RemoteCache
from mlx_kimi.model.forward_batch import rows_of
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.steps import Step
from mlx_kimi.ranks.control import Arrays, Message
from mlx_kimi.ranks.follow import Follower
from mlx_kimi.ranks.hops import Hops
from mlx_kimi.ranks.model import RankedModel, State, uninterrupted
from mlx_kimi.ranks.shares import part_config


class Sum:
    """Adds up x over the ranks, once they are connected: `reduce` of a model."""

    def __init__(self) -> None:
        self.hops: Hops | None = None

    def __call__(self, x: mx.array) -> mx.array:
        assert self.hops is not None, "a model is used once its ranks are connected"
        return self.hops.sum(x)


def take_step(
    model: KimiLinear, hops: Hops, ids: mx.array, cache: list[CacheEntry], output_wanted: bool
) -> mx.array | None:
    """What every rank does of a step of ids [1, T]; its final hidden states, if they are wanted.

    One token is known to rank 0 alone: the others give 0.
    """
    if ids.size == 1:
        ids = hops.sum(ids.astype(mx.int32))
    if output_wanted:
        x = KimiLinear.hidden(model, ids, cache)
        mx.eval(x, caches.arrays(cache))
        return x
    KimiLinear.advance(model, ids, cache)
    mx.eval(caches.arrays(cache))
    return None


@dataclass(eq=False)
class PartState(State):
    """What the others remember, and rank 0's own part of the same."""

    own: list[CacheEntry] = field(default_factory=list)

    def latents(self, start: int) -> Arrays:
        return {}  # all ranks have all of them

    def kda_states(self) -> Arrays:
        parts = [kda_arrays(self.own)]
        with uninterrupted():
            self.states.control.broadcast({"do": "kda_states", "state": self.number})
            parts += [self.states.control.receive(rank)[1] for rank in self.states.ranks]
        return {name: _whole(name, [part[name] for part in parts]) for name in parts[0]}


class HeadsModel(RankedModel):
    """Has the methods of a whole KimiLinear. A cache is this rank's entries and a `RemoteCache`."""

    state_kind = PartState

    def make_cache(self, latent_bits: int | None = None) -> list[CacheEntry]:
        return [*KimiLinear.make_cache(self, latent_bits), RemoteCache(0, latent_bits)]

    def hidden(
        self,
        ids: mx.array,
        cache: list[CacheEntry] | None = None,
        lengths: Sequence[int] | None = None,
        steps: list[Step] | None = None,
    ) -> mx.array:
        self.refuse_rows(lengths, steps)
        x = self._take_step(ids, self.make_cache() if cache is None else cache, True)
        assert x is not None, "it is wanted"
        return x

    def advance(self, ids: mx.array, cache: list[CacheEntry]) -> None:
        self._take_step(ids, cache, False)

    def _take_step(
        self, ids: mx.array, cache: list[CacheEntry], output_wanted: bool
    ) -> mx.array | None:
        *own, remote = cache
        assert isinstance(remote, RemoteCache), "the cache is of `make_cache`"
        B, T = rows_of(ids)
        with self.order, uninterrupted():
            asked = self.ask(ids, remote, output_wanted)
            try:
                x = take_step(self, self.hops, ids, own, output_wanted)
            except RuntimeError as error:
                self.control.wait_for_the_end()
                raise KimiError(f"the ranks cannot go on: {in_words(error)}") from None
            assert isinstance(asked.after, PartState)
            asked.after.own = caches.snapshot(own)
            remote.state = asked.after
            remote.lengths = tuple(n + T for n in remote.lengths or (0,) * B)
        return x

    @contextmanager
    def reading(self, ids: Sequence[int], step: int) -> Iterator[None]:
        yield  # no rank is ahead of another

    def find_not_finite(self, ids: mx.array) -> tuple[str | None, mx.array]:
        with self.order, uninterrupted():
            self.control.broadcast({"do": "find_not_finite", "ids": ids.tolist()})
            return KimiLinear.find_not_finite(self, ids)

    def cache_of(self, entries: list[CacheEntry], latent_bits: int | None) -> list[CacheEntry]:
        state, ranks = self.states.new(), self.control.launched.size
        said = {"do": "put", "state": state.number, "bits": latent_bits}
        said["end"] = entries[0].lengths[0]
        latents = token_arrays((), entries, 0)
        del latents["ids"]
        whole = kda_arrays(entries)
        mx.eval(latents, whole)
        with uninterrupted():
            for rank in range(1, ranks):
                part = {name: _part(name, a, rank, ranks) for name, a in whole.items()}
                mx.eval(part)
                self.control.send(rank, said, latents | part)
        own = [_own_entry(entry, ranks) for entry in entries]
        assert isinstance(state, PartState)
        state.own = caches.snapshot(own)
        return [*own, RemoteCache(0, latent_bits, entries[0].lengths, state)]


class HeadsFollower(Follower):
    """Another rank, with its own heads and channels."""

    def step(self, message: Message, _: Arrays) -> None:
        cache = self.begun(message)
        ids = message["ids"]
        given = mx.zeros((1, 1), mx.int32) if ids is None else mx.array([ids])
        take_step(self.model, self.hops, given, cache, message["output"])
        self.states[message["after"]] = cache

    def find_not_finite(self, message: Message, _: Arrays) -> None:
        self.model.find_not_finite(mx.array(message["ids"]))

    def put(self, message: Message, arrays: Arrays) -> None:
        config = part_config(self.model.config, self.control.launched.size)
        layers, bits = range(len(config.layers)), message["bits"]
        self.states[message["state"]] = layer_entries(
            [arrays], config, layers, bits, message["end"], "a state of rank 0"
        )


# Heads stand on axis 1 of a state [1, H, Dv, Dk], and thrice on the last axis of a convolution's
# tail [1, K - 1, q | k | v].
def _whole(name: str, parts: Sequence[mx.array]) -> mx.array:
    if name.startswith("state."):
        return mx.concatenate(list(parts), axis=1)
    thirds = zip(*(mx.split(part, 3, axis=-1) for part in parts), strict=True)
    return mx.concatenate([part for third in thirds for part in third], axis=-1)


def _part(name: str, whole: mx.array, rank: int, ranks: int) -> mx.array:
    """A copy: a view would keep the whole in memory."""
    if name.startswith("state."):
        return mx.contiguous(mx.split(whole, ranks, axis=1)[rank])
    thirds = mx.split(whole, 3, axis=-1)
    own = [mx.split(third, ranks, axis=-1)[rank] for third in thirds]
    return mx.concatenate(own, axis=-1)


def _own_entry(entry: CacheEntry, ranks: int) -> CacheEntry:
    """Rank 0's part of a whole model's entry."""
    if not isinstance(entry, KDACache):
        return entry
    assert entry.conv_tail is not None and entry.state is not None
    tail = _part("conv.", entry.conv_tail, 0, ranks)
    return KDACache(entry.lengths, tail, _part("state.", entry.state, 0, ranks))
