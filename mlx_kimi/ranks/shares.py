"""Which layers each rank has: by its memory, or as somebody says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import is_in_part, tensors
from mlx_kimi.defaults import PREFILL_STEP
from mlx_kimi.errors import OptionError
from mlx_kimi.loading.memory import MemoryEstimate, needs

BY_LAYERS, BY_HEADS = "layers", "heads"
LARGEST_OF_TWO_THIRDS = 36 * 10**9  # bytes of a Mac whose GPU gets 2/3; of larger ones 3/4


@dataclass(frozen=True)
class Share:
    """What one rank has. Rank 0 has the last layers, and the last rank the first."""

    part: range
    needs: MemoryEstimate


def of_gpu(memory: int) -> int:
    """What macOS is taken to give the GPU of a Mac with so many bytes."""
    return memory * 2 // 3 if memory <= LARGEST_OF_TWO_THIRDS else memory * 3 // 4


def parts_of(split: str, config: ModelConfig, ranks: int) -> list[range] | None:
    """What --split says of each rank: None for `layers` alone, which leaves it to `by_memory`.

    Raises:
        OptionError: it is neither that nor one number of layers a rank that adds up to all.
    """
    if split == BY_LAYERS:
        return None
    name, _, numbers = split.partition("=")
    counts = [int(n) for n in numbers.split(",") if n.isascii() and n.isdigit()]
    layers = len(config.layers)
    if name != BY_LAYERS or len(counts) != numbers.count(",") + 1:
        raise OptionError("split", f"must be layers, layers=N,N,... or heads but is {split}")
    if len(counts) != ranks or min(counts) < 1 or sum(counts) != layers:
        raise OptionError(
            "split",
            f"must give {ranks} ranks, rank 0 first, 1 layer or more each of {layers} in all, "
            f"but is {split}",
        )
    return _parts(counts)


def by_memory(
    config: ModelConfig, sizes: Mapping[str, int], memories: Sequence[int]
) -> list[range]:
    """The parts of ranks whose memory, each weighed by its own, is filled the least.

    Args:
        sizes: bytes of each array of the model, by its name in the MLX layout.
        memories: bytes of each rank.

    Raises:
        OptionError: there are more ranks than layers.
    """
    layers, ranks = len(config.layers), len(memories)
    if ranks > layers:
        raise OptionError("split", f"takes a layer a rank at least, but {ranks} have {layers}")

    @cache
    def filled(rank: int, start: int, stop: int) -> float:
        return weights_of(config, sizes, range(start, stop)) / memories[rank]

    @cache
    def best(rank: int, stop: int) -> tuple[float, tuple[int, ...]]:
        """Ranks from this one on have the first `stop` layers: how full the fullest is."""
        if rank == ranks - 1:
            return filled(rank, 0, stop), (stop,)
        found = []
        for start in range(ranks - 1 - rank, stop):
            rest, counts = best(rank + 1, start)
            found.append((max(rest, filled(rank, start, stop)), (stop - start, *counts)))
        return min(found)

    return _parts(best(0, layers)[1])


def _parts(counts: Sequence[int]) -> list[range]:
    """So many layers for each rank, the last for the first of them."""
    stop = sum(counts)
    parts = []
    for count in counts:
        parts.append(range(stop - count, stop))
        stop -= count
    return parts


def weights_of(config: ModelConfig, sizes: Mapping[str, int], part: range) -> int:
    """Bytes of the weights of these layers, with what else is there with them."""
    return sum(size for name, size in sizes.items() if is_in_part(name, config, part))


def heads_share(
    config: ModelConfig, sizes: Mapping[str, int], ranks: int, latent_bits: int | None = None
) -> Share:
    """What each rank has that shares heads and channels of all layers with others."""
    split = {tensor.module for tensor in tensors(config) if tensor.split is not None}
    weights = sum(
        size // ranks if name in split or name.rpartition(".")[0] in split else size
        for name, size in sizes.items()
    )
    part = range(len(config.layers))
    return Share(part, needs(part_config(config, ranks), weights, latent_bits))


def part_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """A rank's KDA states are those of a model with its share of the heads."""
    return replace(config, kda_num_heads=config.kda_num_heads // ranks)


def share_of(
    config: ModelConfig,
    sizes: Mapping[str, int],
    part: range,
    latent_bits: int | None = None,
    number: int | None = None,
    prefill_step: int = PREFILL_STEP,
) -> Share:
    """The memory that a rank with these layers needs; `number` is `needs`'s."""
    weights = weights_of(config, sizes, part)
    return Share(part, needs(config.part(part), weights, latent_bits, number, prefill_step))
