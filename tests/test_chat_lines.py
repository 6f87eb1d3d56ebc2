"""Every line that a person can type ends in an answer or in one line: the chat goes on."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest

from mlx_kimi import load
from mlx_kimi.chat.chat import Chat
from mlx_kimi.chat.sessions import Sessions
from mlx_kimi.cli.chat.commands import COMMANDS
from mlx_kimi.cli.chat.loop import Loop
from mlx_kimi.defaults import PREFILL_STEP
from mlx_kimi.errors import LONGEST, KimiError, in_words

OPTIONS: dict[str, Any] = {
    **{"max_tokens": 2, "temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    **{"repetition_penalty": 1.0, "seed": None, "prefill_step": PREFILL_STEP},
}
ODD = [
    *("", " ", "~nobody-here/x", "~", "~root/x", "$HOME", "*", "[", "{}", "%s%n", ".", "..", "/"),
    *("\0", "a\0b", "\x1b[31m", "\u202e", "\ud800", "é" * 200, "a" * 255, "a" * 256, "a/b"),
    *("../..", "/dev/zero", "/dev/full", "/proc/self/mem", "x " * 2000, "-1", "0", "1e400", "nan"),
    *("9" * 5000, "1" * 4301, "1 2 3", "temp nan", "temp 9" + "9" * 5000, "top_k 1.5", "seed -1"),
    *(
        "seed " + "9" * 5000,
        "max_tokens 0",
        "markdown maybe",
        "prefill_step 1e9",
        "top_p",
        "nope 1",
    ),
]


class Typed:
    """Lines, as `Input` reads them."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = iter(lines)

    def read(self, before: str = "") -> str | None:
        return next(self._lines, None)

    def consents(self, question: str) -> bool:
        return False


class Notes:
    """What stands on the screen."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def error(self, text: str) -> None:
        self.errors.append(text)

    def answer(self, stream: Callable[..., Iterator[Any]]) -> Any:
        return [chunk.stats for chunk in stream(None)][-1]

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.fixture
def chat(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.chdir(tmp_path)  # `/save a/b` is a folder from there
    sessions = Sessions(tmp_path / "sessions")
    return Chat(*load(talker), sessions=sessions, fingerprint={"model": "m"}, options=OPTIONS)


def typed(chat: Chat, *lines: str) -> list[str]:
    """The errors that these lines give."""
    screen = Notes()
    Loop(chat, cast(Any, screen), cast(Any, Typed(list(lines)))).run()
    return screen.errors


@pytest.mark.slow
def test_no_line_ends_the_chat(chat: Chat) -> None:
    begins = ["", "/", *(f"/{name} " for name in COMMANDS)]
    lines = [begin + odd for begin in begins for odd in ODD]
    Random(0).shuffle(lines)
    for line in lines:
        errors = typed(chat, line)
        assert all("\n" not in error and len(error) < 2 * LONGEST for error in errors), line
    assert (
        typed(chat, "/reset", "/system -", "hello") == []
        and chat.conversation.turns[-1].text == "hello"
    )


def test_a_path_that_the_system_refuses_is_one_line(chat: Chat) -> None:
    (error,) = typed(chat, "/file " + "x" * 3000)
    assert error.endswith("File name too long") and len(error) < LONGEST + 100
    (error,) = typed(chat, "/edit " + "9" * 5000)
    assert "there is no message" in error or "numbered" in error or "nothing" in error


def test_an_error_is_said_in_words() -> None:
    assert in_words(OSError(errno.ENOSPC, "No space left on device", "a\nb")) == (
        "a\\nb: No space left on device"
    )
    assert in_words(ValueError("embedded null byte")) == "embedded null byte"
    assert in_words(RuntimeError("two\nlines")) == "two lines"
    assert in_words(ValueError()) == "ValueError"
    long = str(KimiError("start" + "x" * 10_000_000 + "end"))
    assert long.startswith("startx") and long.endswith("xend") and len(long) <= LONGEST
    assert len(str(KimiError("\U0010ffff" * 2400))) <= LONGEST, "spelled out, it is longer"
