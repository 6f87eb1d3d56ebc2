"""Weights that are no numbers, named."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from mlx_kimi.model.linear import Linear

# Bytes of a scale that are no number: of E8M0 all bits set, of E4M3 all but the sign.
NAN_SCALES = {"mxfp4": (0xFF,), "mxfp8": (0xFF,), "nvfp4": (0x7F, 0xFF)}


def not_finite_place(model: nn.Module, matrices: bool = False) -> str | None:
    """Where a weight is NaN or infinity: `layers.3.input_layernorm.weight`; None: nowhere.

    Norms, biases, convolutions and scales are looked at, which costs little beside reading them;
    with `matrices` also those that are not quantized. Codes of integers are always numbers.
    """
    for path, module in reversed(model.named_modules()):  # (which names the last first)
        found = {name: _is_finite(module, name, array) for name, array in _arrays(module, matrices)}
        if found and not mx.stack(list(found.values())).all().item():
            name = next(name for name, good in found.items() if not good.item())
            return f"{path}.{name}".removeprefix(".")
    return None


def _arrays(module: nn.Module, matrices: bool) -> Iterator[tuple[str, mx.array]]:
    """The arrays of a module itself that may be no numbers."""
    is_matrix = isinstance(module, Linear)
    for name, array in module.items():
        if isinstance(array, mx.array) and (matrices or not (is_matrix and name == "weight")):
            yield name, array


def _is_finite(module: nn.Module, name: str, array: mx.array) -> mx.array:
    if mx.issubdtype(array.dtype, mx.floating):
        return mx.isfinite(array).all()
    how = getattr(module, "quantization", None)
    found = mx.array(True)
    if how is not None and name == "scales":
        for code in NAN_SCALES.get(how.mode, ()):
            found = found & (array != code).all()
    if how is not None and name == "weight" and how.mode == "mxfp8":
        found = ((array.view(mx.uint8) & 0x7F) != 0x7F).all()
    return found
