"""What was said, turn by turn. Knows no model and no terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_kimi.errors import KimiError

BETWEEN = "\n\n"  # the parts of a message
Message = dict[str, Any]  # role, content, and for tools: tool_calls, tool_call_id, name


@dataclass
class Turn:
    """A user's message and all that followed it: answers, calls of tools and their results."""

    text: str
    replies: list[Message] = field(default_factory=list)
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
    def messages(self) -> list[Message]:
        """In the form that chat templates take."""
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*opening, *(message for turn in self.turns for message in turn.messages)]

    @property
    def tokens(self) -> int:
        """Of the conversation so far; a turn without an answer is not counted."""
        return max((turn.tokens for turn in self.turns), default=0)

    @property
    def is_unanswered(self) -> bool:
        return bool(self.turns) and not self.turns[-1].replies

    def say(self, text: str) -> None:
        """Begin a turn, or go on with the message that has no answer yet."""
        if self.is_unanswered:
            self.turns[-1] = Turn(self.turns[-1].text + BETWEEN + text.lstrip())
        else:
            self.turns.append(Turn(text))

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


def read_turn(line: Mapping[str, Any]) -> Turn:
    """A turn from a session's file.

    Raises:
        ValueError: it has not the form of one.
    """
    text, replies, tokens = line["text"], line["replies"], line["tokens"]
    right = isinstance(text, str) and isinstance(replies, list) and isinstance(tokens, int)
    if not right or not all(map(_is_reply, replies)):
        raise ValueError("not a turn")
    return Turn(text, replies, tokens)


def _is_reply(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("assistant", "tool")
        and isinstance(message.get("content"), str)
    )
