"""What the routed experts of many tokens do, counted by the emulator: our forms, and MLX's own.

Counting is at the 48B's width, with the rows of a matrix that one threadgroup has: what it does for
some tokens of one expert, its turn, is the same for all rows. A layer is then the sum of the turns
that some routing makes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np
from metal_emulator import COUNTS, metal_kernel
from metal_emulator.unit import library_unit

from benchmarks.kernel_counts import (
    BITS,
    GROUP,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    Work,
    measure,
    needless,
    quantized,
    work,
)
from mlx_kimi.metal_kernels.experts import SwiGLUWeights
from mlx_kimi.metal_kernels.kernel import Kernel, use_backend
from mlx_kimi.metal_kernels.sorted_experts import (
    VECTORS_TOKENS,
    expert_order,
    sorted_down,
    sorted_gate_up,
)
from mlx_kimi.metal_kernels.tuning import ExpertForm

E = 256  # experts of Kimi-Linear-48B-A3B
Which = Literal["gate_up", "down"]
WHICH: tuple[Which, Which] = ("gate_up", "down")
SIZES = {"gate_up": (HIDDEN, INTERMEDIATE), "down": (INTERMEDIATE, HIDDEN)}  # columns, rows
MATRICES = {"gate_up": 2, "down": 1}
PACKED = BITS / 8 + 2 * 2 / GROUP  # bytes of a weight, with scales and biases of 16 bits
INCLUDE = Path(mx.__file__).with_name("include")
KERNELS = "mlx/backend/metal/kernels/"
HEADERS = ("utils.h", "quantized_utils.h", "steel/utils.h", "steel/gemm/gemm.h", "quantized.h")


class Launch(NamedTuple):
    kernel: str
    work: Work


class Tile(NamedTuple):
    """Of MLX's product: rows of x, rows of the matrix, and its simdgroups along each."""

    BM: int
    BN: int
    WM: int
    WN: int


SHIPPED = Tile(16, 32, 1, 2)  # what 0.32.4 runs on M1 to M4
WIDE = Tile(32, 64, 2, 2)  # in pull request 3918, which says 32 x 64, and not how many simdgroups


# ------------------------------------------------------------------------------------------ routing
def routed(T: int, seed: int = 0) -> np.ndarray:
    """How many of T tokens each expert has, where a token chooses 8 of 256, all alike: [256]."""
    chosen = np.random.default_rng(seed).random((T, E)).argsort(axis=1)[:, :TOP_K]
    return np.bincount(chosen.reshape(-1), minlength=E)


def turns_of(tokens: np.ndarray, most: int) -> list[int]:
    """The tokens of each turn, of up to `most` of one expert."""
    return [min(most, n - at) for n in tokens.tolist() for at in range(0, n, most)]


def times(factor: float, given: Work) -> Work:
    return {key: factor * x for key, x in given.items()}


def total(*given: Work) -> Work:
    return {key: sum(x[key] for x in given) for key in given[0]}


def without(given: Work, spared: Work) -> Work:
    return {key: x - spared.get(key, 0) for key, x in given.items()}


def memory(nbytes: float) -> Work:
    """A launch that moves so many bytes and does nothing else, 8 of them a thread."""
    threads = nbytes / 8
    none = dict.fromkeys(COUNTS, 0.0)
    return none | {
        "array_bytes": nbytes,
        "threadgroups": threads / 256,
        "simdgroups": threads / 32,
    }


# --------------------------------------------------------------------------------------------- ours
def count_turns(run: Callable[[], Any], turns: int) -> Work:
    """What the one launch of `run` does with so many turns: it has more, for any routing."""
    found = []

    def ours(kernel: Kernel) -> Callable[..., list[mx.array]]:
        texts = (kernel.name, kernel.inputs, kernel.outputs, kernel.source, kernel.header)
        emulated = metal_kernel(*texts, schedules=(0,))

        def launch(*, grid: tuple[int, int, int], **how: Any) -> list[mx.array]:
            grid = (*grid[:2], turns)
            outputs = emulated(grid=grid, **how)
            found.append(work(emulated.counts, outputs, grid=grid, **how))
            return outputs

        return launch

    with use_backend(ours):
        run()
    (one,) = found
    return one


@cache
def our_turn(which: Which, form: ExpertForm, tokens: int) -> Work:
    """One turn over a whole matrix (gate_up: over both), without what is spared.

    0 tokens: a turn beyond the last, which finds that there is none.
    """
    if tokens == 0:
        return without(_our_turns(which, form, 1, 2), _our_turns(which, form, 1, 1))
    return _our_turns(which, form, tokens, 1)


@cache
def _our_turns(which: Which, form: ExpertForm, tokens: int, turns: int) -> Work:
    rows = (64 if which == "gate_up" else 128) if form.tiles else 32  # of a threadgroup, or more
    columns, all_rows = SIZES[which]
    matrix = quantized(1, rows, columns)
    weights = SwiGLUWeights(matrix, matrix, matrix)  # (a launch knows its own only)
    x, starts = mx.ones((tokens, columns), mx.bfloat16), mx.array([0] + [tokens] * E, mx.int32)
    order = mx.arange(tokens).astype(mx.int32)

    def run() -> None:
        if which == "gate_up":
            sorted_gate_up(x, order, starts, 1, weights, None, form)
        else:
            sorted_down(x, starts, tokens, weights, None, form)

    counted = count_turns(run, turns)
    if not form.tiles:
        # Of 8 products of a lane, which are added up; two or all four tokens are multiplied.
        products = (2 if tokens <= 2 else 4) * rows * columns * MATRICES[which]
        counted = without(counted, needless(products))
    return times(all_rows / rows, counted | {"array_bytes": 0})


def our_product(which: Which, form: ExpertForm, tokens: np.ndarray) -> Work:
    """The whole launch, for so many tokens of each expert."""
    most = 8 * form.tiles or VECTORS_TOKENS
    given = turns_of(tokens, most)
    pairs = int(tokens.sum())
    # Tokens beyond the last are the last again: the turn depends on tiles of 8 tokens, or on pairs.
    step = 8 if form.tiles else 2
    full = [min(most, ceil(n / step) * step) for n in given]
    parts = [times(full.count(n), our_turn(which, form, n)) for n in sorted(set(full))]
    beyond = min(pairs, ceil(pairs / most) + E - 1) - len(given)
    done = total(*parts, times(beyond, our_turn(which, form, 0)))
    sums = total(*parts)
    weights = (tokens > 0).sum() * MATRICES[which] * HIDDEN * INTERMEDIATE * PACKED
    return done | {
        "threadgroups": sums["threadgroups"],
        "simdgroups": sums["simdgroups"],
        "array_bytes": float(weights + pairs * (HIDDEN + INTERMEDIATE) * 2),
    }


@cache
def our_order() -> tuple[Work, Work]:
    """Of one expert: without pairs, and more for each token."""
    some = 8

    def run(T: int) -> None:
        expert_order(mx.arange(T * TOP_K).reshape(T, TOP_K).astype(mx.int32) % some, some)

    (counted,) = measure(run, (64, 128), heads=some)
    return counted.fixed, counted.each


def ours(form: ExpertForm, tokens: np.ndarray) -> list[Launch]:
    """Launches of the routed experts of a layer. The router and the shared expert are left out."""
    pairs = int(tokens.sum())
    T = pairs // TOP_K
    fixed, each = our_order()
    order = times(E, total(fixed, times(T, each))) | {"array_bytes": 3.0 * 4 * pairs}
    return [
        Launch("expert_order", order),
        Launch(f"expert_{form.kernels}_gate_up", our_product("gate_up", form, tokens)),
        Launch(f"expert_{form.kernels}_down", our_product("down", form, tokens)),
        Launch("expert_combine", memory((pairs + T) * HIDDEN * 2)),
    ]


# -------------------------------------------------------------------------------------------- MLX's
@cache
def mlx_text(kernel: str) -> tuple[str, str]:
    """MLX's headers as one text, and the body of a kernel in them."""
    source = "".join(f'#include "{KERNELS}{header}"\n' for header in HEADERS)
    header = library_unit(source, [kernel], [INCLUDE]).text
    constant = r"extern (?:const )?constant bool (align_\w) \[\[function_constant\(\d+\)\]\]"
    header, found = re.subn(constant, r"const constant bool \1 = true", header)
    assert found == 3, "columns and rows of the 48B are multiples of every tile"
    text = (INCLUDE / KERNELS / "quantized.h").read_text()
    start = text.index("{\n", text.index(f"void {kernel}(")) + 1
    body = text[start : text.index("\n}\n", start)]
    places = {
        "uint3 tid": "threadgroup_position_in_grid",
        "uint lid": "thread_index_in_threadgroup",
        "uint simd_gid": "simdgroup_index_in_threadgroup",
        "uint simd_group_id": "simdgroup_index_in_threadgroup",
        "uint simd_lid": "thread_index_in_simdgroup",
        "uint simd_lane_id": "thread_index_in_simdgroup",
    }
    named = (each for each in places if re.search(rf"\b{each.split()[1]}\b", body))
    return header, "".join(f"const {each} = {places[each]};\n" for each in named) + body


def run_mlx(
    kernel: str,
    inputs: dict[str, Any],
    template: dict[str, Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    shape: tuple[int, ...],
) -> tuple[mx.array, Work]:
    """y of this shape, and what the launch did."""
    header, body = mlx_text(kernel)
    if kernel == "affine_qmm_t":  # `batched` is false, and what that needs is not given
        body = re.sub(r"if \(batched\) \{.*?\n  \}\n", "", body, flags=re.DOTALL)
    emulated = metal_kernel(kernel, list(inputs), ["y"], body, header, schedules=(0,))
    how: dict[str, Any] = {
        "inputs": list(inputs.values()),
        "grid": grid,
        "threadgroup": threadgroup,
    }
    (y,) = emulated(
        **how,
        template=[*template.items(), ("group_size", GROUP), ("bits", BITS)],
        output_shapes=[shape],
        output_dtypes=[template["T"]],
    )
    return y, work(emulated.counts, [y], **how)


Stack = tuple[mx.array, mx.array, mx.array]  # packed weights, scales, biases: [E, N, ...]


def mlx_grouped(
    x: mx.array, stack: Stack, starts: mx.array, tile: Tile, tiles: int
) -> tuple[mx.array, Work]:
    """x [rows, K], sorted by expert, times the matrices of their experts, in so many row tiles."""
    (rows, K), N = x.shape, stack[1].shape[1]
    given = dict(zip(("w", "scales", "biases"), stack, strict=True))
    sizes = {"M": rows, "N": N, "K": K, "num_groups": starts.size}
    return run_mlx(
        "affine_gather_qmm_rhs",
        {"x": x, **given, "offsets": starts, **sizes},
        {"T": x.dtype, **tile._asdict(), "BK": 32, "transpose": True},
        (32 * (N // tile.BN), tile.WN * tiles, tile.WM),
        (32, tile.WN, tile.WM),
        (rows, N),
    )


def mlx_vectors(x: mx.array, stack: Stack, experts: mx.array) -> tuple[mx.array, Work]:
    """Each row of x [rows, 1, K] times the matrix of its expert, one after another."""
    (rows, _, K), N = x.shape, stack[1].shape[1]
    fast = N % 8 == 0 and K % 512 == 0  # so MLX chooses: 1024 columns are fast, 2304 are not
    given = dict(zip(("w", "scales", "biases"), stack, strict=True))
    inputs = {
        **given,
        "x": x,
        "lhs_indices": mx.arange(rows).astype(mx.uint32),
        "rhs_indices": experts.astype(mx.uint32),
        "in_vec_size": K,
        "out_vec_size": N,
        "x_batch_ndims": 1,
        "w_batch_ndims": 1,
        "s_strides": mx.array([N * K // GROUP], mx.int64),
        "b_strides": mx.array([N * K // GROUP], mx.int64),
        "batch_ndims": 1,
        "batch_shape": mx.array([rows], mx.int32),
        "lhs_strides": mx.array([1], mx.int64),
        "rhs_strides": mx.array([1], mx.int64),
    }
    name = "affine_gather_qmv_fast" if fast else "affine_gather_qmv"
    return run_mlx(name, inputs, {"T": x.dtype}, (32, 2 * (N // 8), rows), (32, 2, 1), (rows, 1, N))


def mlx_dense(x: mx.array, stack: Stack) -> tuple[mx.array, Work]:
    """x [rows, K] times one matrix, in tiles of 32 x 32."""
    (rows, K), N = x.shape, stack[1].shape[0]
    given = dict(zip(("w", "scales", "biases"), stack, strict=True))
    return run_mlx(
        "affine_qmm_t",
        {**given, "x": x, "K": K, "N": N, "M": rows},
        {"T": x.dtype, "aligned_N": True, "BM": 32, "BK": 32, "BN": 32},
        (32 * (N // 32), 2 * ceil(rows / 32), 2),
        (32, 2, 2),
        (rows, N),
    )


@cache
def grouped_turn(which: Which, tile: Tile, rows: int, dtype: mx.Dtype = mx.bfloat16) -> Work:
    """One row tile over a whole matrix, without what is spared; 0 rows: a tile beyond the last."""
    if rows == 0:
        one, both = (_grouped_tiles(which, tile, 1, n, dtype) for n in (1, 2))
        return without(both, one)
    if 1 < rows < tile.BM - 1:  # what is read grows with each row
        share = (rows - 1) / (tile.BM - 2)
        first, last = (grouped_turn(which, tile, n, dtype) for n in (1, tile.BM - 1))
        return total(times(1 - share, first), times(share, last))
    return _grouped_tiles(which, tile, rows, 1, dtype)


@cache
def _grouped_tiles(which: Which, tile: Tile, rows: int, tiles: int, dtype: mx.Dtype) -> Work:
    columns, all_rows = SIZES[which]
    x, starts = mx.ones((rows, columns), dtype), mx.array([0] + [rows] * (E - 1), mx.int32)
    _, counted = mlx_grouped(x, stack_of_one(tile.BN, columns, dtype), starts, tile, tiles)
    fused = needless(tile.BN * columns)  # a weight times its scale, to which its bias is added
    counted = without(counted, fused)
    return times(all_rows / tile.BN, counted | {"array_bytes": 0})


@cache
def vector_row(which: Which) -> Work:
    """One row of x times a whole matrix."""
    columns, all_rows = SIZES[which]
    rows, N = 8, 8
    x = mx.ones((rows, 1, columns), mx.bfloat16)
    _, counted = mlx_vectors(x, stack_of_one(N, columns), mx.zeros((rows,)))
    # Of 4 products, which are added up, all but the first; of a lane's 8 or 16 columns the bias.
    lane = 16 if which == "down" else 8
    fused = needless(rows * N * columns * (3 / 4 + 1 / lane))
    counted = without(counted, fused)
    return times(all_rows / N / rows, counted | {"array_bytes": 0})


@cache
def dense_turn(which: Which, dtype: mx.Dtype = mx.bfloat16) -> Work:
    """32 rows of x times one whole matrix."""
    columns, all_rows = SIZES[which]
    packed, scales, biases = (each[0] for each in stack_of_one(32, columns, dtype))
    _, counted = mlx_dense(mx.ones((32, columns), dtype), (packed, scales, biases))
    fused = needless(32 * columns)
    counted = without(counted, fused)
    return times(all_rows / 32, counted | {"array_bytes": 0})


def stack_of_one(rows: int, columns: int, dtype: mx.Dtype = mx.bfloat16) -> Stack:
    packed, scales, biases = mx.quantize(mx.zeros((1, rows, columns), dtype), GROUP, BITS)
    return packed, scales, biases


def mlx_product(
    which: Which, tile: Tile | None, tokens: np.ndarray, dtype: mx.Dtype = mx.bfloat16
) -> Work:
    """The launch for one matrix, in tiles, or row by row."""
    pairs = int(tokens.sum())
    bytes_ = float((tokens > 0).sum() * HIDDEN * INTERMEDIATE * PACKED)
    bytes_ += pairs * (HIDDEN + INTERMEDIATE) * 2
    if tile is None:
        return times(pairs, vector_row(which)) | {"array_bytes": bytes_}
    given = turns_of(tokens, tile.BM)
    turns = {n: grouped_turn(which, tile, n, dtype) for n in sorted(set(given))}
    sums = total(*(times(given.count(n), turn) for n, turn in turns.items()))
    beyond = min(pairs, ceil(pairs / tile.BM) + E - 1) - len(given)  # as many as ours has at most
    return total(sums, times(beyond, grouped_turn(which, tile, 0, dtype))) | {
        "threadgroups": sums["threadgroups"],
        "simdgroups": sums["simdgroups"],
        "array_bytes": bytes_,
    }


def mlx_layer(tokens: np.ndarray, tile: Tile = SHIPPED) -> list[Launch]:
    """What mlx-lm does for the routed experts of a layer; of all but products, the bytes only."""
    pairs = int(tokens.sum())
    T = pairs // TOP_K
    grouped = pairs / E >= 4  # so MLX chooses
    one, two = (mlx_product(which, tile if grouped else None, tokens) for which in WHICH)
    return [
        Launch("two argsorts", memory(2 * 2 * 4 * pairs)),
        Launch("rows of x", memory((T + pairs) * HIDDEN * 2)),
        Launch("gate", one),
        Launch("up", one),
        Launch("silu(gate) * up", memory(3 * pairs * INTERMEDIATE * 2)),
        Launch("down", two),
        Launch("rows of y", memory(2 * pairs * HIDDEN * 2)),
        Launch("times weights", memory(2 * pairs * HIDDEN * 2)),
        Launch("sum", memory((pairs + T) * HIDDEN * 2)),
    ]
