"""The table of tensors: their names on disk, their shapes, and how one spelling becomes another.

Two spellings exist. The *published* one is the checkpoint's own (one matrix an expert, a joint
`kv_b_proj`); transformers 5 writes it too, with `block_sparse_moe` also around dense layers. The
*MLX layout* is what mlx-lm and `mlx_kimi convert` write: experts stacked, `kv_b_proj` split into
its key half and its value half. The model uses the MLX layout's names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import mlx.core as mx

from mlx_kimi.checkpoint.config import Layer, ModelConfig

# Kept in float32 whatever the model's dtype: decays and routing decide what is remembered and who
# answers, and their rounding errors grow with the text. They are under 0.1 % of the bytes.
ALWAYS_FLOAT32 = (".A_log", ".dt_bias", ".e_score_correction_bias", ".mlp.gate")


class Join(Enum):
    """How published tensors become one tensor of the MLX layout."""

    SAME = auto()  # the same elements in the same order; the shape may be written with extra 1s
    CONV = auto()  # [C, 1, K] or [C, K] -> [C, K, 1]
    STACK = auto()  # one matrix for each expert -> [E, out, in]
    KEY_HALF = auto()  # kv_b_proj [H * (nope + v), lora] -> [H, lora, nope]
    VALUE_HALF = auto()  # kv_b_proj [H * (nope + v), lora] -> [H, v, lora]


@dataclass(frozen=True)
class TensorRow:
    """One family of tensors. Names are relative to `model.layers.{i}.` except in TOP."""

    name: str  # in the MLX layout; `.weight` of a matrix may come with `.scales` and `.biases`
    sources: tuple[str, ...]  # published spellings, the checkpoint's own first
    shape: tuple[str, ...]  # in the MLX layout, as names of `sizes`
    join: Join = Join.SAME
    matrix: bool = False  # a weight that multiplies activations, so that it may be quantized
    split: int | None = None  # the axis that a rank of a sharded model owns a range of


def _row(
    name: str, *shape: str, published: str | tuple[str, ...] | None = None, **how: Any
) -> TensorRow:
    sources = (published,) if isinstance(published, str) else published or (name,)
    return TensorRow(name, sources, shape, **how)


def _matrix(name: str, *shape: str, split: int | None = None, **how: Any) -> TensorRow:
    return _row(f"{name}.weight", *shape, matrix=True, split=split, **how)


EMBEDDING = _matrix("model.embed_tokens", "vocab", "hidden")
NORM = _row("model.norm.weight", "hidden")
LM_HEAD = _matrix("lm_head", "vocab", "hidden")

EVERY_LAYER = (
    _row("input_layernorm.weight", "hidden"),
    _row("post_attention_layernorm.weight", "hidden"),
)

KDA = (
    *(_matrix(f"self_attn.{x}_proj", "kda", "hidden", split=0) for x in "qkv"),
    *(
        _row(
            f"self_attn.{x}_conv.conv.weight",
            *("kda", "taps", "one"),
            published=f"self_attn.{x}_conv1d.weight",
            join=Join.CONV,
            split=0,
        )
        for x in "qkv"
    ),
    _matrix("self_attn.f_a_proj", "kda_head", "hidden"),
    _matrix("self_attn.f_b_proj", "kda", "kda_head", split=0),
    _matrix("self_attn.g_a_proj", "kda_head", "hidden"),
    _matrix("self_attn.g_b_proj", "kda", "kda_head", split=0),
    _matrix("self_attn.b_proj", "kda_heads", "hidden", split=0),
    _row("self_attn.A_log", "one", "one", "kda_heads", "one", split=2),
    _row("self_attn.dt_bias", "kda", split=0),
    _row("self_attn.o_norm.weight", "kda_head"),
    _matrix("self_attn.o_proj", "hidden", "kda", split=1),
)

_KV_B = "self_attn.kv_b_proj.weight"
MLA = (
    _matrix("self_attn.q_proj", "mla_queries", "hidden", split=0),
    _matrix("self_attn.kv_a_proj_with_mqa", "latent_width", "hidden"),
    _row("self_attn.kv_a_layernorm.weight", "lora"),
    _matrix(
        "self_attn.embed_q", "heads", "lora", "nope", published=_KV_B, join=Join.KEY_HALF, split=0
    ),
    _matrix(
        "self_attn.unembed_out",
        "heads",
        "v",
        "lora",
        published=_KV_B,
        join=Join.VALUE_HALF,
        split=0,
    ),
    _matrix("self_attn.o_proj", "hidden", "mla_values", split=1),
)


def _mlp(prefix: str, published: tuple[str, ...], width: str) -> tuple[TensorRow, ...]:
    def one(name: str, *shape: str, split: int) -> TensorRow:
        sources = tuple(f"{place}.{name}.weight" for place in published)
        return _matrix(f"{prefix}.{name}", *shape, published=sources, split=split)

    return (
        one("gate_proj", width, "hidden", split=0),
        one("up_proj", width, "hidden", split=0),
        one("down_proj", "hidden", width, split=1),
    )


DENSE = _mlp("mlp", ("mlp", "block_sparse_moe"), "intermediate")

_EXPERT = "block_sparse_moe.experts.{e}"
MOE = (
    _matrix("mlp.gate", "experts", "hidden", published="block_sparse_moe.gate.weight"),
    _row(
        "mlp.e_score_correction_bias",
        "experts",
        published="block_sparse_moe.gate.e_score_correction_bias",
    ),
    *(
        _matrix(
            f"mlp.switch_mlp.{ours}",
            *("experts", *shape),
            published=f"{_EXPERT}.{theirs}.weight",
            join=Join.STACK,
            split=split,
        )
        for ours, theirs, shape, split in (
            ("gate_proj", "w1", ("expert_width", "hidden"), 1),
            ("up_proj", "w3", ("expert_width", "hidden"), 1),
            ("down_proj", "w2", ("hidden", "expert_width"), 2),
        )
    ),
)
SHARED = _mlp("mlp.shared_experts", ("block_sparse_moe.shared_experts",), "shared_width")


@dataclass(frozen=True)
class Tensor:
    """One tensor of one model: a row of the table with its numbers filled in."""

    name: str  # MLX layout
    sources: tuple[str, ...]  # published spellings; `{e}` in them is the expert's number
    shape: tuple[int, ...]
    join: Join
    matrix: bool
    split: int | None

    @property
    def module(self) -> str:
        """The path that config.json's `quantization` uses for this tensor."""
        return self.name.removesuffix(".weight")

    @property
    def is_half(self) -> bool:
        """Whether the published tensor is a `kv_b_proj`, of which this is one half."""
        return self.join in (Join.KEY_HALF, Join.VALUE_HALF)

    def published(self, source: str) -> list[str]:
        """The names that `source` stands for: one for each expert if this tensor is a stack."""
        if self.join is not Join.STACK:
            return [source]
        return [source.format(e=expert) for expert in range(self.shape[0])]

    def found_in(self, names: Collection[str]) -> list[str]:
        """The published names of this tensor in the spelling that `names` uses."""
        spellings = [self.published(source) for source in self.sources]
        return next((s for s in spellings if any(name in names for name in s)), spellings[0])

    def published_shapes(self, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """The shapes that one published tensor of this family may have."""
        shape = self.shape
        if self.join is Join.CONV:
            channels, taps, _ = shape
            return ((channels, 1, taps), (channels, taps))
        if self.join is Join.STACK:
            return (shape[1:],)
        if self.is_half:
            rows = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
            return ((rows, config.kv_lora_rank),)
        if self.name.endswith(("A_log", "dt_bias")):
            heads, width = config.kda_num_heads, config.kda_head_dim
            return (shape, (heads,)) if self.name.endswith("A_log") else (shape, (heads, width))
        return (shape,)

    def joined(self, parts: list[mx.array], config: ModelConfig) -> mx.array:
        """The published tensors that `found_in` names -> this one; `Join` says how."""
        if self.join is Join.STACK:
            return mx.stack(parts)
        (whole,) = parts
        if self.is_half:
            nope = config.qk_nope_head_dim
            heads = whole.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            if self.join is Join.KEY_HALF:
                return heads[:, :nope].swapaxes(-1, -2)
            return heads[:, nope:]
        return whole.reshape(self.shape)


def sizes(config: ModelConfig) -> dict[str, int]:
    """The numbers behind the shape names of the table."""
    heads = config.num_attention_heads
    return {
        "one": 1,
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "kda": config.kda_width,
        "kda_heads": config.kda_num_heads,
        "kda_head": config.kda_head_dim,
        "taps": config.short_conv_kernel_size,
        "heads": heads,
        "mla_queries": heads * config.qk_head_dim,
        "mla_values": heads * config.v_head_dim,
        "latent_width": config.latent_width,
        "lora": config.kv_lora_rank,
        "nope": config.qk_nope_head_dim,
        "v": config.v_head_dim,
        "experts": config.num_experts,
        "expert_width": config.moe_intermediate_size,
        "shared_width": config.shared_width,
    }


def is_in_part(name: str, config: ModelConfig, part: range) -> bool:
    """Whether a model of these layers alone has the array `name` of the MLX layout.

    The first part embeds and the last one has lm_head. All have the last norm, whose dtype is the
    model's.
    """
    first, last = part.start == 0, part.stop == len(config.layers)
    _, _, below = name.partition("model.layers.")
    if below:
        return int(below.partition(".")[0]) in part
    if name.startswith("model.embed_tokens"):
        return first or (last and config.tie_word_embeddings)
    return last or not name.startswith("lm_head")


def layer_rows(layer: Layer, config: ModelConfig) -> tuple[TensorRow, ...]:
    """The rows that one decoder layer consists of."""
    attention = KDA if layer.attention == "kda" else MLA
    if layer.feed_forward == "dense":
        return EVERY_LAYER + attention + DENSE
    return EVERY_LAYER + attention + MOE + (SHARED if config.num_shared_experts else ())


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the model that `config` describes, in the order of the computation."""
    numbers = sizes(config)

    def fill(row: TensorRow, prefix: str) -> Tensor:
        shape = tuple(numbers[size] for size in row.shape)
        sources = tuple(prefix + source for source in row.sources)
        return Tensor(prefix + row.name, sources, shape, row.join, row.matrix, row.split)

    yield fill(EMBEDDING, "")
    for number, layer in enumerate(config.layers):
        for row in layer_rows(layer, config):
            yield fill(row, f"model.layers.{number}.")
    yield fill(NORM, "")
    if not config.tie_word_embeddings:
        yield fill(LM_HEAD, "")
