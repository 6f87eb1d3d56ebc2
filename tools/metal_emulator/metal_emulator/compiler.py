"""clang from the package index (`ziglang`): kernels and runtime into shared libraries, cached."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import ziglang

from .instrument import instrument

HERE = Path(__file__).parent
CACHE = "METAL_EMULATOR_CACHE"  # set in the environment, the folder of compiled libraries
SHIM = HERE / "shim"
RUNTIME = HERE / "runtime"

ZIG = Path(ziglang.__file__).with_name("zig")  # what `python -m ziglang` starts
MACHINE = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
DARWIN = sys.platform == "darwin"
TARGET = f"{MACHINE}-apple-macos13" if DARWIN else f"{MACHINE}-linux-gnu"

LANGUAGE = (
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-target", TARGET),
    *("-Xclang", "-cl-ext=+all"),  # half and generic pointers, also for arm64
    "-cl-single-precision-constant",  # as in Metal, 0.1 is a float
    # Metal rounds after each operation of half and of bfloat.
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
    *("-ffp-contract=off", "-fPIC", "-Wno-unknown-attributes", "-Wno-uninitialized"),
    *(("-mf16c",) if MACHINE == "x86_64" else ()),
    *("-I", str(SHIM)),
)
LIBRARY = SHIM / "emulator.h"  # Metal's, included before every text
SANITIZED = (
    *("-O2", "-fno-vectorize", "-fno-slp-vectorize", "-gline-tables-only"),
    *("-fsanitize=thread,array-bounds", "-fsanitize-recover=array-bounds"),
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
    *("-mllvm", "-disable-vector-combine"),  # no vector arithmetic that the text does not have
)
CODEGEN = (
    *("-x", "ir", "-target", TARGET, "-O2", "-Xclang", "-disable-llvm-passes"),
    *("-Wno-override-module", "-fPIC", "-c"),
)


class CompileError(Exception):
    """What clang says about a text."""


def run(*arguments: str) -> str:
    """One command of the toolchain; its messages, or a CompileError with them."""
    done = subprocess.run([ZIG, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout


def clang(source: Path, flags: Sequence[str], *output: str) -> str:
    """Read one text, with Metal's library before it; `output` says what is made of it.

    It is compiled once for all texts of these `flags`: reading it takes longer than a text.
    """
    library = ("-Xclang", "-include-pch", "-Xclang", str(_precompiled(tuple(flags))))
    return run("clang", *LANGUAGE, *flags, *library, *output, str(source))


@cache
def _precompiled(flags: tuple[str, ...]) -> Path:
    how = (*LANGUAGE, *flags, "-c", "-Xclang", "-emit-pch", "-Xclang", "-fno-pch-timestamp")

    def build(folder: Path) -> None:
        run("clang", *how, str(LIBRARY), "-o", str(folder / "library"))

    return cached(build, _shim(), repr(how))  # (among them where the library lies)


@cache
def kernel_library(text: str) -> Path:
    """The shared library of a translated kernel."""

    def build(folder: Path) -> None:
        source, ir, instrumented, unit = (
            folder / f"kernel.{suffix}" for suffix in ("cl", "ll", "emu.ll", "o")
        )
        source.write_text(text)
        clang(source, SANITIZED, "-S", "-emit-llvm", "-o", str(ir))
        instrumented.write_text(instrument(ir.read_text()))
        run("clang", *CODEGEN, str(instrumented), "-o", str(unit))
        _link(unit, folder / "library")

    flags = [flag for flag in LANGUAGE + SANITIZED + CODEGEN if not flag.startswith(str(SHIM))]
    return cached(build, text, _shim(), repr(flags))


@cache
def runtime_library() -> Path:
    sources = sorted(RUNTIME.glob("*.cpp"))
    flags = (
        *("-shared", "-fPIC", "-O2", "-std=c++17", "-Wall", "-Wextra"),
        *("-fno-exceptions", "-fno-rtti", "-nostdlib++", "-fvisibility=hidden"),
    )

    def build(folder: Path) -> None:
        run("c++", *flags, *map(str, sources), "-o", str(folder / "library"))

    return cached(build, _texts(sorted(RUNTIME.iterdir())), repr(flags))


def cached(build: Callable[[Path], None], *key: str) -> Path:
    """The library that `build` writes into a folder named by the key, kept between runs."""
    digest = hashlib.sha256("\0".join([_toolchain(), *key]).encode()).hexdigest()[:32]
    root = cache_folder()
    library = root / digest / "library"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to someone else; its libraries are not loaded")
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=root) as folder:
        build(Path(folder))
        library.parent.mkdir(exist_ok=True)
        os.replace(Path(folder) / "library", library)  # whole, or not at all
    return library


def cache_folder() -> Path:
    """Where libraries are kept between runs: one's own folder, which may be deleted at any time."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    caches = "Library/Caches" if DARWIN else ".cache"
    given = None if DARWIN else os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / caches) / "metal_emulator"


def _link(unit: Path, library: Path) -> None:
    if DARWIN:
        run("cc", "-shared", "-undefined", "dynamic_lookup", str(unit), "-o", str(library))
    else:
        run("ld.lld", "-shared", str(unit), "-o", str(library))


@cache
def _toolchain() -> str:
    return f"{version('ziglang')} {TARGET} {_texts([HERE / 'instrument.py'])}"


@cache
def _shim() -> str:
    return _texts(sorted(SHIM.iterdir()))


def _texts(files: Sequence[Path]) -> str:
    return "\0".join(file.read_text() for file in files if file.is_file())
