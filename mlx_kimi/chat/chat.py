"""A conversation with a model: what is said, what has been read, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_kimi.chat.conversation import Conversation, Turn
from mlx_kimi.chat.prompt import ChatPrompt
from mlx_kimi.chat.session import Session
from mlx_kimi.chat.sessions import Sessions, is_automatic
from mlx_kimi.chat.tool_calls import Call, CallReader
from mlx_kimi.chat.tools import Toolbox
from mlx_kimi.defaults import AUTOSAVE_LIMIT, SNAPSHOT_MEMORY
from mlx_kimi.errors import KimiError
from mlx_kimi.generation.answer import Chunk, FinishReason
from mlx_kimi.generation.generate import PromptIds, stream_generate, text_ids
from mlx_kimi.generation.sample import later_seed
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import Tokenizer

STAYS = "a prompt cache stays as it is: what is said is kept elsewhere, or nowhere in a pipe"


class Chat:
    """Says, answers, takes back and keeps.

    Going back changes the text alone: `state` finds by the tokens of the next prompt which of
    its states is still true, and goes on from there.

    Attributes:
        options: of `stream_generate`: sampling, max_tokens, prefill_step.
        pending: calls of tools that the last answer asked for and that have no result yet.
        ended: why the last answer did; None if it was stopped.
        removed: names of autosaved sessions that went since the last answer, for more room.
        withdrawn: whether the last answer ended before its first token, and all is as it was.
        unsaved: why the conversation is not saved as it is; empty if it is.
        cut: the name of a call that was cut off in the last answer, and is not part of it.
        state: what of it the model has read.
        session: where it was read or is kept; None until something is said, or if nothing is kept.
    """

    def __init__(
        self,
        model: KimiLinear,
        tokenizer: Tokenizer,
        *,
        sessions: Sessions,
        fingerprint: Mapping[str, Any],
        options: Mapping[str, Any],
        autosave: bool = True,
        autosave_limit: int = AUTOSAVE_LIMIT,
        toolbox: Toolbox | None = None,
        latent_bits: int | None = None,
        snapshot_memory: int = SNAPSHOT_MEMORY,
    ) -> None:
        self.model, self.tokenizer, self.toolbox = model, tokenizer, toolbox
        self.sessions, self.fingerprint, self.autosave = sessions, dict(fingerprint), autosave
        self.autosave_limit = autosave_limit
        self.options = dict(options)
        self.latent_bits, self.snapshot_memory = latent_bits, snapshot_memory
        self.conversation, self.state = Conversation(), self._new_state()
        self.session: Session | None = None
        self.pending: list[Call] = []
        self.cut = self.unsaved = ""
        self.removed: list[str] = []
        self.withdrawn = False
        self.ended: FinishReason | None = None
        self._text = ChatPrompt(tokenizer, None)
        self._retries = 0
        self._before: list[Turn] = []  # the turns before the last message, retry or edit

    def _new_state(self) -> TokenState:
        return TokenState(self.model, self.latent_bits, snapshot_memory=self.snapshot_memory)

    # ------------------------------------------------------------------------------------ talking
    def say(self, text: str) -> None:
        """Add a message, and keep it before it is answered."""
        self._before = list(self.conversation.turns)
        self.conversation.say(text)
        self._turn_begins()

    def answer(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Chunk]:
        """Stream the answer to what was said last; stopped at any point, what was said is kept.

        Stopped before the first token, what asked for the answer is taken back: nothing is lost.

        Raises:
            KimiError: the conversation cannot be answered, as it is longer than the context.
        """
        reader, said, begun = CallReader(self.tokenizer), "", False
        self.pending, self.cut, self.ended, self.withdrawn = [], "", None, False
        try:
            for chunk in self._stream(progress):
                text = chunk.text if reader.in_text else ""  # a marker's own text was before it
                reader.add(chunk.token)
                said, begun, self.ended = said + text, True, chunk.finish_reason
                yield replace(chunk, text=text)
                if reader.is_finished:
                    break
        finally:
            if begun:
                self._record(said, reader.calls())
            else:
                self.withdraw()

    def _stream(self, progress: Callable[[int, int], None] | None) -> Iterator[Chunk]:
        return stream_generate(
            self.model,
            self.tokenizer,
            self._prompt(),
            tools=self.toolbox.schemas if self.toolbox else None,
            state=self.state,
            progress=progress,
            **{**self.options, "seed": self._seed()},
        )

    def tool_result(self, call: Call, result: str) -> None:
        """Answer a pending call."""
        self.pending.remove(call)
        self.conversation.reply(
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result}
        )

    def _record(self, said: str, calls: list[Call]) -> None:
        self.pending = [call for call in calls if call.is_whole]
        self.cut = next((call.name for call in calls if not call.is_whole), "")
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if self.pending:
            message["tool_calls"] = [call.message for call in self.pending]
        self.conversation.reply(message, tokens=len(self.state.ids))
        self._leave_what_stays_true()
        self.save()

    def _leave_what_stays_true(self) -> None:
        """Go back before an answer that its text would not give again, token by token.

        A model may spell a text with other tokens than the tokenizer does, and a stopped answer may
        end within a character. A state after such tokens would be stored, and never used.
        """
        try:
            self.state.rewind_to_prefix_of(self._prompt())
        except KimiError:  # the context is full: nothing can follow
            pass

    def _prompt(self) -> PromptIds:
        schemas = self.toolbox.schemas if self.toolbox else None
        if self._text.tools is not schemas:
            self._text = ChatPrompt(self.tokenizer, schemas)
        return text_ids(self.model, self.tokenizer, self._text.ids(self.conversation))

    def _seed(self) -> int | None:
        """A given seed makes answers reproducible; another try has another one all the same."""
        return later_seed(self.options.get("seed"), self._retries)

    # ----------------------------------------------------------------------------------- going back
    def undo(self) -> str:
        """Take back the last message and what followed; its text."""
        turn = self.conversation.undo()
        self._turn_begins()
        return turn.text

    def retry(self) -> None:
        """Take back what followed the last message, to be answered with another seed."""
        retries, self._before = self._retries + 1, list(self.conversation.turns)
        self.conversation.retry()
        self._turn_begins()
        self._retries = retries

    def edit(self, number: int, text: str) -> None:
        """Put `text` in the place of message `number` and take back what followed."""
        before = list(self.conversation.turns)
        self.conversation.edit(number, text)
        self._before = before
        self._turn_begins()

    def set_system(self, text: str | None) -> None:
        """Open the conversation with another system message, or none."""
        self.conversation.system = text
        self._turn_begins()

    def withdraw(self) -> None:
        """Go back before the last message, retry or edit, unless something was answered to it."""
        if self.conversation.is_unanswered and not self.withdrawn:
            self.conversation.turns, self.withdrawn = self._before, True
            self._save(None)

    def _turn_begins(self) -> None:
        self._retries, self.pending, self.withdrawn = 0, [], False
        self._save(None)

    # -------------------------------------------------------------------------------------- keeping
    @property
    def is_kept(self) -> bool:
        """Whether what is said goes into `session`: not in a pipe, nor into a prompt cache."""
        return self.session is not None and self.session.is_open

    def save(self) -> None:
        """Store text and state of a conversation that is kept."""
        self._save(self.state)

    def keep(self) -> None:
        """Store them in the session that was read, which is kept from now on.

        Raises:
            KimiError: there is none, it is a prompt cache, or another chat has changed it.
        """
        if self.session is None:
            raise KimiError("/save needs a name: nothing is kept of a chat in a pipe without one")
        if self.session.is_prompt_cache:
            raise KimiError(f"{self.session.name} is a prompt cache: /save needs another name")
        if not self.is_kept:
            self.session.open()
        self.save()

    def _save(self, state: TokenState | None) -> None:
        """A session is made when something has been said. A full disk ends no conversation."""
        self.unsaved = ""
        try:
            is_new = self.autosave and bool(self.conversation.turns) and not self.is_kept
            if is_new:
                self.session = self._in_new_folder(self.sessions.unused())
            if self.session and self.is_kept:
                self.session.save(self.conversation, state)
            if is_new:
                self._trim()
        except KimiError as error:
            self.unsaved = str(error)
            if state is not None:  # the states may be lost, with the GPU; the text is not
                self._save_text()

    def _trim(self) -> None:
        """Keep the bound on what autosaved sessions take; the present one is in use, and stays."""
        if self.autosave:
            self.removed += self.sessions.trim(self.autosave_limit)

    def close(self) -> None:
        """The conversation is over: let others open its session."""
        if self.session:
            self.session.close()
            self._trim()

    def _save_text(self) -> None:
        try:
            if self.session and self.is_kept:
                self.session.save(self.conversation)
        except KimiError as error:
            self.unsaved = str(error)

    def save_as(self, name: str) -> None:
        """Keep the conversation under a name, and go on there.

        Raises:
            KimiError: the name is taken, or no name.
        """
        if self.session and self.session.folder == self.sessions.path(name):
            return self.keep()
        folder = self.sessions.free(name)
        is_ours = self.session and self.is_kept and is_automatic(self.session.folder)
        if self.session and is_ours and folder.parent == self.session.folder.parent:
            self.session.rename(folder)
        else:
            self.session = self._in_new_folder(folder)
        self.save()

    def _in_new_folder(self, folder: Path) -> Session:
        """The present session goes on there, with what it has stored; its own folder stays."""
        if self.session is None:
            return Session(folder, self.fingerprint).open()
        new = self.session.fork(folder)
        self.session.close()
        return new

    def load(self, name: str) -> list[str]:
        """Go on with another session; what the user should know of it.

        Raises:
            KimiError: there is none, it cannot be read, or it is open elsewhere.
        """
        folder = self.sessions.existing(name)
        if self.session and self.session.folder == folder:
            return []
        session, state = Session(folder, self.fingerprint), self._new_state()
        conversation = session.load(state)
        if session.is_prompt_cache:
            session.notes.append(STAYS)
        elif self.autosave:
            session.open()
        self._switch(session, conversation, state)
        return session.notes

    def reset(self) -> None:
        """Begin a new conversation, with the same system message; the present one stays saved."""
        system = self.conversation.system
        self._switch(None, Conversation(system), self._new_state())

    def _switch(
        self, session: Session | None, conversation: Conversation, state: TokenState
    ) -> None:
        self.close()
        self.session, self.conversation, self.state = session, conversation, state
        self._retries, self.pending = 0, []
