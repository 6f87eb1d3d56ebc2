"""What clang makes of a kernel at -O2, as LLVM text: functions, with their names and lines.

The optimizer is LLVM's for this machine's processor, not Apple's: what it keeps in memory or leaves
as a call, another one may keep too.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .compiler import clang, run

_AS_WRITTEN = ("-O2", "-g", "-fno-discard-value-names", "-Xclang", "-disable-llvm-passes")
_OPTIMIZE = (
    *("-x", "ir", "-O2", "-fno-vectorize", "-fno-slp-vectorize", "-fno-discard-value-names"),
    *("-Wno-override-module", "-S", "-emit-llvm"),
)
_FUNCTION = re.compile(r"^define .*?@(?P<name>[\w.$]+)\((?P<rest>.*)\{$")
_ATTRIBUTES = re.compile(r"^attributes (#\d+) = \{(.*)\}", re.MULTILINE)
_SUBPROGRAM = re.compile(
    r'^(!\d+) = distinct !DISubprogram\(name: "([^"]*)".*?\bline: (\d+)', re.MULTILINE
)
_NUMBERED = re.compile(
    r"^(!\d+) = (?:distinct )?!(?:DILocation|DILocalVariable)\((.*?)\bline: (\d+)", re.MULTILINE
)
VALUE = re.compile(r"%[\w.$-]+")  # a value's name in LLVM's text
_NAME = re.compile(r'\bname: "([^"]*)"')


@dataclass(frozen=True)
class Function:
    """A function of the kernel's text; `name` as written there, `symbol` as in LLVM's text."""

    symbol: str
    name: str
    line: int  # of its declaration
    forced: bool  # inline, whatever the optimizer thinks of it
    body: tuple[str, ...]

    @property
    def plain_name(self) -> str:
        """Without template values."""
        return self.name.split("<")[0]


@dataclass(frozen=True)
class Module:
    """LLVM text in parts. `lines` and `names` belong to places and variables, by number (!12)."""

    functions: dict[str, Function]
    lines: dict[str, int]
    names: dict[str, str]


def without_debug(line: str) -> str:
    """An instruction without the place that it stands for."""
    return line.split(", !dbg")[0]


@cache
def modules(text: str, kernels: tuple[str, ...]) -> tuple[Module, Module]:
    """A translated text as clang reads it, and after -O2; each kernel stays a function."""
    with tempfile.TemporaryDirectory() as folder:
        source, written, optimized = (Path(folder) / f"kernel.{s}" for s in ("cl", "ll", "o2.ll"))
        source.write_text(text)
        clang(source, _AS_WRITTEN, "-S", "-emit-llvm", "-o", str(written))
        before = _apart(written.read_text(), kernels)
        written.write_text(before)
        run("clang", *_OPTIMIZE, str(written), "-o", str(optimized))
        return _module(before), _module(optimized.read_text())


def _apart(text: str, kernels: tuple[str, ...]) -> str:
    """The text with its kernels never inlined into what calls them."""
    names = "|".join(f"{len(kernel)}{kernel}" for kernel in kernels)  # as C++ mangles them
    definition = re.compile(rf"^(define .*@_Z(?:{names})\w*\(.*\)) (#\d+)", re.MULTILINE)
    return definition.sub(r"\1 noinline \2", text)


def _module(text: str) -> Module:
    forced = {key for key, words in _ATTRIBUTES.findall(text) if "alwaysinline" in words}
    programs = {key: (name, int(line)) for key, name, line in _SUBPROGRAM.findall(text)}
    functions = {}
    lines = iter(text.split("\n"))
    for line in lines:
        found = _FUNCTION.match(line)
        if not found:
            continue
        body = []
        while (inner := next(lines)) != "}":
            body.append(inner)
        debug = re.search(r"!dbg (!\d+)", found["rest"])
        if not debug:  # of the library
            continue
        name, at = programs[debug[1]]
        marked = bool(forced & set(re.findall(r"#\d+", found["rest"])))
        functions[found["name"]] = Function(found["name"], name, at, marked, tuple(body))
    numbered = _NUMBERED.findall(text)
    names = {key: found[1] for key, words, _ in numbered if (found := _NAME.search(words))}
    return Module(functions, {key: int(line) for key, _, line in numbered}, names)
