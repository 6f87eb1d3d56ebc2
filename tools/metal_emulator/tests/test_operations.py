"""Clean kernels give the right results without a finding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from close import assert_close, assert_same_bits
from metal_emulator import metal_kernel

START = "uint i = thread_position_in_grid.x; uint lane = thread_index_in_simdgroup;\n"
N = 64
A = np.random.default_rng(3).standard_normal(N).astype(np.float32)
LANES = np.arange(N).reshape(-1, 32)  # of each simdgroup, the elements


def run(body: str, *inputs: Any, grid: int = N, threadgroup: int = N, **how: Any) -> Any:
    """The output of a kernel with the inputs a, b, c, ...; 64 of float32 unless said otherwise."""
    options = {
        key: how.pop(key)
        for key in ("ensure_row_contiguous", "atomic_outputs", "header")
        if key in how
    }
    kernel = metal_kernel("clean", ["a", "b", "c"][: len(inputs)], ["out"], START + body, **options)
    return kernel(
        inputs=list(inputs),
        grid=(grid, 1, 1),
        threadgroup=(threadgroup, 1, 1),
        output_shapes=[how.pop("shape", (N,))],
        output_dtypes=[how.pop("dtype", mx.float32)],
        **how,
    )[0]


class Simd(NamedTuple):
    """An expression of the lane's value x and its lane, and the same of a row of 32 values."""

    expression: str
    expected: Callable[[np.ndarray], Any]


SIMD = {
    "sum": Simd("simd_sum(x)", lambda x: np.full(32, x.sum(dtype=np.float64))),
    "product": Simd("simd_product(x)", lambda x: np.full(32, x.prod(dtype=np.float64))),
    "max": Simd("simd_max(x)", lambda x: np.full(32, x.max())),
    "min": Simd("simd_min(x)", lambda x: np.full(32, x.min())),
    "and": Simd("float(simd_and(0xFFFFu ^ (1u << lane)))", lambda x: np.zeros(32)),
    "or": Simd("float(simd_or(lane < 8 ? 1u << lane : 0u))", lambda x: np.full(32, 255.0)),
    "xor": Simd("float(simd_xor(lane))", lambda x: np.zeros(32)),
    "inclusive sum": Simd("simd_prefix_inclusive_sum(x)", lambda x: x.cumsum(dtype=np.float64)),
    "exclusive sum": Simd("simd_prefix_exclusive_sum(x)", lambda x: x.cumsum(dtype=np.float64) - x),
    "inclusive product": Simd("simd_prefix_inclusive_product(x)", np.cumprod),
    "exclusive product": Simd(
        "simd_prefix_exclusive_product(x)", lambda x: np.append(1, np.cumprod(x)[:-1])
    ),
    "shuffle": Simd("simd_shuffle(x, 31 - lane)", lambda x: x[::-1]),
    "shuffle xor": Simd("simd_shuffle_xor(x, 5)", lambda x: x[np.arange(32) ^ 5]),
    "shuffle up": Simd("simd_shuffle_up(x, 3)", lambda x: np.append(x[:3], x[:-3])),
    "shuffle down": Simd("simd_shuffle_down(x, 3)", lambda x: np.append(x[3:], x[-3:])),
    "rotate up": Simd("simd_shuffle_rotate_up(x, 3)", lambda x: np.roll(x, 3)),
    "rotate down": Simd("simd_shuffle_rotate_down(x, 3)", lambda x: np.roll(x, -3)),
    "broadcast": Simd("simd_broadcast(x, 7)", lambda x: np.full(32, x[7])),
    "broadcast first": Simd("simd_broadcast_first(x)", lambda x: np.full(32, x[0])),
    "quad": Simd("quad_shuffle_xor(x, 2)", lambda x: x[np.arange(32) ^ 2]),
    "any": Simd("simd_any(lane == 4) && !simd_any(lane == 32)", lambda x: np.ones(32)),
    "all": Simd("simd_all(lane < 32) && !simd_all(lane < 31)", lambda x: np.ones(32)),
    "ballot": Simd(
        "float((ulong)simd_ballot(lane % 8 == 1) >> 1)", lambda x: np.full(32, float(0x01010101))
    ),
    "vector": Simd("simd_sum(float2(x, 1.0f)).y", lambda x: np.full(32, 32.0)),
    "half": Simd("float(simd_max(half(lane)))", lambda x: np.full(32, 31.0)),
    "narrow": Simd("float(simd_sum(short(-2)))", lambda x: np.full(32, -64.0)),
}


@pytest.mark.parametrize("name", SIMD)
def test_simd_operation(name: str) -> None:
    case = SIMD[name]
    out = run(f"float x = a[i]; out[i] = {case.expression};", mx.array(A))
    assert_close(name, out, np.concatenate([case.expected(A[row]) for row in LANES]), 1e-6)


def test_simd_operations_of_a_smaller_simdgroup_leave_out_missing_lanes() -> None:
    body = "out[i] = simd_sum(a[i]) + 1000 * float(simd_all(true)) + simd_shuffle_down(a[i], 1);"
    out = run(body, mx.ones((40,)), grid=40, shape=(40,), threadgroup=40)
    assert_same_bits("out", out, [1033.0] * 32 + [1009.0] * 8)


MATH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rint": np.rint, "abs": np.abs,
}  # fmt: skip


@pytest.mark.parametrize("name", MATH)
def test_mathematics(name: str) -> None:
    x = np.abs(A) + 0.1
    oracle = MATH[name](x.astype(np.float64))
    spellings = [f"metal::{name}(a[i])", f"{name}(float4(a[i]))[3]"]
    if name != "abs":
        spellings += [f"metal::{space}::{name}(a[i])" for space in ("fast", "precise")]
    body = "\n".join(f"out[{row * N} + i] = {each};" for row, each in enumerate(spellings))
    out = run(body, mx.array(x), shape=(len(spellings), N))
    for spelling, found in zip(spellings, out, strict=True):
        assert_close(spelling, found, oracle, 1e-6)


EXPRESSIONS: dict[str, tuple[str, Callable[[np.ndarray], Any] | None]] = {
    "fma rounds once": ("fma(a[i], a[i], -a[i] * a[i])", None),
    "select": ("select(1.0f, 2.0f, a[i] > 0)", lambda a: np.where(a > 0, 2.0, 1.0)),
    "clamp": ("clamp(a[i], -0.5f, 0.25f)", lambda a: np.clip(a, -0.5, 0.25)),
    "min, max": ("min(max(a[i], -0.5f), 0.25f)", lambda a: np.clip(a, -0.5, 0.25)),
    "dot": ("dot(float3(a[i], 2, 1), float3(2, a[i], 5))", lambda a: 4 * a + 5),
    "vector of vectors": ("float4(float2(a[i], 1), 2, 3).x", lambda a: a),
    "vector of a vector": ("float(half4(float4(0.5f))[2])", lambda a: np.full(N, 0.5)),
    "template vector": ("vec<float, 4>(1, 2, a[i], 4).z", lambda a: a),
    "swizzle": ("float4(1, 2, a[i], 4).zyxw.xz[0]", lambda a: a),
    "as_type": ("as_type<float>(as_type<uint>(a[i]))", lambda a: a),
    "literals are float": ("(a[i] * 0.1) / 0.1", lambda a: (a * np.float32(0.1)) / np.float32(0.1)),
    "limits": ("a[i] > numeric_limits<half>::max() ? 0 : 1", lambda a: np.ones(N)),
    "infinity": ("metal::exp(-INFINITY) + a[i]", lambda a: a),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expression(name: str) -> None:
    expression, oracle = EXPRESSIONS[name]
    if oracle is None:
        exact = A.astype(np.float64) ** 2
        expected = exact - (A * A).astype(np.float64)
    else:
        expected = oracle(A)
    assert_same_bits(name, run(f"out[i] = {expression};", mx.array(A)), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_narrow_floats_round_after_each_operation(dtype: mx.Dtype) -> None:
    a, b = mx.array(A).astype(dtype), mx.array(A[::-1].copy()).astype(dtype)
    out = run("out[i] = a[i] * b[i] + a[i];", a, b, dtype=dtype)
    product = (a.astype(mx.float32) * b.astype(mx.float32)).astype(dtype).astype(mx.float32)
    expected = (product + a.astype(mx.float32)).astype(dtype)
    assert_same_bits("out", out.astype(mx.float32), expected.astype(mx.float32))


def test_threads_know_their_places() -> None:
    body = """
    uint3 g = threadgroup_position_in_grid, p = thread_position_in_threadgroup;
    uint3 n = threads_per_threadgroup, d = dispatch_threads_per_threadgroup;
    uint3 at = thread_position_in_grid, all = threads_per_grid, groups = threadgroups_per_grid;
    bool right = at.x == g.x * d.x + p.x && at.y == g.y * d.y + p.y && at.z == g.z * d.z + p.z;
    right = right && thread_index_in_threadgroup == (p.z * n.y + p.y) * n.x + p.x;
    right = right && simdgroup_index_in_threadgroup == thread_index_in_threadgroup / 32;
    right = right && thread_index_in_simdgroup == thread_index_in_threadgroup % 32;
    right = right && simdgroups_per_threadgroup == (n.x * n.y * n.z + 31) / 32;
    right = right && n.x == min(d.x, all.x - g.x * d.x) && threads_per_simdgroup == 32;
    out[(at.z * all.y + at.y) * all.x + at.x] = right * (groups.x * 100 + groups.y * 10 + groups.z);
    """
    kernel = metal_kernel("places", ["a"], ["out"], body)
    grid = (11, 5, 6)
    (out,) = kernel(
        inputs=[1],
        grid=grid,
        threadgroup=(4, 2, 8),
        output_shapes=[grid],
        output_dtypes=[mx.int32],
    )
    assert_same_bits("out", out, np.full(grid, 331))


REVERSED = """
threadgroup T s[64], last[1];
for (int round = 0; round < 3; round++) {
  s[i] = round ? s[i] + 1 : T(a[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i == 63) last[0] = s[0];
  T other = s[63 - i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  s[i] = other;
}
out[i] = float(s[i] + last[0] * 0);
"""


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.int32])
def test_threads_exchange_over_barriers(dtype: mx.Dtype) -> None:
    whole = np.arange(N, dtype=np.float32)
    out = run(REVERSED, mx.array(whole), template=[("T", dtype)])
    assert_same_bits("out", out, whole[::-1] + 2)


def test_lanes_exchange_over_simdgroup_barriers() -> None:
    body = """
    threadgroup float s[2][32];
    threadgroup float* mine = s[simdgroup_index_in_threadgroup];
    mine[lane] = a[i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = mine[31 - lane];
    """
    assert_same_bits("out", run(body, mx.array(A)), A.reshape(2, 32)[:, ::-1].ravel())


def test_device_memory_is_ordered_by_a_barrier_for_it() -> None:
    body = """
    out[i] = a[i];
    threadgroup_barrier(mem_flags::mem_device);
    float x = out[63 - i];
    threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
    out[i] = x;
    """
    assert_same_bits("out", run(body, mx.array(A)), A[::-1])


MULTIPLY = """
threadgroup T s[64];
simdgroup_matrix<T, 8, 8> left, right;
simdgroup_matrix<float, 8, 8> sum = simdgroup_matrix<float, 8, 8>(0.0f);
simdgroup_load(left, a, 8);
simdgroup_load(right, b + 8, 16, ulong2(0, 0), true);
simdgroup_multiply_accumulate(sum, left, right, sum);
simdgroup_matrix<T, 8, 8> narrow;
narrow.thread_elements()[0] = T(sum.thread_elements()[0]);
narrow.thread_elements()[1] = T(sum.thread_elements()[1]);
simdgroup_store(narrow, s, 8);
simdgroup_barrier(mem_flags::mem_threadgroup);
out[i] = s[i]; out[i + 32] = s[i + 32];
"""


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_matrices(dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.integers(-4, 5, shape)).astype(dtype) for shape in ((8, 8), (8, 16)))
    out = run(MULTIPLY, a, b, grid=32, template=[("T", dtype)], dtype=dtype)
    left, right = (np.array(x.astype(mx.float32)) for x in (a, b))
    assert_same_bits("out", out.astype(mx.float32), (left @ right[:, 8:].T).ravel())


def test_lanes_hold_the_elements_that_mlx_expects() -> None:
    body = """
    simdgroup_matrix<float, 8, 8> m;
    simdgroup_load(m, a, 8);
    short quad = lane / 4;
    short row = (quad & 4) + (lane / 2) % 4, column = (quad & 2) * 2 + (lane % 2) * 2;
    out[2 * i] = m.thread_elements()[0] - (row * 8 + column);
    out[2 * i + 1] = m.thread_elements()[1] - (row * 8 + column + 1);
    """
    out = run(body, mx.arange(N).astype(mx.float32), grid=32)
    assert_same_bits("out", out, np.zeros(N))


def test_atomics() -> None:
    body = """
    atomic_fetch_add_explicit(out, 1, memory_order_relaxed);
    atomic_fetch_max_explicit(out + 1, int(i), memory_order_relaxed);
    atomic_fetch_or_explicit(out + 2, 1 << (i % 32), memory_order_relaxed);
    """
    out = run(body, 0, threadgroup=8, shape=(3,), dtype=mx.int32, init_value=0, atomic_outputs=True)
    assert_same_bits("out", out, [64, 63, -1])


def test_strided_inputs_are_passed_as_they_are() -> None:
    body = "out[i] = a[(i / 8) * a_strides[0] + (i % 8) * a_strides[1]] + a_shape[0] * a_ndim;"
    a = mx.array(A).reshape(8, 8)
    for contiguous in (True, False):
        out = run(body, a.T, ensure_row_contiguous=contiguous)
        assert_same_bits("out", out, A.reshape(8, 8).T.ravel() + np.float32(16))


def test_helpers_take_an_input_of_either_address_space() -> None:
    header = "template <typename P> float twice(P p, uint i) { return p[i] * 2; }\n"
    out = run("out[i] = twice(a, i) + twice(b, i % 2);", mx.array(A), mx.ones((2,)), header=header)
    assert_same_bits("out", out, A * 2 + 2)


def test_counts() -> None:
    body = """
    threadgroup float s[64];
    s[i] = fma(a[i], 2.0f, 1.0f);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float4 y = float4(a[i]) * float4(a[i], 1, 2, 3);
    uint bits = as_type<uint>(a[i]);
    out[i] = simd_shuffle_xor(simd_sum(s[i ^ 1]), 1) + metal::exp(y.x * y.w) +
        float(half(y.z)) + float(bits * (bits >> 3));
    """
    kernel = metal_kernel("counted", ["a"], ["out"], START + body)
    kernel(
        inputs=[mx.array(A)],
        grid=(N, 1, 1),
        threadgroup=(N, 1, 1),
        output_shapes=[(N,)],
        output_dtypes=[mx.float32],
    )
    counts = kernel.counts
    integers = counts.pop("integer_operations")
    assert 0 < integers < 10 * N
    assert counts == {
        "matrix_products": 0,
        "matrix_transfers": 0,
        "simd_reductions": 2,
        "shuffles": 2,
        "simdgroup_barriers": 0,
        "threadgroup_barriers": 1,
        "device_bytes_read": 2 * 4 * N,
        "device_bytes_written": 4 * N,
        "threadgroup_bytes_read": 4 * N,
        "threadgroup_bytes_written": 4 * N,
        "float_operations": (1 + 4 + 1 + 3) * N,
        "special_functions": N,
        "slow_integers": 3 * N,  # and a half is free
    }
