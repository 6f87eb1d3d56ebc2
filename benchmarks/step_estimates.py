"""Estimated cost of steps of several tokens on Macs, by the bytes that a step reads and writes.

    .venv/bin/python -m benchmarks.step_estimates

Nothing here was measured on a Mac. A step reads all weights but the routed experts, and each expert
that one of its tokens chose, once; it reads and writes the states of KDA of its texts, once however
many tokens they have, and reads their latents for each token. Which experts tokens choose is not
known: uniformly at random is the worst; "alike" lets every further token add 0.65 of that. To the
bytes comes what launches cost: 237, at 2.4 microseconds, a public figure of an M3 Ultra (MLX issue
4521).
"""

from __future__ import annotations

from math import prod

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import Join, tensors
from mlx_kimi.evaluation.random_model import PUBLISHED_48B

BANDWIDTHS = {"M1 Max": 400e9, "M4 Max": 546e9, "M3 Ultra": 819e9}  # bytes a second
BYTES_A_WEIGHT = 4.5 / 8  # 4 bits, and a scale and a bias in 16 bits for each 64
LAUNCHES, LAUNCH = 237, 2.4e-6  # seconds
CONTEXT = 512  # tokens
ALIKE = 0.65

CONFIG = ModelConfig.from_json(PUBLISHED_48B)
KDA = sum(layer.attention == "kda" for layer in CONFIG.layers)
MLA = len(CONFIG.layers) - KDA
WEIGHTS = {
    is_routed: BYTES_A_WEIGHT
    * sum(
        prod(tensor.shape)
        for tensor in tensors(CONFIG)
        if (tensor.join is Join.STACK) == is_routed and "embed_tokens" not in tensor.name
    )
    for is_routed in (False, True)
}
STATE = KDA * 4 * CONFIG.kda_width * CONFIG.kda_head_dim
LATENT = MLA * 2 * CONFIG.latent_width


def distinct(tokens: int, share: float) -> float:
    """Experts of a layer that tokens choose between them; `share` of what each further one adds."""
    E, k = CONFIG.num_experts, CONFIG.num_experts_per_token
    return k + share * (E * (1 - (1 - k / E) ** tokens) - k)


def step_bytes(texts: int, tokens: int, share: float) -> float:
    """Of a step of so many tokens in each text."""
    experts = WEIGHTS[True] * distinct(texts * tokens, share) / CONFIG.num_experts
    return WEIGHTS[False] + experts + texts * (2 * STATE + tokens * CONTEXT * LATENT)


def step_time(machine: str, texts: int, tokens: int, share: float) -> float:
    """Seconds."""
    return step_bytes(texts, tokens, share) / BANDWIDTHS[machine] + LAUNCHES * LAUNCH


def break_even(ratio: float, tokens: int) -> float:
    """How often a draft's token must be right, if those before are, for a step to pay its time."""
    low, high = 0.0, 1.0
    for _ in range(40):
        p = (low + high) / 2
        low, high = (p, high) if sum(p**i for i in range(tokens)) < ratio else (low, p)
    return high


def main() -> None:
    for machine in BANDWIDTHS:
        print(f"{machine}: a token {step_time(machine, 1, 1, 1) * 1e3:.1f} ms (estimated)")
        for what, sizes in (("tokens", (2, 4, 8)), ("texts", (2, 4, 8, 16))):
            for n in sizes:
                texts, tokens = (n, 1) if what == "texts" else (1, n)
                ratios = [
                    step_time(machine, texts, tokens, share) / step_time(machine, 1, 1, 1)
                    for share in (ALIKE, 1)
                ]
                line = f"  {n:2} {what}: {ratios[0]:.2f} to {ratios[1]:.2f} of it"
                if what == "tokens":
                    least = [break_even(ratio, tokens) for ratio in ratios]
                    line += f"; pays from {least[0]:.2f} to {least[1]:.2f} right"
                else:
                    line += f"; {n / ratios[1]:.1f} to {n / ratios[0]:.1f} times as many tokens"
                print(line)


if __name__ == "__main__":
    main()
