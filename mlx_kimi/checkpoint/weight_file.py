"""A file of weights that stays open, and must stay what it was when its header was read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import only_regular

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class FileVersion:
    """What tells a file from another under its name, and from itself once it is written to."""

    device: int
    inode: int
    size: int  # bytes
    modified: int  # nanoseconds since the epoch
    changed: int  # the same of anything about it: a writer may set `modified` back, but not this
    names: int  # links; 0 once it was removed or another file took its name
    rights: tuple[int, int, int]  # mode, user, group

    @staticmethod
    def of(descriptor: int) -> FileVersion:
        """Of an open file.

        Raises:
            OSError: it cannot be asked for.
        """
        s = os.fstat(descriptor)
        rights = (s.st_mode, s.st_uid, s.st_gid)
        return FileVersion(
            *(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_nlink, rights)
        )

    def is_written_to(self, now: FileVersion) -> bool:
        """Whether `now` may hold other bytes. Another name or other rights explain `changed`."""
        here = (self.device, self.inode, self.size, self.modified, self.names > 0)
        if here != (now.device, now.inode, now.size, now.modified, now.names > 0):
            return True
        explained = (self.names, self.rights) != (now.names, now.rights)
        return self.changed != now.changed and not explained

    def change_to(self, now: FileVersion) -> str:
        """What became of the file, in words."""
        if not now.names:
            return "removed"
        if (now.device, now.inode) != (self.device, self.inode):
            return "replaced"
        if now.size < self.size:
            return f"cut to {now.size:,} of {self.size:,} bytes"
        return "written to"


def name_of(descriptor: int) -> str:
    """A path that opens this open file once more, whatever has its own name by then.

    On macOS both share a position; here none but the start is read through it.
    """
    return f"/dev/fd/{descriptor}"


class OpenFile:
    """Reads bytes of one version of a file, or fails."""

    def __init__(self, path: Path, version: FileVersion, use: str) -> None:
        """Open it. `use` is what it is read for: "the model is in use".

        Raises:
            KimiError: it cannot be opened, or is not the file of `version`.
        """
        self.path, self._version, self._use = path, version, use
        try:
            self._file = open(path, "rb", buffering=0, opener=only_regular)
        except OSError as error:
            raise self._unreadable(error) from None
        try:
            self._check()
        except BaseException:
            self._file.close()
            raise

    def read(self, offset: int, into: Bytes) -> None:
        """Fill `into` [bytes] from `offset` on. Any thread may call it.

        Raises:
            KimiError: the file cannot be read, or is no longer what it was.
        """
        try:
            self._check()
            done = 0
            while done < into.nbytes:
                count = os.preadv(self._file.fileno(), [into[done:].data], offset + done)
                if not count:
                    raise KimiError(
                        f"{self.path}: ends at byte {offset + done}, within weights that are in use"
                    )
                done += count
            self._check()
        except OSError as error:
            raise self._unreadable(error) from None

    @property
    def name(self) -> str:
        """See `name_of`."""
        return name_of(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _check(self) -> None:
        now = FileVersion.of(self._file.fileno())
        if self._version.is_written_to(now):
            change = self._version.change_to(now)
            raise KimiError(f"{self.path}: was {change} while {self._use}")
        self._version = now

    def _unreadable(self, error: OSError) -> KimiError:
        return KimiError(f"{self.path}: cannot be read while {self._use}: {error.strerror}")
