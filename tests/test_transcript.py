"""The text of a session: added to line by line, whole after a crash at any byte."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from mlx_kimi.chat import transcript
from mlx_kimi.chat.conversation import Conversation, Turn
from mlx_kimi.chat.first_format import PREVIOUS
from mlx_kimi.chat.session import read_text
from mlx_kimi.chat.transcript import COPY, TEXT, Transcript

ABOUT = {"identity": {"model": "m"}, "states": [], "kernels": []}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def answer(conversation: Conversation, text: str) -> None:
    conversation.reply({"role": "assistant", "content": text})


def changes(conversation: Conversation) -> Iterator[str]:
    """What a chat does to a conversation, save by save."""
    for text in ("one", "two 你好\n", "three"):
        conversation.say(text)
        yield "a message"
        answer(conversation, f"{text}!")
        yield "an answer"
    conversation.undo()
    yield "taken back"
    conversation.say("another")
    yield "a message after that"
    conversation.edit(1, "uno")
    yield "an earlier message changed"
    answer(conversation, "un")
    yield "its answer"
    conversation.retry()
    yield "taken back to be answered again"
    answer(conversation, "deux")
    yield "another answer"
    conversation.system = "be brief"
    yield "another system message"


def stored(folder: Path) -> tuple[Conversation, str]:
    _, conversation, note = read_text(folder)
    return conversation, note


def copied(conversation: Conversation) -> Conversation:
    return Conversation(conversation.system, list(conversation.turns))


def test_every_change_is_added_and_read_again(folder: Path) -> None:
    text, conversation, sizes = Transcript(folder), Conversation(), [0]
    for change in changes(conversation):
        before = (folder / TEXT).read_bytes() if (folder / TEXT).exists() else b""
        text.save(conversation, ABOUT)
        assert stored(folder) == (conversation, ""), change
        assert (folder / TEXT).read_bytes().startswith(before), "nothing is written again"
        assert (folder / COPY).read_bytes() == (folder / TEXT).read_bytes()
        sizes.append((folder / TEXT).stat().st_size)
    assert max(b - a for a, b in zip(sizes[1:], sizes[2:], strict=False)) < 250


def test_a_crash_at_any_byte_leaves_the_save_before_or_this_one(folder: Path) -> None:
    """Each save is cut off at each of its bytes, in the text and then in the copy."""
    text, conversation, cut = Transcript(folder), Conversation(), 0
    text.save(conversation, ABOUT)
    before = copied(conversation)
    for _ in changes(conversation):
        old = (folder / TEXT).read_bytes()
        text.save(conversation, ABOUT)
        new = (folder / TEXT).read_bytes()
        ends = range(len(old), len(new) + 1)
        (folder / COPY).write_bytes(old)
        for end in ends:
            (folder / TEXT).write_bytes(new[:end])
            assert stored(folder) == (conversation if end == len(new) else before, ""), end
            if end % 16 == 0:
                _goes_on(folder, old)
        (folder / TEXT).write_bytes(new)
        for end in ends:
            (folder / COPY).write_bytes(new[:end])
            assert stored(folder) == (conversation, ""), end
        cut += 2 * len(ends)
        before = copied(conversation)
    assert cut > 2000


def _goes_on(folder: Path, old: bytes) -> None:
    """A chat that begins after the crash."""
    again = Transcript(folder)
    found, _ = again.read()
    found.say("and now?")
    again.save(found, ABOUT)
    assert stored(folder) == (found, "")
    assert (folder / TEXT).read_bytes() == (folder / COPY).read_bytes()
    (folder / COPY).write_bytes(old)


@pytest.mark.parametrize("name", [TEXT, COPY])
def test_damage_of_one_file_costs_nothing_and_is_said(folder: Path, name: str) -> None:
    """Each byte in turn is another; the file is cut there, or doubled from there on."""
    text, conversation = Transcript(folder), Conversation()
    for _ in changes(conversation):
        text.save(conversation, ABOUT)
    whole, rng = (folder / name).read_bytes(), Random(0)
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        others = (whole[:place], whole[: place + 1] + whole[place:]) if place % 8 == 0 else ()
        for damaged in (bytes(flipped), *others):
            (folder / name).write_bytes(damaged)
            found, note = stored(folder)
            assert found == conversation
            if name == COPY:
                assert note == ""
            elif place < len(whole) - 1 or damaged == bytes(flipped):
                assert note == f"{TEXT} is damaged: its copy was read"


def test_lines_that_are_missing_doubled_or_of_another_session_end_what_is_believed(
    folder: Path,
) -> None:
    text, conversation, turns = Transcript(folder), Conversation(), []
    for _ in changes(conversation):
        text.save(conversation, ABOUT)
        turns.append(copied(conversation))
    head, *lines = (folder / TEXT).read_bytes().splitlines(keepends=True)
    (folder / COPY).unlink()
    for place in range(1, len(lines) - 1):
        for changed in (
            [*lines[:place], *lines[place + 1 :]],
            [*lines[: place + 1], *lines[place:]],
            [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]],
        ):
            (folder / TEXT).write_bytes(b"".join([head, *changed]))
            found, note = stored(folder)
            assert note == transcript.LOST
            assert found in (turns[place - 1], turns[place])


def test_after_many_answers_were_taken_back_the_text_is_written_anew(folder: Path) -> None:
    text, conversation, sizes = Transcript(folder), Conversation(), []
    conversation.say("a question")
    for number in range(100):
        conversation.retry()
        answer(conversation, f"answer {number}")
        text.save(conversation, ABOUT)
        sizes.append((folder / TEXT).stat().st_size)
        assert stored(folder) == (conversation, "")
    assert max(sizes) < 4000 and sizes[-1] < max(sizes)
    conversation.turns[:] = [Turn(f"turn {n}") for n in range(50)]
    text.save(conversation, ABOUT)
    assert stored(folder) == (conversation, "")


def test_a_file_that_somebody_else_changed_or_named_is_not_added_to(folder: Path) -> None:
    text, conversation = Transcript(folder), Conversation()
    text.save(conversation, ABOUT)
    kept = folder / "kept by somebody"
    os.link(folder / TEXT, kept)
    before = kept.read_bytes()
    conversation.say("one")
    with pytest.raises(OSError, match="Not the file"):
        text.save(conversation, ABOUT)
    text.save(conversation, ABOUT)  # whole, in new files
    assert stored(folder) == (conversation, "") and kept.read_bytes() == before


def test_a_full_disk_in_the_middle_of_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, conversation = Transcript(folder), Conversation()
    for _ in changes(conversation):
        text.save(conversation, ABOUT)
    before = copied(conversation)
    conversation.say("four")

    def full(path: Path, data: bytes, size: int) -> None:
        with open(path, "ab") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transcript, "append_durably", full)
        with pytest.raises(OSError, match="No space left"):
            text.save(conversation, ABOUT)
    assert stored(folder) == (before, "")
    text.save(conversation, ABOUT)
    assert stored(folder) == (conversation, "")


# --------------------------------------------------------------------------- the first format
def write_first_format(file: Path, conversation: Conversation) -> None:
    lines = [{**ABOUT, "system": conversation.system}, *map(vars, conversation.turns)]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    head = {"mlx_kimi_session": 1, "checksum": zlib.crc32(body)}
    file.write_bytes(json.dumps(head).encode() + b"\n" + body)


def test_texts_of_the_first_format_are_read_and_then_written_in_this_one(folder: Path) -> None:
    conversation = Conversation("system")
    conversation.say("one")
    write_first_format(folder / PREVIOUS, conversation)
    answer(conversation, "un")
    write_first_format(folder / TEXT, conversation)
    (folder / "old").mkdir()
    shutil.copy(folder / TEXT, folder / "old" / PREVIOUS)
    assert stored(folder) == (conversation, "")
    text = Transcript(folder)
    found, _ = text.read()
    assert text.about["identity"] == ABOUT["identity"]
    found.say("two")
    text.save(found, ABOUT)
    assert stored(folder) == (found, "") and not (folder / PREVIOUS).exists()
    assert (folder / TEXT).read_bytes().startswith(transcript.HEAD)
    (folder / "old" / TEXT).write_bytes(b"damaged")
    assert stored(folder / "old") == (conversation, transcript.LOST)
