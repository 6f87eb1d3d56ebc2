"""Conversions that delete the source shard by shard: the same bytes, in less room than for both."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.hub_weights import HubWeights
from mlx_kimi.checkpoint.weight_source import FolderWeights
from mlx_kimi.cli.main import cli
from mlx_kimi.convert import output
from mlx_kimi.convert.blocks import TensorReader
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.partial import open_partial
from mlx_kimi.convert.plan import plan_conversion
from mlx_kimi.convert.quantize import scheme
from mlx_kimi.convert.request import request
from mlx_kimi.convert.write import write_weights
from mlx_kimi.durable import sync
from tests.checkpoints import TINY, WIDE, write_checkpoint
from tests.hub import NAME, Hub, serving
from tests.terminal import Terminal

SHARDS = 4  # experts of one layer are spread over two of them
KILLS = 5


def shard(number: int) -> str:
    return f"model-{number:05}-of-{SHARDS:05}.safetensors"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WIDE in bfloat16. Not to be changed."""
    folder = tmp_path_factory.mktemp("repository")
    write_checkpoint(folder, WIDE, dtype="bfloat16", shards=SHARDS)
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def whole(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the ordinary conversion of the same folder writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(repository, out, scheme())
    return contents(out)


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with serving(repository) as server:
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def started(hub: Hub, out: Path, *options: str) -> subprocess.Popen[str]:
    """The command; the hub's cache lies beside `out`."""
    command = [sys.executable, "-m", "mlx_kimi", "convert", "-m", NAME, str(out), *options]
    environment = hub.environment(out.with_name("home"))
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def deleting(hub: Hub, out: Path) -> tuple[int, str]:
    """The exit code and the last line of the whole command."""
    process = started(hub, out, "--delete-source-shards")
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said
    return process.returncode, said.rstrip().splitlines()[-1]


def disk_use(folder: Path) -> int:
    """Bytes that the files in `folder` take, some of which may vanish meanwhile."""
    used = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                used += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return used


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The most that `folder` took so far, in a list of one."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], disk_use(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_the_bytes_are_those_of_the_ordinary_conversion(
    hub: Hub, whole: dict[str, bytes], tmp_path: Path
) -> None:
    with watched(tmp_path) as peak:
        code, said = deleting(hub, tmp_path / "out")
    assert code == 0, said
    assert contents(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]
    sizes = {path.name: path.stat().st_size for path in hub.folder.glob("*.safetensors")}
    assert {file: hub.sent[file] for file in sizes} == sizes  # each of them once
    result = sum(map(len, whole.values()))
    print(f"{peak[0] / 1e6:.0f} MB of {(sum(sizes.values()) + result) / 1e6:.0f} MB")
    assert result < peak[0] < result + max(sizes.values()) + 1e6


@pytest.mark.slow
def test_kill_9_at_random_moments(hub: Hub, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The bytes stay the same, the disk use bounded, and no converted shard is sent again."""
    moments, out, kills, resumed = random.Random(7), tmp_path / "out", 0, 0
    hub.delay = 0.02  # so that many moments are in a download
    largest = max(path.stat().st_size for path in hub.folder.glob("*.safetensors"))
    with watched(tmp_path) as peak:
        while not out.exists() or kills < KILLS:
            if out.exists():
                shutil.rmtree(out)
                hub.asked.clear()
            process = started(hub, out, "--delete-source-shards")
            if kills < KILLS:
                wait_for_shards(hub, moments.choice([1, 2]), process)
                time.sleep(moments.uniform(0, 0.7))  # in its download, conversion or deletion
                kills += process.poll() is None
                process.kill()
            _, said = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), said
            resumed += "going on" in said
            shards = [name for name in hub.asked if name.startswith("model-")]
            assert shards == sorted(shards)  # the next is asked for when one is converted
            assert not out.exists() or contents(out) == whole
    print(f"{kills} kills, {resumed} runs resumed; at most {peak[0] / 1e6:.0f} MB of disk")
    assert resumed
    assert peak[0] < sum(map(len, whole.values())) + largest + 1e6


def wait_for_shards(hub: Hub, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many more shards were asked for, or the process has ended."""
    before = len(hub.asked)
    while process.poll() is None:
        if sum(name.startswith("model-") for name in hub.asked[before:]) >= count:
            return
        time.sleep(0.002)


@pytest.mark.slow
def test_a_file_is_deleted_only_when_all_that_was_made_of_it_is_recorded(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens in which order, with the folder for a hub that downloads nothing."""
    source = FolderWeights(repository)
    reader = TensorReader(source.checkpoint, ModelConfig.read(repository))
    plan = plan_conversion(reader, scheme(), None, 10**9)
    ends = {file: numbers.stop for file, numbers in plan.by_file()}
    synced: set[str] = set()
    deleted: list[str] = []

    class Watching(HubWeights):
        def __init__(self) -> None:
            pass

        def fetch(self, file: str) -> None:
            assert len(deleted) == list(ends).index(file)

        def delete(self, file: str) -> None:
            deleted.append(file)
            last = json.loads((tmp_path / "out.partial/journal").read_bytes().splitlines()[-1][9:])
            assert (last["step"], last["rows"]) == (ends[file], 0)
            assert synced >= {path.name for path in (tmp_path / "out.partial/model").iterdir()}

    def synced_now(path: Path) -> None:
        sync(path)
        synced.add(path.name)

    monkeypatch.setattr(output, "sync", synced_now)
    asked = request(source, {}, scheme(), None, 10**9)
    files = [shard.file for shard in plan.shards]
    with open_partial(tmp_path / "out", asked, files) as partial:
        write_weights(partial, plan, Watching(), reader, [], lambda done, total: None)
    assert deleted == list(ends)


@pytest.mark.slow
def test_what_the_hubs_cache_has_is_copied_and_stays_there(tmp_path: Path) -> None:
    """A model in one file, which was downloaded in the ordinary way before."""
    repository = write_checkpoint(tmp_path / "repository", TINY)
    with serving(repository) as hub:
        for out, options in (("plain", []), ("out", ["--delete-source-shards"])):
            process = started(hub, tmp_path / out, "--no-quantize", *options)
            _, said = process.communicate()
            assert process.returncode == 0, said
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert hub.asked.count("model.safetensors") == 1
    cached = list((tmp_path / "home").rglob("snapshots/*/model.safetensors"))
    assert [path.read_bytes() for path in cached] == [
        hub.folder.joinpath(cached[0].name).read_bytes()
    ]


@pytest.mark.slow
def test_a_terminal_shows_each_download_below_what_is_said(hub: Hub, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    arguments = ["convert", "-m", NAME, out, "--delete-source-shards"]
    terminal = Terminal(*arguments, columns=160, **hub.environment(home))
    assert terminal.wait_for_end() == 0
    lines = terminal.lines
    (said,) = [n for n, line in enumerate(lines) if line.startswith("94.73 MB to write, and at")]
    # (Between them the hub's library may draw its own bars of the small files, late.)
    downloads = [line for line in lines[said + 1 :] if ".safetensors" in line]
    for number, line in enumerate(downloads, 1):
        assert shard(number) in line and "100%" in line
    assert len(downloads) == SHARDS
    assert any(line.startswith(str(out)[:100]) for line in lines[said + 1 + SHARDS :])
    assert not any("converting" in line for line in lines)


def other_flags_are_not_mixed_in(hub: Hub, out: Path) -> None:
    asked = list(hub.asked)
    for options, rule in (
        ([], "--delete-source-shards yes, now no"),
        (["--delete-source-shards", "--bits", "8"], "--bits 4, now 8"),
    ):
        process = started(hub, out, *options)
        _, said = process.communicate()
        last = said.splitlines()[-1]
        assert process.returncode == 1
        assert f"out.partial: a conversion begun with {rule}; repeat it as it was begun" in last
    assert hub.asked == asked


@pytest.mark.slow
def test_each_fault_of_a_shard_is_one_line_and_the_same_command_goes_on(
    hub: Hub, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def fails(rule: str) -> None:
        code, said = deleting(hub, out)
        assert code == 1 and said.startswith(f"Error: {NAME}: {shard(3)}: {rule}")
        assert said.endswith("out.partial keeps what is done")
        assert not list((tmp_path / "out.partial").rglob("*-of-*.safetensors"))

    hub.failing = {shard(3)}
    fails("the hub says: Server error '500")
    other_flags_are_not_mixed_in(hub, out)
    hub.failing.clear()
    hub.short = {shard(3)}
    # As kill -9 leaves it between the record and the deletion.
    shutil.copy(hub.folder / shard(1), tmp_path / "out.partial" / "source")
    fails("the download failed: ")
    hub.short.clear()
    hub.swapped = {shard(3): shard(4)}
    fails(
        "what was downloaded is not the file that the hub describes, and is deleted; the same "
        "command downloads it anew"
    )
    hub.swapped.clear()
    hub.commit = "f" * 40  # someone edits the README meanwhile: the shards stay those of before
    code, said = deleting(hub, out)
    assert code == 0, said
    assert [hub.asked.count(shard(number)) for number in (1, 2, 4)] == [1, 1, 1]
    assert contents(out) == whole


@pytest.mark.alone
def test_ctrl_c_in_a_download_goes_on_at_that_shard(
    hub: Hub, whole: dict[str, bytes], tmp_path: Path
) -> None:
    hub.delay = 0.03
    process = started(hub, tmp_path / "out", "--delete-source-shards")
    while shard(2) not in hub.asked:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, said = process.communicate()
    assert time.monotonic() - began < 2  # seconds
    assert process.returncode == 130 and "Traceback" not in said
    assert "out.partial keeps what is done; the same command goes on from there" in said
    hub.delay = 0
    hub.asked.clear()
    code, said = deleting(hub, tmp_path / "out")
    assert code == 0, said
    assert hub.asked == [shard(number) for number in (2, 3, 4)]
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_folder_is_refused_and_keeps_its_shards(repository: Path, tmp_path: Path) -> None:
    before = contents(repository)
    command = ["convert", "-m", str(repository), str(tmp_path / "out"), "--delete-source-shards"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {repository}: --delete-source-shards is for a name on the hub, whose shards can "
        "be downloaded again; nothing in a folder is ever deleted\n"
    )
    assert contents(repository) == before and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("spare", [10**5, -(10**6)])
def test_the_disk_must_hold_the_result_and_a_shard(
    hub: Hub, tmp_path: Path, whole: dict[str, bytes], spare: int
) -> None:
    """In a process whose disk is said to have so much free: before any weight is downloaded."""
    largest = max(path.stat().st_size for path in hub.folder.glob("*.safetensors"))
    free = sum(map(len, whole.values())) + largest + spare
    hub.failing = {shard(1)}
    code = f"""
import shutil
from types import SimpleNamespace
from mlx_kimi.cli.main import cli
shutil.disk_usage = lambda path: SimpleNamespace(free={free})
cli(["convert", "-m", "{NAME}", "{tmp_path / "out"}", "--delete-source-shards"])
"""
    command = [sys.executable, "-c", code]
    environment = hub.environment(tmp_path / "home")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    if spare > 0:
        assert f"{shard(1)}: the hub says: Server error '500" in said
    else:
        rule = "out: needs 94.73 MB, and 88.53 MB for a shard of the source at a time, but its disk"
        assert rule in said
        assert not any(name.startswith("model-") for name in hub.asked)
    assert not (tmp_path / "out.partial").exists()
