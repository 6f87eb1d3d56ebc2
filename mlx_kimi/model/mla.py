"""Multi-head latent attention without positions: one latent a token serves all heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

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
from mlx_kimi.metal_kernels.kernel import not_running
from mlx_kimi.metal_kernels.mla_decode import LatentWeights
from mlx_kimi.metal_kernels.split_kv import SplitKVPlan
from mlx_kimi.metal_kernels.tuning import tuning
from mlx_kimi.model.cache import LatentCache, Segment, Segments
from mlx_kimi.model.forward_batch import FEW, is_few
from mlx_kimi.model.layers import RMSNorm
from mlx_kimi.model.linear import FusedLinear
from mlx_kimi.model.steps import LatentStep, Step

if TYPE_CHECKING:
    from mlx_kimi.model.weights import Weights

# The published model builds this norm without passing rms_norm_eps on, as transformers does.
KV_A_EPS = 1e-6
MOST_SCORES = 1 << 24  # elements of the largest block of scores (64 MiB in float32)
LARGEST_BLOCK = 4096  # KV positions
# KV positions, times heads, whose keys and values are expanded at a time for `mla_prefill`: 2048
# positions in the 48B, 34 MB in 16 bits.
EXPANDED = 1 << 16


def expanding_pays(queries: int, positions: int) -> bool:
    """Whether so many queries attend to expanded keys and values of so many KV positions."""
    always = tuning().expand_from
    return queries > 1 and positions * (always - queries) <= queries * always


class Keys(NamedTuple):
    """What the last tokens of one text attend to."""

    segments: Segments  # their own latents last
    past: int  # KV positions before them


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
        counts: Sequence[int] | None = None,
        plan: SplitKVPlan | None = None,
        submit_limit: SubmitLimit | None = None,
        steps: list[Step] | None = None,
    ) -> mx.array:
        """x [B, T, hidden] -> [B, T, hidden]; updates `cache` by these T tokens.

        Args:
            counts: [B], how many of the T tokens are no padding; None: all.
            plan: how the decode kernel divides the cached positions, the same for all MLA layers
                of a step; None: it is made here.
            submit_limit: queues the work on each block of KV positions; None: one for this call.
            steps: takes what going back to fewer of these tokens needs.
        """
        B, T, _ = x.shape
        few = is_few(B, T) and T <= cache.room
        if few and counts is None and self.decode_unsupported_reason() is None:
            return self._decode(x, cache, plan or cache.plan(B, T), steps)
        x = self.in_proj.joined(x)  # (mla_prefill reads the queries at the front of each row)
        latent, shared = mx.split(x[..., -self.width :], [self.lora], axis=-1)
        latents = mx.concatenate([self.kv_a_layernorm(latent), shared], axis=-1)
        if steps is not None:
            steps.append(LatentStep(cache.snapshot(), latents, in_tail=False))
        cache.append(latents, counts)
        submit_limit = submit_limit or SubmitLimit()
        o = [
            self._attend_text(x[b : b + 1] if B > 1 else x, cache, b, count, submit_limit)
            for b, count in enumerate(counts or [T] * B)
        ]
        return self.o_proj(o[0] if B == 1 else mx.concatenate(o))

    def _attend_text(
        self, x: mx.array, cache: LatentCache, text: int, count: int, submit_limit: SubmitLimit
    ) -> mx.array:
        """The first `count` of T tokens of one text, which `cache` holds last: [1, T, H * v].

        x: [1, T, width of in_proj]. What stands for the others means nothing.
        """
        _, T, _ = x.shape
        heads, value = self.embed_q.weight.shape[0], self.unembed_out.out_features
        if not count:
            return mx.zeros((1, T, heads * value), x.dtype)
        x = x[:, :count] if count < T else x
        keys = Keys(cache.segments(text), cache.positions(text) - count)
        expanding = expanding_pays(count, keys.past + count)
        if expanding and self.prefill_unsupported_reason() is None:
            o = self._prefill(x, keys, submit_limit)  # [1, count, H, v]
        else:
            q = x[..., : -self.width].reshape(1, count, heads, -1).transpose(0, 2, 1, 3)
            attention = self._expanded if expanding else self._absorbed
            o = attention(q, keys, submit_limit).transpose(0, 2, 1, 3)  # q [1, H, count, ...]
        return mx.pad(o.reshape(1, count, -1), [(0, 0), (0, T - count), (0, 0)])

    def implementations(self) -> list[tuple[str, str, str]]:
        """Which implementation runs for how many tokens, and why: for `info --kernels`."""
        reason = self.decode_unsupported_reason()
        many_reason = self.prefill_unsupported_reason()
        many = tuning().expand_from
        return [
            ("1 token", "ops form", reason)
            if reason
            else (
                f"1 to {FEW} tokens",
                "mla_query, mla_attend, mla_output",
                "as many as have room in the tail",
            ),
            (
                f"{2 if reason else FEW + 1} to {many - 1} tokens",
                "ops form",
                "no kernel takes so few after a longer text",
            ),
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
        tail = cache.roomy_tail(B, self.width, x.dtype)
        x = self.in_proj.joined(x.reshape(B * T, hidden))
        y, tail = mla_decode.mla_decode(x, self._for_decode, tail, plan, cache.frozen_arrays)
        if steps is not None:
            steps.append(LatentStep(cache.snapshot(), tail, in_tail=True))
        cache.grow_tail(tail, T)
        return self.o_proj(y.reshape(B, T, -1))

    def decode_unsupported_reason(self) -> str | None:
        """Why the decode kernel cannot run; None: it can."""
        return not_running(*mla_decode.KERNELS) or self._unsupported_reason

    def prefill_unsupported_reason(self) -> str | None:
        """Why the prefill kernel cannot run; None: it can."""
        sizes = (self.nope, self.width - self.lora, self.unembed_out.out_features)
        return not_running(*mla_prefill.KERNELS) or mla_prefill.unsupported_reason(
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

    def _prefill(self, x: mx.array, keys: Keys, submit_limit: SubmitLimit) -> mx.array:
        """Each block of latents becomes keys and values, to which a kernel attends.

        `x` [1, T, width of in_proj] -> [1, T, H, v].
        """
        sums: tuple[mx.array, mx.array] | None = None  # log-sum-exp, output
        start, end = 0, keys.past + x.shape[1]
        size = max(1, EXPANDED // self.embed_q.weight.shape[0])
        for latents in _joined_blocks(keys.segments, self.width, x.dtype, size):
            dtype = x.dtype if latents.shape[1] == end else mx.float32
            sums = self._attend_to_block(sums, x, latents, keys.past - start, dtype)
            start += latents.shape[1]
            if start < end:  # (what comes last is a part of this half of the layer)
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

    def _absorbed(self, q: mx.array, keys: Keys, submit_limit: SubmitLimit) -> mx.array:
        """Queries go through kv_b's key half into latent space, results through its value half."""
        content, shared = mx.split(q, [self.nope], axis=-1)
        q = mx.concatenate([self.embed_q(content), shared], axis=-1)
        # The values are the front of each row. To cut them out first would copy them on CPU: for
        # the rows of one token that takes longer than to weigh whole rows.
        whole = q.shape[2] == 1

        def latents(segment: Segment) -> tuple[mx.array, mx.array]:
            rows = mx.expand_dims(segment.plain(self.width, q.dtype), 1)  # [1, 1, S, lora + shared]
            return rows, rows if whole else rows[..., : self.lora]

        o = attend(q, _blocks(q, keys, latents), self.scale, keys.past, submit_limit)
        return self.unembed_out(o[..., : self.lora])

    def _expanded(self, q: mx.array, keys: Keys, submit_limit: SubmitLimit) -> mx.array:
        """Each block of latents becomes the keys and values of every head."""

        def per_head(segment: Segment) -> tuple[mx.array, mx.array]:
            rows = segment.plain(self.width, q.dtype)[:, None]
            latent, shared = mx.split(rows, [self.lora], axis=-1)  # [1, 1, S, ...]
            nope = self.embed_q.from_outputs(latent)  # [1, H, S, nope]
            shared = mx.broadcast_to(shared, (*nope.shape[:3], shared.shape[-1]))
            return mx.concatenate([nope, shared], axis=-1), self.unembed_out(latent)

        return attend(q, _blocks(q, keys, per_head), self.scale, keys.past, submit_limit)


def _blocks(
    q: mx.array,
    keys: Keys,
    keys_and_values: Callable[[Segment], tuple[mx.array, mx.array]],
) -> Iterator[Block]:
    """The cached KV positions in blocks whose scores stay small."""
    B, H, T, _ = q.shape
    size = min(LARGEST_BLOCK, max(1, MOST_SCORES // (B * H * min(T, query_block()))))
    start = 0
    for segment in keys.segments:
        for first in range(0, segment.size, size):
            whole = segment.size <= size
            part = segment if whole else segment.slice(first, min(first + size, segment.size))
            yield Block(start, *keys_and_values(part))
            start += part.size


def _joined_blocks(
    segments: Segments, width: int, dtype: mx.Dtype, size: int
) -> Iterator[mx.array]:
    """A text's latents [1, S, width], `size` KV positions at a time, whatever the segments."""
    parts: list[mx.array] = []
    room = size
    for segment in segments:
        first = 0
        while first < segment.size:
            last = min(first + room, segment.size)
            parts.append(segment.slice(first, last).plain(width, dtype).astype(dtype))
            room -= last - first
            first = last
            if not room:
                block, parts, room = mx.concatenate(parts, axis=1), [], size
                yield block
    if parts:
        yield mx.concatenate(parts, axis=1)
