"""Markdown that streams: the same as at once, nothing above rewritten, nothing raw."""

import io
import os
import signal
import time
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pyte
import pytest
from prompt_toolkit.styles import default_ui_style, merge_styles
from rich.console import Console

from mlx_kimi.chat.tool_calls import Call
from mlx_kimi.cli import show
from mlx_kimi.cli.chat.input import STYLE
from mlx_kimi.cli.chat.loop import Loop
from mlx_kimi.cli.chat.markdown import MarkdownBlock, MarkdownBlocks
from mlx_kimi.cli.chat.screen import TerminalScreen, _GrowingAnswer, _whole
from mlx_kimi.generation.answer import Chunk, Stats

TEXT = """\
# A heading

A paragraph with **bold** and `code`, long enough that it has to be wrapped at any width.
Its second line.

1. one
2. two

   still two
- a
- b

```python
def add(a, b):

    return a + b
```

| a | b |
|---|---|
| 1 | 2 |

> a quote

The end"""

STATS = Stats(10, 0, 5, 0.1, 1.0, 0.0, 0, 1)


def pieces(text: str, rng: Random) -> Iterator[str]:
    while text:
        size = rng.randint(1, 7)
        yield text[:size]
        text = text[size:]


def split(text: str, rng: Random) -> list[str]:
    blocks = MarkdownBlocks()
    final = [block for piece in pieces(text, rng) for block in blocks.add(piece)]
    return [*final, blocks.pending]


def test_blocks_do_not_depend_on_how_the_text_arrives() -> None:
    first = split(TEXT, Random(0))
    assert len(first) == 9, "each item is one; what has no line break yet belongs to the last"
    assert "".join(first) == TEXT
    assert all(split(TEXT, Random(seed)) == first for seed in range(1, 40))


def rendered(blocks: list[str], width: int) -> list[str]:
    """What the blocks look like when they are printed at once."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    for block in blocks:
        console.print(MarkdownBlock(block))
    return [line.rstrip() for line in console.file.getvalue().split("\n")]


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "rows"), [(40, 10), (80, 24), (120, 5)])
def test_what_scrolled_away_is_printed_once_and_never_again(columns: int, rows: int) -> None:
    """The screen is read after every piece: a line that scrolled away never changes."""
    text = "\n\n".join([TEXT, "word " * 400, TEXT])
    screen = pyte.HistoryScreen(columns, rows, history=10_000)
    screen.set_mode(pyte.modes.LNM)
    stream = pyte.Stream(screen)
    console = Console(
        file=io.StringIO(), force_terminal=True, width=columns, height=rows, color_system=None
    )
    answer = _GrowingAnswer(console, lambda stats: "the status line")
    above: list[str] = []

    def look() -> list[str]:
        stream.feed(console.file.getvalue())
        console.file.seek(0)
        console.file.truncate()
        now = [
            "".join(line[x].data for x in range(columns)).rstrip() for line in screen.history.top
        ]
        assert now[: len(above)] == above
        return now

    answer.start()
    for piece in pieces(text, Random(3)):
        answer._next_drawing = 0  # draw every piece
        answer.add(Chunk(piece, 0, None, STATS))
        above = look()
    answer.stop()
    above = look()
    shown = [*above, *(line.rstrip() for line in screen.display)]
    expected = rendered(split(text, Random(0)), columns)
    while shown and not shown[-1]:
        shown.pop()
    while expected and not expected[-1]:
        expected.pop()
    assert shown[1:] == expected
    assert "the status line" not in "\n".join(shown)


@pytest.mark.alone
def test_ctrl_c_never_falls_into_a_drawing() -> None:
    """Interrupted within, rich's console would hold back all that it prints from then on."""
    kept = []
    with pytest.raises(KeyboardInterrupt):
        with _whole():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            kept.append("drawn to its end")
    assert kept and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_lines_have_no_padding_that_a_narrower_terminal_would_wrap() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    console.print(MarkdownBlock(TEXT))
    lines = console.file.getvalue().split("\n")
    assert max(map(len, lines)) > 60 and all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("formatted", [True, False])
def test_escape_codes_of_an_answer_are_not_the_terminals(formatted, capfd, monkeypatch) -> None:
    """A link, a title and a colour: as the model writes them, and in markdown's own link."""
    text = "\x1b]0;title\x07\x1b[31mred\x9b0m \u202e [x](http://a\x1b]8;;b) \x08\x08"
    text += " e\u0301 👩\u200d👧"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    screen = TerminalScreen(lambda stats: "")
    screen.console = Console(force_terminal=True, color_system=None, width=80)
    for code in ("\x1b", "\x07", "\x9b", "\u202e", "\x08"):
        assert code not in show.printable(text)
    assert "e\u0301 👩\u200d👧" in show.printable(text), "accents and joined emoji stay"
    chunks = [Chunk(c, 0, None, STATS) for c in text]
    if formatted:
        screen._formatted(lambda progress: chunks)
    else:
        writer = show.AnswerWriter()
        for chunk in chunks:
            writer.write(chunk.text)
        writer.end()
    written = capfd.readouterr().out
    for code in ("\x1b]", "\x1b[31m", "\x07", "\x9b", "\u202e", "\x08"):
        assert code not in written
    assert "red" in written


def test_a_message_keeps_its_line_breaks_and_tabs() -> None:
    assert show.printable("a\n\tb\u00a0c\u3000d") == "a\n\tb\u00a0c\u3000d"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"a":  1}', 'f({"a": 1})'),
        ('{"a":\n"x"}\n? [y/N] y\nAllow g()', 'f({"a":\\n"x"}\\n? [y/N] y\\nAllow g())'),
        ('{"a": "\\n\\u202e"}', 'f({"a": "\\n\N{REPLACEMENT CHARACTER}"})'),
        ('{"a":\n\n"x"}', 'f({"a": "x"})'),
        ("[" * 5000, "f(" + "[" * 1998 + "… and 3,003 characters more"),
    ],
)
def test_a_call_that_is_asked_about_is_one_line(arguments: str, shown: str) -> None:
    """Whatever the model wrote: no second question stands on the screen."""
    asked: list[str] = []

    class Answers:
        def consents(self, question: str) -> bool:
            asked.append(question)
            return False

    loop = Loop.__new__(Loop)
    loop.input, loop._allowed = cast(Any, Answers()), set()
    loop.chat = cast(Any, SimpleNamespace(toolbox=object()))
    loop._result(Call("functions.f:0", arguments, True))
    assert asked == [f"Allow {shown}?"]


@pytest.mark.parametrize("part", ["completion", "completion.current"])
@pytest.mark.parametrize("menu", ["completion-menu", "completion-menu.meta"])
def test_the_menu_of_commands_has_the_terminals_own_colours(menu: str, part: str) -> None:
    """What commands do stood in black, on a dark screen, too."""
    style = merge_styles([default_ui_style(), STYLE])
    attributes = style.get_attrs_for_style_str(f"class:completion-menu class:{menu}.{part}")
    assert attributes.bgcolor == "default" and attributes.color in ("default", "ansigreen")
