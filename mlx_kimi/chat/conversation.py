"""What was said, turn by turn. Knows no model and no terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import is_not
from typing import Any

from mlx_kimi.errors import KimiError

BETWEEN = "\n\n"  # the parts of a message
Message = dict[str, Any]  # role, content, and for tools: tool_calls, tool_call_id, name


@dataclass(frozen=True)
class Turn:
    """A user's message and all that followed it: answers, calls of tools and their results.

    It never changes, nor does a message: what goes on is another turn.
    """

    text: str
    replies: tuple[Message, ...] = ()
    tokens: int = 0  # of the conversation up to the end of this turn

    @property
    def answer(self) -> str:
        """What the model said last."""
        said = [reply["content"] for reply in self.replies if reply["role"] == "assistant"]
        return said[-1] if said else ""

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.text}, *self.replies]


@dataclass
class Conversation:
    """A system message, if any, and turns. The last turn may still be without an answer."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def opening(self) -> list[Message]:
        """The system message, if any."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    @property
    def messages(self) -> list[Message]:
        """In the form that chat templates take."""
        return [*self.opening, *(message for turn in self.turns for message in turn.messages)]

    @property
    def tokens(self) -> int:
        """Of the conversation so far; a turn without an answer is not counted."""
        return next((turn.tokens for turn in reversed(self.turns) if turn.tokens), 0)

    @property
    def is_unanswered(self) -> bool:
        return bool(self.turns) and not self.turns[-1].replies

    def say(self, text: str) -> None:
        """Begin a turn, or go on with the message that has no answer yet."""
        if self.is_unanswered:
            self.turns[-1] = Turn(self.turns[-1].text + BETWEEN + text.lstrip())
        else:
            self.turns.append(Turn(text))

    def reply(self, message: Message, tokens: int | None = None) -> None:
        """Add an answer, or a tool's result, to the last turn.

        Args:
            tokens: `Turn.tokens` with it; None leaves them.
        """
        turn = self.turns[-1]
        count = turn.tokens if tokens is None else tokens
        self.turns[-1] = replace(turn, replies=(*turn.replies, message), tokens=count)

    def undo(self) -> Turn:
        """Take back the last turn.

        Raises:
            KimiError: there is none.
        """
        self._check_begun()
        return self.turns.pop()

    def retry(self) -> None:
        """Take back what followed the last message.

        Raises:
            KimiError: there is no message.
        """
        self._check_begun()
        self.edit(len(self.turns), self.turns[-1].text)

    def edit(self, number: int, text: str) -> None:
        """Put another text in the place of message `number`, from 1, and forget what followed it.

        Raises:
            KimiError: there is no such message.
        """
        self.turn(number)
        self.turns[number - 1 :] = [Turn(text)]

    def turn(self, number: int) -> Turn:
        """The turn of message `number`, from 1."""
        self._check_begun()
        if not 1 <= number <= len(self.turns):
            raise KimiError(f"messages are numbered 1 to {len(self.turns)}, but {number} was given")
        return self.turns[number - 1]

    def _check_begun(self) -> None:
        if not self.turns:
            raise KimiError("nothing has been said yet")


def same_turns(first: Sequence[Turn], second: Sequence[Turn]) -> int:
    """How many turns two conversations begin with in common, by identity: not even texts are read.

    Others may be alike.
    """
    return [*map(is_not, first, second), True].index(True)


def read_turn(line: Mapping[str, Any]) -> Turn:
    """A turn from a session's file.

    Raises:
        ValueError: it has not the form of one.
    """
    text, replies, tokens = line["text"], line["replies"], line["tokens"]
    right = isinstance(text, str) and isinstance(replies, list) and isinstance(tokens, int)
    if not right or not all(map(_is_reply, replies)):
        raise ValueError("not a turn")
    return Turn(text, tuple(replies), tokens)


def _is_reply(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("assistant", "tool")
        and isinstance(message.get("content"), str)
    )
