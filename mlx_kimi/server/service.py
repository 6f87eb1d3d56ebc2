"""What all routes share: the engine, the model's text and name, and what is remembered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from starlette.types import Receive

from mlx_kimi.defaults import MAX_TOKENS
from mlx_kimi.errors import ContextFull, KimiError, OptionError
from mlx_kimi.generation.sample import Sampling, later_seed
from mlx_kimi.server.api_errors import ApiError, of_engine, stopping, too_long
from mlx_kimi.server.engine import Engine, Request, Ticket
from mlx_kimi.server.exchange import Exchange
from mlx_kimi.server.metrics import Metrics
from mlx_kimi.server.tool_ids import ToolIds
from mlx_kimi.server.validation import CommonBody
from mlx_kimi.text.tokenizer import Tokenizer
from mlx_kimi.user_files import shown

KEEPALIVE = 5.0  # seconds in which a stream sends something
P = ParamSpec("P")
T = TypeVar("T")
# Ours by the names of the API.
SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
}


@dataclass
class Service:
    """One model, served.

    Attributes:
        name: the model's, for clients.
        context: tokens of a prompt and its answer at most.
        options: sampling and max_tokens where a request does not say.
        keepalive: seconds in which a stream sends something.
        log_prompts: whether logs hold what is asked and answered.
        is_stopping: no new requests are taken.
    """

    engine: Engine
    tokenizer: Tokenizer
    name: str
    context: int
    options: Mapping[str, Any] = field(default_factory=dict)
    keepalive: float = KEEPALIVE
    log_prompts: bool = False
    is_stopping: bool = False
    started: int = field(default_factory=lambda: int(time.time()))
    tool_ids: ToolIds = field(default_factory=ToolIds)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self._exchanges: set[Exchange] = set()
        self._text = ThreadPoolExecutor(1, "text")  # templates take time, and one child renders

    async def text_work(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what parses, renders and encodes beside the loop, one request after another."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text, lambda: work(*args, **kwargs))

    def check_model(self, name: str | None) -> None:
        """Refuse another model than the one that is served.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.name:
            said = f"model must be {shown(self.name)}, which is served here, but is {shown(name)}"
            raise ApiError(404, said, param="model", code="model_not_found")

    def max_tokens(self, given: int | None) -> int:
        """What a request says, or else the server."""
        return int(self.options.get("max_tokens", MAX_TOKENS)) if given is None else given

    def samplings(self, body: CommonBody, count: int) -> list[Sampling]:
        """How `count` answers are drawn, with one seed after another.

        Raises:
            ApiError: a value is out of its range.
        """
        given = {ours: getattr(body, theirs) for theirs, ours in SAMPLING.items()}
        ours = {name: self.options[name] for name in given if name in self.options}
        values = {**ours, **{n: value for n, value in given.items() if value is not None}}
        seed = values.pop("seed", None)
        try:
            return [Sampling(**values, seed=later_seed(seed, number)) for number in range(count)]
        except OptionError as error:
            name = next(theirs for theirs, ours in SAMPLING.items() if ours == error.name)
            said = f"{name} {error.rule}"
            raise ApiError(400, said, param=name, code="invalid_value") from None

    @asynccontextmanager
    async def exchange(
        self, requests: Sequence[Request], receive: Receive
    ) -> AsyncIterator[Exchange]:
        """The answers to these requests, submitted together; what is left of them is cancelled.

        Raises:
            ApiError: the engine takes one of them not, and so none.
        """
        if self.is_stopping:
            raise stopping()
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self.engine.submit(request))
        except KimiError as error:
            for ticket in tickets:
                ticket.cancel()
            if isinstance(error, ContextFull):
                raise too_long(len(request.ids), self.context) from None
            raise of_engine(error) from None
        async with Exchange(tickets, receive) as exchange:
            self._exchanges.add(exchange)
            try:
                yield exchange
            finally:
                self._exchanges.discard(exchange)

    def end_answers(self) -> None:
        """Wait for no answer any longer."""
        for exchange in self._exchanges:
            exchange.stop()

    def close(self) -> None:
        """Let the thread for texts go."""
        self._text.shutdown(wait=False, cancel_futures=True)
