"""The tokens of an answer -> what a client gets: text, calls, logprobs and why it ended.

A stream and a whole answer are made of the same deltas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mlx_kimi.chat.tool_calls import CallDelta, CallReader, name_in
from mlx_kimi.generation.answer import StopStrings
from mlx_kimi.server.engine import Reason, Token
from mlx_kimi.server.tool_ids import NO_ARGUMENTS, ToolIds
from mlx_kimi.text.call_tokens import CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, marks
from mlx_kimi.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "tool_calls"]


class SentCall(NamedTuple):
    """What a token adds to a call, as the client gets it."""

    number: int  # of the call in the answer, from 0
    id: str | None  # the client's; with the name in the first delta of the call alone
    name: str | None
    arguments: str


@dataclass
class Delta:
    """What one token, or the end, adds to an answer."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)  # whose text begins in what is sent by now
    calls: list[SentCall] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.tokens or self.calls)


def stop_ids(tokenizer: Tokenizer, may_call: bool, one_call: bool = False) -> frozenset[int]:
    """The tokens that end an answer.

    Args:
        may_call: the model may call tools; else an attempt ends the answer.
        one_call: the end of the first call is the end of the answer.
    """
    names = SECTION_END if may_call else (*SECTION_BEGIN, CALL_BEGIN)
    return tokenizer.stop_ids | marks(tokenizer, *names, *((CALL_END,) if one_call else ()))


class AnswerReader:
    """Takes the tokens of one answer.

    Attributes:
        count: tokens taken.
        is_over: a stop string is met, and no token that follows counts.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], ids: ToolIds, stops: frozenset[int]
    ) -> None:
        """`stops`: the tokens that end the answer, which are no text."""
        self._stops, self._ids = stops, ids
        self._detokenizer = tokenizer.detokenizer()
        self._stop = StopStrings(stop)
        self._calls = CallReader(tokenizer)
        self._sent: dict[int, _Sent] = {}
        self._waiting: deque[tuple[int, Token]] = deque()  # with where their text begins
        self._read = self._released = 0  # characters
        self.count = 0

    @property
    def is_over(self) -> bool:
        return self._stop.met

    @property
    def stop_string(self) -> str | None:
        """The stop string that is met."""
        return self._stop.found

    def add(self, token: Token) -> Delta:
        """What the next token adds."""
        self.count += 1
        was_text = self._calls.in_text
        call = self._calls.add(token.id)
        if was_text and self._calls.in_text:
            if token.id in self._stops:
                return Delta()
            return self._text(self._detokenizer.add(token.id), token)
        delta = self._rest_of_text() if was_text else Delta()
        if call is not None:
            delta.calls.append(self._call(call))
        return delta

    def finish(self) -> Delta:
        """What was held back."""
        delta = self._rest_of_text()
        call = self._calls.finish()
        if call is not None:
            delta.calls.append(self._call(call))
        return delta

    def reason(self, ended: Reason) -> FinishReason:
        """Why the answer is over, after `finish`."""
        if self.is_over:
            return "stop"
        if ended == "length":
            return "length"
        return "tool_calls" if self._sent else "stop"

    def _text(self, text: str, token: Token | None = None) -> Delta:
        if token is not None:
            self._waiting.append((self._read, token))
        self._read += len(text)
        return self._release(self._stop.add(text))

    def _rest_of_text(self) -> Delta:
        delta = self._text(self._detokenizer.finish())
        rest = self._release(self._stop.finish())
        return Delta(delta.text + rest.text, delta.tokens + rest.tokens)

    def _release(self, text: str) -> Delta:
        self._released += len(text)
        tokens = []
        while self._waiting and self._waiting[0][0] < self._released:
            tokens.append(self._waiting.popleft()[1])
        return Delta(text, tokens)

    def _call(self, call: CallDelta) -> SentCall:
        if call.id is not None:
            self._sent[call.number] = _Sent(self._ids.new(), call.id)
        sent = self._sent[call.number]
        sent.arguments += call.arguments
        text = call.arguments
        if call.ended:
            text += "" if sent.arguments else NO_ARGUMENTS
            shown = sent.arguments or NO_ARGUMENTS
            self._ids.remember(sent.outward, sent.id, sent.arguments, shown)
        if call.id is None:
            return SentCall(call.number, None, None, text)
        return SentCall(call.number, sent.outward, name_in(call.id), text)


@dataclass
class _Sent:
    """A call that the client knows of."""

    outward: str
    id: str  # as the model wrote it
    arguments: str = ""
