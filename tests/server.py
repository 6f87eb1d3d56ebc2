"""A server on a socket of this machine, with the pocket model or with answers from a script."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx

from mlx_kimi import load
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.errors import KimiError
from mlx_kimi.server.app import make_app
from mlx_kimi.server.engine import (
    Engine,
    Event,
    Failed,
    Finished,
    Progress,
    Request,
    Started,
    Status,
    Ticket,
    Token,
)
from mlx_kimi.server.http import Server, address_of, listening
from mlx_kimi.server.security import Access
from mlx_kimi.server.service import Service
from mlx_kimi.text.tokenizer import Tokenizer, load_tokenizer

CONTEXT = 32_768
JSON = {"content-type": "application/json"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@cache
def pocket_tokenizer() -> Tokenizer:
    return load_tokenizer(pocket_folder())


@dataclass
class Scripted:
    """In the place of an engine: answers requests with what a script says.

    Attributes:
        answers: of the next requests; text, in which control tokens are spelled out, or events.
            The last one answers all that follow.
        before: seconds before the prompt is read; `between`: before each token.
        refuse: what `submit` raises.
    """

    answers: Sequence[str | Sequence[Event]] = ("Hello.",)
    before: float = 0.0
    between: float = 0.0
    refuse: KimiError | None = None
    requests: list[Request] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    state: str = "ready"
    stopped: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        pass

    def stop(self, patience: float) -> None:
        self.stopped.set()

    def status(self) -> Status:
        return Status(self.state, None, 512, 0, 0, 0, 0, 0, 0)  # type: ignore[arg-type]

    def submit(self, request: Request) -> Ticket:
        if self.refuse is not None:
            raise self.refuse
        number = min(len(self.requests), len(self.answers) - 1)
        self.requests.append(request)
        ticket = Ticket(request)
        self.tickets.append(ticket)
        threading.Thread(target=self._run, args=(ticket, self.answers[number]), daemon=True).start()
        return ticket

    def _run(self, ticket: Ticket, answer: str | Sequence[Event]) -> None:
        events = self._events(ticket.request, answer) if isinstance(answer, str) else answer
        for number, event in enumerate(events):
            self._wait(ticket, self.between if number else self.before)
            if ticket.is_cancelled:
                break
            ticket.put(event)
        if not ticket.is_closed:
            ticket.put(Finished("cancelled"))

    def _wait(self, ticket: Ticket, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not ticket.is_cancelled and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.01))

    def _events(self, request: Request, text: str) -> Iterator[Event]:
        total = len(request.ids)
        if request.wants_progress:
            yield from (Progress(read, total) for read in (2, total))
        yield Started(total, 2, "a script said so")
        ids = pocket_tokenizer().encode_with_control(text)
        for count, id in enumerate(ids, 1):
            top = tuple((id + n, -n / 4) for n in range(request.logprobs or 0))
            yield Token(id, -count / 8, top)
            if id in request.stop_ids:
                break
            if count == request.max_tokens:
                yield Finished("length")
                return
        yield Finished("stop")


@dataclass
class Running:
    """A server that runs in a thread."""

    url: str
    service: Service
    log: io.StringIO
    engine: Any

    def __post_init__(self) -> None:
        self.asking = self.client()  # one connection for many requests

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its log."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def client(self, **options: Any) -> httpx.Client:
        """For raw requests; proxies of the environment are not asked."""
        how = {"timeout": 30, "trust_env": False, "verify": False, **options}
        return httpx.Client(base_url=self.url, **how)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.asking.post(path, json=body, **options)

    def chat(self, content: str = "Hi", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return self.post("/v1/chat/completions", body)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """What a stream says: events parsed, comments as text, `[DONE]` left out."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        found = []
        for block in response.text.split("\n\n")[:-1]:
            name, _, data = block.rpartition("\n")
            if block.startswith(":"):
                found.append(block)
            elif block != "data: [DONE]":
                found.append(json.loads(data.removeprefix("data: ")))
                assert name in ("", f"event: {found[-1].get('type')}")
        return found


@contextmanager
def serving(engine: Any = None, access: Access | None = None, **options: Any) -> Iterator[Running]:
    """A server, by default with a script that says hello."""
    engine = engine or Scripted()
    tokenizer = options.pop("tokenizer", None) or pocket_tokenizer()
    patience = options.pop("patience", 1.0)
    service = Service(engine, tokenizer, "pocket", CONTEXT, **options)
    log = io.StringIO()
    with listening("127.0.0.1", 0) as opened:
        url = address_of(opened)
        server = Server(make_app(service, access or Access(), log), service, patience)
        engine.start()
        thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield (running := Running(url, service, log, engine))
        finally:
            server.should_exit = True
            thread.join(30)
            engine.stop(patience=0)
            assert not thread.is_alive()
            running.asking.close()


@contextmanager
def serving_pocket(**options: Any) -> Iterator[Running]:
    """A server with the model that ships inside."""
    model, tokenizer = load()
    with serving(Engine(model), tokenizer=tokenizer, **options) as running:
        yield running


def until(is_true: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait for something that soon happens."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def failed(error: KimiError) -> list[Event]:
    """The events of an answer that fails after its first word."""
    (word,) = pocket_tokenizer().encode("a")
    return [Started(3, 0, "nothing"), Token(word), Failed(error)]
