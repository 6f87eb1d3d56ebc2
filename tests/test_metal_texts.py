"""The texts for Apple's compiler: all of them, as launched, and one that it refuses."""

import os
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from metal_emulator import lint_kernel

from mlx_kimi.evaluation.kernel_report import SAMPLE
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.metal_kernels.source import without_comments
from tools import metal_texts

FOLDER = Path(metal_texts.__file__).parents[1] / "metal_kernels"
NAMES = {file.stem for file in FOLDER.glob("*.metal")}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("texts") / "out"
    result = CliRunner(env={"PATH": ""}).invoke(metal_texts.main, [str(out)])
    assert result.exit_code == 0 and "no xcrun here" in result.output
    return out


def test_every_kernel_is_there_in_every_dtype_and_number_of_bits(written: Path) -> None:
    files = {file.name: file.read_text() for file in written.glob("*.metal")}
    assert {name.split(".")[0] for name in files} == NAMES and len(NAMES) == 16
    assert len(set(files.values())) == len(files)
    for dtype in ("float16", "bfloat16", "float32"):
        for bits in (4, 8, 16):
            for kernel in ("kda_decode", "mla_query", "mla_output", "expert_gate_up"):
                assert f"{kernel}.48b.{dtype}.{bits}bit.metal" in files
    attend = [text for name, text in files.items() if name.startswith("mla_attend.48b.bfloat16")]
    assert sorted("Packed True" in text.splitlines()[0] for text in attend) == [False, True]
    for name, text in files.items():
        assert text.startswith(f"// {name.split('.')[0]}: ")
        assert metal_texts.PREAMBLE in text and "[[host_name(" in text


def test_the_commands_are_what_a_mac_runs(written: Path) -> None:
    lines = (written / "compile.sh").read_text().splitlines()
    assert lines[:2] == ['cd "$(dirname "$0")"', "set -e"]
    assert lines[2] == (
        "xcrun -sdk macosx metal -std=metal3.1 -fno-fast-math -c add_norm.48b.bfloat16.4bit.metal"
        " -o /dev/null"
    )
    assert len(lines) - 2 == 3 * len(list(written.glob("*.metal")))


def test_what_is_launched_passes_the_lint() -> None:
    """Without comments, as MLX gets it: the other tests read the texts as they stand."""
    names: set[str] = set()

    def stripped(kernel: Kernel) -> Launch:
        names.add(kernel.name)
        texts = map(without_comments, (kernel.source, kernel.header))
        return lint_kernel(kernel.name, kernel.inputs, kernel.outputs, *texts, large=kernel.inputs)

    model = metal_texts.unfilled_model(SAMPLE, mx.bfloat16, 4)
    with pytest.MonkeyPatch.context() as patch, use_backend(stripped):
        for name in ("eval", "async_eval"):
            patch.setattr(mx, name, lambda *_: None)
        metal_texts.warm_up(model)
    assert names == NAMES


@pytest.mark.slow
def test_a_text_that_the_compiler_refuses_is_one_line(tmp_path: Path) -> None:
    """A compiler that takes all but one text for one standard."""
    xcrun = tmp_path / "bin" / "xcrun"
    xcrun.parent.mkdir()
    xcrun.write_text(
        "#!/bin/sh\n"
        'case "$*" in *metal3.2*mla_prefill.48b.float16*)\n'
        '  echo "mla_prefill.metal:3:1: note: x" >&2; echo "a.metal:7:2: error: no" >&2; exit 1;;\n'
        '*) test -f "$7";; esac\n'
    )
    xcrun.chmod(0o755)
    env = {"PATH": f"{xcrun.parent}:{os.environ['PATH']}"}
    out = tmp_path / "out"
    result = CliRunner(env=env).invoke(metal_texts.main, [str(out)])
    assert result.exit_code == 1
    refused = "mla_prefill.48b.float16.4bit.metal, metal3.2: a.metal:7:2: error: no"
    assert result.output.splitlines()[1] == refused
    count = 3 * len(list(out.glob("*.metal")))
    assert f"1 of {count} compilations failed" in result.output
    again = CliRunner(env=env).invoke(metal_texts.main, [str(out)])
    assert again.exit_code == 1 and "must be new or empty" in again.output
    few = CliRunner(env=env).invoke(
        metal_texts.main, [str(tmp_path / "few"), "--standard", "metal3.1"]
    )
    assert few.exit_code == 0 and "compilations, for metal3.1: no error" in few.output
