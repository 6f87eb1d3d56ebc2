"""A result that is not whole yet: a folder beside OUT, which the next run goes on with.

`OUT.partial` holds three things:

- `journal`: what was asked for, and how far the work came;
- `model`: what is written so far, renamed to OUT when all of it is written and synced;
- `source`: files of weights that were downloaded and are not converted yet.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_kimi.convert.journal import Journal, first_record
from mlx_kimi.convert.request import Request, difference
from mlx_kimi.durable import sync
from mlx_kimi.errors import KimiError

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


@dataclass(frozen=True, order=True)
class Position:
    """How far the work came: all steps before number `step`, and `rows` rows of that one."""

    step: int
    rows: int


BEGINNING = Position(0, 0)


class Partial:
    """The part of a result that is written."""

    def __init__(self, out: Path, journal: Journal, asked: Request, files: Collection[str]) -> None:
        """`files`: the names of all files of the result, which alone are ours to delete."""
        self.out, self._journal = out, journal
        self.folder = partial_of(out) / MODEL
        begun = journal.records[0] if journal.records else None
        changed = difference(begun, asked) if begun else None
        places = (self.folder, downloads_of(out))
        if (changed or not begun) and (self.records or any(map(_holds_anything, places))):
            raise KimiError(begun_otherwise(out, changed)) if changed else _foreign(partial_of(out))
        _refuse_foreign(self.folder, files)
        if changed or not begun:
            journal.restart(asked)
        if self.is_empty:  # nothing that was written counts
            _delete(self.folder, files)
            self.folder.mkdir(exist_ok=True)
            sync(self.folder.parent)
            sync(out.parent)
        # Left by killed processes: no download of huggingface_hub goes on with them.
        for path in downloads_of(out).rglob("*.incomplete"):
            path.unlink()

    @property
    def records(self) -> Sequence[dict[str, Any]]:
        """What was recorded since the request: `Position` and checksum. Whether it is true,
        `recorded.py` finds out."""
        return self._journal.records[1:]

    @property
    def journal(self) -> Path:
        """The file of the records."""
        return partial_of(self.out) / JOURNAL

    @property
    def is_empty(self) -> bool:
        """Whether no record says that anything is written."""
        return len(self._journal.records) == 1

    @property
    def position(self) -> Position:
        """How far the last record came."""
        if self.is_empty:
            return BEGINNING
        last = self._journal.records[-1]
        return Position(last["step"], last["rows"])

    @property
    def downloaded_bytes(self) -> int:
        """The size of the source's files that were downloaded before."""
        return sum(path.stat().st_size for path in downloads_of(self.out).glob("*.safetensors"))

    def record(self, position: Position, crc: int) -> None:
        """Record that the work is at `position`.

        Args:
            crc: CRC-32 of the data that was written since the last record, which is synced.
        """
        self._journal.append({"step": position.step, "rows": position.rows, "crc": crc})

    def publish(self) -> None:
        """Rename it to OUT, once the weights are recorded and the other files written."""
        for path in sorted(self.folder.iterdir()):
            sync(path)
        sync(self.folder)
        self.folder.rename(self.out)
        sync(self.out.parent)


def begin_anew(partial: Path) -> str:
    """How an error ends that nothing but a new beginning helps against."""
    return f"; delete {partial} to begin anew"


def _refuse_foreign(folder: Path, files: Collection[str]) -> None:
    """What is written into and deleted below a partial result must be there, and ours.

    Raises:
        KimiError: a folder is a link, or there is anything but ordinary files of the result. What
            is hidden, as the Finder's .DS_Store, stays as it is.
    """
    for path in (folder, folder.with_name(DOWNLOADS)):
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            raise _foreign(path)
    for entry in os.scandir(folder) if folder.exists() else ():
        if entry.name.startswith("."):
            continue
        about = entry.stat(follow_symlinks=False)
        if entry.name not in files or not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
            raise _foreign(folder / entry.name)


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _foreign(path: Path) -> KimiError:
    return KimiError(f"{path}: exists and is no conversion's; remove it or rename it")


def _delete(folder: Path, files: Collection[str]) -> None:
    for name in files:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def open_partial(out: Path, asked: Request, files: Collection[str]) -> Iterator[Partial]:
    """The partial result of `out`, new or of an interrupted run, for one process at a time.

    After the block it is renamed to `out`. After an error or Ctrl-C it is kept if anything is
    recorded or a file was downloaded, and the error says so.

    Args:
        files: the names of all files of the result.

    Raises:
        KimiError: `out` exists, another process is at it, it was begun with another request, it is
            no conversion's folder, or the disk fails.
    """
    folder = partial_of(out)
    journal = _journal(out, folder)
    published, begun = False, False
    try:
        partial = Partial(out, journal, asked, files)
        begun = True
        yield partial
        partial.publish()
        published = True
    except (KimiError, OSError) as error:
        raise KimiError(_in_words(error, out, journal)) from None
    finally:
        if begun and (published or not _is_worth_keeping(out, journal)):
            _remove(folder, files)
        journal.close()


def _remove(folder: Path, files: Collection[str] = ()) -> None:
    """What a conversion made there, the journal last; a folder that holds more stays."""
    _delete(folder / MODEL, files)
    shutil.rmtree(folder / DOWNLOADS / ".cache", ignore_errors=True)  # huggingface_hub's
    for made in (folder / MODEL, folder / DOWNLOADS):
        with suppress(OSError):
            made.rmdir()
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
        if interrupted_request(out) is not None and not os.path.lexists(folder / MODEL):
            _remove(folder)  # killed after OUT had got its name
        raise KimiError(f"{out}: already exists; remove it or choose another name")
    if not out.parent.is_dir():
        raise KimiError(f"{out.parent}: no such folder, so that {out.name} cannot be made in it")


def _journal(out: Path, folder: Path) -> Journal:
    """The journal in `folder`, locked."""
    busy = KimiError(f"{folder}: another conversion is at work in it; wait or choose another name")
    path, foreign = folder / JOURNAL, _foreign(folder)
    try:
        folder.mkdir(exist_ok=True)
        if folder.is_symlink() or (not path.exists() and any(folder.iterdir())):
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
