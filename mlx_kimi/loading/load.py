"""A folder -> a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.checkpoint.tensors import ALWAYS_FLOAT32, Join, is_in_part, tensors
from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.loading.budget import Budget, slots_for, work_for
from mlx_kimi.loading.command_buffers import enlarge_command_buffers
from mlx_kimi.loading.fetch import fetched
from mlx_kimi.loading.finite import not_finite_place
from mlx_kimi.loading.match import TensorMatcher
from mlx_kimi.loading.memory import MemoryEstimate, refuse_what_does_not_fit, wire
from mlx_kimi.loading.warm_up import warm_up
from mlx_kimi.metal_kernels.kernel import in_one_line, is_traced
from mlx_kimi.metal_kernels.tuning import Choices
from mlx_kimi.model.kimi_linear import DecoderLayer, KimiLinear
from mlx_kimi.model.moe import MixtureOfExperts
from mlx_kimi.model.weights import Weights
from mlx_kimi.offload.expert_files import ExpertFiles, ExpertStack
from mlx_kimi.offload.offload import ExpertOffload
from mlx_kimi.offload.read_pool import THREADS
from mlx_kimi.text.tokenizer import Tokenizer, load_tokenizer


def load(
    path_or_hub_id: str | Path | None = None, budget: Budget | None = None
) -> tuple[KimiLinear, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        path_or_hub_id: a folder (published, converted, or written by transformers 5), or a name
            such as `moonshotai/Kimi-Linear-48B-A3B-Instruct`, which is downloaded first. None: the
            pocket model that ships inside.
        budget: see `load_model`.

    Raises:
        KimiError: the folder does not hold a whole Kimi Linear model.
    """
    check = partial(check_headers, budget=budget)
    folder = pocket_folder() if path_or_hub_id is None else fetched(path_or_hub_id, check)
    tokenizer = load_tokenizer(folder)  # first: it fails in milliseconds
    return load_model(folder, budget=budget), tokenizer


def load_model(
    folder: str | Path,
    shard: tuple[int, int] = (0, 1),
    reduce: Callable[[mx.array], mx.array] = lambda x: x,
    lazy: bool = False,
    budget: Budget | None = None,
    checkpoint: Checkpoint | None = None,
    part: range | None = None,
    make: Callable[..., KimiLinear] = KimiLinear,
) -> KimiLinear:
    """Load a model from a folder that may have no tokenizer.

    The weights are read one layer after another. On the CPU they become float32: MLX multiplies
    16-bit matrices ten times slower there. On a GPU the kernels are compiled, too; one that the GPU
    cannot run is a warning of the log, and MLX operations take its place. At the first load of a
    model of these shapes on this GPU, they are tried beforehand: `mlx_kimi.tuning`.

    Args:
        folder: published, converted, or written by transformers 5.
        shard: (rank, ranks): this rank's slice of heads and of the channels within MLPs.
        reduce: adds up a layer's output over the ranks.
        lazy: read no weight until it is used.
        budget: of memory. As many routed experts as fit stay in it, the others are read from the
            folder's files when a token needs them; the model's context is the budget's.
        checkpoint: what `headers_of` gave with the folder; with `lazy`.
        part: the layers to load, as of `KimiLinear`; None: all. Kernels are not tried then, as
            parts must choose alike, and nobody asks whether it fits.
        make: makes the model, as `KimiLinear` does.

    Raises:
        KimiError: a tensor is missing, unknown, of the wrong shape or dtype, or the model does not
            fit into this machine's memory or into the budget.
    """
    enlarge_command_buffers()  # first: MLX reads the limits when it first uses the GPU
    if budget is not None and shard[1] > 1:
        raise KimiError(f"a memory budget is for a whole model, not one of {shard[1]} ranks")
    folder = Path(folder)
    config = ModelConfig.read(folder)
    checkpoint = checkpoint or Checkpoint(folder)
    matcher = TensorMatcher(config, checkpoint, shard)
    with _unchanged(checkpoint):
        arrays = matcher.arrays()
    dtype = compute_dtype(arrays)
    arrays = {name: _in_dtype(name, array, dtype) for name, array in arrays.items()}
    if part is not None:
        arrays = {name: a for name, a in arrays.items() if is_in_part(name, config, part)}
    offload = None
    is_whole = shard[1] == 1 and part is None
    choices = _choices(folder, config, dtype, lazy, is_whole)
    if budget is not None:
        offload = _offload(budget, matcher, arrays, dtype)
        config = replace(config, model_max_length=budget.tokens(config))
        arrays |= offload.arrays
    elif not lazy and part is None:
        refuse_what_does_not_fit(folder, config, sum(array.nbytes for array in arrays.values()))
    if not lazy:
        wire()
    caches = offload.expert_caches if offload else {}
    weights = Weights(arrays, config, expert_caches=caches)
    model = make(config, weights, reduce, offload, choices, part)
    # Fused matrices are copies: their parts must not outlive each layer.
    del arrays, weights, matcher
    if lazy:
        return model
    with _unchanged(checkpoint):
        _read_weights(model, checkpoint)
    if (place := not_finite_place(model)) is not None:
        raise KimiError(f"{folder}: {place} has NaN or infinity: the weights are damaged")
    if is_traced():  # (a GPU's own backend: an emulator compiles nothing ahead)
        try:
            warm_up(model)
        except RuntimeError as error:
            said = in_one_line(str(error))
            raise KimiError(f"the GPU failed when kernels were first run: {said}") from error
    return model


def check_headers(
    folder: Path,
    checkpoint: Checkpoint,
    budget: Budget | None = None,
    may_be_too_large: bool = False,
) -> None:
    """What `load` would find wrong, as far as headers and small files tell.

    Args:
        may_be_too_large: for this machine's memory.

    Raises:
        KimiError: as of `load_model`, or the tokenizer is not whole.
    """
    load_tokenizer(folder)
    enlarge_command_buffers()
    config = ModelConfig.read(folder)
    matcher = TensorMatcher(config, checkpoint, (0, 1))
    sizes = _array_bytes(matcher)
    if budget is None:
        if not may_be_too_large:
            refuse_what_does_not_fit(folder, config, sum(sizes.values()))
        return
    dtype = compute_dtype(matcher.arrays())
    stacks = [
        ExpertStack.described(checkpoint, name, stored, dtype)
        for _, name, stored in _stored_experts(matcher)
    ]
    _slots(budget, config, stacks, sizes)


def _read_weights(model: KimiLinear, checkpoint: Checkpoint) -> None:
    """One layer after another: what each is made of is freed before the next.

    Raises:
        KimiError: MLX cannot read a part, or finds no memory for it.
    """
    numbers = zip(model.part, model.layers, strict=True)
    layers = {f"model.layers.{number}": layer for number, layer in numbers}
    ends = {"model.norm": model.norm, "lm_head": model.lm_head}
    for path, part in {"model.embed_tokens": model.embed_tokens, **layers, **ends}.items():
        if part is None:  # another rank has it
            continue
        try:
            mx.eval(part.parameters(), _views(part))
        except RuntimeError as error:
            stored = checkpoint.tensors.items()
            files = {each.file for name, each in stored if name.startswith(f"{path}.")}
            where = ", ".join([path, *sorted(files)])
            said = in_words(error)
            raise KimiError(f"{checkpoint.folder}: cannot load {where}: {said}") from None


def _views(part: nn.Module) -> list[mx.array]:
    """What kernels take of a part beside its parameters. MLX evaluates an array only in the thread
    that described it, and a server's engine is another thread than loads."""
    mlp = part.mlp if isinstance(part, DecoderLayer) else None
    shared = mlp.kernels.shared if isinstance(mlp, MixtureOfExperts) else None
    return [] if shared is None else [*shared.gate.buffers(), *shared.up.buffers()]


@contextmanager
def _unchanged(checkpoint: Checkpoint) -> Iterator[None]:
    """Within, MLX reads files. It says little of one that changed, or nothing.

    Raises:
        KimiError: a file is no longer the one whose header was checked.
    """
    try:
        yield
    except (KimiError, RuntimeError, OSError):
        checkpoint.refuse_changed("the model was loaded")
        raise
    checkpoint.refuse_changed("the model was loaded")


def _choices(
    folder: Path, config: ModelConfig, dtype: mx.Dtype, lazy: bool, is_whole: bool
) -> Choices:
    """Which kernels run here. At a GPU's first load of such a model they are tried, before it."""
    if not is_traced() or not is_whole:  # (an emulator tries nothing; ranks must choose alike)
        return Choices.default()
    from mlx_kimi.tuning.tune import choices_for, known_choices  # here: pydantic takes a while

    return known_choices(config, dtype) if lazy else choices_for(folder, config, dtype)


def _offload(
    budget: Budget, matcher: TensorMatcher, arrays: Mapping[str, mx.array], dtype: mx.Dtype
) -> ExpertOffload:
    """Expert caches with the slots that the budget has room for beside the rest of `arrays`."""
    files = ExpertFiles()
    layers: dict[str, list[ExpertStack]] = {}
    try:
        for path, name, stored in _stored_experts(matcher):
            stack = files.stack(matcher.checkpoint, name, stored, dtype)
            layers.setdefault(path, []).append(stack)
        stacks = [stack for of_layer in layers.values() for stack in of_layer]
        sizes = {name: array.nbytes for name, array in arrays.items()}
        slots, work = _slots(budget, matcher.config, stacks, sizes)
    except BaseException:
        files.close()
        raise
    bounded = budget.tokens(matcher.config) < matcher.config.model_max_length
    return ExpertOffload(files, layers, slots, work.buffers, budget.prefill_step, bounded)


def _stored_experts(matcher: TensorMatcher) -> Iterator[tuple[str, str, Sequence[str]]]:
    """The path, the name in the MLX layout and the stored tensors of each array of experts."""
    for tensor in tensors(matcher.config):
        if tensor.join is Join.STACK:
            for name, stored in matcher.stored(tensor).items():
                yield tensor.module.rsplit(".", 1)[0], name, stored


def _slots(
    budget: Budget, config: ModelConfig, stacks: Sequence[ExpertStack], sizes: Mapping[str, int]
) -> tuple[int, MemoryEstimate]:
    """`slots_for` arrays of these bytes, among them the stacks, and the work that goes with it."""
    routed = {stack.name for stack in stacks}
    beside = {name: size for name, size in sizes.items() if name not in routed}
    one_slot = sum(stack.nbytes for stack in stacks)
    reading = THREADS * max((stack.reading_bytes for stack in stacks), default=0)
    resident = sum(beside.values())
    slots = slots_for(budget, config, resident, one_slot, reading, _loading_bytes(beside))
    return slots, work_for(budget, config, resident, slots)


def _loading_bytes(sizes: Mapping[str, int]) -> int:
    """What `_read_weights` takes beside the weights: of the largest part, each tensor as it is
    stored, and what is joined to another of them as a copy."""
    parts: dict[str, int] = {}
    for name, size in sizes.items():
        part = ".".join(name.split(".")[:3]) if ".layers." in name else name
        parts[part] = parts.get(part, 0) + size
    return 3 * max(parts.values(), default=0) // 2


def array_bytes(folder: Path) -> dict[str, int]:
    """The arrays of a model by their names in the MLX layout, and the bytes of each in memory."""
    matcher = TensorMatcher(ModelConfig.read(folder), Checkpoint(folder), (0, 1))
    return _array_bytes(matcher)


def _array_bytes(matcher: TensorMatcher) -> dict[str, int]:
    arrays = matcher.arrays()
    dtype = compute_dtype(arrays)
    return {name: _in_dtype(name, array, dtype).nbytes for name, array in arrays.items()}


def dtype_of(folder: Path, checkpoint: Checkpoint) -> mx.Dtype:
    """The dtype in which a model computes here, as of `headers_of`."""
    matcher = TensorMatcher(ModelConfig.read(folder), checkpoint, (0, 1))
    return compute_dtype(matcher.arrays())


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
