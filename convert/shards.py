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
class OutputTensor:
    """One tensor of the result's files."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].size

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the tensor being flattened to [rows, last axis]."""
        return self.shape[-1] * DTYPES[self.dtype].size


@dataclass(frozen=True)
class Shard:
    """One file of the result: its tensors in the order in which they lie in it."""

    file: str
    tensors: tuple[OutputTensor, ...]

    @cached_property
    def header(self) -> bytes:
        """The length and the JSON that a safetensors file begins with, padded to 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        end = 0
        for tensor in self.tensors:
            span = [end, end + tensor.nbytes]
            entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": span}
            entries[tensor.name] = entry
            end = span[1]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each tensor begins in the file."""
        end, starts = len(self.header), {}
        for tensor in self.tensors:
            starts[tensor.name] = end
            end += tensor.nbytes
        return starts

    @property
    def nbytes(self) -> int:
        """The size of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def write_rows(
        self, file: BinaryIO, tensor: OutputTensor, first_row: int, rows: memoryview
    ) -> None:
        """Write whole rows of `tensor`, flattened to [rows, last axis], at their place."""
        file.seek(self.offsets[tensor.name] + first_row * tensor.row_bytes)
        file.write(rows)

    def read_rows(self, file: BinaryIO, tensor: OutputTensor, first_row: int, count: int) -> bytes:
        """What `write_rows` wrote; less where the file ends before."""
        file.seek(self.offsets[tensor.name] + first_row * tensor.row_bytes)
        return file.read(count * tensor.row_bytes)


def lay_out(modules: Sequence[Sequence[OutputTensor]], limit: int = MAX_SHARD) -> list[Shard]:
    """Shards of at most `limit` bytes of data, in order; a module's tensors are never separated.

    A module that is larger by itself gets a shard by itself. Names are mlx-lm's.
    """
    runs: list[list[OutputTensor]] = [[]]
    size = 0
    for tensors in modules:
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if runs[-1] and size + nbytes > limit:
            runs.append([])
            size = 0
        runs[-1].extend(tensors)
        size += nbytes
    if len(runs) == 1:
        return [Shard("model.safetensors", tuple(runs[0]))]
    return [
        Shard(f"model-{number:05}-of-{len(runs):05}.safetensors", tuple(run))
        for number, run in enumerate(runs, start=1)
    ]


def places(shards: Sequence[Shard]) -> dict[str, tuple[Shard, OutputTensor]]:
    """The tensors by name, and where each lies."""
    return {tensor.name: (shard, tensor) for shard in shards for tensor in shard.tensors}


def write_index(folder: Path, shards: Sequence[Shard], parameters: int) -> None:
    """Write the file that says which shard holds which tensor."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    index = {
        "metadata": {"total_size": total_size, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")
