"""Where a chat's messages come from: a line editor on a terminal, lines of a pipe elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum
from io import TextIOWrapper
from pathlib import Path
from typing import Protocol

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from mlx_kimi.durable import not_through_a_link

STYLE = Style.from_dict(  # the terminal's own colours, for dark and light ones
    {
        "prompt": "bold ansigreen",
        "bottom-toolbar": "noreverse dim",
        "completion-menu": "bg:default",
        "completion-menu.completion": "bg:default fg:default",
        "completion-menu.completion.current": "noreverse bold ansigreen bg:default",
        "completion-menu.meta.completion": "bg:default fg:default dim",
        "completion-menu.meta.completion.current": "bg:default fg:default",
        "scrollbar.background": "bg:default",
        "scrollbar.button": "bg:default",
    }
)
PROMPT = FormattedText([("", "\n"), ("class:prompt", "> ")])  # apart from what stands above
LEAVING = "(Ctrl-C again, Ctrl-D or /exit ends the chat)"


class Consent(Enum):
    """Of the user, to a call of a function."""

    ONCE = "y"
    ALWAYS = "a"


class Input(Protocol):
    """Messages, one after another.

    Attributes:
        takes_back: whether a message that got no answer stands at the next prompt again.
    """

    takes_back: bool

    def read(self, text: str = "") -> str | None:
        """The next message; `text` stands there to be changed. None: the chat ends."""

    def consents(self, question: str) -> Consent | None:
        """Whether the user allows something; KeyboardInterrupt if they rather stop it all."""


class PipedLines:
    """A message a line, from a pipe or a terminal that is dumb."""

    takes_back = False

    def __init__(self) -> None:
        if isinstance(sys.stdin, TextIOWrapper):  # what is not UTF-8 is refused by the message
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")

    def read(self, text: str = "") -> str | None:
        if sys.stdin.isatty():  # of a terminal that has no line editor
            click.echo("> ", nl=False, err=True)
        try:
            return input()
        except (EOFError, KeyboardInterrupt):
            return None

    def consents(self, question: str) -> Consent | None:
        if sys.stdin.isatty():
            return _ask(question)
        click.echo(f"{question} no: nobody can be asked", err=True)
        return None


class _KeptHistory(FileHistory):
    """What was typed before, in a file. A disk that keeps none of it ends no chat."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            yield from super().load_history_strings()
        except OSError:
            return

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):  # (full, read-only; a pasted lone surrogate)
            super().store_string(string)


def _history(file: Path) -> History:
    """That of a file, made if need be; where none can be kept, of this chat alone."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        os.close(not_through_a_link(str(file), os.O_RDONLY))
    except OSError:
        return InMemoryHistory()
    return _KeptHistory(file)


class LineEditor:
    """Keys as in a shell. Enter sends, Alt-Enter or Ctrl-J breaks the line, a paste is one text."""

    takes_back = True

    def __init__(self, history: Path, completer: Completer, status: Callable[[], str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(history),
            completer=completer,
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation=lambda width, number, is_soft: " " * width,
            bottom_toolbar=lambda: status(),
            style=STYLE,
            enable_open_in_editor=True,
            reserve_space_for_menu=4,
        )

    def read(self, text: str = "") -> str | None:
        for _ in range(2):
            try:
                return self._session.prompt(PROMPT, default=text)
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._was_empty():
                    return ""  # the line is dropped; the next Ctrl-C is a first one
                click.echo(LEAVING, err=True)
                text = ""
        return None

    def consents(self, question: str) -> Consent | None:
        return _ask(question)

    def _was_empty(self) -> bool:
        return not self._session.default_buffer.text


def _ask(question: str) -> Consent | None:
    """Everything but yes is no; a consents to this function from now on."""
    try:
        answer = click.prompt(
            f"{question} [y/N/a] (a: always this one)", "n", show_default=False, err=True
        )
    except click.Abort:  # Ctrl-C or Ctrl-D
        raise KeyboardInterrupt from None
    begins = answer.strip().lower()[:1]
    return Consent(begins) if begins in {one.value for one in Consent} else None


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))  # elsewhere it ends a search
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
