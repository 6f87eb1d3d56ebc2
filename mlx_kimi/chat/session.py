"""A conversation on disk: a folder with its text and, one file a turn, its states.

    chat.jsonl              the text, and a copy of it: `transcript`
    START-END-X.safetensors the states of the tokens START..END
    lock                    held by the chat that has the session open

A crash costs the last turn at most, a damaged file nothing; states that are lost are computed again
from the text.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mlx_kimi.chat import state_files as states
from mlx_kimi.chat import transcript
from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.fingerprint import differences
from mlx_kimi.chat.state_files import StateFile
from mlx_kimi.chat.transcript import Transcript, text_file
from mlx_kimi.durable import finished_name, not_through_a_link
from mlx_kimi.errors import KimiError, beyond_budget
from mlx_kimi.generation.token_state import TokenState, common_prefix

LOCK = "lock"
RETURN_POINTS = 8  # turn ends whose KDA states stay on disk, 41 MiB each for the 48B


class Session:
    """The folder of one conversation: read by many, written by the one that has opened it.

    Attributes:
        notes: what the user should know about how it was read, one line each.
        is_open: it may be written, by this chat alone.
        is_prompt_cache: it is what `mlx_kimi cache` wrote, and stays as it is.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """A session that may exist; nothing is read or written yet."""
        self.folder, self.fingerprint = folder, dict(fingerprint)
        self.notes: list[str] = []
        self.is_prompt_cache = False
        self._text = Transcript(folder)
        self._files: list[StateFile] = []
        self._ids: list[int] = []  # the tokens of these files
        self._computed_by: list[str] = []  # `TokenState.computed_by` of them
        self._lock: IO[str] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_open(self) -> bool:
        return self._lock is not None

    def open(self) -> Session:
        """Let no other chat change it from now on. Its folder is made if need be.

        Raises:
            KimiError: another chat has it open or has changed it since it was read, or it cannot be
                made.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise KimiError(f"{self.folder}: {error.strerror}") from None
        self._lock = _locked(self.folder)
        if self._text.about and not self._text.is_as_it_was_read():
            self.close()
            raise KimiError(
                f"the session {self.name} was changed by another chat: /save NAME keeps this one"
            )
        return self

    def close(self) -> None:
        """Let others open it."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def load(self, state: TokenState) -> Conversation:
        """Read the conversation, and bring `state`, which is empty, to its end if that is stored.

        Raises:
            KimiError: there is none, a chat has it open, nothing of it can be read, or its states
                are of more tokens than the model's memory budget leaves room for.
        """
        refuse_missing(self.folder)
        with nullcontext() if self.is_open else _held(self.folder):
            return self._load(state)

    def _load(self, state: TokenState) -> Conversation:
        conversation, note = self._text.read()
        about, self.notes = self._text.about, [note] if note else []
        self.is_prompt_cache = _is_prompt_cache(about, conversation)
        if state.model.offload:
            self._refuse_longer(state.model.config.model_max_length)
        if not about:  # only turns could be read
            return conversation
        unlike = differences(about.get("identity", {}), self.fingerprint)
        if unlike:
            self.notes.append(f"the text is read again, since {unlike} changed")
            return conversation
        listed = _listed(about)
        files = states.whole_part(self.folder, listed)
        try:
            states.restore_states(state, self.folder, files)
        except KimiError as error:
            self.notes.append(f"the text is read again: {error}")
            return conversation
        state.computed_by.update(map(str, about.get("kernels") or []))
        if len(files) < len(listed):
            self.notes.append("a file of states is damaged: a part of the text is read again")
        self._files = files
        self._ids, self._computed_by = list(state.ids), sorted(state.computed_by)
        return conversation

    def _refuse_longer(self, limit: int) -> None:
        listed = _listed(self._text.about)
        is_used = not differences(self._text.about.get("identity", {}), self.fingerprint)
        if is_used and listed and listed[-1].end > limit:
            raise KimiError(beyond_budget(f"the session {self.name}", listed[-1].end, limit))

    def save(self, conversation: Conversation, state: TokenState | None = None) -> None:
        """Store the text and, with a `state`, the states that are not stored yet.

        Raises:
            KimiError: the files cannot be written.
        """
        assert self.is_open
        try:
            if state is not None:
                self._store_states(state)
            about = {
                "identity": self.fingerprint,  # (its name in the file format)
                "states": [asdict(stored) for stored in self._files],
                "kernels": self._computed_by,
                "prompt_cache": self.is_prompt_cache,
            }
            self._text.save(conversation, about)
            self._remove_unused()
        except (OSError, RuntimeError) as error:  # MLX raises the latter
            raise KimiError(f"{self.folder}: cannot be saved: {error}") from None

    def fork(self, folder: Path) -> Session:
        """The same in another folder, open. State files never change, so they are linked."""
        other = Session(folder, self.fingerprint).open()
        for stored in self._files:
            try:
                _link(self.folder / stored.file, folder / stored.file)
            except OSError:  # gone meanwhile, or a full disk: computed again
                break
            other._files.append(stored)
        if other._files:
            other._ids = self._ids[: other._files[-1].end]
        other._computed_by = list(self._computed_by)
        return other

    def rename(self, folder: Path) -> None:
        """Move it to another folder."""
        self.folder = self._text.folder = self.folder.rename(folder)

    def remove(self) -> None:
        """Delete an open session: its text last, so that what is interrupted is still a session.

        Raises:
            KimiError: its folder holds something that no session wrote. Nothing is deleted.
            OSError: it cannot be deleted.
        """
        foreign = foreign_file(self.folder)
        if foreign is not None:
            raise KimiError(f"{self.folder}: holds {foreign}, which no session wrote")
        last = (*transcript.NAMES[::-1], LOCK)
        names = [path.name for path in self.folder.iterdir() if path.name not in last]
        for name in (*names, *last):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()
        self.close()

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

    def _remove_unused(self) -> None:
        """State files that neither the present text nor the one before names."""
        used = {stored.file for stored in (*self._files, *_listed(self._text.before))}
        for path in self.folder.iterdir():
            if states.is_state_file(path.name) and path.name not in used:
                path.unlink()


def read_session(
    folder: Path, fingerprint: Mapping[str, Any], state: TokenState
) -> tuple[Conversation, list[str]]:
    """What `Session.load` reads, and its notes."""
    session = Session(folder, fingerprint)
    return session.load(state), session.notes


def read_text(folder: Path) -> tuple[dict[str, Any], Conversation, str]:
    """What is said about the session, the conversation, and what had to be left out, if anything.

    Raises:
        KimiError: nothing of it can be read.
    """
    text = Transcript(folder)
    conversation, note = text.read()
    return text.about, conversation, note


def refuse_missing(folder: Path) -> None:
    """Refuse a folder that holds no session.

    Raises:
        KimiError: it holds none.
    """
    if text_file(folder) is None:
        raise KimiError(f"{folder}: no saved conversation or prompt cache")


def refuse_longer(folder: Path, fingerprint: Mapping[str, Any], limit: int) -> None:
    """Refuse a session whose states are of more tokens than a memory budget leaves room for.

    Raises:
        KimiError: they are, or nothing of the session can be read.
    """
    session = Session(folder, fingerprint)
    session._text.read()
    session._refuse_longer(limit)


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
    return name in (LOCK, transcript.TEXT) or states.is_state_file(name)


def foreign_file(folder: Path) -> str | None:
    """The name of something in a session's folder that no session wrote; None if there is none."""
    ours = (LOCK, *transcript.NAMES, ".previous")  # (the last of the first format)
    for path in sorted(folder.iterdir()):
        name = finished_name(path.name)
        is_named_so = name in ours or states.is_state_file(name)
        if not is_named_so or path.is_symlink() or not path.is_file():
            return path.name
    return None


def _is_prompt_cache(about: Mapping[str, Any], conversation: Conversation) -> bool:
    """Whether `mlx_kimi cache` wrote it; before it said so, only it stored states of a question."""
    if "prompt_cache" in about:
        return about["prompt_cache"] is True
    return len(conversation.turns) == 1 and conversation.is_unanswered and bool(_listed(about))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copyfile(source, target)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Within, no chat changes the session."""
    lock = _locked(folder, fcntl.LOCK_SH) if (folder / LOCK).exists() else None
    try:
        yield
    finally:
        if lock:
            lock.close()


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
