"""What becomes of each tensor, in which order, and in how much memory; nothing is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from mlx_kimi.checkpoint import files as checkpoint
from mlx_kimi.checkpoint.config import Quantization
from mlx_kimi.checkpoint.tensors import Tensor, tensors
from mlx_kimi.convert.blocks import BLOCK, RowBlock, SourceTensor, TensorReader
from mlx_kimi.convert.partial import BEGINNING, Position
from mlx_kimi.convert.quantize import DTYPES, Scheme
from mlx_kimi.convert.shards import OutputTensor, Shard, lay_out

# --dtype leaves these as they are in the file, here as in mlx-lm.
KEPT_DTYPE = (".A_log", ".dt_bias", ".e_score_correction_bias")

# Blocks that wait at most: to be converted, and to be written.
AHEAD, BEHIND = 2, 2
CACHE = 2**25  # bytes of freed memory that MLX may keep meanwhile

# What the process takes before the first block, with an allowance: interpreter, libraries, names
# of tensors.
PROCESS = 250 * 10**6  # bytes

# MLX's temporaries for a mode, in bytes a byte of rows, as measured on the CPU, where it has no
# kernel for the 4-bit floats. A block is made the smaller for them.
TEMPORARIES = {"affine": 1, "mxfp8": 3, "mxfp4": 21, "nvfp4": 39}


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor."""

    tensor: Tensor
    dtype: str  # of its elements or its scales, as safetensors spells it
    quantization: Quantization | None
    kept_unquantized: bool  # though it is to be quantized: the group does not divide its last axis

    @property
    def outputs(self) -> list[OutputTensor]:
        """The tensors that are written: it, or its packed weights, scales and biases."""
        tensor, quantization = self.tensor, self.quantization
        if quantization is None:
            return [OutputTensor(tensor.name, self.dtype, tensor.shape)]
        scales = self.dtype if quantization.mode == "affine" else "U8"
        return [
            OutputTensor(f"{tensor.module}.{part}", "U32" if part == "weight" else scales, shape)
            for part, shape in quantization.packed(tensor.shape).items()
        ]

    @property
    def row_bytes(self) -> int:
        """The bytes of the result that one row becomes."""
        return sum(output.row_bytes for output in self.outputs)


@dataclass(frozen=True)
class ConversionPlan:
    """What becomes of all tensors."""

    tensors: Mapping[str, TensorPlan]  # by their names in the MLX layout
    steps: Sequence[SourceTensor]  # in the order of the work
    shards: Sequence[Shard]

    def of(self, step: SourceTensor) -> TensorPlan:
        """What becomes of a source tensor."""
        return self.tensors[step.tensor.name]

    def by_file(self) -> Iterator[tuple[str, range]]:
        """Each file of the source with the numbers of its steps."""
        stop = 0
        for file, run in groupby(self.steps, key=lambda step: step.file):
            start, stop = stop, stop + sum(1 for _ in run)
            yield file, range(start, stop)

    def blocks(
        self, reader: TensorReader, begin: Position = BEGINNING, numbers: range | None = None
    ) -> Iterator[RowBlock]:
        """The blocks from `begin` on, of all steps or those with these numbers."""
        for number in range(len(self.steps)) if numbers is None else numbers:
            if number >= begin.step:
                step = self.steps[number]
                skip = begin.rows if number == begin.step else 0
                yield from reader.blocks(step, skip, block_limit(self.of(step).quantization))

    def written_bytes(self, position: Position) -> int:
        """Bytes of data in the result's files when the work is at `position`."""
        whole = sum(step.rows * self.of(step).row_bytes for step in self.steps[: position.step])
        if not position.rows:
            return whole
        return whole + position.rows * self.of(self.steps[position.step]).row_bytes

    @property
    def source_bytes(self) -> int:
        """Bytes that all steps read."""
        return sum(step.nbytes for step in self.steps)

    @property
    def out_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(plan.tensor.shape) for plan in self.tensors.values())

    @property
    def quantizations(self) -> dict[str, Quantization]:
        """How each quantized module is stored, by its path."""
        return {
            plan.tensor.module: plan.quantization
            for plan in self.tensors.values()
            if plan.quantization is not None
        }

    @property
    def kept_unquantized(self) -> tuple[Tensor, ...]:
        """Tensors that are to be quantized, but whose last axis the group does not divide."""
        return tuple(plan.tensor for plan in self.tensors.values() if plan.kept_unquantized)


def plan_conversion(
    reader: TensorReader, scheme: Scheme | None, dtype: str | None, max_shard: int
) -> ConversionPlan:
    """Plan every tensor of the model; the arguments are those of `convert`.

    The work goes file by file of the source, so that each file is needed once, and within a file
    in the order of the computation.
    """
    plans = [plan_tensor(tensor, reader, scheme, dtype) for tensor in tensors(reader.config)]
    steps = [step for plan in plans for step in reader.sources(plan.tensor)]
    return ConversionPlan(
        tensors={plan.tensor.name: plan for plan in plans},
        steps=sorted(steps, key=lambda step: step.file),
        shards=lay_out([plan.outputs for plan in plans], max_shard),
    )


def plan_tensor(
    tensor: Tensor, reader: TensorReader, scheme: Scheme | None, dtype: str | None
) -> TensorPlan:
    """Plan one tensor; scheme and dtype as `convert` takes them."""
    if dtype is None or tensor.name.endswith(KEPT_DTYPE):
        stored = reader.dtype(tensor)
    else:
        stored = DTYPES[dtype]
    asked = None if scheme is None else scheme.asked_for(tensor, reader.config)
    if asked is not None and tensor.shape[-1] % asked.group_size:
        return TensorPlan(tensor, stored, None, kept_unquantized=True)
    return TensorPlan(tensor, stored, asked, kept_unquantized=False)


def block_limit(quantization: Quantization | None) -> int:
    """Bytes of source that are read at once."""
    if quantization is None or TEMPORARIES[quantization.mode] < 8:
        return BLOCK
    return BLOCK // TEMPORARIES[quantization.mode]


def peak_memory(plan: ConversionPlan, reader: TensorReader) -> int:
    """Bytes that the process takes at most, whatever the model's size."""
    return PROCESS + CACHE + max(_working_bytes(each, reader) for each in plan.tensors.values())


def _working_bytes(plan: TensorPlan, reader: TensorReader) -> int:
    """The blocks of a plan that are in memory at once, as if all were the largest one."""
    source = max(reader.sources(plan.tensor), key=lambda source: source.nbytes)
    block = next(reader.blocks(source, limit=block_limit(plan.quantization)))
    rows = block.rows * plan.tensor.shape[-1] * checkpoint.DTYPES[plan.dtype].size
    temporaries = rows * (TEMPORARIES[plan.quantization.mode] if plan.quantization else 1)
    written = block.rows * plan.row_bytes
    # In this order: blocks that wait to be converted, and the one that is, twice, since MLX copies
    # it; that one in the dtype of the result; MLX's temporaries; blocks that wait to be written,
    # the one that is, and a contiguous copy of it.
    return (AHEAD + 2) * block.nbytes + rows + temporaries + (BEHIND + 2) * written
