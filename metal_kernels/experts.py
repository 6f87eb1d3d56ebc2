"""The experts of a few tokens in four launches: score, choose, gate and up, down and weighted sum.

`expert_gate_up` and `expert_down` read the matrices where they lie, gate and up as two buffers and
the shared expert as inputs of its own, which may be stored with other bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_kimi.metal_kernels.kernel import Kernel
from mlx_kimi.metal_kernels.matrix import Matrix

LARGEST_BATCH = 8  # tokens; beyond it sorting by expert reads less
BITS = (0, 4, 8)  # 0: plain
MOST_EXPERTS = 15  # of a token: with the shared one 16 simdgroups of a threadgroup


@dataclass(frozen=True)
class Gated:
    """The three matrices of a SwiGLU: gate and up [..., N, K], down [..., K, N]."""

    gate: Matrix
    up: Matrix
    down: Matrix


def _with_scales(*names: str) -> tuple[str, ...]:
    return tuple(part for name in names for part in (name, f"{name}_scales", f"{name}_biases"))


SCORES = Kernel("expert_scores", ("x", *_with_scales("gate")), ("logits",), ("packed.h",))
SELECT = Kernel("expert_select", ("logits", "bias", "scale"), ("experts", "weights"))
GATE_UP = Kernel(
    "expert_gate_up",
    ("x", "experts", *_with_scales("gate", "up", "shared_gate", "shared_up")),
    ("h",),
    ("packed.h",),
)
DOWN = Kernel(
    "expert_down",
    ("h", "experts", "weights", *_with_scales("down", "shared_down")),
    ("y",),
    ("packed.h",),
)


def expert_scores(x: mx.array, gate: Matrix) -> mx.array:
    """x [B, K] of any float dtype, gate [E, K] -> logits [B, E] float32."""
    B, K = x.shape
    E = gate.rows
    (logits,) = SCORES(
        inputs=[x, *gate.buffers()],
        template=[("E", E), ("K", K), ("Bits", gate.bits), ("Group", gate.group_size)],
        grid=(32, E, B),
        threadgroup=(32, _groups(E), 1),
        output_shapes=[(B, E)],
        output_dtypes=[mx.float32],
    )
    return logits


def expert_select(
    logits: mx.array,
    bias: mx.array,
    top_k: int,
    groups: int,
    best_groups: int,
    renormalize: bool,
    scale: float,
) -> tuple[mx.array, mx.array]:
    """logits [B, E] float32, bias [E] float32 -> experts [B, k] int32, weights [B, k] float32."""
    B, E = logits.shape
    experts, weights = SELECT(
        inputs=[logits, bias, float(scale)],
        template=[
            ("E", E),
            ("TopK", top_k),
            ("Groups", groups),
            ("BestGroups", best_groups),
            ("Renormalize", renormalize),
        ],
        grid=(32, B, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(B, top_k), (B, top_k)],
        output_dtypes=[mx.int32, mx.float32],
    )
    return experts, weights


def expert_mlp(
    x: mx.array, experts: mx.array, weights: mx.array, routed: Gated, shared: Gated | None
) -> mx.array:
    """The weighted sum of the chosen experts and the shared one, in two launches.

    Args:
        x: [B, K]. experts: [B, k] int32. weights: [B, k] float32.
        routed: stacks [E, ...]. shared: single matrices.

    Returns:
        [B, K] in x's dtype.
    """
    B, K = x.shape
    top_k, N = experts.shape[1], routed.gate.rows
    beside = shared or routed  # named, and never read
    shared_N = shared.gate.rows if shared else 0
    sizes = [
        ("OutT", x.dtype),
        ("TopK", top_k),
        ("N", N),
        ("SharedN", shared_N),
    ]
    rows, slots = top_k * N + shared_N, top_k + (shared is not None)
    (h,) = GATE_UP(
        inputs=[x, experts]
        + [a for m in (routed.gate, routed.up, beside.gate, beside.up) for a in m.buffers()],
        template=[*sizes, ("K", K), *_storage(routed.gate, beside.gate)],
        grid=(32, rows // 4, B),
        threadgroup=(32, _groups(rows // 4), 1),
        output_shapes=[(B, rows)],
        output_dtypes=[x.dtype],
    )
    (y,) = DOWN(
        inputs=[h, experts, weights] + [a for m in (routed.down, beside.down) for a in m.buffers()],
        template=[*sizes, ("M", K), *_storage(routed.down, beside.down)],
        grid=(32, slots, B * K // 4),
        threadgroup=(32, slots, 1),
        output_shapes=[(B, K)],
        output_dtypes=[x.dtype],
    )
    return y


def refused(router: Matrix, routed: Gated, shared: Gated | None, top_k: int) -> str | None:
    """Why the kernels do not take these matrices; None: they do, for LARGEST_BATCH tokens."""
    if top_k > MOST_EXPERTS:
        return f"{top_k} experts a token are more than {MOST_EXPERTS}"
    matrices = [("router", router)]
    for mlp in (routed, shared) if shared else (routed,):
        if mlp.gate[3:] != mlp.up[3:]:
            return "gate and up are stored differently"
        matrices += [("gate", mlp.gate), ("up", mlp.up), ("down", mlp.down)]
    for name, matrix in matrices:
        if matrix.bits not in BITS:
            return f"{name} has {matrix.bits} bits, not 4, 8 or 16"
        if not matrix.is_affine:
            return f"{name} is quantized in another mode than affine"
        if matrix.columns % 8 or (matrix.rows % 4 and matrix is not router):
            return f"{name} is no multiple of 4 rows and 8 columns"
    return None


def _storage(routed: Matrix, shared: Matrix) -> list[tuple[str, int]]:
    return [
        ("Bits", routed.bits),
        ("Group", routed.group_size),
        ("SharedBits", shared.bits),
        ("SharedGroup", shared.group_size),
    ]


def _groups(simdgroups: int) -> int:
    """Simdgroups of a threadgroup: two where they come in pairs."""
    return 2 if simdgroups % 2 == 0 else 1
