"""The README's table of memory against context, from the planner: `python -m tools.memory_table`.

For the 48B with 8-bit latents. macOS recommends two thirds of the memory to a GPU up to 36 GB, and
three quarters above: what a Mac really gives is in `mlx_kimi info -m FOLDER`.
"""

from __future__ import annotations

from math import prod

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import Join, tensors
from mlx_kimi.evaluation.random_model import PUBLISHED_48B
from mlx_kimi.loading.memory import SCALES, needs, non_expert_bytes

GB = 10**9
BITS = (8, 6, 4, 3)
CONTEXT = 32_768  # tokens, of a model that does not fit as a whole


def main() -> None:
    config = ModelConfig.from_json(PUBLISHED_48B)
    sizes = [(prod(t.shape), t.join is Join.STACK) for t in tensors(config)]
    whole = sum(size for size, _ in sizes)
    routed = sum(size for size, is_routed in sizes if is_routed)
    print("| Mac | GPU may take | " + " | ".join(f"{bits} bits" for bits in BITS) + " |")
    print("|---|---|" + "---|" * len(BITS))
    for memory in (16, 24, 32, 48, 64, 96, 128):
        limit = memory * GB * (2 if memory <= 36 else 3) // (3 if memory <= 36 else 4)
        cells = []
        for bits in BITS:
            weights = int(whole * (bits + SCALES) / 8)
            wanted = needs(config, weights, latent_bits=8, number=2)
            longest = wanted.longest(limit, config.model_max_length)
            if longest >= CONTEXT:
                cells.append("1M" if longest == 1 << 20 else f"{longest // 1024}K")
                continue
            experts = routed * (bits + SCALES) / 8
            beside = needs(config, int(weights - experts), latent_bits=8, number=2)
            share = (limit - non_expert_bytes(beside, CONTEXT)) / experts
            cells.append(f"{100 * share:.0f} %" if share > 0.04 else "no")
        print(f"| {memory} GB | {limit / GB:.1f} GB | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
