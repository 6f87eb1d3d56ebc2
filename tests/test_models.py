"""Models on this machine: pulled from a stand-in of the hub, converted, listed and removed."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import TINY, write_checkpoint
from tests.hub import NAME, Hub, serving
from tests.processes import run
from tests.terminal import Terminal
from tests.tokenizer_files import trained_tokens, write_tiktoken

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    config = TINY | {"vocab_size": len(trained_tokens()) + 256}
    with serving(write_tiktoken(write_checkpoint(tmp_path / "repository", config))) as server:
        yield server


class Machine:
    """A user's, whose home is a folder."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.environment = hub.environment(home) | {"MLX_KIMI_CACHE": str(home / "cache")}

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run(*arguments, env=self.environment)

    def listed(self) -> dict[str, dict[str, object]]:
        models = json.loads(self.run("list", "--json").stdout)
        return {model["name"]: model for model in models}


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    return Machine(hub, tmp_path / "home")


def test_a_model_is_pulled_once_listed_and_removed(hub: Hub, machine: Machine) -> None:
    assert machine.listed() == {}
    pulled = machine.run("pull", NAME)
    assert pulled.returncode == 0, pulled.stderr
    folder = Path(pulled.stdout.strip())
    assert {"config.json", "model.safetensors", "tiktoken.model"} <= set(os.listdir(folder))
    asked = len(hub.asked)
    assert machine.run("pull", NAME).stdout == pulled.stdout
    assert len(hub.asked) == asked

    model = machine.listed()[NAME]
    assert (model["folder"], model["weights"]) == (str(folder), "not quantized")
    assert model["size"] == sum(file.stat().st_size for file in folder.iterdir())
    assert model["problem"] is None
    line, total = machine.run("list").stdout.splitlines(), machine.run("list").stderr
    assert len(line) == 1 and line[0].startswith(NAME) and total.startswith("1 model, ")

    removed = machine.run("rm", NAME, "--yes")
    assert (removed.returncode, removed.stderr[:8]) == (0, "removed ")
    assert machine.listed() == {} and not folder.exists()


def test_a_download_that_stopped_is_not_whole(hub: Hub, machine: Machine) -> None:
    hub.failing = {"model.safetensors"}
    assert machine.run("pull", NAME).returncode == 1
    assert "model.safetensors" in str(machine.listed()[NAME]["problem"])
    assert "does not load" in machine.run("list").stdout
    hub.failing = set()
    assert machine.run("pull", NAME).returncode == 0
    assert machine.listed()[NAME]["problem"] is None


def test_of_a_converted_folder_what_convert_made_is_removed(
    hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    done = machine.run("convert", "-m", hub.folder, out, "--group-size", "32")
    assert done.returncode == 0, done.stderr
    model = machine.listed()[str(out)]
    assert model["weights"] == "4 bits, groups of 32, affine"
    assert model["size"] == sum(file.stat().st_size for file in out.iterdir())
    (out / "notes.txt").write_text("mine")
    with open(out / "config.json", "a", encoding="utf-8") as changed:
        changed.write("\n")
    removed = machine.run("rm", out, "--yes")
    assert removed.returncode == 0
    assert removed.stderr.splitlines()[1].endswith(": config.json, notes.txt")
    assert sorted(os.listdir(out)) == ["config.json", "notes.txt"]
    assert machine.listed() == {}


def test_nothing_else_can_be_removed(hub: Hub, machine: Machine, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert machine.run("convert", "-m", hub.folder, out, "--group-size", "32").returncode == 0
    before = sorted(os.listdir(out))
    for name in (hub.folder, "someone/other", tmp_path / "none"):
        refused = machine.run("rm", out, name, "--yes")
        assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
        assert refused.stderr.startswith(f"Error: {name}: must be a model that ")
    assert machine.run("rm", out).returncode == 2  # nobody can be asked
    assert sorted(os.listdir(out)) == before
    terminal = Terminal("rm", out, columns=200, **machine.environment)
    terminal.wait_for("[y/N]")
    terminal.type("n\r")
    assert terminal.wait_for_end() == 0
    assert sorted(os.listdir(out)) == before


def test_what_is_no_such_model_is_not_listed(machine: Machine, tmp_path: Path) -> None:
    """The hub's cache is shared by all programs."""
    other = tmp_path / "home" / "hub" / "models--someone--bert"
    snapshot = other / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "bert"}')
    (other / "refs").mkdir()
    (other / "refs" / "main").write_text("0123")
    assert machine.listed() == {}
    assert machine.run("rm", "someone/bert", "--yes").returncode == 1
    assert snapshot.exists()
    (tmp_path / "home" / "cache" / "converted").mkdir(parents=True)
    (tmp_path / "home" / "cache" / "converted" / "0.json").write_text('{"folder": 3}')
    assert machine.listed() == {}
    assert machine.run("pull", tmp_path).stderr.startswith(f"Error: {tmp_path}: is a folder here")
