"""MLX's own kernels, from its wheel: Apple's compiler takes them, and so must the lint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx
import mlx.core as mx
import numpy as np
import pytest
from close import assert_close, assert_same_bits
from metal_emulator import LintError, lint_library, review_library
from metal_emulator.reserved import reserved_words
from metal_emulator.translate import without_comments
from test_operations import LANES, A, N, run

INCLUDE = Path(next(iter(mlx.__path__))) / "include"
KERNELS = "mlx/backend/metal/kernels/"


def test_kernels_of_mlx_use_no_reserved_word() -> None:
    files = sorted((INCLUDE / KERNELS).glob("**/*.h"))
    assert len(files) > 50
    for file in files:
        assert not list(reserved_words(without_comments(file.read_text()), file.name))


class Library(NamedTuple):
    """Headers, kernels in them, what stays in memory, how many helpers are not forced inline."""

    headers: list[str]
    kernels: list[str]
    in_memory: list[str]  # HEADER: VARIABLE
    helpers: int  # which are not forced inline


STEEL = ["steel/utils.h", "steel/gemm/gemm.h"]
LIBRARIES = {
    "most": Library(
        [
            "softmax.h", "logsumexp.h", "sdpa_vector.h", "sdpa_blocked.h", "gated_delta_update.h",
            "gemv.h", "scan.h", "sort.h", "binary.h", "copy.h",
            "arange.h", "cross_entropy.h", "hadamard.h", "indexing/gather.h",
            "indexing/gather_front.h",
        ],
        [
            "softmax_single_row<float, float>",
            "softmax_looped<bfloat, float>",
            "logsumexp<float>",
            "logsumexp_looped<bfloat, float>",
            "sdpa_vector<bfloat, 128>",
            "sdpa_vector_2pass_1<bfloat, 128>",
            "sdpa_vector_2pass_1_gqa<bfloat, 128, 128, 8, 4>",
            "sdpa_vector_2pass_2<bfloat, 128>",
            "sdpa_blocked_scale_copy<bfloat>",
            "gated_delta_fused_chunk<bfloat, 128, 128, 16, 32, 8>",
            "gated_delta_seq<bfloat, 128, 128, 16, 32, 0>",
            "gemv<bfloat, 1, 8, 1, 32, 4, 4, false, false>",
            "gemv_t<float, 1, 8, 8, 4, 4, 4, false, true>",
            "contiguous_scan<float, float, CumSum<float>, 4, true, false>",
            "strided_scan<float, float, CumSum<float>, 4, true, false>",
            "block_sort<float, float, false, 256, 4>",
            "binary_vv<complex64_t, complex64_t, Divide>",
            "copy_v<half, bfloat>",
            "arange<float>",
            "cross_entropy<bfloat>",
            "hadamard_n<float, 64, 16, 4>",
            "gather_front<float, int, long, 2>",
        ],
        [
            *(f"sdpa_vector.h: {x}" for x in ("k_reg", "v_reg")),
            *(f"sdpa_vector.h: {x}" for x in ("q", "max_score", "sum_exp_score", "o")),
            "gated_delta_update.h: S_tile",
        ],
        14,
    ),
    "quantized": Library(
        ["quantized_utils.h", *STEEL, "quantized.h", "steel/gemm/kernels/steel_gemm_fused.h"],
        [
            "affine_qmv_fast<bfloat, 64, 4, false>",
            "affine_qmv<bfloat, 64, 4, false>",
            "affine_qmv_quad<bfloat, 64, 4, 128, false>",
            "affine_qvm<bfloat, 64, 4, false>",
            "affine_qmm_t<bfloat, 64, 4, true, false>",
            "affine_gather_qmv_fast<bfloat, 64, 4>",
            "affine_dequantize<bfloat, 64, 4>",
            "gemm<bfloat, 64, 64, 16, 2, 2, false, true, float>",
        ],
        [
            "quantized.h: result",
            *(f"quantized.h: {x}" for x in ("x_thread", "result", "x_thread", "result")),
            *(f"quantized.h: {x}" for x in ("w_local", "result", "loader_w")),
        ],
        11,
    ),
    "fp_quantized": Library(
        ["quantized_utils.h", *STEEL, "fp_quantized.h"],
        ["fp_qmv_fast<bfloat, 32, 4, false>", "fp_qmm_t<bfloat, 32, 4, true, false>"],
        [f"fp_quantized.h: {x}" for x in ("x_thread", "result", "loader_w")],
        11,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_kernels_of_mlx_would_compile(name: str) -> None:
    headers, kernels, in_memory, helpers = LIBRARIES[name]
    source = "".join(f'#include "{KERNELS}{header}"\n' for header in ["utils.h", *headers])
    lint_library(name, source, kernels, folders=[INCLUDE])
    found = review_library(name, source, kernels, folders=[INCLUDE])
    arrays = [each for each in found if each.what.endswith("stays in memory")]
    variables = [f"{x.where.split()[0]}: {x.what.split(chr(39))[1]}" for x in arrays]
    assert variables == in_memory
    rest = {each.what for each in found if each not in arrays}
    assert all("is not forced inline" in what for what in rest)
    assert len(rest) == helpers


BAD = "#pragma once\nfloat twice(float x) { return 2 * x; }\nfloat first(float* p) { return *p; }\n"
GOOD = "#pragma once\nfloat twice(float x) { return 2 * x; }\n"
USE = """#include "helper.h"
#include "helper.h"
constant int rows [[function_constant(0)]];
template <typename T>
[[kernel]] void doubled(
    device T* out [[buffer(30)]], uint i [[thread_position_in_grid]]) {
  T y[8];
  for (int j = 0; j < 8; j++) y[j] = out[j];
  out[i] = twice(y[rows]);
}
"""


def test_a_library_has_the_places_of_its_files(tmp_path: Path) -> None:
    helper = tmp_path / "helper.h"
    how: dict[str, Any] = {"kernels": ["doubled<float>"], "folders": [tmp_path]}
    helper.write_text(GOOD)
    lint_library("mine", USE, **how)
    assert {each.where: each.what for each in review_library("mine", USE, **how)} == {
        "signature": "31 buffers",
        "line 7": "'y', [8 x float], stays in memory",
        "helper.h line 2": "'twice' is not forced inline (METAL_FUNC)",
    }
    with pytest.raises(LintError, match="not forced inline"):
        lint_library("mine", USE, **how, strict=True)
    with pytest.raises(LintError, match="^mine: 32 buffers"):
        lint_library("mine", USE.replace("(30)", "(31)"), **how)
    with pytest.raises(LintError, match="^mine: line 9:.*error: use of undeclared identifier 'z'"):
        lint_library("mine", USE.replace("y[rows]", "z"), **how)
    helper.write_text(BAD)
    with pytest.raises(LintError, match="^mine: helper.h line 3: error: .* address space"):
        lint_library("mine", USE, **how)
    with pytest.raises(FileNotFoundError, match='line 1: #include "helper.h" must be in a folder'):
        lint_library("mine", USE, ["doubled<float>"])
    helper.write_text(GOOD)
    for kernels in ([], ["tripled"]):
        with pytest.raises(ValueError, match="functions of the source but got"):
            lint_library("mine", USE, kernels, folders=[tmp_path])


# ------------------------------------------------- functions of Metal's library that they call, run
FUNCTIONS: dict[str, tuple[str, Callable[[np.ndarray], Any]]] = {
    "fill up": (
        "simd_shuffle_and_fill_up(x, -x, 3)",
        lambda x: np.append(-x[-3:], x[:-3]),
    ),
    "fill down": (
        "simd_shuffle_and_fill_down(x, -x, 3)",
        lambda x: np.append(x[3:], -x[:3]),
    ),
    "quad sum": ("quad_sum(x)", lambda x: x.reshape(8, 4).sum(1).repeat(4)),
    "quad product": ("quad_product(x)", lambda x: x.reshape(8, 4).prod(1).repeat(4)),
    "quad min": ("quad_min(x)", lambda x: x.reshape(8, 4).min(1).repeat(4)),
    "quad max": ("quad_max(x)", lambda x: x.reshape(8, 4).max(1).repeat(4)),
    "ldexp": ("ldexp(x, -3)", lambda x: x / 8),
    "asinh": ("asinh(x)", np.arcsinh),
    "acosh": ("acosh(1 + x * x)", lambda x: np.arccosh(1 + x.astype(np.float64) ** 2)),
    "atanh": ("atanh(x / 4)", lambda x: np.arctanh(x.astype(np.float64) / 4)),
    "array": ("array<float, 2>{x, 3.0f}[0] + make_uniform(1)", lambda x: x + 1),
    "bfloat of half": ("float(static_cast<bfloat>(half(2.5f)))", lambda x: np.full(32, 2.5)),
}


def test_functions() -> None:
    lines = [f"out[{n * N} + i] = {text};" for n, (text, _) in enumerate(FUNCTIONS.values())]
    body = "\n".join(["float x = a[i];", *lines])
    out = run(body, mx.array(A), shape=(len(FUNCTIONS), N))
    for (name, (_, expected)), found in zip(FUNCTIONS.items(), out, strict=True):
        assert_close(name, found, np.concatenate([expected(A[row]) for row in LANES]), 1e-6)


def test_compare_and_exchange_counts_every_thread() -> None:
    body = """int seen = atomic_load_explicit(&out[0], memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(
        &out[0], &seen, seen + 1, memory_order_relaxed, memory_order_relaxed)) {}"""
    how: dict[str, Any] = {"atomic_outputs": True, "dtype": mx.int32, "shape": (1,)}
    assert_same_bits("out", run(body, mx.array(A), init_value=0, **how), [N])
