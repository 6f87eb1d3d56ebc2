"""config.json: the 48B's is read, both spellings are, and whatever else is named in one line."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_kimi.checkpoint.config import ModelConfig, Quantization
from mlx_kimi.errors import KimiError
from tests.checkpoints import CONFIGS, GROUPED, TINY, transformers_config
from tests.test_names import KIMI_48B

Json = dict[str, Any]
MISSING = object()


def changed(field: str, value: Any, config: Json = TINY) -> Json:
    """A copy of `config` with one field replaced or taken away; `a.b` is b of the object a."""
    config = json.loads(json.dumps(config))
    *outer, name = field.split(".", 1)
    inner = config[outer[0]] if outer else config
    if value is MISSING:
        inner.pop(name, None)
    else:
        inner[name] = value
    return config


def refusal(config: Json) -> str:
    """The error that `config` gives, after checking that it is one short line and comes at once."""
    start = time.process_time()
    with pytest.raises(KimiError) as caught:
        ModelConfig.from_json(config)
    assert time.process_time() - start < 0.5  # seconds of the processor
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


# ------------------------------------------------------------------------------------- the 48B's
def test_the_48b_is_read() -> None:
    config = ModelConfig.from_json(KIMI_48B)
    assert [i + 1 for i, x in enumerate(config.layers) if x.attention == "mla"] == [
        4,
        8,
        12,
        16,
        20,
        24,
        27,
    ]
    assert [x.feed_forward for x in config.layers] == ["dense"] + ["moe"] * 26
    assert (config.kda_width, config.qk_head_dim, config.latent_width) == (4096, 192, 576)
    assert (config.num_experts, config.num_experts_per_token, config.shared_width) == (256, 8, 1024)
    assert (config.kda_num_heads, config.kda_head_dim, config.short_conv_kernel_size) == (
        32,
        128,
        4,
    )
    assert (config.model_max_length, config.routed_scaling_factor) == (1048576, 2.446)
    assert config.quantization is None and not config.tie_word_embeddings


@pytest.mark.parametrize("name", CONFIGS)
def test_both_spellings_describe_the_same_model(name: str) -> None:
    published = ModelConfig.from_json(CONFIGS[name])
    assert ModelConfig.from_json(transformers_config(CONFIGS[name])) == published
    both = {**CONFIGS[name], **transformers_config(CONFIGS[name])}
    assert ModelConfig.from_json(both) == published


@pytest.mark.parametrize(
    "published, alias",
    {
        "num_experts_per_token": "num_experts_per_tok",
        "num_expert_group": "n_group",
        "num_shared_experts": "n_shared_experts",
        "moe_renormalize": "norm_topk_prob",
        "model_max_length": "max_position_embeddings",
        "num_experts": "num_local_experts",
    }.items(),
)
def test_an_alias_is_the_field_and_may_not_contradict_it(published: str, alias: str) -> None:
    value = GROUPED[published]
    renamed = changed(alias, value, changed(published, MISSING, GROUPED))
    assert ModelConfig.from_json(renamed) == ModelConfig.from_json(GROUPED)
    other = (not value) if isinstance(value, bool) else value * 2
    message = refusal(changed(alias, other, GROUPED))
    assert published in message and alias in message


@pytest.mark.parametrize(
    "inner, alias",
    {
        "head_dim": "linear_head_dim",
        "num_heads": "linear_num_heads",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
    }.items(),
)
def test_a_flat_spelling_may_not_contradict_linear_attn_config(inner: str, alias: str) -> None:
    value = TINY["linear_attn_config"][inner]
    assert ModelConfig.from_json(changed(alias, value)) == ModelConfig.from_json(TINY)
    message = refusal(changed(alias, value + 1))
    assert inner in message and alias in message


@pytest.mark.parametrize(
    "change, named",
    [
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"mlp_layer_types": ["dense"] * 4}, "mlp_layer_types"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"num_hidden_layers": 5}, "layer 5"),
        ({"num_hidden_layers": 3}, "full_attn_layers"),
        ({"num_expert_group": 3}, "num_expert_group"),
        ({"num_expert_group": 8, "topk_group": 8}, "num_expert_group"),
        ({"num_expert_group": 2, "topk_group": 3}, "topk_group"),
        ({"num_expert_group": 4, "num_experts_per_token": 3}, "num_experts_per_token"),
        ({"num_experts_per_token": 9}, "num_experts_per_token"),
    ],
    ids=lambda x: "" if isinstance(x, str) else ",".join(x),
)
def test_a_contradiction_is_named(change: Json, named: str) -> None:
    assert named in refusal({**TINY, **change})


@pytest.mark.parametrize(
    "kda, full, named",
    [
        ([1, 2, 3], [3, 4], "layer 3"),
        ([1, 2], [4], "layer 3"),
        ([1, 2, 3, 3], [4], "layer 3"),
        ([0, 1, 2], [3], "kda_layers"),  # a 0-based list
        ([1, 2, 3], [5], "full_attn_layers"),
        ([1, 2, 3.0], [4], "kda_layers"),
        ([True, 2, 3], [4], "kda_layers"),
        ("123", [4], "kda_layers"),
        ({"1": 1}, [4], "kda_layers"),
        (None, [4], "kda_layers"),
        ([1, 2, 3], None, "full_attn_layers"),
    ],
)
def test_layer_lists_must_name_each_layer_once(kda: Any, full: Any, named: str) -> None:
    config = changed("linear_attn_config.kda_layers", kda)
    assert named in refusal(changed("linear_attn_config.full_attn_layers", full, config))


# -------------------------------------------------------------------------------- absurd values
SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "model_max_length",
    "linear_attn_config.num_heads",
    "linear_attn_config.head_dim",
    "linear_attn_config.short_conv_kernel_size",
    "num_experts_per_token",
    "moe_intermediate_size",
]
COUNTS = ["num_experts", "num_shared_experts", "first_k_dense_replace"]  # may be 0, may be absent
POSITIVE_COUNTS = ["num_expert_group", "topk_group", "moe_layer_freq"]  # may be absent
NUMBERS = ["rms_norm_eps", "routed_scaling_factor"]
FLAGS = ["tie_word_embeddings", "moe_renormalize"]
NEVER = [-1, 10**18, 10**400, 1e18, 1.5, "64", "", True, math.nan, math.inf, [1], {"a": 1}]
ABSURD = [
    *((field, value) for field in SIZES for value in [*NEVER, 0, None, MISSING]),
    *((field, value) for field in COUNTS for value in NEVER),
    *((field, value) for field in POSITIVE_COUNTS for value in [*NEVER, 0]),
    *((field, value) for field in NUMBERS for value in NEVER if value != 1.5),
    *((field, value) for field in NUMBERS for value in [0, -1e-5]),
    ("rms_norm_eps", 1.5),
    ("rms_norm_eps", MISSING),
    *((field, value) for field in FLAGS for value in [0, 1, "true", math.nan, [True], {}]),
    *(("linear_attn_config", value) for value in [None, MISSING, 3, "x", [1], True]),
    *(("model_type", value) for value in [None, MISSING, "llama", 3, ["kimi_linear"]]),
    ("mla_use_nope", False),
    ("mla_use_nope", 1),
    ("hidden_act", "gelu"),
    ("moe_router_activation_func", "softmax"),
    ("q_lora_rank", 1536),
    ("attention_bias", True),
    ("num_nextn_predict_layers", 1),
]


def described(value: Any) -> str:
    return "missing" if value is MISSING else repr(value)[:12]


@pytest.mark.parametrize("field, value", ABSURD, ids=[f"{f}={described(v)}" for f, v in ABSURD])
def test_an_absurd_value_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    message = refusal(changed(field, value))
    assert field.split(".")[-1] in message
    assert "is missing" in message or "must be" in message


def test_a_model_of_the_largest_counts_together_is_refused() -> None:
    # 4096 layers of 65,536 experts would be 800 million names, whatever the files hold.
    config = {**TINY, "num_hidden_layers": 4096, "num_experts": 1 << 16}
    config = changed("linear_attn_config.kda_layers", list(range(2, 4097)), config)
    assert "num_experts" in refusal(changed("linear_attn_config.full_attn_layers", [1], config))


def test_a_list_of_a_million_layers_is_refused_at_once() -> None:
    config = changed("linear_attn_config.full_attn_layers", [], {**TINY, "num_hidden_layers": 4096})
    layers = [*range(1, 4096), *[4096] * 10**6]
    assert "kda_layers" in refusal(changed("linear_attn_config.kda_layers", layers, config))


def test_a_value_is_shortened_in_its_error() -> None:
    assert len(refusal(changed("hidden_size", "x" * 10**6))) < 300


@pytest.mark.parametrize(
    "field", ["safe_gate", "lower_bound", "gate_lower_bound", "allow_neg_eigval", "a\nb"]
)
def test_an_unknown_gate_field_is_an_error(field: str) -> None:
    assert field.split("\n")[0] in refusal(changed(f"linear_attn_config.{field}", -5.0))


def test_fields_that_decide_nothing_are_ignored() -> None:
    config = {**TINY, "rope_theta": "x", "auto_map": {"AutoModel": "evil.py"}, "use_cache": 3}
    assert ModelConfig.from_json(config) == ModelConfig.from_json(TINY)


# --------------------------------------------------------------------------------- quantization
def test_quantization_gives_a_default_and_overrides_by_path() -> None:
    entry = {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.layers.1.mlp.gate": {"group_size": 64, "bits": 8},
        "lm_head": False,
        "model.embed_tokens": True,
    }
    config = ModelConfig.from_json({**TINY, "quantization": entry, "quantization_config": entry})
    assert config.quantization_of("model.layers.1.self_attn.q_proj") == Quantization(64, 4)
    assert config.quantization_of("model.layers.1.mlp.gate") == Quantization(64, 8)
    assert config.quantization_of("model.embed_tokens") == Quantization(64, 4)
    assert config.quantization_of("lm_head") is None


@pytest.mark.parametrize(
    "mode, group_size, bits", [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
)
def test_quantization_modes_are_known_with_their_sizes(
    mode: str, group_size: int, bits: int
) -> None:
    entry = {"mode": mode, "group_size": group_size, "bits": bits}
    config = ModelConfig.from_json({**TINY, "quantization": entry})
    assert config.quantization == Quantization(group_size, bits, mode)
    assert "group_size" in refusal({**TINY, "quantization": {**entry, "group_size": 64}})


GOOD = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    "entry, named",
    [
        (4, "quantization"),
        ([4], "quantization"),
        ({}, "group_size"),
        ({"group_size": 64}, "bits"),
        ({**GOOD, "bits": 7}, "bits"),
        ({**GOOD, "bits": "4"}, "bits"),
        ({**GOOD, "bits": True}, "bits"),
        ({**GOOD, "bits": [4]}, "bits"),
        ({**GOOD, "bits": 4.0}, "bits"),
        ({**GOOD, "group_size": 64.0}, "group_size"),
        ({**GOOD, "lm_head": {**GOOD, "bits": 8.0}}, "lm_head"),
        ({**GOOD, "group_size": 0}, "group_size"),
        ({**GOOD, "group_size": 10**18}, "group_size"),
        ({**GOOD, "group_size": math.nan}, "group_size"),
        ({**GOOD, "mode": "gptq"}, "mode"),
        ({**GOOD, "mode": ["affine"]}, "mode"),
        ({**GOOD, "lm_head": 3}, "lm_head"),
        ({**GOOD, "lm_head": {"bits": 4}}, "lm_head"),
        ({**GOOD, "lm\nhead": "x"}, "head"),
    ],
    ids=repr,
)
def test_an_absurd_quantization_is_named(entry: Any, named: str) -> None:
    message = refusal({**TINY, "quantization": entry})
    assert "quantization" in message and named in message


def test_another_tools_quantization_is_named() -> None:
    message = refusal({**TINY, "quantization_config": {"quant_method": "fp8"}})
    assert "quantization_config" in message


# ----------------------------------------------------------------------------------- the file
@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "not_json": b"{'model_type': 1}",
        "truncated": json.dumps(TINY).encode()[:-20],
        "array": b"[]",
        "null": b"null",
        "string": b'"kimi_linear"',
        "invalid_utf8": b'{"model_type": "\xff\xfe"}',
        "utf16": json.dumps(TINY).encode("utf-16"),
        "nul": b"\x00" * 100,
        "deep": b'{"a":' * 100_000,
        "deep_array": b"[" * 100_000 + b"]" * 100_000,
        "deep_value": b'{"hidden_size":' + b"[" * 900 + b"]" * 900 + b"}",
        "deeper_value": b'{"model_type":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        "many_digits": b'{"model_type": "kimi_linear", "num_hidden_layers": ' + b"9" * 9999 + b"}",
        "surrogate": b'{"model_type": "\\ud800"}',
        "control": b'{"model_type": "\\u001b[31m\\n"}',
    }.items(),
    ids=lambda item: item[0],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, content: tuple[str, bytes]) -> None:
    (tmp_path / "config.json").write_bytes(content[1])
    with pytest.raises(KimiError) as caught:
        ModelConfig.read(tmp_path)
    message = str(caught.value)
    assert "config.json" in message and message.isprintable() and len(message) < 500
    message.encode()  # a lone surrogate could not be printed


def test_nesting_of_any_depth_is_refused_in_one_line(tmp_path: Path) -> None:
    """Python's own limit may be met when the file is parsed or when the error shows the value."""
    limit = sys.getrecursionlimit()
    for depth in range(limit - 100, limit + 10):
        (tmp_path / "config.json").write_text('{"model_type":' + "[" * depth + "]" * depth + "}")
        with pytest.raises(KimiError):
            ModelConfig.read(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    if kind == "directory":
        (tmp_path / "config.json").mkdir()
    with pytest.raises(KimiError, match="config.json"):
        ModelConfig.read(tmp_path)
