"""Weights are known by every byte, and read for that once."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_kimi.chat.fingerprint import differences, fingerprint
from mlx_kimi.checkpoint import digests as module
from mlx_kimi.checkpoint.digests import digests
from mlx_kimi.errors import KimiError
from tests.checkpoints import TINY, write_checkpoint

OLD = time.time() - 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_KIMI_CACHE", str(tmp_path / "cache"))
    # A file's inode changes now, whatever its content's time is: it counts as settled at once.
    monkeypatch.setattr(module, "SETTLED", -(10**18))
    return tmp_path / "cache"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []
    digest = module._digest

    def noted(path: Path) -> Any:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(module, "_digest", noted)
    return names


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_each_file_is_read_once(tmp_path: Path, read: list[str]) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(os.urandom(100_000))
    told: list[tuple[int, int]] = []
    for _ in range(3):
        found = digests(tmp_path, ["a", "b"], lambda *x: told.append(x))
        assert found == [sha(tmp_path / "a"), sha(tmp_path / "b")]
    assert read == ["a", "b"]
    assert told == [(100_000, 200_000), (200_000, 200_000)]


@pytest.mark.parametrize("how", ["one byte", "replaced", "same time", "longer", "another file"])
def test_a_file_that_is_not_the_same_is_read_again(
    tmp_path: Path, read: list[str], how: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\0" * 100_000)
    os.utime(path, (OLD, OLD))
    digests(tmp_path, ["a"])
    time.sleep(0.02)
    match how:
        case "one byte" | "same time":
            with path.open("r+b") as file:
                file.seek(7)
                file.write(b"\1")
        case "longer":
            path.write_bytes(b"\0" * 100_001)
        case "replaced" | "another file":
            other = tmp_path / "other"
            other.write_bytes(b"\2" * 100_000)
            os.replace(other, path)
    if how != "one byte":
        os.utime(path, (OLD, OLD))
    assert digests(tmp_path, ["a"]) == [sha(path)]
    assert read == ["a", "a"]


def test_a_file_of_just_now_is_not_taken_for_settled(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED", 2 * 10**9)
    (tmp_path / "a").write_bytes(b"a")
    digests(tmp_path, ["a"])
    digests(tmp_path, ["a"])
    assert read == ["a", "a"]


def test_the_hub_s_cache_is_not_read(tmp_path: Path, read: list[str]) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    name = "0123456789abcdef" * 4
    (blobs / name).write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(blobs / name)
    assert digests(snapshot, ["model.safetensors"]) == [name] and not read
    (blobs / "a git hash").write_bytes(b"weights")
    (snapshot / "other").symlink_to(blobs / "a git hash")
    assert digests(snapshot, ["other"]) == [hashlib.sha256(b"weights").hexdigest()]
    assert read == ["a git hash"]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"a": [1, 2]}', "{" * 100_000, "\0"])
def test_a_damaged_memory_is_no_memory(tmp_path: Path, cache: Path, text: str) -> None:
    (tmp_path / "a").write_bytes(b"a")
    cache.mkdir()
    (cache / "digests.json").write_text(text)
    assert digests(tmp_path, ["a"]) == [sha(tmp_path / "a")]
    assert list(json.loads((cache / "digests.json").read_text())) == [str(tmp_path / "a")]


def test_a_folder_that_cannot_be_written_costs_a_reading(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file in its place")
    (tmp_path / "a").write_bytes(b"a")
    assert digests(tmp_path, ["a"]) == [sha(tmp_path / "a")]


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\0" * 1000)
    end = threading.Event()

    def write() -> None:
        while not end.is_set():
            os.utime(path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(KimiError, match="a: was written to while it was read"):
            for _ in range(1000):
                digests(tmp_path, ["a"])
    finally:
        end.set()
        writer.join()


def test_a_model_that_differs_in_any_byte_is_another(
    tmp_path: Path, folder: Callable[..., Path]
) -> None:
    """Where the middle of its file, which alone was looked at before, is the same."""
    weights = write_checkpoint(tmp_path / "a", TINY, 1) / "model.safetensors"
    before, size = fingerprint(tmp_path / "a", None), weights.stat().st_size
    for place in (-1, size // 3):
        with weights.open("r+b") as file:
            file.seek(place % size)
            byte = file.read(1)[0]
            file.seek(place % size)
            file.write(bytes([byte ^ 1]))
        now = fingerprint(tmp_path / "a", None)
        assert differences(before, now) == "the model, its quantization or its tokenizer"
        before = now


def test_a_session_of_before_digests_is_still_known(folder: Callable[..., Path]) -> None:
    present = fingerprint(folder("tiny"), None)
    older = {key: value for key, value in present.items() if key not in ("weights", "states")}
    assert not differences(older | {"runtime": "0.1.0"}, present)
    assert differences(older | {"model": "other"}, present)
