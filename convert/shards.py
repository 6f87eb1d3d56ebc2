"""safetensors files whose headers are known before any data: every tensor has an offset."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from mlx_kimi.checkpoint.files import DTYPES, INDEX

MAX_SHARD = 5 * 10**9  # bytes, what the hub advises


@dataclass(frozen=True)
class Part:
    """One tensor of an output file."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].size

    @property
    def row_bytes(self) -> int:
        """Bytes of one step of all axes but the last."""
        return self.shape[-1] * DTYPES[self.dtype].size


@dataclass(frozen=True)
class Shard:
    """One output file: parts in the order in which they lie in it."""

    file: str
    parts: tuple[Part, ...]

    @cached_property
    def header(self) -> bytes:
        """The length and the JSON that a safetensors file begins with, padded to 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        end = 0
        for part in self.parts:
            span = [end, end + part.nbytes]
            entries[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": span}
            end = span[1]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each part begins in the file."""
        end, starts = len(self.header), {}
        for part in self.parts:
            starts[part.name] = end
            end += part.nbytes
        return starts

    @property
    def nbytes(self) -> int:
        """The size of the whole file."""
        return len(self.header) + sum(part.nbytes for part in self.parts)

    def write_rows(self, file: BinaryIO, part: Part, first_row: int, rows: memoryview) -> None:
        """Write whole rows of `part`, flattened to [rows, last axis], at their place."""
        file.seek(self.offsets[part.name] + first_row * part.row_bytes)
        file.write(rows)


def lay_out(modules: Sequence[Sequence[Part]], limit: int = MAX_SHARD) -> list[Shard]:
    """Shards of at most `limit` bytes of data, in order; a module's parts are never separated.

    A module that is larger by itself gets a shard by itself. Names are mlx-lm's.
    """
    runs: list[list[Part]] = [[]]
    size = 0
    for parts in modules:
        nbytes = sum(part.nbytes for part in parts)
        if runs[-1] and size + nbytes > limit:
            runs.append([])
            size = 0
        runs[-1].extend(parts)
        size += nbytes
    if len(runs) == 1:
        return [Shard("model.safetensors", tuple(runs[0]))]
    return [
        Shard(f"model-{number:05}-of-{len(runs):05}.safetensors", tuple(run))
        for number, run in enumerate(runs, start=1)
    ]


def write_index(folder: Path, shards: Sequence[Shard], parameters: int) -> None:
    """Write the file that says which shard holds which tensor."""
    weight_map = {part.name: shard.file for shard in shards for part in shard.parts}
    total_size = sum(part.nbytes for shard in shards for part in shard.parts)
    index = {
        "metadata": {"total_size": total_size, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")
