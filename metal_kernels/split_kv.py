"""How one token's attention is cut into splits: parts of the KV positions, each its own softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from mlx_kimi.metal_kernels.tuning import tuning

# Segments that one launch takes: with three more inputs and two outputs 24 buffers. Metal has 31,
# of which its validation layer may need some.
SEGMENTS = 19


@dataclass(frozen=True)
class SplitKVPlan:
    """The splits of a token's attention: the same in all layers that hold as many latents."""

    arrays: tuple[mx.array, ...]  # int32, one a launch of mla_attend, whose text says what is in it
    splits: tuple[int, ...]  # of each launch; they depend on the segments, not on the tail's size

    @staticmethod
    def of(
        size: int,
        room: int,
        segments: Sequence[int],
        positions: int | None = None,
        tokens: int = 1,
    ) -> SplitKVPlan:
        """The plan for `size` latents, the first new one included, in a tail of `room` rows.

        Args:
            segments: the sizes of the segments. A launch takes SEGMENTS of them; 2^20 tokens are
                no more.
            positions: of a split, a multiple of 8; None: as many as keep a GPU busy.
            tokens: of each text, which become latents of the tail.
        """
        if positions is None:
            positions = positions_of_a_split(room + sum(segments))
        arrays, splits = [], []
        for start in range(0, max(len(segments), 1), SEGMENTS):
            group = list(segments[start : start + SEGMENTS])
            absent = [0] * (SEGMENTS - len(group))
            held, rooms = (size, room) if start == 0 else (0, 0)
            ends = list(accumulate(-(-n // positions) for n in [rooms, *group, *absent]))
            numbers = [positions, ends[-1], 0, *ends[:-1], held, *group, *absent, tokens]
            arrays.append(mx.array(numbers, mx.int32))
            splits.append(ends[-1])
        return SplitKVPlan(tuple(arrays), tuple(splits))


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


def sizes_in(array: mx.array) -> mx.array:
    """Of one of a plan's arrays: how many latents are in the tail, and in each segment."""
    return array[2 + SEGMENTS + 1 : -1]
