"""Weights, written block by block, each block recorded when it is safe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from mlx_kimi.config import Quantization
from mlx_kimi.convert.blocks import Block, Source
from mlx_kimi.convert.partial import Partial
from mlx_kimi.convert.plan import Plan
from mlx_kimi.convert.shards import Shard
from mlx_kimi.durable import sync
from mlx_kimi.errors import KimiError

MLX_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
SYNC = 64 * 2**20  # bytes of source between two records: what a power cut costs at most

Progress = Callable[[int, int], None]  # (bytes read, bytes to read)


def write_weights(
    partial: Partial, shards: list[Shard], plans: list[Plan], source: Source, progress: Progress
) -> None:
    """Write what `partial` does not have yet. A record follows the sync of what it stands for."""
    total = sum(source.nbytes(plan.tensor) for plan in plans)
    first, first_row = partial.position
    done = sum(source.nbytes(plan.tensor) for plan in plans[:first])
    if first_row:
        tensor = plans[first].tensor
        done += source.nbytes(tensor) * first_row // (math.prod(tensor.shape[:-1]))
    for shard, numbers in _by_shard(shards, plans):
        if numbers.stop <= first:
            continue
        path = partial.folder / shard.file
        with _opened(path, shard) as file:
            unsafe = 0  # bytes of source since the last record
            for number in range(max(numbers.start, first), numbers.stop):
                plan = plans[number]
                for block in source.blocks(plan.tensor, first_row if number == first else 0):
                    _write_block(file, shard, plan, block, source)
                    done, unsafe = done + block.source_bytes, unsafe + block.source_bytes
                    if unsafe >= SYNC:
                        _record(partial, file, path, number, block.first_row + len(block.rows))
                        unsafe = 0
                    progress(done, total)
                mx.clear_cache()
            _record(partial, file, path, numbers.stop, 0)


def _by_shard(shards: list[Shard], plans: list[Plan]) -> Iterator[tuple[Shard, range]]:
    """Each shard with the numbers of its plans; a plan's parts are never in two shards."""
    start = 0
    for shard in shards:
        stop, parts = start, 0
        while parts < len(shard.parts):
            parts += len(plans[stop].parts)
            stop += 1
        yield shard, range(start, stop)
        start = stop


def _opened(path: Path, shard: Shard) -> BinaryIO:
    """The file as it is, or new; its name and its header are safe with the next record."""
    path.touch()
    sync(path.parent)
    file = open(path, "r+b")
    file.write(shard.header)
    return file


def _record(partial: Partial, file: BinaryIO, path: Path, tensor: int, rows: int) -> None:
    file.flush()
    sync(path)
    partial.record(tensor, rows, path)


def _write_block(file: BinaryIO, shard: Shard, plan: Plan, block: Block, source: Source) -> None:
    rows = block.rows.astype(MLX_DTYPES[plan.dtype])
    _check_finite(block, rows, source)
    for part, array in zip(plan.parts, _stored(rows, plan.quantization), strict=True):
        data = memoryview(mx.contiguous(array))  # type: ignore[arg-type]  # it is a buffer
        shard.write_rows(file, part, block.first_row, data)


def _stored(rows: mx.array, quantization: Quantization | None) -> Sequence[mx.array]:
    """[rows, in] as it is written: packed, scales and (in affine mode) biases, or itself.

    A group lies within a row, so that a matrix quantized in blocks of rows is the same.
    """
    if quantization is None:
        return [rows]
    return mx.quantize(
        rows,
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
    )


def _check_finite(block: Block, rows: mx.array, source: Source) -> None:
    # The sum is five times as fast, and finite unless an element is not or very many are huge.
    if mx.isfinite(mx.sum(rows)).item() or mx.all(mx.isfinite(rows)).item():
        return
    file = source.checkpoint.tensors[block.source].file
    if mx.all(mx.isfinite(block.rows)).item():
        dtype = str(rows.dtype).removeprefix("mlx.core.")
        raise KimiError(f"{file}: {block.source} has values beyond {dtype}; choose another dtype")
    raise KimiError(f"{file}: {block.source} holds NaN or infinity")
