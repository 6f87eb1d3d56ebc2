"""Runs the exact text of Metal kernels on the CPU and checks every access.

`metal_text` (msl.py) makes the text that MLX would hand to Metal. `translate` turns it into C++ for
OpenCL, which has Metal's address spaces, and clang compiles that beside the library of `shim/`.
`instrument` adds a call before each load and store. `launch` runs every thread as a fiber of
`runtime/`, which keeps for each element who touched it last and after which barrier. A fault raises
one of `findings`; `lint` finds without running what a Metal compiler would refuse, and `review`
what it may make slow.

README.md says how kernel authors use it, and what it cannot know.
"""

from . import findings
from .compiler import CompileError
from .findings import Finding
from .kernel import EmulatedKernel, metal_kernel
from .launch import COUNTS
from .library import lint_library, review_library
from .linter import LintError, lint, lint_kernel
from .reviewer import Remark, review

__all__ = [
    "COUNTS",
    "CompileError",
    "EmulatedKernel",
    "Finding",
    "LintError",
    "Remark",
    "findings",
    "lint",
    "lint_kernel",
    "lint_library",
    "metal_kernel",
    "review",
    "review_library",
]
