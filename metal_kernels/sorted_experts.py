"""The routed experts of many tokens in three launches.

Pairs (token, slot) are sorted by expert, and each expert multiplies its own tokens, several at
a time: a weight is read and decoded once for those.

    h = silu(gate_e x) * (up_e x)      y = down_e h         for each expert e of each token

A matrix is decoded in registers, and no row of x is copied. A token gets the same bits whatever
other tokens are beside it, as long as they are so many that the same form is chosen.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import mlx.core as mx

from mlx_kimi.metal_kernels.experts import (
    SwiGLUWeights,
    expert_combine,
    times_each,
)
from mlx_kimi.metal_kernels.kernel import Kernel, not_running
from mlx_kimi.metal_kernels.matrix import Matrix, with_scales
from mlx_kimi.metal_kernels.tuning import ExpertForm, tuning

ORDER_THREADS = 512  # of a threadgroup: 16 simdgroups
TILES_THREADS = 128  # 4 simdgroups, of which each has 16 rows of gate and up, or 32 of down
VECTORS_SIMDGROUPS = 4  # of which each has 4 rows of gate and up, or 8 of down
VECTORS_TOKENS = 4  # of one expert
MULTIPLE = 64  # of rows and columns: a simdgroup's step


# --------------------------------------------------------------------------------------- the order
def naive_expert_order(experts: mx.array, E: int) -> tuple[mx.array, mx.array, mx.array]:
    """Sort pairs by expert, those of one expert in the order they come.

    Args:
        experts: [T, k] int32, below E.

    Returns:
        order [T * k] int32, the pair t * k + slot at each place; places [T, k] int32, the place of
        each pair; and starts [E + 1] int32, the place of each expert's first pair, then T * k.
    """
    flat = experts.reshape(-1)
    order = mx.argsort(flat)
    starts = (flat[None] < mx.arange(E + 1)[:, None]).sum(axis=1)
    places = mx.argsort(order).reshape(experts.shape)
    return order.astype(mx.int32), places.astype(mx.int32), starts.astype(mx.int32)


ORDER = Kernel("expert_order", ("experts", "pairs"), ("order", "places", "starts"))


def expert_order(experts: mx.array, E: int) -> tuple[mx.array, mx.array, mx.array]:
    """`naive_expert_order` in one launch."""
    order, places, starts = ORDER(
        inputs=[experts.astype(mx.int32), experts.size],
        template=[("E", E)],
        grid=(ORDER_THREADS, E, 1),
        threadgroup=(ORDER_THREADS, 1, 1),
        output_shapes=[(experts.size,), experts.shape, (E + 1,)],
        output_dtypes=[mx.int32] * 3,
    )
    return order, places, starts


# ------------------------------------------------------------------------------------- the products
def naive_sorted_gate_up(
    x: mx.array,
    order: mx.array,
    starts: mx.array,
    top_k: int,
    routed: SwiGLUWeights,
    shared: SwiGLUWeights | None,
) -> mx.array:
    """`silu(gate x) * (up x)` of each pair, then of the shared expert and each token.

    Args:
        x: [T, K]. order, starts: of T * top_k pairs, as `naive_expert_order` returns them, or of
            some of them.

    Returns:
        [T * top_k, N], sorted as `order` is; with a shared expert [T * top_k + T, N].
    """
    rows, experts = x[order // top_k], _sorted_ids(starts, order.size)
    gate, up = (times_each(rows[:, None], m, experts)[:, 0] for m in (routed.gate, routed.up))
    if shared is not None:
        gate = mx.concatenate([gate, shared.gate.times(x)])
        up = mx.concatenate([up, shared.up.times(x)])
    return gate * mx.sigmoid(gate) * up


def naive_sorted_down(
    h: mx.array, starts: mx.array, T: int, routed: SwiGLUWeights, shared: SwiGLUWeights | None
) -> mx.array:
    """`down h` of each row of h, as `naive_sorted_gate_up` returns them for T tokens."""
    pairs = len(h) - (T if shared else 0)
    y = times_each(h[:pairs, None], routed.down, _sorted_ids(starts, pairs))[:, 0]
    return y if shared is None else mx.concatenate([y, shared.down.times(h[pairs:])])


def _sorted_ids(starts: mx.array, pairs: int) -> mx.array:
    """The expert of each place: [pairs, 1]."""
    return (starts[1:] <= mx.arange(pairs)[:, None]).sum(axis=1, keepdims=True)


_FIRST = with_scales("gate", "up", "shared_gate", "shared_up")
_SECOND = with_scales("down", "shared_down")
_GIVEN: dict[str, Any] = {"inputs": ("x", "order", "starts", "T", *_FIRST), "outputs": ("h",)}
_THEN: dict[str, Any] = {"inputs": ("h", "starts", "T", *_SECOND), "outputs": ("y",)}
TILES_GATE_UP = Kernel("expert_tiles_gate_up", **_GIVEN, wide=(*_FIRST, "h"))
TILES_DOWN = Kernel("expert_tiles_down", **_THEN, wide=("h", *_SECOND, "y"))
VECTORS_GATE_UP = Kernel("expert_vectors_gate_up", **_GIVEN, wide=(*_FIRST, "h"))
VECTORS_DOWN = Kernel("expert_vectors_down", **_THEN, wide=("h", *_SECOND, "y"))


def sorted_experts(
    x: mx.array,
    experts: mx.array,
    routed: SwiGLUWeights,
    shared: SwiGLUWeights | None,
    form: ExpertForm,
) -> tuple[mx.array, mx.array]:
    """What each chosen expert says of its token, and the shared one.

    Args:
        x: [T, K]. experts: [T, k] int32.
        routed: stacks [E, ...] that `unsupported_reason` allows.
        shared: single matrices, `stored_alike`.
        form: which kernels multiply.

    Returns:
        y [T * k, K] in x's dtype, sorted by expert, behind which the shared expert's [T, K] stand;
        and places [T, k] int32, where those of each pair stand.
    """
    order, places, starts = expert_order(experts, routed.gate.weight.shape[0])
    return _sorted_mlp(x, order, starts, experts.shape[1], routed, shared, form), places


def _sorted_mlp(
    x: mx.array,
    order: mx.array,
    starts: mx.array,
    top_k: int,
    routed: SwiGLUWeights,
    shared: SwiGLUWeights | None,
    form: ExpertForm,
) -> mx.array:
    """Both launches."""
    h = sorted_gate_up(x, order, starts, top_k, routed, shared, form)
    return sorted_down(h, starts, len(x), routed, shared, form)


def sorted_gate_up(
    x: mx.array,
    order: mx.array,
    starts: mx.array,
    top_k: int,
    routed: SwiGLUWeights,
    shared: SwiGLUWeights | None,
    form: ExpertForm,
) -> mx.array:
    """`naive_sorted_gate_up` in one launch; order and starts as of `expert_order`."""
    (T, K), N, pairs = x.shape, routed.gate.rows, order.size
    in_tiles, beside = form.kernels == "tiles", shared or routed  # named, and never read
    matrices = (routed.gate, routed.up, beside.gate, beside.up)
    turns = _turns(starts, pairs, T if shared else 0, form)
    (h,) = (TILES_GATE_UP if in_tiles else VECTORS_GATE_UP)(
        inputs=[x, order, starts, T, *(array for m in matrices for array in m.buffers())],
        template=[
            *(("XT", x.dtype), *_tiles(form), ("Shared", shared is not None)),
            *(("E", starts.size - 1), ("TopK", top_k), ("K", K), ("N", N)),
            *(*routed.gate.storage("Gate"), *routed.up.storage("Up")),
        ],
        grid=(TILES_THREADS, -(-N // 64), turns) if in_tiles else (32, N // 4, turns),
        threadgroup=(TILES_THREADS, 1, 1) if in_tiles else (32, VECTORS_SIMDGROUPS, 1),
        output_shapes=[(pairs + (T if shared else 0), N)],
        output_dtypes=[x.dtype],
    )
    return h


def sorted_down(
    h: mx.array,
    starts: mx.array,
    T: int,
    routed: SwiGLUWeights,
    shared: SwiGLUWeights | None,
    form: ExpertForm,
) -> mx.array:
    """`naive_sorted_down` in one launch; starts as of `expert_order`, of T tokens."""
    (rows, N), M = h.shape, routed.down.rows
    in_tiles, beside = form.kernels == "tiles", shared or routed
    shared_rows = T if shared else 0
    turns = _turns(starts, rows - shared_rows, shared_rows, form)
    (y,) = (TILES_DOWN if in_tiles else VECTORS_DOWN)(
        inputs=[h, starts, T, *routed.down.buffers(), *beside.down.buffers()],
        template=[
            *(("XT", h.dtype), *_tiles(form), ("Shared", shared is not None)),
            *(("E", starts.size - 1), ("M", M), ("N", N), *routed.down.storage()),
        ],
        grid=(TILES_THREADS, -(-M // 128), turns) if in_tiles else (32, M // 8, turns),
        threadgroup=(TILES_THREADS, 1, 1) if in_tiles else (32, VECTORS_SIMDGROUPS, 1),
        output_shapes=[(rows, M)],
        output_dtypes=[h.dtype],
    )
    return y


def _tiles(form: ExpertForm) -> list[tuple[str, Any]]:
    """Template values of the tiles; vectors have none."""
    if form.kernels == "vectors":
        return []
    return [("Skip", tuning().skip_tiles), ("TokenTiles", form.tiles)]


def _turns(starts: mx.array, pairs: int, shared: int, form: ExpertForm) -> int:
    """At most so often an expert multiplies some of its pairs, however they are spread.

    `shared`: tokens of the shared expert.
    """
    at_a_time = 8 * form.tiles if form.kernels == "tiles" else VECTORS_TOKENS
    routed = min(pairs, -(-pairs // at_a_time) + starts.size - 2)
    return routed + -(-shared // at_a_time)


KERNELS = {
    "tiles": (ORDER, TILES_GATE_UP, TILES_DOWN),
    "vectors": (ORDER, VECTORS_GATE_UP, VECTORS_DOWN),
}


class ManyTokens:
    """The experts of more than a few tokens, in the form that suits this GPU."""

    def __init__(self, routed: SwiGLUWeights, shared: SwiGLUWeights | None, E: int) -> None:
        """`routed` may hold only some of all E experts: those of a rank, or in slots."""
        self.routed = routed
        self.shared = shared if shared and stored_alike(routed, shared) else None
        self.E = E
        numbers = routed.gate.weight if routed.gate.scales is None else routed.gate.scales
        self._most_tiles = 2 if numbers.dtype == mx.float32 else 4  # (of its registers)
        self._unsupported_reason = unsupported_reason(routed)

    def has_shared(self, tokens: int, top_k: int) -> bool:
        """Whether the shared expert is computed with the routed ones."""
        return self.shared is not None and self.form(tokens, top_k).shared

    def form(self, tokens: int, top_k: int) -> ExpertForm:
        """By how many tokens an average expert has, never by how many one has."""
        pairs = tokens * top_k / self.E
        form = next(form for form in reversed(tuning().experts) if form.pairs_from <= pairs)
        return form._replace(tiles=min(form.tiles, self._most_tiles))

    def first_tokens(self, top_k: int) -> list[int]:
        """The fewest tokens of each form that this GPU takes for some number of tokens."""
        fewest = (ceil(form.pairs_from * self.E / top_k) for form in tuning().experts)
        return sorted({max(tuning().largest_batch + 1, tokens) for tokens in fewest})

    def implementations(self, top_k: int) -> list[tuple[str, str, str]]:
        """Which implementation runs for how many tokens, and why: for `info --kernels`."""
        first, rows = self.first_tokens(top_k), []
        for tokens, following in zip(first, [*first[1:], 0], strict=True):
            of = f"{tokens} to {following - 1} tokens" if following else f"{tokens} tokens or more"
            form, reason = self.form(tokens, top_k), self.unsupported_reason(tokens, top_k)
            kernels = f"expert_select, expert_order, expert_{form.kernels}"
            at_a_time = 8 * form.tiles or VECTORS_TOKENS
            how = f"{at_a_time} tokens of an expert at a time"
            rows.append((of, "ops form", reason) if reason else (of, kernels, how))
        return rows

    def unsupported_reason(self, tokens: int, top_k: int) -> str | None:
        """Why MLX operations run instead; None: they do not."""
        form = self.form(tokens, top_k)
        if why := not_running(*KERNELS.get(form.kernels, ())):
            return why
        if tokens <= (few := tuning().largest_batch):
            return f"{tokens} tokens are not more than {few}"
        if form.kernels == "MLX":
            return "MLX's product is faster on this GPU"
        return self._unsupported_reason

    def __call__(
        self, x: mx.array, experts: mx.array, weights: mx.array, shared: mx.array | None
    ) -> mx.array:
        """The weighted sum of each token's experts, and the shared one.

        x [T, K]; experts, weights [T, k] -> [T, K]. `shared` [T, K]: the shared expert's output,
        unless `has_shared`; None: there is none.
        """
        form = self.form(*experts.shape)
        together = self.shared if form.shared else None
        y, places = sorted_experts(x, experts, self.routed, together, form)
        return expert_combine(y, places, weights, y[experts.size :] if together else shared)

    def wave(self, x: mx.array, order: mx.array, starts: mx.array, top_k: int) -> mx.array:
        """What some experts say of their tokens, where only those of the stacks are there.

        x [T, K]; order [n] int32 the pairs of a wave, by the place of their expert in the stacks,
        and starts [E + 1] int32 as of `expert_order` -> [n, K]. The same bits as of all at once.
        """
        form = self.form(len(x), top_k)
        return _sorted_mlp(x, order, starts, top_k, self.routed, None, form)

    def shared_alone(self, x: mx.array, top_k: int) -> mx.array:
        """What the shared expert, if `has_shared`, says of x [T, K]: the same bits as together."""
        assert self.shared is not None
        form = self.form(len(x), top_k)
        one = self.shared
        stacks = SwiGLUWeights(*map(_stack_of_one, (one.gate, one.up, one.down)))
        order, starts = mx.arange(len(x), dtype=mx.int32), mx.array([0, len(x)], mx.int32)
        return _sorted_mlp(x, order, starts, 1, stacks, None, form)


def _stack_of_one(matrix: Matrix) -> Matrix:
    weight, scales, biases = (None if part is None else part[None] for part in matrix[:3])
    assert weight is not None
    return matrix._replace(weight=weight, scales=scales, biases=biases)


def stored_alike(routed: SwiGLUWeights, shared: SwiGLUWeights) -> bool:
    """Whether a shared expert's matrices have the sizes and the format of each routed one's."""
    pairs = zip(
        (routed.gate, routed.up, routed.down), (shared.gate, shared.up, shared.down), strict=True
    )
    return all(
        stack.weight.shape[1:] == one.weight.shape
        and [x.dtype for x in stack.buffers()] == [x.dtype for x in one.buffers()]
        and stack[3:] == one[3:]  # group size, bits, mode
        for stack, one in pairs
    )


def unsupported_reason(routed: SwiGLUWeights) -> str | None:
    """Why the kernels do not take these matrices; None: they do."""
    for name, matrix in (("gate", routed.gate), ("up", routed.up), ("down", routed.down)):
        if why := matrix.unsupported_reason(name):
            return why
        if matrix.rows % MULTIPLE or matrix.columns % MULTIPLE:
            return (
                f"{name} has {matrix.rows} rows and {matrix.columns} columns, which are not both "
                f"multiples of {MULTIPLE}"
            )
    return None
