"""A checkpoint's tensors in blocks of rows, so that none is ever whole in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.files import Checkpoint, Stored
from mlx_kimi.checkpoint.tensors import Tensor
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
class SourceTensor:
    """One tensor of the checkpoint: all rows of one tensor of the result, or one expert's.

    Rows are those of the tensor of the result, flattened to [rows, last axis].
    """

    tensor: Tensor  # of the result
    name: str  # in the checkpoint
    stored: Stored
    first_row: int
    rows: int

    @property
    def file(self) -> str:
        """The file of the checkpoint that it is in."""
        return self.stored.file

    @property
    def nbytes(self) -> int:
        """The bytes that reading it reads."""
        return math.prod(self.stored.shape) * np.dtype(NUMPY[self.stored.dtype]).itemsize

    @property
    def is_joint(self) -> bool:
        """Whether it is a `kv_b_proj`, half of which becomes the tensor: it is read whole."""
        return self.tensor.is_half and self.name != self.tensor.name


@dataclass(frozen=True)
class RowBlock:
    """Rows of a source tensor, as many as are in memory at once."""

    source: SourceTensor
    skip: int  # rows of the source tensor before these
    rows: int
    nbytes: int  # in the file

    @property
    def first_row(self) -> int:
        """Where it begins in the tensor of the result, flattened to [rows, last axis]."""
        return self.source.first_row + self.skip


class TensorReader:
    """Reads the tensors of a checkpoint of either spelling, block by block."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        """Each file of `checkpoint` must be there while it is read."""
        self.checkpoint, self.config = checkpoint, config
        self._open: dict[str, OpenFile] = {}

    def close(self, file: str) -> None:
        """Let go of a file that was read; it may be read again."""
        if opened := self._open.pop(file, None):
            opened.close()

    def dtype(self, tensor: Tensor) -> str:
        """The dtype of `tensor` in the checkpoint; F32 where its experts disagree."""
        dtypes = {self.checkpoint.tensors[name].dtype for name in self._names(tensor)}
        return dtypes.pop() if len(dtypes) == 1 else "F32"

    def sources(self, tensor: Tensor) -> list[SourceTensor]:
        """The tensors of the checkpoint that become `tensor`, in the order of its rows."""
        width, names = tensor.shape[-1], self._names(tensor)
        stored = [self.checkpoint.tensors[name] for name in names]
        if tensor.is_half:
            return [SourceTensor(tensor, names[0], stored[0], 0, math.prod(tensor.shape[:-1]))]
        # Every other join keeps the elements in their order.
        rows = [math.prod(each.shape) // width for each in stored]
        starts = accumulate(rows, initial=0)
        return [
            SourceTensor(tensor, *each) for each in zip(names, stored, starts, rows, strict=False)
        ]

    def blocks(self, source: SourceTensor, skip: int = 0, limit: int = BLOCK) -> Iterator[RowBlock]:
        """The blocks of `source`, in order; nothing is read yet.

        Args:
            source: of this checkpoint.
            skip: its rows that are not needed; a block that was made before ended there.
            limit: bytes of the file in one block, which is a row at least.
        """
        nbytes = source.nbytes
        # A joint kv_b_proj has 8 MB in the 48B.
        step = source.rows if source.is_joint else max(limit * source.rows // nbytes, 1)
        for start in range(skip, source.rows, step):
            rows = min(step, source.rows - start)
            yield RowBlock(source, start, rows, nbytes * rows // source.rows)

    def read(self, block: RowBlock) -> np.ndarray:
        """The elements of a block in the dtype of the file. Any thread may call it.

        Raises:
            KimiError: the file cannot be read, or is not the one whose header was checked.
        """
        source = block.source
        if source.is_joint:
            return self._read(source.name, 0, math.prod(source.stored.shape))
        width = source.tensor.shape[-1]
        return self._read(source.name, block.skip * width, block.rows * width)

    def rows(self, block: RowBlock, values: np.ndarray) -> mx.array:
        """What was read as rows of the MLX layout, [rows, last axis]."""
        source = block.source
        array = _in_mlx(values, source.stored.dtype)
        if source.is_joint:
            array = source.tensor.joined([array.reshape(source.stored.shape)], self.config)
        return array.reshape(-1, source.tensor.shape[-1])

    def array(self, name: str, first: int, count: int) -> mx.array:
        """`count` elements of a tensor of the checkpoint from the `first` on, [count].

        Raises:
            KimiError: the file cannot be read, or is not the one whose header was checked.
        """
        return _in_mlx(self._read(name, first, count), self.checkpoint.tensors[name].dtype)

    def _names(self, tensor: Tensor) -> list[str]:
        """The tensors of the checkpoint that become `tensor`."""
        if tensor.name in self.checkpoint:
            return [tensor.name]
        return tensor.found_in(self.checkpoint.tensors)

    def _read(self, name: str, first: int, count: int) -> np.ndarray:
        """`count` elements of a tensor from the `first` on."""
        stored = self.checkpoint.tensors[name]
        if stored.file not in self._open:
            self._open[stored.file] = self.checkpoint.open(stored.file, "it is being read")
        # Read, not mapped: pages of a mapped file would count as this process's memory.
        values = np.empty(count, NUMPY[stored.dtype])
        start = self.checkpoint.place(name) + first * values.itemsize
        self._open[stored.file].read(start, values.view(np.uint8))
        return values


def _in_mlx(values: np.ndarray, dtype: str) -> mx.array:
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == "BF16" else array
