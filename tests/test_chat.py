"""`mlx_kimi chat` as people use it: in a terminal, and in a pipe."""

import base64
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_kimi import load
from mlx_kimi.chat.chat import Chat
from mlx_kimi.chat.conversation import Conversation, Turn
from mlx_kimi.chat.fingerprint import fingerprint
from mlx_kimi.chat.session import Session, read_text
from mlx_kimi.chat.sessions import Sessions
from mlx_kimi.chat.tool_calls import Call
from mlx_kimi.cli.chat import command as chat
from mlx_kimi.cli.chat.input import PipedLines
from mlx_kimi.cli.chat.loop import Loop
from mlx_kimi.cli.chat.screen import PlainScreen
from mlx_kimi.cli.grammar import COMMANDS
from mlx_kimi.text.tokenizer import load_tokenizer
from tests.processes import run
from tests.terminal import ALT_ENTER, CTRL_C, CTRL_D, CTRL_R, ENTER, TAB, UP, Terminal

LEFT, BACKSPACE, ALT_B = "\x1b[D", "\x7f", "\x1bb"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


@pytest.fixture(scope="module")
def loaded(talker: Path):
    return load(talker)


@pytest.fixture
def start(folder: Path) -> Iterator:
    """`start(*options)`: a chat at its first prompt; ended with the test."""
    started: list[Terminal] = []

    def chat(*options: str | Path, **how) -> Terminal:
        terminal = Terminal("chat", "--sessions", folder, *options, **how)
        started.append(terminal)
        terminal.wait_for_prompt()
        return terminal

    yield chat
    for terminal in started:
        terminal.close()


def talker_options(talker: Path, tokens: int = 6) -> tuple[str | Path, ...]:
    return ("--model", talker, "--max-tokens", str(tokens))


def saved(folder: Path, name: str | None = None) -> Conversation:
    """What the latest session holds, or this one; nothing if there is none."""
    if name is None:  # (one that is being made cannot be read yet)
        listed = [session.name for session in Sessions(folder).list() if not session.problem]
        if not listed:
            return Conversation()
        name = listed[0]
    return read_text(folder / name)[1]


def texts(folder: Path) -> list[str]:
    return [turn.text for turn in saved(folder).turns]


# ----------------------------------------------------------------------------------------- editing
@pytest.mark.slow
def test_a_line_is_edited_sent_and_answered(start, folder) -> None:
    terminal = start()
    terminal.type("What is 347 + 59?" + LEFT + BACKSPACE + "8" + ALT_B * 3)
    terminal.say("")
    terminal.wait_for(r"347 \+ 58 = 405\.")
    terminal.wait_for_prompt()
    assert terminal.lines[:6] == [
        "pocket · 4 bits · 32,768 tokens of context",
        "/help · Enter sends · Ctrl-C stops · Ctrl-D leaves",
        *("", "> What is 347 + 58?", "", "347 + 58 = 405."),
    ]
    terminal.wait_for(r"^\d+ of 32,768 tokens \(0%\) · [\d.]+ tok/s · [\d.]+ MB memory")
    terminal.type("one" + ALT_ENTER + "two")
    terminal.say("")
    terminal.wait_until(lambda: texts(folder)[-1] == "one\ntwo")


@pytest.mark.slow
def test_200_pasted_lines_are_one_message(start, talker, folder) -> None:
    terminal = start(*talker_options(talker))
    lines = "\n".join(f"line {n}, pasted" for n in range(200))
    terminal.paste(lines)
    terminal.wait_for("line 199, pasted")
    assert not list(folder.glob("*/chat.jsonl")), "nothing is sent before Enter"
    terminal.type(ENTER)
    terminal.wait_for("cut after 6 tokens")
    assert texts(folder) == [lines]


@pytest.mark.slow
def test_history_lasts_from_one_run_to_the_next(start, talker, folder) -> None:
    first = start(*talker_options(talker))
    for number, text in enumerate(("about apples", "about pears"), start=1):
        first.say(text)
        first.wait_until(lambda number=number: len(_answered(folder)) == number)
        first.wait_for_prompt()
    first.type(CTRL_D)
    assert first.wait_for_end() == 0
    second = start(*talker_options(talker))
    second.type(UP)
    second.wait_for("^> about pears$")
    second.type(UP)
    second.wait_for("^> about apples$")
    second.type(CTRL_C)
    second.wait_for_prompt()
    second.type(CTRL_R + "pear")
    second.wait_for("I-search backward: pear")
    second.type(ENTER)
    second.wait_for("^> about pears$")
    second.type(ENTER)
    second.wait_until(lambda: texts(folder) == ["about pears"])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a pipe", "a link", "a folder"])
def test_no_history_file_can_be_kept_and_the_chat_goes_on(start, talker, folder, place) -> None:
    """A pipe would block whoever opens it, and what a link leads to is not ours."""
    folder.mkdir()
    history, victim = folder / ".history", folder / "victim"
    match place:
        case "a pipe":
            os.mkfifo(history)
        case "a link":
            victim.write_text("mine")
            history.symlink_to(victim)
        case "a folder":
            history.mkdir()
    terminal = start(*talker_options(talker))
    terminal.say("about apples")
    terminal.wait_until(lambda: saved(folder).tokens)
    terminal.wait_for_prompt()
    terminal.type(UP)
    terminal.wait_for("^> about apples$")
    assert place != "a link" or victim.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process that runs")
def test_a_disk_that_fills_up_ends_no_chat(start, talker, folder) -> None:
    """From then on no file grows: the history, the session and its states."""
    terminal = start(*talker_options(talker))
    terminal.say("about apples")
    terminal.wait_until(lambda: saved(folder).tokens)
    terminal.wait_for_prompt()
    resource.prlimit(terminal.pid, resource.RLIMIT_FSIZE, (0, 0))
    terminal.say("about pears")
    terminal.wait_for("File too large")
    terminal.wait_for_prompt()
    assert texts(folder)[:1] == ["about apples"], "what was saved is still there"
    terminal.type(UP)
    terminal.wait_for("^> about pears$")
    terminal.type(CTRL_C + CTRL_D)
    assert terminal.wait_for_end() == 0 and b"Traceback" not in terminal.raw


@pytest.mark.slow
def test_the_terminal_may_change_its_size(start, talker) -> None:
    terminal = start(*talker_options(talker, 400), "--temp", "1", "--top-k", "20")
    terminal.type("a message that is longer than forty columns are wide")
    terminal.wait_for("columns are wide")
    terminal.resize(40, 12)
    terminal.wait_for("^> a message that is longer than forty co$")
    terminal.say("")
    terminal.wait_for("tok/s")
    terminal.resize(100, 30)
    terminal.wait_for("cut after 400 tokens")
    terminal.wait_for_prompt()
    terminal.say("/stats")
    terminal.wait_for("^context  ")
    assert terminal.screen.columns == 100 and max(map(len, terminal.lines)) > 60


@pytest.mark.slow
def test_tab_completes_commands_and_a_wrong_one_is_told_the_nearest(start, talker, folder) -> None:
    terminal = start(*talker_options(talker))
    terminal.type("/sess")
    terminal.wait_for("list what is saved")  # the menu
    terminal.type(TAB)
    terminal.wait_for("^> /sessions")
    terminal.say("")
    terminal.wait_for("there are no sessions yet")
    terminal.wait_for_prompt()
    terminal.say("/rerty")
    terminal.wait_for(r"Error: there is no command /rerty: did you mean /retry\?")
    terminal.wait_for_prompt()
    terminal.say("/etc/hosts is a file")
    terminal.wait_until(lambda: list(folder.glob("*/chat.jsonl")))
    assert texts(folder) == ["/etc/hosts is a file"]


@pytest.mark.slow
def test_what_is_typed_during_an_answer_waits_unseen(start, talker) -> None:
    terminal = start(*talker_options(talker, 700))
    terminal.say("first")
    terminal.wait_for("^Ctrl-C stops")
    terminal.type("typed ahead")
    terminal.wait_for("cut after 700 tokens")
    terminal.wait_for("^> typed ahead$")
    assert terminal.text.count("typed ahead") == 1


@pytest.mark.slow
def test_forty_columns_are_enough(start, talker) -> None:
    """Lines break between words, and what is below a line begins where its meaning does."""
    terminal = start(*talker_options(talker, 60), columns=40, rows=30)
    terminal.say("/help")
    terminal.wait_for("^Ctrl-D +leave")
    terminal.wait_for(r"^/show \[N\] +list the messages by\n +number, or show")
    terminal.wait_for_prompt()
    terminal.say("first")
    terminal.wait_for("^Ctrl-C stops")
    terminal.wait_for(r"^\[cut after 60 tokens; /set max_tokens N\n ?allows more\]")


@pytest.mark.slow
def test_a_dumb_terminal_has_a_prompt_and_asks_for_consent(folder, tmp_path) -> None:
    (tmp_path / "weather.py").write_text(TOOLS.format(log=str(tmp_path / "log")))
    options = ("--sessions", folder, "--tools", tmp_path / "weather.py")
    terminal = Terminal("chat", *options, TERM="dumb")
    terminal.wait_for("^> ?$")
    terminal.say("What is the weather in Paris?")
    terminal.wait_for(r"\[y/N/a\]")
    terminal.say("y")
    terminal.wait_for("Paris is sunny")
    terminal.wait_for(r"^> ?$")
    assert b"\x1b" not in terminal.raw
    terminal.close()


# ------------------------------------------------------------------------------------------ Ctrl-C
@pytest.mark.slow
def test_ctrl_c_while_the_message_is_read(start, talker, folder) -> None:
    terminal = start(*talker_options(talker), "--prefill-step", "4")
    terminal.say("first")
    terminal.wait_until(lambda: saved(folder).tokens)
    terminal.wait_for_prompt()
    (folder / "a.txt").write_text("many words " * 380)
    terminal.say(f"/file {folder / 'a.txt'}")
    terminal.wait_for("these files go with the next message")
    terminal.wait_for_prompt()
    terminal.say("what is this?")
    terminal.wait_for(r"^reading [1-9][\d,]* of [\d,]+ tokens")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped before the answer: the message is taken back")
    terminal.wait_for("^> what is this\\?$")
    terminal.wait_for("attached: 1")
    assert texts(folder) == ["first"]
    terminal.type(CTRL_C)
    terminal.wait_for_prompt()
    terminal.say("/file -")
    terminal.wait_for("no file goes with the next message")
    terminal.wait_for_prompt()
    terminal.say("second")
    terminal.wait_until(lambda: len(saved(folder).turns) == 2 and saved(folder).turns[1].answer)
    assert texts(folder) == ["first", "second"]


@pytest.mark.slow
def test_ctrl_c_in_an_answer_keeps_what_was_said(start, talker, folder) -> None:
    terminal = start(*talker_options(talker, 3500))
    terminal.say("first")
    terminal.wait_for(r"^Ctrl-C stops · [\d.]+ tok/s · [1-9]\d\d of 4,096 tokens \(\d+%\) · ")
    terminal.type(CTRL_C)
    terminal.wait_for(r"\[stopped\]")
    terminal.wait_for_prompt()
    said = saved(folder).turns[0].answer
    assert len(said) > 10
    terminal.say("/set max_tokens 5")
    terminal.wait_for("max_tokens +5")
    terminal.wait_for_prompt()
    terminal.say("second")
    terminal.wait_for("cut after 5 tokens")
    assert saved(folder).turns[0].answer == said and texts(folder) == ["first", "second"]


@pytest.mark.slow
def test_ctrl_c_at_the_prompt(start, talker) -> None:
    terminal = start(*talker_options(talker))
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.type(CTRL_C)
    terminal.wait_for_prompt()
    terminal.type(CTRL_C)
    terminal.wait_for(r"\(Ctrl-C again, Ctrl-D or /exit ends the chat\)")
    terminal.wait_for_prompt()
    terminal.say("/stats")
    terminal.wait_for("^session ")
    terminal.wait_for_prompt()
    terminal.type(CTRL_C)
    terminal.wait_until(lambda: terminal.text.count("Ctrl-C again") == 2)
    terminal.wait_for_prompt()
    terminal.type(CTRL_C)
    assert terminal.wait_for_end() == 0


# ------------------------------------------------------------------------------------- going back
@pytest.mark.slow
def test_undo_retry_edit_and_save(start, folder, talker) -> None:
    terminal = start(*talker_options(talker, 8), "--temp", "1.5")
    for number in range(1, 6):
        terminal.say(f"message {number}")
        terminal.wait_until(lambda number=number: len(_answered(folder)) == number, 60)
        terminal.wait_for_prompt()
    terminal.say("/undo")
    terminal.wait_for("taken back: message 5")
    terminal.wait_for_prompt()
    assert texts(folder) == [f"message {number}" for number in range(1, 5)]

    before = _answered(folder)
    terminal.say("/retry")
    # (Read in two moments, the file might be another.)
    terminal.wait_until(lambda: len(now := _answered(folder)) == 4 and now != before)
    terminal.wait_for_prompt()
    after = _answered(folder)
    assert after[:3] == before[:3] and after[3] != before[3], "another seed, another answer"

    terminal.say("/edit 2")
    terminal.wait_for("^> message 2$")
    terminal.say(" in other words")
    terminal.wait_until(lambda: texts(folder) == ["message 1", "message 2 in other words"])
    terminal.wait_until(lambda: len(_answered(folder)) == 2)
    assert _answered(folder)[0] == before[0]
    terminal.wait_for_prompt()

    terminal.say("/save five turns")
    terminal.wait_for("Error: a session's name must be")
    terminal.wait_for_prompt()
    terminal.say("/save kept")
    terminal.wait_for("saved as kept")
    terminal.wait_for_prompt()
    terminal.say("/reset")
    terminal.wait_for("a new conversation; the last one stays as kept")
    terminal.wait_for_prompt()
    terminal.say("/sessions")
    terminal.wait_for(r"^kept .* 2 turns +\d+ tokens +\d+ kB  message 1")
    terminal.wait_for_prompt()
    terminal.say("/load kept")
    terminal.wait_for(r"kept: 2 turns, \d+ of 4,096 tokens")
    terminal.wait_for("^> message 2 in other words$")


def _answered(folder: Path) -> list[str]:
    return [turn.answer for turn in saved(folder).turns if turn.replies]


@pytest.mark.slow
def test_killed_in_an_answer_the_chat_resumes(start, folder, talker) -> None:
    terminal = start(*talker_options(talker, 3000))
    terminal.paste("a beginning of many words " * 40)
    terminal.type(ENTER)
    terminal.wait_for("^Ctrl-C stops")
    terminal.type(CTRL_C)
    terminal.wait_for(r"\[stopped\]")
    terminal.wait_for_prompt()
    answer = saved(folder).turns[0].answer
    terminal.say("and then?")
    terminal.wait_until(lambda: terminal.screen.display and len(saved(folder).turns) == 2)
    terminal.wait_for("^Ctrl-C stops")
    os.kill(terminal.pid, signal.SIGKILL)

    again = Terminal("chat", "--sessions", folder, *talker_options(talker, 6), "--resume")
    again.wait_for("2 turns")
    again.wait_for("this has no answer yet: /retry answers it")
    again.wait_for_prompt()
    conversation = saved(folder)
    assert conversation.is_unanswered and conversation.turns[0].answer == answer
    again.say("/retry")
    again.wait_for("cut after 6 tokens")
    again.wait_for_prompt()
    again.say("/stats")
    kept = int(again.wait_for(r"prompt [\d,]+ tokens \(([\d,]+) kept").group(1).replace(",", ""))
    assert kept > 200, "what was read before is not read again"
    again.close()


# ------------------------------------------------------------------------------------------- tools
TOOLS = '''
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    with open({log!r}, "a") as log:
        log.write(city + "\\n")
    return "sunny, 24 degrees"
'''


@pytest.mark.slow
def test_a_tool_is_called_with_consent_and_not_without(start, folder, tmp_path) -> None:
    log = tmp_path / "log"
    (tmp_path / "weather.py").write_text(TOOLS.format(log=str(log)))
    terminal = start("--tools", tmp_path / "weather.py")
    terminal.say("What is the weather in Paris?")
    terminal.wait_for(r'Allow get_weather\(\{"city": "Paris"\}\)\? \[y/N/a\]')
    assert not log.exists()
    terminal.say("y")
    terminal.wait_for("get_weather -> sunny, 24 degrees")
    terminal.wait_for(r"^The weather in Paris is sunny, 24 degrees\.$")
    terminal.wait_for_prompt()
    assert log.read_text() == "Paris\n"
    assert "<|" not in terminal.text
    terminal.say("What is the weather in Rome?")
    terminal.wait_for(r"Allow get_weather\(.*Rome.*\[y/N/a\]")
    terminal.say("")
    terminal.wait_for_prompt()
    replies = saved(folder).turns[1].replies
    assert [reply["role"] for reply in replies] == ["assistant", "tool", "assistant"]
    assert replies[1]["content"] == "The user did not allow this call."
    terminal.say("What is the weather in Oslo?")
    terminal.wait_for(r"Allow get_weather\(.*Oslo.*\[y/N/a\]")
    terminal.type(CTRL_C)
    terminal.wait_for(r"\[stopped\]")
    terminal.wait_for_prompt()
    assert [reply["role"] for reply in saved(folder).turns[2].replies] == ["assistant", "tool"]
    assert log.read_text() == "Paris\n", "only what was allowed has run"
    terminal.say("What is the weather in Rome?")
    terminal.wait_until(lambda: terminal.text.count('Rome"})? [y/N/a]') == 2)
    terminal.say("a")
    terminal.wait_for_prompt()
    terminal.say("What is the weather in Paris?")
    terminal.wait_until(lambda: terminal.text.count("Paris is sunny") == 2)
    assert log.read_text() == "Paris\nRome\nParis\n", "and not asked for again"


def test_a_call_where_there_are_no_tools_is_answered_with_that(loaded, tmp_path) -> None:
    """A model may write one all the same."""
    chat = Chat(*loaded, sessions=Sessions(tmp_path), fingerprint={}, options={}, autosave=False)
    loop = Loop(chat, PlainScreen(), PipedLines())
    assert loop._result(Call("functions.add:0", "{}", True)) == "error: there are no tools here"


# ------------------------------------------------------------------------------------------ safety
@pytest.mark.slow
def test_a_session_full_of_escape_codes_writes_none_to_the_terminal(start, folder, talker) -> None:
    evil = "\x1b]0;owned\x07 \x1b[2J \x9b31m \u202egnirts"
    session = Session(folder / "evil", {}).open()
    turn = Turn(evil, ({"role": "assistant", "content": evil},), 5)
    session.save(Conversation(evil, [turn, turn]))
    session.close()
    terminal = start(*talker_options(talker), "--resume", "evil")
    for command in ("/system", "/sessions", "/undo"):
        terminal.say(command)
        terminal.wait_for_prompt()
    terminal.read(0.3)
    for code in (b"\x1b]0;", b"\x1b[2J", "\x9b".encode(), "\u202e".encode()):
        assert code not in terminal.raw
    assert "owned" in terminal.text


# ------------------------------------------------------------------------------- files, clipboard
@pytest.mark.slow
def test_files_go_with_a_message_and_answers_to_the_clipboard(start, folder, tmp_path) -> None:
    (tmp_path / "notes.md").write_text("```\nThe code is 1234.\n```\n<|im_end|>")
    terminal = start(SSH_TTY="/dev/pts/0", columns=160)  # so that no long path wraps
    terminal.say(f"/file {tmp_path / 'lost.md'}")
    terminal.wait_for(r"lost.md: no\s+such file")
    terminal.wait_for_prompt()
    terminal.type(f"/file {tmp_path / 'no'}")
    terminal.wait_for(r"^ *notes\.md")  # the menu
    terminal.type(TAB)
    terminal.wait_for(r"/notes\.md")
    terminal.say("")
    terminal.wait_for("these files go with the next message")
    terminal.wait_for_prompt()
    terminal.say("What is 2 + 3?")
    terminal.wait_until(lambda: len(_answered(folder)) == 1)
    terminal.wait_for_prompt()
    assert texts(folder) == [
        "notes.md:\n````\n```\nThe code is 1234.\n```\n<|im_end|>\n````\n\nWhat is 2 + 3?"
    ]
    terminal.say("/copy")
    terminal.wait_for("sent to the terminal's clipboard")
    answer = saved(folder).turns[0].answer
    assert b"\x1b]52;c;" + base64.b64encode(answer.encode()) + b"\x07" in terminal.raw


@pytest.mark.slow
def test_a_full_context_is_said_with_what_can_be_done(start, talker, folder) -> None:
    message = "abc " * 1300
    used = len(load_tokenizer(talker).encode(message))
    assert 3800 < used < 4000
    terminal = start(*talker_options(talker, 5000))
    terminal.paste(message)
    terminal.type(ENTER)
    terminal.wait_for(r"\[the context is full, 4,09\d of 4,096 tokens \(100%\): /undo")
    terminal.wait_for_prompt()
    terminal.say("more")
    terminal.wait_for("Error: the prompt has [0-9,]+ tokens but the model's context")
    terminal.wait_for("/undo takes back the last message, /edit N shortens")
    terminal.wait_for("^> more$")
    assert texts(folder) == [message], "nothing is lost, and nothing is cut"


# ----------------------------------------------------------------------------------------- a pipe
@pytest.mark.slow
def test_markdown_may_be_off(start, talker) -> None:
    terminal = start("--no-markdown", *talker_options(talker, 12))
    terminal.say("first")
    terminal.wait_for("cut after 12 tokens")
    assert b"\x1b[?2026h" not in terminal.raw, "text comes as it is, and nothing is drawn again"
    terminal.wait_for_prompt()
    terminal.say("/set markdown on")
    terminal.wait_for("max_tokens +12")
    terminal.wait_for_prompt()
    terminal.say("second")
    terminal.wait_until(lambda: terminal.text.count("cut after 12 tokens") == 2)
    assert b"\x1b[?2026h" in terminal.raw


def piped(talker: Path, folder: Path, stdin: bytes, *options: str) -> subprocess.CompletedProcess:
    return run("chat", "--sessions", folder, *talker_options(talker, 4), *options, stdin=stdin)


@pytest.mark.slow
def test_in_a_pipe_each_line_is_answered_on_stdout_alone(talker: Path, folder: Path) -> None:
    done = piped(talker, folder, b"one\n\nbad \xff\ntwo\n/stats\n/nothing\n")
    assert done.returncode == 0
    assert done.stderr.count(b"answer 4 tokens") == 3  # /stats repeats the last
    assert done.stderr.count(b"Error: the message is not UTF-8") == 1
    assert b"there is no command /nothing" in done.stderr
    alone = run("generate", "--model", talker, "--max-tokens", "4", "one", stdin=b"")
    assert done.stdout.startswith(alone.stdout)
    assert not folder.exists(), "nothing is kept without /save NAME"


@pytest.mark.slow
def test_a_pipe_can_save_and_resume(talker: Path, folder: Path) -> None:
    assert piped(talker, folder, b"one\n/save mine\ntwo\n").returncode == 0
    before = files_in(folder / "mine")
    done = piped(talker, folder, b"three\n", "--resume", "mine")
    assert b"mine: 2 turns" in done.stderr and b"kept)" in done.stderr
    assert files_in(folder / "mine") == before, "nothing is kept without /save"
    piped(talker, folder, b"three\n/save\nfour\n", "--resume", "mine")
    texts = ["one", "two", "three", "four"]
    assert [turn.text for turn in saved(folder, "mine").turns] == texts
    piped(talker, folder, b"five\n/save other\n", "--resume", "mine")
    assert [turn.text for turn in saved(folder, "mine").turns] == texts
    assert [turn.text for turn in saved(folder, "other").turns] == [*texts, "five"]


def files_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What a folder holds, and when it was written."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_a_session_beyond_the_budget_is_refused_before_a_model_is_loaded(
    talker: Path, loaded, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same, options = fingerprint(talker, None), {"max_tokens": 4}
    talk = Chat(
        *loaded, sessions=Sessions(folder), fingerprint=same, options=options, autosave=False
    )
    talk.say("one")
    list(talk.answer())
    talk.save_as("mine")
    talk.session.close()
    monkeypatch.setattr(chat, "load_here", None)
    where = ["--model", str(talker), "--sessions", str(folder), "--resume", "mine"]
    small = ["--memory-budget", "8GB", "--context", "9"]
    result = CliRunner().invoke(COMMANDS["chat"], [*where, *small])
    assert re.fullmatch(
        r"--context must be more than the \d\d tokens of the session mine but is 9",
        str(result.exception),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--resume", "lost"), 1, "there is no session lost"),
        (("--resume",), 1, "there are no sessions in"),
        (("--resume", "x", "--system", "s"), 2, "--resume goes on"),
        (("--tools", "lost.py"), 1, "lost.py: cannot be read: No such file"),
    ],
)
def test_a_mistake_is_one_clear_line(talker, folder, options, code, said) -> None:
    done = piped(talker, folder, b"", *options)
    assert done.returncode == code and done.stdout == b""
    assert said in done.stderr.decode() and b"Traceback" not in done.stderr


@pytest.mark.slow
def test_json_lines_of_a_session_are_plain(talker: Path, folder: Path) -> None:
    """What is stored can be read by any program."""
    piped(talker, folder, "héllo\n/save mine\n".encode())
    lines = (folder / "mine" / "chat.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][1][1]["turns"][0]["text"] == "héllo"
