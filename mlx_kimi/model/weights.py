"""A model's tensors by their names in the MLX layout, as layers take them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import mlx.core as mx

from mlx_kimi.checkpoint.config import ModelConfig, Quantization
from mlx_kimi.model.linear import Linear
from mlx_kimi.offload.expert_cache import ExpertCache


class Weights:
    """A view of the tensors below one path, such as `model.layers.3.self_attn`."""

    def __init__(
        self,
        arrays: Mapping[str, mx.array],
        config: ModelConfig,
        path: str = "",
        expert_caches: Mapping[str, ExpertCache] = MappingProxyType({}),
    ) -> None:
        """`expert_caches`: of the stacks that hold only some experts at a time, by their path."""
        self.arrays, self.config, self.path = arrays, config, path
        self.expert_caches = expert_caches

    def at(self, name: str) -> Weights:
        path = f"{self.path}{name}."
        return Weights(self.arrays, self.config, path, self.expert_caches)

    def expert_cache(self, name: str) -> ExpertCache | None:
        """What fills the stacks below `name`; None: they hold all experts."""
        return self.expert_caches.get(self.path + name)

    def array(self, name: str) -> mx.array:
        return self.arrays[self.path + name]

    def linear(self, name: str) -> Linear:
        """The matrix `name`, quantized if the folder holds its scales."""
        path = self.path + name
        scales = self.arrays.get(f"{path}.scales")
        return Linear(
            self.arrays[f"{path}.weight"],
            scales,
            self.arrays.get(f"{path}.biases"),
            None if scales is None else self._quantization(path),
        )

    def _quantization(self, path: str) -> Quantization:
        quantization = self.config.quantization_of(path)
        assert quantization is not None, path  # `loading.load.check` has seen it
        return quantization
