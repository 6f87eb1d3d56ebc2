"""Compiled libraries are kept between runs, in a folder of the user's own."""

import os
import sys
from pathlib import Path

import pytest
from metal_emulator import compiler


def build(folder: Path) -> None:
    (folder / "library").write_text("built")


def never(folder: Path) -> None:
    raise AssertionError("built twice")


def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.CACHE, str(tmp_path / "deep" / "cache"))
    first = compiler.cached(build, "text")
    assert first.read_text() == "built" and tmp_path in first.parents
    assert compiler.cached(never, "text") == first
    assert compiler.cached(build, "another text") != first


def test_libraries_in_a_folder_of_another_user_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compiler.CACHE, str(tmp_path))
    compiler.cached(build, "text")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(PermissionError, match="belongs to someone else"):
        compiler.cached(never, "text")


@pytest.mark.skipif(sys.platform == "darwin", reason="caches are in ~/Library there")
def test_the_default_is_the_users_folder_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiler.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compiler.cache_folder() == Path("/somewhere/metal_emulator")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert compiler.cache_folder() == Path("/home/someone/.cache/metal_emulator")
