"""Many tokens of an MLA layer: attention over expanded keys and values, block by block.

score = scale * query . (key | shared key)      output = softmax(scores) values
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_kimi.metal_kernels.attention import NO_KEY
from mlx_kimi.metal_kernels.kernel import Kernel
from mlx_kimi.metal_kernels.tuning import PrefillShape, tuning

SIMDGROUPS = 4  # of a threadgroup: they read the same keys at about the same time


class Expanded(NamedTuple):
    """Tokens, and a block of S positions that stands expanded for them."""

    x: mx.array  # [B, T, row], the input projection: first the queries of each head, nope | shared
    keys: mx.array  # [B, H, S, nope], as the next two in x's dtype
    latents: mx.array  # [B, S, lora + shared], of which the shared keys are last
    values: mx.array  # [B, H, S, v]
    scale: float  # of the scores
    offset: int  # token t sees the positions up to t + offset, which may be none

    @property
    def shared(self) -> int:
        """Channels of the shared key: x's rows hold the queries and then a row of latents."""
        _, H, _, nope = self.keys.shape
        return (self.x.shape[-1] - self.latents.shape[-1]) // H - nope


def naive_mla_prefill(given: Expanded, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Attend to a block of positions.

    Returns:
        outputs [B, T, H, v] in `dtype`, and lse [B, T, H] float32, the logarithm of the sum of
        exp(score): `attention.merge_attention` merges them with those of other blocks. Where a
        token sees no position its output is 0 and its lse below -1e29.
    """
    x, keys, latents, values, scale, offset = given
    B, T, _ = x.shape
    _, H, S, nope = keys.shape
    shared = given.shared
    q = x[..., : H * (nope + shared)].reshape(B, T, H, -1).swapaxes(1, 2).astype(mx.float32)
    beside = mx.broadcast_to(latents[:, None, :, -shared:], (B, H, S, shared))
    k = mx.concatenate([keys, beside], axis=-1).astype(mx.float32)
    scores = scale * q @ k.swapaxes(-1, -2)  # [B, H, T, S]
    seen = mx.arange(S) <= mx.arange(T)[:, None] + offset
    m = mx.where(seen, scores, NO_KEY).max(axis=-1, keepdims=True)
    probs = mx.where(seen, mx.exp(scores - m), 0)
    total = mx.maximum(probs.sum(axis=-1, keepdims=True), 1e-30)
    outputs = probs @ values.astype(mx.float32) / total
    lse = (m + mx.log(total))[..., 0]
    return outputs.swapaxes(1, 2).astype(dtype), lse.swapaxes(1, 2)


KERNEL = Kernel(
    "mla_prefill",
    inputs=("x", "keys", "latents", "values", "T", "S", "offset", "scale"),
    outputs=("outputs", "lse"),
    wide=("x", "keys", "latents", "values", "outputs"),
)


def mla_prefill(
    given: Expanded, dtype: mx.Dtype, shape: PrefillShape | None = None
) -> tuple[mx.array, mx.array]:
    """`naive_mla_prefill` in one launch, for the sizes that `unsupported_reason` allows.

    Probabilities are rounded to x's dtype before they weigh the values, and summed before that.
    `shape` None: that of this GPU.
    """
    x, keys, latents, values, scale, offset = given
    B, T, _ = x.shape
    _, H, S, nope = keys.shape
    v = values.shape[-1]
    queries, positions = shape or tuning().prefill
    groups = -(-T // (queries * SIMDGROUPS)) * SIMDGROUPS
    outputs, lse = KERNEL(
        inputs=[x, keys, latents, values, T, S, offset, scale],
        template=[
            *(("XT", x.dtype), ("H", H), ("Nope", nope), ("V", v)),
            *(("Shared", given.shared), ("Row", x.shape[-1])),
            *(("LatentRow", latents.shape[-1]), ("Queries", queries), ("Block", positions)),
        ],
        grid=(32, groups, B * H),
        threadgroup=(32, SIMDGROUPS, 1),
        output_shapes=[(B, T, H, v), (B, T, H)],
        output_dtypes=[dtype, mx.float32],
    )
    return outputs, lse


KERNELS = (KERNEL,)


def unsupported_reason(lora: int, nope: int, shared: int, v: int) -> str | None:
    """Why `mla_prefill` does not take a layer of these sizes; None: it does."""
    if lora % 4:
        return f"kv_lora_rank = {lora} is not a multiple of 4"
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    for name, size in zip(names, (nope, shared, v), strict=True):
        if size % 32 or size < 32:
            return f"{name} = {size} is not a multiple of 32"
    return None
