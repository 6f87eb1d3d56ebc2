"""/file: a text file as a part of a message."""

from __future__ import annotations

from pathlib import Path

from mlx_kimi.cli.fence import fenced
from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import read_bytes

FILE_BYTES = 16 << 20  # more than the longest context holds


def file_message(path: str) -> str:
    """The file's text in a fence that nothing in it closes, under its name.

    Raises:
        KimiError: it cannot be read, is too large, or is not UTF-8.
    """
    if not path:
        raise KimiError("/file needs a path")
    file = Path(path).expanduser()
    if not file.is_file():
        raise KimiError(f"{file}: no such file")
    try:
        text = read_bytes(file, FILE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise KimiError(f"{file}: must be UTF-8, but byte {error.start} is not") from None
    return fenced(file.name, text)
