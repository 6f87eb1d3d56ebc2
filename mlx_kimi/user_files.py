"""Files that anyone may have written: bytes and JSON, with errors that show what is wrong.

Only regular files are opened: a pipe would be waited for, and a device may have no end. No more of
them is read than a bound: JSON takes up to thirty times its size in memory.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from mlx_kimi.errors import KimiError

Json = Any  # what json.dumps takes
FILE_BYTES = 64 << 20  # the published tiktoken.model has 2.8 MB
JSON_BYTES = 16 << 20  # an index of 20,000 tensors has 2 MB, and so have the headers of its files


def is_there(file: Path) -> bool:
    """Whether a folder has this name in it, whatever it is: a link to nothing is no absent file."""
    return os.path.lexists(file)


def only_regular(path: str, flags: int) -> int:
    """An `opener` that opens regular files and, without waiting, nothing else.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise OSError(errno.EINVAL, "Not a regular file", path)
    return descriptor


def read_bytes(file: Path, most: int = FILE_BYTES) -> bytes:
    """What a file of at most `most` bytes holds.

    Raises:
        KimiError: it is larger, no regular file, or cannot be read.
    """
    try:
        with open(file, "rb", opener=only_regular) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > most:
                raise KimiError(f"{file}: may have {most} bytes, but has {size}")
            data = opened.read(most + 1)
    except OSError as error:
        raise KimiError(f"{file}: cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise KimiError(f"{file}: may have {most} bytes, but has more")
    return data


def decoded(data: bytes, name: Path | str) -> str:
    """The text of what a file, or stdin, holds.

    Raises:
        KimiError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise KimiError(f"{name}: must be UTF-8, but byte {error.start} is not") from None


def read_json_if_there(file: Path) -> dict[str, Json]:
    """The object in `file`, empty without the file.

    Raises:
        KimiError: it is no JSON object, names a key twice or nests too deeply.
    """
    return parsed_json(read_bytes(file, JSON_BYTES), file) if is_there(file) else {}


def parsed_json(text: bytes, file: Path) -> dict[str, Json]:
    """The object that `text`, of `file`, spells.

    Raises:
        KimiError: it is no JSON object, names a key twice or nests too deeply.
    """
    value = parsed_value(text, file)
    if not isinstance(value, dict):
        raise KimiError(f"{file}: must be a JSON object, but is {shown(value)}")
    return value


def parsed_value(text: bytes, file: Path) -> Json:
    """What `text`, of `file`, spells: an object or anything else.

    Raises:
        KimiError: it is no JSON, names a key twice or nests too deeply.
    """
    try:
        return json.loads(decoded(text, file), object_pairs_hook=_object_without_doubles)
    except RecursionError:
        raise KimiError(f"{file}: nests too deeply") from None
    except ValueError as error:
        raise KimiError(f"{file}: must be JSON: {error}") from None


def _object_without_doubles(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(double)} comes twice in one object")
    return found


def shown(value: Json) -> str:
    """A value in an error: short, on one line."""
    text = repr(value)
    if not text.isprintable():  # of an object that JSON does not know
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 60 else text[:60] + "…"
