"""Kimi Delta Attention: its state is one matrix a head (arXiv 2510.26692, equation 10)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.metal_kernels.kda import (
    chosen_implementation,
    decode_unsupported_reason,
    kda,
)
from mlx_kimi.metal_kernels.kda_decode import DecodeWeights, kda_decode
from mlx_kimi.metal_kernels.kda_prepare import Projected, kda_finish, kda_prepare, prepared_by
from mlx_kimi.metal_kernels.tuning import tuning
from mlx_kimi.model.cache import KDACache
from mlx_kimi.model.forward_batch import FEW, is_few
from mlx_kimi.model.layers import RMSNorm
from mlx_kimi.model.linear import FusedLinear
from mlx_kimi.model.steps import KDAStep, Step

if TYPE_CHECKING:
    from mlx_kimi.model.weights import Weights


class KimiDeltaAttention(nn.Module):
    """Four paths from x: q | k | v through a convolution, decay, write strength, output gate."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        groups = (("q_proj", "k_proj", "v_proj"), ("f_a_proj",), ("g_a_proj",), ("b_proj",))
        self.in_proj = FusedLinear([[weights.linear(name) for name in group] for group in groups])
        convolutions = [weights.array(f"{x}_conv.conv.weight") for x in "qkv"]
        taps = mx.concatenate(convolutions)[..., 0]  # [3 * H * D, K], the present token's last
        self.taps = mx.contiguous(taps.swapaxes(0, 1))
        self.f_b_proj = weights.linear("f_b_proj")
        self.g_b_proj = weights.linear("g_b_proj")
        self.head_dim = config.kda_head_dim
        self.heads = weights.linear("b_proj").out_features
        self.A_log = weights.array("A_log").reshape(-1)  # [H]
        self.dt_bias = weights.array("dt_bias").reshape(-1, self.head_dim)  # [H, D]
        self.o_norm = RMSNorm(weights.array("o_norm.weight"), config.rms_norm_eps)
        self.o_proj = weights.linear("o_proj")

    def __call__(
        self,
        x: mx.array,
        cache: KDACache,
        lengths: mx.array | None = None,
        zeros: Callable[[tuple[int, ...], mx.Dtype], mx.array] = mx.zeros,
        steps: list[Step] | None = None,
    ) -> mx.array:
        """x [B, T, hidden] -> [B, T, hidden]; updates `cache` by these T tokens.

        Args:
            lengths: [B] int32, the tokens of each row that are no padding; None: all T.
            zeros: makes what stands before the first token; layers may share it.
            steps: takes what going back to fewer of these tokens needs.
        """
        B, T, _ = x.shape
        if is_few(B, T) and lengths is None and self.decode_unsupported_reason() is None:
            return self._decode(x, cache, zeros, steps)
        y = self.in_proj.joined(x)
        f_a, g_a = mx.split(y, self.in_proj.ends, axis=-1)[1:3]  # (kda_prepare takes the rest)
        tail, state = self._memory(cache, B, y.dtype, zeros)
        f, g = self.f_b_proj(f_a), self.g_b_proj(g_a)
        projected = Projected(y, f, self.taps, tail, lengths, self.A_log, self.dt_bias)
        if steps is not None:
            steps.append(KDAStep(cache.lengths, partial(_replayed, projected, state)))
        o, cache.conv_tail, cache.state = _delta_rule(projected, state)
        return self.o_proj(kda_finish(o, g, self.o_norm.weight, self.o_norm.eps))

    def implementations(self) -> list[tuple[str, str, str]]:
        """Which implementation runs for how many tokens, and why: for `info --kernels`."""
        reason = self.decode_unsupported_reason()
        chunked_from = tuning().chunked_from
        few = chosen_implementation(2, self.head_dim, self.head_dim)
        many = chosen_implementation(chunked_from, self.head_dim, self.head_dim)
        return [
            ("1 token", "ops form", reason)
            if reason
            else (f"1 to {FEW} tokens", "kda_decode", "one launch"),
            (f"{2 if reason else FEW + 1} to {chunked_from - 1} tokens", few.name, few.why),
            (f"{chunked_from} tokens or more", many.name, many.why),
            ("2 tokens or more, around these", *prepared_by(self.in_proj.width, self.head_dim)),
        ]

    def _memory(
        self, cache: KDACache, B: int, dtype: mx.Dtype, zeros: Callable[..., mx.array]
    ) -> tuple[mx.array, mx.array]:
        """The convolution's tail and the state; zeros before the first token."""
        if cache.conv_tail is not None and cache.state is not None:
            return cache.conv_tail, cache.state
        state = zeros((B, self.heads, self.head_dim, self.head_dim), mx.float32)
        return zeros((B, self.taps.shape[0] - 1, self.taps.shape[1]), dtype), state

    def _decode(
        self,
        x: mx.array,
        cache: KDACache,
        zeros: Callable[..., mx.array],
        steps: list[Step] | None,
    ) -> mx.array:
        """A few tokens [B, T, hidden], with one kernel between two matrices."""
        B, T, hidden = x.shape
        x = self.in_proj.joined(x.reshape(B * T, hidden))
        tail, state = self._memory(cache, B, x.dtype, zeros)
        if steps is not None:
            steps.append(self.decode_step(cache.lengths, x, tail, state))
        y, cache.conv_tail, cache.state = kda_decode(x, self._for_decode, tail, state)
        return self.o_proj(y.reshape(B, T, -1))

    def decode_step(
        self, lengths: tuple[int, ...], x: mx.array, tail: mx.array, state: mx.array
    ) -> KDAStep:
        """How to go back within a step: x [B * T, width of in_proj]; the others as before it."""

        def replay(n: int) -> tuple[mx.array, mx.array]:
            first = x.reshape(len(state), -1, x.shape[-1])[:, :n].reshape(-1, x.shape[-1])
            _, *memory = kda_decode(first, self._for_decode, tail, state)
            return memory[0], memory[1]

        return KDAStep(lengths, replay, x)

    def decode_unsupported_reason(self) -> str | None:
        """Why the decode kernel cannot run; None: it can."""
        return decode_unsupported_reason(self._for_decode, self.head_dim)

    @cached_property
    def _for_decode(self) -> DecodeWeights:
        f_b, g_b = self.f_b_proj.matrix, self.g_b_proj.matrix
        gate, norm = (self.A_log, self.dt_bias), (self.o_norm.weight, self.o_norm.eps)
        return DecodeWeights(self.taps, f_b, g_b, *gate, *norm)


def _delta_rule(projected: Projected, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """o [B, T, H, D], and the convolution's tail and the state after these tokens."""
    given = kda_prepare(projected)
    o, state = kda(given.q, given.k, given.v, given.alpha, given.beta, state)
    return o, given.tail, state


def _replayed(projected: Projected, state: mx.array, n: int) -> tuple[mx.array, mx.array]:
    """Tail and state after the first n tokens: the others are padding."""
    lengths = mx.array([n] * len(state))
    _, tail, state = _delta_rule(projected._replace(lengths=lengths), state)
    return tail, state
