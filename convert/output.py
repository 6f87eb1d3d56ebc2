"""The files of the result: rows put at their places, and recorded once they are safe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO

from mlx_kimi.convert.partial import Partial, Position
from mlx_kimi.convert.shards import Part, Shard
from mlx_kimi.durable import sync

SYNC = 64 * 2**20  # bytes of source between two records: what a power cut costs at most


@dataclass(frozen=True)
class Rows:
    """A block as it is written."""

    first_row: int  # of its tensor, flattened to [rows, last axis]
    parts: Sequence[tuple[Part, memoryview]]
    source_bytes: int  # that it was made of
    position: Position  # once it is written


class Output:
    """Writes rows in the order of the work. One thread at a time may use it."""

    def __init__(self, partial: Partial, shards: Sequence[Shard]) -> None:
        self._partial = partial
        self._shards = {part.name: shard for shard in shards for part in shard.parts}
        self._position = partial.position
        self._unsafe = 0  # bytes of source since the last record
        self._files: dict[str, BinaryIO] = {}  # written to since then
        self._open = ExitStack()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._open.close()

    def write(self, rows: Rows) -> int:
        """Write a block, and record what is written whenever that is enough.

        Returns:
            The bytes of source that it was made of.

        Raises:
            OSError: the disk fails or is full.
        """
        for part, data in rows.parts:
            shard = self._shards[part.name]
            shard.write_rows(self._file(shard), part, rows.first_row, data)
        self._position = rows.position
        self._unsafe += rows.source_bytes
        if self._unsafe >= SYNC:
            self.record()
        return rows.source_bytes

    def record(self) -> None:
        """Sync what was written since the last record, and then record it: it counts from now on.

        Raises:
            OSError: the disk fails or is full.
        """
        if not self._files:
            return
        paths = [self._partial.folder / name for name in self._files]
        self._open.close()  # which flushes
        for path in paths:
            sync(path)
        self._partial.record(self._position, paths)
        self._files, self._unsafe = {}, 0

    def _file(self, shard: Shard) -> BinaryIO:
        """The file as it is, or new; its name and its header are safe with the next record."""
        if shard.file not in self._files:
            path = self._partial.folder / shard.file
            path.touch()
            sync(path.parent)
            file = self._open.enter_context(open(path, "r+b"))
            file.write(shard.header)
            self._files[shard.file] = file
        return self._files[shard.file]
