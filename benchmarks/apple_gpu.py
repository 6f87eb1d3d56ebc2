"""Estimated cost on Apple GPUs, from counts. Nothing here was measured on one.

    .venv/bin/python -m benchmarks.apple_gpu

The emulator counts what each kernel does (kernel_counts.py), and published figures of single
operations turn that into time. First the model is held against public measurements of kernels that
can be counted here; then come the estimates, each with what the model misses of its kind.

A launch takes as long as its instructions and its accesses keep the cores busy, one after the
other, or as its arrays take to cross the memory bus, whichever is longer. That instructions and
accesses do not hide each other is the one choice made after a measurement, mlx-lm's kernel on an M3
Ultra; what they would give if they did stands beside. Not in the model: what a launch itself costs,
latency, caches beyond the first, address arithmetic, registers that do not suffice, barriers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import ceil
from typing import NamedTuple

import mlx.core as mx

from benchmarks.kernel_counts import (
    HIDDEN,
    INTERMEDIATE,
    Counted,
    Work,
    count_chunk,
    count_decode,
    count_experts,
    count_mlx_chunk,
    count_mlx_lm,
    count_prefill,
    count_sequential,
)

# Cycles of a scheduler, by github.com/philipturner/metal-benchmarks on M1 and M2: an 8 x 8 product
# 18 (20 in an early table; its multiplications alone are 16), SUM<F32> 14.5, SHUFFLE 2, FFMA32 and
# IADD32 1 (but shifts, IMUL32 and CONVERT 4), RSQRT32 8, RECIP32 6, EXP2_32 and LOG2_32 4.
OF_A_SIMDGROUP = {"matrix_products": 18, "simd_reductions": 14.5, "shuffles": 2}
OF_A_LANE = {
    "float_operations": 1,
    "integer_operations": 1,
    "special_functions": 8,
    "slow_integers": 4,
}
LANES, SCHEDULERS = 32, 4  # of a simdgroup; of a core
ACCESSES = (
    "device_bytes_read",
    "device_bytes_written",
    "threadgroup_bytes_read",
    "threadgroup_bytes_written",
)
# Bytes a cycle between a core and its L1 or threadgroup memory, by the same source. All that lanes
# ask for is counted, also where they ask for the same.
PORT = 64
FAR_PORT = 17.6  # from the system level cache: 15.4 to 19.8


class Model(NamedTuple):
    """What is not known of a core."""

    port: float = PORT
    hides: bool = False  # accesses behind instructions, and the other way round


CHOSEN, HIDING = Model(), Model(hides=True)


class Machine(NamedTuple):
    """Cores and clocks as public tables of devices have them, bandwidths as apple.com does."""

    cores: int
    gigahertz: float
    gigabytes: float  # of memory, a second


MACHINES = {
    "M1 Max": Machine(32, 1.296, 400),
    "M3 Max": Machine(40, 1.398, 400),
    "M3 Ultra": Machine(80, 1.398, 819),
    "M4 Max": Machine(40, 1.68, 546),  # tables say 1.58 to 1.80 GHz
    "M5 Max": Machine(40, 1.68, 546),  # as the M4 Max; only ratios are taken of it
}
ESTIMATED = ("M1 Max", "M4 Max", "M3 Ultra")
WITHIN = 1.5  # times a public figure, or the model has missed it


class Public(NamedTuple):
    """What others measured, and the model's figure of the same."""

    what: str
    source: str
    kind: str  # of the kernels it speaks for
    figure: float
    model: float
    is_speed: bool  # how many times faster; else milliseconds

    @property
    def flattery(self) -> float:
        """How many times too fast the model is."""
        return self.model / self.figure if self.is_speed else self.figure / self.model

    @property
    def is_met(self) -> bool:
        return 1 / WITHIN <= self.flattery <= WITHIN


class Estimate(NamedTuple):
    kernel: str
    kind: str
    launches: list[Counted]
    T: int = 2048
    heads: int = 32


def milliseconds(work: Work, machine: Machine, model: Model = CHOSEN) -> float:
    """Of one launch."""
    issue = sum(cycles * work[key] for key, cycles in OF_A_SIMDGROUP.items())
    issue += sum(cycles * work[key] / LANES for key, cycles in OF_A_LANE.items())
    both = issue / SCHEDULERS, sum(work[key] for key in ACCESSES) / model.port
    cycles = (max(both) if model.hides else sum(both)) / machine.cores * crowding(work, machine)
    return max(cycles / machine.gigahertz, work["array_bytes"] / machine.gigabytes) / 1e6


def crowding(work: Work, machine: Machine) -> float:
    """How much longer the busiest core or scheduler works than if all had equal shares."""
    places = {"threadgroups": machine.cores, "simdgroups": machine.cores * SCHEDULERS}
    return max(ceil(work[key] / n) * n / work[key] for key, n in places.items())


def time(
    launches: Sequence[Counted],
    machine: str,
    T: int = 2048,
    heads: int = 32,
    model: Model = CHOSEN,
) -> float:
    """Milliseconds of launches one after another."""
    return sum(milliseconds(each.at(T, heads), MACHINES[machine], model) for each in launches)


@cache
def mlx_lm(dtype: mx.Dtype, per_channel: bool = False, packed: bool = False) -> list[Counted]:
    return [count_mlx_lm(dtype, per_channel, packed)]


@cache
def public_figures(model: Model = CHOSEN) -> list[Public]:
    """Public times of kernels for D = 128; T = 2048, B = 1 and a decay per head unless said."""
    half, single = mx.bfloat16, mx.float32
    from_afar = model._replace(port=FAR_PORT)

    def speed(kernel: list[Counted], dtype: mx.Dtype, B: int = 1) -> float:
        """Of a kernel for 32 heads against one row to a simdgroup."""
        slow, fast = (time(x, "M5 Max", 2048, 32 * B, model) for x in (mlx_lm(dtype), kernel))
        return slow / fast

    def flash(per_channel: bool, T: int = 8192, model: Model = model) -> float:
        """A baseline of FlashKDA-mlx: 64 heads, 8192 tokens in sequences of T, all in float32."""
        return 8192 // T * time(mlx_lm(single, per_channel), "M3 Max", T, 64, model)

    # github.com/ml-explore/mlx pull 4409; pull 4020, whose reviewer reads 1.3 to 1.45 off a plot;
    # github.com/raullenchai/Rapid-MLX pull 2144: 3.93 ms for 48 heads are 2.6 for 32;
    # github.com/popfido/FlashKDA-mlx, BENCHMARK_MLX.md, with some 20 ms for norms and gates.
    packed, single_packed = mlx_lm(half, packed=True), mlx_lm(single, packed=True)
    speeds = [
        ("8 rows to 1, bfloat16, M5 Max", "mlx 4409", "rows", 1.97, speed(packed, half)),
        ("8 rows to 1, float32, M5 Max", "mlx 4409", "rows", 1.25, speed(single_packed, single)),
        ("the same, B = 8", "mlx 4409", "rows", 1.87, speed(single_packed, single, 8)),
        ("chunks of 8 to 1 row, M5 Max", "mlx 4020", "tiles", 1.38, speed(mlx_chunk(), half)),
    ]
    ultra = time(mlx_lm(half), "M3 Ultra", 2048, 48, model)
    cached = "the same, from the system level cache"
    times = [
        ("1 row, bfloat16, 48 heads, M3 Ultra", "Rapid-MLX 2144", "one row", 3.93, ultra),
        ("1 row, 8 x 1024 tokens, M3 Max", "FlashKDA-mlx", "one row", 58.5, flash(False, 1024)),
        ("the same, decay per channel", "FlashKDA-mlx", "one row", 77.9, flash(True, 1024)),
        ("1 row, 8192 tokens, M3 Max", "FlashKDA-mlx", "long", 88.8, flash(False)),
        (cached, "FlashKDA-mlx", "far", 88.8, flash(False, model=from_afar)),
        ("1 row, 8192, decay per channel", "FlashKDA-mlx", "long", 163.3, flash(True)),
        (cached, "FlashKDA-mlx", "far", 163.3, flash(True, model=from_afar)),
    ]
    return [Public(*row, is_speed=True) for row in speeds] + [
        Public(*row, is_speed=False) for row in times
    ]


@cache
def mlx_chunk() -> list[Counted]:
    return [count_mlx_chunk(mx.bfloat16)]


def estimates() -> list[Estimate]:
    """The 48B's layers at B = 1: a prompt of 2048 tokens, and one token."""
    half = mx.bfloat16
    gate_up, down = count_experts()
    return [
        Estimate("mlx-lm, 1 row, decay per channel", "one row", mlx_lm(half, per_channel=True)),
        Estimate("mlx-lm, 8 rows, decay per head", "rows", mlx_lm(half, packed=True)),
        Estimate("kda_sequential", "rows", [count_sequential()]),
        Estimate("kda_chunk: gram, scan", "tiles", count_chunk()),
        Estimate("mla_prefill", "", [count_prefill()]),
        Estimate("kda_decode", "", [count_decode()], 1),
        Estimate("expert_gate_up", "", [gate_up], INTERMEDIATE, 1),
        Estimate("expert_down", "", [down], HIDDEN, 1),
    ]


def print_public() -> None:
    columns = f"{'public':>9}{'model':>9}{'too fast by':>14}{'if hidden':>12}"
    print(f"{'Public figures':<40}{'source':<17}{columns}")
    for each, hidden in zip(public_figures(), public_figures(HIDING), strict=True):
        unit = "x " if each.is_speed else "ms"
        print(
            f"{each.what:<40}{each.source:<17}{each.figure:6.2f} {unit}{each.model:9.2f}"
            f"{each.flattery:12.2f} x{hidden.flattery:10.2f} x{'' if each.is_met else '  missed'}"
        )
    print(
        "FlashKDA-mlx itself is 4.75 times as fast as the last: not reproduced. Its kernels are\n"
        "not here to be counted; of that ratio the model has the 163 ms only, and misses them."
    )


def print_estimates(rows: Sequence[Estimate]) -> None:
    print(f"\n{'Estimates, ms':<34}" + "".join(f"{m:>23}" for m in ESTIMATED) + "   too fast by")
    for row in rows:
        cells = ""
        for machine in ESTIMATED:
            cells += f"{time(row.launches, machine, row.T, row.heads):9.3f}"
            ratios = [
                time(rows[0].launches, machine, model=m) / time(row.launches, machine, model=m)
                for m in (CHOSEN, HIDING)
            ]
            cells += f"{ratios[0]:6.1f} x ({ratios[1]:3.1f})" if row.kind else " " * 14
        print(f"{row.kernel:<34}{cells}   {missed(row.kind)}")
    print(
        "The ratios are to the first line, and so is what the next three are too fast by. Those\n"
        "in brackets are of instructions and accesses that hide each other."
    )


def missed(kind: str) -> str:
    """How many times too fast the model is where kernels of this kind were measured."""
    found = sorted({f"{each.flattery:.1f}" for each in public_figures() if each.kind == kind})
    return f"{' to '.join(dict.fromkeys((found[0], found[-1])))} x" if found else "not known"


def print_counts(rows: Sequence[Estimate]) -> None:
    columns = "tiles sums shuffles float integer special slow barriers accesses arrays".split()
    print(f"\n{'Per token and head, or per row':<31}" + "".join(f"{c:>10}" for c in columns))
    for launch in (launch for row in rows for launch in row.launches):
        net = launch.net
        cells = [net[key] for key in (*OF_A_SIMDGROUP, *OF_A_LANE, "threadgroup_barriers")]
        cells += [sum(net[key] for key in ACCESSES), net["array_bytes"]]
        print(f"{launch.kernel:<31}" + "".join(f"{x:10.1f}" for x in cells))
    print(
        "Tiles, sums and shuffles are instructions of a simdgroup; the next four of a lane: slow\n"
        "are shifts, products and conversions of integers. Accesses are bytes as often as lanes\n"
        "ask for them, arrays are bytes once."
    )


def print_crowding(rows: Sequence[Estimate]) -> None:
    machines = "".join(f"{f'{m}, {MACHINES[m].cores} cores':>20}" for m in ESTIMATED)
    print(f"\n{'A launch':<32}{'threadgroups':>13}{'simdgroups':>11}{machines}")
    for row in rows:
        for launch in row.launches:
            work = launch.at(row.T, row.heads)
            cells = "".join(f"{crowding(work, MACHINES[m]):18.2f} x" for m in ESTIMATED)
            groups = f"{work['threadgroups']:13.0f}{work['simdgroups']:11.0f}"
            print(f"{launch.kernel:<32}{groups}{cells}")
    print(
        "The busiest core, or scheduler of a core, works so many times longer than if all had\n"
        "equal shares: 1.25 where a fifth of the machine idles."
    )


def main() -> None:
    mx.set_default_device(mx.cpu)
    rows = estimates()
    print_public()
    print_estimates(rows)
    print_counts(rows)
    print_crowding(rows)


if __name__ == "__main__":
    main()
