"""The order of the work: file by file of the source, so that each file is needed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from mlx_kimi.convert.blocks import Piece, Source
from mlx_kimi.convert.plan import Plan


@dataclass(frozen=True)
class Step:
    """One tensor of the source, and what becomes of it."""

    plan: Plan
    piece: Piece
    file: str  # of the source

    @property
    def out_bytes(self) -> int:
        """What it adds to the result."""
        return self.piece.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """What one of its rows adds."""
        return sum(part.row_bytes for part in self.plan.parts)


def steps_of(plans: Sequence[Plan], source: Source) -> list[Step]:
    """Every step, by file and within a file in the order of the plans."""
    steps = [
        Step(plan, piece, source.file(piece))
        for plan in plans
        for piece in source.pieces(plan.tensor)
    ]
    return sorted(steps, key=lambda step: step.file)


def by_file(steps: Sequence[Step]) -> Iterator[tuple[str, range]]:
    """Each file of the source with the numbers of its steps."""
    stop = 0
    for file, run in groupby(steps, key=lambda step: step.file):
        start, stop = stop, stop + sum(1 for _ in run)
        yield file, range(start, stop)


def written_bytes(steps: Sequence[Step], number: int, rows: int) -> int:
    """What the first `number` steps add to the result, and `rows` rows of the next."""
    begun = rows * steps[number].row_bytes if rows else 0
    return sum(step.out_bytes for step in steps[:number]) + begun
