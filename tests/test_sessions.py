"""`mlx_kimi sessions`, and the bound on what is saved by itself."""

import fcntl
import json
import os
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner, Result

from mlx_kimi import load
from mlx_kimi.chat.chat import Chat
from mlx_kimi.chat.conversation import Conversation, Turn
from mlx_kimi.chat.session import LOCK, Session
from mlx_kimi.chat.sessions import Sessions, size_of
from mlx_kimi.chat.transcript import COPY, TEXT
from mlx_kimi.cli.chat.commands import run_command
from mlx_kimi.cli.chat.loop import Loop
from mlx_kimi.cli.main import cli
from mlx_kimi.errors import KimiError
from tests.test_chat_lines import OPTIONS, Notes, Typed

STATE = 10_000  # bytes of states of each session here


@pytest.fixture
def kept(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path / "sessions")


def add(kept: Sessions, name: str, *texts: str, age: int = 0) -> Path:
    """A session of these messages, used `age` seconds ago."""
    folder = kept.folder / name
    session = Session(folder, {}).open()
    turns = [Turn(text, ({"role": "assistant", "content": f"{text}!"},), 7) for text in texts]
    session.save(Conversation(None, turns))
    session.close()
    (folder / "0-7-0123abcd.safetensors").write_bytes(bytes(STATE))
    for name in (TEXT, COPY):
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    return folder


def autosaved(number: int) -> str:
    return f"2026-11-29_10-00-{number:02}"


def run(kept: Sessions, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["sessions", "--sessions", *map(str, (kept.folder, *arguments))])


def names(kept: Sessions) -> list[str]:
    return [one.name for one in kept.list()]


# -------------------------------------------------------------------------------------- commands
def test_they_are_listed_with_sizes_turns_and_times(kept) -> None:
    add(kept, "mine", "What is KDA?", "and MLA?", age=60)
    folder = add(kept, autosaved(1), "a\nlong \x1b[31m" + "opening " * 50)
    result = run(kept)
    first, second = result.stdout.splitlines()
    assert first.startswith(autosaved(1)) and "1 turn " in first and "\x1b" not in first
    assert second.startswith("mine    ") and "2 turns" in second and "What is KDA?" in second
    assert "2001-09-0" in second and "kB" in second
    assert "2 sessions" in result.stderr and "of at most 5.00 GB" in result.stderr
    listed = json.loads(run(kept, "--json").stdout)
    assert [one["autosaved"] for one in listed] == [True, False]
    assert listed[0]["size"] == size_of(folder) > STATE


def test_a_session_that_cannot_be_read_is_seen_and_removed(kept) -> None:
    folder = add(kept, "broken", "one")
    for name in (TEXT, COPY):
        (folder / name).write_bytes(b"\0" * 100)
    assert "cannot be read: it is damaged" in run(kept).stdout
    with pytest.raises(KimiError, match="there are no sessions"):
        kept.latest()
    assert run(kept, "rm", "broken").exit_code == 0 and not folder.exists()


def test_a_session_is_renamed(kept) -> None:
    add(kept, autosaved(1), "one")
    assert run(kept, "rename", autosaved(1), "mine").exit_code == 0
    assert names(kept) == ["mine"]
    add(kept, "other", "two")
    for new, said in (
        ("other", "there is a session other already"),
        (autosaved(2), "is a name of autosaved sessions"),
        ("a b", "a session's name must be"),
    ):
        result = run(kept, "rename", "mine", new)
        assert result.exit_code == 1 and said in result.stderr and "mine" in names(kept)
    assert "there is no session lost" in run(kept, "rename", "lost", "x").stderr


def test_sessions_are_removed_all_or_none(kept) -> None:
    folder = add(kept, "mine", "one")
    for number in range(3):
        add(kept, autosaved(number), "one")
    result = run(kept, "rm", "mine", "lost")
    assert result.exit_code == 1 and "there is no session lost" in result.stderr and folder.exists()
    assert run(kept, "rm").exit_code == 2
    assert run(kept, "rm", "--autosaved").exit_code == 0 and names(kept) == ["mine"]
    assert run(kept, "rm", "mine").exit_code == 0 and not folder.exists()
    assert kept.folder.exists()


@pytest.mark.parametrize("kind", ["a file", "a folder", "a link", "a link in place of a state"])
def test_what_no_session_wrote_is_never_deleted(kept, kind: str, tmp_path: Path) -> None:
    folder, victim = add(kept, autosaved(1), "one", age=9), tmp_path / "victim"
    add(kept, autosaved(2), "two")
    victim.write_text("somebody's")
    if kind == "a file":
        (folder / "notes.txt").write_text("mine")
    elif kind == "a folder":
        (folder / "1-9-0123abcd.safetensors").mkdir()
    else:
        name = "notes.txt" if kind == "a link" else "1-9-0123abcd.safetensors"
        (folder / name).symlink_to(victim)
    before = sorted(path.name for path in folder.iterdir())
    result = run(kept, "rm", autosaved(1))
    assert result.exit_code == 1 and "which no session wrote" in result.stderr
    assert kept.trim(0) == ()
    assert sorted(path.name for path in folder.iterdir()) == before and victim.exists()


def test_a_link_to_a_session_is_not_followed(kept, tmp_path: Path) -> None:
    real = add(Sessions(tmp_path / "elsewhere"), "real", "one")
    kept.folder.mkdir()
    (kept.folder / autosaved(1)).symlink_to(real)
    add(kept, autosaved(2), "two")
    assert "is a link" in run(kept, "rm", autosaved(1)).stderr
    assert kept.trim(0) == () and (real / TEXT).exists()


def test_an_open_session_is_not_removed_nor_renamed(kept) -> None:
    folder = add(kept, "mine", "one")
    with open(folder / LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        for arguments in (("rm", "mine"), ("rename", "mine", "other")):
            result = run(kept, *arguments)
            assert result.exit_code == 1 and "is open in another chat" in result.stderr
    assert names(kept) == ["mine"]


# ---------------------------------------------------------------------------------------- export
def test_an_export_holds_every_text_whole(kept, tmp_path: Path) -> None:
    rng, alphabet = Random(0), "ab \n#*`<>|_\\$\t\r{}é你\U0001f642\u202e\x1b\x00"
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 400))) for _ in range(40)]
    add(kept, "mine", *texts)
    expected = [part for text in texts for part in (text, f"{text}!")]
    exported = json.loads(run(kept, "export", "mine", "--format", "json").stdout_bytes)
    assert [message["content"] for message in exported["messages"]] == expected
    file = tmp_path / "mine.md"
    assert run(kept, "export", "mine", "-o", file).exit_code == 0
    markdown, place = file.read_bytes().decode(), 0
    for text in expected:
        place = markdown.index(text, place) + len(text)
    assert run(kept, "export", "mine").stdout_bytes == file.read_bytes()
    again = run(kept, "export", "mine", "-o", file)
    assert again.exit_code == 1 and "already exists" in again.stderr
    assert file.read_bytes().decode() == markdown


def test_an_export_has_calls_results_and_who_spoke(kept) -> None:
    call = {"id": "functions.add:0", "function": {"name": "add", "arguments": '{"a": 1}'}}
    replies = [
        {"role": "assistant", "content": "let me see", "tool_calls": [call]},
        {"role": "tool", "content": "42", "name": "add", "tool_call_id": call["id"]},
        {"role": "assistant", "content": "\ud800 it is 42"},
    ]
    session = Session(kept.folder / "mine", {}).open()
    session.save(Conversation("be brief", [Turn("what?", replies)]))
    session.close()
    assert run(kept, "export", "mine").stdout == (
        "## System\n\nbe brief\n\n## User\n\nwhat?\n\n## Assistant\n\nlet me see\n\n"
        '```\nadd({"a": 1})\n```\n\n## Tool: add\n\n42\n\n## Assistant\n\n\\ud800 it is 42\n'
    )
    exported = json.loads(run(kept, "export", "mine", "--format", "json").stdout_bytes)
    assert exported["messages"][2]["tool_calls"] == [call]


# ------------------------------------------------------------------------------------- the bound
def test_the_oldest_autosaved_go_first_and_named_ones_never(kept) -> None:
    for number in range(6):
        add(kept, autosaved(number), "one", age=100 - 10 * number)
    add(kept, "mine", "one", age=1000)
    each = size_of(kept.folder / autosaved(0))
    assert kept.trim(6 * each) == ()
    assert kept.trim(4 * each) == (autosaved(0), autosaved(1))
    session = Session(kept.folder / autosaved(2), {}).open()
    assert kept.trim(2 * each) == (autosaved(3), autosaved(4)), "one that is open stays"
    session.close()
    assert kept.trim(0) == (autosaved(2),), "the latest stays"
    assert set(names(kept)) == {autosaved(5), "mine"}


@pytest.fixture(scope="module")
def loaded(talker: Path):
    return load(talker)


def test_a_chat_keeps_the_bound_and_says_what_went(loaded, kept) -> None:
    add(kept, autosaved(1), "one", age=9)
    add(kept, "mine", "one", age=99)
    chat = Chat(
        *loaded, sessions=kept, fingerprint={}, options=OPTIONS, autosave_limit=STATE, autosave=True
    )
    screen = Said()
    Loop(chat, screen, Typed(["hello", "/save"])).run()  # type: ignore[arg-type]
    assert [note for note in screen.notes if "(--autosave-limit)" in note] == [
        "autosaved sessions may take 10 kB (--autosave-limit): the oldest are deleted, "
        f"{autosaved(1)}; /save NAME keeps a session"
    ]
    assert "without a name it goes when" in screen.notes[-1]
    assert "mine" in names(kept) and len(names(kept)) == 2, "and the one in use"


def test_a_chat_in_a_pipe_deletes_nothing(loaded, kept) -> None:
    add(kept, autosaved(1), "one", age=9)
    add(kept, autosaved(2), "one")
    chat = Chat(
        *loaded, sessions=kept, fingerprint={}, options=OPTIONS, autosave_limit=0, autosave=False
    )
    loop = Loop(chat, Said(), Typed(["hello", "/save mine"]))  # type: ignore[arg-type]
    loop.run()
    elsewhere = kept.folder.parent / "elsewhere" / "mine"
    run_command(loop, f"/save {elsewhere}")
    assert loop.screen.notes[-2:] == ["saved as mine", f"saved as {elsewhere}"]
    with pytest.raises(KimiError, match="is a name of autosaved sessions"):
        run_command(loop, f"/save {autosaved(7)}")
    assert set(names(kept)) == {autosaved(1), autosaved(2), "mine"}


class Said(Notes):
    """Notes, kept."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
