"""What was found out about a GPU, in lines: for `tune` and `info --kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_kimi.tuning.stored import Stored


def lines(stored: Stored) -> Iterator[str]:
    """What was found out, for people."""
    yield f"choices       {stored.choices.digest}"
    for kernel, why in stored.off.items():
        yield f"off           {kernel}: {why}"
    for name, value in stored.tuning._asdict().items():
        if name != "experts":
            yield f"{name:<14}{tuple(value) if isinstance(value, tuple) else value}"
    for form in stored.tuning.experts:
        tiles = f" of {8 * form.tiles} tokens" if form.tiles else ""
        yield f"experts       from {form.pairs_from:g} tokens of an expert: {form.kernels}{tiles}"
    yield from (f"measured      {note}" for note in stored.notes)
