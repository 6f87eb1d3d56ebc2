"""How far a conversion came: a file that survives a power cut."""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

from mlx_kimi.durable import not_through_a_link, sync

LINE_BYTES = 1 << 20  # of a record at most
JOURNAL_BYTES = 16 << 20  # of all: a record of 60 bytes follows every 64 MiB of source


class Journal:
    """Records, each a line with its CRC-32. A torn line and all after it do not count.

    A process that has it open holds its lock; the system releases the lock of one that dies.
    """

    def __init__(self, path: Path) -> None:
        """Open or make it, and cut off a torn line and what follows.

        Raises:
            BlockingIOError: another process has it open.
            OSError: it cannot be opened, or the disk knows no locks.
            ValueError: it is no journal.
        """
        self._path = path
        self._file = open(path, "a+b", opener=not_through_a_link)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.records = self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is on the disk when this returns."""
        text = json.dumps(record).encode()
        self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._file.flush()
        sync(self._path)
        self.records.append(record)

    def restart(self, record: dict[str, Any]) -> None:
        """Forget all records but this new one."""
        self._file.truncate(0)
        self.records = []
        self.append(record)

    @property
    def is_current(self) -> bool:
        """Whether the file still has its name: its last holder may have deleted it."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def _read(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        end = 0
        if self._file.seek(0, os.SEEK_END) > JOURNAL_BYTES:
            raise ValueError("no journal")
        self._file.seek(0)
        while line := self._file.readline(LINE_BYTES):
            record = _record(line)
            if record is None:
                if not records and not TORN.fullmatch(line):
                    raise ValueError("no journal")
                break
            records.append(record)
            end += len(line)
        self._file.truncate(end)
        return records


# A first line of which a power cut left a part, in zeros where nothing had been written.
TORN = re.compile(rb"[0-9a-f]{0,8}|[0-9a-f]{8} ({.*)?|\0+|[0-9a-f]{8} {.*\0+", re.DOTALL)


def first_record(path: Path) -> dict[str, Any] | None:
    """The first record of a journal that another process may have open; None if there is none."""
    try:
        with open(path, "rb", opener=not_through_a_link) as file:
            line = file.readline(LINE_BYTES)
    except OSError:
        return None
    return _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line says; None if it is torn, or was no record."""
    if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(line[9:-1]):
        return None
    try:
        record = json.loads(line[9:])
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
