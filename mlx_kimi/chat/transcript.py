"""The text of a conversation on disk: a line is added with every change, to a file and to its copy.

    chat.jsonl        a line that names the format, then one a save: ["CRC", RECORD]
    chat.copy.jsonl   the same lines

A record is {"save": N, "keep": K, "turns": [...], ...}: the first K turns stay, and these come
after them, so that saying, answering, going back and changing are all a record. Its other fields
are what changed of the session's description. CRC is of all records so far: a line that is missing,
doubled or half there ends what is believed, and so a crash at any byte leaves the conversation of
the save before or of this one. A damaged file costs nothing, as its copy has the same.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_kimi.chat import first_format
from mlx_kimi.chat.conversation import Conversation, Turn, read_turn, same_turns
from mlx_kimi.durable import append_durably, write_bytes_durably
from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import read_bytes

TEXT, COPY = "chat.jsonl", "chat.copy.jsonl"
NAMES = (TEXT, COPY, first_format.PREVIOUS)
HEAD = b'{"mlx_kimi_session": 2}\n'
TEXT_BYTES = 6 << 23  # more characters, in JSON, than a template may render
RECORDS_PER_TURN = 4  # beyond which many answers were taken back, and the files are written anew
LOST = "its last change is lost: the file is damaged"
Fields = dict[str, Any]


@dataclass
class Written:
    """What the records of a file say, up to the first that is not whole.

    Attributes:
        about: the session's fields, as the last record has them.
        before: the same of the record before.
        save: the number of the last; 0 of what is not stored, or in the first format.
        end: bytes up to there.
        rest: what follows.
    """

    about: Fields = field(default_factory=dict)
    before: Fields = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    save: int = 0
    records: int = 0
    crc: int = 0
    end: int = 0
    rest: bytes = b""

    def take(self, record: bytes) -> None:
        """One more record.

        Raises:
            ValueError, KeyError, TypeError, RecursionError: it has not the form of one.
        """
        value = json.loads(record)
        save, keep = value.pop("save"), value.pop("keep")
        turns = [read_turn(turn) for turn in value.pop("turns")]
        follows = self.save < save and 0 <= keep <= len(self.turns)
        if not (follows and is_about({**self.about, **value})):
            raise ValueError("not a record")
        self._add(record, save, keep, turns, value)

    def change(self, keep: int, turns: list[Turn], fields: Fields) -> bytes:
        """The line that says so, and is taken."""
        changed = {name: value for name, value in fields.items() if self.about.get(name) != value}
        if not self.records:
            changed = fields
        said = {"save": self.save + 1, "keep": keep, "turns": [vars(turn) for turn in turns]}
        record = json.dumps(said | changed).encode()
        line = self.line(record)
        self._add(record, self.save + 1, keep, turns, changed)
        return line

    def kept(self, turns: list[Turn]) -> int:
        """How many of `turns` are there already."""
        same, shortest = same_turns(self.turns, turns), min(len(self.turns), len(turns))
        differ = (place for place in range(same, shortest) if self.turns[place] != turns[place])
        return next(differ, shortest)

    def line(self, record: bytes) -> bytes:
        """A record as it stands in the file."""
        return b'["%08x", %b]\n' % (zlib.crc32(record, self.crc), record)

    def _add(self, record: bytes, save: int, keep: int, turns: list[Turn], changed: Fields) -> None:
        self.turns[keep:] = turns
        self.about, self.before, self.save = {**self.about, **changed}, self.about, save
        self.end += len(self.line(record))
        self.crc = zlib.crc32(record, self.crc)
        self.records += 1


class Transcript:
    """The text of one session, read and added to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._written = folder, Written()
        self._in_step = False  # both files hold what was written, and nothing else

    @property
    def about(self) -> Fields:
        return self._written.about

    @property
    def before(self) -> Fields:
        return self._written.before

    def read(self) -> tuple[Conversation, str]:
        """The conversation, and what the user should know of how it could be read.

        Raises:
            KimiError: nothing of it can be read.
        """
        text, copy = (_parsed(self.folder / name) for name in (TEXT, COPY))
        best = max((text, copy), key=lambda file: file.save)  # (the first of two that are alike)
        if not best.save:
            self._written, note = _of_first_format(self.folder)
        else:
            self._written, note = best, _note(text, copy)
            self._in_step = text == copy and not best.rest
        return Conversation(self.about.get("system"), list(self._written.turns)), note

    def is_as_it_was_read(self) -> bool:
        """Whether nobody else has changed it since."""
        other = Transcript(self.folder)
        try:
            other.read()
        except KimiError:
            return False
        mine, theirs = self._written, other._written
        return (mine.save, mine.crc, mine.turns) == (theirs.save, theirs.crc, theirs.turns)

    def save(self, conversation: Conversation, about: Mapping[str, Any]) -> None:
        """Store a conversation, and what is said about its session.

        Raises:
            OSError: a file cannot be written. The next save writes all of it.
            KimiError: the text is too long.
        """
        fields, turns = {"system": conversation.system, **about}, conversation.turns
        was = self._written
        many = was.records > RECORDS_PER_TURN * (len(turns) + RECORDS_PER_TURN)
        appends, self._in_step = self._in_step and not many, False
        if not appends:
            return self._write_anew(turns, fields)
        end, keep = was.end, was.kept(turns)
        line = was.change(keep, turns[keep:], fields)
        if was.end > TEXT_BYTES:
            return self._write_anew(turns, fields)
        for name in (TEXT, COPY):
            append_durably(self.folder / name, line, end)
        self._in_step = True

    def _write_anew(self, turns: list[Turn], fields: Fields) -> None:
        """A record a turn; there is no moment without a whole text."""
        new = Written(save=self._written.save, end=len(HEAD))
        lines = [HEAD, new.change(0, turns[:1], fields)]
        lines += [new.change(place, [turn], fields) for place, turn in enumerate(turns[1:], 1)]
        new.before = self.about
        if new.end > TEXT_BYTES:
            raise KimiError(f"{self.folder}: may have {TEXT_BYTES} bytes of text, not {new.end}")
        for name in (TEXT, COPY):
            write_bytes_durably(self.folder / name, b"".join(lines))
        (self.folder / first_format.PREVIOUS).unlink(missing_ok=True)
        self._written, self._in_step = new, True


def text_file(folder: Path) -> Path | None:
    """The text of the session in `folder`; None if there is no session."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def is_about(fields: Fields) -> bool:
    """Whether what is said about a session has the form of that."""
    kernels = fields.get("kernels") or []
    return (
        isinstance(fields["system"], str | None)
        and isinstance(fields.get("identity", {}), dict)
        and isinstance(fields.get("states", []), list)
        and isinstance(kernels, list)
        and all(isinstance(digest, str) for digest in kernels)
    )


def _parsed(path: Path) -> Written:
    """What a file says; nothing, with `save` 0, if it is absent, damaged or of the first format."""
    found = Written()
    try:
        data = read_bytes(path, TEXT_BYTES)
    except KimiError:
        return found
    if not data.startswith(HEAD):
        return found
    found.end = len(HEAD)
    while stop := data.find(b"\n", found.end) + 1:
        line = data[found.end : stop]
        record = line[len('["00000000", ') : -len("]\n")]
        if line != found.line(record):
            break
        try:
            found.take(record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            break
    found.rest = data[found.end :]
    return found


def _note(text: Written, copy: Written) -> str:
    """What is not as it was written; a line that a crash cut off was never said to be saved."""
    if text.save < copy.save:
        return LOST if copy.rest else f"{TEXT} is damaged: its copy was read"
    is_cut_off = b"\n" not in text.rest and text.save == copy.save and not copy.rest
    return LOST if text.rest and not is_cut_off else ""


def _of_first_format(folder: Path) -> tuple[Written, str]:
    about, conversation, note = first_format.read(folder, TEXT, TEXT_BYTES, is_about)
    return Written(about, about, conversation.turns), note
