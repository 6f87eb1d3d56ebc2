"""A program in a real terminal: keys are sent to a pty, and the screen is read from an emulator."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pyte

ENTER, CTRL_C, CTRL_D, CTRL_R, UP, TAB = "\r", "\x03", "\x04", "\x12", "\x1b[A", "\t"
ALT_ENTER = "\x1b\r"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"  # bracketed paste, as terminals send it


class _Screen(pyte.HistoryScreen):
    """A screen whose answers to the program's questions reach it."""

    send: Callable[[str], Any]

    def write_process_input(self, data: str) -> None:
        self.send(data)


class Terminal:
    """`python -m mlx_kimi ...` in a terminal of `columns` x `rows`.

    Attributes:
        raw: everything that the program wrote.
    """

    def __init__(
        self,
        *arguments: str | Path,
        columns: int = 80,
        rows: int = 24,
        cwd: Path | None = None,
        **env: str,
    ):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color", **env}
        for name in ("COLUMNS", "LINES"):  # of the terminal that the tests run in
            environment.pop(name, None)
        self._process = pexpect.spawn(
            sys.executable,
            ["-m", "mlx_kimi", *map(str, arguments)],
            env=environment,
            cwd=cwd,
            dimensions=(rows, columns),
            timeout=60,
        )
        self.screen = _Screen(columns, rows, history=5000)
        self.screen.send = self.type
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def type(self, keys: str) -> None:
        self._process.send(keys)

    def say(self, text: str) -> None:
        """Type a line and send it."""
        self.type(text + ENTER)

    def paste(self, text: str) -> None:
        self.type(PASTE + text.replace("\n", "\r") + PASTED)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self._process.setwinsize(rows, columns)

    @property
    def lines(self) -> list[str]:
        """The screen, and what scrolled away above it."""
        above = [_text(line, self.screen.columns) for line in self.screen.history.top]
        return [line.rstrip() for line in (*above, *self.screen.display)]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 30) -> re.Match[str]:
        """Read until the screen shows `pattern`."""
        return self.wait_until(lambda: re.search(pattern, self.text, re.MULTILINE), seconds)

    def wait_until(self, condition: Callable[[], Any], seconds: float = 30) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, (
                f"not seen in {seconds} s; the screen:\n{self.text[-3000:]}"
            )
            self.read(0.05)
        return found

    def wait_for_prompt(self) -> None:
        """Read until an empty prompt is there, with its toolbar below."""
        self.read(0.05)  # what the program has written by now: the prompt before may be gone
        self.wait_until(self.at_prompt)

    def at_prompt(self) -> bool:
        line = self.screen.display[self.screen.cursor.y].rstrip()
        toolbar = any(" tokens (" in text for text in self.screen.display[self.screen.cursor.y :])
        return line == ">" and toolbar

    def read(self, seconds: float) -> None:
        """Take what the program writes within `seconds`."""
        try:
            data = self._process.read_nonblocking(1 << 16, timeout=seconds)
        except pexpect.TIMEOUT:
            return
        except pexpect.EOF:
            time.sleep(seconds)
            return
        self.raw += data
        self._stream.feed(data)

    def wait_for_end(self, seconds: float = 30) -> int | None:
        """Read until the program ends; its exit code."""
        self.wait_until(lambda: not self._process.isalive(), seconds)
        self.read(0.1)
        return self._process.exitstatus

    def close(self) -> None:
        if self._process.isalive():
            self._process.kill(signal.SIGKILL)
            self._process.wait()
        self._process.close()


def _text(line: Any, columns: int) -> str:
    return "".join(line[column].data for column in range(columns))
