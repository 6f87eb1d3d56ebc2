"""A conversation on disk: a folder with its text and, one file a turn, its states.

    chat.jsonl              a line about the file, one about the session, then one a turn
    chat.previous.jsonl     the same as it was before the last change
    START-END-X.safetensors the states of the tokens START..END
    lock                    held by the chat that has the session open

The text is written whole, synced and renamed, and the version before it stays. A crash or a damaged
file therefore costs the last turn at most; states that are lost are computed again from the text.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from mlx_kimi.chat import state_files as states
from mlx_kimi.chat.conversation import Conversation, Turn, read_turn
from mlx_kimi.chat.fingerprint import differences
from mlx_kimi.chat.state_files import StateFile
from mlx_kimi.durable import finished_name, not_through_a_link, write_durably
from mlx_kimi.errors import KimiError, beyond_budget
from mlx_kimi.generation.token_state import TokenState, common_prefix
from mlx_kimi.user_files import only_regular, read_bytes

TEXT, PREVIOUS, LOCK = "chat.jsonl", "chat.previous.jsonl", "lock"
FORMAT = 1
TEXT_BYTES = 6 << 23  # more characters, in JSON, than a template may render
RETURN_POINTS = 8  # turn ends whose KDA states stay on disk, 41 MiB each for the 48B


class Session:
    """The folder of one conversation, held open by one chat at a time.

    Attributes:
        notes: what the user should know about how it was opened, one line each.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """Open a folder, made if need be.

        Raises:
            KimiError: another chat has it open, or it cannot be made.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise KimiError(f"{folder}: {error.strerror}") from None
        self.folder, self.fingerprint = folder, dict(fingerprint)
        self.notes: list[str] = []
        self._files: list[StateFile] = []
        self._ids: list[int] = []  # the tokens of these files
        self._computed_by: list[str] = []  # `TokenState.computed_by` of them
        self._written: list[tuple[Turn, bytes]] = []  # copies of turns, and their lines
        self._lock = _locked(folder)

    @property
    def name(self) -> str:
        return self.folder.name

    def load(self, state: TokenState) -> Conversation:
        """Read the conversation, and bring `state`, which is empty, to its end if that is stored.

        Raises:
            KimiError: nothing of the conversation can be read, or its states are of more tokens
                than the model's memory budget leaves room for.
        """
        conversation, self._files, self.notes = _read(self.folder, self.fingerprint, state)
        self._ids, self._computed_by = list(state.ids), sorted(state.computed_by)
        return conversation

    def save(self, conversation: Conversation, state: TokenState | None = None) -> None:
        """Store the text and, with a `state`, the states that are not stored yet.

        Raises:
            KimiError: the files cannot be written.
        """
        try:
            self._save(conversation, state)
        except (OSError, RuntimeError) as error:  # MLX raises the latter
            raise KimiError(f"{self.folder}: cannot be saved: {error}") from None

    def _save(self, conversation: Conversation, state: TokenState | None) -> None:
        if state is not None:
            self._store_states(state)
        about = {
            "identity": self.fingerprint,  # (its name in the file format)
            "states": [asdict(stored) for stored in self._files],
            "kernels": self._computed_by,
            "system": conversation.system,
        }
        body = _line(about) + b"".join(self._turn_lines(conversation.turns))
        text = _line({"mlx_kimi_session": FORMAT, "checksum": zlib.crc32(body)}) + body
        if len(text) > TEXT_BYTES:
            raise KimiError(f"{self.folder}: may have {TEXT_BYTES} bytes of text, not {len(text)}")
        self._keep_previous()
        write_durably(self.folder / TEXT, lambda made: _write(made, text))
        self._remove_unused()

    def _turn_lines(self, turns: Sequence[Turn]) -> list[bytes]:
        """A line a turn. Those that were written before and are the same are not made again."""
        for place, turn in enumerate(turns):
            if self._written[place : place + 1] and self._written[place][0] == turn:
                continue
            # (A turn's list of replies grows; a reply never changes.)
            written = replace(turn, replies=list(turn.replies)), _line(vars(turn))
            self._written[place : place + 1] = [written]
        del self._written[len(turns) :]
        return [line for _, line in self._written]

    def fork(self, folder: Path) -> Session:
        """The same session in another folder. State files never change, so they are linked."""
        other = Session(folder, self.fingerprint)
        for stored in self._files:
            try:
                os.link(self.folder / stored.file, folder / stored.file)
            except OSError:  # on another disk
                shutil.copyfile(self.folder / stored.file, folder / stored.file)
        other._files, other._ids = list(self._files), list(self._ids)
        other._computed_by = list(self._computed_by)
        return other

    def rename(self, folder: Path) -> None:
        """Move it to another folder."""
        self.folder = self.folder.rename(folder)

    def close(self) -> None:
        """Let others open it."""
        self._lock.close()

    def _store_states(self, state: TokenState) -> None:
        shared = common_prefix(self._ids, state.ids)
        self._files = [stored for stored in self._files if stored.end <= shared]
        if self._files and not self._files[-1].has_kda and self._files[-1].end == len(state.ids):
            self._files.pop()  # its end could not be gone back to
        start = self._files[-1].end if self._files else 0
        if len(state.ids) > start:
            self._files.append(states.write_state(self.folder, state, start))
        self._ids, self._computed_by = list(state.ids), sorted(state.computed_by)
        self._files = states.compacted(self.folder, self._files, RETURN_POINTS)

    def _keep_previous(self) -> None:
        """The present text gets a second name; there is no moment without a whole text."""
        if (self.folder / TEXT).exists():
            link = self.folder / ".previous"
            link.unlink(missing_ok=True)
            os.link(self.folder / TEXT, link)
            os.replace(link, self.folder / PREVIOUS)

    def _remove_unused(self) -> None:
        """State files that neither the present text nor the one before names."""
        used = {stored.file for stored in self._files}
        used |= {stored.file for stored in _named(self.folder / PREVIOUS)}
        for path in self.folder.iterdir():
            if states.is_state_file(path.name) and path.name not in used:
                path.unlink()


def read_session(
    folder: Path, fingerprint: Mapping[str, Any], state: TokenState
) -> tuple[Conversation, list[str]]:
    """What `Session.load` reads, and its notes, of a session that is not changed.

    Raises:
        KimiError: there is none, nothing of it can be read, or a chat has it open.
    """
    if text_file(folder) is None:
        raise KimiError(f"{folder}: no saved conversation or prompt cache")
    lock = _locked(folder, fcntl.LOCK_SH) if (folder / LOCK).exists() else None
    try:
        conversation, _, notes = _read(folder, fingerprint, state)
        return conversation, notes
    finally:
        if lock:
            lock.close()


def _read(
    folder: Path, fingerprint: Mapping[str, Any], state: TokenState
) -> tuple[Conversation, list[StateFile], list[str]]:
    if state.model.offload:
        refuse_longer(folder, fingerprint, state.model.config.model_max_length)
    about, conversation, note = read_text(folder)
    notes = [note] if note else []
    if not about:  # only turns could be read
        return conversation, [], notes
    unlike = differences(about.get("identity", {}), fingerprint)
    if unlike:
        return conversation, [], [*notes, f"the text is read again, since {unlike} changed"]
    listed = _listed(about)
    files = states.whole_part(folder, listed)
    try:
        states.restore_states(state, folder, files)
    except KimiError as error:
        return conversation, [], [*notes, f"the text is read again: {error}"]
    state.computed_by.update(map(str, about.get("kernels") or []))
    if len(files) < len(listed):
        notes.append("a file of states is damaged: a part of the text is read again")
    return conversation, files, notes


def read_text(folder: Path) -> tuple[dict[str, Any], Conversation, str]:
    """What is said about the session, the conversation, and what had to be left out, if anything.

    Raises:
        KimiError: neither version of the text can be read.
    """
    problems = []
    for name in (TEXT, PREVIOUS):
        try:
            about, conversation = _parse(folder / name)
        except (KimiError, ValueError) as error:
            problems.append(str(error) if isinstance(error, KimiError) else f"{name}: {error}")
            continue
        note = "its last change is lost: the file is damaged" if problems else ""
        return about, conversation, note
    for name in (TEXT, PREVIOUS):
        if (folder / name).is_file() and (rescued := _rescued(folder / name)).turns:
            return {}, rescued, f"damaged: {len(rescued.turns)} turns could be read"
    raise KimiError(f"{folder}: no session can be read: {'; '.join(problems)}")


def refuse_longer(folder: Path, fingerprint: Mapping[str, Any], limit: int) -> None:
    """Refuse a session whose states are of more tokens than a memory budget leaves room for.

    Raises:
        KimiError: they are, or nothing of the session can be read.
    """
    about, _, _ = read_text(folder)
    listed = _listed(about)
    is_used = not differences(about.get("identity", {}), fingerprint)
    if is_used and listed and listed[-1].end > limit:
        raise KimiError(beyond_budget(f"the session {folder.name}", listed[-1].end, limit))


def refuse_used(folder: Path) -> None:
    """Refuse a folder for a new session unless all that it holds was left by an unfinished one.

    Raises:
        KimiError: it holds a session or anything else, or is no folder.
    """
    if text_file(folder):
        raise KimiError(f"{folder}: there is a saved conversation or prompt cache already")
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise KimiError(f"{folder}: {error.strerror}") from None
    foreign = next((name for name in names if not _is_unfinished(name)), None)
    if foreign is not None:
        raise KimiError(
            f"{folder}: holds {foreign}, and a new prompt cache needs a folder of its own: "
            "name one that does not exist"
        )


def _is_unfinished(name: str) -> bool:
    """Whether a session that never got its text could have left a file of this name."""
    name = finished_name(name)
    return name in (LOCK, TEXT) or states.is_state_file(name)


def text_file(folder: Path) -> Path | None:
    """The text of the session in `folder`; None if there is no session."""
    return next((folder / name for name in (TEXT, PREVIOUS) if (folder / name).is_file()), None)


def _locked(folder: Path, kind: int = fcntl.LOCK_EX) -> IO[str]:
    """The lock, which ends with this process however it ends."""
    mode = "a" if kind == fcntl.LOCK_EX else "r"
    try:
        lock = open(folder / LOCK, mode, opener=not_through_a_link)
    except OSError as error:
        raise KimiError(f"{folder / LOCK}: {error.strerror}") from None
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise KimiError(f"the session {folder.name} is open in another chat") from None
    return lock


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _parse(path: Path) -> tuple[dict[str, Any], Conversation]:
    """Read a text strictly.

    Raises:
        ValueError: it is not whole.
        KimiError: it cannot be read.
    """
    first, _, body = read_bytes(path, TEXT_BYTES).partition(b"\n")
    try:
        header = json.loads(first)
        if header["mlx_kimi_session"] != FORMAT:
            raise ValueError(f"format {header['mlx_kimi_session']} is not known here")
        if header["checksum"] != zlib.crc32(body):
            raise ValueError("damaged")
        about, *turns = map(json.loads, body.splitlines())
        if not _describes(about):
            raise ValueError("damaged")
        return about, Conversation(about["system"], [read_turn(turn) for turn in turns])
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise ValueError("damaged") from None


def _describes(about: Any) -> bool:
    """Whether the line about a session has the form of one."""
    kernels = about.get("kernels") or []
    return (
        isinstance(about["system"], str | None)
        and isinstance(about.get("identity", {}), dict)
        and isinstance(about.get("states", []), list)
        and isinstance(kernels, list)
        and all(isinstance(digest, str) for digest in kernels)
    )


def _rescued(path: Path) -> Conversation:
    """The turns of a damaged text that are whole, up to the first that is not."""
    found = Conversation()
    try:
        lines = read_bytes(path, TEXT_BYTES).splitlines()[1:]
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


def _named(path: Path) -> list[StateFile]:
    """The state files that a text names, by its second line alone; none where it cannot be read."""
    try:
        with open(path, "rb", opener=only_regular) as text:
            text.readline(TEXT_BYTES)
            return _listed(json.loads(text.readline(TEXT_BYTES)))
    except (OSError, ValueError, AttributeError, RecursionError):
        return []


def _listed(about: Mapping[str, Any]) -> list[StateFile]:
    """The state files that a text names; only those of its own folder."""
    try:
        files = [StateFile(**stored) for stored in about.get("states", [])]
    except TypeError:
        return []
    typed = all(
        isinstance(s.file, str) and all(isinstance(x, int) for x in (s.start, s.end, s.checksum))
        for s in files
    )
    return files if typed and all(states.is_state_file(s.file) for s in files) else []
