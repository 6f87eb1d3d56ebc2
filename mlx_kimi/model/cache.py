"""What a model remembers of the tokens it has read: one typed entry a layer.

An entry's arrays are replaced, never written into. A snapshot is therefore the entry's present
references: it costs no time, and no later step can change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from mlx_kimi.checkpoint.config import Layer
from mlx_kimi.errors import OptionError
from mlx_kimi.metal_kernels.latents import BITS, is_packed, pack, unpack
from mlx_kimi.metal_kernels.split_kv import SEGMENTS, Part, SplitKVPlan

TAIL = 256  # tokens of the latent that may be rebuilt at every step (0.3 MB)
RADIX = 4  # neighbours of one size class that merge into one of the next
LAST_CLASS = 5  # of 262,144 tokens (0.3 GB) and more, which are never merged
POOLED = 16_384  # tokens of the largest array (19 MB) that is copied so that texts share one


@dataclass
class KDACache:
    """The state of a KDA layer: constant in size.

    `lengths` holds the tokens read by each row. Before the first token the arrays are None.
    """

    lengths: tuple[int, ...] = ()
    conv_tail: mx.array | None = None  # [B, K - 1, 3 * H * D]: the last tokens of q | k | v
    state: mx.array | None = None  # [B, H, Dv, Dk] float32, the transpose of the paper's S

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.conv_tail, self.state) if a is not None]

    def snapshot(self) -> KDACache:
        return replace(self)

    def restore(self, snapshot: KDACache) -> None:
        self.__dict__.update(snapshot.__dict__)

    def take(self, rows: Sequence[int]) -> KDACache:
        """The entry of the batch that consists of these rows, in this order."""
        if self.state is None or self.conv_tail is None:
            return KDACache()
        index = mx.array(list(rows))
        lengths = tuple(self.lengths[row] for row in rows)
        return KDACache(lengths, self.conv_tail[index], self.state[index])

    @staticmethod
    def join(entries: Sequence[KDACache]) -> KDACache:
        """The entry of one batch made of the rows of several. Each must have read a token."""
        tails, states = [e.conv_tail for e in entries], [e.state for e in entries]
        return KDACache(
            tuple(n for entry in entries for n in entry.lengths),
            mx.concatenate(_all_filled(tails)),
            mx.concatenate(_all_filled(states)),
        )


@dataclass(frozen=True)
class Segment:
    """Latents of consecutive tokens of one text: some rows of an array, which others may share."""

    latents: mx.array  # [1, rows, latent | shared key], or packed [1, rows, words] uint32
    start: int  # its first row
    size: int  # tokens

    @staticmethod
    def whole(latents: mx.array) -> Segment:
        return Segment(latents, 0, latents.shape[1])

    @cached_property
    def address(self) -> mx.array:
        """Where `latents` begin in memory, as an array of one shape for all: [1, 8, ...].

        MLX's slice is a view of the same memory, which it keeps alive. A kernel that is told where
        its rows are reads on behind it.
        """
        return self.latents[:, :8]

    @property
    def rows(self) -> mx.array:
        """[1, size, ...]"""
        if self.size == self.latents.shape[1]:
            return self.latents
        return self.latents[:, self.start : self.start + self.size]

    def slice(self, start: int, stop: int) -> Segment:
        return Segment(self.latents, self.start + start, stop - start)

    def packed(self) -> Segment:
        """The same tokens in 8 bits."""
        return self if is_packed(self.latents) else Segment.whole(pack(self.rows))

    def plain(self, width: int, dtype: mx.Dtype) -> mx.array:
        """The same tokens as numbers, [1, size, width]."""
        return unpack(self.rows, width, dtype) if is_packed(self.latents) else self.rows

    def copy(self) -> Segment:
        """The same tokens in an array of their own: a slice keeps its whole parent alive."""
        return Segment.whole(mx.contiguous(self.rows))

    @staticmethod
    def concatenate(segments: Sequence[Segment]) -> Segment:
        if len(segments) == 1:
            return segments[0]
        return Segment.whole(mx.concatenate([s.rows for s in segments], axis=1))


Segments = tuple[Segment, ...]  # of one text


@dataclass
class LatentCache:
    """The cache of an MLA layer: one latent a token, in frozen segments and a short tail.

    The texts of a batch have each a length of its own, without padding, and may share segments.
    Only the tail is rebuilt when a token comes. A full tail is frozen; four neighbouring segments
    of one size class merge into one of the next, so that a frozen token is copied at most five
    times and 2^20 tokens are at most 19 segments, as many as one launch of the decode kernel takes.
    `bits` 8: frozen latents are packed to 8 bits. Before the first token there are no texts.
    """

    lengths: tuple[int, ...] = ()
    frozen: tuple[Segments, ...] = ()  # of each text
    tail: mx.array | None = None  # [B, room, latent | shared key]
    held: tuple[int, ...] = ()  # of each text: the latents in its tail
    bits: int | None = None  # None: latents stay as they come

    def __post_init__(self) -> None:
        check_latent_bits(self.bits)

    def segments(self, text: int) -> Segments:
        """Those of a text, what is in its tail the last of them."""
        if self.tail is None or not self.held[text]:
            return self.frozen[text]
        tail = self.tail if len(self.held) == 1 else self.tail[text : text + 1]
        return (*self.frozen[text], Segment(tail, 0, self.held[text]))

    def positions(self, text: int) -> int:
        """KV positions held for a text: its tokens."""
        return sum(segment.size for segment in self.frozen[text]) + self.held[text]

    def append(self, latents: mx.array, counts: Sequence[int] | None = None) -> None:
        """Add latents [B, T, width]; `counts` [B]: how many of the T are a text's. None: all."""
        B, T, _ = latents.shape
        self._begin(B)
        texts = [latents] if B == 1 else [mx.contiguous(latents[b : b + 1]) for b in range(B)]
        new = [Segment(x, 0, n) for x, n in zip(texts, counts or [T] * B, strict=True)]
        tails = [self._appended(text, segment) for text, segment in enumerate(new)]
        self.held = tuple(tail.size for tail in tails)
        room = max(self.held)
        rows = [_with_room(tail.rows, room) for tail in tails]
        self.tail = (rows[0] if B == 1 else mx.concatenate(rows)) if room else None

    def _begin(self, B: int) -> None:
        if not self.frozen:
            self.frozen, self.held = ((),) * B, (0,) * B

    def _appended(self, text: int, new: Segment) -> Segment:
        """A text's tail with more tokens, of which what is full has been frozen."""
        recent = Segment.concatenate([*self.segments(text)[len(self.frozen[text]) :], new])
        full = recent.size // TAIL * TAIL
        if not full:
            return recent
        if full == recent.latents.shape[1]:
            self._freeze(text, recent)
            return Segment(recent.latents, 0, 0)
        self._freeze(text, recent.slice(0, full).copy())
        return recent.slice(full, recent.size).copy()

    def _freeze(self, text: int, new: Segment) -> None:
        """Add a segment, whose size is a multiple of TAIL, to a text's frozen ones."""
        merged = _merged(self.frozen[text], new.packed() if self.bits else new)
        frozen = (*self.frozen[:text], merged, *self.frozen[text + 1 :])
        self.frozen = _pooled(_without_waste(frozen))

    def roomy_tail(self, B: int, width: int, dtype: mx.Dtype) -> mx.array:
        """The tail as [B, TAIL, width], as the decode kernel takes it."""
        if self.tail is None:
            return mx.zeros((B, TAIL, width), dtype)
        return _with_room(self.tail, TAIL)

    @property
    def room(self) -> int:
        """Tokens of each text until one's tail is full."""
        return TAIL - max(self.held, default=0)

    @property
    def frozen_arrays(self) -> list[mx.array]:
        """Each array that frozen segments lie in, once."""
        return [segment.latents for segment in self._of_each_array()]

    @property
    def addresses(self) -> list[mx.array]:
        """`Segment.address` of each of `frozen_arrays`."""
        return [segment.address for segment in self._of_each_array()]

    def _of_each_array(self) -> list[Segment]:
        return list({id(s.latents): s for own in self.frozen for s in own}.values())

    def plan(self, B: int, tokens: int = 1) -> SplitKVPlan:
        """How `mla_decode` divides the attention of the next tokens of B texts."""
        numbers = {id(array): number for number, array in enumerate(self.frozen_arrays)}
        parts = [
            [Part(numbers[id(s.latents)], s.start, s.size) for s in own] for own in self.frozen
        ]
        held = [n + 1 for n in self.held or (0,) * B]
        return SplitKVPlan.of(held, TAIL, parts or [[]] * B, tokens=tokens)

    def grow_tail(self, latents: mx.array, tokens: int = 1) -> None:
        """Take the latents of `roomy_tail`, with more tokens of each text in them, up to `room`."""
        self._begin(len(latents))
        self.tail, self.held = latents, tuple(n + tokens for n in self.held)
        full = [text for text, n in enumerate(self.held) if n == TAIL]
        for text in full:
            self._freeze(text, self.segments(text)[-1].copy())
        self.held = tuple(n % TAIL for n in self.held)
        if not any(self.held):
            self.tail = None

    def arrays(self) -> list[mx.array]:
        return self.frozen_arrays + ([] if self.tail is None else [self.tail])

    def snapshot(self) -> LatentCache:
        return replace(self)

    def restore(self, snapshot: LatentCache) -> None:
        self.__dict__.update(snapshot.__dict__)

    def take(self, rows: Sequence[int]) -> LatentCache:
        """The entry of the batch that consists of these texts, in this order."""
        if not self.frozen:
            return LatentCache(bits=self.bits)
        return LatentCache(
            tuple(self.lengths[row] for row in rows),
            _without_waste(tuple(self.frozen[row] for row in rows)),
            None if self.tail is None else self.tail[mx.array(list(rows))],
            tuple(self.held[row] for row in rows),
            self.bits,
        )

    @staticmethod
    def join(entries: Sequence[LatentCache]) -> LatentCache:
        """The entry of one batch made of the texts of several, which have the same `bits`.

        Each must have read a token. No frozen latent is copied, unless there are too many arrays
        for a launch.
        """
        frozen = _all_filled([entry.frozen or None for entry in entries])
        tails = [entry.tail for entry in entries if entry.tail is not None]
        return LatentCache(
            tuple(n for entry in entries for n in entry.lengths),
            _pooled(tuple(own for texts in frozen for own in texts)),
            _joined_tails(entries, tails[0]) if tails else None,
            tuple(n for entry in entries for n in entry.held),
            entries[0].bits,
        )


class RemoteState(Protocol):
    """What other processes remember after some tokens. It never changes."""

    def latents(self, start: int) -> dict[str, mx.array]:
        """Those of the tokens from `start` on, by their names in state files."""

    def kda_states(self) -> dict[str, mx.array]:
        """The states of KDA layers, by their names in state files."""


@dataclass
class RemoteCache:
    """The cache of the first layers, which other processes hold: which of their states it is."""

    layers: int  # whose cache this is
    bits: int | None = None  # as of a LatentCache
    lengths: tuple[int, ...] = ()
    state: RemoteState | None = None  # None: before the first token

    def arrays(self) -> list[mx.array]:
        return []  # none is here

    def snapshot(self) -> RemoteCache:
        return replace(self)

    def restore(self, snapshot: RemoteCache) -> None:
        self.__dict__.update(snapshot.__dict__)


CacheEntry = KDACache | LatentCache | RemoteCache
Joined = TypeVar("Joined")


def empty_cache(layers: Sequence[Layer], latent_bits: int | None = None) -> list[CacheEntry]:
    """The cache of these layers before the first token."""
    return [
        KDACache() if layer.attention == "kda" else LatentCache(bits=latent_bits)
        for layer in layers
    ]


def check_latent_bits(bits: int | None) -> None:
    """Refuse bits that latents cannot be stored in."""
    if bits not in (None, BITS):
        raise OptionError("latent_bits", f"must be {BITS} where they are given but are {bits}")


def snapshot(cache: Sequence[CacheEntry]) -> list[CacheEntry]:
    """A copy of a whole cache that later steps do not touch. Costs no time and no memory now."""
    return [entry.snapshot() for entry in cache]


def restore(cache: Sequence[CacheEntry], saved: Sequence[CacheEntry]) -> None:
    """Put `cache` back to where `saved` was taken; `saved` can be restored again."""
    entry: Any
    for entry, old in zip(cache, saved, strict=True):
        entry.restore(old)


def arrays(cache: Sequence[CacheEntry]) -> list[mx.array]:
    """Everything a step must evaluate, so that no graph of past steps stays behind."""
    return [array for entry in cache for array in entry.arrays()]


def numbered(cache: Sequence[CacheEntry]) -> Iterator[tuple[int, CacheEntry]]:
    """Each entry with the number of its layer, or of the first of its layers."""
    number = 0
    for entry in cache:
        yield number, entry
        number += entry.layers if isinstance(entry, RemoteCache) else 1


def room(cache: Sequence[CacheEntry]) -> int:
    """Tokens that one step may add to each text at most without a copy of the latest latents."""
    rooms = [entry.room for entry in cache if isinstance(entry, LatentCache)]
    return min(rooms, default=TAIL)


def take(cache: Sequence[CacheEntry], rows: Sequence[int]) -> list[CacheEntry]:
    """The cache of the batch that consists of these rows of another, in this order."""
    entries: Sequence[Any] = cache
    return [entry.take(rows) for entry in entries]


def join(batches: Sequence[Sequence[CacheEntry]]) -> list[CacheEntry]:
    """The cache of one batch made of the rows of several. Each must have read a token."""
    layers: Any = zip(*batches, strict=True)
    return [type(entries[0]).join(entries) for entries in layers]


def _all_filled(parts: Sequence[Joined | None]) -> list[Joined]:
    filled = [part for part in parts if part is not None]
    if len(filled) < len(parts):
        raise ValueError("[join] every cache entry must have read a token but one is empty.")
    return filled


def _size_class(segment: Segment) -> int:
    """0 for up to 1023 tokens, then one more for every factor of four."""
    size, level = segment.size // (TAIL * RADIX), 0
    while size:
        size, level = size // RADIX, level + 1
    return level


def _merged(frozen: tuple[Segment, ...], new: Segment) -> tuple[Segment, ...]:
    """`frozen` and `new`, merged so that size classes never increase from front to back.

    Fewer than `RADIX` neighbours are of one class; those of `LAST_CLASS` are never merged.
    """
    kept = list(frozen)
    level = _size_class(new)
    smaller = [s for s in kept if _size_class(s) < level]
    merged = Segment.concatenate([*smaller, new])
    kept = kept[: len(kept) - len(smaller)]
    while True:
        level = _size_class(merged)
        peers = [s for s in kept if _size_class(s) <= level]
        if level >= LAST_CLASS or len(peers) < RADIX - 1:
            return (*kept, merged)
        merged = Segment.concatenate([*peers, merged])
        kept = kept[: len(kept) - len(peers)]


def _with_room(tail: mx.array, room: int) -> mx.array:
    """tail [B, n, width] -> [B, room, width]."""
    missing = room - tail.shape[1]
    return mx.pad(tail, [(0, 0), (0, missing), (0, 0)]) if missing else tail


def _joined_tails(entries: Sequence[LatentCache], like: mx.array) -> mx.array:
    """[B of all, room, width]"""
    room = max(entry.tail.shape[1] for entry in entries if entry.tail is not None)
    empty = [(len(entry.held), room, like.shape[2]) for entry in entries]
    tails = [
        mx.zeros(shape, like.dtype) if entry.tail is None else _with_room(entry.tail, room)
        for entry, shape in zip(entries, empty, strict=True)
    ]
    return mx.concatenate(tails)


# ------------------------------------------------------------- arrays that texts have in common
def _pooled(frozen: tuple[Segments, ...]) -> tuple[Segments, ...]:
    """The same segments in as few arrays as a launch takes, as far as small ones suffice.

    One text alone never has more. More small ones are copied than must be: the next time is far.
    """
    arrays = {id(s.latents): s.latents for own in frozen for s in own}
    if len(arrays) <= SEGMENTS or len(frozen) == 1:
        return frozen
    small = sorted((a for a in arrays.values() if a.shape[1] <= POOLED), key=lambda a: a.shape[1])
    few = small[: len(arrays) - SEGMENTS // 2]
    return _in_one_array(frozen, set(map(id, few))) if len(few) > 1 else frozen


def _without_waste(frozen: tuple[Segments, ...]) -> tuple[Segments, ...]:
    """The same segments, those copied that lie in arrays of which less than half is theirs."""
    used: dict[int, dict[tuple[int, int], int]] = {}
    rows: dict[int, int] = {}
    for segment in (s for own in frozen for s in own):
        rows[id(segment.latents)] = segment.latents.shape[1]
        used.setdefault(id(segment.latents), {})[segment.start, segment.size] = segment.size
    wasteful = {array for array, parts in used.items() if 2 * sum(parts.values()) < rows[array]}
    return _in_one_array(frozen, wasteful) if wasteful else frozen


def _in_one_array(frozen: tuple[Segments, ...], arrays: set[int]) -> tuple[Segments, ...]:
    """The segments that lie in these arrays, by identity, copied into one; each once."""
    moved: dict[tuple[int, int, int], Segment] = {}
    parts, start = list[mx.array](), 0
    for segment in (s for own in frozen for s in own if id(s.latents) in arrays):
        place = id(segment.latents), segment.start, segment.size
        if place not in moved:
            moved[place] = replace(segment, start=start)
            parts.append(segment.rows)
            start += segment.size
    pool = mx.concatenate(parts, axis=1) if len(parts) > 1 else mx.contiguous(parts[0])

    def found(s: Segment) -> Segment:
        place = id(s.latents), s.start, s.size
        return replace(moved[place], latents=pool) if place in moved else s

    return tuple(tuple(map(found, own)) for own in frozen)
