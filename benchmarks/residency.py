"""Which experts to keep in memory: policies compared on the pocket model's own routing.

    python -m benchmarks.residency [--conversations N]

Records which experts each token of real conversations chooses, then plays them to expert caches of
every size. `best` is what a policy would reach that knew the future (Belady, 1966).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_kimi import generate, load
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.model.moe import MixtureOfExperts
from mlx_kimi.offload.lrfu import DECAY, LRFU
from tools.pocket.tasks import TASKS, prompts

Chosen = npt.NDArray[np.int64]  # [tokens, k], of one step
SIZES = (2, 3, 4, 6, 8, 12, 16, 20, 24, 28)  # slots, of 32


class Recorded(nn.Module):
    """A router that remembers what it chose, and what it would choose for the layer before."""

    def __init__(self, router: nn.Module, following: nn.Module | None) -> None:
        super().__init__()
        self.router, self.following, self.gate = router, following, router.gate
        self.chosen: list[Chosen] = []
        self.guessed: list[Chosen] = []  # for the following layer, from this one's input

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        experts, weights = self.router(x)
        self.chosen.append(_numbers(experts))
        if self.following is not None:
            self.guessed.append(_numbers(self.following(x)[0]))
        return experts, weights


def _numbers(experts: mx.array) -> Chosen:
    return np.array(experts).astype(np.int64).reshape(-1, experts.shape[-1])


def record(conversations: int, most: int = 60) -> list[Recorded]:
    """Every layer's choices for prompts of all tasks in turn and their answers."""
    model, tokenizer = load(pocket_folder())
    mixtures = [x.mlp for x in model.layers if isinstance(x.mlp, MixtureOfExperts)]
    routers: list[nn.Module | None] = [*(m.router for m in mixtures), None]
    recorded = [Recorded(*pair) for pair in zip(routers, routers[1:], strict=False)]  # type: ignore[arg-type]
    for mixture, router in zip(mixtures, recorded, strict=True):
        mixture.router = router
    asked = {task: iter(prompts(task, conversations, seed=1)) for task in TASKS}
    for number in range(conversations):
        prompt = next(asked[list(TASKS)[number % len(TASKS)]])
        generate(model, tokenizer, prompt.messages, tools=prompt.tools, max_tokens=most)
    return recorded


class Recency:
    """LRU: worth is when an expert was last used."""

    def __init__(self, experts: int) -> None:
        self.scores, self.now = np.zeros(experts), 0

    def note(self, chosen: Chosen) -> None:
        for token in chosen:
            self.now += 1
            self.scores[token] = self.now


class Future:
    """Worth is how soon an expert is used again."""

    def __init__(self, experts: int, steps: list[Chosen]) -> None:
        self.uses: list[list[int]] = [[] for _ in range(experts)]
        for number, chosen in enumerate(steps):
            for expert in np.unique(chosen):
                self.uses[expert].append(number)
        self.step, self.scores = -1, np.zeros(experts)

    def note(self, chosen: Chosen) -> None:
        self.step += 1
        for expert, uses in enumerate(self.uses):
            while uses and uses[0] <= self.step:
                uses.pop(0)
            self.scores[expert] = 1 / (uses[0] - self.step) if uses else 0


Policy = Recency | Future | LRFU


def hit_rate(policy: Policy, steps: list[Chosen], slots: int) -> float:
    """The share of single tokens' experts that are in one of `slots`."""
    kept: set[int] = set()
    asked = hits = 0
    for chosen in steps:
        policy.note(chosen)
        needed = np.unique(chosen)
        if len(chosen) == 1:
            asked += len(needed)
            hits += sum(int(expert) in kept for expert in needed)
        absent = [int(e) for e in needed[np.argsort(policy.scores[needed])] if int(e) not in kept]
        for expert in absent:
            if len(kept) == slots:
                safe = set(needed.tolist()) if len(needed) < slots else set()
                kept.remove(min(kept - safe or kept, key=lambda e: policy.scores[e]))
            kept.add(expert)
    return hits / asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=60)
    options = parser.parse_args()
    layers = record(options.conversations)
    experts = 1 + max(int(c.max()) for layer in layers for c in layer.chosen)
    tokens = sum(len(c) == 1 for c in layers[0].chosen)
    print(f"{tokens} tokens answered in {options.conversations} conversations, {experts} experts")
    policies: dict[str, Callable[[list[Chosen]], Policy]] = {
        "LRU": lambda steps: Recency(experts),
        **{
            f"decay {decay:g}": lambda steps, decay=decay: LRFU(np.zeros(experts), decay)
            for decay in sorted({0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, DECAY})
        },
        "LFU": lambda steps: LRFU(np.zeros(experts), 1.0),
        "best": lambda steps: Future(experts, steps),
    }
    print("slots        " + "".join(f"{size:>7}" for size in SIZES))
    for name, policy in policies.items():
        rates = [
            np.mean([hit_rate(policy(layer.chosen), layer.chosen, size) for layer in layers])
            for size in SIZES
        ]
        print(f"{name:<13}" + "".join(f"{rate:>7.1%}" for rate in rates), flush=True)
    right = [
        np.mean([np.isin(g, c).mean() for g, c in zip(layer.guessed, after.chosen, strict=True)])
        for layer, after in zip(layers, layers[1:], strict=False)
    ]
    print("guessed by the layer before: " + ", ".join(f"{share:.0%}" for share in right))


if __name__ == "__main__":
    main()
