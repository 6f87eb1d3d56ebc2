"""/file: a text file as a part of a message."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_kimi.cli.fence import fenced
from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import decoded, read_bytes

FILE_BYTES = 16 << 20  # more than the longest context holds


@dataclass(frozen=True)
class Attachment:
    """A file that goes with the next message: its path as given, and its part of the message."""

    path: str
    text: str


def attachment(path: str) -> Attachment:
    """The file's text in a fence that nothing in it closes, under its name.

    Raises:
        KimiError: it cannot be read, is too large, or is not UTF-8.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise KimiError(f"{file} is a folder, and /file takes a file")
    if not file.exists():
        raise KimiError(f"{file}: no such file")
    return Attachment(path, fenced(file.name, decoded(read_bytes(file, FILE_BYTES), file)))
