"""Finds in clang's syntax tree what it takes and Metal does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_NODE = re.compile(r"^(?P<indent>[ |`-]*)(?P<kind>\w+) 0x[0-9a-f]+ (?P<rest>.*)$")
_PLACE = re.compile(r"(?P<file>[^\s<>,:]+):(?P<line>\d+):\d+")
_TYPE = re.compile(r"'([^']*)'(?::'([^']*)')?")
# `device T*& p`, as MLX's kernels have it: only what it points at must have a space.
_POINTER_REFERENCE = re.compile(r"\*\s*__generic\s*&")
_VARIABLES = {"ParmVarDecl", "VarDecl", "FieldDecl"}
_CASTS = {
    "CStyleCastExpr",
    "CXXStaticCastExpr",
    "CXXReinterpretCastExpr",
    "CXXConstCastExpr",
    "CXXFunctionalCastExpr",
}
_ABSENT = {"LambdaExpr": "lambda expressions before Metal 4", "GotoStmt": "goto"}
LAMBDAS = 400  # MLX's kernels for Metal 4 have them
_FUNCTIONS = {"FunctionDecl", "CXXMethodDecl"}


def refusals(tree: str, source: Path, version: int) -> Iterator[str]:
    """`NAME:LINE: message` for each node of the source that this version of Metal would refuse."""
    nodes = list(_nodes(tree))
    for (file, line, kind, rest), following in zip(nodes, [*nodes[1:], None], strict=True):
        if file != str(source) or (kind == "LambdaExpr" and version >= LAMBDAS):
            continue
        message = _message(kind, rest, following[3] if following else "")
        if message:
            yield f"{source.name}:{line}: {message}"


def _nodes(tree: str) -> Iterator[tuple[str, int, str, str]]:
    """File, line, kind and the rest of each node, without what clang has added by itself.

    The dump names a file only where it changes, and a line likewise.
    """
    file, line, hidden_below = "", 0, -1
    for text in tree.split("\n"):
        found = _NODE.match(text)
        if not found:
            continue
        rest = found["rest"]
        for at in _PLACE.finditer(rest.split("'", 1)[0]):
            file, line = (file if at["file"] == "line" else at["file"]), int(at["line"])
        depth = len(found["indent"])
        if hidden_below >= 0 and depth > hidden_below:
            continue
        hidden_below = depth if " implicit " in rest and found["kind"].endswith("Decl") else -1
        if hidden_below < 0:
            yield file, line, found["kind"], rest


def _message(kind: str, rest: str, following: str) -> str | None:
    type_ = _TYPE.search(rest)
    name = type_[1] if type_ else ""
    meant = type_[2] or name if type_ else ""
    declared = name.split("(")[0] if kind in _FUNCTIONS else name
    declared = _POINTER_REFERENCE.sub("&", declared)
    if kind in _VARIABLES | _CASTS | _FUNCTIONS and "__generic" in declared:
        return f"error: '{declared.strip()}' must name an address space before Metal 4.1"
    if kind.endswith("Decl") and re.search(r"\bbfloat\b", rest.split("'", 1)[0]):
        return "error: 'bfloat' is a reserved word of Metal"
    if kind in _ABSENT:
        return f"error: Metal has no {_ABSENT[kind]}"
    implicit = kind == "ImplicitCastExpr" and "part_of_explicit_cast" not in rest
    if implicit and "<FloatingCast>" in rest:
        if meant.endswith("__bf16"):
            return "error: no implicit conversion to bfloat"
        if meant.endswith("half") and "__bf16" in following:
            return "error: half and bfloat do not mix"
    return None
