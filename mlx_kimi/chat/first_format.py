"""Texts of sessions as they were written first: the whole text each time, the one before beside it.

    a line with a checksum of the others, one about the session, then one a turn

They are read, and written in the present format when something is added.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_kimi.chat.conversation import Conversation, read_turn
from mlx_kimi.errors import KimiError
from mlx_kimi.units import counted
from mlx_kimi.user_files import read_bytes

PREVIOUS, FORMAT = "chat.previous.jsonl", 1
Fields = dict[str, Any]


def read(
    folder: Path, name: str, most: int, is_about: Callable[[Fields], bool]
) -> tuple[Fields, Conversation, str]:
    """What is said about the session, the conversation, and what had to be left out, if anything.

    Raises:
        KimiError: neither version of the text can be read.
    """
    problems = []
    for file in (folder / name, folder / PREVIOUS):
        try:
            about, conversation = _parse(file, most, is_about)
        except (KimiError, ValueError) as error:
            problems.append(str(error) if isinstance(error, KimiError) else f"{file.name}: {error}")
            continue
        note = "its last change is lost: the file is damaged" if problems else ""
        return about, conversation, note
    for file in (folder / name, folder / PREVIOUS):
        if file.is_file() and (rescued := _rescued(file, most)).turns:
            return {}, rescued, f"damaged: {counted(len(rescued.turns), 'turn')} could be read"
    raise KimiError(f"{folder}: no session can be read: {'; '.join(problems)}")


def _parse(
    path: Path, most: int, is_about: Callable[[Fields], bool]
) -> tuple[Fields, Conversation]:
    """Read a text strictly.

    Raises:
        ValueError: it is not whole.
        KimiError: it cannot be read.
    """
    first, _, body = read_bytes(path, most).partition(b"\n")
    try:
        header = json.loads(first)
        if header["mlx_kimi_session"] not in (FORMAT, FORMAT + 1):
            raise ValueError(f"format {header['mlx_kimi_session']} is not known here")
        if header["checksum"] != zlib.crc32(body):
            raise ValueError("damaged")
        about, *turns = map(json.loads, body.splitlines())
        if not is_about(about):
            raise ValueError("damaged")
        return about, Conversation(about["system"], [read_turn(turn) for turn in turns])
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise ValueError("damaged") from None


def _rescued(path: Path, most: int) -> Conversation:
    """The turns of a damaged text that are whole, up to the first that is not."""
    found = Conversation()
    try:
        lines = read_bytes(path, most).splitlines()[1:]
    except KimiError:
        return found
    for line in lines:
        try:
            value = json.loads(line)
            if "system" in value:
                found.system = value["system"] if isinstance(value["system"], str) else None
            else:
                found.turns.append(read_turn(value))
        except (ValueError, KeyError, TypeError, RecursionError):
            break
    return found
