"""Answers as blocks, a text and then its calls, each begun, added to and ended: as Anthropic's
Messages and OpenAI's Responses tell them."""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_kimi.server.answers import Step, Whole
from mlx_kimi.server.engine import Token
from mlx_kimi.server.reader import Delta, FinishReason
from mlx_kimi.server.reply import Reply


@dataclass
class Block:
    """A part of an answer."""

    number: int
    call_id: str | None = None  # of the client's, where it is a call
    name: str = ""  # of the function
    text: str = ""  # or the call's arguments
    tokens: list[Token] = field(default_factory=list)
    is_cut: bool = False  # by the token limit
    id: str = field(default_factory=lambda: secrets.token_hex(12))


class BlocksReply(Reply):
    """One answer, block by block.

    Attributes:
        id: of the answer.
        blocks: what it has so far.
    """

    prefix: str  # of ids

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.id = f"{self.prefix}_{secrets.token_hex(12)}"
        self.blocks: list[Block] = []
        self._open: Block | None = None

    @abstractmethod
    def begins(self, block: Block) -> Iterator[bytes]:
        """Events of a block that begins."""

    @abstractmethod
    def grows(self, block: Block, text: str, tokens: Sequence[Token]) -> Iterator[bytes]:
        """Events of what a block gets."""

    @abstractmethod
    def ends(self, block: Block) -> Iterator[bytes]:
        """Events of a block that is whole, or cut."""

    def events(self, step: Step) -> list[bytes]:
        return [*self._grown(step.delta), *(self._end(step.finish) if step.finish else ())]

    def fill(self, whole: Whole) -> None:
        """The blocks of an answer that was not streamed."""
        if whole.text:
            self.blocks.append(Block(0, text=whole.text, tokens=whole.tokens))
        for call in whole.calls:
            function = call["function"]
            block = Block(len(self.blocks), call["id"], function["name"], function["arguments"])
            self.blocks.append(block)
        if self.blocks:
            self.blocks[-1].is_cut = whole.finish == "length"

    def _grown(self, delta: Delta) -> Iterator[bytes]:
        if delta.text or delta.tokens:
            if self._open is None:
                yield from self._begin(Block(len(self.blocks)))
            yield from self._add(delta.text, delta.tokens)
        for call in delta.calls:
            if call.id is not None:
                yield from self._end()
                yield from self._begin(Block(len(self.blocks), call.id, call.name or ""))
            if call.arguments:
                yield from self._add(call.arguments, ())

    def _begin(self, block: Block) -> Iterator[bytes]:
        self._open = block
        self.blocks.append(block)
        return self.begins(block)

    def _add(self, text: str, tokens: Sequence[Token]) -> Iterator[bytes]:
        assert self._open is not None
        self._open.text += text
        self._open.tokens += tokens
        return self.grows(self._open, text, tokens)

    def _end(self, finish: FinishReason | None = None) -> Iterator[bytes]:
        block, self._open = self._open, None
        if block is None:
            return iter(())
        block.is_cut = finish == "length"
        return self.ends(block)
