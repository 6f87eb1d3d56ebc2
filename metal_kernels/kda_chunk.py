"""The delta rule over chunks of tokens at once, in matrix products (arXiv 2510.26692, section 3.1).

Within a chunk of C tokens, with P_i the product of the decays up to token i (inclusive) and R_j the
product of those after token j, both a vector over the channels:

    A_ij = beta_i sum_d k_id k_jd prod_{m=j+1..i} alpha_md   for j < i     (I + A)^-1 diag(beta) = T
    M_ij =        sum_d q_id k_jd prod_{m=j+1..i} alpha_md   for j <= i
    D = T (V - (P k) S)      O = (P q) S + M D      S <- diag(P_C) S + (R k)^T D

A decay between two tokens is only ever a product of decays, each in [0, 1]. Nothing is divided by
a decay and no positive exponent exists, so gates of any strength are exact: what underflows is
forgotten.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import mlx.core as mx

from mlx_kimi.metal_kernels import kda_sequential
from mlx_kimi.metal_kernels.kernel import Kernel
from mlx_kimi.metal_kernels.tuning import tuning

CHUNK = 16  # tokens; larger chunks multiply more than they save (measured on CPU: 16 <= 32 < 64)
SEGMENT = 2048  # tokens between which the kernels hand over: 29 KB each at 32 heads of 128
SIZES = (64, 128)


class Chunks(NamedTuple):
    """What the scan over chunks needs; leading axes [N, B, H]."""

    queries: mx.array  # P q, then P k below it: [..., 2C, Dk]
    keys: mx.array  # R k, transposed: [..., Dk, C]
    values: mx.array  # [..., C, Dv]
    decay: mx.array  # P_C: [..., Dk, 1]
    solve: mx.array  # T: [..., C, C]
    mix: mx.array  # M: [..., C, C]


def kda_chunk(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    alpha: mx.array,
    beta: mx.array,
    state: mx.array,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """`naive_kda` for many tokens: same arguments, same results, no loop over tokens.

    A chunk is a power of two; the last one is filled up with padding (no decay, no write).
    """
    B, T, H, _ = q.shape
    chunk = min(chunk, 1 << (T - 1).bit_length())
    q, k, v, beta = (_chunked(x, chunk) for x in (q, k, v, beta[..., None]))
    parts = _prepare(q, k, v, _chunked(alpha, chunk, fill=1.0), beta)
    # [B, H, Dk, Dv] in the scan: products with a transposed right side are twice as slow on CPU.
    S = mx.contiguous(state.swapaxes(-1, -2))
    reads, deltas = [], []
    for queries, keys, values, decay, solve in zip(*parts[:-1], strict=True):
        read = queries @ S  # [B, H, 2C, Dv]
        delta = solve @ (values - read[..., chunk:, :])
        S = S * decay + keys @ delta
        reads.append(read[..., :chunk, :])
        deltas.append(delta)
    o = mx.stack(reads) + parts.mix @ mx.stack(deltas)  # [N, B, H, C, Dv]
    o = o.transpose(1, 0, 3, 2, 4).reshape(B, -1, H, v.shape[-1])[:, :T]
    return o, mx.contiguous(S.swapaxes(-1, -2))


def _chunked(x: mx.array, chunk: int, fill: float = 0.0) -> mx.array:
    """[B, T, H, D] -> [N, B, H, C, D] float32, filled up with `fill` after the last token."""
    B, T, H, D = x.shape
    padding = -T % chunk
    if padding:
        x = mx.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)], constant_values=fill)
    return x.astype(mx.float32).reshape(B, -1, chunk, H, D).transpose(1, 0, 3, 2, 4)


def _prepare(q: mx.array, k: mx.array, v: mx.array, alpha: mx.array, beta: mx.array) -> Chunks:
    """Everything that does not depend on the state, for all chunks at once.

    Blocks of h tokens are joined in pairs until they are C long. A decay from a token of the first
    half to one of the second is R of the first times P of the second, so that each join is one
    matrix product, and the inverse of [[I + A1, 0], [B, I + A2]] is [[T1, 0], [-T2 B T1, T2]].
    """
    written = k * beta
    rows = mx.stack([q, written], axis=-2)  # [..., C, 2, Dk]
    prefix = alpha[..., None, :]  # [..., C / h, h, Dk], starting with h = 1
    suffix = mx.ones_like(prefix)
    mix = mx.sum(q * k, axis=-1)[..., None, None]  # [..., C / h, h, h]
    solve = mx.ones_like(mix)
    for h in (1 << level for level in range(q.shape[-2].bit_length() - 1)):
        first, second = _pairs(prefix)
        before, after = _pairs(suffix)
        left = _halves(rows, h)[1] * second[..., None, :]  # [..., C / 2h, h, 2, Dk]
        right = mx.contiguous((_halves(k, h)[0] * before).swapaxes(-1, -2))
        cross = left.reshape(*left.shape[:-3], 2 * h, -1) @ right
        cross = cross.reshape(*cross.shape[:-2], h, 2, h)
        solve1, solve2 = _pairs(solve)
        mix1, mix2 = _pairs(mix)
        # (solve1 and solve2 are 1 while h is 1)
        below = cross[..., 1, :] if h == 1 else solve2 @ cross[..., 1, :] @ solve1
        solve = _lower(solve1, -below, solve2)
        mix = _lower(mix1, cross[..., 0, :], mix2)
        prefix = mx.concatenate([first, second * first[..., -1:, :]], axis=-2)
        suffix = mx.concatenate([before * second[..., -1:, :], after], axis=-2)
    P, R, solve, mix = (x[..., 0, :, :] for x in (prefix, suffix, solve, mix))
    queries = mx.concatenate([q * P, k * P], axis=-2)
    keys, decay = (k * R).swapaxes(-1, -2), P[..., -1:, :].swapaxes(-1, -2)
    return Chunks(queries, keys, v, decay, solve * beta.swapaxes(-1, -2), mix)


def _pairs(blocks: mx.array) -> tuple[mx.array, mx.array]:
    """The even and the odd ones of [..., C / h, h, D] blocks."""
    return blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]


def _halves(x: mx.array, h: int) -> tuple[mx.array, mx.array]:
    """The first and second half of each block of 2h tokens of [N, B, H, C, ...]."""
    blocks = x.reshape(*x.shape[:3], -1, 2, h, *x.shape[4:])
    return blocks[:, :, :, :, 0], blocks[:, :, :, :, 1]


def _lower(upper_left: mx.array, lower_left: mx.array, lower_right: mx.array) -> mx.array:
    """[[upper_left, 0], [lower_left, lower_right]] from three [..., h, h] blocks."""
    top = mx.concatenate([upper_left, mx.zeros_like(upper_left)], axis=-1)
    bottom = mx.concatenate([lower_left, lower_right], axis=-1)
    return mx.concatenate([top, bottom], axis=-2)


BETWEEN = ("k_prefix", "q_prefix", "k_suffix", "decay", "solve", "mix")
GRAM = Kernel(
    "kda_chunk_gram",
    inputs=("q", "k", "alpha", "beta", "T"),
    outputs=BETWEEN,
    wide=("q", "k", "alpha", "beta", *BETWEEN),
)
SCAN = Kernel(
    "kda_chunk_scan",
    inputs=(*BETWEEN, "v", "state", "T"),
    outputs=("o", "new_state"),
    wide=(*BETWEEN, "v", "o"),
)


def kda_chunk_kernel(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    alpha: mx.array,
    beta: mx.array,
    state: mx.array,
    stage: mx.Dtype | None = None,
    segment: int = SEGMENT,
) -> tuple[mx.array, mx.array]:
    """`naive_kda` in two launches a segment, for the sizes that `unsupported_reason` allows.

    Args:
        q, k, v: of any float dtype.
        stage: float16 or float32, in which decayed queries and keys wait for the scan; everything
            else is float32. They are at most 1: float16 errs by 2e-4 of the output (rms), or 1e-3
            where keys repeat and nothing is forgotten. None: float32 if v is.
        segment: tokens, a multiple of CHUNK. The result does not depend on it.
    """
    if stage is None:
        stage = mx.float32 if v.dtype == mx.float32 else mx.float16
    outputs = []
    for start in range(0, v.shape[1], segment):
        tokens = [x[:, start : start + segment] for x in (q, k, v, alpha, beta)]
        o, state = _launch(tokens, state, stage)
        outputs.append(o)
    return (outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)), state


def _launch(tokens: list[mx.array], state: mx.array, stage: mx.Dtype) -> tuple[mx.array, mx.array]:
    q, k, v, alpha, beta = tokens
    B, T, H, Dk = k.shape
    Dv = v.shape[-1]
    chunks = -(-T // CHUNK)
    staged, square = (B * H, chunks, CHUNK * Dk), (B * H, chunks, CHUNK * CHUNK)
    between = GRAM(
        inputs=[q, k, alpha.astype(mx.float32), beta.astype(mx.float32), T],
        template=[("StageT", stage), ("H", H), ("Dk", Dk)],
        grid=(32, B * H, chunks),
        threadgroup=(32, gcd(4, B * H), 1),
        output_shapes=[staged, staged, staged, (B * H, chunks, Dk), square, square],
        output_dtypes=[stage, stage, stage, mx.float32, mx.float32, mx.float32],
    )
    columns = tuning().columns
    groups = Dv // columns
    o, state = SCAN(
        inputs=[*between, v, state.astype(mx.float32), T],
        template=[("StageT", stage), ("H", H), ("Dk", Dk), ("Dv", Dv), ("Columns", columns)],
        grid=(32, groups, B * H),
        threadgroup=(32, gcd(4, groups), 1),
        output_shapes=[v.shape, state.shape],
        output_dtypes=[mx.float32, mx.float32],
    )
    return o, state


KERNELS = (GRAM, SCAN)


def unsupported_reason(Dk: int, Dv: int) -> str | None:
    """Why `kda_chunk_kernel` does not take heads of this size; None: it does."""
    return kda_sequential.unsupported_reason(Dk, Dv, SIZES)
