"""The table of tensors against what a folder holds, before anything is read."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_kimi.checkpoint.config import ModelConfig, Quantization
from mlx_kimi.checkpoint.files import FLOATS, Checkpoint, Stored, collapsed
from mlx_kimi.checkpoint.tensors import Tensor, tensors
from mlx_kimi.errors import KimiError
from mlx_kimi.model.linear import Linear

Build = Callable[[], dict[str, mx.array]]  # the parts of a tensor by their names: weight, scales...


def check(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Compare what a folder holds with the table of tensors, reading headers only.

    Raises:
        KimiError: a tensor is missing, unknown, of the wrong shape or dtype.
    """
    TensorMatcher(config, checkpoint, (0, 1)).builds()


SHOWN = 8  # problems of a folder that an error lists


class TensorMatcher:
    """Finds what each tensor of the table is made of; names all that is missing, extra or wrong."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, shard: tuple[int, int]) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.rank, self.ranks = shard
        self.claimed: set[str] = set()
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def arrays(self) -> dict[str, mx.array]:
        """Every tensor by its name in the MLX layout, not yet read."""
        found = {}
        for tensor, build in self.builds():
            for suffix, array in build().items():
                array = self._slice(tensor, array)
                found[f"{tensor.module}.{suffix}" if suffix else tensor.module] = array
        return found

    def stored(self, tensor: Tensor) -> dict[str, list[str]]:
        """The arrays that `tensor` is in memory, and the stored tensors that each is made of."""
        if f"{tensor.module}.scales" in self.checkpoint:
            quantization = self.config.quantization_of(tensor.module)
            assert quantization is not None, tensor.module  # `builds` has checked it
            names = [f"{tensor.module}.{part}" for part in quantization.packed(tensor.shape)]
            return {name: [name] for name in names}
        if tensor.name in self.checkpoint:
            return {tensor.name: [tensor.name]}
        return {tensor.name: tensor.found_in(self.checkpoint.tensors)}

    def builds(self) -> list[tuple[Tensor, Build]]:
        """Every tensor and how to build it, once all are known to be there and right.

        Raises:
            KimiError: a tensor is missing, unknown, of the wrong shape or dtype.
        """
        builds = [(tensor, self._build(tensor)) for tensor in tensors(self.config)]
        self._report()
        return builds

    def _build(self, tensor: Tensor) -> Build:
        """How to build `tensor` from the files; remembers what is wrong with them."""
        if tensor.name in self.checkpoint or f"{tensor.module}.scales" in self.checkpoint:
            return self._in_mlx_layout(tensor)
        names = tensor.found_in(self.checkpoint.tensors)
        if tensor.is_half:
            module = names[0].removesuffix(".weight")
            if f"{module}.scales" in self.checkpoint:
                return self._quantized_kv_b(tensor, module)
        shapes = tensor.published_shapes(self.config)
        for name in names:
            self._check(name, shapes, FLOATS)
        return lambda: {_suffix(tensor): tensor.joined(self._read(tensor, names), self.config)}

    def _in_mlx_layout(self, tensor: Tensor) -> Build:
        suffix = _suffix(tensor)
        if f"{tensor.module}.scales" not in self.checkpoint:
            shapes = (
                tensor.shape,
                *(tensor.published_shapes(self.config) if not tensor.matrix else ()),
            )
            self._check(tensor.name, shapes, FLOATS)
            return lambda: {suffix: self.checkpoint.array(tensor.name).reshape(tensor.shape)}
        names = self._check_quantized(tensor.module, tensor.shape)
        return lambda: {part: self.checkpoint.array(name) for part, name in names.items()}

    def _quantized_kv_b(self, tensor: Tensor, module: str) -> Build:
        """Older quantizations keep kv_b_proj whole; its halves stay unquantized, which is exact."""
        (shape,) = tensor.published_shapes(self.config)
        names = self._check_quantized(module, shape)
        quantization = self.config.quantization_of(module)

        def build() -> dict[str, mx.array]:
            parts = {part: self.checkpoint.array(name) for part, name in names.items()}
            whole = Linear(**parts, quantization=quantization).dequantized()
            return {"weight": tensor.joined([whole], self.config)}

        return build

    def _check_quantized(self, module: str, shape: tuple[int, ...]) -> dict[str, str]:
        """The stored parts of a quantized matrix [..., out, in], checked against config.json."""
        quantization = self.config.quantization_of(module)
        if quantization is None:
            self.wrong.append(
                f"{module}.scales is there but config.json gives no quantization for it"
            )
            return {}
        if shape[-1] % quantization.group_size:
            self.wrong.append(
                f"{module}: groups of {quantization.group_size} weights must divide its rows of "
                f"{shape[-1]}; config.json gives them"
            )
        floats = FLOATS if quantization.mode == "affine" else ("U8",)
        shapes = quantization.packed(shape)
        for part, packed in shapes.items():
            dtypes = ("U32",) if part == "weight" else floats
            self._check(f"{module}.{part}", (packed,), dtypes, quantization)
        return {part: f"{module}.{part}" for part in shapes}

    def _check(
        self,
        name: str,
        shapes: tuple[tuple[int, ...], ...],
        dtypes: tuple[str, ...],
        quantization: Quantization | None = None,
    ) -> None:
        self.claimed.add(name)
        stored = self.checkpoint.tensors.get(name)
        if stored is None:
            self.missing.append(name)
        elif stored.shape not in shapes:
            reason = (
                ""
                if quantization is None
                else f" at {quantization.bits} bits, group {quantization.group_size}"
            )
            self.wrong.append(
                f"{stored.file}: {name} has shape {_shown(stored.shape)}, "
                f"expected {' or '.join(map(_shown, shapes))} from config.json{reason}"
            )
        elif stored.dtype not in dtypes:
            self.wrong.append(_wrong_dtype(name, stored, dtypes))

    def _report(self) -> None:
        problems = list(self.wrong)
        by_file: dict[str, list[str]] = {}
        for name in self.missing:
            by_file.setdefault(self.checkpoint.expected_file(name), []).append(name)
        for file, names in by_file.items():
            problems.append(f"{len(names)} tensors are missing from {file}: {collapsed(names)}")
        extra = [name for name in self.checkpoint.tensors if name not in self.claimed]
        if self.config.tie_word_embeddings:  # transformers 5 writes an lm_head that nothing reads
            extra = [name for name in extra if not name.startswith("lm_head.")]
        if extra:
            problems.append(f"{len(extra)} tensors have no place in the model: {collapsed(extra)}")
        if problems:
            rest = len(problems) - SHOWN
            more = [f"and {rest} more like these"] if rest > 0 else []
            listed = "; ".join([*problems[:SHOWN], *more])
            raise KimiError(f"{self.checkpoint.folder}: {listed}")

    def _read(self, tensor: Tensor, names: list[str]) -> list[mx.array]:
        return [self.checkpoint.array(name) for name in names]

    def _slice(self, tensor: Tensor, array: mx.array) -> mx.array:
        """This rank's range of the axis that the table splits."""
        axis = tensor.split
        if self.ranks == 1 or axis is None:
            return array
        if array.shape[axis] % self.ranks:
            raise KimiError(
                f"{tensor.name}: {self.ranks} ranks must divide axis {axis} "
                f"of {_shown(array.shape)}"
            )
        # A copy: a view would keep the whole model in memory.
        return mx.contiguous(mx.split(array, self.ranks, axis=axis)[self.rank])


def _suffix(tensor: Tensor) -> str:
    return "weight" if tensor.name.endswith(".weight") else ""


def _shown(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _wrong_dtype(name: str, stored: Stored, dtypes: tuple[str, ...]) -> str:
    return f"{stored.file}: {name} has dtype {stored.dtype}, expected {' or '.join(dtypes)}"
