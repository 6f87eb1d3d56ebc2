"""What ends a process that is one of several ranks: one line, and never a hang."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def ended_after(seconds: float, message: str) -> Iterator[None]:
    """Within, this process ends after so many seconds, with one line on stderr and exit code 1.

    A call of MLX that waits for other ranks lets no thread of Python run. faulthandler has a thread
    of its own, which ends the process; a shell waits for what it writes first, and says the line.
    """
    tell = 'read -r _ && printf "\\n%s\\n" "$0" >&2; cat >/dev/null'
    command = ["/bin/sh", "-c", tell, f"Error: {KimiError(message)}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as shell:
        assert shell.stdin is not None
        faulthandler.dump_traceback_later(seconds, exit=True, file=shell.stdin)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
