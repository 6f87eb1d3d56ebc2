"""A folder -> a model. Every missing, extra or misshapen tensor is named, before any is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_kimi.checkpoint.config import ModelConfig, Quantization
from mlx_kimi.checkpoint.files import FLOATS, Checkpoint, Stored, collapsed
from mlx_kimi.checkpoint.hub import local_folder
from mlx_kimi.checkpoint.tensors import Join, Tensor, tensors
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.budget import Budget, slots_for
from mlx_kimi.loading.memory import refuse_what_does_not_fit, wire
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.linear import Linear
from mlx_kimi.model.weights import Weights
from mlx_kimi.offload.expert_files import ExpertFiles, Part
from mlx_kimi.offload.offload import ExpertOffload
from mlx_kimi.text.tokenizer import Tokenizer, load_tokenizer

# Kept in float32 whatever the model's dtype: decays and routing decide what is remembered and who
# answers, and their rounding errors grow with the text. They are under 0.1 % of the bytes.
ALWAYS_FLOAT32 = (".A_log", ".dt_bias", ".e_score_correction_bias", ".mlp.gate")


def load(path_or_hub_id: str | Path, budget: Budget | None = None) -> tuple[KimiLinear, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        path_or_hub_id: a folder (published, converted, or written by transformers 5), or a name
            such as `moonshotai/Kimi-Linear-48B-A3B-Instruct`, which is downloaded first.
        budget: see `load_model`.

    Raises:
        KimiError: the folder does not hold a whole Kimi Linear model.
    """
    folder = local_folder(path_or_hub_id)
    tokenizer = load_tokenizer(folder)  # first: it fails in milliseconds
    return load_model(folder, budget=budget), tokenizer


def load_model(
    folder: str | Path,
    shard: tuple[int, int] = (0, 1),
    reduce: Callable[[mx.array], mx.array] = lambda part: part,
    lazy: bool = False,
    budget: Budget | None = None,
) -> KimiLinear:
    """Load a model from a folder that may have no tokenizer.

    The weights are read one layer after another. On the CPU they become float32: MLX multiplies
    16-bit matrices ten times slower there.

    Args:
        folder: published, converted, or written by transformers 5.
        shard: (rank, ranks): this rank's slice of heads, inner channels and experts.
        reduce: adds up a layer's output over the ranks.
        lazy: read no weight until it is used.
        budget: of memory. As many routed experts as fit stay in it, the others are read from the
            folder's files when a token needs them; the model's context is the budget's.

    Raises:
        KimiError: a tensor is missing, unknown, of the wrong shape or dtype, or the model does not
            fit into this machine's memory or into the budget.
    """
    if budget is not None and shard[1] > 1:
        raise KimiError(f"a memory budget is for a whole model, not one of {shard[1]} ranks")
    folder = Path(folder)
    config = ModelConfig.read(folder)
    reader = _Reader(config, Checkpoint(folder), shard)
    arrays = reader.arrays()
    dtype = compute_dtype(arrays)
    arrays = {name: _in_dtype(name, array, dtype) for name, array in arrays.items()}
    offload = None
    if budget is not None:
        offload = _offload(budget, reader, arrays, dtype)
        config = replace(config, model_max_length=budget.tokens(config))
        arrays |= offload.arrays
    elif not lazy:
        refuse_what_does_not_fit(folder, config, sum(array.nbytes for array in arrays.values()))
    if not lazy:
        wire()
    rank, ranks = shard
    first_expert = rank * (config.num_experts // ranks)
    caches = offload.expert_caches if offload else {}
    weights = Weights(arrays, config, first_expert=first_expert, expert_caches=caches)
    model = KimiLinear(config, weights, reduce, offload)
    # Fused matrices are copies: their parts must not outlive each layer.
    del arrays, weights, reader
    if lazy:
        return model
    mx.eval(model.embed_tokens.parameters())
    for layer in model.layers:
        mx.eval(layer.parameters())
    mx.eval(model.parameters())
    return model


def _offload(
    budget: Budget, reader: _Reader, arrays: Mapping[str, mx.array], dtype: mx.Dtype
) -> ExpertOffload:
    """Banks for the routed experts of `arrays`, with the slots that the budget has room for."""
    files = ExpertFiles()
    layers: dict[str, list[Part]] = {}
    try:
        for tensor in tensors(reader.config):
            if tensor.join is Join.STACK:
                path = tensor.module.rsplit(".", 1)[0]
                for name, stored in reader.stored(tensor).items():
                    part = files.part(reader.checkpoint, name, stored, dtype)
                    layers.setdefault(path, []).append(part)
        routed = {part.name for parts in layers.values() for part in parts}
        resident = sum(array.nbytes for name, array in arrays.items() if name not in routed)
        slots = slots_for(budget, reader.config, resident, layers)
    except BaseException:
        files.close()
        raise
    config = reader.config
    return ExpertOffload(files, layers, slots, budget.tokens(config) < config.model_max_length)


def check(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Compare what a folder holds with the table of tensors, reading headers only.

    Raises:
        KimiError: a tensor is missing, unknown, of the wrong shape or dtype.
    """
    _Reader(config, checkpoint, (0, 1)).plans()


def compute_dtype(arrays: Mapping[str, mx.array]) -> mx.Dtype:
    """The dtype of activations: float32 on CPU, elsewhere that of the embedding or its scales."""
    if mx.default_device() == mx.Device(mx.cpu):
        return mx.float32
    scales = arrays.get("model.embed_tokens.scales")
    dtype = arrays["model.embed_tokens.weight"].dtype if scales is None else scales.dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16  # mxfp4 and its like


def _in_dtype(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """One float tensor in a wider dtype would widen every activation after it."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    module = name.removesuffix(".weight").removesuffix(".scales").removesuffix(".biases")
    return array.astype(mx.float32 if module.endswith(ALWAYS_FLOAT32) else dtype)


class _Reader:
    """Matches the table of tensors with what a folder holds."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, shard: tuple[int, int]) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.rank, self.ranks = shard
        self.claimed: set[str] = set()
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def arrays(self) -> dict[str, mx.array]:
        """Every tensor by its name in the MLX layout, not yet read."""
        found = {}
        for tensor, plan in self.plans():
            for suffix, array in plan().items():
                array = self._slice(tensor, array)
                found[f"{tensor.module}.{suffix}" if suffix else tensor.module] = array
        return found

    def stored(self, tensor: Tensor) -> dict[str, list[str]]:
        """The arrays that `tensor` is in memory, and the stored tensors that each is made of."""
        if f"{tensor.module}.scales" in self.checkpoint:
            quantization = self.config.quantization_of(tensor.module)
            assert quantization is not None, tensor.module  # `plans` has checked it
            names = [f"{tensor.module}.{part}" for part in quantization.packed(tensor.shape)]
            return {name: [name] for name in names}
        if tensor.name in self.checkpoint:
            return {tensor.name: [tensor.name]}
        return {tensor.name: tensor.found_in(self.checkpoint.tensors)}

    def plans(self) -> list[tuple[Tensor, Callable[[], dict[str, mx.array]]]]:
        """Every tensor and how to build it, once all are known to be there and right."""
        plans = [(tensor, self._plan(tensor)) for tensor in tensors(self.config)]
        self._report()
        return plans

    def _plan(self, tensor: Tensor) -> Callable[[], dict[str, mx.array]]:
        """How to build `tensor` from the files; remembers what is wrong with them."""
        if tensor.name in self.checkpoint or f"{tensor.module}.scales" in self.checkpoint:
            return self._in_mlx_layout(tensor)
        names = tensor.found_in(self.checkpoint.tensors)
        if tensor.join in (Join.KEY_HALF, Join.VALUE_HALF):
            module = names[0].removesuffix(".weight")
            if f"{module}.scales" in self.checkpoint:
                return self._quantized_kv_b(tensor, module)
        shapes = tensor.published_shapes(self.config)
        for name in names:
            self._check(name, shapes, FLOATS)
        return lambda: {_suffix(tensor): join(tensor, self._read(tensor, names), self.config)}

    def _in_mlx_layout(self, tensor: Tensor) -> Callable[[], dict[str, mx.array]]:
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

    def _quantized_kv_b(self, tensor: Tensor, module: str) -> Callable[[], dict[str, mx.array]]:
        """Older quantizations keep kv_b_proj whole; its halves stay unquantized, which is exact."""
        (shape,) = tensor.published_shapes(self.config)
        names = self._check_quantized(module, shape)
        quantization = self.config.quantization_of(module)

        def build() -> dict[str, mx.array]:
            parts = {part: self.checkpoint.array(name) for part, name in names.items()}
            whole = Linear(**parts, quantization=quantization).dequantized()
            return {"weight": join(tensor, [whole], self.config)}

        return build

    def _check_quantized(self, module: str, shape: tuple[int, ...]) -> dict[str, str]:
        """The stored parts of a quantized matrix [..., out, in], checked against config.json."""
        quantization = self.config.quantization_of(module)
        if quantization is None:
            self.wrong.append(
                f"{module}.scales is there but config.json gives no quantization for it"
            )
            return {}
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
            raise KimiError(f"{self.checkpoint.folder}: {'; '.join(problems)}")

    def _read(self, tensor: Tensor, names: list[str]) -> list[mx.array]:
        if tensor.join is Join.STACK:  # only this rank's experts
            count = len(names) // self.ranks
            names = names[self.rank * count : (self.rank + 1) * count]
        return [self.checkpoint.array(name) for name in names]

    def _slice(self, tensor: Tensor, array: mx.array) -> mx.array:
        """This rank's range of the axis that the table splits."""
        axis = tensor.split
        if self.ranks == 1 or axis is None or array.shape[axis] * self.ranks == tensor.shape[axis]:
            return array
        if array.shape[axis] % self.ranks:
            raise KimiError(
                f"{tensor.name}: {self.ranks} ranks must divide axis {axis} "
                f"of {_shown(array.shape)}"
            )
        # A copy: a view would keep the whole model in memory.
        return mx.contiguous(mx.split(array, self.ranks, axis=axis)[self.rank])


def join(tensor: Tensor, parts: list[mx.array], config: ModelConfig) -> mx.array:
    """Published tensors -> one tensor of the MLX layout (names.Join says how)."""
    if tensor.join is Join.STACK:
        return mx.stack(parts)
    (whole,) = parts
    if tensor.join in (Join.KEY_HALF, Join.VALUE_HALF):
        nope = config.qk_nope_head_dim
        heads = whole.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        if tensor.join is Join.KEY_HALF:
            return heads[:, :nope].swapaxes(-1, -2)
        return heads[:, nope:]
    return whole.reshape(tensor.shape)


def _suffix(tensor: Tensor) -> str:
    return "weight" if tensor.name.endswith(".weight") else ""


def _shown(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _wrong_dtype(name: str, stored: Stored, dtypes: tuple[str, ...]) -> str:
    return f"{stored.file}: {name} has dtype {stored.dtype}, expected {' or '.join(dtypes)}"
