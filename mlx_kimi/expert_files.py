"""Where each routed expert's bytes lie in a folder's files, and how they get into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_kimi.checkpoint import DTYPES, Checkpoint, Stored, data_start
from mlx_kimi.errors import KimiError

Bytes = npt.NDArray[np.uint8]


class OpenFile:
    """A safetensors file that stays open, and must stay what it was.

    Attributes:
        data: the byte after its header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._was = self._is()
        self.data = data_start(path)

    def read(self, offset: int, into: Bytes) -> None:
        """Fill `into` [bytes] from `offset` on.

        Raises:
            KimiError: the file cannot be read, or is no longer the one that was opened.
        """
        try:
            self._check()
            done = 0
            while done < into.nbytes:
                count = os.preadv(self._descriptor, [into[done:].data], offset + done)
                if not count:
                    raise KimiError(
                        f"{self.path}: ends at byte {offset + done}, within weights that are in use"
                    )
                done += count
            self._check()
        except OSError as error:
            raise KimiError(
                f"{self.path}: cannot be read while the model is in use: {error.strerror}"
            ) from None

    def close(self) -> None:
        os.close(self._descriptor)

    def _check(self) -> None:
        now = self._is()
        if now != self._was:
            raise KimiError(f"{self.path}: was {_change(self._was, now)} while the model is in use")

    def _is(self) -> tuple[bool, int, int]:
        """Whether the file has a name, its size, and when it was written."""
        stat = os.fstat(self._descriptor)
        return stat.st_nlink > 0, stat.st_size, stat.st_mtime_ns


def _change(was: tuple[bool, int, int], now: tuple[bool, int, int]) -> str:
    if not now[0]:
        return "removed"
    return f"cut to {now[1]:,} of {was[1]:,} bytes" if now[1] < was[1] else "written to"


@dataclass(frozen=True)
class Part:
    """One array of every expert of a layer, such as the scales of `down_proj`."""

    name: str  # in the MLX layout: `model.layers.3.mlp.switch_mlp.down_proj.scales`
    shape: tuple[int, ...]  # of one expert
    stored: mx.Dtype
    dtype: mx.Dtype  # in memory
    places: Sequence[tuple[OpenFile, int]]  # by expert: file, first byte

    @property
    def nbytes(self) -> int:
        """Of one expert in memory."""
        return prod(self.shape) * self.dtype.size

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

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder, self._tensors = checkpoint.folder, checkpoint.tensors
        self._files: dict[str, OpenFile] = {}

    def part(self, name: str, names: Sequence[str], dtype: mx.Dtype) -> Part:
        """The array `name` of the MLX layout.

        Args:
            names: one stored tensor with all experts [E, ...], or one tensor for each.
            dtype: of floats in memory.

        Raises:
            KimiError: the stored floats do not fit `dtype` without rounding.
        """
        places = [self._place(self._tensors[n]) for n in names]
        first = self._tensors[names[0]]
        stored = DTYPES[first.dtype]
        shape = first.shape
        if len(names) == 1:
            (file, offset), (count, *rest) = places[0], shape
            shape, size = tuple(rest), prod(rest) * stored.size
            places = [(file, offset + expert * size) for expert in range(count)]
        is_float = mx.issubdtype(stored, mx.floating)
        if is_float and dtype not in (stored, mx.float32):
            raise KimiError(
                f"{first.file}: {names[0]} is {first.dtype} and the model computes in "
                f"{str(dtype).removeprefix('mlx.core.')}; convert it before it is streamed"
            )
        return Part(name, shape, stored, dtype if is_float else stored, places)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _place(self, stored: Stored) -> tuple[OpenFile, int]:
        if stored.file not in self._files:
            self._files[stored.file] = OpenFile(self._folder / stored.file)
        file = self._files[stored.file]
        return file, file.data + stored.offset
