"""Arrays and packed matrices of MLX as float64 numbers, read without MLX's arithmetic."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_kimi.checkpoint.config import Quantization
from mlx_kimi.model.linear import Linear

Float64 = npt.NDArray[np.float64]

# Magnitudes of the codes 0 to 7 of a 4-bit float; the fourth bit is the sign.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E8M0_BIAS, E4M3_BIAS = 127, 7


def host(x: mx.array, index: Any = ...) -> npt.NDArray[np.generic]:
    """x[index] in numpy, which copies no more than that; bfloat16, which it lacks, as float32."""
    if x.dtype != mx.bfloat16:
        return np.array(np.asarray(x)[index])
    bits = np.asarray(x.view(mx.uint16))[index]
    return (bits.astype(np.uint32) << 16).view(np.float32)


def numbers(x: mx.array, index: Any = ...) -> Float64:
    """x[index] in float64."""
    return host(x, index).astype(np.float64)


def weights(linear: Linear, rows: npt.NDArray[np.int64], one_by_one: bool = False) -> Float64:
    """The rows [N] of W, whose leading axes count as one: -> [N, in].

    `one_by_one` slices them off, which takes longer than MLX's look-up by index but is not it.
    """
    q = linear.quantization

    def stored(name: str) -> npt.NDArray[np.generic] | None:
        array = linear.get(name)
        if array is None:
            return None
        flat = array.reshape(-1, array.shape[-1])
        if one_by_one:
            return np.concatenate([host(flat[row : row + 1]) for row in rows.tolist()])
        return host(flat[mx.array(rows)])

    packed = stored("weight")
    assert packed is not None
    if q is None:
        return packed.astype(np.float64)
    return unpacked(packed, stored("scales"), stored("biases"), q)


def unpacked(
    packed: npt.NDArray[np.generic],
    scales: npt.NDArray[np.generic] | None,
    biases: npt.NDArray[np.generic] | None,
    q: Quantization,
) -> Float64:
    """packed [N, words] uint32, scales and (in affine mode) biases [N, groups] -> [N, in]."""
    assert scales is not None
    groups = (*scales.shape, q.group_size)
    codes = _codes(packed, q.bits).reshape(groups)
    if biases is not None:
        values = codes * scales[..., None].astype(np.float64)
        values += biases[..., None].astype(np.float64)
    elif q.bits == 4:
        signed = np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]
        values = signed * _scale(scales, q)[..., None]
    else:
        values = _e4m3(codes) * _scale(scales, q)[..., None]
    return values.reshape(len(packed), -1)


def _codes(packed: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.uint8]:
    """The codes of `bits` each [N, in]: a stream of bits, the lowest of each byte first."""
    if bits == 8:
        return packed.view(np.uint8)
    if bits == 4:  # (as below, ten times as fast)
        pairs = packed.view(np.uint8)
        return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(packed), -1)
    stream = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little")
    parts = stream.reshape(len(packed), -1, bits)
    codes = np.zeros(parts.shape[:-1], np.uint8)
    for bit in range(bits):
        codes |= parts[..., bit] << np.uint8(bit)
    return codes


def _scale(scales: npt.NDArray[np.generic], q: Quantization) -> Float64:
    """Scales of modes without biases: 8-bit floats, of nvfp4 e4m3, of others powers of two."""
    return _e4m3(scales) if q.mode == "nvfp4" else 2.0 ** (scales.astype(np.float64) - E8M0_BIAS)


def _e4m3(codes: npt.NDArray[np.generic]) -> Float64:
    """8-bit floats of 4 bits exponent and 3 bits fraction."""
    whole = codes.astype(np.int64)
    exponent, fraction = whole >> 3 & 15, (whole & 7) / 8
    size = np.where(
        exponent == 0,
        fraction * 2.0 ** (1 - E4M3_BIAS),
        (1 + fraction) * 2.0 ** (exponent - E4M3_BIAS),
    )
    return np.where(whole & 128, -size, size)


def sigmoid(x: Float64) -> Float64:
    return np.exp(-np.logaddexp(0, -x))


def largest_of_rows(x: Float64) -> Float64:
    """Of each row of [..., n] the largest magnitude, NaN and infinity left out: [..., 1]."""
    return np.where(np.isfinite(x), np.abs(x), 0).max(axis=-1, keepdims=True)
