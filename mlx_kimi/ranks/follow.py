"""What the other ranks do: their layers of each step that rank 0 asks for."""

from __future__ import annotations

import os
from typing import NoReturn

import mlx.core as mx

from mlx_kimi.chat.state_files import kda_arrays, layer_entries, token_arrays
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import CacheEntry, RemoteCache
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.ranks.control import Arrays, Control, Message
from mlx_kimi.ranks.hops import Hops


class Follower:
    """A rank with some layers, the states that rank 0 has not freed, and no text."""

    def __init__(self, model: KimiLinear, control: Control, hops: Hops) -> None:
        self.model, self.control, self.hops = model, control, hops
        self.states: dict[int, list[CacheEntry]] = {}

    def run(self) -> NoReturn:
        """Do what rank 0 says, until it says that all is over."""
        while True:
            message, arrays = self.control.receive()
            what = message["do"]
            if what == "end":
                os._exit(0)
            try:
                {
                    "step": self.step,
                    "latents": self.latents,
                    "kda_states": self.kda_states,
                    "put": self.put,
                    "find_not_finite": self.find_not_finite,
                    "memory": self.memory,
                }[what](message, arrays)
            except RuntimeError:
                self.control.wait_for_the_end()
                raise

    def step(self, message: Message, _: Arrays) -> None:
        """The next tokens of a state: another state, and what the rank before is given."""
        cache, ids = self.begun(message), message["ids"]
        given = self._given(ids)
        if ids is not None:  # (a step of one token is built meanwhile)
            self.hops.awaited(given)
        x = self.model.hidden(given, cache)
        self.hops.awaited(given)
        self.states[message["after"]] = cache
        self.hops.send(x)
        mx.async_eval(caches.arrays(cache))

    def begun(self, message: Message) -> list[CacheEntry]:
        """The cache that a step goes on from; states that rank 0 has freed go."""
        for number in message["freed"]:
            self.states.pop(number, None)
        before = message["before"]
        if before is None:
            return self.model.make_cache(message["bits"])
        return caches.snapshot(self.states[before])

    def _given(self, ids: list[int] | None) -> mx.array:
        """ids [1, T] for the first layers, x and residual [2, 1, T, hidden] for others; it may be
        under way. None: one token, which rank 0 sends when it has drawn it."""
        if not self.model.part.start:
            return self.hops.receive_token() if ids is None else mx.array([ids])
        T = 1 if ids is None else len(ids)
        shape = (2, 1, T, self.model.config.hidden_size)
        return self.hops.receive(shape, self.model.norm.weight.dtype)

    def latents(self, message: Message, _: Arrays) -> None:
        """Send those of a state to rank 0, as files hold them."""
        arrays = token_arrays((), self._numbered(message), message["start"])
        del arrays["ids"]
        self._reply(arrays)

    def kda_states(self, message: Message, _: Arrays) -> None:
        """Likewise."""
        self._reply(kda_arrays(self._numbered(message)))

    def _numbered(self, message: Message) -> list[CacheEntry]:
        """The entries of a state, with the numbers of their layers."""
        return [RemoteCache(self.model.part.start), *self.states[message["state"]]]

    def _reply(self, arrays: Arrays) -> None:
        mx.eval(arrays)
        self.control.send(0, {}, arrays)

    def put(self, message: Message, arrays: Arrays) -> None:
        """Take a state that rank 0 has read from files."""
        end, bits = message["end"], message["bits"]
        self.states[message["state"]] = layer_entries(
            [arrays], self.model.config, self.model.part, bits, end, "a state of rank 0"
        )

    def find_not_finite(self, message: Message, _: Arrays) -> None:
        """As of `KimiLinear`, for the layers that are here."""
        (ids,) = message["ids"]
        place, x = self.model.find_not_finite(self._given(ids))
        self.hops.send(x)
        self.control.send(0, {"place": place})

    def memory(self, message: Message, _: Arrays) -> None:
        """Bytes that MLX holds here, and held at most."""
        held = {"active": mx.get_active_memory(), "peak": mx.get_peak_memory()}
        self.control.send(0, held)
