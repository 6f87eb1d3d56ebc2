"""A model on the hub whose weights come file by file, each deleted when it is no longer needed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mlx_kimi.checkpoint.files import Checkpoint, Stored, read_header
from mlx_kimi.checkpoint.hub import ALL_BUT_WEIGHTS, downloaded, in_one_line
from mlx_kimi.errors import KimiError


class HubWeights:
    """One revision of a model. Only files that were downloaded here are ever deleted."""

    deletes = True

    def __init__(
        self,
        name: str,
        downloads: Path,
        revision: str | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Ask what there is: sizes and headers of the weights. All else is downloaded.

        Args:
            name: on the hub.
            downloads: where files of weights are while they are needed; of this model alone.
            revision: a commit; None is the newest.
            around: entered for each download, which shows its progress on stderr.

        Raises:
            KimiError: there is no such model, the hub cannot be reached or says nonsense.
        """
        self.name, self.downloads, self._around = name, downloads, around
        with in_one_line(f"{name}: no such folder, and "):
            from huggingface_hub import model_info

            info = model_info(name, revision=revision, files_metadata=True)
            siblings = info.siblings or []
            self.revision = str(info.sha)
            self.files = {
                file.rfilename: file.size or 0
                for file in siblings
                if file.rfilename.endswith(".safetensors") and "/" not in file.rfilename
            }
        with around():
            self.folder = downloaded(name, ALL_BUT_WEIGHTS, self.revision)
        self._headers: dict[str, dict[str, Stored]] = {}
        self.checkpoint = Checkpoint(self.folder, self)

    def tensors(self, file: str) -> dict[str, Stored]:
        """What a file holds, asked for without the rest of it.

        Raises:
            KimiError: the hub cannot be reached, or it is no safetensors file.
        """
        if file not in self._headers:
            with in_one_line(f"{self.name}: {file}: "):
                from huggingface_hub import parse_safetensors_file_metadata

                found = parse_safetensors_file_metadata(self.name, file, revision=self.revision)
                self._headers[file] = {
                    name: Stored(file, str(each.dtype), tuple(each.shape), each.data_offsets[0])
                    for name, each in found.tensors.items()
                }
        return self._headers[file]

    def fetch(self, file: str) -> None:
        """Have a file in `downloads`, whole. One that is there already is not downloaded again.

        Raises:
            KimiError: the download failed, or the file is not what its header on the hub says.
        """
        with self._around(), in_one_line(f"{self.name}: {file}: "):
            from huggingface_hub import hf_hub_download

            hf_hub_download(self.name, file, revision=self.revision, local_dir=self.downloads)
        try:
            found = read_header(self.downloads / file)
        except KimiError:
            found = None
        if found and found.tensors == self.tensors(file):
            self.checkpoint.headers[file] = found
        else:
            self.delete(file)
            raise KimiError(
                f"{self.name}: {file}: what was downloaded is not the file that the hub describes, "
                "and is deleted; the same command downloads it anew"
            )

    def release(self, file: str, record: Callable[[], None]) -> None:
        """Record what was made of a file, and only then delete it."""
        record()
        self.delete(file)

    def delete(self, file: str) -> None:
        """Delete what was downloaded of a file."""
        (self.downloads / file).unlink(missing_ok=True)

    def fingerprint(self) -> list[Any]:
        """The commit, and the sizes of its files."""
        return [self.revision, self.files]

    def size(self, file: str) -> int:
        return self.files[file]

    def disk_at_once(self, files: Collection[str]) -> int:
        return max(map(self.size, files), default=0)
