"""What Tab completes in a chat: commands, and the names that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from mlx_kimi.chat.sessions import Sessions
from mlx_kimi.cli.chat.commands import COMMANDS
from mlx_kimi.cli.chat.settings import NAMES


class CommandCompleter(Completer):
    """Names of commands, and of the files, sessions and settings that they take."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions, self._paths = sessions, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if "\n" in text or not text.startswith("/"):
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            yield from _starting(name, COMMANDS, lambda name: COMMANDS[name].does)
        elif name == "file":
            path = Document(argument, len(argument))
            yield from self._paths.get_completions(path, event)
        elif name == "load":
            yield from _starting(argument, [listed.name for listed in self._sessions.list()])
        elif name == "set":
            yield from _starting(argument, NAMES)


def _starting(
    text: str, names: Iterable[str], meta: Callable[[str], str] = lambda name: ""
) -> Iterable[Completion]:
    for name in names:
        if name.startswith(text):
            yield Completion(name, -len(text), display_meta=meta(name))
