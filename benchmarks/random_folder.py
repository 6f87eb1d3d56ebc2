"""Write a folder of the 48B's shape with random 4-bit weights, 27.6 GB, a layer at a time.

    python -m benchmarks.random_folder FOLDER [--layers N]

It loads here and in mlx-lm, and answers nonsense. The tokenizer is the pocket model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.full_size import CONFIG
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.checkpoint.config import ModelConfig, read_json
from mlx_kimi.checkpoint.files import INDEX
from mlx_kimi.checkpoint.tensors import Tensor, tensors
from mlx_kimi.model.random_weights import random_tensor

TOKENIZER = ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja")


def write(folder: Path, layers: int) -> None:
    """Everything that a folder in the MLX layout has."""
    pocket = read_json(pocket_folder() / "config.json")
    linear = CONFIG["linear_attn_config"]
    kept = {
        key: [n for n in linear[key] if n <= layers] for key in ("kda_layers", "full_attn_layers")
    }
    config: dict[str, Any] = CONFIG | {
        "num_hidden_layers": layers,
        "linear_attn_config": linear | kept,
        **{f"{token}_token_id": pocket[f"{token}_token_id"] for token in ("bos", "eos", "pad")},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER:
        shutil.copy(pocket_folder() / name, folder)
    parsed = ModelConfig.from_json(config)
    shards: dict[str, list[Tensor]] = {}
    for tensor in tensors(parsed):
        place = ".".join(tensor.name.split(".")[:3]) if ".layers." in tensor.name else "beside"
        shards.setdefault(place, []).append(tensor)
    mx.random.seed(0)
    names: dict[str, str] = {}
    for number, members in enumerate(shards.values(), start=1):
        arrays = {k: v for t in members for k, v in random_tensor(t, parsed, mx.bfloat16).items()}
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        mx.save_safetensors(str(folder / file), arrays, metadata={"format": "mlx"})
        names |= dict.fromkeys(arrays, file)
        print(f"{file}: {sum(a.nbytes for a in arrays.values()) / 1e9:.2f} GB", flush=True)
        del arrays
        mx.clear_cache()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    options = parser.parse_args()
    write(options.folder, options.layers)


if __name__ == "__main__":
    main()
