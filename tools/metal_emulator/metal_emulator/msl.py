"""The Metal text that `mx.fast.metal_kernel` generates around a kernel's body.

MLX prints its own text while it traces an export, also without a Mac; `tests/test_text.py` compares
the two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

SMALL = 8  # inputs of fewer elements are in the constant address space

# Added to the signature where the name occurs anywhere in the body, comments included.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

TYPE_NAMES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
}


@dataclass(frozen=True)
class Input:
    """What the text depends on of one input: not its values, not its exact size."""

    name: str
    dtype: mx.Dtype
    ndim: int
    small: bool

    @classmethod
    def of(cls, name: str, array: mx.array) -> Input:
        return cls(name, array.dtype, array.ndim, array.size < SMALL)

    @classmethod
    def all_of(
        cls, dtypes: Mapping[str, mx.Dtype], scalars: Collection[str], small: Collection[str]
    ) -> list[Input]:
        """Inputs by their dtypes alone; of those that are `small`, and of numbers, few elements."""
        return [
            cls(name, dtype, 0 if name in scalars else 1, name in small or name in scalars)
            for name, dtype in dtypes.items()
        ]

    @property
    def type(self) -> str:
        return TYPE_NAMES[self.dtype]

    @property
    def declaration(self) -> str:
        space = "constant" if self.small else "device"
        return f"const {space} {self.type}{'*' if self.ndim else '&'} {self.name}"

    @property
    def suffix(self) -> str:
        """Its part of the kernel's name: s for a scalar, c for constant memory."""
        return self.type + ("s" if self.ndim == 0 else "c" if self.small else "")


@dataclass(frozen=True)
class Parameter:
    """One parameter of the generated function: a buffer, or where `attribute`, a thread's place."""

    declaration: str
    name: str
    attribute: bool = False


@dataclass(frozen=True)
class MetalText:
    """The generated text, and what a caller of the function in it must know."""

    text: str
    function: str
    arguments: str  # "<float, 3>", or nothing where the function is no template
    parameters: tuple[Parameter, ...]
    header_lines: int  # how many lines stand before the template and the signature
    body_line: int  # the line of the text where the body starts


def metal_text(
    name: str,
    inputs: Sequence[Input],
    outputs: Sequence[tuple[str, mx.Dtype]],
    source: str,
    header: str = "",
    template: Sequence[tuple[str, Any]] = (),
    atomic_outputs: bool = False,
) -> MetalText:
    """The text of a kernel for inputs, outputs and template values of these types."""
    values = [_template_value(value) for _, value in template]
    function = _function_name(name, inputs, outputs, values)
    arguments = f"<{', '.join(values)}>" if values else ""
    parameters = _parameters(inputs, outputs, source, atomic_outputs)
    top = header
    if template:
        kinds = (f"{_template_kind(value)} {key}" for key, value in template)
        top += f"template <{', '.join(kinds)}>\n"
    top += f"[[kernel]] void {function}(\n{_signature(parameters)}) {{\n"
    text = f"{top}{source}\n}}\n"
    if template:
        instance = function + arguments
        text += (
            f'\ntemplate [[host_name("{function}")]] [[kernel]] decltype({instance}) {instance};\n'
        )
    lines = top.count("\n")
    return MetalText(text, function, arguments, parameters, header.count("\n"), lines + 1)


def _parameters(
    inputs: Sequence[Input],
    outputs: Sequence[tuple[str, mx.Dtype]],
    source: str,
    atomic_outputs: bool,
) -> tuple[Parameter, ...]:
    found = []
    for x in inputs:
        found.append(Parameter(x.declaration, x.name))
        for suffix, kind in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
            extra = f"{x.name}_{suffix}"
            if x.ndim and extra in source:
                found.append(Parameter(f"const constant {kind} {extra}", extra))
    for name, dtype in outputs:
        kind = TYPE_NAMES[dtype]
        kind = f"atomic<{kind}>" if atomic_outputs else kind
        found.append(Parameter(f"device {kind}* {name}", name))
    for name, kind in ATTRIBUTES.items():
        if name in source:
            found.append(Parameter(f"{kind} {name}", name, attribute=True))
    return tuple(found)


def _signature(parameters: Sequence[Parameter]) -> str:
    lines = []
    for index, each in enumerate(parameters):
        place = each.name if each.attribute else f"buffer({index})"
        lines.append(f"  {each.declaration} [[{place}]]")
    return ",\n".join(lines)


def _function_name(
    name: str,
    inputs: Sequence[Input],
    outputs: Sequence[tuple[str, mx.Dtype]],
    values: Sequence[str],
) -> str:
    template = "".join("_" + value.replace("-", "_") for value in values)
    types = "_".join([x.suffix for x in inputs] + [TYPE_NAMES[dtype] for _, dtype in outputs])
    return f"custom_kernel_{name}_{template}{'_' if template else ''}{types}"


def _template_value(value: Any) -> str:
    return TYPE_NAMES[value] if isinstance(value, mx.Dtype) else str(int(value))


def _template_kind(value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return "typename"
    return "bool" if isinstance(value, bool) else "int"
