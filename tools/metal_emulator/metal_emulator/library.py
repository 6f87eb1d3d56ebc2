"""`lint` and `review` of a library: a complete Metal source, such as a `.metal` file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .linter import LintError, lint_unit
from .reviewer import Remark, review_unit
from .unit import library_unit


def lint_library(
    name: str,
    source: str,
    kernels: Sequence[str],
    *,
    folders: Sequence[Path] = (),
    strict: bool = False,
    threads: int | None = None,
) -> None:
    """Raise a LintError unless Metal 3.1 to 4.1 would take the source with these kernels.

    Args:
        name: of the library, for messages.
        source: the text, with all that it includes in `"…"` found in `folders`.
        kernels: its functions that are looked at; of a template with its values, `sum<float, 4>`.
        strict: raise also for what `review_library` finds, which may only be slow.
        threads: of a threadgroup, as `review_library` takes it.
    """
    lint_unit(name, library_unit(source, kernels, folders))
    if strict and (
        found := review_library(name, source, kernels, folders=folders, threads=threads)
    ):
        raise LintError("\n".join(map(str, found)))


def review_library(
    name: str,
    source: str,
    kernels: Sequence[str],
    *,
    folders: Sequence[Path] = (),
    threads: int | None = None,
) -> list[Remark]:
    """What may be slow in the kernels of a library; arguments as of `lint_library`.

    Args:
        threads: how many a threadgroup has; without it, registers are not compared.

    Raises:
        CompileError: clang refuses the text; `lint_library` says it in fewer words.
    """
    return review_unit(name, library_unit(source, kernels, folders), threads)
