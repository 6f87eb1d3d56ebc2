"""Server-sent events, as bytes."""

from __future__ import annotations

from typing import Any

from mlx_kimi.server.json_text import json_bytes

DONE = b"data: [DONE]\n\n"


def event(value: Any, name: str | None = None) -> bytes:
    """An event of JSON, with its name where a client looks at that."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json_bytes(value) + b"\n\n"


def comment(text: str) -> bytes:
    """What no client reads, so that the connection is seen to live."""
    return f": {text}\n\n".encode()
