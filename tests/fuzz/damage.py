"""Damage to any file: bytes, JSON values, and what a disk can put in a file's place."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

Json = Any

# Written raw, since Python's own writer cannot: JSON nested deeply, and a number of many digits.
DEEP, DIGITS = "@deep@", "@digits@"
RAW = {
    json.dumps(DEEP): "[" * 100_000 + "]" * 100_000,
    json.dumps(DIGITS): "9" * 5000,
}
HOSTILE: tuple[Json, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 4096, 2**31, 2**32, 2**53, 2**63, -(2**63), 2**64),
    *(10**30, 1.0, 4.0, 64.0, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), DIGITS, DEEP),
    *("", "x", "1", "\0", "\n", "\ud800", "a\udfffb", "\x1b[31m", "../x", "/dev/zero", "é" * 3000),
    *([], {}, [[]], [None], [1, "x"], {"a": {}}, {"content": "x"}, "x" * 200_000, [0] * 5000),
)


class Damage(NamedTuple):
    """What was done to a folder.

    Attributes:
        same: an answer must be that of the sound folder, or of the same text read anew.
        is_noted: what was damaged was not used, and a note says so.
    """

    what: str
    same: bool = False
    is_noted: bool = False


Mutator = Callable[[Random, Path], Damage]


# ----------------------------------------------------------------------------------------- JSON
def written(value: Json) -> str:
    """JSON, of values that hold placeholders, too."""
    text = json.dumps(value)
    for placeholder, raw in RAW.items():
        text = text.replace(placeholder, raw)
    return text


def short(value: Json) -> str:
    """A value in a description."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:30]}… ({len(text)} characters)"


def places(value: Json) -> Iterator[tuple[Json, Any]]:
    """Every object or list in `value` with every key of it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def change_value(rng: Random, value: Json) -> str:
    """Change one place in an object, which is written into; what was done."""
    found = list(places(value))
    if not found:
        return "nothing to change"
    holder, key = rng.choice(found)
    kind = rng.choice(
        ("hostile", "hostile", "hostile", "near", "delete", "wrap", "other", "rename")
    )
    old = holder[key]
    if kind == "near" and isinstance(old, int | float):
        changes = (old + 1, old - 1, -old, old * 2, old // 2, float(old), str(old), [old], not old)
        holder[key] = rng.choice(changes)
    elif kind == "delete":
        del holder[key]
        return f"{short(key)} deleted"
    elif kind == "wrap":
        holder[key] = rng.choice(([old], {"x": old}, [old, old]))
    elif kind == "other":
        other, place = rng.choice(found)
        holder[key] = json.loads(json.dumps(other[place]))
    elif kind == "rename" and isinstance(holder, dict):
        name = rng.choice(("", "x", f"{key}x", "\ud800", "x" * 200_000))
        holder[name] = holder.pop(key)
        return f"{short(key)} renamed to {short(name)}"
    else:
        holder[key] = deepcopy(rng.choice(HOSTILE))  # the next change may be within it
    return f"{short(key)}: {short(old)} became {short(holder[key])}"


def change_text(rng: Random, text: bytes) -> tuple[str, bytes]:
    """JSON that is none any more, or says something twice."""
    kind = rng.choice(("cut", "behind", "bom", "latin", "zero", "double", "empty", "list", "large"))
    at = rng.randrange(len(text) + 1)
    if kind == "double":
        inner = text.strip()[1:-1]
        return "every key twice", b"{" + inner + b"," + inner + b"}"
    if kind == "large":
        return "60 MB of empty lists", b'{"x":[' + b"[]," * 20_000_000 + b"[]]}"
    changed = {
        "cut": text[:at],
        "behind": text + b"}",
        "bom": b"\xef\xbb\xbf" + text,
        "latin": text[:at] + b"\xe9" + text[at:],
        "zero": text[:at] + b"\0" * 8 + text[at:],
        "empty": b"",
        "list": b"[" + text + b"]",
    }
    return f"text: {kind} at {at}", changed[kind]


def change_json(rng: Random, file: Path) -> Damage:
    """Change a file of one JSON object."""
    text = file.read_bytes()
    if rng.random() < 0.15:
        what, text = change_text(rng, text)
        put(file, text)
        return Damage(f"{file.name}: {what}")
    value = json.loads(text)
    what = "; ".join(change_value(rng, value) for _ in range(rng.choice((1, 1, 2))))
    put(file, written(value).encode())
    return Damage(f"{file.name}: {what}")


# ---------------------------------------------------------------------------------------- bytes
def put(file: Path, data: bytes) -> None:
    """Write a file anew: it may be linked to another that stays as it is."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def change_bytes(rng: Random, file: Path) -> Damage:
    """Flip, cut, insert, repeat or blank bytes of a file."""
    data = bytearray(file.read_bytes())
    kind = rng.choice(("flip", "flip", "cut", "insert", "repeat", "blank", "swap lines"))
    at, count = rng.randrange(len(data) or 1), rng.choice((1, 2, 8, 64, 4096))
    if kind == "flip" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = rng.randbytes(count)
    elif kind == "repeat":
        data[at:at] = data[at : at + count]
    elif kind == "blank":
        data[at : at + count] = bytes(len(data[at : at + count]))
    else:
        lines = bytes(data).splitlines(keepends=True)
        rng.shuffle(lines)
        data = bytearray(b"".join(lines))
    put(file, bytes(data))
    return Damage(f"{file.name}: {kind} {count} at {at}", same=False)


# ----------------------------------------------------------------------------------------- disk
HUGE = 1 << 36  # bytes of a file without a block on the disk: reading it would take minutes


def is_nothing(file: Path) -> None:
    pass


def is_folder(file: Path) -> None:
    file.mkdir()


def is_fifo(file: Path) -> None:
    os.mkfifo(file)


def is_endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def is_link_to_itself(file: Path) -> None:
    file.symlink_to(file.name)


def is_link_to_nothing(file: Path) -> None:
    file.symlink_to("nothing")


def is_empty(file: Path) -> None:
    file.touch()


def is_huge(file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(HUGE)


FAULTS = (
    *(is_nothing, is_folder, is_fifo, is_endless),
    *(is_link_to_itself, is_link_to_nothing, is_empty, is_huge),
)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fault(rng: Random, folder: Path) -> Damage:
    """Put something else in the place of a file."""
    file, kind = rng.choice(files_of(folder)), rng.choice(FAULTS)
    file.unlink()
    kind(file)
    # A file that nobody must have may be absent, or empty if it is text; nothing else is absent.
    return Damage(f"{file.name} {kind.__name__}", same=kind not in (is_nothing, is_empty))


class AtOpen:
    """Something that happens to a file when Python opens it, after whatever was checked before."""

    def __init__(self) -> None:
        self._path, self._count, self._do, self._is_pipe = "", 0, is_nothing, False
        sys.addaudithook(self._hook)

    def arm(
        self, path: Path, count: int, do: Callable[[Path], None], is_pipe: bool = False
    ) -> None:
        """Let `do`, which may put a pipe there, happen at opening `count` of `path`, from 0."""
        self._path, self._count, self._do, self._is_pipe = str(path), count, do, is_pipe

    def disarm(self) -> None:
        self._path = ""

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._path:
            self.opened(arguments[0])

    def opened(self, path: Any, waits: bool = False) -> None:
        """Be told that `path` is opened; `waits`: by what would wait for a pipe for ever."""
        if not self._path or path != self._path or (waits and self._is_pipe):
            return
        if self._count:
            self._count -= 1
            return
        self._path = ""
        self._do(Path(path))


at_open = AtOpen()


def cut_to_half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def race(rng: Random, folder: Path) -> Damage:
    """A file becomes another between a check and its reading."""
    file, count = rng.choice(files_of(folder)), rng.choice((0, 0, 1, 2, 3, 4, 5, 6))
    kind = rng.choice((cut_to_half, *FAULTS))

    def happens(path: Path) -> None:
        if kind is not cut_to_half:
            path.unlink(missing_ok=True)
        kind(path)

    at_open.arm(file, count, happens, is_pipe=kind is is_fifo)
    return Damage(f"{file.name} {kind.__name__} at opening {count}")
