"""Calls of tools in an answer, read by token id: text that spells a marker is never a call."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from mlx_kimi.text.tokenizer import Tokenizer

# Models of the family differ in the section's spelling.
SECTION_BEGIN = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
SECTION_END = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
CALL_BEGIN, ARGUMENT_BEGIN, CALL_END = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
ID = re.compile(r"(?:functions\.)?(?P<name>.+?)(?::\d+)?")


@dataclass(frozen=True)
class Call:
    """One call. `id` and `arguments` are verbatim, so that the next turn reads what was written."""

    id: str  # functions.NAME:INDEX
    arguments: str  # JSON, if the model wrote it well
    is_whole: bool  # not cut off, by the token limit or by Ctrl-C

    @property
    def name(self) -> str:
        found = ID.fullmatch(self.id.strip())
        return found["name"] if found else ""

    @property
    def message(self) -> dict[str, Any]:
        """As a part of an assistant's message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass
class _Draft:
    id: list[int] = field(default_factory=list)
    arguments: list[int] | None = None
    ended: bool = False

    def add(self, token: int) -> None:
        (self.id if self.arguments is None else self.arguments).append(token)


class CallReader:
    """Takes the tokens of an answer one by one.

    Attributes:
        in_text: the next token is text for the reader, not part of a call.
        is_finished: a section of calls has ended, and with it the answer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.control_tokens
        self._section_begin = {ids[name] for name in SECTION_BEGIN if name in ids}
        self._section_end = {ids[name] for name in SECTION_END if name in ids}
        self._call_begin = ids.get(CALL_BEGIN)
        self._argument_begin, self._call_end = ids.get(ARGUMENT_BEGIN), ids.get(CALL_END)
        self._drafts: list[_Draft] = []
        self.in_text, self.is_finished = True, False

    def add(self, token: int) -> None:
        """Take one token."""
        draft = self._drafts[-1] if self._drafts else None
        if token in self._section_begin:
            self.in_text = False
        elif token in self._section_end:
            self.is_finished = not self.in_text
        elif token == self._call_begin:  # some models leave out the section
            self.in_text = False
            self._drafts.append(_Draft())
        elif self.in_text or draft is None or draft.ended:
            pass
        elif token == self._argument_begin:
            draft.arguments = []
        elif token == self._call_end or token in self._tokenizer.stop_ids:
            draft.ended = token == self._call_end
        else:
            draft.add(token)

    def calls(self) -> list[Call]:
        """The calls so far; the last may be cut off."""
        return [self._call(draft) for draft in self._drafts]

    def _call(self, draft: _Draft) -> Call:
        id = self._tokenizer.decode(draft.id)
        arguments = self._tokenizer.decode(draft.arguments or [])
        return Call(id, arguments, draft.ended or _is_object(arguments))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
