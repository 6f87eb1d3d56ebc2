"""Calls of tools in an answer, read by token id: text that spells a marker is never a call."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlx_kimi.text.call_tokens import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    CALL_END,
    SECTION_BEGIN,
    SECTION_END,
    marks,
)
from mlx_kimi.text.tokenizer import Tokenizer

ID = re.compile(r"(?:functions\.)?(?P<name>.+?)(?::\d+)?")


def name_in(id: str) -> str:
    """The function's name in a call's id, as the model writes it; empty where there is none."""
    found = ID.fullmatch(id.strip())
    return found["name"] if found else ""


@dataclass(frozen=True)
class Call:
    """One call. `id` and `arguments` are verbatim, so that the next turn reads what was written."""

    id: str  # functions.NAME:INDEX
    arguments: str  # JSON, if the model wrote it well
    is_whole: bool  # not cut off, by the token limit or by Ctrl-C

    @property
    def name(self) -> str:
        return name_in(self.id)

    @property
    def message(self) -> dict[str, Any]:
        """As a part of an assistant's message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallDelta(NamedTuple):
    """What one token adds to a call."""

    number: int  # of the call in the answer, from 0
    id: str | None  # as the model wrote it; in the first delta of the call alone
    arguments: str
    ended: bool


class _Draft:
    """A call that is being written."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = tokenizer.detokenizer()
        self.number = -1  # until its id is whole
        self.id = ""
        self.arguments = ""
        self.ended = False

    @property
    def is_open(self) -> bool:
        """Whether its id is whole."""
        return self.number >= 0

    def add(self, token: int) -> CallDelta | None:
        return self._more(self._text.add(token))

    def open(self, number: int) -> CallDelta:
        """The id is whole."""
        self.id += self._text.finish()
        self.number, self._text = number, self._tokenizer.detokenizer()
        return CallDelta(number, self.id, "", False)

    def flush(self) -> CallDelta | None:
        """No more text comes."""
        return self._more(self._text.finish())

    def _more(self, text: str) -> CallDelta | None:
        if not self.is_open:
            self.id += text
            return None
        self.arguments += text
        return CallDelta(self.number, None, text, False) if text else None


class CallReader:
    """Takes the tokens of an answer one by one.

    Attributes:
        in_text: the next token is text for the reader, not part of a call.
        is_finished: a section of calls has ended, and with it the answer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.control_tokens
        self._section_begin = marks(tokenizer, *SECTION_BEGIN)
        self._section_end = marks(tokenizer, *SECTION_END)
        self._call_begin = ids.get(CALL_BEGIN)
        self._argument_begin, self._call_end = ids.get(ARGUMENT_BEGIN), ids.get(CALL_END)
        self._drafts: list[_Draft] = []
        self._opened = 0
        self.in_text, self.is_finished = True, False

    def add(self, token: int) -> CallDelta | None:
        """Take one token. What it adds to a call whose id is whole, if anything."""
        draft = self._drafts[-1] if self._drafts else None
        if token in self._section_begin:
            self.in_text = False
        elif token in self._section_end:
            self.is_finished = not self.in_text
        elif token == self._call_begin:  # some models leave out the section
            self.in_text = False
            self._drafts.append(_Draft(self._tokenizer))
        elif self.in_text or draft is None or draft.ended:
            pass
        elif token == self._argument_begin:
            return None if draft.is_open else self._open(draft)
        elif token == self._call_end:
            return self._end(draft)
        elif token in self._tokenizer.stop_ids:
            return draft.flush()
        else:
            return draft.add(token)
        return None

    def finish(self) -> CallDelta | None:
        """No more tokens come: what half a character of a call that is cut off becomes."""
        is_cut = self._drafts and not self._drafts[-1].ended
        return self._drafts[-1].flush() if is_cut else None

    def calls(self) -> list[Call]:
        """The calls so far; the last may be cut off."""
        self.finish()
        return [self._call(draft) for draft in self._drafts]

    def _open(self, draft: _Draft) -> CallDelta:
        self._opened += 1
        return draft.open(self._opened - 1)

    def _end(self, draft: _Draft) -> CallDelta:
        opened = None if draft.is_open else self._open(draft)  # a call without arguments
        rest = draft.flush()
        draft.ended = True
        text = rest.arguments if rest else ""
        return CallDelta(draft.number, opened.id if opened else None, text, True)

    def _call(self, draft: _Draft) -> Call:
        is_whole = draft.ended or _is_object(draft.arguments)
        return Call(draft.id, draft.arguments, is_whole)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
