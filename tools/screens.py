"""Draws the README's pictures: chats with the pocket model and a conversion, in a real terminal.

    python -m tools.screens docs [SCENE ...]

Keys are sent to `mlx_kimi` in a pty; the screen that a terminal emulator shows is written as SVG,
dark and light. What is converted are random weights, 1.6 GB of the 48B's width.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from benchmarks.large_checkpoint import write
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.chat.conversation import Conversation, Turn
from mlx_kimi.chat.fingerprint import fingerprint
from mlx_kimi.chat.session import Session
from tests.terminal import ENTER, Terminal

# background, foreground, the eight colours, and their bright forms
DARK = TerminalTheme(
    (24, 26, 31),
    (214, 218, 224),
    [(40, 44, 52), (224, 108, 117), (126, 200, 140), (222, 184, 110)]
    + [(97, 175, 239), (198, 140, 221), (86, 182, 194), (200, 204, 212)],
    [(120, 128, 142), (240, 130, 138), (150, 220, 165), (235, 203, 139)]
    + [(130, 195, 250), (215, 165, 235), (115, 205, 215), (255, 255, 255)],
)
LIGHT = TerminalTheme(
    (255, 255, 255),
    (40, 44, 52),
    [(40, 44, 52), (190, 50, 60), (30, 125, 60), (150, 105, 10)]
    + [(20, 95, 190), (140, 60, 170), (10, 120, 135), (90, 96, 108)],
    [(120, 126, 138), (205, 70, 80), (45, 145, 75), (170, 125, 25)]
    + [(40, 115, 210), (160, 80, 190), (25, 140, 155), (60, 64, 72)],
)
FONTS = "ui-monospace, Menlo, DejaVu Sans Mono, monospace"
CONVERT = "mlx_kimi convert -m kimi kimi-4bit"
TOOL = '''
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "sunny, 24 degrees"
'''


ANSWER = """The loop adds one number after another:

```python
def total(numbers: list[int]) -> int:
    result = 0
    for number in numbers:  # in order
        result += number
    return result
```

| numbers | total |
|---|---:|
| 3, 4 | 7 |
| 42, 7, 19 | 68 |
"""


def main() -> None:
    folder, *names = sys.argv[1:]
    scenes = {
        "chat_going_back": _going_back,
        "chat_tools": _tools,
        "chat_markdown": _markdown,
        "convert": _convert,
    }
    for name in names or scenes:
        with tempfile.TemporaryDirectory() as made:
            terminal = scenes[name](Path(made) / "sessions")
            for shade, theme in (("dark", DARK), ("light", LIGHT)):
                title = CONVERT if name == "convert" else "mlx_kimi chat"
                _write(terminal, Path(folder) / f"{name}_{shade}.svg", theme, title)
            terminal.close()


def _going_back(sessions: Path) -> Terminal:
    """80 columns: an answer, a message taken up again, a saved conversation."""
    terminal = Terminal("chat", "--sessions", sessions, columns=80, rows=34)
    for keys in (
        "The code of the gate is 7731.",
        "Sort these numbers: 42 7 19 3",
        "/undo",
        "What is the code of the gate?",
        "/save gate",
        "/stats",
    ):
        _say(terminal, keys)
    return terminal


def _tools(sessions: Path) -> Terminal:
    """120 columns: a tool with consent, a command's menu."""
    module = sessions.with_name("weather.py")
    module.write_text(TOOL)
    options = ("--sessions", sessions, "--tools", module)
    terminal = Terminal("chat", *options, columns=120, rows=24)
    terminal.wait_for_prompt()
    terminal.type("What is the weather in Paris?" + ENTER)
    terminal.wait_for(r"\[y/N/a\]")
    terminal.type("y" + ENTER)
    terminal.wait_for("The weather in Paris is")
    _say(terminal, "What is KDA?")
    terminal.wait_for_prompt()
    terminal.type("/s")
    terminal.wait_for("show or change sampling")
    terminal.read(0.5)
    return terminal


def _markdown(sessions: Path) -> Terminal:
    """80 columns: an answer with code and a table, of a conversation that was saved."""
    turn = Turn("How are numbers added up?", ({"role": "assistant", "content": ANSWER},))
    session = Session(sessions / "sums", fingerprint(pocket_folder(), None)).open()
    session.save(Conversation(None, [turn]))
    session.close()
    terminal = Terminal("chat", "--sessions", sessions, "--resume", "sums", columns=80, rows=26)
    terminal.wait_for_prompt()
    return terminal


def _convert(sessions: Path) -> Terminal:
    """80 columns: the bar of a conversion when half is done."""
    folder = sessions.parent
    write(folder / "kimi", layers=1)
    terminal = Terminal(*CONVERT.split()[1:], columns=80, rows=5, cwd=folder)
    terminal.wait_until(lambda: _share(terminal.text) > 0.5, seconds=300)
    return terminal


def _share(text: str) -> float:
    """How much of a conversion is done."""
    found = re.search(r"converting .* ([\d.]+) GB of ([\d.]+) GB", text)
    return float(found[1]) / float(found[2]) if found else 0.0


def _say(terminal: Terminal, text: str) -> None:
    terminal.wait_for_prompt()
    terminal.type(text)
    terminal.wait_for(re.escape("> " + text))
    terminal.type(ENTER)
    terminal.wait_until(lambda: not terminal.at_prompt())
    terminal.wait_for_prompt()


def _write(terminal: Terminal, file: Path, theme: TerminalTheme, title: str) -> None:
    """The screen as SVG."""
    screen = terminal.screen
    console = Console(record=True, width=screen.columns, file=open("/dev/null", "w"))  # noqa: SIM115
    for row in range(screen.lines):
        line = Text(no_wrap=True)
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            line.append(cell.data, _style(cell))
        console.print(line)
    picture = console.export_svg(title=title, theme=theme)
    # A font of the reader's machine, and none from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    picture = picture.replace("Fira Code, monospace", FONTS)
    picture = picture.replace('stroke="rgba(255,255,255,0.35)"', 'stroke="rgba(128,128,128,0.6)"')
    file.write_text(picture, encoding="utf-8")
    print(f"{file}: {file.stat().st_size:,} bytes")


def _style(cell: Any) -> Style:
    """What pyte says of a cell, as rich says it."""
    return Style(
        color=_color(cell.fg),
        bgcolor=_color(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        reverse=cell.reverse,
    )


def _color(name: str) -> str | None:
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    name = name.replace("brown", "yellow")
    return name.replace("bright", "bright_") if name.startswith("bright") else name


if __name__ == "__main__":
    main()
