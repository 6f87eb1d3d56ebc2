"""The experts of a few tokens in four launches, from the residual sum before to the weighted sum.

One adds, normalises and scores, one chooses, one is gate and up, one down and the weighted sum.

`expert_gate_up` and `expert_down` read the matrices where they lie, gate and up as two buffers and
the shared expert as inputs of its own, which may be stored with other bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import mlx.core as mx

from mlx_kimi.metal_kernels.kernel import Kernel, backend
from mlx_kimi.metal_kernels.matrix import Matrix, with_scales

LARGEST_BATCH = 8  # tokens; beyond it sorting by expert reads less
BITS = (0, 4, 8)  # 0: plain
SCORED = 4  # experts of a threadgroup of add_norm_scores: 64 threadgroups for 256
WIDEST = 7168  # elements of a token, which add_norm_scores keeps in 28 of a threadgroup's 32 KB
FEWEST_SCALES = 8  # MLX passes a smaller array in Metal's constant address space
MOST_EXPERTS = 15  # of a token: with the shared one 16 simdgroups of a threadgroup


@dataclass(frozen=True)
class SwiGLUWeights:
    """The three matrices of a SwiGLU: gate and up [..., N, K], down [..., K, N]."""

    gate: Matrix
    up: Matrix
    down: Matrix


SCORES = Kernel(
    "add_norm_scores",
    inputs=("x", "part", "weight", "eps", *with_scales("gate")),
    outputs=("sum", "normed", "logits"),
    wide=with_scales("gate"),
)
SELECT = Kernel("expert_select", ("logits", "bias", "scale"), ("experts", "weights"))
_FIRST, _SECOND = ("gate", "up", "shared_gate", "shared_up"), ("down", "shared_down")
GATE_UP = Kernel(
    "expert_gate_up",
    inputs=("x", "experts", *with_scales(*_FIRST)),
    outputs=("h",),
    wide=with_scales(*_FIRST),
)
DOWN = Kernel(
    "expert_down",
    inputs=("h", "experts", "weights", *with_scales(*_SECOND)),
    outputs=("y",),
    wide=with_scales(*_SECOND),
)
COMBINE = Kernel(
    "expert_combine",
    inputs=("y", "places", "weights", "shared"),
    outputs=("combined",),
    wide=("y", "shared", "combined"),
)


def expert_combine(
    y: mx.array, places: mx.array, weights: mx.array, shared: mx.array | None
) -> mx.array:
    """Each token's weighted sum of its experts' outputs, and the shared expert's.

    Args:
        y: [N * k, W], in any order. places: [N, k] int32, where a token's outputs stand in y.
        weights: [N, k] float32. shared: [N, W] in y's dtype.

    Returns:
        [N, W] in y's dtype, summed in float32 in router order.
    """
    W = y.shape[-1]
    if backend() is None or W % 4:
        total = (y[places] * weights[..., None]).sum(axis=-2).astype(y.dtype)
        return total if shared is None else total + shared
    N, top_k = places.shape
    (combined,) = COMBINE(
        inputs=[y, places.astype(mx.int32), weights, y if shared is None else shared],
        template=[("TopK", top_k), ("W", W), ("Shared", shared is not None)],
        grid=(W // 4, N, 1),
        threadgroup=(gcd(W // 4, 256), 1, 1),
        output_shapes=[(N, W)],
        output_dtypes=[y.dtype],
    )
    return combined


def add_norm_scores(
    x: mx.array, part: mx.array, weight: mx.array, eps: float, gate: Matrix
) -> tuple[mx.array, mx.array, mx.array]:
    """`naive_add_norm` of x, part [B, W], and how well each expert suits a token.

    gate is [E, W]. Returns sum and normed [B, W] in x's dtype, and logits [B, E] float32.
    """
    B, W = x.shape
    E = gate.rows
    total, normed, logits = SCORES(
        inputs=[x, part, weight, eps, *gate.buffers()],
        template=[
            *(("OutT", x.dtype), ("E", E), ("W", W), ("Experts", SCORED)),
            *(("Bits", gate.bits), ("Group", gate.group_size)),
        ],
        grid=(32 * SCORED, -(-E // SCORED), B),
        threadgroup=(32 * SCORED, 1, 1),
        output_shapes=[(B, W), (B, W), (B, E)],
        output_dtypes=[x.dtype, x.dtype, mx.float32],
    )
    return total, normed, logits


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
    x: mx.array,
    experts: mx.array,
    weights: mx.array,
    routed: SwiGLUWeights,
    shared: SwiGLUWeights | None,
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


def refused(
    router: Matrix, routed: SwiGLUWeights, shared: SwiGLUWeights | None, top_k: int
) -> str | None:
    """Why the kernels do not take these matrices; None: they do, for LARGEST_BATCH tokens."""
    if top_k > MOST_EXPERTS:
        return f"{top_k} experts a token are more than {MOST_EXPERTS}"
    if router.columns > WIDEST:
        return f"a token of {router.columns} elements is wider than {WIDEST}"
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
        if matrix.bits and matrix.scales.size < FEWEST_SCALES:
            return f"{name} has only {matrix.scales.size} scales"
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
