"""What a model needs of memory, what this machine gives, and what to do when that is too little."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import mlx.core as mx
import psutil

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import Join, tensors
from mlx_kimi.defaults import CONTEXT, PREFILL_STEP, SNAPSHOT_MEMORY
from mlx_kimi.errors import KimiError
from mlx_kimi.metal_kernels.attention import GPU_QUERY_BLOCK, query_block
from mlx_kimi.metal_kernels.latents import GROUP, GROUP_WORDS
from mlx_kimi.metal_kernels.matmul import COPY_FROM
from mlx_kimi.metal_kernels.tuning import tuning
from mlx_kimi.model.kimi_linear import PIECE_TOKENS
from mlx_kimi.model.mla import EXPANDED, LARGEST_BLOCK, MOST_SCORES
from mlx_kimi.offload.expert_cache import WAVE
from mlx_kimi.units import human_size

ANY_SIZE = "MLX_KIMI_ANY_SIZE"  # set in the environment, models load whether they fit or not
BITS = (8, 6, 5, 4, 3, 2)  # of `convert`
MARGIN = 16  # the share of an estimate under a budget that is added to it
BUFFERS, LEAST_BUFFERS = 256 << 20, 8 << 20  # bytes
# Bytes of code and of threads that are used first when a model runs: on Linux's CPU 16 to 18 MB,
# and an allowance for what a GPU's kernels are compiled with, which nobody has measured.
PROCESS, PROCESS_GPU = 20 << 20, 100 << 20
SCALES = 0.5  # bits a weight, at `convert`'s group size: a scale and a bias of 16 bits for 64


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. Weights, state and latents are exact; the work space is an estimate."""

    weights: int
    state: int  # of all KDA layers, however long the text is
    latent: int  # of all MLA layers, for one token
    work: int  # what a prefill step holds meanwhile, about

    @property
    def buffers(self) -> int:
        """What MLX may keep of freed arrays under a memory budget, to use them again."""
        return min(BUFFERS, LEAST_BUFFERS + self.work // 4)

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
    config: ModelConfig,
    weights: int,
    latent_bits: int | None = None,
    number: int | None = None,
    prefill_step: int = PREFILL_STEP,
    context: int = CONTEXT,
    slots: int = 0,
) -> MemoryEstimate:
    """Of a model whose weights take so many bytes in memory, for one text.

    A KDA layer keeps a matrix a head in float32 and a few tokens of q | k | v; an MLA layer keeps a
    latent a token, which `latent_bits` 8 packs.

    Args:
        number: bytes of an activation; None: as here.
        prefill_step: tokens that are read at once.
        context: the longest text; beyond some thousand tokens it changes no work space.
        slots: of each layer for routed experts, if those are read from the disk.
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
        _work(config, number, min(prefill_step, context), context, slots),
    )


def activation_bytes(config: ModelConfig, number: int, step: int, context: int) -> int:
    """What one prefill step computes beside its weights and copies of them.

    Two halves of a layer at a time, as `model.PIECE_TOKENS` says, and two blocks of columns. Of few
    tokens more halves are queued at a time, up to those of all layers.

    Args:
        number: bytes of an activation.
        step: tokens that are read at once.
        context: the longest text, in tokens.
    """
    half = _activations(config, number, step, context)
    return half["kda"] + max(half["dense"], half["moe"]) + half["mla"]


def _activations(config: ModelConfig, number: int, step: int, context: int) -> dict[str, int]:
    """As `activation_bytes`, by the kind of a half."""
    queued = max(step, min(PIECE_TOKENS, step * len(config.layers)))  # tokens, in halves of layers
    experts = config.num_experts_per_token * (
        2 * config.hidden_size + 3 * config.moe_intermediate_size
    )
    return {
        # q, k, v thrice; decays, outputs in float32
        "kda": queued * config.kda_width * (9 * number + 16),
        "mla": (_gpu_block if number == 2 else _cpu_block)(config, step, context),
        "dense": queued * number * 3 * config.intermediate_size,
        "moe": queued * number * experts,
    }


def non_expert_bytes(
    wanted: MemoryEstimate, context: int, snapshots: int = 0, loading: int = 0
) -> int:
    """Bytes that this process would take with a memory budget, but for its routed experts.

    Args:
        wanted: of a model whose weights are all but the routed experts'.
        context: the longest text, in tokens.
        snapshots: bytes of states to go back to.
        loading: bytes that reading the weights takes beside them.
    """
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    here = psutil.Process().memory_info().rss + (PROCESS if on_cpu else PROCESS_GPU)
    # The state before a step, and that where the prompt ended, are kept beside the present one.
    running = wanted.at(context) - wanted.weights + 2 * wanted.state + snapshots
    taken = wanted.buffers + wanted.weights + max(running, loading)
    return here + taken + taken // MARGIN


def _work(config: ModelConfig, number: int, step: int, context: int, slots: int) -> int:
    if number == 2:
        return activation_bytes(config, number, step, context)
    # Two halves are at work, the second of them as the first ends: its copies come after.
    of_half, copies = _activations(config, number, step, context), _cpu_copies(config, step)
    # The heap keeps freed pieces between arrays of unlike sizes. Without this eighth, 8,192 tokens
    # read 512 at once took 239 of 233 MB.
    of_half["mla"] += of_half["mla"] // 8
    copies["moe"] += wave_bytes(config, slots, step)
    halves = [half for layer in config.layers for half in (layer.attention, layer.feed_forward)]
    stream = 4 * number * step * config.hidden_size  # x, residual, their sum and its norm
    return stream + max(
        of_half[first] + of_half[second] + max(copies[first], copies[second])
        for first, second in pairwise(halves)
    )


def _cpu_copies(config: ModelConfig, step: int) -> dict[str, int]:
    """Matrices that are made plain, or laid out anew, to multiply many rows: all of a half, by its
    kind. Those of routed experts: `wave_bytes`."""
    sizes: dict[tuple[int, str], int] = {}  # by layer and kind
    for tensor in tensors(config):
        _, _, place = tensor.name.partition("model.layers.")
        number, _, rest = place.partition(".")
        if tensor.matrix and place and tensor.join is not Join.STACK and step >= COPY_FROM:
            layer = config.layers[int(number)]
            is_attention = rest.startswith("self_attn.")
            half = int(number), layer.attention if is_attention else layer.feed_forward
            sizes[half] = sizes.get(half, 0) + prod(tensor.shape)
    largest = dict.fromkeys(("kda", "mla", "dense", "moe"), 0)
    for (_, kind), size in sizes.items():
        largest[kind] = max(largest[kind], int(4 * _copied(config) * size))
    return largest


def _copied(config: ModelConfig) -> float:
    """How often a matrix is in memory while it becomes plain: unpacked, scaled, laid out. As
    measured: 2.7 at most."""
    return 1 if config.quantization is None else 2.7


def wave_bytes(config: ModelConfig, slots: int, step: int) -> int:
    """What the routed experts take that are computed together, each for its rows of a step."""
    is_cpu = mx.default_device() == mx.Device(mx.cpu)
    rows = 2 * step * config.num_experts_per_token // max(1, config.num_experts)  # of a busy one
    if not is_cpu or rows < COPY_FROM:
        return 0
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return int(4 * _copied(config) * expert * min(WAVE, max(1, slots // 2)))


def _cpu_block(config: ModelConfig, step: int, context: int) -> int:
    """Scores, keys and values of two blocks of columns; queries and sums of all rows. In float32,
    as all is on a CPU."""
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    rows = heads * min(step, query_block())
    columns = min(LARGEST_BLOCK, context, max(1, MOST_SCORES // rows))
    keys = 4 * heads * (2 * nope + config.qk_rope_head_dim + value)  # joined of two parts
    if step < min(context, tuning().expand_from):
        keys = 0  # (attention is to the latents themselves)
    blocks = 1 if step <= query_block() and columns == context else 2
    sums = 4 * step * heads * (nope + config.qk_rope_head_dim + 2 * value)
    return blocks * (columns * (12 * rows + keys) + sums)


def _gpu_block(config: ModelConfig, step: int, context: int) -> int:
    """Two blocks of scores, or of keys, values and some outputs in float32: which, the kernels
    decide."""
    heads, value = config.num_attention_heads, config.v_head_dim
    rows, number = heads * min(step, GPU_QUERY_BLOCK), 2
    scores = min(MOST_SCORES, rows * min(LARGEST_BLOCK, context))
    expanded = min(EXPANDED, heads * context) * (config.qk_nope_head_dim + value) * number
    return 2 * max(scores * (8 + number), expanded + 2 * 4 * step * heads * value)


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
    streamed = needs(config, wanted.weights - routed, slots=config.num_experts_per_token)
    beside = non_expert_bytes(streamed, context, SNAPSHOT_MEMORY)
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
