"""The model as rank 0 has it: its own layers, and others that are asked for the rest."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from threading import RLock, current_thread, main_thread
from typing import Any
from weakref import finalize

import mlx.core as mx

from mlx_kimi.chat.state_files import kda_arrays, token_arrays
from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.model.cache import CacheEntry, RemoteCache, numbered
from mlx_kimi.model.forward_batch import rows_of
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.steps import Step
from mlx_kimi.ranks.control import Arrays, Control, Message
from mlx_kimi.ranks.hops import Hops

AHEAD = 2  # steps of a prompt that the other ranks are asked for before rank 0 takes the first


class States:
    """The other ranks' states, by number. One is freed there once nothing here refers to it."""

    def __init__(self, control: Control, kind: type[State]) -> None:
        self.control, self.ranks = control, range(1, control.launched.size)
        self._kind = kind
        self._numbers = count(1)
        self._freed = deque[int]()  # (appended by whichever thread collects garbage)

    def new(self) -> State:
        state = self._kind(self, next(self._numbers))
        finalize(state, self._freed.append, state.number).atexit = False
        return state

    def freed(self) -> list[int]:
        """The numbers that nobody needs any more, each once."""
        return [self._freed.popleft() for _ in range(len(self._freed))]


@dataclass(eq=False)
class State:
    """What the other ranks remember after some tokens."""

    states: States
    number: int

    def latents(self, start: int) -> Arrays:
        return self._fetched({"do": "latents", "start": start})

    def kda_states(self) -> Arrays:
        return self._fetched({"do": "kda_states"})

    def _fetched(self, what: Message) -> Arrays:
        control, arrays = self.states.control, Arrays()
        with uninterrupted():
            control.broadcast({**what, "state": self.number})
            for rank in self.states.ranks:
                arrays |= control.receive(rank)[1]
        return arrays


@dataclass(frozen=True)
class Asked:
    """A step that the other ranks have been asked for."""

    ids: list[int]
    before: State | None
    after: State
    bits: int | None


class RankedModel(KimiLinear):
    """Has the methods of a whole KimiLinear. A cache is a `RemoteCache` and this rank's entries.

    A state of the other ranks never changes: a step names the one it goes on from and the one it
    makes, so that snapshots and going back send nothing.
    """

    one_text = True
    state_kind: type[State] = State

    def connect(self, control: Control, hops: Hops) -> RankedModel:
        """Begin to use the other ranks, which have loaded their layers."""
        self.control, self.hops = control, hops
        self.states = States(control, self.state_kind)
        self.order = RLock()  # commands and hops of a step stay together
        self._coming = deque[list[int]]()  # the steps of a prompt that nobody has been asked for
        self._asked = deque[Asked]()  # those that have been, whose hop has not been received
        return self

    def make_cache(self, latent_bits: int | None = None) -> list[CacheEntry]:
        return [RemoteCache(self.part.start, latent_bits), *super().make_cache(latent_bits)]

    def hidden(
        self,
        ids: mx.array,
        cache: list[CacheEntry] | None = None,
        lengths: Sequence[int] | None = None,
        steps: list[Step] | None = None,
    ) -> mx.array:
        self.refuse_rows(lengths, steps)
        cache = self.make_cache() if cache is None else cache
        with self._received(ids, cache) as given:
            return super().hidden(given, cache[1:])

    def refuse_rows(self, lengths: Sequence[int] | None, steps: list[Step] | None) -> None:
        """Ranks read one text, without padding and drafts."""
        if lengths is not None or steps is not None:
            raise ValueError("[hidden] lengths and steps must be None on ranks.")

    def advance(self, ids: mx.array, cache: list[CacheEntry]) -> None:
        with self._received(ids, cache) as given:
            super().advance(given, cache[1:])

    @contextmanager
    def reading(self, ids: Sequence[int], step: int) -> Iterator[None]:
        self._coming.extend(list(ids[at : at + step]) for at in range(0, len(ids), step))
        try:
            yield
        finally:
            self._coming.clear()
            with uninterrupted():
                self._take_what_nobody_wants()

    def find_not_finite(self, ids: mx.array) -> tuple[str | None, mx.array]:
        """As of all ranks."""
        with self.order, uninterrupted():
            self._take_what_nobody_wants()
            self.control.broadcast({"do": "find_not_finite", "ids": ids.tolist()})
            given = self._hop(ids)
            self._await(given)
            places = [self.control.receive(rank)[0]["place"] for rank in self.states.ranks]
        own, hidden = super().find_not_finite(given)
        return next(filter(None, [*reversed(places), own]), None), hidden

    def cache_of(self, entries: list[CacheEntry], latent_bits: int | None) -> list[CacheEntry]:
        state, end = self.states.new(), entries[0].lengths[0]
        arrays = token_arrays((), entries, 0) | kda_arrays(entries)
        del arrays["ids"]
        mx.eval(arrays)
        said = {"do": "put", "state": state.number, "bits": latent_bits, "end": end}
        first = self.part.start
        remote = {n: a for n, a in arrays.items() if int(n.rpartition(".")[2]) < first}
        with uninterrupted():
            for rank in self.states.ranks:
                self.control.send(rank, said, remote)
        own = [entry for number, entry in numbered(entries) if number >= first]
        return [RemoteCache(first, latent_bits, entries[0].lengths, state), *own]

    def memory(self) -> list[dict[str, int]]:
        """Bytes that MLX holds on each rank, `active`, and held at most, `peak`."""
        own = {"active": mx.get_active_memory(), "peak": mx.get_peak_memory()}
        with self.order, uninterrupted():
            self._take_what_nobody_wants()
            self.control.broadcast({"do": "memory"})
            return [own, *(self.control.receive(rank)[0] for rank in self.states.ranks)]

    # -------------------------------------------------------------------------------- each step
    @contextmanager
    def _received(self, ids: mx.array, cache: list[CacheEntry]) -> Iterator[mx.array]:
        """x and residual of the layers before, for this rank's own; the cache of those goes on.

        A step of one token is built before that is here, and before the token is known.
        """
        remote = cache[0]
        assert isinstance(remote, RemoteCache), "the cache is of `make_cache`"
        B, T = rows_of(ids)
        with self.order, uninterrupted():
            asked = self._next(ids, remote)
            given = self._hop(ids)
            try:
                if T > 1:
                    self._await(given)
                yield given
            finally:
                self._await(given)
            remote.state = asked.after
            remote.lengths = tuple(n + T for n in remote.lengths or (0,) * B)

    def _hop(self, ids: mx.array) -> mx.array:
        shape = (2, *rows_of(ids), self.config.hidden_size)
        return self.hops.receive(shape, self.norm.weight.dtype)

    def _await(self, given: mx.array) -> None:
        try:
            self.hops.awaited(given)
        except RuntimeError as error:
            self.control.wait_for_the_end()
            raise KimiError(f"the ranks' connection broke: {in_words(error)}") from None

    def _next(self, ids: mx.array, remote: RemoteCache) -> Asked:
        """The step of these tokens, which the others are asked for now if they were not before."""
        state: Any = remote.state
        if ids.size == 1:
            self._take_what_nobody_wants()
            asked = self.ask(ids, remote)
            self.hops.send_token(ids)
            return asked
        text = _ids_of(ids)
        first = self._asked[0] if self._asked else None
        if first is not None and first.before is state and first.ids == text:
            asked = self._asked.popleft()
        else:
            self._take_what_nobody_wants()
            if self._coming and self._coming[0] == text:
                self._coming.popleft()
            else:
                self._coming.clear()
            asked = self._ask(text, state, remote.bits)
        latest = self._asked[-1] if self._asked else asked
        while self._coming and len(self._asked) < AHEAD:
            latest = self._ask(self._coming.popleft(), latest.after, remote.bits)
            self._asked.append(latest)
        return asked

    def ask(self, ids: mx.array, remote: RemoteCache, output_wanted: bool = True) -> Asked:
        """Ask the others for a step of ids [1, T]; one token comes when it has been drawn."""
        before: Any = remote.state
        return self._ask(
            None if ids.size == 1 else _ids_of(ids), before, remote.bits, output_wanted
        )

    def _ask(
        self,
        ids: list[int] | None,
        before: State | None,
        bits: int | None,
        output_wanted: bool = True,
    ) -> Asked:
        after = self.states.new()
        said = {
            "do": "step",
            "ids": ids,
            "before": before.number if before else None,
            "after": after.number,
            "bits": bits,
            "output": output_wanted,
            "freed": self.states.freed(),
        }
        self.control.broadcast(said)
        return Asked(ids or [], before, after, bits)

    def _take_what_nobody_wants(self) -> None:
        """Receive the hops of steps that were asked for ahead, and forget them."""
        while self._asked:
            asked = self._asked.popleft()
            given = self.hops.receive(
                (2, 1, len(asked.ids), self.config.hidden_size), self.norm.weight.dtype
            )
            self._await(given)


def _ids_of(ids: mx.array) -> list[int]:
    """ids [1, T]"""
    rows: Any = ids.tolist()
    (text,) = rows
    return list(text)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within, Ctrl-C waits for the end: a command and its hop go together, or the ranks part."""
    handler = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or not callable(handler):
        yield
        return
    pressed: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[0])
