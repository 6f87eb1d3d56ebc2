"""What ends a process that is one of several ranks: one line, and never a hang."""

from __future__ import annotations

import os
import sys
import termios
from typing import Any, NoReturn

from mlx_kimi.errors import KimiError

FAILED = 3  # the exit code of a rank that another one's failure ends
Terminal = list[Any]  # how one is set


def terminal_here() -> Terminal | None:
    """How the terminal on stdin is set, before anything reads keys from it; None without one."""
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    return termios.tcgetattr(sys.stdin.fileno())


def end(message: str, terminal: Terminal | None = None) -> NoReturn:
    """End this process at once with one line on stderr, from any thread, `terminal` as it was.

    A collective that waits for a lost rank cannot be interrupted: whatever runs is left as it is.
    Sessions are whole all the same, since files are written under other names and then renamed.
    """
    if terminal is not None:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, terminal)
    os.write(2, f"\nError: {KimiError(message)}\n".encode())
    os._exit(FAILED)
