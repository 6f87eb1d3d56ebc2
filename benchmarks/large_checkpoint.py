"""A random checkpoint of the 48B's full-width layers, written in little memory.

    python -m benchmarks.large_checkpoint FOLDER [LAYERS]

Two layers are 5.4 GB: a dense one, one of 256 experts, and the embedding and head of 163840 tokens.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kimi.convert.shards import OutputTensor, Shard, lay_out, write_index
from mlx_kimi.evaluation.random_model import PUBLISHED_48B
from tests.checkpoints import entries, to_bfloat16

MAX_SHARD = 2 * 10**9  # bytes; as the 48B's, shards divide the experts of a layer between them
ROWS = 2**22  # elements that are in memory at once


def config_of(layers: int) -> dict[str, Any]:
    """The 48B's config with fewer layers, the second of them MLA."""
    kinds = {
        "kda_layers": [n for n in range(1, layers + 1) if n != 2],
        "full_attn_layers": [2] if layers > 1 else [],
    }
    linear = PUBLISHED_48B["linear_attn_config"] | kinds
    return PUBLISHED_48B | {
        "num_hidden_layers": layers,
        "linear_attn_config": linear,
        "dtype": "bfloat16",
    }


def write(folder: Path, layers: int) -> None:
    """Write the checkpoint into the new `folder`."""
    config = config_of(layers)
    parts = [OutputTensor(entry.name, entry.dtype, entry.shape) for entry in published(config)]
    shards = lay_out([[part] for part in parts], MAX_SHARD)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_index(folder, shards, sum(math.prod(part.shape) for part in parts))
    rng = np.random.default_rng(0)
    for shard in shards:
        write_shard(folder / shard.file, shard, rng)


def published(config: dict[str, Any]) -> Iterator[Any]:
    """What the published checkpoint of `config` holds."""
    return entries(config, "bfloat16", "published")


def write_shard(path: Path, shard: Shard, rng: np.random.Generator) -> None:
    """Fill one file with normal values of a trained model's size."""
    with open(path, "wb") as file:
        file.write(shard.header)
        for tensor in shard.tensors:
            scale = np.float32(tensor.shape[-1] ** -0.5)
            count = math.prod(tensor.shape)
            for start in range(0, count, ROWS):
                values = scale * rng.standard_normal(min(ROWS, count - start), np.float32)
                file.write((to_bfloat16(values) if tensor.dtype == "BF16" else values).data)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
