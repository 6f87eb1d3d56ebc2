"""What becomes of each tensor, and of all of them: sizes that are known before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_kimi.checkpoint import files as checkpoint
from mlx_kimi.checkpoint.config import ModelConfig, Quantization
from mlx_kimi.checkpoint.tensors import Tensor
from mlx_kimi.convert.blocks import BLOCK, Source
from mlx_kimi.convert.quantize import Scheme
from mlx_kimi.convert.shards import Part

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # --dtype -> safetensors

# --dtype leaves these as they are in the file, here as in mlx-lm.
KEPT_DTYPE = (".A_log", ".dt_bias", ".e_score_correction_bias")

# Blocks that wait for their turn at most: read ones, and written ones.
AHEAD, BEHIND = 2, 2
CACHE = 2**25  # bytes of freed memory that MLX may keep meanwhile

# What the process takes before the first block, with an allowance: interpreter, libraries, names
# of tensors.
PROCESS = 250 * 10**6  # bytes

# MLX's temporaries for a mode, in bytes a byte of rows, as measured on the CPU, where it has no
# kernel for the 4-bit floats. A block is made the smaller for them.
TEMPORARIES = {"affine": 1, "mxfp8": 3, "mxfp4": 21, "nvfp4": 39}


@dataclass(frozen=True)
class Plan:
    """What becomes of one tensor."""

    tensor: Tensor
    dtype: str  # of its elements or its scales, as safetensors spells it
    quantization: Quantization | None
    refused: bool  # it should have been quantized, but the group does not divide its last axis

    @property
    def parts(self) -> list[Part]:
        """The tensors that are written."""
        tensor, quantization = self.tensor, self.quantization
        if quantization is None:
            return [Part(tensor.name, self.dtype, tensor.shape)]
        scales = self.dtype if quantization.mode == "affine" else "U8"
        return [
            Part(f"{tensor.module}.{part}", "U32" if part == "weight" else scales, shape)
            for part, shape in quantization.packed(tensor.shape).items()
        ]


def plan_of(
    tensor: Tensor, source: Source, config: ModelConfig, scheme: Scheme | None, dtype: str | None
) -> Plan:
    """What becomes of `tensor`; scheme and dtype as `convert` takes them."""
    if dtype is None or tensor.name.endswith(KEPT_DTYPE):
        stored = source.dtype(tensor)
    else:
        stored = DTYPES[dtype]
    asked = None if scheme is None else scheme.asked_for(tensor, config)
    refused = asked is not None and tensor.shape[-1] % asked.group_size != 0
    return Plan(tensor, stored, None if refused else asked, refused)


def block_limit(quantization: Quantization | None) -> int:
    """Bytes of source that are read at once."""
    if quantization is None or TEMPORARIES[quantization.mode] < 8:
        return BLOCK
    return BLOCK // TEMPORARIES[quantization.mode]


def peak_memory(plans: Sequence[Plan], source: Source) -> int:
    """Bytes that the process takes at most, whatever the model's size."""
    return PROCESS + CACHE + max(_working_bytes(plan, source) for plan in plans)


def _working_bytes(plan: Plan, source: Source) -> int:
    """The blocks of a plan that are in memory at once, as if all were the largest one."""
    piece = max(source.pieces(plan.tensor), key=source.nbytes)
    block = next(source.blocks(piece, limit=block_limit(plan.quantization)))
    rows = block.rows * plan.tensor.shape[-1] * checkpoint.DTYPES[plan.dtype].size
    temporaries = rows * (TEMPORARIES[plan.quantization.mode] if plan.quantization else 1)
    written = block.rows * sum(part.row_bytes for part in plan.parts)
    # What waits and what is converted as it was read, twice, since MLX copies it; in the dtype of
    # the result; what MLX needs beside; what waits, what is written and a contiguous copy of it.
    return (AHEAD + 2) * block.source_bytes + rows + temporaries + (BEHIND + 2) * written
