"""Lists that commands print; saved conversations, a line each: for `sessions` and `/sessions`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from mlx_kimi.chat.sessions import Listed
from mlx_kimi.cli import show
from mlx_kimi.units import counted, human_size

OPENING = 40  # characters of a message that stand for it
LINE = 400  # characters


def print_list(
    lines: Iterable[str], summary: str, records: Iterable[Mapping[str, Any]], as_json: bool
) -> None:
    """Lines on stdout and what all of them come to on stderr, or the same as records of JSON."""
    if as_json:
        click.echo(json.dumps([*records]))
        return
    for line in lines:
        click.echo(show.one_line(line, LINE))
    click.echo(summary, err=True)


def lines_of(listed: Sequence[Listed]) -> Iterator[str]:
    """Name, last use, turns, tokens, size on the disk and the first message."""
    width = max((len(one.name) for one in listed), default=0)
    for one in listed:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.changed))
        if one.problem:
            yield f"{one.name:<{width}}  {used}  {human_size(one.size):>8}  {one.problem}"
            continue
        yield (
            f"{one.name:<{width}}  {used}  {counted(one.turns, 'turn'):>9}  "
            f"{counted(one.tokens, 'token'):>14}  {human_size(one.size):>8}  {opening(one.opening)}"
        )


def opening(text: str) -> str:
    """The beginning of a message, on one line."""
    line = " ".join(text[: 4 * OPENING].split())
    return line if len(line) <= OPENING else line[:OPENING] + "…"
