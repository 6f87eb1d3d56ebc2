"""MLX's gathered products with stacks of experts, as layers call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_kimi.evaluation.mlx_ops.case import (
    Case,
    Expected,
    at_random,
    scale_of,
    spread,
    tolerance_of,
)
from mlx_kimi.evaluation.mlx_ops.float64 import numbers, weights
from mlx_kimi.evaluation.mlx_ops.products import (
    BETWEEN,
    FEW,
    OUTPUTS,
    ROWS,
    Places,
    Use,
    between_nan_linear,
    linear_cases,
    product,
    row_counts,
)
from mlx_kimi.metal_kernels.tuning import tuning
from mlx_kimi.model.linear import Linear

FEW_OUTPUTS = 32  # of each row, where every expert has one
BLOCK = 8  # rows whose experts' weights float64 has at a time
FEW_EXPERTS = 4  # that lie between NaN


def expert_cases(use: Use, dtype: mx.Dtype, top_k: int, present: Places) -> Iterator[Case]:
    """Rows times the experts that their tokens chose, sorted by expert where the model sorts them.

    `present`: the members of the stack that hold an expert.
    """
    linear = use.linear
    results = top_k * linear.out_features
    sort_from = tuning().sort_from
    fewest_sorted = -(-sort_from // top_k)  # (always: with more, plain matrices may take over)
    counts = {*row_counts(results * linear.matrix.columns, results), fewest_sorted}
    for tokens in sorted(counts):
        experts = _chosen(tokens, top_k, present)
        yield from _gathered(use.operands, dtype, linear, experts)
    few = present[:: max(1, len(present) // FEW_EXPERTS)][:FEW_EXPERTS]
    surrounded = between_nan_linear(_members(linear, few), 1)
    for tokens in sorted(counts):
        if tokens <= FEW:
            experts = _chosen(tokens, min(top_k, len(few)), np.arange(len(few)))
            what = f"{use.operands} ({len(few)} of them{BETWEEN})"
            yield from _gathered(what, dtype, surrounded, experts)


def member_cases(use: Use, dtype: mx.Dtype, present: Places) -> Iterator[Case]:
    """One expert where it lies in the stack, as with experts in files."""
    for index in sorted({int(present[0]), int(present[-1])}):
        path = f"{use.path}[{index}]"
        yield from linear_cases(Use(path, use.linear.member(index)), dtype)


def _members(linear: Linear, indices: Places) -> Linear:
    parts = (linear.weight, linear.get("scales"), linear.get("biases"))
    weight, scales, biases = (None if p is None else p[mx.array(indices)] for p in parts)
    assert weight is not None
    return Linear(weight, scales, biases, linear.quantization)


def _chosen(tokens: int, top_k: int, present: Places) -> Places:
    """Experts [tokens, k]: the first, the last, and all before any comes again."""
    rng = np.random.default_rng(tokens)
    inner = rng.permutation(present[1:-1])
    first = np.concatenate([present[:1], present[-1:], inner])[: len(present)]
    more = [rng.permutation(present) for _ in range(-(-tokens * top_k // len(present)))]
    return np.concatenate([first, *more])[: tokens * top_k].reshape(tokens, top_k)


def _gathered(what: str, dtype: mx.Dtype, linear: Linear, experts: Places) -> Iterator[Case]:
    """The products of gate and up, which repeat a token's row, and of down, which has one each."""
    (tokens, k), width = experts.shape, linear.matrix.columns
    flat = experts.reshape(-1)
    is_sorted = flat.size >= tuning().sort_from
    order = np.argsort(flat, kind="stable") if is_sorted else np.arange(flat.size)
    of_tokens = at_random((tokens, width), dtype, seed=tokens)
    of_pairs = at_random((flat.size, width), dtype, seed=tokens)
    index = mx.array(flat[order] if is_sorted else experts, mx.uint32)
    if is_sorted:
        places = mx.array(order // k)
        forms = [(lambda: of_tokens[places][:, None], order // k, of_tokens)]
        # (computed, as what down multiplies: its strides are not those of a view)
        forms += [(lambda: of_pairs[:, None] + 0, np.arange(flat.size), of_pairs)]
    else:
        forms = [(lambda: of_tokens[:, None, None], order // k, of_tokens)]
        forms += [(lambda: of_pairs.reshape(tokens, k, 1, width), order, of_pairs)]
    for make, rows_of, x in forms:
        each = f"{k} a token" if x is of_tokens else "no two alike"
        operands = f"{flat.size} {'sorted ' * is_sorted}rows, {each}, times {what}"
        run = partial(_gather, linear, make, index, is_sorted)
        expected = partial(_gather_expected, linear, x, rows_of, flat[order])
        yield Case("", operands, dtype, run, expected, tolerance_of(dtype))


def _gather(
    linear: Linear, make: Callable[[], mx.array], experts: mx.array, is_sorted: bool
) -> mx.array:
    return linear.gather(make(), experts, is_sorted).reshape(-1, linear.out_features)


def _gather_expected(linear: Linear, x: mx.array, rows_of: Places, experts: Places) -> Expected:
    """Result row i is x[rows_of[i]] times member experts[i]; rows of every expert are taken."""
    out = linear.out_features
    firsts = np.unique(experts, return_index=True)[1]
    rows = np.union1d(spread(len(experts), ROWS), firsts)
    count = min(out, OUTPUTS if len(rows) <= ROWS else FEW_OUTPUTS)
    outputs = np.random.default_rng(0).integers(0, out, (len(rows), count))
    outputs[:, 0], outputs[:, -1] = 0, out - 1
    values, scale = np.empty(outputs.shape), np.empty(outputs.shape)
    for start in range(0, len(rows), BLOCK):
        some = slice(start, start + BLOCK)
        which = experts[rows[some], None] * out + outputs[some]
        W = weights(linear, which.reshape(-1)).reshape(*which.shape, -1)
        given = numbers(x, rows_of[rows[some]])[:, None]
        products = product(given, W)
        values[some], scale[some] = (part[:, 0] for part in products)
    return Expected(values, scale_of(scale), (rows[:, None], outputs))
