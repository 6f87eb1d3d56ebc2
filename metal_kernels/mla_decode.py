"""A token or a few of an MLA layer, between its input projection and its output projection.

Three launches: into the space of latents, attention in many splits, and back. What lies between
them is float32; the kernels round the new latents and the output, each once. Each text of a batch
has as many tokens, and each token attends to those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_kimi.metal_kernels.kernel import Kernel
from mlx_kimi.metal_kernels.latents import is_packed, unpack
from mlx_kimi.metal_kernels.matrix import Matrix, with_scales
from mlx_kimi.metal_kernels.split_kv import SEGMENTS, SplitKVPlan, multiple_of, sizes_in
from mlx_kimi.metal_kernels.tuning import AttendShape, tuning

OUTPUT_THREADS = 512
FEW = 8  # tokens of a text: each reads the latents for itself
MOST_SPLITS = 1024  # of mla_output; `positions_of_a_split` asks for at most about 550


class LatentWeights(NamedTuple):
    """What a layer brings to its decode step."""

    embed_q: Matrix  # [H, lora, nope]
    unembed_out: Matrix  # [H, v, lora]
    norm: mx.array  # [lora]
    eps: float
    scale: float

    @property
    def heads(self) -> int:
        return self.embed_q.weight.shape[0]

    @property
    def lora(self) -> int:
        return self.embed_q.rows

    @property
    def nope(self) -> int:
        return self.embed_q.columns

    def shared(self, width: int) -> int:
        """Channels of the shared key, where the input projection has `width` outputs."""
        return (width - self.lora - self.heads * self.nope) // (self.heads + 1)


def naive_mla_decode(
    x: mx.array,
    weights: LatentWeights,
    tail: mx.array,
    size: int,
    segments: Sequence[mx.array],
) -> tuple[mx.array, mx.array]:
    """Apply a layer to the next T tokens of each of B texts.

    Args:
        x: [B * T, H * (nope + shared) + lora + shared], the input projection: q_nope | q_shared of
            each head, then latent | shared key. A text's tokens are neighbours.
        tail: [B, room, lora + shared], of which the first size - 1 rows are the latest latents.
        size: of the tail, with the first new latent; there is room for all of them.
        segments: [B, S, lora + shared] each, the latents before, in x's dtype or packed.

    Returns:
        y [B * T, H * v] in x's dtype, for the output projection; the tail with the new latents.
    """
    T = len(x) // len(tail)
    if T > 1:
        outputs = []
        for t in range(T):
            y, tail = naive_mla_decode(x[t::T], weights, tail, size + t, segments)
            outputs.append(y)
        return mx.stack(outputs, axis=1).reshape(len(x), -1), tail
    B, H, lora = x.shape[0], weights.heads, weights.lora
    shared = weights.shared(x.shape[-1])
    width = lora + shared
    q, latent, key = mx.split(x, [x.shape[-1] - width, x.shape[-1] - shared], axis=-1)
    latent = mx.fast.rms_norm(latent, weights.norm.astype(x.dtype), weights.eps)
    new = mx.concatenate([latent, key], axis=-1)[:, None]
    tail = mx.concatenate([tail[:, : size - 1], new, tail[:, size:]], axis=1)
    plain = [unpack(s, width) if is_packed(s) else s.astype(mx.float32) for s in segments]
    latents = mx.concatenate([*plain, tail[:, :size].astype(mx.float32)], axis=1)  # [B, S, width]
    q_nope, q_shared = mx.split(q.reshape(B, H, -1), [weights.nope], axis=-1)
    q = mx.concatenate([weights.embed_q.times(q_nope[:, :, None])[:, :, 0], q_shared], axis=-1)
    scores = weights.scale * q.astype(mx.float32) @ latents.swapaxes(-1, -2)
    o = mx.softmax(scores, axis=-1) @ latents[..., :lora]  # [B, H, lora]
    y = weights.unembed_out.times(o[:, :, None].astype(x.dtype))
    return y.reshape(B, -1), tail


def mla_decode(
    x: mx.array,
    weights: LatentWeights,
    tail: mx.array,
    plan: SplitKVPlan,
    segments: Sequence[mx.array],
    shape: AttendShape | None = None,
) -> tuple[mx.array, mx.array]:
    """`naive_mla_decode` in three launches, for the sizes that `unsupported_reason` allows.

    `plan` says the size of the tail, for the first token. `shape` None: that of this GPU.
    """
    queries, tail = mla_query(x, weights, tail, plan)
    acc, m_and_l = mla_attend(queries, tail, plan, segments, weights.lora, shape)
    return mla_output(acc, m_and_l, weights, x.dtype), tail


# ------------------------------------------------------------------------ into the space of latents
def naive_mla_query(
    x: mx.array, weights: LatentWeights, tail: mx.array, plan: SplitKVPlan
) -> tuple[mx.array, mx.array]:
    """The scaled queries [B * T, H, lora + shared] float32, and the tail with the new latents.

    x and tail as of `naive_mla_decode`; `plan` counts the tail's latents with the first new one.
    """
    H, lora, T = weights.heads, weights.lora, len(x) // len(tail)
    shared = weights.shared(x.shape[-1])
    q, latent, key = mx.split(x, [-lora - shared, -shared], axis=-1)
    q_nope, q_shared = mx.split(q.reshape(len(x), H, -1), [weights.nope], axis=-1)
    absorbed = weights.embed_q.times(q_nope[:, :, None])[:, :, 0]
    queries = mx.concatenate([absorbed, q_shared], axis=-1).astype(mx.float32) * weights.scale
    latent = mx.fast.rms_norm(latent, weights.norm, weights.eps)
    new = mx.concatenate([latent, key], axis=-1).reshape(len(tail), T, lora + shared)
    number = mx.arange(tail.shape[1]) - (sizes_in(plan.arrays[0])[0] - 1)  # of the new latents
    is_new = ((number >= 0) & (number < T))[:, None]
    return queries, mx.where(is_new, new[:, mx.clip(number, 0, T - 1)], tail)


QUERY = Kernel(
    "mla_query",
    inputs=(
        *("x", *with_scales("embed"), "norm", "tail"),
        *("plan", "scale", "eps"),
    ),
    outputs=("queries", "new_tail"),
    wide=with_scales("embed"),
)


def mla_query(
    x: mx.array, weights: LatentWeights, tail: mx.array, plan: SplitKVPlan
) -> tuple[mx.array, mx.array]:
    """`naive_mla_query` in one launch."""
    rows, H, lora = x.shape[0], weights.heads, weights.lora
    shared = weights.shared(x.shape[-1])
    B, room, _ = tail.shape
    queries, tail = QUERY(
        inputs=[
            *(x, *weights.embed_q.buffers(), weights.norm),
            *(tail.astype(x.dtype), plan.arrays[0], weights.scale, weights.eps),
        ],
        template=[
            *(("H", H), ("Nope", weights.nope), ("Lora", lora), ("Shared", shared)),
            *(("Room", room), ("Segments", SEGMENTS)),
            *weights.embed_q.storage(),
        ],
        grid=(32, multiple_of(4, H * (lora // 4 + 1) + room), rows),
        threadgroup=(32, 4, 1),
        output_shapes=[(rows, H, lora + shared), tail.shape],
        output_dtypes=[mx.float32, x.dtype],
    )
    return queries, tail


# -------------------------------------------------------------------------- attention to the splits
def naive_mla_attend(
    queries: mx.array,
    tail: mx.array,
    plan: SplitKVPlan,
    segments: Sequence[mx.array],
    lora: int,
) -> tuple[mx.array, mx.array]:
    """The softmax of each split by itself, not yet divided by its sum.

    Where the splits lie is for the kernel to say: here each launch has all in its first split, and
    its others are empty, with m = -inf.

    Args:
        queries: [B * T, H, lora + shared] float32, scaled; tail and segments as of
            `naive_mla_decode`.

    Returns:
        acc [B * T, splits, H, lora] float32, the sum of exp(score - m) times the latents; and m,
        the largest score, with l, the sum of exp(score - m): [B * T, splits, H, 2] float32.
    """
    launches = [
        _all_in_one_split(
            queries, [tail, *segments[i * SEGMENTS : (i + 1) * SEGMENTS]], array, splits, lora
        )
        for i, (array, splits) in enumerate(zip(plan.arrays, plan.splits, strict=True))
    ]
    acc, m_and_l = (mx.concatenate(list(x), axis=1) for x in zip(*launches, strict=True))
    return acc, m_and_l


def _all_in_one_split(
    queries: mx.array, parts: Sequence[mx.array], array: mx.array, splits: int, lora: int
) -> tuple[mx.array, mx.array]:
    """`naive_mla_attend` to the tail and the segments of one launch."""
    (R, H, width), sizes, B = queries.shape, sizes_in(array), len(parts[0])
    queries = queries.reshape(B, R // B, H, width)
    later = mx.arange(R // B)[:, None, None]  # how many more of the tail each token sees
    scores, values = [], []
    for i, rows in enumerate(parts):
        latents = unpack(rows, width) if is_packed(rows) else rows.astype(mx.float32)
        latents = latents[:, None]  # [B, 1, S, width]
        here = queries @ latents.swapaxes(-1, -2)  # [B, T, H, S]
        size = mx.where(sizes[0] > 0, sizes[0] + later, 0) if i == 0 else sizes[i]
        scores.append(mx.where(mx.arange(latents.shape[2]) < size, here, -mx.inf))
        values.append(latents[..., :lora])
    joined = mx.concatenate(scores, axis=-1)
    m = joined.max(axis=-1, keepdims=True)
    probs = mx.exp(joined - m)
    acc = (probs @ mx.concatenate(values, axis=2)).reshape(R, 1, H, lora)
    m_and_l = mx.concatenate([m, probs.sum(axis=-1, keepdims=True)], axis=-1).reshape(R, 1, H, 2)
    empty = mx.broadcast_to(mx.array([-mx.inf, 0.0]), (R, splits - 1, H, 2))
    return (
        mx.concatenate([acc, mx.zeros((R, splits - 1, H, lora))], axis=1),
        mx.concatenate([m_and_l, empty], axis=1),
    )


_SEGMENT_NAMES = tuple(f"segment{i + 1}" for i in range(SEGMENTS))
ATTEND = Kernel(
    "mla_attend",
    inputs=("queries", "tail", *_SEGMENT_NAMES, "plan"),
    outputs=("acc", "m_and_l"),
    wide=("queries", "tail", *_SEGMENT_NAMES, "acc", "m_and_l"),
)


def mla_attend(
    queries: mx.array,
    tail: mx.array,
    plan: SplitKVPlan,
    segments: Sequence[mx.array],
    lora: int,
    shape: AttendShape | None = None,
) -> tuple[mx.array, mx.array]:
    """`naive_mla_attend` in a launch for every SEGMENTS segments.

    `shape` None: that of this GPU.
    """
    here = tuning().attend_packed if _are_packed(segments) else tuning().attend
    shape = _fitted(shape or here, queries.shape[1], lora)
    found = [
        _attend(
            queries,
            tail,
            array,
            splits,
            segments[i * SEGMENTS : (i + 1) * SEGMENTS],
            lora,
            shape,
        )
        for i, (array, splits) in enumerate(zip(plan.arrays, plan.splits, strict=True))
    ]
    if len(found) == 1:
        return found[0]
    acc, m_and_l = (mx.concatenate(list(parts), axis=1) for parts in zip(*found, strict=True))
    return acc, m_and_l


def _attend(
    queries: mx.array,
    tail: mx.array,
    plan: mx.array,
    splits: int,
    segments: Sequence[mx.array],
    lora: int,
    shape: AttendShape,
) -> tuple[mx.array, mx.array]:
    rows, H, width = queries.shape
    heads, channels, positions = shape
    threads = 32 * lora // channels
    absent = segments[0] if segments else tail
    acc, m_and_l = ATTEND(
        inputs=[queries, tail, *segments, *[absent] * (SEGMENTS - len(segments)), plan],
        template=[
            *(("TailT", tail.dtype), ("StoredT", absent.dtype), ("Packed", _are_packed(segments))),
            *(("H", H), ("Heads", heads), ("Lora", lora), ("Shared", width - lora)),
            *(("Channels", channels), ("Block", positions)),
            *(("Room", tail.shape[1]), ("Segments", SEGMENTS)),
        ],
        grid=(threads, splits, rows * -(-H // heads)),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, splits, H, lora), (rows, splits, H, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return acc, m_and_l


def _are_packed(segments: Sequence[mx.array]) -> bool:
    return bool(segments) and is_packed(segments[0])


def _fitted(shape: AttendShape, H: int, lora: int) -> AttendShape:
    """The shape for a layer of these sizes."""
    channels = 32 if lora % shape.channels else shape.channels
    return AttendShape(min(shape.heads, multiple_of(8, H)), channels, shape.positions)


# ------------------------------------------------------------------- back from the space of latents
def naive_mla_output(
    acc: mx.array, m_and_l: mx.array, weights: LatentWeights, dtype: mx.Dtype
) -> mx.array:
    """All splits merged to one softmax, and each head's values of it: [B, H * v].

    acc and m_and_l as `naive_mla_attend` returns them.
    """
    m, total = mx.split(m_and_l, 2, axis=-1)
    e = mx.exp(m - m.max(axis=1, keepdims=True))
    latent = (e * acc).sum(axis=1) / (e * total).sum(axis=1)
    y = weights.unembed_out.times(latent[:, :, None].astype(dtype))
    return y.reshape(len(y), -1)


OUTPUT = Kernel(
    "mla_output",
    inputs=("acc", "m_and_l", *with_scales("unembed"), "splits"),
    outputs=("y",),
    wide=("acc", "m_and_l", *with_scales("unembed")),
)


def mla_output(
    acc: mx.array, m_and_l: mx.array, weights: LatentWeights, dtype: mx.Dtype
) -> mx.array:
    """`naive_mla_output` in one launch."""
    B, splits, H, lora = acc.shape
    if splits > MOST_SPLITS:
        raise ValueError(
            f"[mla_output] acc must have at most {MOST_SPLITS} splits but has {splits}."
        )
    matrix = weights.unembed_out
    (y,) = OUTPUT(
        inputs=[acc, m_and_l, *matrix.buffers(), splits],
        template=[
            *(("OutT", dtype), ("H", H), ("Lora", lora), ("V", matrix.rows)),
            *(("Threads", OUTPUT_THREADS), ("MostSplits", MOST_SPLITS)),
            *matrix.storage(),
        ],
        grid=(OUTPUT_THREADS, H, B),
        threadgroup=(OUTPUT_THREADS, 1, 1),
        output_shapes=[(B, H * matrix.rows)],
        output_dtypes=[dtype],
    )
    return y


KERNELS = (QUERY, ATTEND, OUTPUT)


def unsupported_reason(weights: LatentWeights, width: int) -> str | None:
    """Why `mla_decode` does not take a layer whose input projection has `width` outputs."""
    shared = weights.shared(width)
    if weights.lora % 32 or not 0 < weights.lora <= 512:
        return f"kv_lora_rank = {weights.lora} is not a multiple of 32 up to 512"
    for name, size in (("qk_nope_head_dim", weights.nope), ("qk_rope_head_dim", shared)):
        if size % 8 or size < 8:
            return f"{name} = {size} is not a multiple of 8"
    if weights.unembed_out.rows % 4:
        return f"v_head_dim = {weights.unembed_out.rows} is not a multiple of 4"
    for name in ("embed_q", "unembed_out"):
        matrix = getattr(weights, name)
        if why := matrix.unsupported_reason(name):
            return why
    return None
