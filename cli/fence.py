"""A file's text as a part of a message."""

from __future__ import annotations

import re


def fenced(name: str, text: str) -> str:
    """The text under its name, in a fence that nothing in it closes."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{name}:\n{fence}\n{text.rstrip()}\n{fence}"
