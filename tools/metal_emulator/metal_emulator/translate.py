"""Metal text -> C++ for OpenCL: the few places where one clang dialect differs from the other.

Lines stay where they are, so that a line of the result is a line of the Metal text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .msl import ATTRIBUTES, MetalText

# `threadgroup T x[N][M], y;` declares storage; with a * or an initialiser it is something else.
_STORAGE = re.compile(
    r"\bthreadgroup\s+(?!auto\b)(?P<type>(?:typename\s+)?[A-Za-z_][\w:]*(?:<[^;{}()]*?>)?)\s+"
    r"(?P<names>\w+\s*(?:\[[^;\]]*\]\s*)*(?:,\s*\w+\s*(?:\[[^;\]]*\]\s*)*)*);"
)
_DECLARATOR = re.compile(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)")
_VECTOR = re.compile(r"(?<!\boperator )(?:\bmetal::)?\bvec(<[^<>;(){}]*>\s*\()")
_CAST = re.compile(r"\bstatic_cast<\s*(\w+)\s*>(?=\s*\()")  # clang refuses bfloat of a half
_INSTANCE = re.compile(r"^template \[\[host_name.*$", re.MULTILINE)
# Given a value when the GPU's code is made: until then an unknown one.
_FUNCTION_CONSTANT = re.compile(r"\bconstant(?=\s+[\w:]+\s+\w+\s*\[\[\s*function_constant\b)")
_KERNEL = re.compile(r"\bkernel(?=\s+void\s+\w)")  # in place of [[kernel]]
# Constant memory is `const`, whether or not the text says so.
_CONSTANT = re.compile(r"(?<!\bconst )\bconstant(?=\s+(?!const\b)[\w:]+(?:<[^<>;(){}]*>)?\s*[*&])")
# A temporary is a thread's; clang makes it in no address space, which no such reference takes.
_NUMBER = re.compile(
    r"\b(?:thread\s+const|const\s+thread)\s+(?P<type>bool|u?(?:char|short|int|long)|half|bfloat|float)"
    r"\s*&(?=\s*\w+\s*[,)])"
)
_STRUCTURE = re.compile(r"\b(?:struct|class)\s+(\w+)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Translation:
    """The text that clang compiles, and the names of its threadgroup arrays."""

    text: str
    arrays: tuple[str, ...]


def translate(metal: MetalText) -> Translation:
    arrays: list[str] = []
    text = translate_text(metal.text, arrays)
    return Translation(text + _entry(metal), tuple(arrays))


def translate_text(text: str, arrays: list[str] | None = None) -> str:
    """`arrays` gets the names of threadgroup arrays."""
    names = [] if arrays is None else arrays
    text = without_comments(text)
    text = _INSTANCE.sub("", text)
    text = _KERNEL.sub("", text)
    text = _FUNCTION_CONSTANT.sub("extern constant", text)
    text = _CONSTANT.sub("const constant", text)
    text = _NUMBER.sub(r"const \g<type>", text)
    text = _CAST.sub(r"metal::emu_cast<\1>", text)
    text = _constructors(text)
    text = _VECTOR.sub(r"metal::make_vec\1", text)
    return _STORAGE.sub(lambda found: _storage(found, names), text)


def without_comments(text: str) -> str:
    return _COMMENT.sub(_blank, text)


def _blank(comment: re.Match[str]) -> str:
    return " " + "\n" * comment[0].count("\n")


def _constructors(text: str) -> str:
    """Without `thread`: clang makes what a function returns in no address space."""
    names = "|".join(set(_STRUCTURE.findall(text)))
    made = rf"(\b(?:{names})\s*\([^;{{}}]*?\)\s*)thread\b(?=\s*[:{{])"
    return re.sub(made, r"\1", text) if names else text


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
