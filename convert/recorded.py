"""What a journal says that was written: whether the plan has it so, and the files still hold it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

from mlx_kimi.convert.blocks import RowBlock, TensorReader
from mlx_kimi.convert.output import after
from mlx_kimi.convert.partial import BEGINNING, Partial, Position, begin_anew
from mlx_kimi.convert.plan import ConversionPlan
from mlx_kimi.convert.shards import Shard, places
from mlx_kimi.durable import not_through_a_link
from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import shown


@dataclass(frozen=True)
class Recorded:
    """The blocks that one record stands for."""

    blocks: Sequence[RowBlock]
    crc: int  # CRC-32 of the data that they became, in the order of the work


def recorded_blocks(partial: Partial, plan: ConversionPlan, reader: TensorReader) -> list[Recorded]:
    """The blocks of each record. Reads no file.

    Raises:
        KimiError: a record has another form, or ends where no block of the plan does.
    """
    found: list[Recorded] = []
    blocks, position = plan.blocks(reader), BEGINNING
    for record in partial.records:
        written: list[RowBlock] = []
        end = _position(record)
        while end is None or position != end:
            block = next(blocks, None) if end and position < end else None
            if block is None:
                raise KimiError(
                    f"{partial.journal}: must hold steps, rows and checksums of this conversion in "
                    f"their order, but holds {shown(record)}{begin_anew(partial.folder.parent)}"
                )
            written.append(block)
            position = after(position, block)
        found.append(Recorded(written, record["crc"]))
    return found


def check_written(
    partial: Partial,
    plan: ConversionPlan,
    recorded: Sequence[Recorded],
    advance: Callable[[int], None],
) -> None:
    """Read what was written and compare it with the records.

    Args:
        advance: hears of the bytes of source that each block was made of.

    Raises:
        KimiError: a file is not there, too long, or does not hold what was recorded.
    """
    for shard in plan.shards:  # what follows the last tensor would stay, recorded or not
        path = partial.folder / shard.file
        if path.exists() and path.stat().st_size > shard.nbytes:
            raise _lost(partial, shard.file)
    where = places(plan.shards)
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for record in recorded:
            crc = 0
            for block in record.blocks:
                for output in plan.of(block.source).outputs:
                    shard, tensor = where[output.name]
                    if shard.file not in files:
                        files[shard.file] = stack.enter_context(_opened(partial, shard))
                    rows = shard.read_rows(files[shard.file], tensor, block.first_row, block.rows)
                    crc = zlib.crc32(rows, crc)
                advance(block.nbytes)
            if crc != record.crc:
                raise _lost(partial, "one of its files")


def _opened(partial: Partial, shard: Shard) -> BinaryIO:
    """A file of the result, of which some was written."""
    try:
        file = open(partial.folder / shard.file, "rb", opener=not_through_a_link)
    except FileNotFoundError:
        raise _lost(partial, shard.file) from None
    if file.read(len(shard.header)) != shard.header:
        file.close()
        raise _lost(partial, shard.file)
    return file


def _lost(partial: Partial, what: str) -> KimiError:
    again = begin_anew(partial.folder.parent)
    return KimiError(f"{partial.folder}: {what} does not hold what was written{again}")


def _position(record: dict[str, Any]) -> Position | None:
    """What a record says, if it has the form of what `Partial.record` writes."""
    numbers = [record.get(key) for key in ("step", "rows", "crc")]
    if len(record) > 3 or not all(type(number) is int and number >= 0 for number in numbers):
        return None
    return Position(record["step"], record["rows"])
