"""Quantities for people."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """`1 turn`, `1,200 turns`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def human_size(count: float) -> str:
    """Bytes for people: 27.64 GB, 1.18 MB, 36 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit / 10:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e3:.0f} kB" if count >= 1e3 else f"{count:.0f} B"
