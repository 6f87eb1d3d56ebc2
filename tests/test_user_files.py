"""Files that anyone may have written: regular ones, and no more of them than a bound."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_kimi.chat.session import LOCK, Session, read_text
from mlx_kimi.chat.transcript import TEXT
from mlx_kimi.checkpoint.fields import read_json
from mlx_kimi.checkpoint.files import read_header
from mlx_kimi.checkpoint.weight_file import FileVersion, OpenFile
from mlx_kimi.cli.chat.file import attachment
from mlx_kimi.convert.journal import Journal, first_record
from mlx_kimi.durable import checksum
from mlx_kimi.errors import KimiError
from mlx_kimi.text.chat_template import load_chat_template
from mlx_kimi.text.tokenizer import load_tokenizer
from mlx_kimi.user_files import FILE_BYTES, JSON_BYTES, read_bytes
from tests.fuzz.damage import at_open, cut_to_half, is_endless, is_fifo, is_folder, is_huge

with open(__file__, "rb") as this_file:
    VERSION = FileVersion.of(this_file.fileno())
Reads = Callable[[Path], Any]
READS: dict[str, Reads] = {
    "bytes": read_bytes,
    "json": read_json,
    "header": read_header,
    "weights": lambda file: OpenFile(file, VERSION, "it is read"),
    "checksum": checksum,
    "journal": Journal,
    "/file": lambda file: attachment(str(file)),
}
OTHERS = {"pipe": is_fifo, "folder": is_folder, "device": is_endless}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_only_a_regular_file_is_opened(
    tmp_path: Path, read: Reads, kind: Callable[[Path], None]
) -> None:
    kind(tmp_path / "file")
    with pytest.raises((KimiError, OSError)):
        read(tmp_path / "file")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", OTHERS.values(), ids=OTHERS)
def test_a_pipe_in_a_session_or_a_journal_is_not_waited_for(
    tmp_path: Path, kind: Callable[[Path], None]
) -> None:
    assert first_record(tmp_path) is None
    kind(tmp_path / LOCK)
    with pytest.raises(KimiError, match=f"{LOCK}: "):
        Session(tmp_path, {}).open()
    kind(tmp_path / TEXT)
    with pytest.raises(KimiError, match="no session can be read"):
        read_text(tmp_path)
    assert first_record(tmp_path / TEXT) is None


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_what_is_there_is_not_taken_for_absent(talker: Path, tmp_path: Path, name: str) -> None:
    """It was ignored, and the answers were others."""
    (tmp_path / "tiktoken.model").write_bytes((talker / "tiktoken.model").read_bytes())
    (tmp_path / name).symlink_to("nothing")
    with pytest.raises(KimiError, match=f"{name}: cannot be read: No such file"):
        load_tokenizer(tmp_path)


def test_a_file_has_a_bound(tmp_path: Path) -> None:
    is_huge(tmp_path / "file")
    with pytest.raises(KimiError, match=f"may have {FILE_BYTES} bytes, but has 6871"):
        read_bytes(tmp_path / "file")
    os.truncate(tmp_path / "file", JSON_BYTES + 1)
    with pytest.raises(KimiError, match=f"may have {JSON_BYTES} "):
        read_json(tmp_path / "file")
    (tmp_path / "weights").write_bytes((JSON_BYTES + 1).to_bytes(8, "little"))
    os.truncate(tmp_path / "weights", 2 * JSON_BYTES)
    with pytest.raises(KimiError, match=f"its header may have {JSON_BYTES} "):
        read_header(tmp_path / "weights")
    with pytest.raises(KimiError, match="may have 1048576 bytes"):
        (tmp_path / "file").rename(tmp_path / "chat_template.jinja")
        load_chat_template(tmp_path, {})


def test_a_file_that_is_cut_before_it_is_read_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({"a": 1}))
    at_open.arm(tmp_path / "file", 0, cut_to_half)
    with pytest.raises(KimiError, match="file: must be JSON"):
        read_json(tmp_path / "file")


def test_a_file_that_vanishes_before_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    at_open.arm(tmp_path / "file", 0, os.unlink)
    with pytest.raises(KimiError, match="file: cannot be read: No such file"):
        read_json(tmp_path / "file")


@pytest.mark.timeout(20)
def test_no_more_of_a_file_is_summed_than_it_had(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    before = checksum(tmp_path / "file")
    is_huge(tmp_path / "huge")
    assert checksum(tmp_path / "huge", 3) != before == checksum(tmp_path / "file", 3)


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """The latter counted in silence."""
    (tmp_path / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}')
    with pytest.raises(KimiError, match="the key 'vocab_size' comes twice"):
        read_json(tmp_path / "config.json")
