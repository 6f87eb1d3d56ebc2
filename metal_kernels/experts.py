"""The experts of a few tokens in four launches, from the residual sum before to the weighted sum.

    s = x + part      normed = s / sqrt(mean(s^2) + eps) * weight      logits = gate normed
    experts, weights = the best of sigmoid(logits) + bias, and their sigmoid(logits)
    h = silu(gate_e normed) * (up_e normed)       of each chosen expert e, and of the shared one
    y = sum over e of weights_e down_e h_e        and down h of the shared expert

`expert_gate_up` and `expert_down` read the matrices where they lie, gate and up as two buffers and
the shared expert as inputs of its own, which may be stored with other bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import mlx.core as mx

from mlx_kimi.metal_kernels.add_norm import naive_add_norm
from mlx_kimi.metal_kernels.fused import fused
from mlx_kimi.metal_kernels.kernel import Kernel, not_running
from mlx_kimi.metal_kernels.matmul import gather_times_transposed
from mlx_kimi.metal_kernels.matrix import Matrix, with_scales

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


# ----------------------------------------------------------------------- the norm and the scores
def naive_add_norm_scores(
    x: mx.array, part: mx.array, weight: mx.array, eps: float, gate: Matrix
) -> tuple[mx.array, mx.array, mx.array]:
    """`naive_add_norm` of x, part [B, W], and how well each expert suits a token.

    gate is [E, W]. Returns sum and normed [B, W] in x's dtype, and logits [B, E] float32.
    """
    total, normed = naive_add_norm(x, part, weight, eps)
    return total, normed, gate.times(normed.astype(mx.float32))


ADD_NORM_SCORES = Kernel(
    "add_norm_scores",
    inputs=("x", "part", "weight", "eps", *with_scales("gate")),
    outputs=("sum", "normed", "logits"),
    wide=with_scales("gate"),
)


def add_norm_scores(
    x: mx.array, part: mx.array, weight: mx.array, eps: float, gate: Matrix
) -> tuple[mx.array, mx.array, mx.array]:
    """`naive_add_norm_scores` in one launch."""
    B, W = x.shape
    E = gate.rows
    total, normed, logits = ADD_NORM_SCORES(
        inputs=[x, part, weight, eps, *gate.buffers()],
        template=[
            *(("OutT", x.dtype), ("E", E), ("W", W), ("Experts", SCORED)),
            *gate.storage(),
        ],
        grid=(32 * SCORED, -(-E // SCORED), B),
        threadgroup=(32 * SCORED, 1, 1),
        output_shapes=[(B, W), (B, W), (B, E)],
        output_dtypes=[x.dtype, x.dtype, mx.float32],
    )
    return total, normed, logits


# -------------------------------------------------------------------------------------- the choice
@fused()
def naive_expert_select(
    logits: mx.array,
    bias: mx.array,
    top_k: int,
    groups: int,
    best_groups: int,
    renormalize: bool,
    scale: float,
) -> tuple[mx.array, mx.array]:
    """logits [..., E] float32, bias [E] -> experts [..., k], best first, weights [..., k] float32.

    The bias decides who is chosen; the weights are the scores without it, scaled.
    """
    scores = mx.sigmoid(logits)
    biased = scores + bias
    if groups > 1:
        biased = _within_best_groups(biased, groups, best_groups)
    experts = mx.argsort(-biased, axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, experts, axis=-1)
    if renormalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return experts, weights * scale


def _within_best_groups(biased: mx.array, groups: int, best_groups: int) -> mx.array:
    """Drop the experts outside the best groups; a group is as good as its best two experts."""
    grouped = biased.reshape(*biased.shape[:-1], groups, -1)
    value = mx.topk(grouped, 2, axis=-1).sum(axis=-1, keepdims=True)  # [B, T, G, 1]
    ranks = mx.argsort(mx.argsort(-value, axis=-2), axis=-2)
    return mx.where(ranks < best_groups, grouped, -mx.inf).reshape(biased.shape)


SELECT = Kernel("expert_select", ("logits", "bias", "scale"), ("experts", "weights"))


def expert_select(
    logits: mx.array,
    bias: mx.array,
    top_k: int,
    groups: int,
    best_groups: int,
    renormalize: bool,
    scale: float,
) -> tuple[mx.array, mx.array]:
    """`naive_expert_select` of logits [B, E] in one launch; experts are int32."""
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


# ------------------------------------------------------------------------------------- the experts
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
    h = expert_gate_up(x, experts, routed, shared)
    return expert_down(h, experts, weights, routed, shared)


def naive_expert_gate_up(
    x: mx.array, experts: mx.array, routed: SwiGLUWeights, shared: SwiGLUWeights | None
) -> mx.array:
    """`silu(gate x) * (up x)` of each chosen expert, in router order, then of the shared one.

    Arguments as of `expert_mlp`. Returns [B, k * N + shared N].
    """
    rows = mx.broadcast_to(x[:, None], (*experts.shape, x.shape[-1]))
    gate, up = (
        times_each(rows, matrix, experts).reshape(len(x), -1) for matrix in (routed.gate, routed.up)
    )
    if shared is not None:
        gate = mx.concatenate([gate, shared.gate.times(x)], axis=-1)
        up = mx.concatenate([up, shared.up.times(x)], axis=-1)
    return gate * mx.sigmoid(gate) * up


def naive_expert_down(
    h: mx.array,
    experts: mx.array,
    weights: mx.array,
    routed: SwiGLUWeights,
    shared: SwiGLUWeights | None,
) -> mx.array:
    """The weighted sum of `down h` over the chosen experts, and `down h` of the shared one.

    h [B, k * N + shared N] as `naive_expert_gate_up` returns it, all else as of `expert_mlp`.
    """
    (B, k), N = experts.shape, routed.down.columns
    parts = times_each(h[:, : k * N].reshape(B, k, N), routed.down, experts)
    y = (parts * weights[..., None]).sum(axis=1)
    return y if shared is None else y + shared.down.times(h[:, k * N :])


def times_each(x: mx.array, stack: Matrix, experts: mx.array) -> mx.array:
    """x [B, k, in] times the matrix of each of a token's experts [B, k] -> [B, k, out]."""
    w, scales, biases, group, bits, mode = stack
    if not bits:
        y = gather_times_transposed(x[:, :, None], w, experts, sorted_indices=False)
    else:
        y = mx.gather_qmm(
            x[:, :, None],
            *(w, scales, biases, None, experts, True),
            group_size=group,
            bits=bits,
            mode=mode,
        )
    return y[:, :, 0]


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


def expert_gate_up(
    x: mx.array, experts: mx.array, routed: SwiGLUWeights, shared: SwiGLUWeights | None
) -> mx.array:
    """`naive_expert_gate_up` in one launch."""
    B, K = x.shape
    top_k, N = experts.shape[1], routed.gate.rows
    beside = shared or routed  # named, and never read
    shared_N = shared.gate.rows if shared else 0
    rows = top_k * N + shared_N
    matrices = (routed.gate, routed.up, beside.gate, beside.up)
    (h,) = GATE_UP(
        inputs=[x, experts, *(array for matrix in matrices for array in matrix.buffers())],
        template=[
            *(("OutT", x.dtype), ("TopK", top_k), ("N", N), ("SharedN", shared_N)),
            ("K", K),
            *(*routed.gate.storage("Gate"), *routed.up.storage("Up")),
            *(*beside.gate.storage("SharedGate"), *beside.up.storage("SharedUp")),
        ],
        grid=(32, rows // 4, B),
        threadgroup=(32, _simdgroups(rows // 4), 1),
        output_shapes=[(B, rows)],
        output_dtypes=[x.dtype],
    )
    return h


def expert_down(
    h: mx.array,
    experts: mx.array,
    weights: mx.array,
    routed: SwiGLUWeights,
    shared: SwiGLUWeights | None,
) -> mx.array:
    """`naive_expert_down` in one launch."""
    (B, top_k), K, N = experts.shape, routed.down.rows, routed.down.columns
    beside = shared or routed  # named, and never read
    slots = top_k + (shared is not None)
    (y,) = DOWN(
        inputs=[h, experts, weights, *routed.down.buffers(), *beside.down.buffers()],
        template=[
            *(("OutT", h.dtype), ("TopK", top_k), ("N", N)),
            *(("SharedN", shared.down.columns if shared else 0), ("M", K)),
            *(*routed.down.storage(), *beside.down.storage("Shared")),
        ],
        grid=(32, slots, B * K // 4),
        threadgroup=(32, slots, 1),
        output_shapes=[(B, K)],
        output_dtypes=[h.dtype],
    )
    return y


def _simdgroups(work: int) -> int:
    """Simdgroups of a threadgroup: two where they come in pairs."""
    return 2 if work % 2 == 0 else 1


KERNELS = (ADD_NORM_SCORES, SELECT, GATE_UP, DOWN)


def unsupported_reason(
    router: Matrix, routed: SwiGLUWeights, shared: SwiGLUWeights | None, top_k: int
) -> str | None:
    """Why the four kernels do not take these matrices; None: they do, for a few tokens."""
    if top_k > MOST_EXPERTS:
        return f"{top_k} experts a token are more than {MOST_EXPERTS}"
    if why := router_unsupported_reason(router):
        return why
    for mlp in (routed, shared) if shared else (routed,):
        for name, matrix in (("gate", mlp.gate), ("up", mlp.up), ("down", mlp.down)):
            if why := _matrix_unsupported_reason(name, matrix, rows=4):
                return why
    return None


def router_unsupported_reason(router: Matrix) -> str | None:
    """Why `add_norm_scores` does not take a router; None: it does."""
    if router.columns > WIDEST:
        return f"a token of {router.columns} elements is wider than {WIDEST}"
    return _matrix_unsupported_reason("router", router, rows=1)


def _matrix_unsupported_reason(name: str, matrix: Matrix, rows: int) -> str | None:
    """`rows`: that a simdgroup takes."""
    if why := matrix.unsupported_reason(name):
        return why
    if matrix.bits and matrix.scales.size < FEWEST_SCALES:
        return f"{name} has only {matrix.scales.size} scales"
    if matrix.rows % rows or matrix.columns % 8:
        return f"{name} is no multiple of 4 rows and 8 columns"
    return None


# ------------------------------------------------------------------------ the sum of sorted experts
def naive_expert_combine(
    y: mx.array, places: mx.array | None, weights: mx.array, shared: mx.array | None
) -> mx.array:
    """Each token's weighted sum of its experts' outputs, and the shared expert's.

    Args:
        y: [N * k, W], in any order. places: [N, k] int32, where a token's outputs stand in y; None:
            they stand one token after another, in router order.
        weights: [N, k] float32. shared: [N, W] in y's dtype.

    Returns:
        [N, W] in y's dtype.
    """
    each = y.reshape(*weights.shape, -1) if places is None else y[places]  # [N, k, W]
    total = (each * mx.expand_dims(weights, -1)).sum(axis=-2).astype(y.dtype)
    return total if shared is None else total + shared


COMBINE = Kernel(
    "expert_combine",
    inputs=("y", "places", "weights", "shared"),
    outputs=("combined",),
    wide=("y", "shared", "combined"),
)


def expert_combine(
    y: mx.array, places: mx.array | None, weights: mx.array, shared: mx.array | None
) -> mx.array:
    """`naive_expert_combine`, in one launch where kernels run and W is a multiple of 4.

    The kernel sums in float32, in router order, and rounds once.
    """
    W = y.shape[-1]
    if W % 4 or not_running(COMBINE):
        return naive_expert_combine(y, places, weights, shared)
    N, top_k = weights.shape
    if places is None:
        places = mx.arange(N * top_k).reshape(N, top_k)
    (combined,) = COMBINE(
        inputs=[y, places.astype(mx.int32), weights, y if shared is None else shared],
        template=[("TopK", top_k), ("W", W), ("Shared", shared is not None)],
        grid=(W // 4, N, 1),
        threadgroup=(gcd(W // 4, 256), 1, 1),
        output_shapes=[(N, W)],
        output_dtypes=[y.dtype],
    )
    return combined
