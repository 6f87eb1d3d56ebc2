"""Journals of conversions that lie, with right checksums of their lines."""

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_kimi.convert import output
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.quantize import scheme
from mlx_kimi.errors import KimiError
from tests.checkpoints import TINY, write_checkpoint
from tests.test_convert_resume import contents, interrupted

Records = list[Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), TINY, shards=2)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(source, out, scheme(group_size=32))
    return contents(out)


@pytest.fixture
def partial(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A conversion with many records, interrupted half way."""
    monkeypatch.setattr(output, "SYNC", 1 << 14)
    interrupted(source, tmp_path / "out", group_size=32)
    return tmp_path / "out.partial"


def records(partial: Path) -> Records:
    return [json.loads(line[9:]) for line in (partial / "journal").read_bytes().splitlines()]


def write(partial: Path, texts: list[bytes]) -> None:
    lines = [b"%08x %s\n" % (zlib.crc32(text), text) for text in texts]
    (partial / "journal").write_bytes(b"".join(lines))


def refusal(source: Path, out: Path) -> str:
    """The line that going on gives; nothing may be made or deleted."""
    folder = out.with_name("out.partial")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(KimiError) as caught:
        convert(source, out, scheme(group_size=32))
    assert not out.exists()
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = str(caught.value)
    assert message.isprintable() and str(folder) in message
    return message


LIES: dict[str, Callable[[Records], Any]] = {
    "beyond the plan": lambda r: r.append({**r[-1], "step": 10**6}),
    "beyond any integer": lambda r: r.append({**r[-1], "step": 10**400}),
    "beyond a tensor's rows": lambda r: r.append({**r[-1], "rows": 10**6}),
    "within a block": lambda r: r.append({**r[-1], "step": r[-1]["step"] + 1, "rows": 1}),
    "backwards": lambda r: r.append(r[1]),
    "out of order": lambda r: r.insert(1, r.pop()),
    "no step": lambda r: r.append({"rows": 0, "crc": 0}),
    "a step that is no number": lambda r: r.append({**r[-1], "step": "1"}),
    "a step that is true": lambda r: r.append({**r[-1], "step": True}),
    "a negative number of rows": lambda r: r.append({**r[-1], "rows": -1}),
    "a fraction": lambda r: r.append({**r[-1], "rows": 0.5}),
    "a checksum that is no number": lambda r: r.append({**r[-1], "crc": None}),
    "files, by paths that lead out": lambda r: r[-1].update(files={"../../victim": 1}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_the_plan_has_not_is_one_line(
    source: Path, partial: Path, tmp_path: Path, lie: str
) -> None:
    forged = records(partial)
    LIES[lie](forged)
    write(partial, [json.dumps(record).encode() for record in forged])
    message = refusal(source, tmp_path / "out")
    assert (
        "journal: must hold steps, rows and checksums of this conversion in their order" in message
    )


@pytest.mark.parametrize("text", [b"5", b"{", b"[" * 100_000], ids=["5", "brace", "too deep"])
def test_what_is_no_record_ends_the_journal(
    source: Path, partial: Path, tmp_path: Path, whole: dict[str, bytes], text: bytes
) -> None:
    write(partial, [*(json.dumps(record).encode() for record in records(partial)), text])
    convert(source, tmp_path / "out", scheme(group_size=32))
    assert contents(tmp_path / "out") == whole


def test_a_shorter_journal_gives_the_same_bytes(
    source: Path, partial: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """Of a true one every beginning is true."""
    true = records(partial)
    assert len(true) > 4
    write(partial, [json.dumps(record).encode() for record in true[:3]])
    convert(source, tmp_path / "out", scheme(group_size=32))
    assert contents(tmp_path / "out") == whole


def test_blocks_that_are_not_there_are_found(source: Path, partial: Path, tmp_path: Path) -> None:
    """The journal of a conversion that came further, and files as long as the result's."""
    further = tmp_path / "further"
    further.mkdir()
    interrupted(source, further / "out", share=0.9, group_size=32)
    (partial / "journal").write_bytes((further / "out.partial" / "journal").read_bytes())
    for file in (further / "out.partial" / "model").iterdir():
        with open(partial / "model" / file.name, "ab") as shorter:
            shorter.truncate(file.stat().st_size)
    assert "does not hold what was written; delete" in refusal(source, tmp_path / "out")


def test_a_byte_that_changed_is_found(source: Path, partial: Path, tmp_path: Path) -> None:
    (weights, *_) = sorted((partial / "model").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[int.from_bytes(data[:8], "little") + 8] ^= 1  # the first of the first tensor
    weights.write_bytes(data)
    assert "does not hold what was written; delete" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("length", [2, None], ids=["little recorded", "half recorded"])
def test_a_file_that_is_too_long_is_found(
    source: Path, partial: Path, tmp_path: Path, length: int | None
) -> None:
    """What follows the last tensor would stay in the result."""
    write(partial, [json.dumps(record).encode() for record in records(partial)[:length]])
    (weights, *_) = sorted((partial / "model").glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.truncate(10**9)
    message = refusal_without_reading(source, tmp_path / "out")
    assert "model.safetensors does not hold what was written; delete" in message
    assert weights.stat().st_size == 10**9


def refusal_without_reading(source: Path, out: Path) -> str:
    with pytest.raises(KimiError) as caught:
        convert(source, out, scheme(group_size=32))
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder", "of another name"])
def test_what_is_not_ours_among_the_results_files_is_left_alone(
    source: Path, partial: Path, tmp_path: Path, kind: str
) -> None:
    """A journal that is true in every word makes nobody's files ours."""
    (weights, *_) = sorted((partial / "model").glob("*.safetensors"))
    victim = tmp_path / "victim"
    weights.rename(victim)
    before = victim.read_bytes()
    if kind == "link":
        weights.symlink_to(victim)
    elif kind == "hard link":
        weights.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(weights)
    elif kind == "folder":
        weights.mkdir()
    else:
        weights.write_bytes(before)
        weights.with_name("adapter.safetensors").write_bytes(b"theirs")
    message = refusal(source, tmp_path / "out")
    assert "exists and is no conversion's; remove it or rename it" in message
    assert victim.read_bytes() == before


@pytest.mark.parametrize("folder", ["model", "source", "."])
@pytest.mark.parametrize("length", [1, None], ids=["nothing recorded", "half recorded"])
def test_a_folder_that_leads_out_is_left_alone(
    source: Path, partial: Path, tmp_path: Path, folder: str, length: int | None
) -> None:
    victim, place = tmp_path / "victim", partial if folder == "." else partial / folder
    write(partial, [json.dumps(record).encode() for record in records(partial)[:length]])
    if place.exists():
        place.rename(victim)
    else:
        victim.mkdir()
    for name in ("model.safetensors.incomplete", "config.json"):
        (victim / name).write_text("theirs")
    place.symlink_to(victim)
    before = {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()}
    assert "exists and is no conversion's" in refusal_without_reading(source, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()}


@pytest.mark.parametrize("first", [None, {}, {"--bits": "8"}, {"--bits": [1]}], ids=str)
def test_a_journal_of_no_work_deletes_nothing(source: Path, tmp_path: Path, first: Any) -> None:
    """Of this or another conversion it would have emptied both folders."""
    theirs = [tmp_path / "out.partial" / name for name in ("model/config.json", "source/notes")]
    for file in theirs:
        file.parent.mkdir(parents=True)
        file.write_text("theirs")
    write(tmp_path / "out.partial", [] if first is None else [json.dumps(first).encode()])
    refusal(source, tmp_path / "out")
    assert [file.read_text() for file in theirs] == ["theirs", "theirs"]


def test_beside_a_result_only_a_journal_is_deleted(source: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal"
    out.mkdir()
    journal.parent.mkdir()
    journal.write_text("Monday\n")
    with pytest.raises(KimiError, match="already exists"):
        convert(source, out, scheme(group_size=32))
    assert journal.read_text() == "Monday\n"
