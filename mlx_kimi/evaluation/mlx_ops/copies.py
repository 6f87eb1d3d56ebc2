"""MLX's copies: what moves elements, or stores them in 8 bits, as caches and batches do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kimi.evaluation.mlx_ops.case import Case, Expected, at_random, scale_of
from mlx_kimi.evaluation.mlx_ops.float64 import Float64, numbers
from mlx_kimi.evaluation.mlx_ops.functions import EXACT, ROWS, dtypes_of, function
from mlx_kimi.metal_kernels.latents import BITS, GROUP, pack, unpack
from mlx_kimi.model.kimi_linear import KimiLinear


def copy_cases(model: KimiLinear) -> Iterator[Case]:
    """What moves elements: layouts as caches, chunks and batches have them."""
    width = model.config.hidden_size
    places = np.random.default_rng(0).integers(0, ROWS, 100)
    index = mx.array(places)
    for dtype in dtypes_of(model):
        a, b = at_random((2, ROWS, width), dtype, 1), at_random((2, 5, width), dtype, 2)
        yield _copy("concatenate", _joined, _exact_joined, a, b)
        yield _copy("stack", lambda x: mx.stack([x, x], axis=-2), _twice, a)
        yield _copy("pad", partial(_padded, module=mx), partial(_padded, module=np), a)
        yield _copy("contiguous", lambda x: mx.contiguous(_turned(x)), _turned, a)
        yield _copy("contiguous", lambda x: mx.contiguous(x[:, 1::2]), lambda x: x[:, 1::2], a)
        yield _copy("split", lambda x: mx.split(x, [3, 8], axis=1)[1], lambda x: x[:, 3:8], a)
        yield _copy("take", lambda x: x[0][index], lambda x: x[0][places], a)
        yield _copy("broadcast_to", _spread_out, _exact_spread_out, b)
        yield _copy("scatter", partial(_written, index), partial(_exact_written, places), a)
    yield from _latents(model)


def _copy(
    name: str, compute: Callable[..., mx.array], reference: Callable[..., Any], *operands: mx.array
) -> Case:
    return function(name, compute, reference, *operands, tolerance=EXACT)


def _turned(x: Any) -> Any:
    """As the heads of tokens: of MLX a view."""
    return x.reshape(2, ROWS, 2, -1).transpose(0, 2, 1, 3)


def _padded(x: Any, module: Any) -> Any:
    return module.pad(x, [(0, 0), (0, 7), (0, 0)], constant_values=1.0)


def _joined(*x: mx.array) -> mx.array:
    return mx.concatenate(list(x), axis=1)


def _exact_joined(*x: Float64) -> Float64:
    return np.concatenate(x, axis=1)


def _twice(x: Float64) -> Float64:
    return np.stack([x, x], axis=-2)


def _spread_out(x: mx.array) -> mx.array:
    return mx.contiguous(mx.broadcast_to(x[:, None], (x.shape[0], 3, *x.shape[1:])))


def _exact_spread_out(x: Float64) -> Float64:
    return np.broadcast_to(x[:, None], (x.shape[0], 3, *x.shape[1:]))


def _written(index: mx.array, x: mx.array) -> mx.array:
    y = mx.array(x[0])
    y[index] = 1.0
    return y


def _exact_written(places: Any, x: Float64) -> Float64:
    y = x[0].copy()
    y[places] = 1
    return y


def _latents(model: KimiLinear) -> Iterator[Case]:
    """Packed to 8 bits and back: an error is a share of its group's span."""
    width = model.config.latent_width
    x = at_random((1, ROWS, width), mx.float32)

    def expected() -> Expected:
        exact = numbers(x)
        groups = np.pad(exact[0], [(0, 0), (0, -width % GROUP)]).reshape(ROWS, -1, GROUP)
        span = np.repeat(np.ptp(groups, axis=-1), GROUP, axis=-1)[None, :, :width]
        return Expected(exact, scale_of(span))

    def run() -> mx.array:
        return unpack(pack(x), width)

    # Half a step, and as much again where MLX moves the span so that zero has a code.
    tolerance = 1.05 / (2**BITS - 1)
    what = f"{ROWS} x {width} in {BITS} bits"
    yield Case("quantize, dequantize", what, mx.float32, run, expected, tolerance)
