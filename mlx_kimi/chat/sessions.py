"""Where sessions live, and what they are called."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path

from mlx_kimi.chat.session import read_text
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
    opening: str  # the first message


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
        listed = self.list()
        if not listed:
            raise KimiError(f"there are no sessions in {self.folder}")
        return self.folder / listed[0].name

    def unused(self) -> Path:
        """A folder for a new session, named by the time."""
        name = time.strftime("%Y-%m-%d_%H-%M-%S")
        names = (name, *(f"{name}-{number}" for number in range(2, 10**6)))
        return next(self.folder / name for name in names if not (self.folder / name).exists())

    def list(self) -> list[Listed]:
        """All that can be read, the latest first."""
        found = (_listed(path) for path in self.folder.glob("*"))
        return sorted((one for one in found if one), key=lambda one: one.changed, reverse=True)


def is_automatic(folder: Path) -> bool:
    """Whether nobody chose the session's name."""
    return AUTOMATIC.fullmatch(folder.name) is not None


def _listed(folder: Path) -> Listed | None:
    text = text_file(folder)
    if text is None:
        return None
    try:
        _, conversation, _ = read_text(folder)
        changed = text.stat().st_mtime
    except (KimiError, OSError):
        return None
    turns = conversation.turns
    opening = turns[0].text if turns else ""
    return Listed(folder.name, changed, len(turns), conversation.tokens, opening)
