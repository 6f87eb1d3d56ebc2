"""What becomes of each tensor, and of all of them: sizes that are known before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_kimi.config import ModelConfig, Quantization
from mlx_kimi.convert.blocks import Source
from mlx_kimi.convert.quantize import Scheme
from mlx_kimi.convert.shards import Part
from mlx_kimi.names import Tensor

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # --dtype -> safetensors

# --dtype leaves these as they are in the file, here as in mlx-lm.
KEPT_DTYPE = (".A_log", ".dt_bias", ".e_score_correction_bias")

# An allowance above what was measured on Linux (178 to 220 MB in all): the interpreter, libraries,
# names of tensors; a block as it is read, in MLX, in another dtype and as it is written.
PROCESS = 250 * 10**6  # bytes
COPIES = 6


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


def written_bytes(plans: Sequence[Plan], tensor: int, rows: int) -> int:
    """The size of all parts of the first `tensor` plans, and of `rows` rows of the next."""
    whole = sum(part.nbytes for plan in plans[:tensor] for part in plan.parts)
    begun = plans[tensor].parts if rows else []
    return whole + sum(rows * part.row_bytes for part in begun)


def peak_memory(plans: Sequence[Plan], source: Source) -> int:
    """Bytes that the process takes at most: the interpreter, and a few copies of a block."""
    return PROCESS + COPIES * max(source.block_bytes(plan.tensor) for plan in plans)
