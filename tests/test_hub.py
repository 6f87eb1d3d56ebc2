"""Models by name, from a local stand-in that speaks the hub's protocol."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

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
