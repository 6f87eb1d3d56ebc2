"""What a model needs of memory, what this machine gives, and what to do when that is too little."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import mlx.core as mx
import psutil

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import Join, tensors
from mlx_kimi.defaults import BUFFERS, CONTEXT, PREFILL_STEP, SNAPSHOT_MEMORY
from mlx_kimi.errors import KimiError
from mlx_kimi.metal_kernels.attention import GPU_QUERY_BLOCK
from mlx_kimi.metal_kernels.latents import GROUP, GROUP_WORDS
from mlx_kimi.model.mla import EXPANDED, LARGEST_BLOCK, MOST_SCORES
from mlx_kimi.units import human_size

ANY_SIZE = "MLX_KIMI_ANY_SIZE"  # set in the environment, models load whether they fit or not
BITS = (8, 6, 5, 4, 3, 2)  # of `convert`
SCALES = 0.5  # bits a weight, at `convert`'s group size: a scale and a bias of 16 bits for 64


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. Weights, state and latents are exact; the work space is an estimate."""

    weights: int
    state: int  # of all KDA layers, however long the text is
    latent: int  # of all MLA layers, for one token
    work: int  # what a prefill step holds meanwhile, about

    def at(self, context: int) -> int:
        """All of it, for a context of so many tokens."""
        return self.weights + self.state + self.latent * context + self.work

    def longest(self, limit: int, most: int) -> int:
        """The longest context, up to `most` tokens, that fits into `limit` bytes; 0: none."""
        left = limit - self.at(0)
        return max(0, min(most, left // self.latent if self.latent else most if left >= 0 else 0))


@dataclass(frozen=True)
class Machine:
    """Bytes that a model may take here, of how many, and who gives them."""

    limit: int
    total: int
    what: str

    @staticmethod
    def here() -> Machine:
        """The device that computes, as it is now."""
        memory = psutil.virtual_memory()
        if mx.default_device() == mx.Device(mx.cpu):
            return Machine(memory.available, memory.total, "this machine has free")
        info = mx.device_info()
        if mx.cuda.is_available():
            free, total = (int(info[f"{which}_memory"]) for which in ("free", "total"))
            return Machine(free, total, "this GPU has free")
        limit = int(info["max_recommended_working_set_size"])
        return Machine(limit, int(info["memory_size"]), "this Mac gives its GPU")

    def __str__(self) -> str:
        return f"{self.what} {human_size(self.limit)} of {human_size(self.total)}"


def needs(
    config: ModelConfig, weights: int, latent_bits: int | None = None, number: int | None = None
) -> MemoryEstimate:
    """Of a model whose weights take so many bytes in memory, for one text.

    A KDA layer keeps a matrix a head in float32 and a few tokens of q | k | v; an MLA layer keeps a
    latent a token, which `latent_bits` 8 packs. `number`: bytes of an activation; None: as here.
    """
    if number is None:
        number = 4 if mx.default_device() == mx.Device(mx.cpu) else 2
    kinds = [layer.attention for layer in config.layers]
    keep = config.short_conv_kernel_size - 1
    state = 4 * config.kda_width * config.kda_head_dim + number * keep * 3 * config.kda_width
    packed = -(-config.latent_width // GROUP) * GROUP_WORDS * 4
    latent = packed if latent_bits else number * config.latent_width
    return MemoryEstimate(
        weights,
        kinds.count("kda") * state,
        kinds.count("mla") * latent,
        _work(config, number),
    )


def non_expert_bytes(
    wanted: MemoryEstimate, context: int, snapshots: int = 0, prefill_step: int = PREFILL_STEP
) -> int:
    """Bytes that this process would take with a memory budget, but for its routed experts.

    Args:
        wanted: of a model whose weights are all but the routed experts'.
        context: the longest text, in tokens.
        snapshots: bytes of states to go back to.
    """
    here = psutil.Process().memory_info().rss
    # The state before a step, and that where the prompt ended, are kept beside the present one.
    fixed = here + BUFFERS + wanted.at(context) + 2 * wanted.state + snapshots
    return fixed + wanted.work * max(0, prefill_step - PREFILL_STEP) // PREFILL_STEP


def _work(config: ModelConfig, number: int) -> int:
    """Two halves of a layer at a time, as `model.PIECE_TOKENS` says, and two blocks of columns.

    Steps of fewer tokens take less, in more layers at a time (tests/test_command_buffers).
    A block has scores, or its keys, values and some outputs in float32: which, the kernels decide.
    """
    delta_rule = config.kda_width * (9 * number + 16)  # q, k, v thrice; decays, outputs in float32
    experts = config.num_experts_per_token * (
        2 * config.hidden_size + 3 * config.moe_intermediate_size
    )
    feed_forward = number * max(experts, 3 * config.intermediate_size)
    scores = min(MOST_SCORES, config.num_attention_heads * GPU_QUERY_BLOCK * LARGEST_BLOCK)
    expanded = EXPANDED * (config.qk_nope_head_dim + config.v_head_dim) * number
    outputs = 4 * PREFILL_STEP * config.num_attention_heads * config.v_head_dim
    block = max(scores * (8 + number), expanded + 2 * outputs)
    return PREFILL_STEP * (delta_rule + feed_forward) + 2 * block


def refuse_what_does_not_fit(folder: Path, config: ModelConfig, weights: int) -> None:
    """Stop before memory is touched.

    Raises:
        KimiError: the weights and one prefill step do not fit.
    """
    wanted, machine = needs(config, weights), Machine.here()
    if os.environ.get(ANY_SIZE) or wanted.at(PREFILL_STEP) <= machine.limit:
        return
    raise KimiError(
        f"{folder}: needs {human_size(wanted.weights)} for its weights and about "
        f"{human_size(wanted.at(PREFILL_STEP) - wanted.weights)} to work, but {machine}; "
        f"{_advice(config, wanted, machine.limit)}{_or_stream(config, wanted, machine.limit)}"
    )


def _advice(config: ModelConfig, wanted: MemoryEstimate, limit: int) -> str:
    count = sum(prod(tensor.shape) for tensor in tensors(config))
    room = limit - (wanted.at(PREFILL_STEP) - wanted.weights)
    for bits in BITS:
        size = int(count * (bits + SCALES) / 8)
        if size <= room and size < wanted.weights:
            return f"`mlx_kimi convert --bits {bits}` makes {human_size(size)} of it"
    return f"no quantization of it fits; {ANY_SIZE}=1 in the environment loads it all the same"


def _or_stream(config: ModelConfig, wanted: MemoryEstimate, limit: int) -> str:
    """The way out that needs no other weights, if a token's experts fit beside all else."""
    sizes = [(prod(tensor.shape), tensor.join is Join.STACK) for tensor in tensors(config)]
    routed = (
        wanted.weights * sum(n for n, is_routed in sizes if is_routed) // sum(n for n, _ in sizes)
    )
    of_a_token = routed * config.num_experts_per_token // max(config.num_experts, 1)
    context = min(CONTEXT, config.model_max_length)
    beside = non_expert_bytes(
        replace(wanted, weights=wanted.weights - routed), context, SNAPSHOT_MEMORY
    )
    budget = limit // 10**9
    if not routed or beside + of_a_token > budget * 10**9:
        return ""
    return f"; or `generate` and `chat` with --memory-budget {budget}GB read experts from the disk"


def wire() -> None:
    """Let macOS keep as much of the GPU's memory in place as it recommends.

    Without, it may page weights out between two tokens.
    """
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
