"""States of prompts on the disk, which outlive the server: files of a folder, under a bound.

    ADDRESS-CRC.tokens.safetensors    tokens after those of another address, and their latents
    ADDRESS-CRC.state.safetensors     the KDA states after the last of them, to go on from there

An address is a digest of a whole text, so that a text is written once. A text goes on from the
longest one before it that is here: its file holds the tokens since, and names the other. Files are
whole or absent, are never changed, and are checked when they are read. Where the folder is full,
the states used longest ago go; tokens go when no text goes on from them.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import IO, Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_kimi.chat.state_files import (
    Arrays,
    kda_arrays,
    load_arrays,
    read_entries,
    stored_ids,
    token_arrays,
)
from mlx_kimi.checkpoint.files import lazy_arrays, read_header
from mlx_kimi.durable import checksum, finished_name, not_through_a_link, write_bytes_durably
from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.model.cache import CacheEntry
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.user_cache import cache_folder
from mlx_kimi.user_files import read_json_if_there

Kind = Literal["tokens", "state"]
FILE = re.compile(r"([0-9a-f]{32})-([0-9a-f]{8})\.(tokens|state)\.safetensors")
ABOUT, LOCK = "about.json", "lock"
NO_TEXT = ""  # the address of the text without tokens
BLOCK = 4096  # bytes, of which a file takes whole ones
LEAST_TOKENS = 256  # of which to read again would take longer than to read a state
MOST_WAITING = 1 << 28  # bytes that are to be written; beyond it nothing is stored
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class StoredText:
    """A text whose tokens are on the disk, or will be.

    Attributes:
        before: the text that it goes on from; None: it begins by itself.
        length: tokens of the whole text.
        is_answered: the state holds what the next token is drawn from.
        used: when a request last went on from here, in seconds since the epoch.
        followers: how many texts go on from this one.
        is_written: its files are there.
    """

    address: str
    before: StoredText | None
    length: int
    is_answered: bool = False
    used: float = 0.0
    followers: int = 0
    is_written: bool = False
    tokens: Path | None = None
    state: Path | None = None
    tokens_size: int = 0
    state_size: int = 0  # 0: none, and nobody goes on from here

    @property
    def has_state(self) -> bool:
        """Whether a request can go on from here."""
        return self.is_written and self.state is not None

    @property
    def is_kept(self) -> bool:
        """Whether another text can go on from its tokens."""
        return not self.is_written or self.tokens is not None

    def chain(self) -> list[StoredText]:
        """The texts that this one is made of, from the first on."""
        found = [self]
        while found[-1].before is not None:
            found.append(found[-1].before)
        return found[::-1]


class Known(NamedTuple):
    """A text that a server before this one stored."""

    ids: np.ndarray  # [T] int32, of the whole text
    text: StoredText


class StateStore:
    """The stored states of one model. Used by the engine's thread; another one writes.

    Attributes:
        bytes: of all files, those to be written included.
        waiting: bytes in memory that are to be written.
        written: bytes, since the start.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        memory: int,
        model: KimiLinear,
        latent_bits: int | None,
    ) -> None:
        """Take the folder, which is made if need be.

        Args:
            about: what states depend on, as of `fingerprint`; kept for `stores`.
            memory: bytes of all files at most.

        Raises:
            KimiError: another server has it, or it cannot be written.
        """
        self.folder, self.memory = folder, memory
        self.bytes, self.written = 2 * BLOCK, 0
        self._model, self._latent_bits = model, latent_bits
        self._texts: dict[str, StoredText] = {}
        self._lock = _taken(folder, about)
        self._jobs: SimpleQueue[_Write | None] = SimpleQueue()
        self.waiting, self._turn = 0, Lock()
        self._has_failed = Event()  # the disk; nothing more is written
        self._thread = Thread(target=self._write_all, name="state store", daemon=True)
        self._thread.start()

    @property
    def texts(self) -> int:
        """How many there are, with a state or without."""
        return len(self._texts)

    # ------------------------------------------------------------------------------- what is here
    def known(self) -> list[Known]:
        """What was stored before, in the order of the texts. Files of no use are deleted."""
        found: dict[str, dict[Kind, Path]] = {}
        for path in self.folder.iterdir():
            if path.is_symlink():
                continue
            if match := FILE.fullmatch(path.name):
                kind: Kind = "tokens" if match[3] == "tokens" else "state"
                files = found.setdefault(match[1], {})
                if kind in files:  # an interrupted server had computed it again
                    path.unlink()
                else:
                    files[kind] = path
            elif FILE.fullmatch(finished_name(path.name)):  # an interrupted server left it
                path.unlink()
        parts = {address: part for address, files in found.items() if (part := _part(files))}
        texts: dict[str, Known] = {}
        for address in parts:
            self._add(address, parts, texts)
        for address, files in found.items():
            if address not in texts:
                for path in files.values():
                    path.unlink(missing_ok=True)
        for text in list(self._texts.values()):
            if not text.state_size and not text.followers:
                self._delete(text)
        self._fit()
        return sorted(
            (each for each in texts.values() if each.text.address in self._texts),
            key=lambda each: each.text.length,
        )

    def _add(self, address: str, parts: dict[str, _Part], texts: dict[str, Known]) -> None:
        """The text of an address, and those that it goes on from, if all of them are here."""
        waiting: list[str] = []
        while address in parts and address not in texts and address not in waiting:
            waiting.append(address)
            address = parts[address].before
        if address != NO_TEXT and address not in texts:
            return
        before = texts.get(address)
        for each in reversed(waiting):
            part = parts[each]
            own = [] if before is None else [before.ids]
            ids = np.concatenate([*own, part.ids])
            if _address(before and before.text, part.ids) != each:
                return
            text = self._linked(each, before and before.text, len(ids))
            text.is_written, text.is_answered, text.used = True, part.is_answered, part.used
            text.tokens, text.state = part.files.get("tokens"), part.files.get("state")
            text.tokens_size, text.state_size = part.sizes
            self.bytes += sum(part.sizes)
            texts[each] = before = Known(ids, text)

    def _linked(self, address: str, before: StoredText | None, length: int) -> StoredText:
        text = StoredText(address, before, length)
        if before is not None:
            before.followers += 1
        self._texts[address] = text
        return text

    # ------------------------------------------------------------------------------- storing
    def put(
        self,
        before: StoredText | None,
        ids: np.ndarray,
        entries: Sequence[CacheEntry],
        hidden: mx.array | None,
        with_state: bool = True,
    ) -> StoredText | None:
        """Store the state after a text, which goes on from another by the tokens ids [n].

        Args:
            with_state: False: store its tokens alone, for texts that go on from it.

        Returns:
            None: there is no room for it, or it is not worth it.
        """
        if len(ids) < LEAST_TOKENS or self._has_failed.is_set():
            return None
        start = 0 if before is None else before.length
        address = _address(before, ids)
        known = self._texts.get(address)
        if known is not None and (known.state_size or not known.is_written or not with_state):
            return known
        about = {"before": before.address if before else NO_TEXT}
        data: dict[Kind, bytes] = {}
        if with_state:
            state = kda_arrays(entries) | ({} if hidden is None else {"hidden": hidden})
            data["state"] = _bytes(state, {"answered": str(hidden is not None)})
        if known is None:
            data["tokens"] = _bytes(token_arrays(ids.tolist(), entries, start), about)
        size = sum(map(_on_disk, data.values()))
        if self.waiting + size > MOST_WAITING or not self._make_room(size, known or before):
            return None
        text = known or self._linked(address, before, start + len(ids))
        text.is_written, text.is_answered, text.used = False, hidden is not None, time.time()
        if with_state:
            text.state_size = _on_disk(data["state"])
        if known is None:
            text.tokens_size = _on_disk(data["tokens"])
        self.bytes += size
        with self._turn:
            self.waiting += size
        self._jobs.put(_Write(text, data, size))
        return text

    def _make_room(self, size: int, needed: StoredText | None) -> bool:
        """For a text that goes on from `needed`, whose tokens stay, and those before them."""
        if needed is None:
            return self._fit(size)
        needed.followers += 1
        try:
            return self._fit(size)
        finally:
            needed.followers -= 1

    def _fit(self, more: int = 0) -> bool:
        """Delete the states used longest ago, and tokens that lead to none, until so many bytes
        more fit."""
        if more > self.memory:
            return False
        while self.bytes + more > self.memory:
            going = [
                text
                for text in self._texts.values()
                if text.is_written and (text.state_size or not text.followers)
            ]
            if not going:
                return False
            self._delete(min(going, key=lambda text: text.used))
        return True

    def _delete(self, text: StoredText) -> None:
        """The state of a text, and the tokens too where no text goes on from it."""
        if text.state is not None:
            text.state.unlink(missing_ok=True)
        self.bytes -= text.state_size
        text.state, text.state_size = None, 0
        while not text.followers and not text.state_size and text.is_written:
            if text.tokens is not None:
                text.tokens.unlink(missing_ok=True)
            self.bytes -= text.tokens_size
            text.tokens, text.tokens_size = None, 0
            self._texts.pop(text.address, None)
            if text.before is None:
                return
            text.before.followers -= 1
            text = text.before

    # ------------------------------------------------------------------------------- reading
    def load(self, text: StoredText) -> tuple[list[CacheEntry], mx.array | None]:
        """The state after a text that has one, and its last token's hidden state, if it is kept.

        Raises:
            KimiError: a file is damaged or gone. It is deleted, and what goes on from it is lost.
        """
        chain = text.chain()
        loaded = [self._read(part, part.tokens) for part in chain]
        loaded[-1] = loaded[-1] | self._read(text, text.state)
        hidden = loaded[-1].get("hidden")
        try:
            _, entries = read_entries(
                loaded, self._model, self._latent_bits, text.length, str(text.tokens)
            )
            if hidden is not None and hidden.shape != (1, 1, self._model.config.hidden_size):
                raise KimiError(f"{text.state}: hidden has shape {hidden.shape}")
            mx.eval([array for entry in entries for array in entry.arrays()], hidden)
        except (KimiError, RuntimeError) as error:
            raise self._lost(text, error) from None
        self.touch(text)
        return entries, hidden

    def _read(self, text: StoredText, path: Path | None) -> Arrays:
        """The arrays of a file that holds what was written."""
        try:
            if path is None:
                raise KimiError("a file is gone")
            found = FILE.fullmatch(path.name)
            if found is None or checksum(path) != int(found[2], 16):
                raise KimiError(f"{path.name} is damaged")
            return load_arrays(path)
        except (KimiError, OSError) as error:
            raise self._lost(text, error) from None

    def touch(self, text: StoredText) -> None:
        """A request goes on from here."""
        text.used = time.time()
        if text.state is not None:
            try:
                os.utime(text.state, (text.used, text.used))
            except OSError:  # (it counts as long as this server runs)
                return

    def _lost(self, text: StoredText, error: Exception) -> KimiError:
        """Delete a text, and those that go on from it: what a request is told."""
        for each in [each for each in self._texts.values() if text in each.chain()]:
            for path in (each.state, each.tokens):
                if path is not None:
                    path.unlink(missing_ok=True)
            self.bytes -= each.state_size + each.tokens_size
            each.state, each.tokens, each.state_size, each.tokens_size = None, None, 0, 0
            del self._texts[each.address]
        if text.before is not None:
            text.before.followers -= 1
        said = error if isinstance(error, KimiError) else in_words(error)
        _log.warning("%s: a stored state is read no more: %s", self.folder, said)
        return KimiError(f"its stored state cannot be read: {said}")

    # ------------------------------------------------------------------------------- writing
    def close(self) -> None:
        """Write what is to be written, and let another server have the folder."""
        self._jobs.put(None)
        self._thread.join()
        self._lock.close()

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if not self._has_failed.is_set():
                    self._write(job)
            except OSError as error:
                self._has_failed.set()
                _log.warning("%s: states are stored no more: %s", self.folder, in_words(error))
            finally:
                with self._turn:
                    self.waiting -= job.size

    def _write(self, job: _Write) -> None:
        for kind in ("tokens", "state"):  # without its tokens a state is of no use
            data = job.data.get(kind)
            if data is None or self._texts.get(job.text.address) is not job.text:  # lost meanwhile
                continue
            name = f"{job.text.address}-{zlib.crc32(data):08x}.{kind}.safetensors"
            write_bytes_durably(self.folder / name, data)
            setattr(job.text, kind, self.folder / name)
            self.written += len(data)
        job.text.is_written = True


class _Write(NamedTuple):
    text: StoredText
    data: dict[Kind, bytes]
    size: int  # bytes on the disk


class _Part(NamedTuple):
    """What the files of an address say."""

    before: str
    ids: np.ndarray
    files: dict[Kind, Path]
    sizes: tuple[int, int]
    is_answered: bool
    used: float


def _part(files: dict[Kind, Path]) -> _Part | None:
    """None: they are of no use."""
    try:
        tokens, state = files["tokens"], files.get("state")
        header = read_header(tokens)
        arrays = lazy_arrays(tokens, header.version, "states were read")
        ids = np.array(stored_ids(arrays, 2**31 - 1, str(tokens)), np.int32)
        size = 0 if state is None else _blocks(state.stat().st_size)
        used = (state or tokens).stat().st_mtime
        is_answered = state is not None and read_header(state).about.get("answered") == "True"
        sizes = _blocks(tokens.stat().st_size), size
        return _Part(header.about["before"], ids, files, sizes, is_answered, used)
    except (KimiError, OSError, RuntimeError, KeyError):
        return None


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _on_disk(data: bytes) -> int:
    return _blocks(len(data))


def _bytes(arrays: Arrays, about: dict[str, str]) -> bytes:
    """As a safetensors file."""
    file = io.BytesIO()
    mx.save_safetensors(file, arrays, about)
    return file.getvalue()


def _address(before: StoredText | None, ids: np.ndarray) -> str:
    digest = hashlib.sha256((before.address if before else NO_TEXT).encode())
    digest.update(ids.astype("<i4").tobytes())
    return digest.hexdigest()[:32]


def _taken(folder: Path, about: Mapping[str, Any]) -> IO[str]:
    """The lock of a folder, which ends with this process however it ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a", opener=not_through_a_link)
    except OSError as error:
        raise KimiError(f"{folder}: {error.strerror}; --cache-disk 0GB keeps no states") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_bytes_durably(folder / ABOUT, json.dumps(dict(about)).encode())
    except BlockingIOError:
        lock.close()
        raise KimiError(
            f"{folder}: another server keeps its states there; --cache-disk 0GB keeps none"
        ) from None
    except OSError as error:
        lock.close()
        raise KimiError(f"{folder}: {error.strerror}; --cache-disk 0GB keeps no states") from None
    return lock


# ---------------------------------------------------------------------------------- all of them
@dataclass(frozen=True)
class Store:
    """What `mlx_kimi cache list` says of a model's states."""

    folder: Path
    model: str
    size: int  # bytes
    states: int
    used: float  # seconds since the epoch


def folder_for(about: Mapping[str, Any]) -> Path:
    """Of the states that depend on this."""
    text = json.dumps(dict(about), sort_keys=True)
    return _stores() / hashlib.sha256(text.encode()).hexdigest()[:16]


def stores() -> list[Store]:
    """Those of all models, the latest first."""
    found = []
    for folder in _stores().iterdir() if _stores().is_dir() else ():
        files = _ours(folder)
        if not files:
            continue
        abouts = [file.stat() for file in files]
        try:
            model = str(read_json_if_there(folder / ABOUT).get("name", "?"))
        except KimiError:
            model = "?"
        states = sum(".state." in file.name for file in files)
        size = sum(_blocks(about.st_size) for about in abouts)
        found.append(Store(folder, model, size, states, max(about.st_mtime for about in abouts)))
    return sorted(found, key=lambda store: -store.used)


def wipe(store: Store) -> None:
    """Delete the states of a model.

    Raises:
        KimiError: a server keeps its states there.
        OSError: a file cannot be deleted.
    """
    with open(store.folder / LOCK, "a", opener=not_through_a_link) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KimiError(f"{store.folder}: a server keeps the states of {store.model}") from None
        for file in _ours(store.folder):
            file.unlink()
    with suppress(OSError):  # somebody else has put something there
        store.folder.rmdir()


def _stores() -> Path:
    return cache_folder() / "states"


def _ours(folder: Path) -> list[Path]:
    """The files of a store."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [
        path
        for path in folder.iterdir()
        if not path.is_symlink()
        and (path.name in (ABOUT, LOCK) or FILE.fullmatch(finished_name(path.name)))
    ]
