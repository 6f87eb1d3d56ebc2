"""A checkpoint's tensors in blocks of rows, so that none is ever whole in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint import Checkpoint
from mlx_kimi.config import ModelConfig
from mlx_kimi.errors import KimiError
from mlx_kimi.load import join
from mlx_kimi.names import Join, Tensor

BLOCK = 32 * 2**20  # bytes of source that are in memory at once; 64 MB is no faster, 8 MB slower
NUMPY = {  # numpy has no bfloat16
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "U32": np.uint32,  # the last two: packed weights and scales of a quantized folder
    "U8": np.uint8,
}


@dataclass(frozen=True)
class Block:
    """Rows of one output tensor, flattened to [rows, last axis]."""

    source: str  # the name in the checkpoint, for errors
    first_row: int
    rows: mx.array
    source_bytes: int


class Source:
    """Reads blocks of an unquantized checkpoint of either spelling."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint, self.config = checkpoint, config

    def names(self, tensor: Tensor) -> list[str]:
        """The tensors of the checkpoint that become `tensor`."""
        if tensor.name in self.checkpoint:
            return [tensor.name]
        return tensor.found_in(self.checkpoint.tensors)

    def dtype(self, tensor: Tensor) -> str:
        """The dtype of `tensor` in the checkpoint; F32 where its experts disagree."""
        dtypes = {self.checkpoint.tensors[name].dtype for name in self.names(tensor)}
        return dtypes.pop() if len(dtypes) == 1 else "F32"

    def nbytes(self, tensor: Tensor) -> int:
        """What reading `tensor` reads."""
        return sum(self._nbytes(name) for name in self.names(tensor))

    def block_bytes(self, tensor: Tensor) -> int:
        """The most that is read of `tensor` at once."""
        names = self.names(tensor)
        largest = max(self._nbytes(name) for name in names)
        if self._is_half(tensor, names):
            return largest
        row = largest // math.prod(self.checkpoint.tensors[names[0]].shape) * tensor.shape[-1]
        return min(largest, max(BLOCK, row))

    def blocks(self, tensor: Tensor, from_row: int = 0) -> Iterator[Block]:
        """The rows of `tensor` in the MLX layout, in order, in the dtype of the file.

        Args:
            tensor: of the model.
            from_row: the first that is read, as some block before ended there.

        Raises:
            KimiError: a file cannot be read or ends too early.
        """
        names = self.names(tensor)
        if self._is_half(tensor, names):
            if from_row == 0:
                yield self._half(tensor, names[0])
            return
        # Every other join keeps the elements in their order.
        width, first_row = tensor.shape[-1], 0
        for name in names:
            rows = math.prod(self.checkpoint.tensors[name].shape) // width
            step = max(BLOCK * rows // self._nbytes(name), 1)
            for start in range(max(from_row - first_row, 0), rows, step):
                array = self.read(name, start * width, min(step, rows - start) * width)
                yield Block(name, first_row + start, array.reshape(-1, width), array.nbytes)
            first_row += rows

    def _is_half(self, tensor: Tensor, names: list[str]) -> bool:
        return tensor.join in (Join.KEY_HALF, Join.VALUE_HALF) and names != [tensor.name]

    def _half(self, tensor: Tensor, name: str) -> Block:
        """One half of kv_b_proj, which is read whole: 8 MB in the 48B."""
        stored = self.checkpoint.tensors[name]
        whole = self.read(name, 0, math.prod(stored.shape)).reshape(stored.shape)
        half = join(tensor, [whole], self.config)
        return Block(name, 0, half.reshape(-1, tensor.shape[-1]), whole.nbytes)

    def _nbytes(self, name: str) -> int:
        stored = self.checkpoint.tensors[name]
        return math.prod(stored.shape) * np.dtype(NUMPY[stored.dtype]).itemsize

    def read(self, name: str, first: int, count: int) -> mx.array:
        """`count` elements of a tensor of the checkpoint from the `first` on, [count].

        Raises:
            KimiError: the file cannot be read or ends too early.
        """
        stored = self.checkpoint.tensors[name]
        path = self.checkpoint.folder / stored.file
        dtype = np.dtype(NUMPY[stored.dtype])
        try:
            # Read, not mapped: pages of a mapped file would count as this process's memory.
            start = self._starts[name] + first * dtype.itemsize
            values = np.fromfile(path, dtype, count, offset=start)
        except OSError as error:
            raise KimiError(f"{path}: cannot be read: {error.strerror or error}") from None
        if len(values) != count:
            raise KimiError(f"{path}: ends in the middle of {name}")
        array = mx.array(values)
        return array.view(mx.bfloat16) if stored.dtype == "BF16" else array

    @cached_property
    def _starts(self) -> dict[str, int]:
        """Where each tensor begins in its file. Opening the checkpoint has checked the headers."""
        starts: dict[str, int] = {}
        for file in self.checkpoint.files:
            starts |= _starts(self.checkpoint.folder / file)
        return starts


def _starts(path: Path) -> dict[str, int]:
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise KimiError(f"{path}: cannot be read: {error}") from None
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
