"""Conversions that are interrupted: the same bytes in the end, nothing mixed, one at a time."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from mlx_kimi.convert import output, partial
from mlx_kimi.convert.blocks import TensorReader
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.journal import Journal
from mlx_kimi.convert.preview import Preview
from mlx_kimi.convert.quantize import scheme
from mlx_kimi.errors import KimiError
from tests.checkpoints import TINY, WIDE, Config, write_checkpoint
from tests.processes import peak_memory

KILLS = 10


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WIDE in bfloat16, two shards. Not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("wide"), WIDE, dtype="bfloat16", shards=2)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(source, out, scheme())
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def started(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    code = "from mlx_kimi.cli.main import cli; cli()"
    command = [sys.executable, "-c", code, "convert", "-m", str(source), str(out), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for_record(out: Path, process: subprocess.Popen[str]) -> None:
    """Until something of the conversion counts."""
    journal = out.with_name("out.partial") / "journal"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.005)


class Stop(Exception):
    """Ends a conversion as nothing of ours does."""


def interrupted(source: Path, out: Path, share: float = 0.5, group_size: int = 64) -> list[int]:
    """Convert `share` of the source; what had been read then, block by block."""
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done > total * share:
            raise Stop

    with pytest.raises(Stop):
        convert(source, out, scheme(group_size=group_size), progress=stop)
    assert out.with_name("out.partial").is_dir() and not out.exists()
    return seen


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_byte(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    few_experts = WIDE | {"num_experts": 4, "num_experts_per_token": 2}
    source = write_checkpoint(tmp_path_factory.mktemp("few"), few_experts, dtype="bfloat16")
    moments = random.Random(5)
    began = time.monotonic()
    started(source, tmp_path / "whole").communicate()
    duration = time.monotonic() - began  # seconds, most of them before the first block
    whole = contents(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    out, kills, ends, resumed = tmp_path / "out", 0, 0, 0
    while kills < KILLS or not out.exists():
        process = started(source, out)
        try:
            # From before the first block until after the last one.
            limit = moments.uniform(0.4, 1.1) * duration if kills < KILLS else None
            _, said = process.communicate(timeout=limit)
            assert process.returncode == 0, said
            resumed += "going on" in said
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        if out.exists():
            ends += 1
            assert contents(out) == whole
            if kills < KILLS:
                shutil.rmtree(out)
                shutil.rmtree(partial.partial_of(out), ignore_errors=True)
    print(f"{kills} kills, {ends} results, {resumed} of them resumed")
    assert resumed
    assert [path.name for path in tmp_path.iterdir()] in (["out"], ["out", "out.partial"])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["deleted", "cut"])
def test_weights_that_were_lost_meanwhile_are_not_trusted(
    source: Path, tmp_path: Path, loss: str
) -> None:
    out = tmp_path / "out"
    interrupted(source, out)
    (weights, *_) = sorted((tmp_path / "out.partial" / "model").glob("*.safetensors"))
    if loss == "deleted":
        weights.unlink()
    else:
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size // 2)
    with pytest.raises(KimiError, match="does not hold what was written; delete .*out.partial"):
        convert(source, out, scheme())
    assert not out.exists()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(source, out)
    wait_for_record(out, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "out.partial keeps what is done; the same command goes on from there" in said
    assert "Traceback" not in said
    process = started(source, out)
    _, said = process.communicate()
    assert process.returncode == 0 and said.startswith("going on: ")
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_finished_blocks_are_not_read_again(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    before = interrupted(source, tmp_path / "out")[-1]
    seen: list[tuple[int, int]] = []
    previews: list[Preview] = []
    with mock.patch.object(
        TensorReader, "read", autospec=True, side_effect=TensorReader.read
    ) as read:
        convert(
            source,
            tmp_path / "out",
            scheme(),
            progress=lambda done, total: seen.append((done, total)),
            preview=previews.append,
        )
    _, total = seen[-1]
    read_again = sum(call.args[1].nbytes for call in read.call_args_list)
    assert read_again <= total - before + output.SYNC and seen[-1] == (total, total)
    assert 0.3 < previews[0].left_bytes / previews[0].out_bytes < 0.7
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_what_was_not_recorded_is_not_trusted(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A power cut may leave anything beyond the last record, and half a record."""
    interrupted(source, tmp_path / "out")
    folder = tmp_path / "out.partial"
    lines = (folder / "journal").read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    (folder / "journal").write_bytes(b"".join(lines[:2]) + lines[2][:-4])
    journal = Journal(folder / "journal")
    assert len(journal.records) == 2
    journal.close()
    convert(source, tmp_path / "out", scheme())
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"bits": 8}, "--bits 4, now 8"),
        ({"recipe": "router-8bit"}, "--recipe default, now router-8bit"),
        (None, "quantization some, now none"),
    ],
    ids=str,
)
def test_other_options_are_not_mixed_in(
    source: Path, tmp_path: Path, options: dict[str, object] | None, rule: str
) -> None:
    interrupted(source, tmp_path / "out")
    before = contents(tmp_path / "out.partial" / "model")
    chosen = None if options is None else scheme(**options)  # type: ignore[arg-type]
    message = f"out.partial: a conversion begun with {rule}; repeat it as .* or delete"
    with pytest.raises(KimiError, match=message):
        convert(source, tmp_path / "out", chosen)
    assert contents(tmp_path / "out.partial" / "model") == before


@pytest.mark.slow
def test_another_source_or_version_is_not_mixed_in(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, tmp_path / "out")
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    (copy / "model-00002-of-00002.safetensors").touch()
    with pytest.raises(KimiError, match="begun with the source .*, now .*copy; repeat"):
        convert(copy, tmp_path / "out", scheme())
    monkeypatch.setattr("mlx_kimi.convert.request.__version__", "9.9")
    with pytest.raises(KimiError, match=r"begun with mlx_kimi .*, now 9\.9; repeat"):
        convert(source, tmp_path / "out", scheme())


@pytest.mark.slow
def test_two_at_a_time_are_refused(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    first = started(source, tmp_path / "out")
    wait_for_record(tmp_path / "out", first)
    first.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(KimiError, match="out.partial: another conversion is at work in it"):
            convert(source, tmp_path / "out", scheme())
    finally:
        first.send_signal(signal.SIGCONT)
    first.communicate()
    assert first.returncode == 0 and contents(tmp_path / "out") == whole


class Usage(NamedTuple):
    """What shutil.disk_usage says, as far as convert reads it."""

    free: int


@pytest.mark.slow
def test_only_what_is_left_must_fit_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(count))

    interrupted(source, tmp_path / "out")
    free(10**6)
    rule = r"out: needs [\d.]+ MB of [\d.]+ MB but its disk has 1.00 MB free; .*partial keeps"
    with pytest.raises(KimiError, match=rule):
        convert(source, tmp_path / "out", scheme())
    free(70 * 10**6)  # of 87 MB
    convert(source, tmp_path / "out", scheme())


# An embedding of 38 MB and little else. A 4-bit float takes MLX 40 bytes a byte on the CPU.
BROAD = TINY | {"vocab_size": 8192, "hidden_size": 2304, "tie_word_embeddings": True}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize(
    ("config", "options", "most"),
    [
        (WIDE, [], 0.36),
        (WIDE, ["--no-quantize", "--dtype", "float32"], 0.48),
        (BROAD, ["--mode", "nvfp4"], 0.33),
    ],
    ids=["4 bits", "float32", "nvfp4"],
)
def test_memory_stays_under_what_is_stated(
    source: Path, tmp_path: Path, config: Config, options: list[str], most: float
) -> None:
    """Of the whole process, seen from outside."""
    if config is not WIDE:
        source = write_checkpoint(tmp_path / "source", config, dtype="bfloat16")
    process = started(source, tmp_path / "out", *options)
    peak = peak_memory(process)
    _, said = process.communicate()
    assert process.returncode == 0, said
    plan = said.splitlines()[0]
    print(f"{plan}; took {peak / 1e6:.0f} MB")
    stated = float(plan.split(" free on that disk; at most ")[1].split(" GB of memory")[0])
    assert stated <= most and 50e6 < peak < stated * 1e9


@pytest.mark.parametrize("target", ["there", "not there"])
def test_a_link_in_place_of_the_journal_is_not_followed(
    source: Path, tmp_path: Path, target: str
) -> None:
    victim, partial_folder = tmp_path / "victim", tmp_path / "out.partial"
    partial_folder.mkdir()
    (partial_folder / "journal").symlink_to(victim)
    if target == "there":
        victim.write_bytes(b"somebody's\n")
    with pytest.raises(KimiError, match="symbolic link|is no conversion's"):
        convert(source, tmp_path / "out", scheme())
    assert victim.read_bytes() == b"somebody's\n" if target == "there" else not victim.exists()


@pytest.mark.parametrize("target", ["there", "not there"])
def test_a_link_in_place_of_a_shard_is_not_followed(
    source: Path, tmp_path: Path, target: str
) -> None:
    interrupted(source, tmp_path / "out")
    victim = tmp_path / "victim"
    (weights, *_) = sorted((tmp_path / "out.partial" / "model").glob("*.safetensors"))
    if target == "there":
        victim.write_bytes(weights.read_bytes())
    before = weights.read_bytes()
    weights.unlink()
    weights.symlink_to(victim)
    with pytest.raises((KimiError, OSError)):
        convert(source, tmp_path / "out", scheme())
    assert victim.read_bytes() == before if target == "there" else not victim.exists()
