"""Weights: read, converted and written at the same time, a few blocks of each in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_kimi.checkpoint.config import Quantization
from mlx_kimi.checkpoint.files import DTYPES
from mlx_kimi.checkpoint.hub_weights import HubWeights
from mlx_kimi.convert.blocks import Block, Source
from mlx_kimi.convert.output import Output, Rows
from mlx_kimi.convert.partial import Partial, Position
from mlx_kimi.convert.pipeline import ahead
from mlx_kimi.convert.plan import AHEAD, BEHIND, CACHE, block_limit
from mlx_kimi.convert.shards import Shard
from mlx_kimi.convert.steps import Step, by_file
from mlx_kimi.errors import KimiError

Progress = Callable[[int, int], None]  # (bytes read, bytes to read)
Numbered = tuple[int, Block]  # with the number of its step


def write_weights(
    partial: Partial,
    shards: Sequence[Shard],
    steps: Sequence[Step],
    source: Source,
    progress: Progress,
    hub: HubWeights | None = None,
) -> None:
    """Write what `partial` does not have yet. A record follows the sync of what it stands for.

    With `hub`, a file of the source is downloaded when its turn comes, and deleted when all that
    was made of it is recorded.
    """
    total = sum(source.nbytes(step.piece) for step in steps)
    begin = partial.position
    left = sum(block.source_bytes for _, block in _blocks(steps, range(len(steps)), begin, source))
    done = total - left

    def advance(source_bytes: int) -> None:
        nonlocal done
        done += source_bytes
        progress(done, total)

    kept = mx.set_cache_limit(CACHE)
    try:
        with Output(partial, shards) as output:
            for file, numbers in by_file(steps):
                if hub and numbers.stop > begin.step:
                    hub.fetch(file)
                blocks = list(_blocks(steps, numbers, begin, source))
                _convert_file(steps, blocks, source, output, advance)
                source.close(file)
                if hub:
                    output.record()
                    hub.delete(file)
            output.record()
    finally:
        mx.set_cache_limit(kept)


def _convert_file(
    steps: Sequence[Step],
    blocks: Sequence[Numbered],
    source: Source,
    output: Output,
    advance: Callable[[int], None],
) -> None:
    """Convert blocks of one file of the source; `advance` hears of each once it is written.

    One thread reads, this one converts, and one writes, each a bounded number of blocks apart.
    """

    def converted(numbered: Numbered, read: np.ndarray) -> Rows:
        return _converted(steps, numbered, read, source)

    with (
        ahead(source.read, (block for _, block in blocks), AHEAD) as values,
        ahead(output.write, map(converted, blocks, values), BEHIND) as written,
    ):
        for source_bytes in written:
            advance(source_bytes)


def _blocks(
    steps: Sequence[Step], numbers: range, begin: Position, source: Source
) -> Iterator[Numbered]:
    """The blocks of some steps, less what is written already."""
    for number in numbers:
        if number < begin.step:
            continue
        skip = begin.rows if number == begin.step else 0
        step = steps[number]
        limit = block_limit(step.plan.quantization)
        for block in source.blocks(step.piece, skip, limit):
            yield number, block


def _converted(steps: Sequence[Step], numbered: Numbered, read: np.ndarray, source: Source) -> Rows:
    """A block as it is written."""
    number, block = numbered
    plan = steps[number].plan
    stored = source.rows(block, read)
    rows = stored.astype(DTYPES[plan.dtype])
    _check_finite(block, stored, rows, source)
    arrays = [mx.contiguous(array) for array in _stored(rows, plan.quantization)]
    mx.eval(arrays)
    return Rows(
        first_row=block.first_row,
        parts=list(zip(plan.parts, map(memoryview, arrays), strict=True)),  # type: ignore[arg-type]
        source_bytes=block.source_bytes,
        position=_after(number, block),
    )


def _after(number: int, block: Block) -> Position:
    rows = block.skip + block.rows
    return Position(number, rows) if rows < block.piece.rows else Position(number + 1, 0)


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


def _check_finite(block: Block, stored: mx.array, rows: mx.array, source: Source) -> None:
    # The sum is five times as fast, and finite unless an element is not or very many are huge.
    if mx.isfinite(mx.sum(rows)).item() or mx.all(mx.isfinite(rows)).item():
        return
    name, file = block.piece.name, source.file(block.piece)
    if mx.all(mx.isfinite(stored)).item():
        dtype = str(rows.dtype).removeprefix("mlx.core.")
        raise KimiError(f"{file}: {name} has values beyond {dtype}; choose another dtype")
    raise KimiError(f"{file}: {name} holds NaN or infinity")
