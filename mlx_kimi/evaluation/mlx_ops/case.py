"""One operation of MLX on the device at hand, beside the same in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_kimi.evaluation.mlx_ops.float64 import Float64, numbers

# Largest error of a sample, as a share of the size that its terms have together. What MLX rounds is
# the output (2^-9, 2^-12 or 2^-25 of up to four such sizes) and, where it makes a quantized matrix
# plain first, each weight: together up to 0.02 in bfloat16, and an eighth of that in float16. In
# float32 the order of up to 10^4 additions counts: 2e-5. A wrong row errs by 1.
TOLERANCES = {mx.bfloat16: 0.05, mx.float16: 0.0125, mx.float32: 1e-4}
# GPUs may multiply float32 as TF32, which has the fraction of float16.
PRODUCTS_ON_GPU = 0.0125
# Primitives of MLX's graph that are matrix products, by the names of their functions.
PRODUCTS = {
    "QuantizedMatmul": "quantized_matmul",
    "GatherQMM": "gather_qmm",
    "GatherMM": "gather_mm",
    "Matmul": "matmul",
}

TOKENS = (1, 37)  # of a step; 37 are two chunks of the delta rule and a part of a third
# Operators round (16 bits, or to TF32) three or four times, one after another.
SEVERAL_ROUNDINGS = 2


class Expected(NamedTuple):
    """What float64 gives for some elements of a result."""

    values: Float64
    scale: Float64 | float  # of each: what an error is measured by
    index: Any = ...  # of the elements, as numpy takes it


class Case(NamedTuple):
    """One operation at one shape."""

    operation: str  # "" for a product: its graph names the operation that the model's code chose
    operands: str
    dtype: mx.Dtype
    run: Callable[[], mx.array]  # makes the graph of the result from operands that exist
    expected: Callable[[], Expected]
    tolerance: float


class Measurement(NamedTuple):
    """How far a case is from float64."""

    what: str  # operation, operands, dtype
    error: float  # the largest; inf where MLX raised an error
    tolerance: float
    raised: str = ""  # MLX's error

    @property
    def is_wrong(self) -> bool:
        return not self.error <= self.tolerance  # (NaN is wrong)

    @property
    def share(self) -> float:
        """Of the tolerance, that the error takes."""
        return self.error / self.tolerance if self.tolerance else self.error

    def __str__(self) -> str:
        if self.raised:
            return f"{self.what}: {self.raised}"
        return f"{self.what}: off by {self.error:.1e}, tolerance {self.tolerance:g}"


def tolerance_of(dtype: mx.Dtype, product: bool = True) -> float:
    """Of results in `dtype`; `product`: float32 products are among what makes them."""
    on_gpu = mx.default_device() != mx.Device(mx.cpu)
    return max(TOLERANCES[dtype], PRODUCTS_ON_GPU if product and on_gpu else 0)


def measure(case: Case) -> Measurement:
    """Run it, and compare."""
    what = ", ".join(filter(None, (case.operation, case.operands, dtype_name(case.dtype))))
    try:
        result = case.run()
        what = what if case.operation else f"{product_of(result)}, {what}"
        mx.eval(result)
    except (ValueError, RuntimeError) as error:  # MLX's own
        return Measurement(what, np.inf, case.tolerance, str(error).splitlines()[0])
    expected = case.expected()
    values = numbers(result, expected.index)
    if values.shape != expected.values.shape:
        raised = f"has shape {values.shape}, expected {expected.values.shape}"
        return Measurement(what, np.inf, case.tolerance, raised)
    with np.errstate(invalid="ignore"):  # (inf - inf of damaged weights)
        errors = np.abs(values - expected.values) / expected.scale
    # NaN of damaged weights is no fault of MLX; another part of `check` finds them.
    errors[~np.isfinite(expected.values) & ~np.isfinite(values)] = 0
    return Measurement(what, float(errors.max()), case.tolerance)


def scale_of(terms: Float64) -> Float64:
    """`terms`, but never so small that the rounding of the largest counts as an error; 1 for 0."""
    largest = float(terms[np.isfinite(terms)].max(initial=0))
    return np.maximum(terms, 1e-6 * largest or 1.0)


def product_of(result: mx.array) -> str:
    """The matrix product that a graph ends in."""
    found = [PRODUCTS[name] for name in primitives(result) if name in PRODUCTS]
    return found[-1] if found else "no product"


def primitives(*results: mx.array) -> list[str]:
    """The operations of a graph that is not evaluated yet, as MLX names them."""
    text = StringIO()
    mx.export_to_dot(text, *results)
    return re.findall(r'label ="([^"]+)", shape=rectangle\]', text.getvalue())


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def at_random(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 0) -> mx.array:
    """Normal numbers that are there: not part of any graph."""
    x = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    mx.eval(x)
    return x


def between_nan(x: mx.array, count: int) -> mx.array:
    """x with `count` NaN before and after it along its first axis, where they lie in memory.

    uint8, the scales of some modes of quantization, have NaN in all bits.
    """
    if x.dtype == mx.uint32:  # codes: any
        edge = mx.full((count, *x.shape[1:]), 0x5A5A5A5A, x.dtype)
    else:
        nan = 255 if x.dtype == mx.uint8 else mx.nan
        edge = mx.full((count, *x.shape[1:]), nan, x.dtype)
    whole = mx.concatenate([edge, x, edge])
    mx.eval(whole)
    inner = whole[count : count + x.shape[0]]
    mx.eval(inner)
    return inner


def spread(count: int, most: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Up to `most` of `count` places, in order: all, or the first, the last and others at random,
    odd and even ones."""
    if count <= most:
        return np.arange(count)
    rng = np.random.default_rng(seed)
    odd = np.arange(1, count, 2)
    chosen = {0, count - 1, *rng.choice(odd, min(len(odd), most // 2 - 1), replace=False).tolist()}
    rest = np.setdiff1d(np.arange(count), list(chosen))
    chosen |= set(rng.choice(rest, most - len(chosen), replace=False).tolist())
    return np.array(sorted(chosen))


def operator_case(
    name: str,
    operands: str,
    dtype: mx.Dtype,
    run: Callable[[], mx.array],
    reference: Callable[[], Float64],
    roundings: int = 1,
) -> Case:
    """An error is measured by the result, or by the rms of all results if that is more."""

    def expected() -> Expected:
        values = reference()
        finite = values[np.isfinite(values)]
        rms = float(np.sqrt((finite**2).mean())) or 1.0
        return Expected(values, np.maximum(np.abs(values), rms))

    return Case(name, operands, dtype, run, expected, roundings * tolerance_of(dtype))


def result_of(compute: Callable[..., Any], given: list[Any], index: int) -> mx.array:
    result: mx.array = compute(*given)[index]
    return result
