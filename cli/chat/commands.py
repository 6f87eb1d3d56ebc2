"""The commands of a chat. An argument is the text after the command's name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_kimi.chat.sessions import is_automatic
from mlx_kimi.cli import show
from mlx_kimi.cli.chat import settings
from mlx_kimi.cli.chat.clipboard import copy
from mlx_kimi.cli.chat.file import attachment
from mlx_kimi.cli.listed import lines_of, opening
from mlx_kimi.errors import KimiError
from mlx_kimi.model import cache as caches
from mlx_kimi.units import counted, human_size

if TYPE_CHECKING:
    from mlx_kimi.cli.chat.loop import Loop

COMMAND = re.compile(r"/[a-zA-Z]*(?=\s|$)")  # /etc/hosts is none


@dataclass(frozen=True)
class Command:
    """`run` gets the argument. `takes` and `does` are for /help."""

    run: Callable[[Loop, str], None]
    takes: str
    does: str


def is_command(text: str) -> bool:
    """Whether a message is for the program; one that begins with a space never is."""
    return COMMAND.match(text) is not None


def run_command(loop: Loop, text: str) -> None:
    """Do what a command says.

    Raises:
        KimiError: there is no such command, or it cannot be done.
    """
    name = text[1:].split(maxsplit=1)[0] if text[1:].strip() else ""
    argument = text[1 + len(name) :].strip()
    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, n=1)
        guess = f"did you mean /{nearest[0]}? " if nearest else ""
        raise KimiError(
            f"there is no command /{name}: {guess}/help lists them all, and a message that begins "
            f"so is sent with a space before it"
        )
    COMMANDS[name].run(loop, argument)


KEYS = {
    "Enter": "send",
    "Alt-Enter, Ctrl-J": "break the line",
    "Up, Ctrl-R": "what was typed before; search it",
    "Tab": "complete a command",
    "Ctrl-X Ctrl-E": "write in your editor",
    "Ctrl-C": "stop an answer; drop a line",
    "Ctrl-D": "leave",
}


def show_help(loop: Loop, argument: str) -> None:
    loop.screen.pairs({f"/{name} {one.takes}": one.does for name, one in COMMANDS.items()})
    loop.screen.note("")
    loop.screen.pairs(KEYS)


def show_messages(loop: Loop, argument: str) -> None:
    turns = loop.chat.conversation.turns
    if not argument:
        lines = [f"{number:>3}  {opening(turn.text)}" for number, turn in enumerate(turns, 1)]
        loop.screen.note("\n".join(lines) or "nothing has been said yet")
        return
    if not (argument.isdecimal() and len(argument) < 10):
        raise KimiError(f"/show takes a message's number, but was given {argument!r}")
    turn = loop.chat.conversation.turn(int(argument))
    loop.screen.note(f"> {turn.text}")
    loop.screen.said(turn.answer)


def system(loop: Loop, argument: str) -> None:
    if not argument:
        loop.screen.note(loop.chat.conversation.system or "there is no system message")
        return
    loop.chat.set_system(None if argument == "-" else argument)
    loop.screen.note("the conversation opens anew: it is read again with the next message")


def undo(loop: Loop, argument: str) -> None:
    loop.screen.note(f"taken back: {opening(loop.chat.undo())}")


def retry(loop: Loop, argument: str) -> None:
    chat = loop.chat
    if not chat.options["temp"] and not chat.conversation.is_unanswered:
        loop.screen.note(
            "at temperature 0 the likeliest answer is given every time, so this is the same one; "
            "/set temp 0.6 draws others"
        )
    chat.retry()
    loop.respond("the answer before is back")


def edit(loop: Loop, argument: str) -> None:
    digits, _, rest = argument.partition(" ")
    turns = loop.chat.conversation.turns
    is_number = digits.isdecimal() and len(digits) < 10
    number, text = (int(digits), rest) if is_number else (len(turns), argument)
    before = loop.chat.conversation.turn(number).text
    new = text or loop.input.read(before)
    if new is None or not new.strip() or new == before:
        loop.screen.note("nothing is changed")
        return
    loop.chat.edit(number, new)
    loop.respond("the message and what followed are as before", f"/edit {number} {new}")


def reset(loop: Loop, argument: str) -> None:
    kept = loop.chat.session
    loop.chat.reset()
    stays = f"; the last one stays as {loop.chat.sessions.called(kept.folder)}" if kept else ""
    loop.screen.note(f"a new conversation{stays}{loop.leave_all()}")


def save(loop: Loop, argument: str) -> None:
    if argument:
        loop.chat.save_as(argument)
    else:
        loop.chat.keep()
    if loop.chat.session and not loop.chat.unsaved:
        name = loop.chat.sessions.called(loop.chat.session.folder)
        may_go = "; without a name it goes when autosaved sessions take too much of the disk"
        is_named = bool(argument) or not is_automatic(loop.chat.session.folder)
        loop.screen.note(f"saved as {name}{'' if is_named else may_go}")


def load(loop: Loop, argument: str) -> None:
    if not argument:
        raise KimiError("/load needs the name of a session; /sessions lists them")
    loop.resume(argument)
    loop.leave_all()


def sessions(loop: Loop, argument: str) -> None:
    loop.screen.note("\n".join(lines_of(loop.chat.sessions.list())) or "there are no sessions yet")


def stats(loop: Loop, argument: str) -> None:
    chat, last = loop.chat, loop.stats
    state = chat.state
    cache = sum(array.nbytes for array in caches.arrays(state.entries))
    snapshots = counted(len(state.snapshots), "snapshot")
    kept = chat.session if chat.is_kept else None
    lines = [
        f"context    {loop.used()}",
        f"state      {human_size(cache)}, and {snapshots} to go back to: "
        f"{human_size(state.snapshot_bytes)} of at most {human_size(state.snapshot_memory)}",
        f"memory     {human_size(mx.get_active_memory())} now, "
        f"{human_size(mx.get_peak_memory())} at most",
        f"session    {chat.sessions.called(kept.folder) if kept else 'not kept'}",
    ]
    if last:
        parts = show.speeds(last).split(" | ")
        lines += [f"{'last' if part is parts[0] else '':<10} {part}" for part in parts]
    loop.screen.note("\n".join(lines))


def set_option(loop: Loop, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if name == settings.MARKDOWN:
        loop.set_markdown(value.strip())
    elif name:
        loop.chat.options = settings.changed(loop.chat.options, name, value.strip())
    loop.screen.note(settings.shown(loop.chat.options))


def file(loop: Loop, argument: str) -> None:
    if argument == "-":
        loop.attached = []
    elif argument:
        loop.attached.append(attachment(argument))
    lines = [f"{len(one.text):>9,} characters  {one.path}" for one in loop.attached]
    head = "these files go with the next message; /file - detaches them"
    loop.screen.note("\n".join([head, *lines]) if lines else "no file goes with the next message")


def copy_answer(loop: Loop, argument: str) -> None:
    turns = loop.chat.conversation.turns
    if not turns or not turns[-1].answer:
        raise KimiError("there is no answer to copy")
    loop.screen.note(f"the last answer is {copy(turns[-1].answer)}")


def leave(loop: Loop, argument: str) -> None:
    loop.is_over = True


COMMANDS = {
    "help": Command(show_help, "", "this list"),
    "system": Command(system, "[TEXT|-]", "show, set or remove the system message"),
    "show": Command(show_messages, "[N]", "list the messages by number, or show message N"),
    "undo": Command(undo, "", "take back the last message and its answer"),
    "retry": Command(retry, "", "answer the last message again, with another seed"),
    "edit": Command(edit, "[N] [TEXT]", "change message N, or the last, and go on from there"),
    "reset": Command(reset, "", "begin a new conversation; this one stays saved"),
    "save": Command(save, "[NAME]", "keep the conversation under a name"),
    "load": Command(load, "NAME", "go on with a saved conversation"),
    "sessions": Command(sessions, "", "list what is saved"),
    "stats": Command(stats, "", "context, memory and speeds"),
    "set": Command(set_option, "[NAME VALUE]", "show or change sampling, max_tokens, markdown"),
    "file": Command(file, "[PATH|-]", "put a file into the next message, list or detach them"),
    "copy": Command(copy_answer, "", "copy the last answer to the clipboard"),
    "exit": Command(leave, "", "leave, as Ctrl-D does"),
}
