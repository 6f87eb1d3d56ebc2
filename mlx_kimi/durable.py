"""Files that are whole or absent, whenever the power goes."""

from __future__ import annotations

import errno
import fcntl
import os
import zlib
from collections.abc import Callable
from pathlib import Path

from mlx_kimi.user_files import only_regular

# On macOS fsync hands the data to the drive, which may still lose it with the power.
FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None)
NEW = ".new"  # in the name of a file that is being made
BLOCK = 1 << 22  # bytes read at once


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, sync it, and give it its name.

    The file made is private: conversations are nobody else's business.
    """
    made = path.with_name(f".{path.stem}{NEW}{path.suffix}")
    made.unlink(missing_ok=True)  # what an interrupted run left, or a link to anything
    try:
        write(made)
        made.chmod(0o600)
        sync(made)
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)
    sync(path.parent)


def write_bytes_durably(path: Path, data: bytes) -> None:
    """The same, of a file that holds `data`."""
    write_durably(path, lambda made: made.write_bytes(data))


def append_durably(path: Path, data: bytes, size: int) -> None:
    """Add `data` to a file of `size` bytes that has no other name, and sync it.

    Raises:
        OSError: it is not such a file, or cannot be written.
    """
    with open(path, "r+b", opener=not_through_a_link) as file:
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_nlink) != (size, 1):
            raise OSError(errno.EINVAL, "Not the file that was written", str(path))
        file.seek(size)
        file.write(data)
    sync(path)


def not_through_a_link(path: str, flags: int) -> int:
    """An `opener` for files of ours in a folder of ours: a link there leads to what is not ours.

    Raises:
        OSError: the last part of `path` is a symbolic link, or no regular file.
    """
    return only_regular(path, flags | os.O_NOFOLLOW)


def finished_name(name: str) -> str:
    """The name that a file was to get if an interrupted `write_durably` left it; else `name`."""
    stem, new, suffix = name.rpartition(NEW)
    return stem[1:] + suffix if new and stem.startswith(".") else name


def checksum(path: Path, most: int | None = None) -> int:
    """CRC-32 of a file, or of its first `most` bytes. It finds damage, not forgery."""
    crc, left = 0, os.stat(path).st_size if most is None else most
    with open(path, "rb", opener=only_regular) as file:
        while block := file.read(min(BLOCK, left)):
            crc, left = zlib.crc32(block, crc), left - len(block)
    return crc


def sync(path: Path) -> None:
    """Return once what was written to a file, or which names a folder holds, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if FULL_SYNC is not None and path.is_file():
            fcntl.fcntl(handle, FULL_SYNC)
    finally:
        os.close(handle)
