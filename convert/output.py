"""The files of the result: rows put at their places, and recorded once they are on the disk."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import BinaryIO

from mlx_kimi.convert.blocks import RowBlock
from mlx_kimi.convert.partial import Partial, Position
from mlx_kimi.convert.shards import Shard, places
from mlx_kimi.durable import not_through_a_link, sync

SYNC = 64 * 2**20  # bytes of source between two records: what a power cut costs at most

# A block, and what became of it: the data of each tensor of the result, by its name.
Converted = tuple[RowBlock, Mapping[str, memoryview]]


class Output:
    """Writes blocks in the order of the work. One thread at a time may use it."""

    def __init__(self, partial: Partial, shards: Sequence[Shard]) -> None:
        self._partial = partial
        self._places = places(shards)
        self._position = partial.position
        self._unrecorded = 0  # bytes of source since the last record
        self._crc = 0  # of the data since then
        self._files: dict[str, BinaryIO] = {}  # written to since then
        self._open = ExitStack()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._open.close()

    def write(self, converted: Converted) -> int:
        """Write the block that comes next, and make a record after every SYNC bytes.

        Returns:
            The bytes of source that it was made of.

        Raises:
            OSError: the disk fails or is full.
        """
        block, arrays = converted
        for name, data in arrays.items():
            shard, tensor = self._places[name]
            shard.write_rows(self._file(shard), tensor, block.first_row, data)
            self._crc = zlib.crc32(data, self._crc)
        self._position = after(self._position, block)
        self._unrecorded += block.nbytes
        if self._unrecorded >= SYNC:
            self.record()
        return block.nbytes

    def record(self) -> None:
        """Sync what was written since the last record, then record it: from now on it counts.

        Raises:
            OSError: the disk fails or is full.
        """
        if not self._files:
            return
        paths = [self._partial.folder / name for name in self._files]
        self._open.close()  # which flushes
        for path in paths:
            sync(path)
        self._partial.record(self._position, self._crc)
        self._files, self._unrecorded, self._crc = {}, 0, 0

    def _file(self, shard: Shard) -> BinaryIO:
        """The file as it is, or new; its name and its header are safe with the next record."""
        if shard.file not in self._files:
            path = self._partial.folder / shard.file
            os.close(not_through_a_link(str(path), os.O_WRONLY | os.O_CREAT))
            sync(path.parent)
            file = self._open.enter_context(open(path, "r+b", opener=not_through_a_link))
            file.write(shard.header)
            self._files[shard.file] = file
        return self._files[shard.file]


def after(position: Position, block: RowBlock) -> Position:
    """The position behind `block`, which begins at `position`."""
    rows = block.skip + block.rows
    if rows < block.source.rows:
        return Position(position.step, rows)
    return Position(position.step + 1, 0)
