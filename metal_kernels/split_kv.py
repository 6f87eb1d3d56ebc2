"""How the attention of a few tokens is cut into splits: parts of the KV positions of one text, each
its own softmax.

A text's latents lie in several arrays, and an array may hold latents of several texts. Which text
reads which rows is data, so that one launch serves texts of unlike contexts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, repeat
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_kimi.metal_kernels.kernel import is_traced
from mlx_kimi.metal_kernels.tuning import tuning

# Arrays that one launch takes: with three more inputs and two outputs 24 buffers. Metal has 31, of
# which its validation layer may need some.
SEGMENTS = 19
SPLIT_INTS = 5  # of a split in a launch's array: array, text, start, size, seen
MOST_SPLITS = 1024  # of a text in mla_output; `positions_of_a_split` asks for at most about 550
FEWEST = 8  # numbers of an array; MLX passes a smaller one in Metal's constant address space


class Part(NamedTuple):
    """Neighbouring latents of one text."""

    array: int  # among the arrays of the step
    start: int  # the first one's row, where the array is [rows, ...]
    size: int


@dataclass(frozen=True)
class SplitKVPlan:
    """The splits of a step of `tokens` tokens of each text: the same in all layers.

    Shapes depend on `count` and `capacities` alone.

    Attributes:
        texts: int32: tokens, texts, of each text the latents in its tail with the first new one,
            then of each the first of its splits in `places`, and the end; last the places of all
            splits, in a text's order, among those of all launches.
        launches: int32, of each launch of mla_attend: tokens, then SPLIT_INTS numbers a split. The
            array is 0 for the tail, else one of the launch's arrays, counted from 1; `start` its
            row there, in the tail within the text's room; `size` the positions for the last token,
            of which token i sees `seen` + i at most. A split of size 0 is none.
        capacities: splits that each launch has room for.
        count: texts.
    """

    texts: mx.array
    launches: tuple[mx.array, ...]
    capacities: tuple[int, ...]
    count: int

    @staticmethod
    def of(
        held: Sequence[int],
        room: int,
        parts: Sequence[Sequence[Part]],
        positions: int | None = None,
        tokens: int = 1,
    ) -> SplitKVPlan:
        """The plan for texts whose tails hold `held` latents each, the first new one included.

        Args:
            room: rows of each tail; there is room for all new tokens.
            parts: of each text, its latents before the tail. A launch takes SEGMENTS arrays.
            positions: of a split, a multiple of 8; None: as many as keep a GPU busy with so many
                texts, by the text's own length, so that no text's splits depend on another's.
            tokens: of each text.

        Raises:
            ValueError: a text has more than MOST_SPLITS splits.
        """
        splits = tuning().splits
        steps = [
            positions or positions_of_a_split(long, max(1, splits // len(held)))
            for long in (room + sum(part.size for part in own) for own in parts)
        ]
        tails, places = list[Ints](), list[list[tuple[int, range]]]()  # of a text: launch, splits
        for text, (size, step) in enumerate(zip(held, steps, strict=True)):
            before = len(tails)
            tails += _in_tail(text, size, size + tokens - 1, step)
            places.append([(0, range(before, len(tails)))])
        launches = [[np.array(tails, np.int32)]]
        sizes = [len(tails)]
        for text, (own, step) in enumerate(zip(parts, steps, strict=True)):
            for launch, found in _frozen(text, tuple(own), step):
                while launch >= len(launches):
                    launches.append([])
                    sizes.append(0)
                places[text].append((launch, range(sizes[launch], sizes[launch] + len(found))))
                launches[launch].append(found)
                sizes[launch] += len(found)
        capacities = tuple(_capacity(size) if is_traced() else size for size in sizes)
        return SplitKVPlan(
            _texts(tokens, held, places, capacities),
            tuple(map(_with_room, launches, capacities, repeat(tokens))),
            capacities,
            len(held),
        )

    @staticmethod
    def uniform(
        size: int,
        room: int,
        segments: Sequence[int],
        positions: int | None = None,
        tokens: int = 1,
        texts: int = 1,
    ) -> SplitKVPlan:
        """The plan for texts of one length, in arrays [texts, segment's size, ...]."""
        parts = [
            [Part(number, text * rows, rows) for number, rows in enumerate(segments)]
            for text in range(texts)
        ]
        return SplitKVPlan.of([size] * texts, room, parts, positions, tokens)


Ints = tuple[int, int, int, int, int]  # SPLIT_INTS


def _in_tail(text: int, seen: int, end: int, positions: int) -> list[Ints]:
    """The splits of a tail, of which the first token sees `seen` latents and the last `end`."""
    return [
        (0, text, start, min(positions, end - start), seen - start)
        for start in range(0, end, positions)
    ]


def _texts(
    tokens: int,
    held: Sequence[int],
    places: Sequence[Sequence[tuple[int, range]]],
    capacities: Sequence[int],
) -> mx.array:
    """`SplitKVPlan.texts`, of each text's splits: their launches and their numbers there."""
    firsts = [0, *accumulate(capacities)]
    order, ends = list[int](), [0]
    for own in places:
        for launch, numbers in own:
            order += range(firsts[launch] + numbers.start, firsts[launch] + numbers.stop)
        if len(order) - ends[-1] > MOST_SPLITS:
            raise ValueError(
                f"[SplitKVPlan] a text must have at most {MOST_SPLITS} splits but has "
                f"{len(order) - ends[-1]}."
            )
        ends.append(len(order))
    order += [0] * (max(firsts[-1], FEWEST) - len(order))
    return mx.array(np.array([tokens, len(held), *held, *ends, *order], np.int32))


@lru_cache(maxsize=256)
def _frozen(
    text: int, parts: tuple[Part, ...], positions: int
) -> tuple[tuple[int, np.ndarray], ...]:
    """The splits of a text's frozen latents, and the launch that reads them."""
    if not parts:
        return ()
    arrays, starts, sizes = np.array(parts).T
    counts = -(-sizes // positions)
    of_part = np.repeat(np.arange(len(parts)), counts)
    first = (np.arange(len(of_part)) - np.repeat(np.cumsum(counts) - counts, counts)) * positions
    launches, numbers = np.divmod(arrays[of_part], SEGMENTS)
    size = np.minimum(positions, sizes[of_part] - first)
    columns = (1 + numbers, np.full_like(size, text), starts[of_part] + first, size, size)
    splits = np.stack(columns, axis=-1).astype(np.int32)
    return tuple((int(n), splits[launches == n]) for n in np.unique(launches))


def _capacity(splits: int) -> int:
    """Of a launch in a graph: few classes, so that one serves many lengths. What is not used costs
    a GPU next to nothing."""
    capacity = 64
    while capacity < splits:
        capacity *= 4
    return capacity


def _with_room(splits: Sequence[np.ndarray], capacity: int, tokens: int) -> mx.array:
    numbers = np.zeros(1 + max(capacity, FEWEST // SPLIT_INTS + 1) * SPLIT_INTS, np.int32)
    numbers[0] = tokens
    if splits:
        flat = np.concatenate(splits).reshape(-1)
        numbers[1 : 1 + len(flat)] = flat
    return mx.array(numbers)


def positions_of_a_split(total: int, splits: int | None = None) -> int:
    """As many as give the GPU its `splits`, but 64 at least and 1024 at most while 512 splits do.

    What a split adds to what is read, its queries and its outputs, is as much as 120 positions.
    `splits` None: those of this GPU.
    """
    splits = splits or tuning().splits
    wanted = -(-total // splits) if total <= splits * 1024 else max(1024, -(-total // 512))
    return max(64, multiple_of(64, wanted))


def multiple_of(divisor: int, x: int) -> int:
    """The least multiple of `divisor` that is not below x."""
    return -(-x // divisor) * divisor


class Splits(NamedTuple):
    """A launch's array in columns, each [splits] int32."""

    array: mx.array
    text: mx.array
    start: mx.array
    size: mx.array
    seen: mx.array

    @staticmethod
    def of(launch: mx.array, capacity: int) -> Splits:
        columns = launch[1 : 1 + capacity * SPLIT_INTS].reshape(-1, SPLIT_INTS).swapaxes(0, 1)
        return Splits(*columns)


def places_of(texts: mx.array, B: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Of each of B texts: the places of all splits, and which of them are its own."""
    firsts, places = texts[2 + B : 3 + 2 * B], texts[3 + 2 * B :]
    number = mx.arange(places.size)
    for text in range(B):
        yield places, (number >= firsts[text]) & (number < firsts[text + 1])
