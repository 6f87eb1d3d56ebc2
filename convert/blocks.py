"""A checkpoint's tensors in blocks of rows, so that none is ever whole in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.checkpoint.tensors import Join, Tensor
from mlx_kimi.checkpoint.weight_file import OpenFile

BLOCK = 32 * 2**20  # bytes of source that are read at once; 64 MB is no faster, 8 MB slower
NUMPY = {  # numpy has no bfloat16
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "U32": np.uint32,  # the last two: packed weights and scales of a quantized folder
    "U8": np.uint8,
}


@dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint: all rows of one tensor of the result, or one expert's."""

    tensor: Tensor
    name: str  # in the checkpoint
    first_row: int  # of the tensor's, flattened to [rows, last axis]
    rows: int


@dataclass(frozen=True)
class Block:
    """Rows of a piece, as many as are in memory at once."""

    piece: Piece
    skip: int  # rows of the piece before these
    rows: int
    source_bytes: int

    @property
    def first_row(self) -> int:
        """Where it begins in the tensor, flattened to [rows, last axis]."""
        return self.piece.first_row + self.skip


class Source:
    """Reads blocks of an unquantized checkpoint of either spelling."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, folder: Path) -> None:
        """`folder` holds the weights' files, each at least while it is read."""
        self.checkpoint, self.config, self._folder = checkpoint, config, folder
        self._open: dict[str, OpenFile] = {}

    def close(self, file: str) -> None:
        """Let go of a file that was read; it may be read again."""
        if opened := self._open.pop(file, None):
            opened.close()

    def names(self, tensor: Tensor) -> list[str]:
        """The tensors of the checkpoint that become `tensor`."""
        if tensor.name in self.checkpoint:
            return [tensor.name]
        return tensor.found_in(self.checkpoint.tensors)

    def dtype(self, tensor: Tensor) -> str:
        """The dtype of `tensor` in the checkpoint; F32 where its experts disagree."""
        dtypes = {self.checkpoint.tensors[name].dtype for name in self.names(tensor)}
        return dtypes.pop() if len(dtypes) == 1 else "F32"

    def nbytes(self, piece: Piece) -> int:
        """What reading `piece` reads."""
        return self._nbytes(piece.name)

    def file(self, piece: Piece) -> str:
        """The file of the checkpoint that `piece` is in."""
        return self.checkpoint.tensors[piece.name].file

    def pieces(self, tensor: Tensor) -> list[Piece]:
        """What `tensor` is made of, in the order of its rows."""
        width, names = tensor.shape[-1], self.names(tensor)
        if self._is_half(tensor, names):
            return [Piece(tensor, names[0], 0, math.prod(tensor.shape[:-1]))]
        # Every other join keeps the elements in their order.
        rows = [math.prod(self.checkpoint.tensors[name].shape) // width for name in names]
        starts = accumulate(rows, initial=0)
        return [Piece(tensor, *each) for each in zip(names, starts, rows, strict=False)]

    def blocks(self, piece: Piece, skip: int = 0, limit: int = BLOCK) -> Iterator[Block]:
        """The blocks of `piece`, in order; nothing is read yet.

        Args:
            piece: of this source.
            skip: its rows that are not needed, as some block before ended there.
            limit: bytes of source in one block, which is a row at least.
        """
        nbytes = self._nbytes(piece.name)
        # Half of kv_b_proj is made of the whole of it: 8 MB in the 48B.
        whole = self._is_half(piece.tensor, [piece.name])
        step = piece.rows if whole else max(limit * piece.rows // nbytes, 1)
        for start in range(skip, piece.rows, step):
            rows = min(step, piece.rows - start)
            yield Block(piece, start, rows, nbytes * rows // piece.rows)

    def read(self, block: Block) -> np.ndarray:
        """The elements of a block in the dtype of the file. Any thread may call it.

        Raises:
            KimiError: the file cannot be read, or is not the one whose header was checked.
        """
        piece, stored = block.piece, self.checkpoint.tensors[block.piece.name]
        if self._is_half(piece.tensor, [piece.name]):
            return self._read(piece.name, 0, math.prod(stored.shape))
        width = piece.tensor.shape[-1]
        return self._read(piece.name, block.skip * width, block.rows * width)

    def rows(self, block: Block, values: np.ndarray) -> mx.array:
        """What was read as rows of the MLX layout, [rows, last axis]."""
        piece, stored = block.piece, self.checkpoint.tensors[block.piece.name]
        array = _in_mlx(values, stored.dtype)
        if self._is_half(piece.tensor, [piece.name]):
            array = piece.tensor.joined([array.reshape(stored.shape)], self.config)
        return array.reshape(-1, piece.tensor.shape[-1])

    def array(self, name: str, first: int, count: int) -> mx.array:
        """`count` elements of a tensor of the checkpoint from the `first` on, [count].

        Raises:
            KimiError: the file cannot be read, or is not the one whose header was checked.
        """
        return _in_mlx(self._read(name, first, count), self.checkpoint.tensors[name].dtype)

    def _is_half(self, tensor: Tensor, names: list[str]) -> bool:
        return tensor.join in (Join.KEY_HALF, Join.VALUE_HALF) and names != [tensor.name]

    def _nbytes(self, name: str) -> int:
        stored = self.checkpoint.tensors[name]
        return math.prod(stored.shape) * np.dtype(NUMPY[stored.dtype]).itemsize

    def _read(self, name: str, first: int, count: int) -> np.ndarray:
        """`count` elements of a tensor from the `first` on."""
        stored = self.checkpoint.tensors[name]
        if stored.file not in self._open:
            opened = self.checkpoint.open(stored.file, "it is being read", self._folder)
            self._open[stored.file] = opened
        # Read, not mapped: pages of a mapped file would count as this process's memory.
        values = np.empty(count, NUMPY[stored.dtype])
        start = self.checkpoint.place(name) + first * values.itemsize
        self._open[stored.file].read(start, values.view(np.uint8))
        return values


def _in_mlx(values: np.ndarray, dtype: str) -> mx.array:
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == "BF16" else array
