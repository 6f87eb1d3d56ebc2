"""Long work says what it is at, on a terminal's stderr alone."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlx_kimi.cli.progress import BYTES, work
from tests.processes import run
from tests.terminal import Terminal


class Screen:
    """A terminal for stderr: what was written to it."""

    def __enter__(self) -> "Screen":
        self._reading, self.handle = os.openpty()
        self._said: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)
        self._reader.join()
        os.close(self._reading)
        self.text = b"".join(self._said).decode()

    def _read(self) -> None:
        while True:
            try:
                self._said.append(os.read(self._reading, 1 << 16))
            except OSError:  # the other end is closed
                return


def on_terminal(*arguments: str | Path) -> tuple[str, str, int]:
    """stdout, which is a pipe; what stderr, a terminal, shows; and the exit code."""
    command = [sys.executable, "-m", "mlx_kimi", *map(str, arguments)]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80"}
    with Screen() as screen:
        done = subprocess.run(command, stdout=-1, stderr=screen.handle, env=environment)
    return done.stdout.decode(), screen.text, done.returncode


@pytest.mark.slow
def test_check_shows_each_part_while_it_is_at_it(talker: Path) -> None:
    stdout, stderr, code = on_terminal("check", "-m", talker)
    assert code == 0
    for said in (
        "loading the model",
        r"MLX's operations against float64: \d+ done",
        "answering a q",
    ):
        assert re.search(said, stderr)
    piped = run("check", "-m", talker)
    assert piped.returncode == 0 and piped.stderr == "" and len(stdout.splitlines()) > 5
    assert [line[:20] for line in stdout.splitlines()] == [
        line[:20] for line in piped.stdout.splitlines()
    ]


@pytest.mark.slow
def test_stdout_holds_json_alone_while_stderr_shows_the_work(talker: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("What is KDA? " * 200)
    arguments = ("evaluate", "-m", talker, "-f", tmp_path / "text", "--window", "64", "--json")
    stdout, stderr, code = on_terminal(*arguments)
    assert code == 0 and stdout.startswith("{") and len(stdout.splitlines()) == 1
    assert "reading" in stderr and "tokens" in stderr
    piped = run(*arguments)
    assert piped.stderr == "" and piped.stdout == stdout
    short = ("--contexts", "64", "--tokens", "4", "--repeats", "1")
    stdout, stderr, code = on_terminal("bench", "-m", talker, *short, "--json", "-")
    assert code == 0 and stdout.startswith("{") and "context 64: " in stderr


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 80])
def test_nothing_of_it_stays_on_the_screen(talker: Path, columns: int) -> None:
    terminal = Terminal("info", "-m", talker, columns=columns)
    try:
        terminal.wait_until(lambda: "up to" in terminal.text)
        assert "reading headers" not in terminal.text
    finally:
        terminal.close()


def test_nothing_is_drawn_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    with work("reading", BYTES) as doing:
        doing.at("loading")
        doing(1, 10**9)
        with doing.hidden():
            print("a line")
    assert capfd.readouterr() == ("a line\n", "")


def test_an_error_is_said_before_anything_of_a_report(talker: Path) -> None:
    done = run("info", "-m", talker, "--context", "999999999")
    assert done.returncode != 0 and done.stdout == ""
    done = run("check", "-m", talker.parent, "--report")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("Error: ")
