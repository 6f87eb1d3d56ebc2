"""Saved conversations, a line each: for `sessions` and `/sessions`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from mlx_kimi.chat.sessions import Listed
from mlx_kimi.units import counted, human_size

OPENING = 40  # characters of a message that stand for it


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
