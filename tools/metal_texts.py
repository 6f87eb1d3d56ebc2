"""Every kernel as MLX hands it to Metal, through Apple's compiler where that is: `OUT/NAME.metal`.

    python -m tools.metal_texts OUT

A Mac with Xcode compiles each for Metal 3.1, 3.2 and 4.0 (Xcode 26 first needs `xcodebuild
-downloadComponent MetalToolchain`); no GPU and no model is needed. Elsewhere the texts are written,
with MLX's headers that they include, and `OUT/compile.sh`, which compiles them on a Mac.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import mlx.core as mx
from metal_emulator.msl import Input, metal_text

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.checkpoint.config import QUANTIZATION_MODES, ModelConfig, Quantization
from mlx_kimi.checkpoint.fields import read_json
from mlx_kimi.checkpoint.tensors import tensors
from mlx_kimi.convert.quantize import RECIPES, Scheme, scheme
from mlx_kimi.evaluation.kernel_report import SAMPLE
from mlx_kimi.loading.warm_up import warm_up
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.metal_kernels.source import without_comments
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.random_weights import zero_tensor
from mlx_kimi.model.weights import Weights

# Of the Metal language, each with the first macOS on which MLX compiles in it.
STANDARDS = {"metal3.1": "14.0", "metal3.2": "15.0", "metal4.0": "26.0"}
# What MLX puts before every kernel is this header's text, with those that it includes: in 0.32.4
# line by line what its library for macOS holds.
PREAMBLE = "mlx/backend/metal/kernels/utils.h"
HEADERS = Path(mx.__file__).with_name("include")
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
# As `convert` stores models: not quantized, in each number of bits and each mode, in groups of each
# size, and by each recipe, of which some mix bits.
AFFINE_BITS = QUANTIZATION_MODES["affine"][1]
STORED: dict[str, Scheme | None] = {
    "16bit": None,
    **{f"{bits}bit": scheme(bits=bits) for bits in AFFINE_BITS},
    **{mode: scheme(mode) for mode in QUANTIZATION_MODES if mode != "affine"},
    **{
        f"{bits}bit-groups-of-{size}": scheme(bits=bits, group_size=size)
        for bits in (4, 8)
        for size in (32, 128)
    },
    **{recipe: scheme(bits=8, recipe=recipe) for recipe in RECIPES if recipe != "default"},
}
Config = Mapping[str, Any]


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="Run Apple's compiler, or do not. Neither: run it if xcrun is here.",
)
@click.option(
    "--standard",
    "standards",
    type=click.Choice(list(STANDARDS)),
    multiple=True,
    default=list(STANDARDS),
    show_default=True,
    help="Of the Metal language; may be repeated.",
)
def main(out: Path, compiled: bool | None, standards: tuple[str, ...]) -> None:
    """Write each kernel's text into OUT, a new or empty folder, and compile it."""
    if out.exists() and any(out.iterdir()):
        raise click.ClickException(f"{out} must be new or empty but holds files")
    here = shutil.which("xcrun") is not None
    if compiled and not here:
        raise click.ClickException("--compile needs xcrun, of Xcode, which is not on PATH")
    files = write(out, standards)
    click.echo(f"{len(files)} texts in {out}")
    if here if compiled is None else compiled:
        compile_all(out, files, standards)
    else:
        click.echo(f"not compiled: on a Mac, `sh {out / 'compile.sh'}` does it")


def write(out: Path, standards: Sequence[str]) -> list[str]:
    """Texts, the headers that they include, and the commands; the names of the texts' files."""
    if not (HEADERS / PREAMBLE).is_file():
        raise click.ClickException(f"{PREAMBLE} must be in {HEADERS}, of MLX's wheel, but is not")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree((HEADERS / PREAMBLE).parent, (out / "include" / PREAMBLE).parent)
    written = {f"{name}.metal": text for name, text in sorted(texts().items())}
    for file, text in written.items():
        (out / file).write_text(text)
    commands = [shlex.join(command(s, "-c", file)) for file in written for s in standards]
    lines = ['cd "$(dirname "$0")"', *(f"{c} || failed=1" for c in commands), "exit ${failed:-0}"]
    (out / "compile.sh").write_text("\n".join(lines) + "\n")
    return list(written)


# ----------------------------------------------------------------------------- Apple's compiler
def command(standard: str, *what: str) -> list[str]:
    """As MLX compiles: without fast math. In the folder of the texts."""
    return [
        *("xcrun", "-sdk", "macosx", "metal", f"-std={standard}"),
        *(f"-mmacosx-version-min={STANDARDS[standard]}", "-fno-fast-math", "-I", "include"),
        *(*what, "-o", "/dev/null"),
    ]


def compile_all(out: Path, files: Sequence[str], standards: Sequence[str]) -> None:
    """Print a line for each text that is refused, and how many were compiled.

    Raises:
        click.ClickException: a text is refused, or the compiler does not know a standard.
    """
    failed = 0
    for standard in standards:
        # An empty file first: otherwise each text would say that the compiler is not there.
        if error := _error(out, command(standard, "-x", "metal", "-c", "/dev/null")):
            click.echo(f"{standard}: the compiler takes no file at all: {error}")
            failed += len(files)
            continue
        commands = [command(standard, "-c", file) for file in files]
        with ThreadPoolExecutor() as pool:
            errors = list(pool.map(lambda c: _error(out, c), commands))
        for file, error in zip(files, errors, strict=True):
            if error:
                click.echo(f"{file}, {standard}: {error}")
                failed += 1
    count = len(files) * len(standards)
    if failed:
        raise click.ClickException(f"{failed} of {count} compilations failed")
    click.echo(f"{count} compilations, for {', '.join(standards)}: no error")


def _error(folder: Path, command: list[str]) -> str | None:
    """The compiler's first, if the command fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return next((line for line in lines if "error:" in line), lines[0])


# ------------------------------------------------------------------------------------- the texts
@dataclass(frozen=True)
class Launched:
    """What the text of a launch depends on."""

    kernel: Kernel
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, mx.Dtype], ...]
    template: tuple[tuple[str, Any], ...]

    @property
    def text(self) -> str:
        """The file: MLX's preamble, and the kernel as MLX is given it, without comments."""
        name, template = self.kernel.name, list(self.template)
        source, header = map(without_comments, (self.kernel.source, self.kernel.header))
        metal = metal_text(name, self.inputs, self.outputs, source, header, template)
        values = ", ".join(f"{key} {_shown(value)}" for key, value in template)
        return f'// {name}: {values}\n#include "{PREAMBLE}"\n{metal.text}'

    def differing(self, other: Launched) -> Iterator[str]:
        """What tells it from another launch of the kernel: values of the template; types, too."""
        found: list[str] = []
        for mine, theirs in zip(self._described(), other._described(), strict=True):
            new = [f"{name}-{mine[name]}" for name in mine if mine[name] != theirs[name]]
            found += new
            if new:
                yield ".".join(found)

    def _described(self) -> Iterator[dict[str, str]]:
        yield {name: _shown(value) for name, value in self.template}
        yield {name: _shown(dtype) for name, dtype in self.outputs}
        yield {x.name: _shown(x.dtype) for x in self.inputs}
        yield {x.name: "constant" if x.small else "device" for x in self.inputs}


def _shown(value: Any) -> str:
    return str(value).removeprefix("mlx.core.")


def texts() -> dict[str, str]:
    """Of the 48B's kinds of layers, and of the pocket model's, as they are stored and computed.

    A text is named by the first model that launches it.
    """
    pocket = read_json(pocket_folder() / "config.json")
    names: dict[str, str] = {}  # by texts
    first: dict[str, Launched] = {}
    seen: set[Launched] = set()
    for (shape, config), dtype, stored in product(
        (("48b", SAMPLE), ("pocket", pocket)), DTYPES, STORED
    ):
        if stored in QUANTIZATION_MODES and dtype != "bfloat16":
            continue  # MLX multiplies small floats in bfloat16
        model = unfilled_model(config, DTYPES[dtype], STORED[stored])
        for launched in launches(model):
            if launched in seen or (text := launched.text) in names:
                continue
            seen.add(launched)
            name = f"{launched.kernel.name}.{shape}.{dtype}.{stored}"
            if (other := first.setdefault(name, launched)) is not launched:
                longer = (f"{name}.{what}" for what in launched.differing(other))
                name = next(each for each in longer if each not in names.values())
            names[text] = name
    return {name: text for text, name in names.items()}


def launches(model: KimiLinear, use: Callable[[], object] | None = None) -> list[Launched]:
    """Every kernel that this model launches, once in each text. Nothing is computed.

    `use`: what the model is used for; None: what loading runs, which is every text.
    """
    found: dict[Launched, None] = {}

    def record(kernel: Kernel) -> Launch:
        def launch(
            *, inputs: Any, template: Any, output_shapes: Any, output_dtypes: Any, **_: Any
        ) -> list[mx.array]:
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            given = tuple(map(Input.of, kernel.inputs, arrays))
            outputs = tuple(zip(kernel.outputs, output_dtypes, strict=True))
            found[Launched(kernel, given, outputs, tuple(template))] = None
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    with use_backend(record), patch.multiple(mx, eval=nothing, async_eval=nothing):
        (use or partial(warm_up, model))()
    return list(found)


def unfilled_model(config: Config, dtype: mx.Dtype, how: Scheme | None) -> KimiLinear:
    """A model whose weights are zeros that nothing computes, as if `convert` had stored it."""
    whole = {key: x for key, x in config.items() if not key.startswith("quantization")}
    parsed = ModelConfig.from_json(whole)
    arrays: dict[str, mx.array] = {}
    quantized: dict[str, Quantization | None] = {}
    for tensor in tensors(parsed):
        stored = how and how.asked_for(tensor, parsed)
        if stored and not tensor.shape[-1] % stored.group_size:
            quantized[tensor.module] = stored
        arrays |= zero_tensor(tensor, dtype, quantized.get(tensor.module))
    parsed = replace(parsed, overrides=quantized)
    return KimiLinear(parsed, Weights(arrays, parsed))


if __name__ == "__main__":
    main()
