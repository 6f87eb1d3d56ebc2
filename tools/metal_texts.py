"""Every kernel as MLX hands it to Metal, through Apple's compiler where that is: `OUT/NAME.metal`.

    python -m tools.metal_texts OUT

A Mac with Xcode compiles each for Metal 3.1, 3.2 and 4.0 (Xcode 26 first needs `xcodebuild
-downloadComponent MetalToolchain`); no GPU and no model is needed. Elsewhere the texts are written,
and the commands that would compile them, as `OUT/compile.sh`.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import mlx.core as mx
from metal_emulator.msl import Input, metal_text

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.fields import read_json
from mlx_kimi.checkpoint.tensors import tensors
from mlx_kimi.evaluation.kernel_report import SAMPLE
from mlx_kimi.loading.load import ALWAYS_FLOAT32
from mlx_kimi.loading.warm_up import warm_up
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.metal_kernels.source import without_comments
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.weights import Weights

STANDARDS = ("metal3.1", "metal3.2", "metal4.0")
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
BITS = (4, 8, 16)  # 16: not quantized
# What the texts need of what MLX puts before them.
PREAMBLE = """\
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
#ifndef METAL_FUNC
#define METAL_FUNC inline __attribute__((__always_inline__))
#endif
using namespace metal;
typedef bfloat bfloat16_t;
typedef half float16_t;
"""
Config = Mapping[str, Any]


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--standard",
    "standards",
    multiple=True,
    default=STANDARDS,
    show_default=True,
    help="Of the Metal language; may be repeated.",
)
def main(out: Path, standards: tuple[str, ...]) -> None:
    """Write each kernel's text into OUT, a new or empty folder, and compile it if xcrun is here."""
    if out.exists() and any(out.iterdir()):
        raise click.ClickException(f"{out} must be new or empty but holds files")
    out.mkdir(parents=True, exist_ok=True)
    written = {f"{name}.metal": text for name, text in sorted(texts().items())}
    for file, text in written.items():
        (out / file).write_text(text)
    commands = [command(file, standard) for file in written for standard in standards]
    lines = ['cd "$(dirname "$0")"', "set -e", *map(shlex.join, commands)]
    (out / "compile.sh").write_text("\n".join(lines) + "\n")
    click.echo(f"{len(written)} texts in {out}")
    if shutil.which("xcrun") is None:
        click.echo(f"no xcrun here: {out / 'compile.sh'} compiles them on a Mac")
        return
    with ThreadPoolExecutor() as pool:
        errors = [error for error in pool.map(partial(_error, out), commands) if error]
    for error in errors:
        click.echo(error)
    if errors:
        raise click.ClickException(f"{len(errors)} of {len(commands)} compilations failed")
    click.echo(f"{len(commands)} compilations, for {', '.join(standards)}: no error")


def command(file: str, standard: str) -> list[str]:
    """As MLX compiles: without fast math. In the folder of the file."""
    return [
        *("xcrun", "-sdk", "macosx", "metal", f"-std={standard}", "-fno-fast-math"),
        *("-c", file, "-o", "/dev/null"),
    ]


def _error(folder: Path, command: list[str]) -> str | None:
    """One line, if the compiler does not take the text."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    first = next((line for line in lines if "error:" in line), lines[0])
    file, standard = command[command.index("-c") + 1], command[4].removeprefix("-std=")
    return f"{file}, {standard}: {first}"


def texts() -> dict[str, str]:
    """Of the 48B's kinds of layers, and of the pocket model's, as they are stored and computed."""
    found: dict[str, str] = {}
    pocket = read_json(pocket_folder() / "config.json")
    for model, config in (("48b", SAMPLE), ("pocket", pocket)):
        for dtype in DTYPES:
            for bits in BITS:
                for name, text in launched_texts(unfilled_model(config, DTYPES[dtype], bits)):
                    _add(found, f"{name}.{model}.{dtype}.{bits}bit", text)
    return found


def _add(found: dict[str, str], name: str, text: str) -> None:
    """Under this name, or one with a number; not at all if the same text is there."""
    if text in found.values():
        return
    number = 1
    while (key := name if number == 1 else f"{name}.{number}") in found:
        number += 1
    found[key] = text


def unfilled_model(config: Config, dtype: mx.Dtype, bits: int) -> KimiLinear:
    """A model whose weights are zeros that nothing computes."""
    quantization = {"group_size": 64, "bits": bits} if bits < 16 else None
    stored = {key: value for key, value in config.items() if key != "quantization_config"}
    parsed = ModelConfig.from_json({**stored, "quantization": quantization})
    arrays: dict[str, mx.array] = {}
    for tensor in tensors(parsed):
        how = parsed.quantization_of(tensor.module)
        if how and tensor.matrix and not tensor.module.endswith("mlp.gate"):
            for part, shape in how.packed(tensor.shape).items():
                kind = mx.uint32 if part == "weight" else dtype
                arrays[f"{tensor.module}.{part}"] = mx.zeros(shape, kind)
        else:
            exact = tensor.name.removesuffix(".weight").endswith(ALWAYS_FLOAT32)
            arrays[tensor.name] = mx.zeros(tensor.shape, mx.float32 if exact else dtype)
    return KimiLinear(parsed, Weights(arrays, parsed))


def launched_texts(model: KimiLinear) -> Iterator[tuple[str, str]]:
    """Each kernel that this model launches, with its text. Nothing is computed."""
    found: list[tuple[str, str]] = []

    def record(kernel: Kernel) -> Launch:
        def launch(
            *, inputs: Any, template: Any, output_shapes: Any, output_dtypes: Any, **_: Any
        ) -> list[mx.array]:
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            found.append((kernel.name, _text(kernel, arrays, output_dtypes, template)))
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    with use_backend(record), patch.multiple(mx, eval=_nothing, async_eval=_nothing):
        warm_up(model)
    yield from dict.fromkeys(found)


def _nothing(*_: Any) -> None:
    pass


def _text(
    kernel: Kernel,
    inputs: list[mx.array],
    output_dtypes: list[mx.Dtype],
    template: list[tuple[str, Any]],
) -> str:
    given = [Input.of(name, x) for name, x in zip(kernel.inputs, inputs, strict=True)]
    outputs = list(zip(kernel.outputs, output_dtypes, strict=True))
    strip: Callable[[str], str] = without_comments  # as it is launched
    metal = metal_text(
        kernel.name, given, outputs, strip(kernel.source), strip(kernel.header), template
    )
    values = ", ".join(f"{name} {value}" for name, value in template)
    return f"// {kernel.name}: {values}\n{PREAMBLE}{metal.text}"


if __name__ == "__main__":
    main()
