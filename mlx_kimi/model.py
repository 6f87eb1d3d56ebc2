"""Kimi Linear: embed, then blocks of (KDA or MLA) and (MoE or MLP), then norm and lm_head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.cache import CacheEntry, KDACache, LatentCache
from mlx_kimi.config import Layer, ModelConfig
from mlx_kimi.kda import KimiDeltaAttention
from mlx_kimi.layers import MLP, RMSNorm
from mlx_kimi.mla import MultiHeadLatentAttention
from mlx_kimi.moe import MixtureOfExperts
from mlx_kimi.weights import Weights


class Padding:
    """Which tokens of a right-padded batch are real."""

    def __init__(self, T: int, lengths: Sequence[int]) -> None:
        self.lengths = mx.array(list(lengths))  # [B]
        self.real = mx.arange(T) < self.lengths[:, None]  # [B, T]


class DecoderLayer(nn.Module):
    """h = x + Attention(RMSNorm(x));  y = h + FeedForward(RMSNorm(h))."""

    def __init__(self, config: ModelConfig, layer: Layer, weights: Weights) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        attention, mlp = weights.at("self_attn"), weights.at("mlp")
        self.input_layernorm = RMSNorm(weights.array("input_layernorm.weight"), eps)
        self.post_attention_layernorm = RMSNorm(
            weights.array("post_attention_layernorm.weight"), eps
        )
        self.self_attn: KimiDeltaAttention | MultiHeadLatentAttention = (
            KimiDeltaAttention(config, attention)
            if layer.attention == "kda"
            else MultiHeadLatentAttention(config, attention)
        )
        self.mlp: MixtureOfExperts | MLP = (
            MixtureOfExperts(config, mlp) if layer.feed_forward == "moe" else MLP(mlp)
        )

    def attend(self, x: mx.array, entry: CacheEntry, padding: Padding | None) -> mx.array:
        """Attention(RMSNorm(x)): with a slice of the heads, its part of the sum over slices."""
        x = self.input_layernorm(x)
        real, lengths = (padding.real, padding.lengths) if padding else (None, None)
        if isinstance(self.self_attn, KimiDeltaAttention):
            assert isinstance(entry, KDACache)
            return self.self_attn(x, entry, real, lengths)
        assert isinstance(entry, LatentCache)
        return self.self_attn(x, entry, real)

    def feed_forward(self, h: mx.array) -> mx.array:
        """FeedForward(RMSNorm(h)): with a slice of the weights, its part of the sum over slices."""
        return self.mlp(self.post_attention_layernorm(h))

    def __call__(
        self,
        x: mx.array,
        entry: CacheEntry,
        padding: Padding | None,
        reduce: Callable[[mx.array], mx.array],
    ) -> mx.array:
        h = x + reduce(self.attend(x, entry, padding))
        return h + reduce(self.feed_forward(h))


class KimiLinear(nn.Module):
    """The model of one folder. Heads and experts are counted from the weights it is given."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        reduce: Callable[[mx.array], mx.array] = lambda part: part,
    ) -> None:
        """`reduce` adds up the parts of a layer's output over the ranks of a sharded model."""
        super().__init__()
        self.config = config
        self.reduce = reduce
        self.embed_tokens = weights.linear("model.embed_tokens")
        self.layers = [
            DecoderLayer(config, layer, weights.at(f"model.layers.{number}"))
            for number, layer in enumerate(config.layers)
        ]
        self.norm = RMSNorm(weights.array("model.norm.weight"), config.rms_norm_eps)
        self.lm_head = (
            self.embed_tokens if config.tie_word_embeddings else weights.linear("lm_head")
        )

    def __call__(
        self,
        ids: mx.array,
        cache: list[CacheEntry] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> mx.array:
        """ids [B, T] -> logits [B, T, vocab]; `cache` moves on by these tokens.

        Args:
            cache: from `make_cache`; None reads the tokens from nothing.
            lengths: [B], how many tokens of each row are real; the rest is padding on the right,
                whose logits mean nothing. None: all T.
        """
        return self.logits(self.hidden(ids, cache, lengths))

    def hidden(
        self,
        ids: mx.array,
        cache: list[CacheEntry] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> mx.array:
        """Like a call, but up to the last layer: ids [B, T] -> [B, T, hidden]."""
        B, T = ids.shape
        real = [T] * B if lengths is None else [int(length) for length in lengths]
        padding = None if min(real) == T else Padding(T, real)
        cache = self.make_cache() if cache is None else cache
        x = self.embed_tokens.rows(ids)
        for layer, entry in zip(self.layers, cache, strict=True):
            x = layer(x, entry, padding, self.reduce)
            read = entry.lengths or (0,) * B
            entry.lengths = tuple(n + new for n, new in zip(read, real, strict=True))
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        """[..., hidden] of the last layer -> [..., vocab]."""
        return self.lm_head(self.norm(hidden))

    def make_cache(self, latent_bits: int | None = None) -> list[CacheEntry]:
        """An empty cache: one typed entry a layer, for a batch of any size.

        `latent_bits` 8 stores the latents of MLA layers, but for the latest, in 8 bits.
        """
        return [
            KDACache() if layer.attention == "kda" else LatentCache(bits=latent_bits)
            for layer in self.config.layers
        ]
