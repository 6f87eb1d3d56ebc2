"""The safetensors files of a folder: what they hold, checked before anything is allocated."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_kimi.checkpoint.fields import read_json
from mlx_kimi.checkpoint.weight_file import FileVersion, OpenFile, name_of
from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.user_files import JSON_BYTES, is_there, only_regular, parsed_json

INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")
DTYPES = {  # as safetensors spells them
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
SAMPLE = 1 << 16  # bytes of a file: other weights of the same shapes differ there


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    file: str
    dtype: str  # as safetensors spells it: F32, BF16, U32…
    shape: tuple[int, ...]
    offset: int  # of its first byte, from where the header ends


@dataclass(frozen=True)
class Header:
    """What a file says that it holds, and which version of the file says so."""

    tensors: dict[str, Stored]
    end: int  # the byte after it, from which the tensors' offsets count
    version: FileVersion
    about: dict[str, str]  # its `__metadata__`


class Listing(Protocol):
    """Files of weights that are not in the folder of their index."""

    @property
    def files(self) -> Collection[str]:
        """Their names."""

    @property
    def downloads(self) -> Path:
        """The folder that each is in while it is read."""

    def tensors(self, file: str) -> dict[str, Stored]:
        """What one of them holds."""


class Checkpoint:
    """The tensors of a folder by name. Opening it reads headers only."""

    def __init__(self, folder: Path, listing: Listing | None = None) -> None:
        """Read the index and every header.

        Args:
            folder: with the index, if there is one, and the files.
            listing: of the files, if they are not in the folder.

        Raises:
            KimiError: there are no weights, a file is missing, damaged or outside the folder, or a
                tensor is in two files or not in the one that the index names.
        """
        self.folder = folder
        self._weights_folder = folder if listing is None else listing.downloads
        there = _files(folder) if listing is None else listing.files
        self.weight_map = _weight_map(folder, there)
        self.files = sorted(set(self.weight_map.values())) or _unindexed(folder, there)
        self.headers: dict[str, Header] = {}  # of the files that were there so far
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            if listing is None:
                self.headers[file] = read_header(folder / file)
                stored_there = self.headers[file].tensors
            else:
                stored_there = listing.tensors(file)
            for name, stored in stored_there.items():
                if name in self.tensors:
                    raise KimiError(f"{name} is in two files: {self.tensors[name].file} and {file}")
                if self.weight_map.get(name, file) != file:
                    raise KimiError(
                        f"{folder / INDEX}: {name} should be in {self.weight_map[name]} "
                        f"but is in {file}"
                    )
                self.tensors[name] = stored

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def expected_file(self, name: str) -> str:
        """The file that a tensor which is not there should have been in."""
        return self.weight_map.get(name) or (self.files[0] if len(self.files) == 1 else "any shard")

    def open(self, file: str, use: str) -> OpenFile:
        """A file to read tensors from, in its own folder or where it was downloaded to.

        Raises:
            KimiError: it is no longer the file whose header was read.
        """
        return OpenFile(self._weights_folder / file, self.headers[file].version, use)

    def place(self, name: str) -> int:
        """The first byte of a tensor in its file."""
        stored = self.tensors[name]
        return self.headers[stored.file].end + stored.offset

    def refuse_changed(self, use: str) -> None:
        """Check that every file is still the one whose header was read; `use` as of `open`.

        Raises:
            KimiError: one is not.
        """
        for file in self.headers:
            self.open(file, use).close()

    def sample(self, file: str) -> bytes:
        """The middle of a file, by which to know it again without reading it.

        Raises:
            KimiError: it cannot be read.
        """
        try:
            with open(self.folder / file, "rb", opener=only_regular) as weights:
                weights.seek(FileVersion.of(weights.fileno()).size // 2)
                return weights.read(SAMPLE)
        except OSError as error:
            raise KimiError(f"{self.folder / file}: cannot be read: {error.strerror}") from None

    def array(self, name: str) -> mx.array:
        """The tensor, read when it is evaluated; zeros where the file is not here."""
        stored = self.tensors[name]
        if stored.file not in self.headers:
            return mx.zeros(stored.shape, DTYPES[stored.dtype])
        return self._arrays[stored.file][name]

    @cached_property
    def _arrays(self) -> dict[str, dict[str, Any]]:
        return {
            file: lazy_arrays(
                self.folder / file, self.headers[file].version, "the model was loaded"
            )
            for file in self.files
        }


def lazy_arrays(path: Path, version: FileVersion, use: str) -> dict[str, mx.array]:
    """The tensors of a file whose header was checked, each read when it is evaluated.

    MLX is given the file that is open here: under its name there may be a pipe by now, which it
    would wait for. It holds the file open as long as an array is to be read.

    Raises:
        KimiError: it cannot be opened, or is not the file of `version`; `use` as of `OpenFile`.
    """
    load: Any = mx.load
    with closing(OpenFile(path, version, use)) as opened:
        try:
            # On the CPU stream: files are read by the host, whatever computes later.
            return load(opened.name, format="safetensors", stream=mx.cpu)
        except (RuntimeError, ValueError, OSError) as error:
            raise KimiError(f"{path}: cannot be read while {use}: {in_words(error)}") from None


def collapsed(names: Collection[str]) -> str:
    """A list for an error: the experts of one matrix in one entry, `experts.{0..255}.w1.weight`."""
    families: dict[tuple[str, str], list[int]] = {}
    plain = []
    for name in names:
        before, experts, after = name.partition(".experts.")
        number, _, rest = after.partition(".")
        if experts and number.isdigit():
            families.setdefault((before, rest), []).append(int(number))
        else:
            plain.append(name)
    for (before, rest), numbers in families.items():
        plain.append(f"{before}.experts.{_ranges(sorted(numbers))}.{rest}")
    return ", ".join(plain)


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"


def _files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _weight_map(folder: Path, there: Collection[str]) -> dict[str, str]:
    """The index's tensor -> file, empty when the folder has no index."""
    if not is_there(folder / INDEX):
        return {}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise KimiError(f"{folder / INDEX}: weight_map must be an object that names files")
    absent = set()
    for file in set(map(str, weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise KimiError(
                f"{folder / INDEX}: weight_map may only name .safetensors files of its own folder "
                f"but names {file[:80]!r}"
            )
        if file not in there:
            absent.add(file)
    if absent:
        raise KimiError(
            f"{folder}: {len(absent)} of {len(set(weight_map.values()))} files that {INDEX} names "
            f"are missing: {', '.join(sorted(absent))}"
        )
    return weight_map


def _unindexed(folder: Path, there: Collection[str]) -> list[str]:
    if "model.safetensors" in there:
        return ["model.safetensors"]
    files = sorted(fnmatch.filter(there, "model*.safetensors"))
    if not files:
        raise KimiError(f"{folder}: no weights: neither {INDEX} nor model.safetensors is there")
    return files


def read_header(path: Path) -> Header:
    """What a file holds.

    Raises:
        KimiError: it is not a whole safetensors file, or changed while it was read.
    """
    try:
        with open(path, "rb", opener=only_regular) as weights:
            version = FileVersion.of(weights.fileno())
            size = int.from_bytes(weights.read(8), "little")
            if size > min(JSON_BYTES, version.size):
                raise KimiError(
                    f"{path}: not a whole safetensors file: its header may have {JSON_BYTES} "
                    f"bytes, and the file has {version.size}, but the header {size}"
                )
            text = weights.read(size)  # first: an error of the disk ends who maps the file
            with safe_open(name_of(weights.fileno()), framework="numpy") as opened:  # checks it all
                names = list(opened.keys())
            fields = parsed_json(text, path)
            with open(path, "rb", opener=only_regular) as again:
                now = FileVersion.of(again.fileno())
    except (SafetensorError, OSError, MemoryError) as error:  # (the last: it cannot be mapped)
        raise KimiError(f"{path}: not a whole safetensors file: {error}") from None
    if version.is_written_to(now):
        raise KimiError(f"{path}: was {version.change_to(now)} while its header was read")
    tensors = {
        name: Stored(
            path.name,
            fields[name]["dtype"],
            tuple(fields[name]["shape"]),
            fields[name]["data_offsets"][0],
        )
        for name in names
    }
    return Header(tensors, 8 + size, version, fields.get("__metadata__") or {})
