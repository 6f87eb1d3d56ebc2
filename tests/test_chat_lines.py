"""Every line that a person can type ends in an answer or in one line: the chat goes on."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlx_kimi import load
from mlx_kimi.chat.chat import Chat
from mlx_kimi.chat.sessions import Sessions
from mlx_kimi.chat.tool_calls import Call
from mlx_kimi.cli import show
from mlx_kimi.cli.chat.commands import COMMANDS
from mlx_kimi.cli.chat.input import Consent
from mlx_kimi.cli.chat.loop import Loop
from mlx_kimi.defaults import PREFILL_STEP
from mlx_kimi.errors import LONGEST, KimiError, in_words
from mlx_kimi.generation.answer import Stats

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
    """Lines, as `Input` reads them, and what stood there before each."""

    def __init__(self, lines: list[str], takes_back: bool = False) -> None:
        self._lines, self.takes_back = iter(lines), takes_back
        self.drafts: list[str] = []

    def read(self, before: str = "") -> str | None:
        self.drafts.append(before)
        return next(self._lines, None)

    def consents(self, question: str) -> bool:
        return False


class Notes:
    """What stands on the screen."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.notes: list[str] = []
        self.interrupts = ""  # when Ctrl-C comes

    def note(self, text: str) -> None:
        self.notes.append(text)

    def error(self, text: str) -> None:
        self.errors.append(text)

    def answer(self, stream: Callable[..., Iterator[Any]]) -> Any:
        if self.interrupts == "at once":
            raise KeyboardInterrupt
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


@pytest.fixture
def attached(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text("of the file")
    return "/file a.txt"


def interrupted(*_: Any) -> Iterator[Any]:
    raise KeyboardInterrupt
    yield


@pytest.mark.parametrize("why", ["Ctrl-C at once", "Ctrl-C while it is read", "too long"])
def test_a_message_without_an_answer_is_in_the_editor_again(
    chat: Chat, attached: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its files; in a pipe the next line is another message, and has none of them."""
    message = "hello" if "Ctrl-C" in why else "word " * 5000
    if why == "Ctrl-C while it is read":
        monkeypatch.setattr(chat, "_stream", interrupted)
    for is_editor in (True, False):
        screen, lines = Notes(), Typed([attached, message], is_editor)
        screen.interrupts = why.removeprefix("Ctrl-C ")
        loop = Loop(chat, cast(Any, screen), cast(Any, lines))
        loop.run()
        assert lines.drafts == ["", "", message] and not chat.conversation.turns
        assert [one.path for one in loop.attached] == ["a.txt"] * is_editor
        if "Ctrl-C" in why:
            assert screen.notes[-1] == "[stopped before the answer: the message is taken back]"
        else:
            assert "the prompt has" in screen.errors[-1]


def test_what_an_interrupted_retry_or_edit_restored_is_said(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(chat, "one", "two")
    monkeypatch.setattr(chat, "_stream", interrupted)
    before = list(chat.conversation.turns)
    for line, said, draft in [
        ("/retry", "the answer before is back", ""),
        (
            "/edit 1 other\nwords",
            "the message and what followed are as before",
            "/edit 1 other\nwords",
        ),
    ]:
        screen, lines = Notes(), Typed([line], True)
        Loop(chat, cast(Any, screen), cast(Any, lines)).run()
        assert screen.notes[-1] == f"[stopped before the answer: {said}]"
        assert lines.drafts == ["", draft] and chat.conversation.turns == before


def test_files_are_listed_detached_and_left_with_their_conversation(
    chat: Chat, attached: str, tmp_path: Path
) -> None:
    screen = Notes()
    (tmp_path / "folder").mkdir()

    def after(*lines: str) -> list[str]:
        loop = Loop(chat, cast(Any, screen), cast(Any, Typed(list(lines), True)))
        loop.run()
        return [one.path for one in loop.attached]

    assert after(attached, attached) == ["a.txt", "a.txt"]
    assert after(attached, "/file") == ["a.txt"] and "a.txt" in screen.notes[-1]
    assert after(attached, "/file -", "/file") == []
    assert screen.notes[-1] == "no file goes with the next message"
    assert after("hello", attached, "/save mine", "/reset") == []
    assert screen.notes[-1].endswith("; files that were attached are not: 1")
    assert after(attached, "/load mine") == []
    assert after("/load mine", attached, "hello") == []
    assert "of the file" in chat.conversation.turns[-1].text
    after("/file folder", "/file lost")
    assert screen.errors == ["folder is a folder, and /file takes a file", "lost: no such file"]


def test_messages_are_shown_with_the_numbers_that_edit_takes(chat: Chat) -> None:
    screen = Notes()
    lines = ["/show", "one", "two", "/show", "/show 1", "/show 3", "/show x"]
    Loop(chat, cast(Any, screen), cast(Any, Typed(lines))).run()
    notes = [note for note in screen.notes if not note.startswith("[cut")]
    assert notes == ["nothing has been said yet", "  1  one\n  2  two", "> one"]
    assert screen.errors == [
        "messages are numbered 1 to 2, but 3 was given",
        "/show takes a message's number, but was given 'x'",
    ]


def test_consent_to_a_function_lasts_until_another_conversation(chat: Chat) -> None:
    asked: list[str] = []

    class Answers(Typed):
        def consents(self, question: str) -> Any:
            asked.append(question)
            return Consent.ALWAYS

    loop = Loop(chat, cast(Any, Notes()), cast(Any, Answers([])))
    chat.toolbox = cast(Any, SimpleNamespace(run=lambda call: "done", schemas=None))
    for name in ("functions.f:0", "functions.f:1", "functions.g:2"):
        assert loop._result(Call(name, "{}", True)) == "done"
    assert asked == ["Allow f({})?", "Allow g({})?"]
    loop.leave_all()
    loop._result(Call("functions.f:3", "{}", True))
    assert asked[2:] == ["Allow f({})?"]


def test_no_speed_is_told_of_a_few_tokens() -> None:
    """It was 1320.8 tok/s of two."""
    assert "answer 1 token | " in show.speeds(Stats(10, 0, 1, 0.1, 0.0, 0.0, 0, 1))
    assert "answer 2 tokens | " in show.speeds(Stats(10, 0, 2, 0.1, 0.0007, 0.0, 0, 1))
    assert "answer 9 tokens, 8.0 tok/s | " in show.speeds(Stats(10, 0, 9, 0.1, 1.0, 0.0, 0, 1))
    assert show.speeds(Stats(21, 21, 1, 0.1, 0.0, 0.0, 0, 1)).startswith(
        "prompt 21 tokens (21 kept) | "
    )


def test_retry_at_temperature_0_says_why_the_answer_is_the_same(chat: Chat) -> None:
    screen = Notes()
    lines = ["hello", "/retry", "/set temp 1", "/retry"]
    Loop(chat, cast(Any, screen), cast(Any, Typed(lines))).run()
    assert sum("at temperature 0" in note for note in screen.notes) == 1


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
