"""What kernels do, counted by the emulator of the tests: ours, mlx-lm's and MLX's own.

Counting is at full width (heads of 128, rows of 2304) with few tokens, heads and rows, twice: what
a launch does is linear in its size, and two sizes give the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx
import mlx.core as mx
from metal_emulator import metal_kernel
from mlx_lm.models import gated_delta

from mlx_kimi.metal_kernels.experts import SwiGLUWeights, expert_mlp
from mlx_kimi.metal_kernels.kda_chunk import kda_chunk_kernel
from mlx_kimi.metal_kernels.kda_decode import DecodeWeights, kda_decode
from mlx_kimi.metal_kernels.kda_sequential import kda_sequential_kernel
from mlx_kimi.metal_kernels.kernel import Kernel, use_backend
from mlx_kimi.metal_kernels.matrix import Matrix
from mlx_kimi.metal_kernels.mla_prefill import Expanded, mla_prefill
from mlx_kimi.metal_kernels.tuning import BASE

Work = dict[str, float]  # metal_emulator.COUNTS, bytes of the arrays, simdgroups, threadgroups
Size = tuple[int, int, int]

D = 128  # of a head: keys and values
STATE = D * D
HEADS = 4  # while counting
HIDDEN, INTERMEDIATE, TOP_K = 2304, 1024, 8  # experts of Kimi-Linear-48B-A3B, which shares one more
BITS, GROUP = 4, 64
MLX_CHUNK = "include/mlx/backend/metal/kernels/gated_delta_update.h"


class Counted(NamedTuple):
    """What one launch does for one head, or for all experts of one token."""

    kernel: str
    fixed: Work
    each: Work  # more for each token; of the experts, for each row
    spared: Work = {}  # of that, what the emulator's compiler does and Apple's would not

    @property
    def net(self) -> Work:
        return {key: x - self.spared.get(key, 0) for key, x in self.each.items()}

    def at(self, size: int, heads: int = 1) -> Work:
        """The whole launch, without what is spared."""
        return {key: heads * (self.fixed[key] + size * x) for key, x in self.net.items()}


def needless(fused: float, reloaded: int = 0, dtype: mx.Dtype = mx.float32, lanes: int = 0) -> Work:
    """What the emulator's compiler does and Apple's would not, for each token or row.

    Args:
        fused: multiplications whose addition follows; the emulator never joins them.
        reloaded: elements of `dtype` that the text names before and after a `simd_sum`, which to
            the emulator's compiler is a call that might change them.
        lanes: which read T anew for each token, for the same reason.
    """
    return {
        "float_operations": fused + (reloaded if dtype.size == 2 else 0),
        "device_bytes_read": reloaded * dtype.size + 4 * lanes,
    }


@contextmanager
def counting() -> Iterator[list[tuple[str, Work]]]:
    """What each launch inside does, of our kernels and of those built with `mx.fast`."""
    launches: list[tuple[str, Work]] = []

    def ours(kernel: Kernel) -> Callable[..., list[mx.array]]:
        return build(kernel.name, kernel.inputs, kernel.outputs, kernel.source, kernel.header)

    def build(
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
    ) -> Callable[..., list[mx.array]]:
        kernel = metal_kernel(name, input_names, output_names, source, header, schedules=(0,))

        def launch(**how: Any) -> list[mx.array]:
            outputs = kernel(**how)
            launches.append((name, work(kernel.counts, outputs, **how)))
            return outputs

        return launch

    with (
        use_backend(ours),
        patch.object(mx.fast, "metal_kernel", build),
        patch.object(mx.metal, "is_available", lambda: True),
    ):
        yield launches


def work(
    counts: dict[str, int],
    outputs: list[mx.array],
    inputs: list[Any],
    grid: Size,
    threadgroup: Size,
    **_: Any,
) -> Work:
    arrays = [x for x in inputs if isinstance(x, mx.array)] + outputs
    return {
        **counts,
        "array_bytes": sum(x.nbytes for x in arrays),
        "simdgroups": prod(grid) / 32,
        "threadgroups": prod(ceil(g / t) for g, t in zip(grid, threadgroup, strict=True)),
    }


def measure(run: Callable[[int], Any], sizes: tuple[int, int], heads: int = HEADS) -> list[Counted]:
    """The line of each launch that `run(size)` makes for so many heads."""
    runs = []
    for size in sizes:
        with counting() as launches:
            run(size)
        runs.append(launches)
    lines = []
    for (name, small), (_, large) in zip(*runs, strict=True):
        each = {key: (large[key] - small[key]) / (sizes[1] - sizes[0]) / heads for key in small}
        fixed = {key: small[key] / heads - sizes[0] * each[key] for key in small}
        lines.append(Counted(name, fixed, each))
    return lines


def delta_inputs(T: int, dtype: mx.Dtype, per_channel: bool = True) -> list[mx.array]:
    """q, k, v, alpha, beta and the state, with a decay for each channel or for each head."""
    q, k, v = (mx.random.normal((1, T, HEADS, D)).astype(dtype) for _ in range(3))
    alpha = mx.random.uniform(shape=(1, T, HEADS, D) if per_channel else (1, T, HEADS))
    beta = mx.random.uniform(shape=(1, T, HEADS))
    return [q, k, v, alpha, beta, mx.zeros((1, HEADS, D, D))]


def count_sequential() -> Counted:
    run = lambda T: kda_sequential_kernel(*delta_inputs(T, mx.bfloat16))  # noqa: E731
    (counted,) = measure(run, (2, 4))
    # The product with the correction; of 4 channels' products with k and with q a lane adds 3 to
    # the first. D / 8 simdgroups have 8 rows each.
    return counted._replace(spared=needless((1 + 2 * 3 / 4) * STATE, lanes=32 * D // 8))


def count_chunk() -> list[Counted]:
    """gram and scan."""
    run = lambda T: kda_chunk_kernel(*delta_inputs(T, mx.bfloat16))  # noqa: E731
    gram, scan = measure(run, (16, 32))
    # Of 4 channels' products a lane adds 3 to the first, for 120 pairs of keys and 136 of a query
    # and a key; the substitution has 120 products and 16 differences.
    fused = 32 * (3 * (120 + 136) + 120 + 16) / 16
    return [gram._replace(spared=needless(fused)), scan]


def count_mlx_lm(dtype: mx.Dtype, per_channel: bool, packed: bool = False) -> Counted:
    """mlx-lm's kernel with one row of the state to a simdgroup, or with eight."""

    def run(T: int) -> None:
        q, k, v, alpha, beta, state = delta_inputs(T, dtype, per_channel)
        form = "gated_delta_kernel" if packed else "gated_delta_kernel_unpacked"
        with patch.multiple(gated_delta, **mlx_lm_kernels()):
            getattr(gated_delta, form)(q, k, v, alpha, beta.astype(dtype), state)

    (counted,) = measure(run, (2, 4))
    lanes = 4 * D if packed else 32 * D
    return counted._replace(spared=needless(3 * STATE, STATE, dtype, lanes))


def mlx_lm_kernels() -> dict[str, Any]:
    """By their names in mlx_lm.models.gated_delta, for the builder of this moment.

    All loops but that over tokens are unrolled: only so can an array stay in registers.
    """
    build = mx.fast.metal_kernel

    def unrolled(source: str, **how: Any) -> Any:
        return build(source=re.sub(r"(?=for \(int (?!t ))", '_Pragma("unroll") ', source), **how)

    with patch.object(mx.fast, "metal_kernel", unrolled):
        return {
            "_gated_delta_kernel": gated_delta._make_gated_delta_kernel(),
            "_gated_delta_kernel_vec": gated_delta._make_gated_delta_kernel(vectorized=True),
            "_gated_delta_kernel_packed": gated_delta._make_gated_delta_packed_kernel(),
        }


def count_mlx_chunk(dtype: mx.Dtype) -> Counted:
    """MLX's own kernel for a decay per head: chunks of 8 tokens, in 8 x 8 products."""
    header, body = mlx_chunk_text()
    names = ["q", "k", "v", "state_in", "g", "beta", "T"]

    def run(T: int) -> None:
        q, k, v, alpha, beta, state = delta_inputs(T, dtype, per_channel=False)
        mx.fast.metal_kernel("gated_delta_fused_chunk", names, ["y", "state_out"], body, header)(
            inputs=[q, k, v, state, alpha.astype(dtype), beta.astype(dtype), T],
            template=[("InT", dtype), ("Dk", D), ("Dv", D), ("Hk", HEADS), ("Hv", HEADS), ("C", 8)],
            grid=(32, D // 8, HEADS),
            threadgroup=(32, 4, 1),
            output_shapes=[v.shape, state.shape],
            output_dtypes=[dtype, mx.float32],
        )

    (counted,) = measure(run, (8, 16))
    return counted._replace(spared=needless(STATE / 8))  # the decay of the state, once a chunk


def mlx_chunk_text() -> tuple[str, str]:
    """Macros and body, from a header that comes with MLX."""
    text = (Path(next(iter(mlx.__path__))) / MLX_CHUNK).read_text()
    # MLX writes `gamma` anew without waiting for its readers; the emulator calls that a race.
    write = "if (thread_index_in_simdgroup < C) {"
    text = text.replace(write, f"simdgroup_barrier(mem_flags::mem_threadgroup); {write}")
    text = text.replace("MLX_MTL_PRAGMA_UNROLL", '_Pragma("unroll")')
    text = text.replace("simdgroup_matrix<float, 8>(", "simdgroup_matrix<float, 8, 8>(")
    header = text[text.index("#define AT(") : text.index("template <typename InT")]
    start = text.index("{\n", text.index("void gated_delta_fused_chunk(")) + 1
    return header, text[start : text.index("\n}\n", start)]


def count_decode() -> Counted:
    """A layer's step for one token of each text; what is called a token elsewhere is a text."""
    channels = 3 * HEADS * D
    gate = quantized(HEADS * D, D)
    taps, norm = mx.zeros((4, channels), mx.bfloat16), mx.ones((D,), mx.bfloat16)
    A_log, dt_bias = mx.zeros((HEADS,)), mx.zeros((HEADS, D))
    weights = DecodeWeights(taps, gate, gate, A_log, dt_bias, norm, 1e-5)

    def run(B: int) -> None:
        x = mx.zeros((B, channels + 2 * D + HEADS), mx.bfloat16)
        tail = mx.zeros((B, 3, channels), mx.bfloat16)
        kda_decode(x, weights, tail, mx.zeros((B, HEADS, D, D)))

    (counted,) = measure(run, (1, 2))
    # Two norms, three products with the state, and for each of two gates a product and a bias.
    return counted._replace(spared=needless((2 + 3 + 4) * STATE))


def count_prefill() -> Counted:
    """Attention of a token that sees 1024 columns, as many as one of 2048 does on average."""
    nope, shared, lora, S = D, D // 2, 4 * D, 1024
    keys, values = (mx.zeros((1, HEADS, S, D), mx.bfloat16) for _ in range(2))
    latents = mx.zeros((1, S, lora + shared), mx.bfloat16)

    def run(T: int) -> None:
        x = mx.zeros((1, T, HEADS * (nope + shared) + lora + shared), mx.bfloat16)
        given = Expanded(x, keys, latents, values, 1.0, S)
        mla_prefill(given, mx.bfloat16, BASE.prefill)

    (counted,) = measure(run, (32, 64))
    return counted


def count_experts() -> list[Counted]:
    """gate_up for each row of the experts, and down for each element of the output."""

    def run(K: int, N: int) -> None:
        routed = SwiGLUWeights(
            quantized(TOP_K, N, K), quantized(TOP_K, N, K), quantized(TOP_K, K, N)
        )
        shared = SwiGLUWeights(quantized(N, K), quantized(N, K), quantized(K, N))
        chosen, weights = mx.arange(TOP_K).astype(mx.int32)[None], mx.ones((1, TOP_K))
        expert_mlp(mx.zeros((1, K), mx.bfloat16), chosen, weights, routed, shared)

    gate_up, _ = measure(lambda N: run(HIDDEN, N), (GROUP, 2 * GROUP), heads=1)
    _, down = measure(lambda K: run(K, INTERMEDIATE), (GROUP, 2 * GROUP), heads=1)
    # For each weight a product; for 8 of them a scale and a bias.
    weights = (TOP_K + 1) * (1 + 2 / 8)
    return [
        gate_up._replace(spared=needless(2 * HIDDEN * weights)),
        down._replace(spared=needless(INTERMEDIATE * weights)),
    ]


def quantized(*shape: int) -> Matrix:
    packed = mx.quantize(mx.zeros(shape, mx.bfloat16), GROUP, BITS)
    return Matrix(*packed, group_size=GROUP, bits=BITS)
