"""What a converted folder holds beside its weights: config.json and the tokenizer's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_kimi.checkpoint.config import ModelConfig, Quantization
from mlx_kimi.checkpoint.fields import read_json
from mlx_kimi.checkpoint.files import INDEX
from mlx_kimi.checkpoint.hub import BESIDE_WEIGHTS
from mlx_kimi.convert.quantize import Scheme
from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import is_there, read_bytes

# Fields of ModelConfig that config.json spells otherwise.
_NOT_PUBLISHED = {
    "kda_num_heads",
    "kda_head_dim",
    "short_conv_kernel_size",
    "layers",
    "quantization",
    "overrides",
}


def small_files(source: Path) -> dict[str, bytes]:
    """The files that describe a model beside its weights, by name, always in the same order.

    Raises:
        KimiError: a file cannot be read.
    """
    names = ("config.json", INDEX, *BESIDE_WEIGHTS)
    return {name: read_bytes(source / name) for name in names if is_there(source / name)}


def copied_files(small: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of the `small_files` that are copied as they are."""
    return {name: small[name] for name in BESIDE_WEIGHTS if name in small}


def refuse_changed(source: Path, small: Mapping[str, bytes]) -> None:
    """Check that the small files are what they were.

    Raises:
        KimiError: one changed.
    """
    if small_files(source) != small:
        raise KimiError(f"{source}: its config.json or tokenizer was changed while it was opened")


def result_config(
    source: Path,
    config: ModelConfig,
    scheme: Scheme | None,
    dtype: str | None,
    quantizations: Mapping[str, Quantization],
) -> bytes:
    """The config.json of the result, which mlx-lm reads as well.

    Args:
        source: the folder with the source's config.json.
        config: the same, understood.
        scheme: how matrices are quantized, None if they are not.
        dtype: what unquantized tensors become, None if they stay as they are.
        quantizations: how each quantized module is stored, by its path.
    """
    written = read_json(source / "config.json")
    given = {name: value for name, value in written.items() if value is not None}
    result = {**written, **_published_fields(config, given), **given}
    linear = result["linear_attn_config"]
    result["linear_attn_config"] = {**_linear_attn_config(config), **linear}
    if dtype is not None:
        result |= {name: dtype for name in ("dtype", "torch_dtype") if name in result}
    for name in ("quantization", "quantization_config"):
        result.pop(name, None)
        if scheme is not None:
            result[name] = _quantization(scheme.default, quantizations)
    return (json.dumps(dict(sorted(result.items())), indent=4) + "\n").encode()


def _published_fields(config: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """What mlx-lm requires or would guess otherwise; transformers 5 may leave it out."""
    result = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in _NOT_PUBLISHED
    }
    result |= {
        "linear_attn_config": {},
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.qk_rope_head_dim,  # required, and used by nothing
        "rope_theta": 10000.0,  # likewise: there is no RoPE
        "mla_use_nope": True,
        "moe_router_activation_func": "sigmoid",
    }
    if "first_k_dense_replace" not in given:
        result |= _first_k_dense_replace(config)
    return result


def _first_k_dense_replace(config: ModelConfig) -> dict[str, int]:
    """The published spelling of mlp_layer_types, where there is one."""
    kinds = [layer.feed_forward for layer in config.layers]
    dense = kinds.index("moe") if "moe" in kinds else len(kinds)
    return {} if "dense" in kinds[dense:] else {"first_k_dense_replace": dense}


def _linear_attn_config(config: ModelConfig) -> dict[str, Any]:
    kinds = [layer.attention for layer in config.layers]
    return {
        "kda_layers": [i for i, kind in enumerate(kinds, start=1) if kind == "kda"],
        "full_attn_layers": [i for i, kind in enumerate(kinds, start=1) if kind == "mla"],
        "num_heads": config.kda_num_heads,
        "head_dim": config.kda_head_dim,
        "short_conv_kernel_size": config.short_conv_kernel_size,
    }


def _quantization(
    default: Quantization, quantizations: Mapping[str, Quantization]
) -> dict[str, Any]:
    """The default, and the modules that are quantized in another way."""
    result: dict[str, Any] = {
        "group_size": default.group_size,
        "bits": default.bits,
        "mode": default.mode,
    }
    overrides = {path: other for path, other in quantizations.items() if other != default}
    for path, other in sorted(overrides.items()):  # always affine, which is the default there
        result[path] = {"group_size": other.group_size, "bits": other.bits}
    return result
