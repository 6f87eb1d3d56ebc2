"""The tokens that a cache has read, and snapshots of it, so that a common prefix is not read again.

A recurrent state cannot be shortened, so going back means going to a snapshot. One is kept where
every prompt begins and ends, and every few thousand tokens between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from operator import ne
from threading import RLock
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_kimi.defaults import SNAPSHOT_EVERY, SNAPSHOT_MEMORY, SNAPSHOTS
from mlx_kimi.errors import KimiError
from mlx_kimi.generation.drafts import Learned
from mlx_kimi.generation.faults import leave_out_what_failed
from mlx_kimi.generation.not_finite import not_finite
from mlx_kimi.generation.sample import Draw, Sampler
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import CacheEntry, LatentCache
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.steps import Step, keep_first


@dataclass(frozen=True)
class Snapshot:
    """The state after the first `length` tokens: in memory, or where `load` finds it."""

    length: int
    entries: list[CacheEntry] | None
    hidden: mx.array | None = None  # [1, 1, hidden] of `read`, if the prompt ended here
    load: Callable[[], list[CacheEntry] | None] = lambda: None

    @cached_property
    def sizes(self) -> dict[int, int]:
        """Bytes of each array in memory, by its identity: snapshots share some."""
        return {id(array): array.nbytes for array in caches.arrays(self.entries or [])}


class Drawn(NamedTuple):
    """Where a draw came from, so that it can be made again: all of it has been computed."""

    length: int  # of the tokens that `entries` had read
    entries: list[CacheEntry]
    sampler: dict[str, Any]  # its attributes before the draw
    hidden: mx.array | None  # what was drawn from; None: what comes of reading the other tokens


@dataclass
class TokenState:
    """A cache, the tokens it has read, and snapshots of it. It serves one answer at a time.

    Attributes:
        answering: the final hidden state of the prompt that is being answered, [1, 1, hidden].
        turn: is held by whoever changes it; a second thread waits.
        latent_bits: of `KimiLinear.make_cache`.
        snapshot_every: tokens between two snapshots within a turn; None takes none there.
        snapshot_memory: bytes that snapshots may take above the cache; the newest always stays.
            Of small models, whose many would fit, SNAPSHOTS are kept.
        computed_by: `Choices.digest` of the kernels that read these tokens. With more than one the
            state is mixed: computed anew, its bits would differ by roundings.
        host_time: seconds of this thread's processor that all calls of `step` took to submit work.
    """

    model: KimiLinear
    latent_bits: int | None = None
    snapshot_every: int | None = SNAPSHOT_EVERY
    snapshot_memory: int = SNAPSHOT_MEMORY
    ids: list[int] = field(default_factory=list)
    entries: list[CacheEntry] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    host_time: float = 0.0
    computed_by: set[str] = field(default_factory=set)
    answering: mx.array | None = None
    turn: RLock = field(default_factory=RLock, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.entries = self.entries or self._empty()
        self._source: tuple[int, list[CacheEntry]] | None = None  # of the latest `hidden`
        self._drawn: Drawn | None = None
        self._steps: tuple[int, list[Step]] | None = (
            None  # of the latest drafts, and where they began
        )

    @cached_property
    def learned(self) -> Learned:
        """What came of drafts in the answers so far."""
        return Learned()

    def _empty(self) -> list[CacheEntry]:
        return self.model.make_cache(self.latent_bits)

    @contextmanager
    def turn_of(self, answered: mx.array) -> Iterator[None]:
        """Within, nobody else changes the state.

        Raises:
            KimiError: another prompt than `answered`, a `prefill`'s result, is answered by now.
        """
        with self.turn:
            if self.answering is not answered:
                raise KimiError("another answer has begun in this state, which ends this one")
            yield

    # ------------------------------------------------------------------------------- moving on
    def read(self, ids: Sequence[int], output_wanted: bool = True) -> mx.array | None:
        """Read more of a prompt: the final hidden state of its last token, [1, 1, hidden].

        None where it is not wanted. Interrupted before all of it is queued, tokens and cache stay
        as they were; then it counts as read. Where a kernel fails, the tokens are read again
        without it: `faults.py`.
        """
        length, entries = len(self.ids), caches.snapshot(self.entries)
        while True:
            try:
                return self._read(ids, output_wanted)
            except RuntimeError as error:
                leave_out_what_failed(self.model, error)
                self._go_back(length, entries)

    def _read(self, ids: Sequence[int], output_wanted: bool) -> mx.array | None:
        hidden = None
        with self.atomic():
            self._source = len(self.ids), caches.snapshot(self.entries)
            if output_wanted:
                hidden = mx.contiguous(self.model.hidden(mx.array([ids]), self.entries)[:, -1:])
            else:
                self.model.advance(mx.array([ids]), self.entries)
            self.ids += ids
            self.computed_by.add(self.model.choices.digest)
        if hidden is not None:
            self.take_snapshot(hidden)
        else:
            mx.eval(caches.arrays(self.entries))
            self.take_snapshot_if_due()
        return hidden

    def draw(self, hidden: mx.array, sampler: Sampler) -> Draw:
        """The token that follows `hidden` [1, T, hidden], queued on the device."""
        length, entries = self._source or (len(self.ids), caches.snapshot(self.entries))
        self._drawn = Drawn(length, entries, dict(vars(sampler)), None if self._source else hidden)
        self._source = None
        logits = self.model.logits(hidden[:, -1])
        draw = Draw(sampler(logits), mx.logsumexp(logits, axis=-1))
        mx.async_eval(*draw, *caches.arrays(self.entries))
        return draw

    def first_draw(self, hidden: mx.array, sampler: Sampler) -> Draw:
        """`draw`, made again without the kernels that fail."""
        try:
            return self.draw(hidden, sampler)
        except RuntimeError as error:
            return self._draw_again(self._drawn, sampler, error)

    def step(self, draw: Draw, sampler: Sampler, is_known: bool = False) -> tuple[int, Draw]:
        """Read a drawn token, queue the drawing of the next, and wait for the first one's id.

        Interrupted meanwhile, tokens and cache stay as they were. Where a kernel fails, the state
        goes back to what has certainly been computed, and goes on from there without it.

        Args:
            is_known: the caller has the token from `awaited` already: it stays what it is.
        """
        while True:
            drawn, before = self._drawn, dict(vars(sampler))
            try:
                return self._step(draw, sampler)
            except RuntimeError as error:
                if not is_known:
                    draw = self._draw_again(drawn, sampler, error)
                    continue
                leave_out_what_failed(self.model, error)
                vars(sampler).update(before)

    def awaited(self, draw: Draw, sampler: Sampler) -> tuple[int, Draw]:
        """A token that was drawn, and its draw: another where a kernel failed meanwhile.

        Raises:
            KimiError: its logits have NaN or +infinity.
        """
        while True:
            try:
                return self.token_of(draw), draw
            except RuntimeError as error:
                draw = self._draw_again(self._drawn, sampler, error)

    def _draw_again(self, drawn: Drawn | None, sampler: Sampler, error: RuntimeError) -> Draw:
        assert drawn is not None, "what is awaited has been drawn"
        unread = self.ids[drawn.length :]
        while True:
            leave_out_what_failed(self.model, error)
            vars(sampler).update(drawn.sampler)
            try:
                hidden = drawn.hidden
                if hidden is None:
                    self._go_back(drawn.length, drawn.entries)
                    hidden = self._read(unread, output_wanted=True)
                    assert hidden is not None
                return self.draw(hidden, sampler)
            except RuntimeError as another:
                error = another

    def settle(self) -> None:
        """Nothing that was drawn will be asked for any more: hold no state to draw it again."""
        self._source = self._drawn = self._steps = None

    def step_with_drafts(
        self, token: int, drafts: Sequence[int], sampler: Sampler
    ) -> tuple[list[int], Draw]:
        """Read a token that has been awaited, and as many of `drafts` as the sampler draws, too.

        Each position is drawn with the random numbers, and after the tokens, that it would have had
        one by one: the sampler goes on as if no draft had been. Interrupted meanwhile, tokens and
        cache stay as they were. Where a kernel fails, the token is read without drafts.

        Returns:
            What was read, and the draw of the next token, which has been computed.

        Raises:
            KimiError: the logits have NaN or +infinity.
        """
        before = dict(vars(sampler))
        self.take_snapshot_if_due()
        try:
            with self.atomic():
                return self._step_with_drafts([token, *drafts], sampler)
        except RuntimeError as error:
            leave_out_what_failed(self.model, error)
            vars(sampler).update(before)
        draw = Draw(mx.array([token]), mx.zeros((1,)))
        read, draw = self.step(draw, sampler, is_known=True)
        return [read], self.awaited(draw, sampler)[1]

    def _step_with_drafts(self, ids: list[int], sampler: Sampler) -> tuple[list[int], Draw]:
        length, steps = len(self.ids), list[Step]()
        began = time.thread_time()
        logits = self.model.logits(self.model.hidden(mx.array([ids]), self.entries, steps=steps))
        draws, after = [], []
        for position, id in enumerate(ids):
            if not sampler.take(id):  # nor is it drawn
                break
            draws.append(sampler(logits[:, position]))
            after.append(dict(vars(sampler)))
        tokens, lse = mx.concatenate(draws), mx.logsumexp(logits[0], axis=-1)
        mx.async_eval(tokens, lse, *caches.arrays(self.entries))
        self.host_time += time.thread_time() - began
        drawn: Any = tokens.tolist()
        kept = 1 + common_prefix(drawn, ids[1:])
        if not all(map(math.isfinite, lse[:kept].tolist())):  # type: ignore[arg-type]
            raise not_finite(self.model, self.ids + ids[:kept])
        if kept < len(ids):
            keep_first(self.entries, steps, kept)
            mx.eval(*caches.arrays(self.entries))  # as a part of what this step took
        vars(sampler).update(after[kept - 1])
        self.ids += ids[:kept]
        self.computed_by.add(self.model.choices.digest)
        self._source, self._drawn, self._steps = None, None, (length, steps)
        return ids[:kept], Draw(tokens[kept - 1 : kept], lse[kept - 1 : kept])

    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens of the latest `step_with_drafts`, all but its first."""
        if not count:
            return
        assert self._steps is not None, "drafts were read last"
        length, steps = self._steps
        with self.atomic():
            keep_first(self.entries, steps, len(self.ids) - count - length)
            del self.ids[len(self.ids) - count :]
        mx.async_eval(*caches.arrays(self.entries))

    def _go_back(self, length: int, entries: list[CacheEntry]) -> None:
        """To a state that has certainly been computed; later snapshots may not be."""
        self.entries, self.ids = caches.snapshot(entries), self.ids[:length]
        self.snapshots = [found for found in self.snapshots if found.length <= length]

    def _step(self, draw: Draw, sampler: Sampler) -> tuple[int, Draw]:
        with self.atomic():
            self._source, self._steps = (len(self.ids), caches.snapshot(self.entries)), None
            # Processor time: MLX lets a thread that is far ahead of the device wait in here.
            began = time.thread_time()
            hidden = self.model.hidden(draw.token[:, None], self.entries)
            if sampler.matcher is not None:  # what may follow is found out beside the device's work
                mx.async_eval(hidden, caches.arrays(self.entries))
                sampler.take(self.token_of(draw))
            following = self.draw(hidden, sampler)
            self.host_time += time.thread_time() - began
            token = self.token_of(draw)
            self.ids.append(token)
            self.computed_by.add(self.model.choices.digest)
        self.take_snapshot_if_due()
        return token, following

    def token_of(self, draw: Draw) -> int:
        """Wait for a token that was drawn.

        Raises:
            KimiError: its logits have NaN or +infinity.
        """
        token = int(draw.token.item())  # type: ignore[arg-type]
        if not math.isfinite(draw.lse.item()):  # type: ignore[arg-type]
            raise not_finite(self.model, self.ids)
        return token

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Within, whatever ends the work, Ctrl-C too, leaves tokens and cache as they were."""
        count, before = len(self.ids), caches.snapshot(self.entries)
        try:
            yield
        except BaseException:
            del self.ids[count:]
            caches.restore(self.entries, before)
            raise

    # ------------------------------------------------------------------------------- snapshots
    def take_snapshot(self, hidden: mx.array | None = None) -> None:
        """Take a snapshot; `hidden` is what `read` gave for the latest token."""
        length = len(self.ids)
        if self.snapshots and self.snapshots[-1].length == length:
            if hidden is None:
                return
            self.snapshots.pop()
        if length:
            self.snapshots.append(Snapshot(length, caches.snapshot(self.entries), hidden))
            self._fit_memory()

    def take_snapshot_if_due(self) -> None:
        """Take a snapshot if the latest is many tokens ago."""
        latest = self.snapshots[-1].length if self.snapshots else 0
        if self.snapshot_every and len(self.ids) - latest >= self.snapshot_every:
            self.take_snapshot()

    def rewind_to_prefix_of(self, ids: Sequence[int]) -> mx.array | None:
        """Go to the longest known state that `ids` continues, and forget what it contradicts.

        Returns:
            If all of `ids` has been read: what `read` gave for the last, [1, 1, hidden], with
            the present state as it was then. None if at least one token is left to read.
        """
        shared = common_prefix(self.ids, ids)
        if shared == len(self.ids) < len(ids):
            return None
        while self.snapshots:
            found = self.snapshots.pop()
            entries = found.entries or found.load() if _serves(found, shared, len(ids)) else None
            if entries:
                # In one step, which Ctrl-C cannot divide.
                self.entries, self.ids = caches.snapshot(entries), self.ids[: found.length]
                self.take_snapshot(found.hidden)
                return found.hidden if found.length == len(ids) else None
        self.entries, self.ids, self.computed_by = self._empty(), [], set()
        return None

    @property
    def snapshot_bytes(self) -> int:
        """What snapshots hold beside the cache's frozen latents; shared arrays count once."""
        held: dict[int, int] = {}
        for snapshot in self.snapshots:
            held.update(snapshot.sizes)
        for entry in self.entries:
            for array in _frozen_arrays(entry):
                held.pop(id(array), None)
        return sum(held.values())

    def _fit_memory(self) -> None:
        """Forget snapshots until they fit, first those whose loss costs least.

        The loss of one costs the tokens since the one before; the further back it lies, the less
        likely anyone is to return to it.
        """
        while len(self.snapshots) > 1 and (
            len(self.snapshots) > SNAPSHOTS or self.snapshot_bytes > self.snapshot_memory
        ):
            lengths = [0, *(snapshot.length for snapshot in self.snapshots)]
            costs = [
                (length - before) / (lengths[-1] - length + 1)
                for before, length in zip(lengths, lengths[1:], strict=False)
            ]
            costs.pop()  # the newest stays
            del self.snapshots[costs.index(min(costs))]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    shortest = min(len(first), len(second))
    if [*islice(first, shortest)] == [*islice(second, shortest)]:  # the fastest, and most frequent
        return shortest
    return [*map(ne, first, second)].index(True)


def _frozen_arrays(entry: CacheEntry) -> list[mx.array]:
    return entry.frozen_arrays if isinstance(entry, LatentCache) else []


def _serves(snapshot: Snapshot, shared: int, wanted: int) -> bool:
    """Whether a prompt of `wanted` tokens, `shared` of them known, can go on from it."""
    return snapshot.length <= shared and (snapshot.length < wanted or snapshot.hidden is not None)
