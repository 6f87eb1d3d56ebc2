"""MLX's norms, functions, reductions, sorts and copies, at a model's widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kimi.evaluation.mlx_ops.case import Case, Expected, at_random, scale_of, tolerance_of
from mlx_kimi.evaluation.mlx_ops.float64 import Float64, largest_of_rows, numbers, sigmoid
from mlx_kimi.generation.sample import Sampler, Sampling, categorical, uniforms
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.layers import RMSNorm

ROWS = 33  # tokens
FEW, MANY = 1, 300  # tokens of norms, whose kernels go by row
EXACT = 0.0  # copies, orders and integers
# Sums of a whole vocabulary, one after another in float32: 2^-24 of the sum for each of 163,840
# additions, which go up and down at random. A lost or foreign part is larger than a tenth.
LONG_SUMS = 1e-3
DRAWS, CHOICES = 4096, 64
SIGMAS = 6.0  # of how often a token is drawn: once in 10^8 by chance


def function(
    name: str,
    compute: Callable[..., mx.array],
    reference: Callable[..., Any],
    *operands: mx.array,
    tolerance: float | None = None,
    how: str = "",
) -> Case:
    """`compute` of the operands beside `reference`, the same in numpy and float64.

    An error is a share of the value where that is above 1, which no rounding can exceed.
    """
    dtype = operands[0].dtype
    shapes = " and ".join(" x ".join(map(str, x.shape)) for x in operands)
    if tolerance is None:
        tolerance = tolerance_of(dtype, product=False)

    def expected() -> Expected:
        values = np.asarray(reference(*(numbers(x) for x in operands)), np.float64)
        return Expected(values, np.maximum(np.abs(values), 1))

    return Case(name, shapes + how, dtype, partial(compute, *operands), expected, tolerance)


def dtypes_of(model: KimiLinear) -> list[mx.Dtype]:
    """float32, and the model's own."""
    dtype = model.norm.weight.dtype
    return [mx.float32] if dtype == mx.float32 else [mx.float32, dtype]


def over_axis(name: str, axis: int = -1) -> tuple[Callable[..., mx.array], Callable[..., Any]]:
    """The function of this name of MLX, and that of numpy."""
    return partial(getattr(mx, name), axis=axis), partial(getattr(np, name), axis=axis)


# ------------------------------------------------------------------------------------------- norms
def norm_cases(model: KimiLinear) -> Iterator[Case]:
    """rms_norm with each distinct weight's width and dtype, and without weight."""
    dtype = model.norm.weight.dtype
    norms = {m.weight.shape: m for _, m in model.named_modules() if isinstance(m, RMSNorm)}
    for norm in norms.values():
        for rows in (FEW, ROWS, MANY):
            yield _norm(norm.weight, norm.eps, rows, dtype)
    D = model.config.kda_head_dim
    for of in dtypes_of(model):
        yield _norm(None, 1e-6 / D, ROWS, of, width=D)


def _norm(weight: mx.array | None, eps: float, rows: int, dtype: mx.Dtype, width: int = 0) -> Case:
    """Of rows of usual size, of rows that eps decides, and of zeros."""
    width = weight.size if weight is not None else width
    sizes = mx.array([1.0, eps**0.5, 0.0])[mx.arange(rows) % 3][:, None]
    x = (at_random((rows, width), mx.float32) * sizes).astype(dtype)
    mx.eval(x)

    def expected() -> Expected:
        exact = numbers(x)
        y = exact / np.sqrt((exact**2).mean(axis=-1, keepdims=True) + eps)
        values = y if weight is None else y * numbers(weight)
        return Expected(values, scale_of(largest_of_rows(values)))

    what = f"{rows} x {width}{'' if weight is not None else ', no weight'}"
    run = partial(mx.fast.rms_norm, x, weight, eps)
    return Case("rms_norm", what, dtype, run, expected, tolerance_of(dtype, product=False))


# ---------------------------------------------------------------------------------------- elements
def elementwise_cases(model: KimiLinear) -> Iterator[Case]:
    """Of float32 what is computed in float32; of the model's dtype what is computed in that."""
    shape = (ROWS, model.config.hidden_size)
    x, y = (at_random(shape, mx.float32, seed) * 4 for seed in (1, 2))
    far = x * mx.array([1.0, 1.0, 20.0])[mx.arange(shape[0]) % 3][:, None]  # to 300
    size = mx.abs(x) + 1e-30
    mx.eval(x, y, far, size)
    yield function("exp", mx.exp, np.exp, -mx.abs(far))
    yield function("exp", mx.exp, np.exp, x)
    yield function("log", mx.log, np.log, size)
    yield function("sigmoid", mx.sigmoid, sigmoid, far)
    yield function("logaddexp", mx.logaddexp, np.logaddexp, x, y)
    yield function("logaddexp", lambda a: mx.logaddexp(a, 0.0), lambda a: np.logaddexp(a, 0), far)
    yield function("divide", mx.divide, np.divide, x, size + 0.1)
    yield function("floor_divide", lambda a: a // 3, lambda a: a // 3, mx.arange(1000), tolerance=0)
    for dtype in dtypes_of(model):
        a, b = x.astype(dtype), y.astype(dtype)
        mx.eval(a, b)
        yield function("silu", nn.silu, lambda a: a * sigmoid(a), a)
        yield function("add", mx.add, np.add, a, b)
        yield function("subtract", mx.subtract, np.subtract, a, b)
        yield function("multiply", mx.multiply, np.multiply, a, b)
        yield function("multiply", mx.multiply, np.multiply, a, b[:, :1], how=" (broadcast)")
        yield function("negative", mx.negative, np.negative, a, tolerance=EXACT)
        yield function("maximum", mx.maximum, np.maximum, a, b, tolerance=EXACT)
        yield function("where", _larger, np.maximum, a, b, tolerance=EXACT)
        for to in (mx.float32, mx.bfloat16, mx.float16):
            rounded = tolerance_of(to, product=False)
            cast = partial(mx.array.astype, dtype=to)
            how = f" to {to}".replace("mlx.core.", "")
            yield function("astype", cast, np.asarray, a, tolerance=rounded, how=how)
    for name, compare in (
        *(("<", np.less), ("<=", np.less_equal), (">", np.greater), (">=", np.greater_equal)),
        ("==", np.equal),
    ):
        a, b = mx.round(x), mx.round(y)
        yield function(name, getattr(mx, compare.__name__), compare, a, b, tolerance=EXACT)
    yield function("&", _both, lambda a, b: (a > 0) & (b > 0), x, y, tolerance=EXACT)
    yield function("|", _either, lambda a, b: (a > 0) | (b > 0), x, y, tolerance=EXACT)


def _larger(a: mx.array, b: mx.array) -> mx.array:
    return mx.where(a > b, a, b)


def _both(a: mx.array, b: mx.array) -> mx.array:
    return (a > 0) & (b > 0)


def _either(a: mx.array, b: mx.array) -> mx.array:
    return (a > 0) | (b > 0)


# ------------------------------------------------------------------------------ rows become numbers
def reduction_cases(model: KimiLinear) -> Iterator[Case]:
    """Sums, largest elements, softmax: of scores, of a vocabulary, of experts."""
    config = model.config
    for rows, width in ((ROWS, 257), (1, config.vocab_size), (ROWS, config.num_experts)):
        x = at_random((rows, width), mx.float32)
        tolerance = LONG_SUMS if width > 10_000 else None
        yield function("softmax", _softmax, _exact_softmax, x, tolerance=tolerance)
        logsumexp = partial(mx.logsumexp, axis=-1)
        yield function("logsumexp", logsumexp, _exact_logsumexp, x, tolerance=tolerance)
        for name in ("sum", "max"):
            yield function(name, *over_axis(name), x, tolerance=tolerance)
        # (over tokens: the sum of a convolution's taps and of a token's experts)
        over = x.reshape(rows, 1, width)
        yield function("sum", *over_axis("sum", 0), over, how=", over the first")
        p = mx.softmax(x, axis=-1)
        mx.eval(p)
        yield function("cumsum", *over_axis("cumsum"), p, tolerance=tolerance)
        yield function("argmax", *over_axis("argmax"), distinct(rows, width), tolerance=EXACT)


def _softmax(x: mx.array) -> mx.array:
    return mx.softmax(x, axis=-1) * x.shape[-1]  # of usual size 1


def _exact_softmax(x: Float64) -> Float64:
    p = np.exp(x - _exact_logsumexp(x)[..., None])
    return np.asarray(p * x.shape[-1])


def _exact_logsumexp(x: Float64) -> Float64:
    return np.asarray(np.logaddexp.reduce(x, axis=-1))


# ---------------------------------------------------------------------------------------- orders
def distinct(rows: int, width: int) -> mx.array:
    """[rows, width] float32, no two of a row alike."""
    rng = np.random.default_rng(width)
    x = mx.array(np.stack([rng.permutation(width) for _ in range(rows)]).astype(np.float32))
    mx.eval(x)
    return x


def order_cases(model: KimiLinear) -> Iterator[Case]:
    """Sorting, and looking up by index: of experts, of pairs of tokens and experts, of tokens."""
    config = model.config
    pairs = MANY * config.num_experts_per_token
    for rows, width in ((MANY, config.num_experts), (1, pairs), (1, config.vocab_size)):
        x = distinct(rows, width)
        yield function("argsort", *over_axis("argsort"), x, tolerance=EXACT)
        best = mx.argsort(-x, axis=-1)[..., : config.num_experts_per_token]
        mx.eval(best)
        along = partial(mx.take_along_axis, x, best, axis=-1)
        found = partial(np.take_along_axis, indices=np.array(best), axis=-1)
        yield function("take_along_axis", lambda _, of=along: of(), found, x, tolerance=EXACT)
    groups = distinct(ROWS, config.num_experts).reshape(ROWS, config.num_expert_group, -1)
    if groups.shape[-1] > 1:
        yield function("topk", _best_two, _exact_best_two, groups, tolerance=EXACT)
    repeated = mx.array(np.random.default_rng(0).integers(0, config.num_experts, pairs), mx.uint32)
    yield function("argsort", _sorted, np.sort, repeated, tolerance=EXACT, how=", in order")
    yield from _draws(config.vocab_size)
    yield from _choices(config.vocab_size)


def _best_two(x: mx.array) -> mx.array:
    return mx.topk(x, 2, axis=-1).sum(axis=-1)


def _exact_best_two(x: Float64) -> Float64:
    return np.asarray(np.sort(x, axis=-1)[..., -2:].sum(axis=-1))


def _sorted(x: mx.array) -> mx.array:
    return x[mx.argsort(x)]


def _draws(vocab: int) -> Iterator[Case]:
    only = vocab // 2 | 1
    logits = mx.where(mx.arange(vocab) == only, 0.0, -mx.inf)[None]
    highest = mx.full((1, 2), 1 - 2.0**-24)
    mx.eval(logits, highest)
    draw, sure = partial(categorical, u=highest), partial(np.argmax, axis=-1)
    yield function("sampling", draw, sure, logits, tolerance=EXACT, how=", one possible")
    logits = mx.broadcast_to(at_random((CHOICES,), mx.float32), (DRAWS, CHOICES))
    u = mx.array([uniforms(0, position) for position in range(DRAWS)])

    def shares() -> mx.array:
        return (categorical(logits, u)[:, None] == mx.arange(CHOICES)).mean(axis=0)

    def expected() -> Expected:
        p = _exact_softmax(numbers(logits[0])) / CHOICES
        return Expected(p, np.sqrt(p * (1 - p) / DRAWS))

    what = f"{DRAWS} x {CHOICES}, shares in standard deviations"
    yield Case("sampling", what, mx.float32, shares, expected, SIGMAS)


def _choices(vocab: int) -> Iterator[Case]:
    """Rules of sampling that leave one token, the likeliest: whatever is drawn, it is that."""
    logits = distinct(1, vocab) * (10 / vocab)
    mx.eval(logits)
    likeliest, unlikely = (int(find(numbers(logits))) for find in (np.argmax, np.argmin))
    expected = Expected(np.array([likeliest], np.float64), 1.0)
    for rule, sampling in (
        ("temp 0", Sampling(repetition_penalty=1.1, seed=0)),
        ("top-k 1", Sampling(temp=1.0, top_k=1, seed=0)),
        ("top-p 1e-9", Sampling(temp=1.0, top_p=1e-9, seed=0)),
        ("min-p 1", Sampling(temp=1.0, min_p=1.0, seed=0)),
    ):
        sampler, what = Sampler(sampling, [unlikely], vocab), f"1 x {vocab}, {rule}"
        yield Case("sampling", what, mx.float32, partial(sampler, logits), lambda: expected, EXACT)
