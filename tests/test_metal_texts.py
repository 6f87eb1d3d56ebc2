"""The texts for Apple's compiler: all that are launched, as MLX has them compiled; its refusals."""

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from metal_emulator import LintError, lint_library

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.checkpoint.fields import read_json
from mlx_kimi.convert.quantize import scheme
from mlx_kimi.evaluation.kernel_report import SAMPLE
from mlx_kimi.loading import load
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.mla import EXPANDED
from tools import metal_texts
from tools.metal_texts import DTYPES, HEADERS, PREAMBLE, STANDARDS, launches, unfilled_model

FOLDER = Path(metal_texts.__file__).parents[1] / "metal_kernels"
NAMES = {file.stem for file in FOLDER.glob("*.metal")}
POCKET = read_json(pocket_folder() / "config.json")
FEW = {"a": "// a\n", "b": "// b\n"}  # texts, by name


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return metal_texts.texts()


def values(text: str) -> dict[str, str]:
    """The template's, from a file's first line."""
    _, _, pairs = text.splitlines()[0].partition(": ")
    return dict(pair.split(" ") for pair in pairs.split(", "))


def test_every_kernel_is_there_in_every_dtype_and_as_every_matrix_is_stored(
    texts: dict[str, str],
) -> None:
    assert {name.split(".")[0] for name in texts} == NAMES and len(NAMES) == 21
    assert len({text.partition("\n")[2] for text in texts.values()}) == len(texts)
    for name, text in texts.items():
        assert text.startswith(f"// {name.split('.')[0]}: ") and "[[host_name(" in text
        assert text.splitlines()[1] == f'#include "{PREAMBLE}"'
    for dtype in DTYPES:
        for kernel in NAMES - {"expert_select", "expert_order"}:  # whose arrays are the same always
            assert any(name.startswith(f"{kernel}.48b.{dtype}.") for name in texts), (kernel, dtype)
        for kernel in ("kda_decode", "mla_query", "mla_output", "expert_gate_up", "expert_down"):
            stored = [
                values(text) for name, text in texts.items() if f"{kernel}.48b.{dtype}." in name
            ]
            first = {"kda_decode": "F", "expert_gate_up": "Gate"}.get(kernel, "")
            found = {(x[f"{first}Bits"], x[f"{first}Group"]) for x in stored}
            assert {(bits, group) for bits in "48" for group in ("32", "64", "128")} < found
            assert {bits for bits, _ in found} == set("0234568")
            assert (("4", "16") in found) == (dtype == "bfloat16")  # nvfp4
            if kernel == "expert_down":
                shared = {(x["Bits"], x["SharedBits"]) for x in stored}
                assert {("4", "8"), ("4", "4"), ("8", "8"), ("0", "0")} < shared


def test_names_say_what_two_texts_of_a_model_differ_in(texts: dict[str, str]) -> None:
    beside = {".".join(name.split(".")[4:]) for name in texts if ".48b.bfloat16." in name}
    assert beside == {
        "",
        "StoredT-uint32.Packed-True.Heads-8",
        "outputs-float32",
        "Padded-True",
        "Padded-True.lengths-int32",  # of fewer than 8 texts: in another address space
    }


def converse(model: KimiLinear, B: int, latent_bits: int | None) -> None:
    """Prompts that `mla_prefill` takes in parts, turns, more answers than a tail holds; padding."""
    cache = model.make_cache(latent_bits)
    for T in (EXPANDED // (B * model.config.num_attention_heads), 171, 31, 2, 1, 256, 1):
        model(mx.zeros((B, T), mx.int32), cache)
    cache = model.make_cache(latent_bits)
    model(mx.zeros((B, 5), mx.int32), cache, [3] + [5] * (B - 1))
    model(mx.zeros((B, 1), mx.int32), cache)


@pytest.mark.parametrize("config", [SAMPLE, POCKET], ids=["48b", "pocket"])
def test_no_conversation_of_any_batch_launches_another_text(config: metal_texts.Config) -> None:
    model = unfilled_model(config, mx.bfloat16, scheme(bits=4))
    recorded = launches(model)
    conversed = launches(
        model, lambda: [converse(model, B, bits) for B in (1, 2, 7, 8, 9) for bits in (None, 8)]
    )
    assert len(conversed) > 10
    assert {x.text for x in conversed} <= {x.text for x in recorded}


def test_an_unfilled_model_launches_what_the_loaded_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pocket model as a GPU holds it, in bfloat16: 4 bits, embeddings in 6."""
    monkeypatch.setattr(load, "compute_dtype", lambda _: mx.bfloat16)
    loaded = load.load_model(pocket_folder())
    stored = scheme(bits=4, recipe="embeddings-6bit")
    assert set(launches(unfilled_model(POCKET, mx.bfloat16, stored))) == set(launches(loaded))


@pytest.mark.slow
def test_every_kernel_passes_the_lint_behind_what_mlx_puts_before_it(texts: dict[str, str]) -> None:
    """The files as they are: MLX's names and ours together, without comments."""
    stored = (".bfloat16.4bit", "float16.16bit")  # the latest of these that has the kernel
    chosen = {name.split(".")[0]: name for name in texts if name.endswith(stored) and "48b" in name}
    beside = [name for name in texts if ".48b.bfloat16.16bit." in name]
    assert chosen.keys() == NAMES and len(beside) == 4
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: lint(name, texts[name]), [*chosen.values(), *beside]))
    name = chosen["expert_combine"]
    taken = texts[name].replace(f'"{PREAMBLE}"\n', f'"{PREAMBLE}"\nstruct Limits {{}};\n')
    with pytest.raises(LintError, match="redefinition of 'Limits'"):  # a name of MLX's
        lint(name, taken)


def lint(name: str, text: str) -> None:
    instance = re.search(r"\[\[kernel]] decltype\((.*)\) ", text)
    assert instance is not None
    lint_library(name, text, [instance[1]], folders=[HEADERS])


# ------------------------------------------------------------------------------- the command line
@pytest.fixture
def bin_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of programs before all others; texts are FEW."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(metal_texts, "texts", lambda: FEW)
    yield folder


def xcrun(folder: Path, case: str) -> None:
    """A compiler: `case` says what it refuses; it must find the files and MLX's headers."""
    program = folder / "xcrun"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in\n{case}\nesac\n'
        f'while [ "$1" != -c ]; do shift; done\ntest -e "$2" && test -f "include/{PREAMBLE}"\n'
    )
    program.chmod(0o755)


def run(out: Path, *options: str) -> Result:
    return CliRunner().invoke(metal_texts.main, [str(out), *options])


REFUSES_B = (
    '*metal3.2*" b.metal "*) echo "b:3:1: note: x" >&2; echo "b:7:2: error: no" >&2; exit 1;;'
)
KNOWS_NO_4 = "*metal4.0*) echo \"error: invalid value 'metal4.0' in '-std=metal4.0'\" >&2; exit 1;;"


def test_without_xcode_texts_headers_and_commands_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metal_texts, "texts", lambda: FEW)
    monkeypatch.setenv("PATH", "")
    out = tmp_path / "out"
    result = run(out)
    assert result.exit_code == 0
    assert (
        result.output
        == f"2 texts in {out}\nnot compiled: on a Mac, `sh {out}/compile.sh` does it\n"
    )
    assert {file.name for file in out.iterdir()} == {"a.metal", "b.metal", "compile.sh", "include"}
    assert (out / "a.metal").read_text() == FEW["a"]
    assert (out / "include" / PREAMBLE).read_text() == (HEADERS / PREAMBLE).read_text()
    lines = (out / "compile.sh").read_text().splitlines()
    assert lines[:2] == [
        'cd "$(dirname "$0")"',
        "xcrun -sdk macosx metal -std=metal3.1 -mmacosx-version-min=14.0 -fno-fast-math -I include"
        " -c a.metal -o /dev/null || failed=1",
    ]
    assert [line.split()[4:6] for line in lines[1:4]] == [
        ["-std=metal3.1", "-mmacosx-version-min=14.0"],
        ["-std=metal3.2", "-mmacosx-version-min=15.0"],
        ["-std=metal4.0", "-mmacosx-version-min=26.0"],
    ]
    assert len(lines) == 2 + 2 * len(STANDARDS) and lines[-1] == "exit ${failed:-0}"


def test_without_xcode_a_run_that_must_compile_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    result = run(tmp_path / "out", "--compile")
    assert result.exit_code == 1
    assert result.output == "Error: --compile needs xcrun, of Xcode, which is not on PATH\n"


def test_with_xcode_all_are_compiled(bin_: Path, tmp_path: Path) -> None:
    xcrun(bin_, "")
    result = run(tmp_path / "out", "--compile")
    assert result.exit_code == 0
    last = result.output.splitlines()[-1]
    assert last == "6 compilations, for metal3.1, metal3.2, metal4.0: no error"
    few = run(tmp_path / "few", "--standard", "metal3.1")
    assert few.exit_code == 0 and "2 compilations, for metal3.1: no error" in few.output
    xcrun(bin_, REFUSES_B)
    assert run(tmp_path / "none", "--no-compile").exit_code == 0


def test_a_text_that_the_compiler_refuses_is_one_line(bin_: Path, tmp_path: Path) -> None:
    xcrun(bin_, REFUSES_B)
    result = run(tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.splitlines()[1:] == [
        "b.metal, metal3.2: b:7:2: error: no",
        "Error: 1 of 6 compilations failed",
    ]
    script = ["/bin/sh", str(tmp_path / "out" / "compile.sh")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "b:7:2: error: no"


def test_a_standard_that_the_compiler_does_not_know_is_one_line_and_a_failure(
    bin_: Path, tmp_path: Path
) -> None:
    xcrun(bin_, f"{REFUSES_B}\n{KNOWS_NO_4}")
    result = run(tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.splitlines()[1:] == [
        "b.metal, metal3.2: b:7:2: error: no",
        "metal4.0: the compiler takes no file at all: "
        "error: invalid value 'metal4.0' in '-std=metal4.0'",
        "Error: 3 of 6 compilations failed",
    ]


def test_a_folder_that_holds_files_is_left_as_it_is(bin_: Path, tmp_path: Path) -> None:
    xcrun(bin_, "")
    stale = tmp_path / "stale.metal"
    stale.write_text("// of another version\n")
    result = run(tmp_path)
    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path} must be new or empty but holds files\n"
    assert {file.name for file in tmp_path.iterdir()} == {"bin", "stale.metal"}


def test_without_mlxs_headers_the_missing_one_is_named(
    bin_: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metal_texts, "HEADERS", tmp_path)
    result = run(tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {PREAMBLE} must be in {tmp_path}")
