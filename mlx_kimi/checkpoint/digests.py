"""Digests of whole weight files, each computed once: a start does not read gigabytes to know them.

A digest is SHA-256, as the hub's, whose cache names files by it. Others are remembered in the
user's cache folder by a file's path, size, inode and times.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlx_kimi.durable import write_bytes_durably
from mlx_kimi.errors import KimiError
from mlx_kimi.user_cache import cache_folder
from mlx_kimi.user_files import only_regular, read_json_if_there

Progress = Callable[[int, int], None]  # bytes read, bytes in all
Known = dict[str, list[str]]  # path -> what `_mark` says of it, and the digest

BLOCK = 1 << 24  # bytes
THREADS = 4  # one file each; a core hashes one to two gigabytes a second
# Nanoseconds. A file that changed later than that could change again without showing it.
SETTLED = 2_000_000_000
MOST_KNOWN = 10_000  # files; then those that are gone are forgotten
_HUB_NAME = re.compile(r"[0-9a-f]{64}")


def digests(folder: Path, files: Sequence[str], progress: Progress | None = None) -> list[str]:
    """The SHA-256 of each of a folder's files, in hexadecimal.

    Raises:
        KimiError: a file cannot be read, or changed meanwhile.
    """
    paths = [(folder / file).resolve() for file in files]
    found = {path: path.name for path in paths if _is_named_by_the_hub(path)}
    known = _known()
    for path in paths:
        mark = _mark(path)
        if path not in found and known.get(str(path), [])[:-1] == mark:
            found[path] = known[str(path)][-1]
    unknown = [path for path in paths if path not in found]
    if unknown:
        fresh = _read(unknown, progress)
        found |= {path: digest for path, (_, digest) in fresh.items()}
        _remember({str(path): [*mark, digest] for path, (mark, digest) in fresh.items()})
    return [found[path] for path in paths]


def _read(paths: Sequence[Path], progress: Progress | None) -> dict[Path, tuple[list[str], str]]:
    total, done = sum(path.stat().st_size for path in paths), 0
    found = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for path, marked in zip(paths, pool.map(_digest, paths), strict=True):
            found[path] = marked
            done += path.stat().st_size
            if progress:
                progress(done, total)
    return found


def _digest(path: Path) -> tuple[list[str], str]:
    before, digest = _mark(path), hashlib.sha256()
    try:
        with open(path, "rb", opener=only_regular) as file:
            for block in _blocks(file.fileno()):
                digest.update(block)
    except OSError as error:
        raise KimiError(f"{path}: cannot be read: {error.strerror}") from None
    if _mark(path) != before:
        raise KimiError(f"{path}: was written to while it was read")
    return before, digest.hexdigest()


def _blocks(descriptor: int) -> Iterator[bytes]:
    while block := os.read(descriptor, BLOCK):
        yield block


def _mark(path: Path) -> list[str]:
    """What changes when a file does."""
    try:
        s = path.stat()
    except OSError as error:
        raise KimiError(f"{path}: cannot be read: {error.strerror}") from None
    return [str(x) for x in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)]


def _is_named_by_the_hub(path: Path) -> bool:
    """Whether it lies in the hub's cache under its digest, which its download was checked by."""
    return path.parent.name == "blobs" and bool(_HUB_NAME.fullmatch(path.name))


def _file() -> Path:
    return cache_folder() / "digests.json"


def _known() -> Known:
    """What is remembered; nothing of it if the file is damaged."""
    try:
        known = read_json_if_there(_file())
    except (KimiError, OSError):
        return {}
    lists = all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in known.values())
    return known if lists else {}


def _remember(fresh: Known) -> None:
    now = time.time_ns()
    settled = {p: of for p, of in fresh.items() if now - max(map(int, of[3:5])) > SETTLED}
    if not settled:
        return
    known = _known() | settled
    if len(known) > MOST_KNOWN:
        known = {path: of for path, of in known.items() if os.path.exists(path)}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_bytes_durably(_file(), json.dumps(known).encode())
    except OSError:
        return  # it is computed again
