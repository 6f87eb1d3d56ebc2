"""Where the files of a checkpoint's weights come from: a folder, or the hub one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mlx_kimi.checkpoint.files import Checkpoint


class WeightSource(Protocol):
    """A checkpoint whose files of weights are there between `fetch` and `release`."""

    @property
    def name(self) -> str:
        """Where it is, for people."""

    @property
    def folder(self) -> Path:
        """The folder with config.json, the index and the tokenizer."""

    @property
    def checkpoint(self) -> Checkpoint:
        """What the files hold, known before any is fetched."""

    @property
    def revision(self) -> str | None:
        """The commit of a model on the hub."""

    @property
    def deletes(self) -> bool:
        """Whether `release` deletes the file."""

    def fingerprint(self) -> list[Any]:
        """What tells the weights from others of the same shapes; it has a stable repr."""

    def size(self, file: str) -> int:
        """Bytes of a file."""

    def disk_at_once(self, files: Collection[str]) -> int:
        """The most bytes that fetching these files, one at a time, adds to the disk."""

    def fetch(self, file: str) -> None:
        """Have a file where `checkpoint` opens it.

        Raises:
            KimiError: it cannot be had.
        """

    def release(self, file: str, record: Callable[[], None]) -> None:
        """Be told that a file is not needed again.

        Args:
            file: that was fetched.
            record: makes durable what was made of the file; called before the file is deleted.
        """


class FolderWeights:
    """Weights in a folder: all are there, and none is ever deleted."""

    revision = None
    deletes = False

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder.resolve())

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    def fingerprint(self) -> list[Any]:
        """Sizes, times and samples."""
        versions = {file: self.checkpoint.headers[file].version for file in self.checkpoint.files}
        return [
            (file, version.size, version.modified, self.checkpoint.sample(file))
            for file, version in versions.items()
        ]

    def size(self, file: str) -> int:
        return self.checkpoint.headers[file].version.size

    def disk_at_once(self, files: Collection[str]) -> int:
        return 0

    def fetch(self, file: str) -> None:
        pass

    def release(self, file: str, record: Callable[[], None]) -> None:
        pass
