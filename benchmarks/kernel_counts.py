"""What kernels do, counted by the emulator of the tests: ours, mlx-lm's and MLX's own.

Counting is at full width (heads of 128, rows of 2304) with few tokens, heads and rows, twice: what
a launch does is linear in its size, and two sizes give the line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
from mlx_lm.models import gated_delta

from mlx_kimi.metal_kernels.experts import Gated, expert_mlp
from mlx_kimi.metal_kernels.kda_chunk import kda_chunk_kernel
from mlx_kimi.metal_kernels.kda_decode import DecodeWeights, kda_decode
from mlx_kimi.metal_kernels.kda_sequential import kda_sequential_kernel
from mlx_kimi.metal_kernels.kernel import Kernel, use_backend
from mlx_kimi.metal_kernels.matrix import Matrix

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from emulator import EmulatedKernel

Work = dict[str, float]  # emulator.launch.COUNTS, bytes of the arrays, simdgroups, threadgroups
D = 128  # of a head, keys and values
STATE = D * D
HEADS = 4  # while counting: as many as share a threadgroup
HIDDEN, INTERMEDIATE, TOP_K = 2304, 1024, 8  # experts of Kimi-Linear-48B-A3B, which shares one more
BITS, GROUP = 4, 64


class Counted(NamedTuple):
    """What one launch does for one head of a sequence, or for one token's experts."""

    kernel: str
    fixed: Work
    each: Work  # more for each token or row

    def at(self, size: int, heads: int = 1) -> Work:
        """The whole launch."""
        return {key: heads * (self.fixed[key] + size * self.each[key]) for key in self.fixed}

    def spared(self, less: Work) -> Counted:
        """Without what a GPU's compiler spares for each token or row."""
        return self._replace(each={key: x - less.get(key, 0) for key, x in self.each.items()})


@contextmanager
def counting() -> Iterator[list[tuple[str, Work]]]:
    """What each launch inside does, of our kernels and of those that others build."""
    launches: list[tuple[str, Work]] = []

    def build(
        name: str, input_names: list[str], output_names: list[str], source: str, header: str = ""
    ) -> Callable[..., list[mx.array]]:
        kernel = EmulatedKernel(name, input_names, output_names, source, header, schedules=(0,))

        def launch(**how: Any) -> list[mx.array]:
            outputs = kernel(**how)
            launches.append((name, work(kernel.counts, outputs, **how)))
            return outputs

        return launch

    def ours(kernel: Kernel) -> Callable[..., list[mx.array]]:
        return build(kernel.name, kernel.inputs, kernel.outputs, kernel.source, kernel.header)

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
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    **_: Any,
) -> Work:
    arrays = [x for x in inputs if isinstance(x, mx.array)] + outputs
    return {
        **counts,
        "array_bytes": sum(x.nbytes for x in arrays),
        "simdgroups": prod(grid) / 32,
        "threadgroups": prod(ceil(g / t) for g, t in zip(grid, threadgroup, strict=True)),
    }


def measure(run: Callable[[int], Any], sizes: tuple[int, int], heads: int = 1) -> list[Counted]:
    """The line of each launch of `run(size)`, divided by the heads that it runs with."""
    both = []
    for size in sizes:
        with counting() as launches:
            run(size)
        both.append(launches)
    lines = []
    for (name, small), (_, large) in zip(*both, strict=True):
        span = (sizes[1] - sizes[0]) * heads
        each = {key: (large[key] - small[key]) / span for key in small}
        fixed = {key: small[key] / heads - sizes[0] * each[key] for key in small}
        lines.append(Counted(name, fixed, each))
    return lines


def delta_inputs(T: int, dtype: mx.Dtype, per_channel: bool) -> list[mx.array]:
    """q, k, v, alpha, beta and the state, with a decay for each channel or for each head."""
    q, k, v = (mx.random.normal((1, T, HEADS, D)).astype(dtype) for _ in range(3))
    alpha = mx.random.uniform(shape=(1, T, HEADS, D) if per_channel else (1, T, HEADS))
    beta = mx.random.uniform(shape=(1, T, HEADS))
    return [q, k, v, alpha, beta, mx.zeros((1, HEADS, D, D))]


def sequential() -> Counted:
    run = lambda T: kda_sequential_kernel(*delta_inputs(T, mx.bfloat16, True))  # noqa: E731
    return measure(run, (2, 4), HEADS)[0]


def chunk() -> list[Counted]:
    """gram and scan."""
    run = lambda T: kda_chunk_kernel(*delta_inputs(T, mx.bfloat16, True))  # noqa: E731
    return measure(run, (16, 32), HEADS)
