"""A result that is not whole yet: a folder beside OUT, which the next run goes on with.

`OUT.partial` holds three things:

- `journal`: what was asked for, and how far the work came;
- `model`: what is written so far, renamed to OUT when all of it is written and synced;
- `source`: files of weights that were downloaded and are not converted yet.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_kimi.convert.journal import Journal, first_record
from mlx_kimi.convert.request import Request, difference
from mlx_kimi.durable import sync
from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import shown

JOURNAL, MODEL, DOWNLOADS = "journal", "model", "source"


def partial_of(out: Path) -> Path:
    """Where the result lies until it is whole."""
    return out.with_name(out.name + ".partial")


def downloads_of(out: Path) -> Path:
    """Where files of the source lie that are downloaded one at a time."""
    return partial_of(out) / DOWNLOADS


def interrupted_request(out: Path) -> Request | None:
    """What an interrupted conversion to `out` was asked to do."""
    record = first_record(partial_of(out) / JOURNAL)
    is_request = record is not None and all(isinstance(value, str) for value in record.values())
    return record if is_request else None


def begun_otherwise(out: Path, changed: str) -> str:
    """The error for another request than the interrupted one; `changed` is of `difference`."""
    return (
        f"{partial_of(out)}: a conversion begun with {changed}; "
        "repeat it as it was begun, or delete that folder to begin anew"
    )


@dataclass(frozen=True)
class Position:
    """How far the work came: all steps before number `step`, and `rows` rows of that one."""

    step: int
    rows: int


class Partial:
    """The part of a result that is written."""

    def __init__(self, out: Path, journal: Journal, asked: Request) -> None:
        self.out, self._journal = out, journal
        self.folder = partial_of(out) / MODEL
        if len(journal.records) > 1:
            self._go_on(asked)
        else:  # nothing that was written counts
            shutil.rmtree(self.folder, ignore_errors=True)
            if journal.records != [asked]:
                shutil.rmtree(downloads_of(out), ignore_errors=True)
            journal.restart(asked)
            self.folder.mkdir()
            sync(self.folder.parent)
            sync(out.parent)
        # Left by killed processes: no download of huggingface_hub goes on with them.
        for path in downloads_of(out).rglob("*.incomplete"):
            path.unlink()

    @property
    def is_empty(self) -> bool:
        """Whether no record says that anything is written."""
        return len(self._journal.records) == 1

    @property
    def position(self) -> Position:
        """How far the last record came."""
        if self.is_empty:
            return Position(0, 0)
        last = self._journal.records[-1]
        return Position(last["step"], last["rows"])

    @property
    def downloaded_bytes(self) -> int:
        """The size of the source's files that were downloaded before."""
        return sum(path.stat().st_size for path in downloads_of(self.out).glob("*.safetensors"))

    def record(self, position: Position, files: Sequence[Path]) -> None:
        """Record that the work is at `position`; the caller has synced `files`, written since."""
        sizes = {path.name: path.stat().st_size for path in files}
        self._journal.append({"step": position.step, "rows": position.rows, "files": sizes})

    def publish(self) -> None:
        """Rename it to OUT, once the weights are recorded and the other files written."""
        for path in sorted(self.folder.iterdir()):
            sync(path)
        sync(self.folder)
        self.folder.rename(self.out)
        sync(self.out.parent)

    def _go_on(self, asked: Request) -> None:
        if changed := difference(self._journal.records[0], asked):
            raise KimiError(begun_otherwise(self.out, changed))
        sizes: dict[str, int] = {}
        for record in self._journal.records[1:]:
            if not _is_position(record):
                raise KimiError(
                    f"{partial_of(self.out) / JOURNAL}: must hold steps, rows and files, but holds "
                    f"{shown(record)}; delete {self.folder.parent} to begin anew"
                )
            sizes |= record["files"]
        for name, size in sizes.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < size:
                raise KimiError(
                    f"{path}: has lost what was written; delete {self.folder.parent} to begin anew"
                )


def _is_position(record: dict[str, Any]) -> bool:
    """Whether it has the form of what `Partial.record` writes."""
    files = record.get("files")
    if not isinstance(files, dict):
        return False
    numbers = (record.get("step"), record.get("rows"), *files.values())
    return all(type(number) is int and number >= 0 for number in numbers)


@contextmanager
def open_partial(out: Path, asked: Request) -> Iterator[Partial]:
    """The partial result of `out`, new or of an interrupted run, for one process at a time.

    After the block it is renamed to `out`. After an error or Ctrl-C it is kept if anything is
    recorded or a file was downloaded, and the error says so.

    Raises:
        KimiError: `out` exists, another process is at it, it was begun with another request, it is
            no conversion's folder, or the disk fails.
    """
    folder = partial_of(out)
    journal = _journal(out, folder)
    published = False
    try:
        partial = Partial(out, journal, asked)
        yield partial
        partial.publish()
        published = True
    except (KimiError, OSError) as error:
        raise KimiError(_in_words(error, out, journal)) from None
    finally:
        if published or not _is_worth_keeping(out, journal):
            _remove(folder)
        journal.close()


def _remove(folder: Path) -> None:
    """What a conversion made there, the journal last; a folder that holds more stays."""
    for name in (MODEL, DOWNLOADS):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / JOURNAL).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _in_words(error: KimiError | OSError, out: Path, journal: Journal) -> str:
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or out}: {error.strerror or error}"
    kept = _is_worth_keeping(out, journal)
    if isinstance(error, OSError) and not kept:
        return f"{text}; nothing of the conversion is kept"
    if not kept or str(partial_of(out)) in text:
        return text
    return f"{text}; {partial_of(out)} keeps what is done"


def _is_worth_keeping(out: Path, journal: Journal) -> bool:
    return len(journal.records) > 1 or any(downloads_of(out).glob("*.safetensors"))


def check_out(out: Path) -> None:
    """Refuse an `out` that exists or cannot be made.

    Raises:
        KimiError: it exists, or its parent is no folder.
    """
    folder = partial_of(out)
    if os.path.lexists(out):
        if (folder / JOURNAL).is_file() and not (folder / MODEL).exists():
            _remove(folder)  # killed after OUT had got its name
        raise KimiError(f"{out}: already exists; remove it or choose another name")
    if not out.parent.is_dir():
        raise KimiError(f"{out.parent}: no such folder, so that {out.name} cannot be made in it")


def _journal(out: Path, folder: Path) -> Journal:
    """The journal in `folder`, locked."""
    busy = KimiError(f"{folder}: another conversion is at work in it; wait or choose another name")
    path = folder / JOURNAL
    foreign = KimiError(f"{folder}: exists and is no conversion's; remove it or rename it")
    try:
        folder.mkdir(exist_ok=True)
        if not path.exists() and any(folder.iterdir()):
            raise foreign
        journal = Journal(path)
    except BlockingIOError:
        raise busy from None
    except ValueError:
        raise foreign from None
    except OSError as error:
        raise KimiError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        check_out(out)
        if not journal.is_current:
            raise busy
    except KimiError:
        journal.close()
        raise
    return journal
