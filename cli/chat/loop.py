"""The conversation's loop: read a message or a command, answer it, until the user leaves."""

from __future__ import annotations

import json

import mlx.core as mx

from mlx_kimi.chat.chat import Chat
from mlx_kimi.chat.tool_calls import Call
from mlx_kimi.cli import show
from mlx_kimi.cli.chat.commands import is_command, run_command
from mlx_kimi.cli.chat.file import Attachment
from mlx_kimi.cli.chat.input import Consent, Input
from mlx_kimi.cli.chat.screen import Screen, TerminalScreen
from mlx_kimi.cli.listed import opening
from mlx_kimi.cli.options import check_utf8
from mlx_kimi.errors import ContextFull, GpuLost, KimiError, in_words
from mlx_kimi.generation.answer import Stats
from mlx_kimi.units import counted, human_size

ROUNDS = 8  # answers in a row that may call tools, before the user is asked to go on
DENIED = "The user did not allow this call."
NO_TOOLS = "error: there are no tools here"
STOPPED = "The user stopped this call."
CALL_SHOWN, RESULT_SHOWN = 2000, 200  # characters
FULL = (
    "/undo takes back the last message, /edit N shortens message N, /reset begins anew; "
    "what was said stays saved"
)


class Loop:
    """A conversation between the user and the model; commands act on it.

    Attributes:
        attached: files that go with the next message.
        stats: of the last answer.
    """

    def __init__(self, chat: Chat, screen: Screen, input: Input) -> None:
        self.chat, self.screen, self.input = chat, screen, input
        self.attached: list[Attachment] = []
        self._draft = ""  # stands at the next prompt, to be changed
        self.stats: Stats | None = None
        self.is_over = False
        self._allowed: set[str] = set()  # functions that run without being asked for

    def run(self) -> None:
        """Talk until the user leaves."""
        while not self.is_over:
            try:
                draft, self._draft = self._draft, ""
                text = self.input.read(draft)
                if text is None:
                    break
                self._handle(text)
            except GpuLost:  # what was said is saved
                raise
            except KimiError as error:
                self.screen.error(str(error))
                if isinstance(error, ContextFull):
                    self.screen.note(FULL)
            except (OSError, ValueError, RuntimeError) as error:
                # What paths, disks and MLX say of what was asked for: a conversation goes on.
                self.screen.error(in_words(error))
            except KeyboardInterrupt:
                self.screen.note("[stopped]")
            if self.chat.unsaved:
                self.screen.error(self.chat.unsaved)
            self._say_what_went()
        self.chat.close()
        self._say_what_went()

    def _say_what_went(self) -> None:
        """Name the autosaved sessions that were deleted for room."""
        if self.chat.removed:
            limit = human_size(self.chat.autosave_limit)
            self.screen.note(
                f"autosaved sessions may take {limit} (--autosave-limit): the oldest are deleted, "
                f"{', '.join(self.chat.removed)}; /save NAME keeps a session"
            )
        self.chat.removed = []

    def resume(self, name: str) -> None:
        """Go on with a session, and show how it ended."""
        notes = self.chat.load(name)
        conversation = self.chat.conversation
        assert self.chat.session
        self.screen.note(
            f"{self.chat.session.name}: {counted(len(conversation.turns), 'turn')}, {self.used()}"
        )
        for note in notes:
            self.screen.note(note)
        for turn in conversation.turns[-1:]:
            self.screen.note(f"> {opening(turn.text)}")
            self.screen.said(turn.answer)
        if conversation.is_unanswered:
            self.screen.note(
                "this has no answer yet: /retry answers it, and a message goes on with it"
            )

    def respond(self, restored: str, draft: str = "") -> None:
        """Let the model answer, call tools, and answer again.

        Args:
            restored: what is said if that ends before the first token, and all is as before.
            draft: then stands at the next prompt.
        """
        for _ in range(ROUNDS):
            try:
                self._answer(restored)
            finally:
                if self.chat.withdrawn:
                    self._draft = draft
            if not self.chat.pending:
                return
            try:
                for call in list(self.chat.pending):
                    self.chat.tool_result(call, self._result(call))
            except KeyboardInterrupt:
                for call in list(self.chat.pending):  # each call has a result, come what may
                    self.chat.tool_result(call, STOPPED)
                raise
            finally:
                self.chat.save()
        self.screen.note(f"[stopped after {ROUNDS} rounds of calls; a message goes on]")

    def used(self) -> str:
        """How much of the context is used, in words."""
        limit = self.chat.model.config.model_max_length
        return _share(self.chat.conversation.tokens, limit)

    def set_markdown(self, value: str) -> None:
        """Turn formatting on or off."""
        if value not in ("on", "off"):
            raise KimiError(f"markdown must be on or off but is {value!r}")
        if isinstance(self.screen, TerminalScreen):
            self.screen.markdown = value == "on"

    def _handle(self, text: str) -> None:
        check_utf8("the message", text)
        if is_command(text):
            run_command(self, text)
        elif text.strip():
            attached, self.attached = self.attached, []
            self.chat.say("\n\n".join([*(one.text for one in attached), text]))
            try:
                self.respond("the message is taken back", text)
            finally:
                if self.chat.withdrawn and self.input.takes_back:
                    self.attached = attached

    def leave_all(self) -> str:
        """Another conversation begins, without files and consent. What to say of the files."""
        left, self.attached = len(self.attached), []
        self._allowed.clear()
        return f"; files that were attached are not: {left}" if left else ""

    def _answer(self, restored: str) -> None:
        try:
            self.stats = self.screen.answer(self.chat.answer) or self.stats
        except KeyboardInterrupt:
            self.chat.withdraw()  # if it came before the answer began
            is_back = self.chat.withdrawn
            self.screen.note(f"[stopped before the answer: {restored}]" if is_back else "[stopped]")
            self.chat.pending = []
            return
        self._explain_end()

    def _explain_end(self) -> None:
        """Say why an answer ended before its end."""
        chat, stats = self.chat, self.stats
        limit = chat.options["max_tokens"]
        if chat.cut:
            self.screen.note(f"[a call of {chat.cut} was cut off: it is left out]")
        if stats is None or chat.ended != "length":
            return
        if stats.prompt_tokens + stats.generated_tokens >= chat.model.config.model_max_length:
            self.screen.note(f"[the context is full, {self.used()}: {FULL}]")
        else:
            self.screen.note(
                f"[cut after {counted(limit, 'token')}; /set max_tokens N allows more]"
            )

    def _result(self, call: Call) -> str:
        """Ask the user, and run the function if it is allowed."""
        if self.chat.toolbox is None:
            return NO_TOOLS
        shown = show.one_line(f"{call.name}({_canonical(call.arguments)})", CALL_SHOWN)
        if call.name not in self._allowed:
            consent = self.input.consents(f"Allow {shown}?")
            if not consent:
                return DENIED
            if consent is Consent.ALWAYS:
                self._allowed.add(call.name)
        result = self.chat.toolbox.run(call)
        self.screen.note(show.one_line(f"{call.name} -> {result}", RESULT_SHOWN))
        return result


def _canonical(arguments: str) -> str:
    """A call's arguments as we write them, on one line; as they came if they are no JSON."""
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments


def _share(tokens: int, limit: int) -> str:
    return f"{tokens:,} of {limit:,} tokens ({tokens / limit:.0%})"


def toolbar(loop: Loop) -> str:
    """The line below the prompt."""
    parts = [f"attached: {len(loop.attached)}"] if loop.attached else []
    parts.append(loop.used())
    if loop.stats:
        parts += show.speed(loop.stats.generation_speed)
    parts.append(f"{human_size(mx.get_active_memory())} memory")
    parts.append(f"{human_size(loop.chat.state.snapshot_bytes)} snapshots")
    return " · ".join(parts)


def status(chat: Chat, stats: Stats) -> str:
    """The line below an answer that is being written."""
    limit = chat.model.config.model_max_length
    used = _share(stats.prompt_tokens + stats.generated_tokens, limit)
    memory = f"{human_size(mx.get_active_memory())} memory"
    return " · ".join(["Ctrl-C stops", *show.speed(stats.generation_speed), used, memory])
