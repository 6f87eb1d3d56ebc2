"""Random checkpoints on disk, in the formats that are published, and the logits they must give.

A weight depends on the seed, its name and its shape only, so that every shard count, dtype and
layout of a config holds the same model. `tests/reference/make.py` ran those models through
transformers; `reference(name)` is what came out.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Config = dict[str, Any]
Shape = tuple[int, ...]


# -------------------------------------------------------------------------------------- configs
def published_config(kda_layers: list[int], full_attn_layers: list[int], **fields: Any) -> Config:
    """A config.json as the 48B's, small; `fields` replace, `kda_*` go to linear_attn_config."""
    linear_attn_config = {
        "kda_layers": kda_layers,  # 1-based, as is full_attn_layers
        "full_attn_layers": full_attn_layers,
        "num_heads": fields.pop("kda_num_heads", 2),
        "head_dim": fields.pop("kda_head_dim", 32),
        "short_conv_kernel_size": fields.pop("kda_conv", 4),
    }
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "vocab_size": 256,
        "tie_word_embeddings": False,
        "hidden_size": 64,
        "num_hidden_layers": len(kda_layers) + len(full_attn_layers),
        "intermediate_size": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "num_attention_heads": 2,
        "num_key_value_heads": fields.get("num_attention_heads", 2),
        "head_dim": 72,  # nothing reads it, in the 48B either
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "mla_use_nope": True,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "model_max_length": 4096,
        "linear_attn_config": linear_attn_config,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 64,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": 2.446,
        "num_expert_group": 1,
        "topk_group": 1,
        "use_grouped_topk": True,
        "num_nextn_predict_layers": 0,
        "use_cache": True,
        **fields,
    }


TINY = published_config(kda_layers=[1, 2, 3], full_attn_layers=[4])

# No two sizes agree, few are multiples of 32, and MLA layers follow each other.
ODD_SIZES: Config = {
    "vocab_size": 203,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 5,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 24,
    "v_head_dim": 56,
    "kda_num_heads": 3,
    "kda_head_dim": 64,
    "kda_conv": 3,
    "num_experts": 6,
    "num_experts_per_token": 3,
    "num_shared_experts": 2,
    "moe_intermediate_size": 72,
}
ODD = published_config(kda_layers=[1, 4], full_attn_layers=[2, 3, 5], **ODD_SIZES)

# With an even number of heads, so that two ranks can share them.
EVEN: Config = {**ODD, "num_attention_heads": 6, "num_key_value_heads": 6}
EVEN["linear_attn_config"] = {**ODD["linear_attn_config"], "num_heads": 4}

# Begins with MLA, ends with KDA, has two dense layers, and no lm_head of its own.
ODD_TIED = published_config(
    kda_layers=[2, 5],
    full_attn_layers=[1, 3, 4],
    tie_word_embeddings=True,
    first_k_dense_replace=2,
    **ODD_SIZES,
)

GROUPED = published_config(
    kda_layers=[1, 2],
    full_attn_layers=[3],
    num_experts=16,
    num_experts_per_token=4,
    num_expert_group=4,
    topk_group=2,
    moe_renormalize=False,
    routed_scaling_factor=1.5,
)

# Three layers of the 48B, one of each kind, with 16 of its 256 experts: 416M parameters.
FULL_WIDTH = published_config(
    kda_layers=[1, 2],
    full_attn_layers=[3],
    vocab_size=1024,
    hidden_size=2304,
    intermediate_size=9216,
    num_attention_heads=32,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    kda_num_heads=32,
    kda_head_dim=128,
    num_experts=16,
    num_experts_per_token=8,
    moe_intermediate_size=1024,
)

# Experts of the 48B's width, and little else: 150M parameters.
WIDE = FULL_WIDTH | {
    "num_experts": 8,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "linear_attn_config": FULL_WIDTH["linear_attn_config"] | {"num_heads": 8},
}
CONFIGS = {
    "tiny": TINY,
    "odd": ODD,
    "odd_tied": ODD_TIED,
    "grouped": GROUPED,
    "full_width": FULL_WIDTH,
}


def transformers_config(config: Config) -> Config:
    """The config.json that transformers 5 writes for a model that never was on the hub.

    It has no linear_attn_config and no first_k_dense_replace: lists per layer take their place.
    """
    linear = config["linear_attn_config"]
    layers = range(config["num_hidden_layers"])
    absent = {
        "linear_attn_config",
        "first_k_dense_replace",
        "moe_layer_freq",
        "use_grouped_topk",
        "moe_router_activation_func",
        "mla_use_nope",
        "rope_theta",
        "rope_scaling",
        "num_nextn_predict_layers",
    }
    return {
        **{field: value for field, value in config.items() if field not in absent},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": config["qk_rope_head_dim"],
        "layer_types": [
            "linear_attention" if i + 1 in linear["kda_layers"] else "full_attention"
            for i in layers
        ],
        "linear_conv_kernel_dim": linear["short_conv_kernel_size"],
        "linear_head_dim": linear["head_dim"],
        "linear_num_heads": linear["num_heads"],
        "mlp_layer_types": [
            "dense" if i < config["first_k_dense_replace"] else "sparse" for i in layers
        ],
        "output_router_logits": False,
        "pretraining_tp": 1,
        "qk_head_dim": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "transformers_version": "5.23.0",
    }


# -------------------------------------------------------------------------------------- tensors
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")


def tensor_shapes(config: Config) -> dict[str, Shape]:
    """The published names and shapes of every tensor, in model order."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        is_kda = i + 1 in config["linear_attn_config"]["kda_layers"]
        is_dense = i < config["first_k_dense_replace"]
        attention = kda_shapes(config) if is_kda else mla_shapes(config)
        feed_forward = dense_shapes(config) if is_dense else moe_shapes(config)
        norms: dict[str, Shape] = {name: (hidden,) for name in BLOCK_NORMS}
        for name, shape in (attention | feed_forward | weights(norms)).items():
            shapes[f"model.layers.{i}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def weights(shapes: dict[str, Shape], prefix: str = "") -> dict[str, Shape]:
    """The same shapes, named `<prefix><name>.weight`."""
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def kda_shapes(config: Config) -> dict[str, Shape]:
    """The tensors of a KDA layer's attention."""
    linear, hidden = config["linear_attn_config"], config["hidden_size"]
    heads, head_dim = linear["num_heads"], linear["head_dim"]
    channels, taps = heads * head_dim, linear["short_conv_kernel_size"]
    shapes: dict[str, Shape] = {"b_proj": (heads, hidden), "o_norm": (head_dim,)}
    for x in "qkv":
        shapes |= {f"{x}_proj": (channels, hidden), f"{x}_conv1d": (channels, 1, taps)}
    for x in "fg":
        shapes |= {f"{x}_a_proj": (head_dim, hidden), f"{x}_b_proj": (channels, head_dim)}
    return {
        "self_attn.A_log": (1, 1, heads, 1),
        "self_attn.dt_bias": (channels,),
        **weights(shapes | {"o_proj": (hidden, channels)}, "self_attn."),
    }


def mla_shapes(config: Config) -> dict[str, Shape]:
    """The tensors of an MLA layer's attention."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    latent, value = config["kv_lora_rank"], config["v_head_dim"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    shapes: dict[str, Shape] = {
        "q_proj": (heads * (nope + rope), hidden),
        "kv_a_proj_with_mqa": (latent + rope, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (nope + value), latent),
        "o_proj": (hidden, heads * value),
    }
    return weights(shapes, "self_attn.")


def mlp_shapes(hidden: int, width: int) -> dict[str, Shape]:
    """The three matrices of a SwiGLU."""
    return {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }


def dense_shapes(config: Config) -> dict[str, Shape]:
    """The tensors of a dense layer's MLP."""
    return weights(mlp_shapes(config["hidden_size"], config["intermediate_size"]), "mlp.")


def moe_shapes(config: Config) -> dict[str, Shape]:
    """The tensors of a MoE layer: router, shared experts, routed experts one by one."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    shapes: dict[str, Shape] = {"gate": (config["num_experts"], hidden)}
    for name, shape in mlp_shapes(hidden, width * config["num_shared_experts"]).items():
        shapes[f"shared_experts.{name}"] = shape
    for e in range(config["num_experts"]):
        for name, shape in zip(("w1", "w3", "w2"), mlp_shapes(hidden, width).values(), strict=True):
            shapes[f"experts.{e}.{name}"] = shape
    return {
        "block_sparse_moe.gate.e_score_correction_bias": (config["num_experts"],),
        **weights(shapes, "block_sparse_moe."),
    }


def random_tensor(name: str, shape: Shape, seed: int) -> np.ndarray:
    """Float32 values of a trained model's size, the same for the same name, shape and seed."""
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    if name.endswith("A_log"):
        return np.log(rng.uniform(1, 16, shape)).astype(np.float32)
    if name.endswith("dt_bias"):
        softplus = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), shape))
        return np.log(np.expm1(softplus)).astype(np.float32)
    normal = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("e_score_correction_bias"):
        return 0.05 * normal
    if "norm" in name:
        return 1 + 0.1 * normal
    return normal * np.float32(shape[-1] ** -0.5)


# ---------------------------------------------------------------------------------------- files
class Entry(NamedTuple):
    """One tensor of a file: its name there, its dtype there, and which weight it is."""

    name: str
    dtype: str  # "F32" or "BF16"
    shape: Shape
    source: str  # the published name

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the file."""
        return math.prod(self.shape) * {"F32": 4, "BF16": 2}[self.dtype]


FLOAT32_IN_BFLOAT16 = ("A_log", "dt_bias", "e_score_correction_bias")


def entries(config: Config, dtype: str, layout: str) -> Iterator[Entry]:
    """What the checkpoint's files hold, in order.

    "published" keeps the decays and the score bias in float32. "transformers" keeps nothing, calls
    a dense MLP block_sparse_moe, and always has an lm_head (a copy of the embedding where tied).
    """
    short = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        if layout == "transformers":
            yield Entry(name.replace(".mlp.", ".block_sparse_moe."), short, shape, name)
        else:
            yield Entry(name, "F32" if name.endswith(FLOAT32_IN_BFLOAT16) else short, shape, name)
    if layout == "transformers" and config["tie_word_embeddings"]:
        embedding = "model.embed_tokens.weight"
        yield Entry("lm_head.weight", short, shapes[embedding], embedding)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_file(path: Path, entries: list[Entry], seed: int) -> None:
    """Write one safetensors file, with one tensor in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins 8-byte aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            values = random_tensor(entry.source, entry.shape, seed)
            file.write((to_bfloat16(values) if entry.dtype == "BF16" else values).data)


def split(entries: list[Entry], shards: int) -> list[list[Entry]]:
    """The entries in `shards` runs of about equal bytes; a tensor is where its first byte falls."""
    total = sum(entry.nbytes for entry in entries)
    runs: list[list[Entry]] = [[] for _ in range(shards)]
    written = 0
    for entry in entries:
        runs[written * shards // total].append(entry)
        written += entry.nbytes
    return runs


def write_checkpoint(
    folder: Path | str,
    config: Config,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    layout: str = "published",
) -> Path:
    """Write a random model: config.json, safetensors and, if sharded, their index.

    Args:
        folder: where to; made if absent.
        config: one of this file's, or any in the published form.
        seed: of the weights.
        dtype: "float32" or "bfloat16".
        shards: how many safetensors files.
        layout: "published" as on the hub, or "transformers" as transformers 5 saves it.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = (transformers_config(config) if layout == "transformers" else config) | {
        "dtype": dtype
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    everything = list(entries(config, dtype, layout))
    weight_map: dict[str, str] = {}
    for number, run in enumerate(split(everything, shards), start=1):
        shard = f"-{number:05}-of-{shards:05}" if shards > 1 else ""
        file = f"model{shard}.safetensors"
        write_file(folder / file, run, seed)
        weight_map |= {entry.name: file for entry in run}
    if shards > 1:
        total_size = sum(entry.nbytes for entry in everything)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


# ----------------------------------------------------------------------------------- references
def token_ids(config: Config, count: int, seed: int = 0) -> np.ndarray:
    """Random token ids, [count] int64."""
    return np.random.Generator(np.random.PCG64([seed, count])).integers(
        0, config["vocab_size"], count
    )


def fingerprint(config: Config, seed: int) -> np.ndarray:
    """Eight of the weights: other values mean that the stored logits are of another model."""
    name = "model.layers.0.input_layernorm.weight"
    return random_tensor(name, tensor_shapes(config)[name], seed)[:8]


def reference(name: str) -> dict[str, np.ndarray]:
    """What transformers computed for CONFIGS[name].

    `seed` is write_checkpoint's; `ids` [150] gave `logits` [150, vocab] in one pass, and
    `short_ids` [7] gave `short_logits` [7, vocab].
    """
    with np.load(Path(__file__).parent / "reference" / f"{name}.npz") as file:
        stored = dict(file)
    seed = int(stored["seed"])
    np.testing.assert_allclose(
        fingerprint(CONFIGS[name], seed),
        stored["fingerprint"],
        rtol=1e-6,
        err_msg="these weights are not the reference's: run tests.reference.make again",
    )
    return stored
