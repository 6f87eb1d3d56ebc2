"""The form that kernels are compared with: plain matrices, and one expert after another."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_kimi.metal_kernels.experts import expert_combine
from mlx_kimi.model.kimi_linear import DecoderLayer
from mlx_kimi.model.moe import Experts, MixtureOfExperts


class OneByOne(Experts):
    """Experts without products of gathered rows, which MLX must compile, or gets wrong, on CUDA."""

    def __init__(self, stacks: Experts) -> None:
        """The same matrices."""
        super(Experts, self).__init__()
        self.gate_proj, self.up_proj = stacks.gate_proj, stacks.up_proj
        self.down_proj = stacks.down_proj

    def __call__(
        self, x: mx.array, experts: mx.array, weights: mx.array, shared: mx.array | None
    ) -> mx.array:
        """As `Experts` does; each is awaited, so that one plain expert is in memory at a time."""
        k, chosen = experts.shape[1], np.array(experts).reshape(-1)
        order = np.argsort(chosen, kind="stable")  # of (token, expert) pairs, by expert
        outputs = []
        for expert in np.unique(chosen):
            pairs = order[chosen[order] == expert]
            outputs.append(self.one(x[mx.array(pairs // k)], int(expert)))
            mx.eval(outputs[-1])
        places = mx.array(np.argsort(order).reshape(-1, k), mx.int32)
        return expert_combine(mx.concatenate(outputs), places, weights, shared)


def with_experts_one_by_one(layer: DecoderLayer) -> DecoderLayer:
    """The layer itself, whose experts run one after another from now on."""
    if isinstance(layer.mlp, MixtureOfExperts):
        layer.mlp.switch_mlp = OneByOne(layer.mlp.switch_mlp)
    return layer
