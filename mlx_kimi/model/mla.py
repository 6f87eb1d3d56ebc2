"""Multi-head latent attention without positions: one latent a token serves all heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.metal_kernels import mla_decode, mla_prefill
from mlx_kimi.metal_kernels.attention import (
    Block,
    SubmitLimit,
    attend,
    merge_attention,
    query_block,
)
from mlx_kimi.metal_kernels.kernel import Kernel, not_running
from mlx_kimi.metal_kernels.mla_decode import LatentWeights
from mlx_kimi.metal_kernels.split_kv import SplitKVPlan
from mlx_kimi.metal_kernels.tuning import tuning
from mlx_kimi.model.cache import LatentCache, Segment
from mlx_kimi.model.layers import RMSNorm
from mlx_kimi.model.linear import FusedLinear
from mlx_kimi.model.steps import LatentStep, Step

if TYPE_CHECKING:
    from mlx_kimi.model.weights import Weights

# The published model builds this norm without passing rms_norm_eps on, as transformers does.
KV_A_EPS = 1e-6
MOST_SCORES = 1 << 24  # elements of the largest block of scores (64 MiB in float32)
LARGEST_BLOCK = 4096  # KV positions
# KV positions, times heads, times rows of a batch, whose keys and values are expanded at a time for
# `mla_prefill`: 2048 positions of one row in the 48B, 34 MB in 16 bits.
EXPANDED = 1 << 16


def expanding_pays(queries: int, positions: int) -> bool:
    """Whether so many queries attend to expanded keys and values of so many KV positions."""
    always = tuning().expand_from
    return queries > 1 and positions * (always - queries) <= queries * always


class MultiHeadLatentAttention(nn.Module):
    """Few queries attend in latent space ("absorbed"); many expand the latents block by block."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.in_proj = FusedLinear(
            [[weights.linear("q_proj")], [weights.linear("kv_a_proj_with_mqa")]]
        )
        self.kv_a_layernorm = RMSNorm(weights.array("kv_a_layernorm.weight"), KV_A_EPS)
        self.embed_q = weights.linear("embed_q")
        self.unembed_out = weights.linear("unembed_out")
        self.o_proj = weights.linear("o_proj")
        self.lora = config.kv_lora_rank
        self.nope = config.qk_nope_head_dim
        self.width = config.latent_width
        self.scale = config.qk_head_dim**-0.5

    def __call__(
        self,
        x: mx.array,
        cache: LatentCache,
        valid: mx.array | None,
        plan: SplitKVPlan | None = None,
        submit_limit: SubmitLimit | None = None,
        steps: list[Step] | None = None,
    ) -> mx.array:
        """x [B, T, hidden] -> [B, T, hidden]; updates `cache` by these T tokens.

        Args:
            valid: [B, T] bool, False for padding; None: there is none.
            plan: how the decode kernel divides the cached positions, the same for all MLA layers
                of a step; None: it is made here.
            submit_limit: queues the work on each block of KV positions; None: one for this call.
            steps: takes what going back to fewer of these tokens needs.
        """
        B, T, _ = x.shape
        few = T == 1 or (steps is not None and T <= min(mla_decode.FEW, cache.room))
        if few and valid is None and self.decode_unsupported_reason(cache) is None:
            return self._decode(x, cache, plan or cache.plan(T), steps)
        heads = self.embed_q.weight.shape[0]
        x = self.in_proj.joined(x)  # (mla_prefill reads the queries at the front of each row)
        q, latent, shared = mx.split(x, [-self.width, self.lora - self.width], axis=-1)
        past = cache.positions
        latents = mx.concatenate([self.kv_a_layernorm(latent), shared], axis=-1)
        if steps is not None:
            steps.append(LatentStep(cache.snapshot(), latents, 0))
        cache.append(latents, valid)
        submit_limit = submit_limit or SubmitLimit()
        expanding = expanding_pays(T, cache.positions)
        if expanding and self.prefill_unsupported_reason(cache) is None:
            o = self._prefill(x, cache, past, submit_limit)  # [B, T, H, v]
            return self.o_proj(o.reshape(B, T, -1))
        q = q.reshape(B, T, heads, -1).transpose(0, 2, 1, 3)  # [B, H, T, nope + shared]
        attention = self._expanded if expanding else self._absorbed
        o = attention(q, cache, past, submit_limit)  # [B, H, T, v]
        return self.o_proj(o.transpose(0, 2, 1, 3).reshape(B, T, -1))

    def implementations(self) -> list[tuple[str, str, str]]:
        """Which implementation runs for how many tokens, and why: for `info --kernels`."""
        reason = self.decode_unsupported_reason(LatentCache())
        many_reason = self.prefill_unsupported_reason(LatentCache())
        many = tuning().expand_from
        return [
            ("1 token", "ops form", reason)
            if reason
            else (
                "1 token",
                "mla_query, mla_attend, mla_output",
                f"and of up to {mla_decode.FEW} with drafts",
            ),
            (f"2 to {many - 1} tokens", "ops form", "no kernel takes so few after a longer text"),
            (
                f"{many} tokens or more; fewer in a new text",
                "ops form" if many_reason else "mla_prefill",
                many_reason or "latents expanded block by block",
            ),
        ]

    def _decode(
        self, x: mx.array, cache: LatentCache, plan: SplitKVPlan, steps: list[Step] | None
    ) -> mx.array:
        """A few tokens [B, T, hidden], with three kernels between two matrices."""
        B, T, hidden = x.shape
        tail = cache.roomy_tail(B, self.width, x.dtype).latents
        frozen = [segment.latents for segment in cache.frozen]
        x = self.in_proj.joined(x.reshape(B * T, hidden))
        y, tail = mla_decode.mla_decode(x, self._for_decode, tail, plan, frozen)
        if steps is not None:
            steps.append(LatentStep(cache.snapshot(), tail, cache.held))
        cache.grow_tail(tail, T)
        return self.o_proj(y.reshape(B, T, -1))

    def decode_unsupported_reason(self, cache: LatentCache) -> str | None:
        """Why the decode kernel cannot run; None: it can."""
        return _unsupported_cache(cache, mla_decode.KERNELS) or self._unsupported_reason

    def prefill_unsupported_reason(self, cache: LatentCache) -> str | None:
        """Why the prefill kernel cannot run; None: it can."""
        sizes = (self.nope, self.width - self.lora, self.unembed_out.out_features)
        return _unsupported_cache(cache, mla_prefill.KERNELS) or mla_prefill.unsupported_reason(
            self.lora, *sizes
        )

    @cached_property
    def _unsupported_reason(self) -> str | None:
        return mla_decode.unsupported_reason(self._for_decode, self.in_proj.width)

    @cached_property
    def _for_decode(self) -> LatentWeights:
        norm = self.kv_a_layernorm
        matrices = (self.embed_q.matrix, self.unembed_out.matrix)
        return LatentWeights(*matrices, norm.weight, norm.eps, self.scale)

    def _prefill(
        self, x: mx.array, cache: LatentCache, past: int, submit_limit: SubmitLimit
    ) -> mx.array:
        """Each block of latents becomes keys and values, to which a kernel attends.

        `x` [B, T, width of in_proj], whose tokens follow `past` KV positions -> [B, T, H, v].
        """
        sums: tuple[mx.array, mx.array] | None = None  # log-sum-exp, output
        start = 0
        size = max(1, EXPANDED // (x.shape[0] * self.embed_q.weight.shape[0]))
        for latents in _joined_blocks(cache, self.width, x.dtype, size):
            dtype = x.dtype if latents.shape[1] == cache.positions else mx.float32
            sums = self._attend_to_block(sums, x, latents, past - start, dtype)
            start += latents.shape[1]
            if start < cache.positions:  # (what comes last is a part of this half of the layer)
                submit_limit.submit(*sums)
        assert sums is not None, "the queries' own positions are always in the cache"
        return sums[1].astype(x.dtype)

    def _attend_to_block(
        self,
        sums: tuple[mx.array, mx.array] | None,
        x: mx.array,
        latents: mx.array,
        offset: int,
        dtype: mx.Dtype,
    ) -> tuple[mx.array, mx.array]:
        """The softmax over the KV positions before and those of `latents` [B, S, width].

        `sums`: the log-sum-exp [B, T, H, 1] and output [B, T, H, v] of those before; None: none.
        `offset`: the KV position of x's first token, counted from the first of `latents`.
        """
        latent = latents[:, None, :, : self.lora]
        # (Some modes of quantization know no float16: what they expand may be wider than x.)
        keys = self.embed_q.from_outputs(latent).astype(x.dtype)
        values = self.unembed_out(latent).astype(x.dtype)
        given = mla_prefill.Expanded(x, keys, latents, values, self.scale, offset)
        output, lse = mla_prefill.mla_prefill(given, dtype)
        found = lse[..., None], output
        return found if sums is None else merge_attention(*sums, *found)

    def _absorbed(
        self, q: mx.array, cache: LatentCache, past: int, submit_limit: SubmitLimit
    ) -> mx.array:
        """Queries go through kv_b's key half into latent space, results through its value half."""
        content, shared = mx.split(q, [self.nope], axis=-1)
        q = mx.concatenate([self.embed_q(content), shared], axis=-1)
        # The values are the front of each row. To cut them out first would copy them on CPU: for
        # the rows of one token that takes longer than to weigh whole rows.
        whole = q.shape[2] == 1

        def latents(segment: Segment) -> tuple[mx.array, mx.array]:
            # [B, 1, S, lora + shared]
            keys = mx.expand_dims(segment.plain(self.width, q.dtype).latents, 1)
            return keys, keys if whole else keys[..., : self.lora]

        o = attend(q, _blocks(q, cache, latents), self.scale, past, submit_limit)
        return self.unembed_out(o[..., : self.lora])

    def _expanded(
        self, q: mx.array, cache: LatentCache, past: int, submit_limit: SubmitLimit
    ) -> mx.array:
        """Each block of latents becomes the keys and values of every head."""

        def per_head(segment: Segment) -> tuple[mx.array, mx.array]:
            latents = segment.plain(self.width, q.dtype).latents[:, None]
            latent, shared = mx.split(latents, [self.lora], axis=-1)  # [B, 1, S, ...]
            keys = self.embed_q.from_outputs(latent)  # [B, H, S, nope]
            shared = mx.broadcast_to(shared, (*keys.shape[:3], shared.shape[-1]))
            return mx.concatenate([keys, shared], axis=-1), self.unembed_out(latent)

        return attend(q, _blocks(q, cache, per_head), self.scale, past, submit_limit)


def _unsupported_cache(cache: LatentCache, kernels: Sequence[Kernel]) -> str | None:
    """Why these kernels do not attend to this cache, whatever the layer's sizes; None: they may."""
    return not_running(*kernels) or ("some columns are padding" if cache.is_masked else None)


def _blocks(
    q: mx.array,
    cache: LatentCache,
    keys_and_values: Callable[[Segment], tuple[mx.array, mx.array]],
) -> Iterator[Block]:
    """The cached KV positions in blocks whose scores stay small."""
    B, H, T, _ = q.shape
    size = min(LARGEST_BLOCK, max(1, MOST_SCORES // (B * H * min(T, query_block()))))
    start = 0
    for segment in cache.segments:
        for first in range(0, segment.size, size):
            whole = segment.size <= size
            part = segment if whole else segment.slice(first, min(first + size, segment.size))
            yield Block(start, *keys_and_values(part), part.valid)
            start += part.size


def _joined_blocks(
    cache: LatentCache, width: int, dtype: mx.Dtype, size: int
) -> Iterator[mx.array]:
    """The cached latents [B, S, width], `size` KV positions at a time, whatever the segments."""
    parts: list[mx.array] = []
    room = size
    for segment in cache.segments:
        first = 0
        while first < segment.size:
            last = min(first + room, segment.size)
            parts.append(segment.slice(first, last).plain(width, dtype).latents.astype(dtype))
            room -= last - first
            first = last
            if not room:
                block, parts, room = mx.concatenate(parts, axis=1), [], size
                yield block
    if parts:
        yield mx.concatenate(parts, axis=1)
