"""MLX arrays <-> bytes, in the layout that a kernel sees."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np


def as_array(x: Any) -> mx.array:
    """A Python number becomes an array without dimensions, as MLX makes it."""
    if isinstance(x, mx.array):
        return x
    kind = mx.bool_ if isinstance(x, bool) else mx.int32 if isinstance(x, int) else mx.float32
    return mx.array(x, kind)


def to_numpy(x: mx.array) -> np.ndarray:
    """A view of its memory, strides kept; bfloat16 as uint16."""
    buffer: Any = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
    return np.asarray(memoryview(buffer))


def contiguous(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(x.shape)  # which would turn () into (1,)


def memory(x: np.ndarray) -> np.ndarray:
    """The bytes from the first element of x to the last, gaps included."""
    span = sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)) + x.itemsize
    if x.size == 0:
        span = 0
    flat = np.lib.stride_tricks.as_strided(x, (span // x.itemsize,), (x.itemsize,))
    return np.frombuffer(flat.tobytes(), np.uint8)


def from_bytes(data: np.ndarray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bfloat16:
        return mx.array(data.view(np.uint16).reshape(shape)).view(mx.bfloat16)
    name = str(dtype).removeprefix("mlx.core.")
    return mx.array(data.view("bool" if name == "bool_" else name).reshape(shape))


def filled(shape: tuple[int, ...], dtype: mx.Dtype, value: float) -> np.ndarray:
    """The bytes of a full array."""
    return memory(to_numpy(mx.full(shape, value, dtype))).copy()
