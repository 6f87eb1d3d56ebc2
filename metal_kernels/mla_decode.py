"""A token or a few of an MLA layer, between its input projection and its output projection.

Three launches: into the space of latents, attention in many splits, and back. What lies between
them is float32; the kernels round the new latents and the output, each once. Each text of a batch
has as many tokens, and each token attends to those before it in its own text, however long that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from mlx_kimi.metal_kernels.kernel import Kernel
from mlx_kimi.metal_kernels.latents import is_packed, unpack
from mlx_kimi.metal_kernels.matrix import Matrix, with_scales
from mlx_kimi.metal_kernels.split_kv import (
    MOST_SPLITS,
    SEGMENTS,
    SplitKVPlan,
    Splits,
    multiple_of,
    places_of,
)
from mlx_kimi.metal_kernels.tuning import AttendShape, tuning

OUTPUT_THREADS = 512


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

    Texts may have unlike contexts: `plan` says how many latents each tail holds, and which rows of
    `segments` [..., rows, row] are whose. `shape` None: that of this GPU.
    """
    queries, tail = mla_query(x, weights, tail, plan)
    acc, m_and_l = mla_attend(queries, tail, plan, segments, weights.lora, shape)
    return mla_output(acc, m_and_l, plan, weights, x.dtype), tail


# ------------------------------------------------------------------------ into the space of latents
def naive_mla_query(
    x: mx.array, weights: LatentWeights, tail: mx.array, plan: SplitKVPlan
) -> tuple[mx.array, mx.array]:
    """The scaled queries [B * T, H, lora + shared] float32, and the tail with the new latents.

    x and tail as of `naive_mla_decode`; `plan` counts a tail's latents with the first new one.
    """
    H, lora, B, T = weights.heads, weights.lora, len(tail), len(x) // len(tail)
    shared = weights.shared(x.shape[-1])
    q, latent, key = mx.split(x, [-lora - shared, -shared], axis=-1)
    q_nope, q_shared = mx.split(q.reshape(len(x), H, -1), [weights.nope], axis=-1)
    absorbed = weights.embed_q.times(q_nope[:, :, None])[:, :, 0]
    queries = mx.concatenate([absorbed, q_shared], axis=-1).astype(mx.float32) * weights.scale
    latent = mx.fast.rms_norm(latent, weights.norm, weights.eps)
    new = mx.concatenate([latent, key], axis=-1).reshape(B, T, lora + shared)
    # Of the new latents, [B, room, 1].
    number = (mx.arange(tail.shape[1]) - (plan.texts[2 : 2 + B, None] - 1))[..., None]
    placed = mx.take_along_axis(new, mx.clip(number, 0, T - 1), axis=1)
    return queries, mx.where((number >= 0) & (number < T), placed, tail)


QUERY = Kernel(
    "mla_query",
    inputs=(
        *("x", *with_scales("embed"), "norm", "tail"),
        *("texts", "scale", "eps"),
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
            *(tail.astype(x.dtype), plan.texts, weights.scale, weights.eps),
        ],
        template=[
            *(("H", H), ("Nope", weights.nope), ("Lora", lora), ("Shared", shared)),
            ("Room", room),
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

    Args:
        queries: [B * T, H, lora + shared] float32, scaled; tail as of `naive_mla_decode`.
        segments: [..., rows, row] each, plain in any float dtype, or packed.

    Returns:
        acc [splits, T, H, lora] float32, the sum of exp(score - m) times the latents; and m, the
        largest score, with l, the sum of exp(score - m): [splits, T, H, 2] float32. Splits are
        those of one launch after another, `plan.capacities`; m of an empty one is -inf.
    """
    launches = [
        _naive_splits(
            queries,
            tail,
            Splits.of(array, capacity),
            segments[i * SEGMENTS : (i + 1) * SEGMENTS],
            lora,
        )
        for i, (array, capacity) in enumerate(zip(plan.launches, plan.capacities, strict=True))
    ]
    acc, m_and_l = (mx.concatenate(list(x)) for x in zip(*launches, strict=True))
    return acc, m_and_l


def _naive_splits(
    queries: mx.array, tail: mx.array, splits: Splits, segments: Sequence[mx.array], lora: int
) -> tuple[mx.array, mx.array]:
    """`naive_mla_attend` of one launch: each split is a mask over all rows of all arrays."""
    (R, H, width), (B, room, _) = queries.shape, tail.shape
    rows = [tail.astype(mx.float32).reshape(-1, width), *(_plain(x, width) for x in segments)]
    firsts = mx.array([0, *accumulate(len(x) for x in rows[:-1])])  # of each array
    latents = mx.concatenate(rows)  # [N, width]
    queries = queries.reshape(B, R // B, H, width)[splits.text]  # [splits, T, H, width]
    first = firsts[splits.array] + splits.start + mx.where(splits.array > 0, 0, splits.text * room)
    count = mx.minimum(splits.size[:, None], splits.seen[:, None] + mx.arange(R // B))
    number = mx.arange(len(latents)) - first[:, None]  # [splits, N]
    seen = ((number >= 0)[:, None] & (number[:, None] < count[..., None]))[:, :, None]
    # (What no split reaches may be no number.)
    latents = mx.where(seen.any(axis=(0, 1, 2))[:, None], latents, 0)
    scores = mx.where(seen, queries @ latents.swapaxes(0, 1), -mx.inf)
    m = scores.max(axis=-1, keepdims=True)
    probs = mx.where(seen, mx.exp(scores - m), 0)
    acc = probs @ latents[:, :lora]
    return acc, mx.concatenate([m, probs.sum(axis=-1, keepdims=True)], axis=-1)


def _plain(rows: mx.array, width: int) -> mx.array:
    """[N, width] float32."""
    plain = unpack(rows, width) if is_packed(rows) else rows.astype(mx.float32)
    return plain.reshape(-1, width)


_SEGMENT_NAMES = tuple(f"segment{i + 1}" for i in range(SEGMENTS))
ATTEND = Kernel(
    "mla_attend",
    inputs=("queries", "tail", *_SEGMENT_NAMES, "splits"),
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
            capacity,
            segments[i * SEGMENTS : (i + 1) * SEGMENTS],
            lora,
            shape,
        )
        for i, (array, capacity) in enumerate(zip(plan.launches, plan.capacities, strict=True))
    ]
    if len(found) == 1:
        return found[0]
    acc, m_and_l = (mx.concatenate(list(parts)) for parts in zip(*found, strict=True))
    return acc, m_and_l


def _attend(
    queries: mx.array,
    tail: mx.array,
    splits: mx.array,
    capacity: int,
    segments: Sequence[mx.array],
    lora: int,
    shape: AttendShape,
) -> tuple[mx.array, mx.array]:
    R, H, width = queries.shape
    T = R // len(tail)
    heads, channels, positions = shape
    threads = 32 * lora // channels
    absent = segments[0] if segments else tail
    acc, m_and_l = ATTEND(
        inputs=[queries, tail, *segments, *[absent] * (SEGMENTS - len(segments)), splits],
        template=[
            *(("TailT", tail.dtype), ("StoredT", absent.dtype), ("Packed", _are_packed(segments))),
            *(("H", H), ("Heads", heads), ("Lora", lora), ("Shared", width - lora)),
            *(("Channels", channels), ("Block", positions)),
            ("Room", tail.shape[1]),
        ],
        grid=(threads, capacity, T * -(-H // heads)),
        threadgroup=(threads, 1, 1),
        output_shapes=[(capacity, T, H, lora), (capacity, T, H, 2)],
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
    acc: mx.array, m_and_l: mx.array, plan: SplitKVPlan, weights: LatentWeights, dtype: mx.Dtype
) -> mx.array:
    """All splits of a text merged to one softmax, and each head's values of it: [B * T, H * v].

    acc and m_and_l as `naive_mla_attend` returns them.
    """
    T, H, lora = acc.shape[1:]
    texts = []
    for places, own in places_of(plan.texts, plan.count):
        m, total = mx.split(m_and_l[places], 2, axis=-1)  # [splits, T, H, 1]
        m = mx.where(own[:, None, None, None], m, -mx.inf)
        e = mx.exp(m - m.max(axis=0, keepdims=True))
        found = mx.where(e > 0, e * acc[places], 0).sum(axis=0)
        texts.append(found / mx.where(e > 0, e * total, 0).sum(axis=0))
    latent = mx.stack(texts).reshape(-1, H, 1, lora)
    y = weights.unembed_out.times(latent.astype(dtype))
    return y.reshape(len(texts) * T, -1)


OUTPUT = Kernel(
    "mla_output",
    inputs=("acc", "m_and_l", *with_scales("unembed"), "texts"),
    outputs=("y",),
    wide=("acc", "m_and_l", *with_scales("unembed")),
)


def mla_output(
    acc: mx.array, m_and_l: mx.array, plan: SplitKVPlan, weights: LatentWeights, dtype: mx.Dtype
) -> mx.array:
    """`naive_mla_output` in one launch."""
    T, H, lora = acc.shape[1:]
    rows, matrix = plan.count * T, weights.unembed_out
    (y,) = OUTPUT(
        inputs=[acc, m_and_l, *matrix.buffers(), plan.texts],
        template=[
            *(("OutT", dtype), ("H", H), ("Lora", lora), ("V", matrix.rows)),
            *(("Threads", OUTPUT_THREADS), ("MostSplits", MOST_SPLITS)),
            *matrix.storage(),
        ],
        grid=(OUTPUT_THREADS, H, rows),
        threadgroup=(OUTPUT_THREADS, 1, 1),
        output_shapes=[(rows, H * matrix.rows)],
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
