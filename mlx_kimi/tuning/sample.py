"""Halves of a model's layers with random weights of its shapes and formats, to try kernels on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import mlx.core as mx

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import ALWAYS_FLOAT32, Join, Tensor, tensors
from mlx_kimi.metal_kernels.matmul import plain_products
from mlx_kimi.model.cache import CacheEntry, KDACache, LatentCache
from mlx_kimi.model.forward_batch import ForwardBatch
from mlx_kimi.model.kimi_linear import DecoderLayer
from mlx_kimi.model.random_weights import Arrays, random_tensor, stored_quantization
from mlx_kimi.model.weights import Weights
from mlx_kimi.tuning.reference import with_experts_one_by_one

Half = Literal["kda", "mla", "experts"]
Given = tuple[mx.array, mx.array, CacheEntry | None]
BLOCK = 8192  # KV positions that are made at a time
ROUNDS = 8  # of a few tokens' experts, each with other ones: a rounding may choose another


@dataclass(frozen=True)
class Limits:
    """What is tried, and how long."""

    tokens: int = 2048  # of the longest prompt
    positions: int = 65_536  # of the longest context
    weights: int = 1 << 28  # bytes of a layer's routed experts: fewer of them, if more
    repeats: int = 31  # of each time, if it is short; 0: none is measured


@dataclass(frozen=True)
class Case:
    """What half of a layer does at a time."""

    half: Half
    tokens: int
    past: int = 0  # KV positions before them
    packed: bool = False  # in 8 bits

    def __str__(self) -> str:
        after = f" after {self.past:,}" if self.past else ""
        kept = " in 8 bits" if self.packed else ""
        name = {"kda": "KDA", "mla": "MLA", "experts": "experts"}[self.half]
        return f"{name}, {self.tokens:,} token{'s' * (self.tokens > 1)}{after}{kept}"


class Sample:
    """One layer for each half that the model has; the same to compare with, also in float32."""

    def __init__(self, config: ModelConfig, dtype: mx.Dtype, limits: Limits) -> None:
        self.dtype = dtype
        self.layers = dict(_layers(config))
        self.config = _with_fewer_experts(config, self.layers, limits.weights)
        stored: Arrays = {}
        for number in sorted(set(self.layers.values())):
            for tensor in tensors(self._config_of(number)):
                if tensor.name.startswith(f"model.layers.{number}."):
                    mx.random.seed(sum(tensor.name.encode()))
                    stored |= random_tensor(tensor, self.config, dtype)
        self._in_use = self._made(stored, dtype)
        self._plain = {
            each: {
                number: with_experts_one_by_one(layer)
                for number, layer in self._made(stored, each).items()
            }
            for each in (dtype, mx.float32)
        }
        self._made_for: dict[tuple[Case, mx.Dtype], list[Given]] = {}

    def _config_of(self, number: int) -> ModelConfig:
        """A layer of which only the attention is tried has as few experts as it can."""
        if number == self.layers.get("experts"):
            return self.config
        return _with_fewer_experts(self.config, self.layers, 0)

    def _made(self, stored: Arrays, dtype: mx.Dtype) -> dict[int, DecoderLayer]:
        arrays = {name: _in_dtype(name, array, dtype) for name, array in stored.items()}
        layers = {}
        for number in set(self.layers.values()):
            config = self._config_of(number)
            weights = Weights(arrays, config).at(f"model.layers.{number}")
            layers[number] = DecoderLayer(config, config.layers[number], weights)
        mx.eval([layer.parameters() for layer in layers.values()])
        return layers

    def run(self, case: Case) -> list[mx.array]:
        """x and residual [tokens, hidden] after the half, and a KDA layer's state."""
        return self._run(case, self._in_use, self.dtype)

    def step(self, case: Case) -> list[mx.array]:
        """The same, to be timed: one token goes on where the last one ended, as in use."""
        return self._run(case, self._in_use, self.dtype, goes_on=case.tokens == 1)

    def rounds(self, case: Case) -> int:
        """How often a run does what the case says, each time with other tokens."""
        return ROUNDS if case.half == "experts" and case.tokens <= ROUNDS else 1

    def plain(self, case: Case, dtype: mx.Dtype) -> list[mx.array]:
        """The same in the model's dtype or in float32, with plain products beside our kernels."""
        with plain_products():
            found = self._run(case, self._plain[dtype], dtype)
            mx.eval(found)
        return found

    def _run(
        self,
        case: Case,
        made: dict[int, DecoderLayer],
        dtype: mx.Dtype,
        goes_on: bool = False,  # (a snapshot would make each run copy the whole context)
    ) -> list[mx.array]:
        layer, batch = made[self.layers[case.half]], ForwardBatch()
        found: list[list[mx.array]] = []
        for x, residual, before in self._given(case, dtype):
            if before is None:
                found.append(list(layer.feed_forward(x, residual, batch)))
                continue
            entry = before if goes_on else before.snapshot()
            found.append(list(layer.attention(x, residual, entry, batch)))
            if isinstance(entry, KDACache) and entry.state is not None:
                found[-1].append(entry.state)
        return [mx.concatenate(list(parts), axis=1) for parts in zip(*found, strict=True)]

    def _given(self, case: Case, dtype: mx.Dtype) -> list[Given]:
        """What a case begins with, made once: x, the residual and a layer's cache."""
        if (case, dtype) not in self._made_for:
            if case not in {known for known, _ in self._made_for}:
                self._made_for.clear()  # (a long context is large)
            mx.random.seed(case.tokens)
            made = [self._new(case, dtype) for _ in range(self.rounds(case))]
            mx.eval([(x, residual, entry.arrays() if entry else []) for x, residual, entry in made])
            self._made_for[case, dtype] = made
        return self._made_for[case, dtype]

    def _new(self, case: Case, dtype: mx.Dtype) -> Given:
        shape = (1, case.tokens, self.config.hidden_size)
        x, residual = (mx.random.normal(shape).astype(self.dtype).astype(dtype) for _ in range(2))
        return x, residual, None if case.half == "experts" else self._entry(case, dtype)

    def _entry(self, case: Case, dtype: mx.Dtype) -> CacheEntry:
        """As after `past` tokens, of random numbers."""
        config, lengths = self.config, (max(case.past, 1),)
        if case.half == "kda":
            tail = mx.random.normal((1, config.short_conv_kernel_size - 1, 3 * config.kda_width))
            shape = (1, config.kda_num_heads, config.kda_head_dim, config.kda_head_dim)
            return KDACache(lengths, tail.astype(self.dtype).astype(dtype), mx.random.normal(shape))
        entry = LatentCache(bits=8 if case.packed else None)
        for start in range(0, case.past, BLOCK):  # (packing takes several float32 copies)
            tokens = min(BLOCK, case.past - start)
            latents = mx.random.normal((1, tokens, config.latent_width), self.dtype)
            entry.append(latents.astype(dtype))
            mx.eval(entry.arrays())
            entry.lengths = lengths
        return entry


def _layers(config: ModelConfig) -> Iterator[tuple[Half, int]]:
    """The first layer with each half."""
    for half in ("kda", "mla"):
        numbers = [i for i, layer in enumerate(config.layers) if layer.attention == half]
        with_experts = [i for i in numbers if config.layers[i].feed_forward == "moe"]
        if numbers:
            yield half, (with_experts or numbers)[0]
    experts = [i for i, layer in enumerate(config.layers) if layer.feed_forward == "moe"]
    if experts:
        yield "experts", experts[0]


def _with_fewer_experts(config: ModelConfig, layers: dict[Half, int], size: int) -> ModelConfig:
    """As many as `size` bytes have room for: what is chosen depends on tokens an expert."""
    E = config.num_experts
    if "experts" not in layers:
        return config
    start = f"model.layers.{layers['experts']}."
    own = sum(
        _bytes(tensor, config)
        for tensor in tensors(config)
        if tensor.join is Join.STACK and tensor.name.startswith(start)
    )
    groups, k = config.num_expert_group, config.num_experts_per_token
    while own > size and E % (2 * groups) == 0 and E // 2 >= 4 * max(k, groups):
        E, own = E // 2, own // 2
    return replace(config, num_experts=E)


def _bytes(tensor: Tensor, config: ModelConfig) -> int:
    how = stored_quantization(tensor, config)
    return prod(tensor.shape) * (how.bits if how else 16) // 8


def _in_dtype(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    always = name.removesuffix(".weight").endswith(ALWAYS_FLOAT32)
    return array.astype(mx.float32 if always else dtype)
