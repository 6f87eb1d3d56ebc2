"""Latents in 8 bits: rows of words, of which `latents.h` says how they are laid out.

A group of 64 channels is packed as `mx.quantize` packs it, and its scale and bias stand behind its
codes in float32, so that codes are all that is rounded: a channel errs by half of 1/255 of its
group's span, or of 255e-7 if that is more. 576 channels take 648 bytes instead of 1152.
"""

from __future__ import annotations

import mlx.core as mx

GROUP, BITS = 64, 8
CODE_WORDS = GROUP * BITS // 32
GROUP_WORDS = CODE_WORDS + 2


def pack(latents: mx.array) -> mx.array:
    """[..., width] of any float dtype -> [..., words] uint32."""
    width = latents.shape[-1]
    missing = [(0, 0)] * (latents.ndim - 1) + [(0, -width % GROUP)]
    filled = mx.pad(latents.astype(mx.float32), missing)
    codes, scales, biases = mx.quantize(filled, GROUP, BITS)
    groups = mx.concatenate(
        [
            codes.reshape(*scales.shape, CODE_WORDS),
            scales[..., None].view(mx.uint32),
            biases[..., None].view(mx.uint32),
        ],
        axis=-1,
    )
    return groups.reshape(*latents.shape[:-1], -1)


def unpack(rows: mx.array, width: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """[..., words] uint32 -> [..., width]."""
    lead = rows.shape[:-1]
    groups = rows.reshape(*lead, -1, GROUP_WORDS)
    codes, scales, biases = mx.split(groups, [CODE_WORDS, CODE_WORDS + 1], axis=-1)
    scales, biases = (part[..., 0].view(mx.float32) for part in (scales, biases))
    latents = mx.dequantize(codes.reshape(*lead, -1), scales, biases, GROUP, BITS)
    return latents[..., :width].astype(dtype)


def is_packed(rows: mx.array) -> bool:
    return rows.dtype == mx.uint32
