"""What an agent sends to a server, as token ids: one long conversation whose every turn repeats all
before it, two sub-agents with the same tools, a request for a title, and an edit in the middle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from mlx_kimi.server.engine import Request

TOOLS = 28
ROUNDS, AGENT_ROUNDS, EDITED_ROUND = 20, 4, 12


@dataclass(frozen=True)
class Sizes:
    """Tokens."""

    tool: int  # each
    message: int  # each tool's result, on average
    answer: int


FULL = Sizes(tool=800, message=350, answer=24)  # 30,000 tokens at the end
SMALL = Sizes(tool=12, message=40, answer=6)


@dataclass
class Turn:
    """A request, and how much of its prompt nobody has sent before."""

    name: str
    request: Request
    new: int  # tokens from the first message on that is not repeated
    answer: list[int] = field(default_factory=list)  # to be filled in before the next turn


class Recorded:
    """The turns, in order. Each repeats the answers of its conversation, to the token."""

    def __init__(self, vocab: range, sizes: Sizes, seed: int = 0) -> None:
        """`vocab`: ids of text; the three below it begin and end messages, and open an answer."""
        self._vocab, self.sizes, self._choose = vocab, sizes, random.Random(seed)
        self._begin, self._end, self._open = (vocab.start - n for n in (3, 2, 1))

    def turns(self) -> Iterator[Turn]:
        """Each has to be answered before the next is asked for."""
        tools = self._text(TOOLS * self.sizes.tool)
        main = _Talk(self, "main", [self._message(tools)])
        known = len(main.messages[0])
        agents = [_Talk(self, f"agent {n}", [self._message(tools)], known) for n in (1, 2)]
        for number in range(ROUNDS):
            if number == EDITED_ROUND:
                yield main.edited(back=4)
            yield main.turn()
            if number == 1:
                yield _Talk(self, "title", [self._message(self._text(60))]).turn()
            if number >= 4 and number % 2 == 0:
                for agent in agents:
                    if agent.rounds < AGENT_ROUNDS:
                        yield agent.turn()

    def _text(self, count: int) -> list[int]:
        return self._choose.choices(self._vocab, k=count)

    def _message(self, text: list[int]) -> list[int]:
        return [self._begin, *text, self._end]

    def any_message(self) -> list[int]:
        size = self.sizes.message
        return self._message(self._text(self._choose.randrange(size // 2, 3 * size // 2)))

    def answer(self, turn: Turn) -> list[int]:
        """A message of what the model said."""
        return [self._open, *turn.answer, self._end]

    def request(self, messages: list[list[int]], client: str) -> Request:
        ids = [token for message in messages for token in message]
        lengths = [len(message) for message in messages]
        boundaries = [sum(lengths[: n + 1]) for n in range(len(lengths))]
        return Request(
            (*ids, self._open),
            boundaries=tuple(boundaries),
            max_tokens=self.sizes.answer,
            client=client,
        )


@dataclass
class _Talk:
    """One conversation."""

    recorded: Recorded
    name: str
    messages: list[list[int]]
    known: int = 0  # tokens of another's prompts that it begins with
    rounds: int = 0
    latest: Turn | None = None

    def turn(self) -> Turn:
        """The next message, after the answer to the one before."""
        repeated = self.known
        if self.latest is not None:
            repeated = sum(map(len, self.messages))
            self.messages.append(self.recorded.answer(self.latest))
            repeated += len(self.messages[-1]) - 1  # (the model did not draw its end)
        self.messages.append(self.recorded.any_message())
        return self._sent(repeated)

    def edited(self, back: int) -> Turn:
        """An earlier message is written anew, which ends what followed it."""
        del self.messages[-2 * back - 1 :]
        repeated = sum(map(len, self.messages))
        self.messages.append(self.recorded.any_message())
        return self._sent(repeated, " edited")

    def _sent(self, repeated: int, what: str = "") -> Turn:
        self.rounds += 1
        request = self.recorded.request(self.messages, self.name)
        self.latest = Turn(self.name + what, request, len(request.ids) - repeated)
        return self.latest
