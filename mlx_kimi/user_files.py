"""Small files that anyone may have written: bytes and JSON, with errors that show what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mlx_kimi.errors import KimiError

Json = Any  # what json.dumps takes
FILE_BYTES = 64 << 20  # the published tiktoken.model has 2.8 MB


def read_bytes(file: Path) -> bytes:
    """What a file of at most `FILE_BYTES` holds.

    Raises:
        KimiError: it is larger, or cannot be read.
    """
    if file.stat().st_size > FILE_BYTES:
        raise KimiError(f"{file}: may have {FILE_BYTES} bytes, but has {file.stat().st_size}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise KimiError(f"{file}: cannot be read: {error.strerror}") from None


def read_json(file: Path) -> dict[str, Json]:
    """The object in `file`, empty without the file.

    Raises:
        KimiError: it is no JSON object, names a key twice or nests too deeply.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(read_bytes(file).decode(), object_pairs_hook=_object_without_doubles)
    except UnicodeDecodeError as error:
        raise KimiError(f"{file}: must be UTF-8, but byte {error.start} is not") from None
    except RecursionError:
        raise KimiError(f"{file}: nests too deeply") from None
    except ValueError as error:
        raise KimiError(f"{file}: must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise KimiError(f"{file}: must be a JSON object, but is {shown(value)}")
    return value


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
