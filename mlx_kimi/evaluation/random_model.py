"""A model of random weights in any shape, such as the published 48B's: for speeds, not answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import mlx.core as mx

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import ALWAYS_FLOAT32, is_in_part, tensors
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.random_weights import Arrays, random_tensor
from mlx_kimi.model.weights import Weights

# config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct.
PUBLISHED_48B: dict[str, Any] = json.loads(
    (files(__package__) / "kimi_linear_48b.json").read_text(encoding="utf-8")
)


def random_arrays(
    config: ModelConfig, dtype: mx.Dtype = mx.bfloat16, part: range | None = None
) -> Arrays:
    """Every tensor in the MLX layout, the router's not quantized, all of `dtype` or codes.

    Those of a `part`, as of KimiLinear, are the same as among all.
    """
    arrays: Arrays = {}
    for number, tensor in enumerate(tensors(config)):
        mx.random.seed(number)
        if part is None or is_in_part(tensor.name, config, part):
            arrays |= random_tensor(tensor, config, dtype)
    return arrays


def model_of(
    config: dict[str, Any],
    arrays: Arrays,
    part: range | None = None,
    make: Callable[..., KimiLinear] = KimiLinear,
) -> KimiLinear:
    """As `load_model` makes it: decays and routing in float32."""
    ours = {
        name: array.astype(mx.float32)
        if name.removesuffix(".weight").endswith(ALWAYS_FLOAT32)
        else array
        for name, array in arrays.items()
    }
    parsed = ModelConfig.from_json(config)
    model = make(parsed, Weights(ours, parsed), part=part)
    mx.eval(model.parameters())
    return model
