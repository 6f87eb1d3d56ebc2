"""Where each routed expert's bytes lie in a folder's files, and how they get into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_kimi.checkpoint.files import DTYPES, Checkpoint
from mlx_kimi.checkpoint.weight_file import Bytes, OpenFile
from mlx_kimi.errors import KimiError


@dataclass(frozen=True)
class ExpertStack:
    """One array of every expert of a layer, such as the scales of `down_proj`."""

    name: str  # in the MLX layout: `model.layers.3.mlp.switch_mlp.down_proj.scales`
    shape: tuple[int, ...]  # of one expert
    stored: mx.Dtype
    dtype: mx.Dtype  # in memory
    places: Sequence[tuple[OpenFile, int]] = ()  # by expert: file, first byte

    @staticmethod
    def described(
        checkpoint: Checkpoint, name: str, names: Sequence[str], dtype: mx.Dtype
    ) -> ExpertStack:
        """The array `name` of the MLX layout as headers describe it, without places.

        Args:
            checkpoint: of the folder.
            names: one stored tensor with all experts [E, ...], or one tensor for each.
            dtype: of floats in memory.

        Raises:
            KimiError: the stored floats do not fit `dtype` without rounding.
        """
        first = checkpoint.tensors[names[0]]
        stored = DTYPES[first.dtype]
        is_float = mx.issubdtype(stored, mx.floating)
        if is_float and dtype not in (stored, mx.float32):
            raise KimiError(
                f"{first.file}: {names[0]} is {first.dtype} and the model computes in "
                f"{str(dtype).removeprefix('mlx.core.')}; convert it before it is streamed"
            )
        shape = first.shape[1:] if len(names) == 1 else first.shape
        return ExpertStack(name, shape, stored, dtype if is_float else stored)

    @property
    def nbytes(self) -> int:
        """Of one expert in memory."""
        return prod(self.shape) * self.dtype.size

    @property
    def reading_bytes(self) -> int:
        """What `read` takes meanwhile: what is stored, and what it becomes, twice."""
        if self.stored == self.dtype:
            return 0
        return prod(self.shape) * self.stored.size + 2 * self.nbytes

    def read(self, expert: int, into: Bytes) -> int:
        """Fill `into` [nbytes] with one expert's array; returns the bytes read."""
        file, offset = self.places[expert]
        if self.stored == self.dtype:
            file.read(offset, into)
            return into.nbytes
        raw = np.empty(prod(self.shape) * self.stored.size, np.uint8)
        file.read(offset, raw)
        into.view(np.float32)[:] = _widened(raw, self.stored)
        return raw.nbytes


def _widened(raw: Bytes, stored: mx.Dtype) -> npt.NDArray[np.float32]:
    if stored == mx.float16:
        return raw.view(np.float16).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)  # bfloat16


class ExpertFiles:
    """The open files of a folder that hold routed experts."""

    def __init__(self) -> None:
        # (Not the checkpoint: it would keep the arrays that it has read in memory.)
        self._files: dict[str, OpenFile] = {}

    def stack(
        self, checkpoint: Checkpoint, name: str, names: Sequence[str], dtype: mx.Dtype
    ) -> ExpertStack:
        """As `ExpertStack.described`, with its places."""
        stack = ExpertStack.described(checkpoint, name, names, dtype)
        places = [self._place(checkpoint, n) for n in names]
        if len(names) == 1:
            (file, offset), count = places[0], checkpoint.tensors[names[0]].shape[0]
            size = prod(stack.shape) * stack.stored.size
            places = [(file, offset + expert * size) for expert in range(count)]
        return replace(stack, places=places)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _place(self, checkpoint: Checkpoint, name: str) -> tuple[OpenFile, int]:
        file = checkpoint.tensors[name].file
        if file not in self._files:
            self._files[file] = checkpoint.open(file, "the model is in use")
        return self._files[file], checkpoint.place(name)
