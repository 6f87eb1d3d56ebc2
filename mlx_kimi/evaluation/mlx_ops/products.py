"""MLX's products with each distinct matrix and stack of heads of a model; rows of its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_kimi.evaluation.mlx_ops.case import (
    Case,
    Expected,
    at_random,
    between_nan,
    dtype_name,
    scale_of,
    spread,
    tolerance_of,
)
from mlx_kimi.evaluation.mlx_ops.float64 import Float64, largest_of_rows, numbers, weights
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.linear import Linear

ROWS, OUTPUTS = 64, 256  # of a result, that float64 computes
HEAD_ROWS = 16  # of each head
# Rows of x around which MLX changes the kernel: from 2, 6, 10, 12, 18, 32 and 64 rows on on some
# GPU or other; this package at 16 (CPU) and 256 (NVIDIA). The last is a prefill step.
GPU_ROWS = (1, 2, 3, 5, 8, 11, 17, 33, 100, 300, 2048)
CPU_ROWS = (1, 2, 7, 17, 300)
CPU_PRODUCTS = 1 << 26  # multiplications of a case there: a tenth of a second
MOST_RESULTS = 40_000_000  # elements of a result: 80 MB in 16 bits
FEW = 100  # rows that also lie between NaN
EDGE = 8  # rows of NaN on each side
BETWEEN = ", between NaN"
SMALL = 1 << 25  # elements of a matrix that is copied, to lie between NaN
# Matrices that are used in a way of their own; a router's, gate, multiplies float32.
OWN_KIND = ("embed_tokens", "embed_q", "unembed_out", "gate")
Places = npt.NDArray[np.int64]


class Use(NamedTuple):
    """One matrix, and where the model has it first."""

    path: str
    linear: Linear

    @property
    def role(self) -> str:
        return self.path.rsplit(".", 1)[-1]

    @property
    def operands(self) -> str:
        """`self_attn.o_proj 2304 x 4096 in 4 bits`."""
        *stack, out, _ = self.linear.weight.shape
        size = " x ".join(map(str, (*stack, out, self.linear.matrix.columns)))
        q = self.linear.quantization
        if q is None:
            return f"{self.path} {size} in {dtype_name(self.linear.weight.dtype)}"
        mode = "" if q.mode == "affine" else f" ({q.mode})"
        return f"{self.path} {size} in {q.bits} bits{mode}"


def row_counts(products: int, results: int) -> list[int]:
    """Numbers of rows for a product that takes so many multiplications and results a row."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    counts = CPU_ROWS if on_cpu else GPU_ROWS
    most = CPU_PRODUCTS // products if on_cpu else counts[-1]
    return [n for n in counts if n == 1 or n <= min(most, MOST_RESULTS // results)]


def matrices(model: KimiLinear) -> list[Use]:
    """The first of each kind: of one shape, storage and role."""
    found: dict[tuple[object, ...], Use] = {}
    modules = dict(model.named_modules())
    for path in sorted(modules, key=_in_order):
        module = modules[path]
        if isinstance(module, Linear):
            use = Use(path.removesuffix(".parts.0"), module)
            role = use.role if use.role in OWN_KIND else ""
            key = (module.weight.shape, module.weight.dtype, module.quantization, role)
            found.setdefault(key, use)
    return list(found.values())


def _in_order(path: str) -> list[tuple[int, str]]:
    """`layers.9` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def between_nan_linear(linear: Linear, count: int) -> Linear:
    """The same matrix, or stack, with `count` rows or members of NaN before and behind it."""
    parts = (linear.weight, linear.get("scales"), linear.get("biases"))
    weight, scales, biases = (None if p is None else between_nan(p, count) for p in parts)
    assert weight is not None
    return Linear(weight, scales, biases, linear.quantization)


# -------------------------------------------------------------------------------- single matrices
def linear_cases(use: Use, dtype: mx.Dtype) -> Iterator[Case]:
    """x W^T by number of rows of x; of few rows also between NaN, and as a batch of single rows."""
    linear = use.linear
    out, width = linear.out_features, linear.matrix.columns
    outputs = spread(out, OUTPUTS)
    W = weights(linear, outputs)

    def case(x: mx.array, how: str = "", linear: Linear = linear) -> Case:
        rows = x.reshape(-1, width)
        operands = f"{len(rows)} row{'s' * (len(rows) > 1)} times {use.operands}{how}"
        expected = partial(_linear_expected, rows, W, outputs)
        run = partial(_rows_of, linear, x)
        return Case("", operands, dtype, run, expected, tolerance_of(dtype))

    surrounded = between_nan_linear(linear, EDGE) if linear.weight.size <= SMALL else None
    for rows in row_counts(out * width, out):
        x = at_random((1, rows, width), dtype, seed=rows)
        yield case(x)
        if rows <= FEW and surrounded is not None:
            yield case(between_nan(x[0], EDGE)[None], BETWEEN, surrounded)
    yield case(at_random((3, 1, width), dtype), ", one a text")


def _rows_of(linear: Linear, x: mx.array) -> mx.array:
    return linear(x).reshape(-1, linear.out_features)


def _linear_expected(x: mx.array, W: Float64, outputs: Places) -> Expected:
    """x [N, in], and the rows `outputs` of W."""
    rows = spread(len(x), ROWS)
    return Expected(*product(numbers(x, rows), W), np.ix_(rows, outputs))


def product(x: Float64, W: Float64) -> tuple[Float64, Float64]:
    """x [..., N, in] W^T of W [..., out, in], and the size that each result's terms have together.

    That is the root of the sum of their squares, which no cancellation makes small.
    """
    transposed = W.swapaxes(-1, -2)
    return x @ transposed, scale_of(np.sqrt(x**2 @ transposed**2))


# ---------------------------------------------------------------------------------- stacks of heads
def head_cases(use: Use, dtype: mx.Dtype, beside: int) -> Iterator[Case]:
    """embed_q and unembed_out [H, out, in]: rows of each head, and latents that all heads share.

    `beside`: channels of the shared key, which lie behind those that are multiplied.
    """
    linear = use.linear
    H, out, _ = linear.weight.shape
    width = linear.matrix.columns
    # embed_q makes keys of latents, and so multiplies them by W, not by W^T.
    to_latents = use.role == "embed_q"
    shared_width = out if to_latents else width
    W = weights(linear, np.arange(H * out)).reshape(H, out, width)
    from_latents = W.swapaxes(-1, -2) if to_latents else W

    def case(x: mx.array, rows: str, member: Linear, right: Float64) -> Case:
        what = f"{rows} times {use.operands}{'' if member is linear else BETWEEN}"
        run = partial(_of_heads, member if right is W else member.from_outputs, x)
        expected = partial(_heads_expected, x, right)
        return Case("", what, dtype, run, expected, tolerance_of(dtype))

    surrounded = between_nan_linear(linear, 1)
    for rows in row_counts(H * out * width, H * max(out, width)):
        each = at_random((1, rows, H, width + beside), dtype, seed=rows).transpose(0, 2, 1, 3)
        shared = at_random((1, 1, rows, shared_width + beside), dtype, seed=rows)
        for member in (linear, surrounded):
            yield case(each[..., :width], f"{H} x {rows} rows", member, W)
            latents = shared[..., :shared_width]
            yield case(latents, f"{rows} shared rows", member, from_latents)


def _of_heads(multiply: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    return multiply(x)[0]


def _heads_expected(x: mx.array, right: Float64) -> Expected:
    """x [1, H or 1, T, in], right [H, out, in]: a few rows of every head."""
    index = (slice(None), spread(x.shape[2], HEAD_ROWS))
    return Expected(*product(numbers(x[0], index), right), index)


# --------------------------------------------------------------------------------------- look-ups
def embedding_cases(use: Use, dtype: mx.Dtype) -> Iterator[Case]:
    """Rows of a table by their ids: of few tokens, and of a prefill step."""
    table = use.linear
    for count in row_counts(1, table.matrix.columns):
        ids = np.random.default_rng(count).integers(0, table.out_features, count)
        ids[[0, -1]] = table.out_features - 1, 0
        run = partial(_looked_up, table, mx.array(ids, mx.uint32))
        expected = partial(_rows_expected, table, ids)
        what = f"{count} of {use.operands}"
        tolerance = tolerance_of(dtype, product=False)
        yield Case("rows looked up", what, dtype, run, expected, tolerance)


def _looked_up(table: Linear, ids: mx.array) -> mx.array:
    return table.rows(ids[None])[0]


def _rows_expected(table: Linear, ids: Places) -> Expected:
    places = spread(len(ids), ROWS)
    values = weights(table, ids[places], one_by_one=True)
    scale = largest_of_rows(values)  # (code * scale may be larger than a weight)
    return Expected(values, scale_of(scale), (places,))
