"""Estimated cost of the routed experts of many tokens on Apple GPUs. Nothing was measured on one.

    .venv/bin/python -m benchmarks.apple_experts

Counts of ours and of what MLX 0.32.4 runs for them (expert_counts.py), made time by the model of
apple_gpu.py. Of quantized products there are public figures for two kinds of GPU, and they part
the model's two readings: that of an M1 Max is met where instructions and accesses add up, those of
M3 where they hide each other. So M1 and M2 are read the one way here, M3 and M4 the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from benchmarks.apple_gpu import (
    ACCESSES,
    CHOSEN,
    ESTIMATED,
    HIDING,
    LANES,
    MACHINES,
    OF_A_LANE,
    OF_A_SIMDGROUP,
    PORT,
    SCHEDULERS,
    Model,
    Public,
    milliseconds,
)
from benchmarks.expert_counts import (
    PACKED,
    SHIPPED,
    WHICH,
    WIDE,
    E,
    Launch,
    Tile,
    dense_turn,
    grouped_turn,
    mlx_layer,
    mlx_product,
    our_turn,
    ours,
    routed,
    times,
)
from benchmarks.kernel_counts import HIDDEN, INTERMEDIATE, TOP_K, Work
from mlx_kimi.metal_kernels.tuning import ExpertForm

READING = {"M1 Max": CHOSEN, "M3 Max": HIDING, "M3 Ultra": HIDING, "M4 Max": HIDING}
TOKENS = (16, 31, 64, 100, 128, 256, 512, 1024, 2048)
VECTORS = ExpertForm(0, "vectors")
TILES = {n: ExpertForm(0, "tiles", n) for n in (1, 2, 4)}
FORMS: dict[str, Callable[[np.ndarray], list[Launch]]] = {
    "MLX": mlx_layer,
    "vectors": lambda tokens: ours(VECTORS, tokens),
    **{f"tiles {n}": lambda tokens, form=form: ours(form, tokens) for n, form in TILES.items()},
}


@cache
def layer(form: str, T: int) -> list[Launch]:
    return FORMS[form](routed(T))


def time(form: str, T: int, machine: str, model: Model | None = None) -> float:
    """Milliseconds of the routed experts of a layer, launches one after another."""
    reading = model or READING[machine]
    return sum(milliseconds(x.work, MACHINES[machine], reading) for x in layer(form, T))


# ----------------------------------------------------------------------------------- public figures
class Products:
    """Times of two products of every expert, gate or up and down, with so many rows each."""

    def __init__(self, machine: str, model: Model | None, dtype: mx.Dtype = mx.bfloat16) -> None:
        self.machine, self.dtype = MACHINES[machine], dtype
        self.model = model or READING[machine]

    def milliseconds(self, work: Work) -> float:
        return milliseconds(work, self.machine, self.model)

    def tiled(self, tile: Tile, rows: int) -> float:
        tokens = np.full(E, rows)
        return sum(self.milliseconds(mlx_product(w, tile, tokens, self.dtype)) for w in WHICH)

    def dense(self, rows: int) -> float:
        """As many rows in all, with one matrix."""
        nbytes = HIDDEN * INTERMEDIATE * PACKED + E * rows * (HIDDEN + INTERMEDIATE) * 2
        turns = (times(E * rows / 32, dense_turn(which, self.dtype)) for which in WHICH)
        return sum(self.milliseconds(turn | {"array_bytes": nbytes}) for turn in turns)

    def row_by_row(self, experts: int) -> float:
        """GB/s of weights, of down with one row for so many experts."""
        tokens = np.array([1] * experts + [0] * (E - experts))
        ms = self.milliseconds(mlx_product("down", None, tokens))
        return experts * HIDDEN * INTERMEDIATE * PACKED / ms / 1e6


def teraflops(rows: int, ms: float) -> float:
    return 2 * 2 * E * rows * HIDDEN * INTERMEDIATE / ms / 1e9


def peak(machine: str) -> float:
    """TFLOP/s of fused multiplications and additions."""
    it = MACHINES[machine]
    return 2 * it.cores * SCHEDULERS * LANES * it.gigahertz / 1e3


@cache
def figures(model: Model | None = None) -> list[Public]:
    """Public figures of quantized products; without a model, by each GPU's reading.

    Those of an M3 Max are of half, which is read without a conversion. Shapes are the 48B's.
    """
    first = Products("M1 Max", model)
    third, ultra = Products("M3 Max", model, mx.float16), Products("M3 Ultra", model)
    wider = {rows: third.tiled(SHIPPED, rows) / third.tiled(WIDE, rows) for rows in (32, 64)}
    # github.com/ml-explore/mlx pull 3918, 1.19 to 1.22 times from 64 to 128 rows; issues 4246 and
    # 4509, four tokens in a chain of layers; github.com/ml-explore/mlx-swift-lm issue 64, of a
    # whole model of whose experts each has about 128 rows: 41 % of the rate.
    rows = [
        ("32 x 64 to 16 x 32, 64 rows, M3 Max", "mlx 3918", "tiles", 1.2, wider[64]),
        ("the same, 32 rows", "mlx 3918", "tiles", 1.13, wider[32]),
        ("32 x 64 to one matrix, M3 Max", "mlx 3918", "tiles", 0.96)
        + (third.dense(64) / third.tiled(WIDE, 64),),
        ("16 x 32, 43 rows, TFLOP/s, M3 Ultra", "mlx 4246", "tiles", 14.2)
        + (teraflops(43, ultra.tiled(SHIPPED, 43)),),
        ("one matrix, TFLOP/s, M3 Ultra", "mlx 4246", "dense", 20.5)
        + (teraflops(43, ultra.dense(43)),),
        ("16 x 32, 128 rows, TFLOP/s, M1 Max", "mlx-swift-lm 64", "tiles", 0.41 * peak("M1 Max"))
        + (teraflops(128, first.tiled(SHIPPED, 128)),),
        ("row by row, GB/s of weights, M3 Ultra", "mlx 4509", "vectors", 542.0)
        + (ultra.row_by_row(32),),
    ]
    return [Public(*row, is_speed=True) for row in rows]


# --------------------------------------------------------------------------------------- boundaries
def faster_from(form: str, other: str, machine: str, model: Model | None = None) -> float:
    """Pairs of an average expert, to a tenth and up to 10, from which on one form is faster."""

    def is_slower(pairs: float) -> bool:
        T = round(pairs * E / TOP_K)
        return time(form, T, machine, model) >= time(other, T, machine, model)

    return max(tenths for tenths in range(3, 100) if is_slower(tenths / 10)) / 10 + 0.1


# ------------------------------------------------------------------------------ beside the products
class Beside(NamedTuple):
    """Shares of the cycles of 8 x 8 products."""

    instructions: float
    accesses: float


def beside(works: Sequence[Work]) -> Beside:
    products = sum(OF_A_SIMDGROUP["matrix_products"] * x["matrix_products"] for x in works)
    issue = sum(cycles * x[key] for x in works for key, cycles in OF_A_SIMDGROUP.items())
    issue += sum(cycles * x[key] / LANES for x in works for key, cycles in OF_A_LANE.items())
    accesses = sum(x[key] for x in works for key in ACCESSES) / PORT * SCHEDULERS
    return Beside(issue / products - 1, accesses / products)


def full_turns(form: str) -> list[Work]:
    """Gate, up and down for as many tokens as a form in tiles takes at a time."""
    if form == "MLX":
        one, two = (grouped_turn(which, SHIPPED, SHIPPED.BM) for which in WHICH)
        return [one, one, two]
    tiles = TILES[int(form.split()[1])]
    return [our_turn(which, tiles, 8 * tiles.tiles) for which in WHICH]


def per_useful_row(form: str, T: int) -> Beside:
    """Of a layer: beside products, in shares of what the products of the rows alone would be."""
    launches = [x.work for x in layer(form, T) if x.work["matrix_products"]]
    made = sum(x["matrix_products"] for x in launches)
    useful = T * TOP_K * 3 * HIDDEN * INTERMEDIATE / 8**3
    found = beside(launches)
    return Beside(*(share * made / useful for share in found))


# ------------------------------------------------------------------------------------------ printed
def print_figures() -> None:
    columns = f"{'public':>9}{'model':>9}{'too fast by':>14}{'adding':>9}{'hiding':>9}"
    print(f"{'Public figures':<40}{'source':<17}{columns}")
    for each, added, hidden in zip(figures(), figures(CHOSEN), figures(HIDING), strict=True):
        print(
            f"{each.what:<40}{each.source:<17}{each.figure:9.2f}{each.model:9.2f}"
            f"{each.flattery:12.2f} x{added.flattery:7.2f} x{hidden.flattery:7.2f} x"
            f"{'' if each.is_met else '  missed'}"
        )
    print(
        "M1 as if instructions and accesses added up, M3 as if they hid each other; the last two\n"
        "columns are all figures read one way. Rows are of an average expert."
    )


def print_times() -> None:
    for machine in ESTIMATED:
        other = HIDING if READING[machine] == CHOSEN else CHOSEN
        forms = [name for name in FORMS if name != "MLX"]
        heads = "".join(f"{name:>24}" for name in forms)
        print(f"\n{f'{machine}, ms a layer; tokens':<27}{'MLX':>9}{'':8}{heads}")
        for T in TOKENS:
            slow, slower = (time("MLX", T, machine, model) for model in (None, other))
            cells = f"{slow:9.2f} ({slower:5.2f})"
            for form in forms:
                fast, faster = (time(form, T, machine, model) for model in (None, other))
                cells += f"{fast:9.2f} {slow / fast:5.2f} x ({slower / faster:4.2f})"
            print(f"{T:<27}{cells}")
    print("\nIn brackets: by the other reading. x: how many times as fast as MLX.")


def print_boundaries() -> None:
    machines = "".join(f"{machine:>12}" for machine in ESTIMATED)
    print(f"\n{'Pairs of an average expert from which on':<44}{machines}")
    for form, than in (("tiles 4", "vectors"), ("tiles 1", "vectors"), ("tiles 4", "tiles 1")):
        cells = "".join(f"{faster_from(form, than, machine):12.1f}" for machine in ESTIMATED)
        print(f"{f'{form} are faster than {than}':<44}{cells}")


def print_beside() -> None:
    print(f"\n{'Beside products, % of their cycles':<44}{'instructions':>14}{'accesses':>10}")
    for form in ("MLX", "tiles 1", "tiles 4"):
        rows = [(f"{form}, a full turn", beside(full_turns(form)))]
        rows += [(f"{form}, useful rows, {T} tokens", per_useful_row(form, T)) for T in (256, 2048)]
        for what, found in rows:
            print(f"{what:<44}{100 * found.instructions:14.0f}{100 * found.accesses:10.0f}")


def main() -> None:
    mx.set_default_device(mx.cpu)
    print_figures()
    print_times()
    print_boundaries()
    print_beside()


if __name__ == "__main__":
    main()
