"""The prompt of a conversation: only turns that are new or changed are rendered and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from mlx_kimi.chat.conversation import Conversation, Turn, same_turns
from mlx_kimi.text.chat_text import ChatText
from mlx_kimi.text.tokenizer import Tokenizer


class ChatPrompt:
    """The ids that `Tokenizer.apply_chat_template` gives for a conversation's messages.

    Attributes:
        tools: schemas, for the chat template.
    """

    def __init__(self, tokenizer: Tokenizer, tools: list[dict[str, Any]] | None) -> None:
        self.tools = tools
        self._text = ChatText(tokenizer, tools)
        self._system: str | None = None
        self._turns: list[Turn] = []  # of the call before
        self._ends: list[int] = []  # how many messages stand before its turns, and before each end

    def ids(self, conversation: Conversation) -> Sequence[int]:
        """Of its messages, and what a template writes before an answer.

        Raises:
            KimiError: the template refuses them.
        """
        turns, before = conversation.turns, self._turns
        ends, self._ends = self._ends, []  # which is right whatever ends this
        if not ends or conversation.system != self._system:
            opening = conversation.opening
            kept, same, ends = 0, 0, [len(opening)]
        else:
            opening, same = [], same_turns(before, turns)
            kept = ends[same]
        new = [turn.messages for turn in turns[same:]]
        ids = self._text.ids(kept, [*opening, *(each for group in new for each in group)])
        self._system, self._turns = conversation.system, list(turns)
        self._ends = [*ends[:same], *accumulate(map(len, new), initial=ends[same])]
        return ids
