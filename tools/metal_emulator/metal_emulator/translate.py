"""Metal text -> C++ for OpenCL: the few places where one clang dialect differs from the other.

Lines stay where they are, so that a line of the result is a line of the Metal text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .msl import ATTRIBUTES, MetalText

# `threadgroup T x[N][M], y;` declares storage; with a * or an initialiser it is something else.
_STORAGE = re.compile(
    r"\bthreadgroup\s+(?!auto\b)(?P<type>[A-Za-z_][\w:]*(?:<[^;{}()]*?>)?)\s+"
    r"(?P<names>\w+\s*(?:\[[^;\]]*\]\s*)*(?:,\s*\w+\s*(?:\[[^;\]]*\]\s*)*)*);"
)
_DECLARATOR = re.compile(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)")
_VECTOR = re.compile(r"\bvec(<[^<>;(){}]*>\s*\()")
_INSTANCE = re.compile(r"^template \[\[host_name.*$", re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Translation:
    """The text that clang compiles, and the names of its threadgroup arrays."""

    text: str
    arrays: tuple[str, ...]


def translate(metal: MetalText) -> Translation:
    arrays: list[str] = []
    text = without_comments(metal.text)
    text = _INSTANCE.sub("", text)
    text = _VECTOR.sub(r"metal::make_vec\1", text)
    text = _STORAGE.sub(lambda found: _storage(found, arrays), text)
    return Translation(text + _entry(metal), tuple(arrays))


def without_comments(text: str) -> str:
    return _COMMENT.sub(_blank, text)


def _blank(comment: re.Match[str]) -> str:
    return " " + "\n" * comment[0].count("\n")


def _storage(found: re.Match[str], arrays: list[str]) -> str:
    declarations = []
    for name, extents in _DECLARATOR.findall(found["names"]):
        array = found["type"] + " ".join(extents.split())
        declarations.append(
            f"threadgroup {found['type']} (&{name}){extents.strip()} = "
            f"metal::threadgroup_storage<{array}>({len(arrays)});"
        )
        arrays.append(name)
    return " ".join(declarations) + "\n" * (found[0].count("\n") - found["names"].count("\n"))


def _entry(metal: MetalText) -> str:
    """A function without parameters that calls the kernel with what the runtime says."""
    arguments = []
    for index, parameter in enumerate(metal.parameters):
        kind = parameter.declaration.removesuffix(parameter.name).strip()
        if parameter.attribute:
            vector = f"metal::attribute({list(ATTRIBUTES).index(parameter.name)})"
            arguments.append(vector if kind == "uint3" else vector + ".x")
        elif kind.endswith("&"):
            arguments.append(f"*({kind[:-1]}*)emu_argument({index})")
        else:
            arguments.append(f"({kind})emu_argument({index})")
    call = f"{metal.function}{metal.arguments}({', '.join(arguments)})"
    return f'extern "C" void emu_entry() {{ {call}; }}\n'
