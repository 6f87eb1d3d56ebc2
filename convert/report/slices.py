"""Slices of a folder's tensors: in float32, or packed where they are quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx

from mlx_kimi.checkpoint.tensors import Tensor
from mlx_kimi.convert.blocks import TensorReader
from mlx_kimi.model.linear import Linear
from mlx_kimi.model.weights import Weights

Arrays = dict[str, mx.array]  # by their names in the MLX layout


def read(reader: TensorReader, tensor: Tensor, first: int = 0, count: int | None = None) -> Arrays:
    """`tensor`, or the `count` members of its first axis from the `first` on.

    Floats become float32 whatever the folder's dtype, so that two folders differ in their weights
    and not in the rounding of activations. Quantized matrices stay packed.

    Args:
        reader: of a folder that is unquantized, in either spelling, or in the MLX layout.

    Raises:
        KimiError: a file cannot be read or ends too early.
    """
    count = tensor.shape[0] if count is None else count
    if f"{tensor.module}.scales" not in reader.checkpoint:
        return {tensor.name: _plain(reader, tensor, first, count)}
    quantization = reader.config.quantization_of(tensor.module)
    assert quantization is not None, tensor.name  # load.check has seen it
    arrays = {}
    for part, shape in quantization.packed(tensor.shape).items():
        member = math.prod(shape[1:])
        name = f"{tensor.module}.{part}"
        array = reader.array(name, first * member, count * member).reshape(count, *shape[1:])
        arrays[name] = _in_float32(array)
    return arrays


def slices(reader: TensorReader, tensor: Tensor, step: int) -> Iterator[tuple[int, Linear]]:
    """Slices of `step` members of a matrix' first axis, each with the number of its first."""
    for first in range(0, tensor.shape[0], step):
        arrays = read(reader, tensor, first, min(step, tensor.shape[0] - first))
        yield first, Weights(arrays, reader.config).linear(tensor.module)


def _plain(reader: TensorReader, tensor: Tensor, first: int, count: int) -> mx.array:
    rows = math.prod(tensor.shape[1:-1])  # of one member
    start, stop = first * rows, (first + count) * rows
    if len(tensor.shape) == 1:
        start, stop = 0, 1  # a vector is one row
    parts = []
    for source in reader.sources(tensor):
        # (A half is one block, which is read whole.)
        skip = 0 if tensor.is_half else max(start - source.first_row, 0)
        for block in reader.blocks(source, skip):
            at = block.first_row
            if at >= stop:
                break
            array = reader.rows(block, reader.read(block))
            parts.append(_in_float32(array[max(start - at, 0) : stop - at]))
            mx.eval(parts[-1])
    return mx.concatenate(parts).reshape(count, *tensor.shape[1:])


def _in_float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
