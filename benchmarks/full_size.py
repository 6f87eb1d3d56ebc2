"""A model of the 48B's shape with random 4-bit weights, for this program and for mlx-lm alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.checkpoint.config import ModelConfig, Quantization
from mlx_kimi.checkpoint.tensors import Tensor, tensors
from mlx_kimi.metal_kernels import cuda
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.weights import Weights
from tests.checkpoints import PUBLISHED_48B

CONFIG: dict[str, Any] = PUBLISHED_48B | {
    "dtype": "bfloat16",
    "quantization": {"group_size": 64, "bits": 4},
}
Arrays = dict[str, mx.array]


def random_arrays(config: ModelConfig, dtype: mx.Dtype = mx.bfloat16) -> Arrays:
    """Every tensor in the MLX layout, the router's not quantized, all of `dtype` or codes."""
    mx.random.seed(0)
    arrays: Arrays = {}
    for tensor in tensors(config):
        arrays |= random_tensor(tensor, config, dtype)
    return arrays


def random_tensor(tensor: Tensor, config: ModelConfig, dtype: mx.Dtype) -> Arrays:
    """One tensor as it is stored: itself, or its codes, scales and biases."""
    quantization = config.quantization_of(tensor.module)
    if tensor.matrix and quantization and not tensor.module.endswith("mlp.gate"):
        arrays = _codes(tensor, quantization, dtype)
    else:
        arrays = {tensor.name: _plain(tensor).astype(dtype)}
    mx.eval(arrays)
    return arrays


def _codes(tensor: Tensor, how: Quantization, dtype: mx.Dtype) -> Arrays:
    """Random codes, with scales that give each output the variance of its inputs."""
    levels = 2**how.bits
    scale = tensor.shape[-1] ** -0.5 / (levels / math.sqrt(12))
    shapes = how.packed(tensor.shape)
    scales = mx.full(shapes["scales"], scale, dtype)
    return {
        f"{tensor.module}.weight": _random_words(shapes["weight"]),
        f"{tensor.module}.scales": scales,
        f"{tensor.module}.biases": scales * (-(levels - 1) / 2),
    }


def _random_words(shape: tuple[int, ...]) -> mx.array:
    low, high = (mx.random.randint(0, 1 << 16, shape, mx.uint32) for _ in range(2))
    return low + (high << 16)


def _plain(tensor: Tensor) -> mx.array:
    name, shape = tensor.name, tensor.shape
    if name.endswith("A_log"):
        x = mx.log(mx.random.uniform(1, 16, shape))
    elif name.endswith("dt_bias"):  # softplus of it is 0.001 to 0.1, as in a fresh model
        x = mx.log(mx.expm1(mx.exp(mx.random.uniform(math.log(1e-3), math.log(1e-1), shape))))
    elif name.endswith("e_score_correction_bias"):
        x = mx.zeros(shape)
    elif tensor.matrix:
        x = mx.random.normal(shape) * shape[-1] ** -0.5
    elif "conv" in name:
        x = mx.random.normal(shape) * 0.5
    else:
        x = mx.ones(shape)
    return x


def our_model(config: dict[str, Any], arrays: Arrays) -> KimiLinear:
    """As `load_model` makes it: decays and routing in float32."""
    from mlx_kimi.loading.load import ALWAYS_FLOAT32

    ours = {
        name: array.astype(mx.float32)
        if name.removesuffix(".weight").endswith(ALWAYS_FLOAT32)
        else array
        for name, array in arrays.items()
    }
    parsed = ModelConfig.from_json(config)
    model = KimiLinear(parsed, Weights(ours, parsed))
    mx.eval(model.parameters())
    return model


def peer_model(config: dict[str, Any], arrays: Arrays) -> Any:
    """mlx-lm's model of the same arrays. Import it within `peer_kernels` to have its kernels."""
    from mlx_lm.models import kimi_linear as peer

    model = peer.Model(peer.ModelArgs.from_dict(config))
    nn.quantize(
        model,
        **config["quantization"],
        class_predicate=lambda path, _: f"{path}.scales" in arrays,
    )
    model.load_weights(list(arrays.items()))
    model.eval()
    mx.eval(model.parameters())
    return model


@contextmanager
def peer_kernels() -> Iterator[None]:
    """On an NVIDIA GPU, mlx-lm's Metal kernels through the dialect.

    Without, it runs its delta rule as a loop in Python there, which says nothing about a Mac.
    """
    if not mx.cuda.is_available():
        yield
        return
    with (
        patch.object(mx.fast, "metal_kernel", cuda.metal_kernel),
        patch.object(mx.metal, "is_available", lambda: True),
    ):
        yield
