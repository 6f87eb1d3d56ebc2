"""config.json of a Kimi Linear folder, read strictly: absent, absurd, contradictory is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_kimi.checkpoint.fields import Fields, Json, read_json, shown_json
from mlx_kimi.errors import KimiError

Attention = Literal["kda", "mla"]
FeedForward = Literal["dense", "moe"]

LINEAR_ALIASES = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
LINEAR_FIELDS = {*LINEAR_ALIASES, "kda_layers", "full_attn_layers"}

# The limits keep a hostile config from asking for more than any real model could: an error at
# once instead of an allocation of 1e18 elements.
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 24
MAX_LAYERS = 4096
MAX_EXPERTS = 1 << 16  # of all layers together
MAX_CONTEXT = 1 << 40

# group_size and bits that each quantization mode of MLX accepts.
QUANTIZATION_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "nvfp4": ((16,), (4,)),
    "mxfp8": ((32,), (8,)),
}


@dataclass(frozen=True)
class Quantization:
    """How one matrix is stored: `bits` a weight, one scale (and bias) for `group_size` weights."""

    group_size: int
    bits: int
    mode: str = "affine"

    def packed(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The arrays that a matrix [..., out, in] is stored as, and their shapes."""
        *rows, width = shape
        groups = (*rows, width // self.group_size)
        parts = {"weight": (*rows, width * self.bits // 32), "scales": groups}
        return parts | {"biases": groups} if self.mode == "affine" else parts


@dataclass(frozen=True)
class Layer:
    """What one decoder layer is made of."""

    attention: Attention
    feed_forward: FeedForward


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that decide the model, under their published names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    model_max_length: int
    # linear_attn_config
    kda_num_heads: int
    kda_head_dim: int
    short_conv_kernel_size: int
    # mixture of experts
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    moe_intermediate_size: int
    moe_renormalize: bool
    routed_scaling_factor: float
    num_expert_group: int
    topk_group: int
    layers: tuple[Layer, ...]
    # None: not quantized. Paths in `overrides` differ from the default; None there: not quantized.
    quantization: Quantization | None
    overrides: Mapping[str, Quantization | None]

    @property
    def kda_width(self) -> int:
        """Channels of q, k and v of a KDA layer, all heads together."""
        return self.kda_num_heads * self.kda_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Channels of one MLA head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Channels that an MLA layer keeps for a token: the latent and the shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def shared_width(self) -> int:
        """Inner channels of the shared experts, which are one wider MLP."""
        return self.num_shared_experts * self.moe_intermediate_size

    def part(self, layers: range) -> ModelConfig:
        """Of a model with only these layers."""
        kept = self.layers[layers.start : layers.stop]
        return replace(self, layers=kept, num_hidden_layers=len(kept))

    def quantization_of(self, path: str) -> Quantization | None:
        """The quantization that config.json gives to the module at `path`."""
        return self.overrides.get(path, self.quantization)

    @staticmethod
    def read(folder: Path) -> ModelConfig:
        """Read `folder`/config.json.

        Raises:
            KimiError: the file is missing, is not JSON, or describes no Kimi Linear model.
        """
        return ModelConfig.from_json(read_json(folder / "config.json"))

    @staticmethod
    def from_json(config: Json) -> ModelConfig:
        """Check a parsed config.json and keep what decides the model.

        Raises:
            KimiError: a field is missing, of the wrong type, out of range, or contradicts another.
        """
        fields = Fields(config, "config.json")
        fields.must_be("model_type", "kimi_linear", required=True)
        layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
        heads = fields.integer("num_attention_heads", 1, MAX_WIDTH)
        linear = _linear_fields(fields)
        experts = fields.integer("num_experts", 0, MAX_EXPERTS, default=0)
        if layers * experts > MAX_EXPERTS:  # each one is three names before any file is compared
            raise KimiError(
                f"config.json: num_experts {experts} in {layers} layers are more than "
                f"{MAX_EXPERTS} experts"
            )
        _refuse_variants(fields, heads)

        result = ModelConfig(
            vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB),
            hidden_size=fields.integer("hidden_size", 1, MAX_WIDTH),
            intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            kv_lora_rank=fields.integer("kv_lora_rank", 1, MAX_WIDTH),
            qk_nope_head_dim=fields.integer("qk_nope_head_dim", 1, MAX_WIDTH),
            qk_rope_head_dim=fields.integer("qk_rope_head_dim", 1, MAX_WIDTH),
            v_head_dim=fields.integer("v_head_dim", 1, MAX_WIDTH),
            rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            model_max_length=fields.integer("model_max_length", 1, MAX_CONTEXT),
            kda_num_heads=linear.integer("num_heads", 1, MAX_WIDTH),
            kda_head_dim=linear.integer("head_dim", 1, MAX_WIDTH),
            short_conv_kernel_size=linear.integer("short_conv_kernel_size", 2, 64),
            num_experts=experts,
            num_experts_per_token=fields.integer("num_experts_per_token", 1, experts)
            if experts
            else 0,
            num_shared_experts=fields.integer("num_shared_experts", 0, MAX_EXPERTS, default=0),
            moe_intermediate_size=fields.integer("moe_intermediate_size", 1, MAX_WIDTH)
            if experts
            else 0,
            moe_renormalize=fields.boolean("moe_renormalize", default=True),
            routed_scaling_factor=fields.number("routed_scaling_factor", 0.0, 1e6, default=1.0),
            num_expert_group=fields.integer("num_expert_group", 1, max(experts, 1), default=1),
            topk_group=fields.integer("topk_group", 1, max(experts, 1), default=1),
            layers=_layers(fields, linear, layers, experts),
            **_quantization(config),
        )
        _check_groups(result)
        return result


def _linear_fields(fields: Fields) -> Fields:
    """linear_attn_config, or transformers' flat spelling of it."""
    linear = fields.get("linear_attn_config")
    flat = {
        name: fields.values[alias]
        for name, alias in LINEAR_ALIASES.items()
        if fields.values.get(alias) is not None
    }
    if linear is None and flat:
        linear = {}
    if not isinstance(linear, dict):
        raise KimiError(
            f"{fields.where}: linear_attn_config "
            + ("is missing" if linear is None else f"must be an object but is {shown_json(linear)}")
        )
    unknown = sorted(set(linear) - LINEAR_FIELDS)
    if unknown:
        # A field of another gate (a lower bound, negative eigenvalues) would change every number.
        raise KimiError(
            f"{fields.where}: linear_attn_config.{unknown[0]} is not known here "
            f"(value {shown_json(linear[unknown[0]])})"
        )
    merged = dict(linear)
    for name, value in flat.items():
        merged[LINEAR_ALIASES[name]] = value
    return Fields(merged, f"{fields.where}: linear_attn_config", LINEAR_ALIASES)


def _refuse_variants(fields: Fields, heads: int) -> None:
    """Name what would need other mathematics than checkpoint and paper give."""
    fields.must_be("hidden_act", "silu")
    fields.must_be("mla_use_nope", True)
    fields.must_be("moe_router_activation_func", "sigmoid")
    fields.must_be("num_key_value_heads", heads)
    fields.must_be("attention_bias", False)
    fields.must_be("num_nextn_predict_layers", 0)
    if fields.get("q_lora_rank") is not None:
        rank = shown_json(fields.get("q_lora_rank"))
        raise KimiError(f"{fields.where}: q_lora_rank must be null but is {rank}")


def _layers(fields: Fields, linear: Fields, count: int, experts: int) -> tuple[Layer, ...]:
    attention = _attention_by_layer(fields, linear, count)
    dense_until = fields.integer("first_k_dense_replace", 0, MAX_LAYERS, default=0)
    every = fields.integer("moe_layer_freq", 1, MAX_LAYERS, default=1)
    listed = fields.strings("mlp_layer_types", count, {"dense": "dense", "sparse": "moe"})
    published = "first_k_dense_replace" in fields.values or listed is None
    by_rule: list[FeedForward] = [
        "moe" if experts and i >= dense_until and i % every == 0 else "dense" for i in range(count)
    ]
    if listed is not None and published and listed != by_rule:
        raise KimiError(
            f"{fields.where}: mlp_layer_types contradicts first_k_dense_replace "
            f"{dense_until}, moe_layer_freq {every} and num_experts {experts}"
        )
    feed_forward = by_rule if listed is None else listed
    if not experts and "moe" in feed_forward:
        raise fields.missing("num_experts")
    return tuple(Layer(a, f) for a, f in zip(attention, feed_forward, strict=True))


def _attention_by_layer(fields: Fields, linear: Fields, count: int) -> list[Attention]:
    types = fields.strings(
        "layer_types", count, {"linear_attention": "kda", "full_attention": "mla"}
    )
    kda = linear.layer_numbers("kda_layers", count)
    full = linear.layer_numbers("full_attn_layers", count)
    if kda is None or full is None:
        if types is None:
            raise linear.missing("kda_layers" if kda is None else "full_attn_layers")
        return types
    for number in range(1, count + 1):
        times = kda.count(number) + full.count(number)
        if times != 1:
            raise KimiError(
                f"{linear.where}: layer {number} of {count} must be in one of kda_layers and "
                f"full_attn_layers but is in {'neither' if times == 0 else f'them {times} times'}"
            )
    attention: list[Attention] = ["kda" if n in kda else "mla" for n in range(1, count + 1)]
    if types is not None and types != attention:
        raise KimiError(f"{fields.where}: layer_types contradicts linear_attn_config.kda_layers")
    return attention


def _check_groups(config: ModelConfig) -> None:
    experts, groups = config.num_experts, config.num_expert_group
    if not experts:
        return
    if experts % groups:
        raise KimiError(f"config.json: num_expert_group {groups} must divide num_experts {experts}")
    if config.topk_group > groups:
        raise KimiError(
            f"config.json: topk_group {config.topk_group} is more than num_expert_group {groups}"
        )
    if groups > 1 and experts // groups < 2:
        # A group's score is the sum of its best two experts.
        raise KimiError(
            f"config.json: num_expert_group {groups} leaves fewer than 2 of {experts} experts "
            "a group"
        )
    reachable = config.topk_group * (experts // groups)
    if config.num_experts_per_token > reachable:
        raise KimiError(
            f"config.json: num_experts_per_token {config.num_experts_per_token} is more than the "
            f"{reachable} experts of topk_group {config.topk_group} groups"
        )


def _quantization(config: Json) -> dict[str, Any]:
    """`quantization` as mlx-lm writes it: a default, and modules by path that differ from it."""
    value = config.get("quantization")
    if value is None:
        if config.get("quantization_config") is not None:
            raise KimiError(
                "config.json: quantization_config without quantization: this folder was quantized "
                "by another tool than MLX; convert the unquantized checkpoint instead"
            )
        return {"quantization": None, "overrides": {}}
    if not isinstance(value, dict):
        raise KimiError(f"config.json: quantization must be an object but is {shown_json(value)}")
    default = _one_quantization(value, "quantization")
    overrides: dict[str, Quantization | None] = {}
    for path, entry in value.items():
        if path in ("group_size", "bits", "mode"):
            continue
        if isinstance(entry, bool):
            overrides[path] = default if entry else None
        elif isinstance(entry, dict):
            overrides[path] = _one_quantization(entry, f"quantization.{path}")
        else:
            raise KimiError(
                f"config.json: quantization.{path} must be true, false or an object "
                f"but is {shown_json(entry)}"
            )
    return {"quantization": default, "overrides": overrides}


def _one_quantization(value: Json, where: str) -> Quantization:
    mode = value.get("mode", "affine")
    if not isinstance(mode, str) or mode not in QUANTIZATION_MODES:
        raise KimiError(
            f"config.json: {where}.mode must be one of {', '.join(QUANTIZATION_MODES)} "
            f"but is {shown_json(mode)}"
        )
    group_sizes, bits = QUANTIZATION_MODES[mode]
    found: dict[str, Any] = {}
    for name, allowed in (("group_size", group_sizes), ("bits", bits)):
        found[name] = value.get(name)
        if type(found[name]) is not int or found[name] not in allowed:  # (64.0 == 64, True == 1)
            raise KimiError(
                f"config.json: {where}.{name} must be one of {', '.join(map(str, allowed))} "
                f"for mode {mode} but is {shown_json(found[name])}"
            )
    return Quantization(found["group_size"], found["bits"], mode)
