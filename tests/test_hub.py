"""Models by name, from a local stand-in that speaks the hub's protocol."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_kimi.units import human_size
from tests.checkpoints import TINY, write_checkpoint
from tests.hub import NAME, Hub, serving
from tests.processes import run
from tests.tokenizer_files import trained_tokens, write_tiktoken


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    # 32 MB: the library writes down, and so can resume from, every 10 MB.
    config = TINY | {"vocab_size": len(trained_tokens()) + 256, "intermediate_size": 40000}
    repository = write_tiktoken(write_checkpoint(tmp_path / "repository", config))
    for unwanted in ("pytorch_model.bin", "modeling_kimi.py", "README.md", "model.gguf"):
        (repository / unwanted).write_bytes(b"not needed")
    with serving(repository) as hub:
        yield hub


def generate(served: Hub, home: Path, name: str = NAME) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, whose hub is the stand-in and whose cache is `home`."""
    options = ("--max-tokens", "3", "x", "-m", name)
    return run("generate", *options, env=served.environment(home))


@pytest.mark.slow
def test_a_name_is_downloaded_once_and_only_what_is_needed(served: Hub, tmp_path: Path) -> None:
    first = generate(served, tmp_path / "home")
    assert first.returncode == 0, first.stderr
    assert set(served.asked) == {"config.json", "model.safetensors", "tiktoken.model"}
    before = len(served.asked)
    second = generate(served, tmp_path / "home")
    assert second.stdout == first.stdout and len(served.asked) == before


# What is not needed to know that a model does not load: small files and headers take 20 kB here.
FEW = 200_000  # bytes, of 32 MB


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--kernels"]], ids=str)
def test_info_asks_for_no_weights(served: Hub, tmp_path: Path, option: list[str]) -> None:
    done = run("info", "-m", NAME, *option, env=served.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert served.bytes < FEW and "model.safetensors" not in served.asked
    here = run("info", "-m", served.folder, *option)
    facts, same = (
        [line for line in text.splitlines() if not line.startswith("here ")]
        for text in (done.stdout, here.stdout)
    )
    assert facts == same and facts


# In a process that takes the CPU for a GPU with kernels, and tries none of them.
TUNE = """
import sys
from mlx_kimi.cli import tune
from mlx_kimi.cli.main import cli
from mlx_kimi.errors import KimiError
def found(folder, config, dtype, *rest, **options):
    raise KimiError(f"{len(config.layers)} layers in {dtype}")
tune.backend, tune.tune = lambda: "Metal", found
cli(["tune", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_tune_asks_for_no_weights(served: Hub, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TUNE, "-m", NAME],
        env=served.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    layers = json.loads((served.folder / "config.json").read_text())["num_hidden_layers"]
    assert done.stderr.splitlines()[-1] == f"Error: {layers} layers in mlx.core.float32"
    assert served.bytes < FEW and "model.safetensors" not in served.asked


# In a process whose machine, or whose disk, is said to be that small.
SMALL = """
import shutil, sys
from types import SimpleNamespace
from mlx_kimi.cli.main import cli
from mlx_kimi.loading.memory import Machine
if sys.argv[1] == "memory":
    Machine.here = staticmethod(lambda: Machine(10**6, 10**9, "this machine has free"))
if sys.argv[1] == "disk":
    shutil.disk_usage = lambda path: SimpleNamespace(free=10**6)
cli(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "command", "said"),
    [
        ("memory", "generate x", "to work, but this machine has free 1.00 MB of 1.00 GB"),
        ("budget", "generate x --memory-budget 1MB", "a memory budget of 1.00 MB is too small"),
        ("disk", "generate x", "of weights to download, 1.00 MB free on that disk"),
        ("tokenizer", "generate x", "tiktoken.model is missing"),
        ("config", "generate x", "has shape"),
        ("config", "convert OUT", "has shape"),
        ("quantized", "convert OUT", "is quantized already"),
        ("text", "convert OUT --report --report-text TEXT", "must have at least 2 tokens"),
    ],
)
def test_what_cannot_load_is_refused_before_its_weights_are_downloaded(
    served: Hub, tmp_path: Path, fault: str, command: str, said: str
) -> None:
    config = json.loads((served.folder / "config.json").read_text())
    if fault == "tokenizer":
        (served.folder / "tiktoken.model").unlink()
    elif fault == "config":
        config["hidden_size"] *= 2
    elif fault == "quantized":
        config["quantization"] = {"bits": 4, "group_size": 64}
    (served.folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "text").touch()
    places = {"OUT": str(tmp_path / "out"), "TEXT": str(tmp_path / "text")}
    done = subprocess.run(
        [sys.executable, "-c", SMALL, fault]
        + [*(places.get(word, word) for word in command.split()), "-m", NAME],
        env=served.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert served.bytes < FEW and "model.safetensors" not in served.asked


@pytest.mark.slow
def test_the_size_is_said_before_the_download(served: Hub, tmp_path: Path) -> None:
    done = generate(served, tmp_path / "home")
    size = served.folder.joinpath("model.safetensors").stat().st_size
    assert f"{NAME}: {human_size(size)} of weights to download, " in done.stderr
    assert served.bytes < size + FEW, "nothing comes twice"
    again = generate(served, tmp_path / "home")
    assert "to download" not in again.stderr


@pytest.mark.slow
def test_a_download_shows_its_progress_on_stderr(served: Hub, tmp_path: Path) -> None:
    done = generate(served, tmp_path / "home")
    assert "100%" in done.stderr and "100%" not in done.stdout


@pytest.mark.slow
def test_a_download_that_breaks_off_goes_on_where_it_stopped(served: Hub, tmp_path: Path) -> None:
    served.break_after = 25_000_000
    done = generate(served, tmp_path / "home")
    if done.returncode:  # the library may leave the second attempt to the user
        assert done.stderr.rstrip().splitlines()[-1].startswith("Error: someone/tiny-kimi: ")
        done = generate(served, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert served.resumed == ["model.safetensors"]


@pytest.mark.slow
def test_a_name_that_the_hub_does_not_know_is_one_line(served: Hub, tmp_path: Path) -> None:
    done = generate(served, tmp_path / "home", "someone/else")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: someone/else: ") and done.stderr.count("\n") == 1
