"""`mlx_kimi sessions`: what is kept of conversations; seen, renamed, removed, taken elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.session import read_text
from mlx_kimi.chat.sessions import Listed, Sessions
from mlx_kimi.cli import show
from mlx_kimi.cli.listed import LINE, lines_of, print_list
from mlx_kimi.errors import KimiError
from mlx_kimi.units import counted, human_size

SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def run(sessions: Path | None, autosave_limit: int, as_json: bool) -> None:
    kept = Sessions(sessions)
    listed = kept.list()
    summary = _summary(kept, listed, autosave_limit)
    print_list(lines_of(listed), summary, map(_json, listed), as_json)


def rename(name: str, new: str) -> None:
    _kept().rename(name, new)


def remove(names: tuple[str, ...], autosaved: bool) -> None:
    if bool(names) == autosaved:
        raise click.UsageError("give names, or --autosaved")
    kept = _kept()
    for name in names:  # all of them are there, or none is removed
        kept.existing(name)
    for name in names or [one.name for one in kept.list() if one.is_autosaved]:
        kept.remove(name)
        click.echo(f"removed {show.one_line(name, LINE)}", err=True)


def export(name: str, form: str, output: Path | None) -> None:
    folder = _kept().existing(name)
    _, conversation, note = read_text(folder)
    text = _as_json(folder.name, conversation) if form == "json" else _as_markdown(conversation)
    if note:
        click.echo(f"{name}: {note}", err=True)
    if output is not None:
        _write(output, text)
    else:
        click.echo(show.printable(text) if sys.stdout.isatty() else _bytes(text), nl=False)


def _kept() -> Sessions:
    """Those of the folder that was given to the command above."""
    return Sessions(click.get_current_context().obj)


def _summary(kept: Sessions, listed: list[Listed], limit: int) -> str:
    if not listed:
        return f"there are no sessions in {kept.folder}"
    size = sum(one.size for one in listed)
    autosaved = sum(one.size for one in listed if one.is_autosaved)
    return (
        f"{counted(len(listed), 'session')}, {human_size(size)} in {kept.folder}\n"
        f"those that nobody named: {human_size(autosaved)} of at most {human_size(limit)} "
        "(--autosave-limit)"
    )


def _json(one: Listed) -> dict[str, Any]:
    return asdict(one) | {"autosaved": one.is_autosaved}


def _as_json(name: str, conversation: Conversation) -> str:
    said = {"name": name, "messages": conversation.messages}
    return json.dumps(said, ensure_ascii=False, indent=2) + "\n"


def _as_markdown(conversation: Conversation) -> str:
    return "\n".join(part for message in conversation.messages for part in _parts(message))


def _parts(message: dict[str, Any]) -> Iterator[str]:
    """A message's heading, its text as it is, and its calls of tools."""
    called = f": {message['name']}" if message.get("name") else ""
    yield f"## {SPEAKERS[message['role']]}{called}\n"
    if message["content"]:
        yield f"{message['content']}\n"
    for call in message.get("tool_calls") or ():
        function = call["function"]
        yield f"```\n{function['name']}({function['arguments']})\n```\n"


def _write(file: Path, text: str) -> None:
    try:
        with open(file, "xb") as new:
            new.write(_bytes(text))
    except FileExistsError:
        raise KimiError(f"{file}: already exists; remove it or choose another name") from None


def _bytes(text: str) -> bytes:
    """UTF-8; a lone surrogate, which a forged session may hold, is spelled out."""
    return text.encode("utf-8", "backslashreplace")
