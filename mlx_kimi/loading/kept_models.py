"""The models on this machine: whole ones in the hub's cache, and those that `convert` made."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.durable import write_bytes_durably
from mlx_kimi.errors import KimiError
from mlx_kimi.user_cache import cache_folder
from mlx_kimi.user_files import read_json_if_there

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo


@dataclass(frozen=True)
class KeptModel(ABC):
    """One model.

    Attributes:
        name: as `-m` takes it.
        folder: of its config.json.
        size: bytes on the disk.
        changed: seconds since the epoch.
        weights: how they are stored, in words.
        problem: why it does not load, in words; empty: its files are all there.
    """

    name: str
    folder: Path
    size: int
    changed: float
    weights: str
    problem: str

    @abstractmethod
    def remove(self) -> list[Path]:
        """Delete it.

        Returns:
            What is left in its folder, since it is not what was downloaded or made.

        Raises:
            OSError: something cannot be deleted.
        """


@dataclass(frozen=True)
class HubModel(KeptModel):
    """What the hub's cache has of a repository, in all its revisions."""

    revisions: tuple[str, ...]

    def remove(self) -> list[Path]:
        from huggingface_hub import scan_cache_dir

        scan_cache_dir().delete_revisions(*self.revisions).execute()
        return []


@dataclass(frozen=True)
class ConvertedModel(KeptModel):
    """A folder that `convert` made here."""

    record: Path
    files: dict[str, list[int]]  # by name: size and mtime_ns when it was made

    def remove(self) -> list[Path]:
        for name, made in self.files.items():
            file = self.folder / name
            with suppress(FileNotFoundError):
                if _identity(file) == made:
                    file.unlink()
        left = sorted(self.folder.iterdir())
        if not left:
            self.folder.rmdir()
        self.record.unlink()
        return left


def kept_models() -> list[KeptModel]:
    """All of them, by name. A folder that is gone, or no model any more, is not among them."""
    return sorted([*_converted(), *_of_the_hub()], key=lambda model: model.name)


def kept_model(name: str) -> KeptModel:
    """The one that is called so.

    Raises:
        KimiError: there is none.
    """
    names = (name, os.path.abspath(name))
    found = next((model for model in kept_models() if model.name in names), None)
    if found is None:
        raise KimiError(
            f"{name}: must be a model that was downloaded or a folder that `convert` made here, as "
            "`mlx_kimi list` names them"
        )
    return found


def remember_converted(folder: Path) -> None:
    """Record that `convert` made this folder and all files in it.

    Raises:
        OSError: the record cannot be written.
    """
    folder = folder.absolute()
    files = {file.name: _identity(file) for file in folder.iterdir()}
    path = _record_of(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"folder": str(folder), "files": files}
    write_bytes_durably(path, json.dumps(record).encode("utf-8", "surrogateescape"))


def _records() -> Path:
    return cache_folder() / "converted"


def _record_of(folder: Path) -> Path:
    return _records() / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.json"


def _identity(file: Path) -> list[int]:
    """Size and mtime_ns of an ordinary file; of anything else, what none has."""
    about = file.lstat()
    return [about.st_size, about.st_mtime_ns] if stat.S_ISREG(about.st_mode) else [-1, -1]


def _converted() -> Iterator[ConvertedModel]:
    for record in sorted(_records().glob("*.json")):
        try:
            known = read_json_if_there(record)
            folder, files = Path(known["folder"]), dict(known["files"])
            config = ModelConfig.read(folder)
        except (KimiError, KeyError, TypeError, ValueError):
            continue  # no record of ours, or the model is gone
        present = [file for file in map(folder.joinpath, files) if file.is_file()]
        yield ConvertedModel(
            str(folder),
            folder,
            sum(file.stat().st_size for file in present),
            max(file.stat().st_mtime for file in present),
            weights_in_words(config),
            _problem(folder),
            record,
            files,
        )


def _of_the_hub() -> Iterator[HubModel]:
    from huggingface_hub import scan_cache_dir  # here: it takes a third of a second
    from huggingface_hub.errors import CacheNotFound

    with suppress(CacheNotFound):
        for repository in scan_cache_dir().repos:
            if repository.repo_type == "model" and (model := _hub_model(repository)):
                yield model


def _hub_model(repository: CachedRepoInfo) -> HubModel | None:
    """None: it is no model of this kind."""
    latest = max(repository.revisions, key=lambda each: each.last_modified, default=None)
    if latest is None:
        return None
    try:
        config = ModelConfig.read(latest.snapshot_path)
    except KimiError:
        return None
    return HubModel(
        repository.repo_id,
        latest.snapshot_path,
        repository.size_on_disk,
        repository.last_modified,
        weights_in_words(config),
        _problem(latest.snapshot_path),
        tuple(each.commit_hash for each in repository.revisions),
    )


def _problem(folder: Path) -> str:
    try:
        Checkpoint(folder)
    except KimiError as error:
        return str(error)
    return ""


def weights_in_words(config: ModelConfig) -> str:
    """How the weights of a model are stored."""
    q = config.quantization
    return f"{q.bits} bits, groups of {q.group_size}, {q.mode}" if q else "not quantized"
