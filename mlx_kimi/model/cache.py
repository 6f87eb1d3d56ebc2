"""What a model remembers of the tokens it has read: one typed entry a layer.

An entry's arrays are replaced, never written into. A snapshot is therefore the entry's present
references: it costs no time, and no later step can change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_kimi.errors import OptionError
from mlx_kimi.metal_kernels.latents import BITS, is_packed, pack, unpack
from mlx_kimi.metal_kernels.split_kv import SplitKVPlan

TAIL = 256  # tokens of the latent that may be rebuilt at every step (0.3 MB)
RADIX = 4  # neighbours of one size class that merge into one of the next
LAST_CLASS = 5  # of 262,144 tokens (0.3 GB) and more, which are never merged


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
    """Latents of consecutive tokens, padding among them as masked rows.

    Attention has no positional encoding, so a gap changes nothing.
    """

    latents: mx.array  # [B, S, latent | shared key], or packed [B, S, words] uint32
    valid: mx.array | None = None  # [B, S] bool, False for padding; None: there is none
    spare: int = 0  # rows at the end of the latents that hold no token yet; 0 where some are masked

    @property
    def size(self) -> int:
        """Tokens."""
        return self.latents.shape[1] - self.spare

    def arrays(self) -> list[mx.array]:
        return [self.latents] if self.valid is None else [self.latents, self.valid]

    def trimmed(self) -> Segment:
        """The same tokens without spare rows."""
        return self.slice(0, self.size) if self.spare else self

    def with_room(self, room: int) -> Segment:
        """The same tokens, none of them masked, in `room` rows."""
        missing = room - self.latents.shape[1]
        if not missing:
            return self
        latents = mx.pad(self.latents, [(0, 0), (0, missing), (0, 0)])
        return Segment(latents, spare=self.spare + missing)

    def slice(self, start: int, stop: int) -> Segment:
        valid = None if self.valid is None else self.valid[:, start:stop]
        return Segment(self.latents[:, start:stop], valid)

    def packed(self) -> Segment:
        """The same tokens in 8 bits."""
        return self if is_packed(self.latents) else Segment(pack(self.latents), self.valid)

    def plain(self, width: int, dtype: mx.Dtype) -> Segment:
        """The same tokens as numbers, [B, S, width]."""
        if not is_packed(self.latents):
            return self
        return Segment(unpack(self.latents, width, dtype), self.valid)

    def copy(self) -> Segment:
        """The same tokens in arrays of their own: a slice keeps its whole parent alive."""
        return Segment(
            mx.contiguous(self.latents), None if self.valid is None else mx.contiguous(self.valid)
        )

    @staticmethod
    def concatenate(segments: Sequence[Segment]) -> Segment:
        if len(segments) == 1:
            return segments[0]
        latents = mx.concatenate([s.latents for s in segments], axis=1)
        if all(s.valid is None for s in segments):
            return Segment(latents)
        return Segment(latents, mx.concatenate([_valid(s) for s in segments], axis=1))


@dataclass
class LatentCache:
    """The cache of an MLA layer: one latent a token, in frozen segments and a short tail.

    Only the tail is rebuilt when a token comes. A full tail is frozen; four neighbouring segments
    of one size class merge into one of the next, so that a frozen token is copied at most five
    times and 2^20 tokens are at most 19 segments, as many as one launch of the decode kernel takes.
    `bits` 8: frozen latents are packed to 8 bits.
    """

    lengths: tuple[int, ...] = ()
    frozen: tuple[Segment, ...] = ()
    tail: Segment | None = None
    bits: int | None = None  # None: latents stay as they come

    def __post_init__(self) -> None:
        check_latent_bits(self.bits)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.frozen if self.tail is None else (*self.frozen, self.tail.trimmed())

    @property
    def _kept(self) -> tuple[Segment, ...]:
        """The segments as they are kept: the tail with its spare rows."""
        return self.frozen if self.tail is None else (*self.frozen, self.tail)

    @property
    def positions(self) -> int:
        """KV positions held for each row: its tokens, and padding between them."""
        return sum(segment.size for segment in self._kept)

    @property
    def is_masked(self) -> bool:
        """Whether some KV positions may be padding."""
        return any(segment.valid is not None for segment in self._kept)

    def append(self, latents: mx.array, valid: mx.array | None) -> None:
        """Add latents [B, T, width]; `valid` [B, T] is False for padding, None: there is none."""
        new = Segment(latents, valid)
        tail = None if self.tail is None else self.tail.trimmed()
        self._freeze_full(new if tail is None else Segment.concatenate([tail, new]))

    def roomy_tail(self, B: int, width: int, dtype: mx.Dtype) -> Segment:
        """The tail as [B, TAIL, width] latents, of a cache that is not masked."""
        if self.tail is None:
            return Segment(mx.zeros((B, TAIL, width), dtype), spare=TAIL)
        return self.tail.with_room(TAIL)

    @property
    def held(self) -> int:
        """Tokens in the tail."""
        return 0 if self.tail is None else self.tail.size

    @property
    def room(self) -> int:
        """Tokens until the tail is full."""
        return TAIL - self.held

    def plan(self, tokens: int = 1) -> SplitKVPlan:
        """How `mla_decode` divides the attention of the next tokens."""
        frozen = [segment.size for segment in self.frozen]
        return SplitKVPlan.of(self.held + 1, TAIL, frozen, tokens=tokens)

    def grow_tail(self, latents: mx.array, tokens: int = 1) -> None:
        """Take the latents of `roomy_tail`, with so many more tokens among them, up to `room`."""
        self._freeze_full(Segment(latents, spare=self.room - tokens))

    def _freeze_full(self, recent: Segment) -> None:
        """Freeze what is full of the latest tokens; the rest is the tail."""
        full = recent.size // TAIL * TAIL
        if full:
            new = recent if full == recent.size else recent.slice(0, full).copy()
            self.frozen = _merged(self.frozen, new.packed() if self.bits else new)
        if full == recent.size:
            self.tail = None
        else:
            self.tail = recent.slice(full, recent.size).copy() if full else recent

    def arrays(self) -> list[mx.array]:
        return [array for segment in self._kept for array in segment.arrays()]

    def snapshot(self) -> LatentCache:
        return replace(self)

    def restore(self, snapshot: LatentCache) -> None:
        self.__dict__.update(snapshot.__dict__)

    def take(self, rows: Sequence[int]) -> LatentCache:
        """The entry of the batch that consists of these rows, in this order."""
        if not self.segments:
            return LatentCache(bits=self.bits)
        index = mx.array(list(rows))

        def chosen(segment: Segment) -> Segment:
            valid = None if segment.valid is None else segment.valid[index]
            return replace(segment, latents=segment.latents[index], valid=valid)

        return LatentCache(
            tuple(self.lengths[row] for row in rows),
            tuple(chosen(segment) for segment in self.frozen),
            None if self.tail is None else chosen(self.tail),
            self.bits,
        )

    @staticmethod
    def join(entries: Sequence[LatentCache]) -> LatentCache:
        """The entry of one batch made of the rows of several. Each must have read a token.

        Rows of different lengths are padded with masked positions. All entries have the same
        `bits`; frozen latents are not packed a second time, but for fewer than TAIL of each row.
        """
        _all_filled([e.segments[0].latents if e.segments else None for e in entries])
        longest = max(entries, key=lambda entry: entry.positions)
        parts = [
            [s.packed() for s in entry.segments] if entry.bits else entry.segments
            for entry in entries
        ]
        wholes = [_padded(Segment.concatenate(part), longest.positions) for part in parts]
        latents = mx.concatenate([whole.latents for whole in wholes])
        whole = Segment(latents, mx.concatenate([_valid(whole) for whole in wholes]))
        joined = LatentCache(
            tuple(n for entry in entries for n in entry.lengths), bits=longest.bits
        )
        joined._freeze_full(whole)
        if joined.tail is not None and longest.tail is not None:
            _, _, width = longest.tail.latents.shape
            joined.tail = joined.tail.plain(width, longest.tail.latents.dtype)
        return joined


CacheEntry = KDACache | LatentCache


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


def take(cache: Sequence[CacheEntry], rows: Sequence[int]) -> list[CacheEntry]:
    """The cache of the batch that consists of these rows of another, in this order."""
    return [entry.take(rows) for entry in cache]


def join(batches: Sequence[Sequence[CacheEntry]]) -> list[CacheEntry]:
    """The cache of one batch made of the rows of several. Each must have read a token."""
    layers: Any = zip(*batches, strict=True)
    return [type(entries[0]).join(entries) for entries in layers]


def _all_filled(arrays: Sequence[mx.array | None]) -> list[mx.array]:
    filled = [array for array in arrays if array is not None]
    if len(filled) < len(arrays):
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


def _padded(segment: Segment, positions: int) -> Segment:
    missing = positions - segment.size
    if not missing:
        return segment
    latents = mx.pad(segment.latents, [(0, 0), (0, missing), (0, 0)])
    return Segment(latents, mx.pad(_valid(segment), [(0, 0), (0, missing)]))


def _valid(segment: Segment) -> mx.array:
    if segment.valid is not None:
        return segment.valid
    return mx.ones(segment.latents.shape[:2], mx.bool_)
