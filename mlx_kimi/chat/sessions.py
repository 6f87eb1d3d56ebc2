"""Where sessions live, and what they are called."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path

from mlx_kimi.chat.session import Session, foreign_file, read_text
from mlx_kimi.chat.transcript import text_file
from mlx_kimi.errors import KimiError

NAME = re.compile(r"\w[\w.-]{0,63}")
AUTOMATIC = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-\d+)?")  # the time it began


@dataclass(frozen=True)
class Listed:
    """One line about a session."""

    name: str
    changed: float  # seconds since the epoch
    turns: int
    tokens: int
    size: int  # bytes on the disk
    opening: str  # the first message
    problem: str = ""  # why it cannot be read

    @property
    def is_autosaved(self) -> bool:
        """Whether nobody named it."""
        return AUTOMATIC.fullmatch(self.name) is not None


class Sessions:
    """The sessions of one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` None: the user's own, by the system's rules."""
        self.folder = folder or user_data_path("mlx_kimi", appauthor=False) / "sessions"

    def path(self, name: str) -> Path:
        """The folder of a session: by its name here, or a path to one anywhere.

        Raises:
            KimiError: it is neither.
        """
        if "/" in name:
            return Path(name).expanduser()
        if not NAME.fullmatch(name):
            raise KimiError(
                "a session's name must be at most 64 letters, digits, dots, dashes and "
                f"underscores, but is {name[:80]!r}"
            )
        return self.folder / name

    def called(self, folder: Path) -> str:
        """What finds a session again: its name, or its path if it is elsewhere."""
        return folder.name if folder.parent == self.folder else str(folder)

    def existing(self, name: str) -> Path:
        """The same, of a session that is there.

        Raises:
            KimiError: it is not.
        """
        path = self.path(name)
        if text_file(path) is None:
            raise KimiError(f"there is no session {name} (in {path.parent})")
        return path

    def latest(self) -> Path:
        """The one that was changed last.

        Raises:
            KimiError: there is none.
        """
        listed = [one for one in self.list() if not one.problem]
        if not listed:
            raise KimiError(f"there are no sessions in {self.folder}")
        return self.folder / listed[0].name

    def unused(self) -> Path:
        """A folder for a new session, named by the time."""
        name = time.strftime("%Y-%m-%d_%H-%M-%S")
        names = (name, *(f"{name}-{number}" for number in range(2, 10**6)))
        return next(self.folder / name for name in names if not (self.folder / name).exists())

    def list(self) -> list[Listed]:
        """All of them, the latest first."""
        found = (_listed(path) for path in self.folder.glob("*"))
        return sorted((one for one in found if one), key=lambda one: one.changed, reverse=True)

    def rename(self, name: str, new: str) -> None:
        """Give a session another name.

        Raises:
            KimiError: there is none, it is open in a chat, or the name is taken or no name.
        """
        session = Session(self.existing(name), {}).open()
        try:
            session.rename(self.free(new))
        except OSError as error:
            raise KimiError(f"{name} cannot be renamed: {error.strerror}") from None
        finally:
            session.close()

    def free(self, name: str) -> Path:
        """The folder of a session that a user names so.

        Raises:
            KimiError: the name is taken, no name, or one of those that autosaved sessions get.
        """
        folder = self.path(name)
        if is_automatic(folder):
            raise KimiError(f"{name} is a name of autosaved sessions, which go when they are many")
        if folder.exists() or folder.is_symlink():
            raise KimiError(f"there is a session {name} already")
        return folder

    def remove(self, name: str) -> None:
        """Delete a session.

        Raises:
            KimiError: there is none, it is open in a chat, or its folder holds what no session
                wrote.
        """
        _remove(self.existing(name))

    def trim(self, most: int) -> tuple[str, ...]:
        """Delete autosaved sessions, the oldest first, until all of them take `most` bytes.

        None is deleted that a user named, that a chat has open, or whose folder holds anything that
        no session wrote; nor the latest. The names of those that are gone.
        """
        kept = sorted(self._autosaved(), key=lambda one: one[1])
        total, gone = sum(size for _, _, size in kept), []
        for folder, _, size in kept[:-1]:
            if total <= most:
                break
            try:
                _remove(folder)
            except KimiError:  # open in a chat, somebody's, or cannot be deleted: the next
                continue
            total -= size
            gone.append(folder.name)
        return tuple(gone)

    def _autosaved(self) -> Iterator[tuple[Path, float, int]]:
        """Folder, time of the last change and size of each session that nobody named."""
        for folder in self.folder.glob("*"):
            try:
                text = text_file(folder)
                if is_automatic(folder) and not folder.is_symlink() and text:
                    yield folder, text.stat().st_mtime, size_of(folder)
            except OSError:  # gone meanwhile
                continue


def size_of(folder: Path) -> int:
    """Bytes of the files in a session's folder."""
    return sum(path.lstat().st_size for path in folder.iterdir())


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        raise KimiError(f"{folder}: is a link, and what it leads to stays")
    foreign = foreign_file(folder)  # (before a lock is made there)
    if foreign is not None:
        raise KimiError(f"{folder}: holds {foreign}, which no session wrote")
    session = Session(folder, {}).open()
    try:
        session.remove()
    except OSError as error:
        raise KimiError(f"{folder}: cannot be removed: {error.strerror}") from None
    finally:
        session.close()


def is_automatic(folder: Path) -> bool:
    """Whether nobody chose the session's name."""
    return AUTOMATIC.fullmatch(folder.name) is not None


def _listed(folder: Path) -> Listed | None:
    text = text_file(folder)
    if text is None:
        return None
    try:
        changed, size = text.stat().st_mtime, size_of(folder)
        _, conversation, _ = read_text(folder)
    except KimiError:
        return Listed(folder.name, changed, 0, 0, size, "", "cannot be read: it is damaged")
    except OSError:  # gone meanwhile
        return None
    turns = conversation.turns
    opening = turns[0].text if turns else ""
    return Listed(folder.name, changed, len(turns), conversation.tokens, size, opening)
