"""Random weights in a model's shapes and formats: for speeds and for comparing, not for answers."""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_kimi.checkpoint.config import ModelConfig, Quantization
from mlx_kimi.checkpoint.tensors import ALWAYS_FLOAT32, Tensor

Arrays = dict[str, mx.array]


def stored_quantization(tensor: Tensor, config: ModelConfig) -> Quantization | None:
    """A tensor's in a folder of this config: matrices are quantized, but for the router's."""
    if not tensor.matrix or tensor.module.endswith("mlp.gate"):
        return None
    return config.quantization_of(tensor.module)


def zero_tensor(tensor: Tensor, dtype: mx.Dtype, how: Quantization | None) -> Arrays:
    """One tensor as a model of `dtype` keeps it, in zeros that nothing has computed."""
    kind = mx.float32 if tensor.module.endswith(ALWAYS_FLOAT32) else dtype
    if how is None:
        return {tensor.name: mx.zeros(tensor.shape, kind)}
    parts = {"weight": mx.uint32, "scales": kind if how.mode == "affine" else mx.uint8}
    return {
        f"{tensor.module}.{part}": mx.zeros(shape, parts.get(part, kind))
        for part, shape in how.packed(tensor.shape).items()
    }


def random_tensor(tensor: Tensor, config: ModelConfig, dtype: mx.Dtype) -> Arrays:
    """One tensor as it is stored: itself, or its codes, scales and biases."""
    quantization = stored_quantization(tensor, config)
    if quantization:
        arrays = _codes(tensor, quantization, dtype)
    else:
        arrays = {tensor.name: _plain(tensor).astype(dtype)}
    mx.eval(arrays)
    return arrays


def _codes(tensor: Tensor, how: Quantization, dtype: mx.Dtype) -> Arrays:
    """Random codes, with scales that give each output the variance of its inputs."""
    if how.mode != "affine":  # (a byte of a small float may be no number)
        parts = mx.quantize(_plain(tensor), how.group_size, how.bits, how.mode)
        return {f"{tensor.module}.{x}": y for x, y in zip(("weight", "scales"), parts, strict=True)}
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
