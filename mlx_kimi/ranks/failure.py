"""What ends a process that is one of several ranks: one line, and never a hang."""

from __future__ import annotations

import os
import sys
import termios
from typing import Any, NoReturn

from mlx_kimi.errors import KimiError

FAILED = 3  # the exit code of a rank that another one's failure ends

_terminal: list[Any] | None = None  # what the terminal was set to when this process began


def remember_terminal() -> None:
    """Note how the terminal is set, before anything reads keys from it."""
    global _terminal
    if sys.stdin is not None and sys.stdin.isatty():
        _terminal = termios.tcgetattr(sys.stdin.fileno())


def end(message: str) -> NoReturn:
    """End this process at once with one line on stderr, from any thread.

    A collective that waits for a lost rank cannot be interrupted: whatever runs is left as it is.
    Sessions are whole all the same, since files are written under other names and then renamed.
    """
    if _terminal is not None:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, _terminal)
    os.write(2, f"\nError: {KimiError(message)}\n".encode())
    os._exit(FAILED)
