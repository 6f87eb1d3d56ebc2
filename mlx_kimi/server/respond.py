"""From a request's body to its answer, whole or as server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_kimi.server.answers import Answers
from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.server.body import read_body
from mlx_kimi.server.engine import Progress
from mlx_kimi.server.exchange import Gone
from mlx_kimi.server.json_text import Json
from mlx_kimi.server.record import Record, record_of
from mlx_kimi.server.reply import Reply
from mlx_kimi.server.service import Service

Understand = Callable[[Service, bytes, str], Reply]
Count = Callable[[Service, bytes], int]
LEFT = 499  # what logs say of a request whose client has left; nobody gets it
SEND_SECONDS = 60.0  # a client that takes nothing for so long has left
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy must pass on what comes
}


async def respond(service: Service, understand: Understand, request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: it cannot be answered.
    """
    record = record_of(request.scope)
    try:
        raw = await read_body(request)
        reply = await service.text_work(understand, service, raw, record.client)
        del raw
        if reply.body.stream:
            return Stream(service, reply)
        async with _answers(service, reply, record, request.receive) as answers:
            while not answers.are_over:
                await answers.next()
        return Json(reply.whole(answers.found, record.usage))
    except (ClientDisconnect, Gone):
        return Response(status_code=LEFT)


async def count(service: Service, counted: Count, request: Request) -> Response:
    """Tell the length of a prompt that is not answered.

    Raises:
        ApiError: it is none.
    """
    try:
        raw = await read_body(request)
    except ClientDisconnect:
        return Response(status_code=LEFT)
    return Json({"input_tokens": await service.text_work(counted, service, raw)})


@asynccontextmanager
async def _answers(
    service: Service, reply: Reply, record: Record, receive: Receive
) -> AsyncIterator[Answers]:
    async with service.exchange(reply.requests, receive) as exchange:
        answers = Answers(exchange, reply.readers, record, reply.each)
        try:
            yield answers
        finally:
            if service.log_prompts:
                said = [{"text": each.text, "calls": each.calls} for each in answers.found]
                asked = reply.body.model_dump(exclude_unset=True)
                record.texts = {"asked": asked, "answered": said}


class Stream(Response):
    """An answer that is sent as it comes; errors before the first token of it have a status."""

    def __init__(self, service: Service, reply: Reply) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]  # which nobody knows yet
        self._service, self._reply = service, reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events, record = Events(send), record_of(scope)
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with _answers(self._service, self._reply, record, receive) as answers:
            try:
                await events.send(start)
                await self._send_all(answers, events, record)
                await events.end()
            except ApiError as error:
                record.error = error.shortly
                await events.put(self._reply.failed(error, record.id))
                await events.end()
            except Gone:
                record.status = LEFT

    async def _send_all(self, answers: Answers, events: Events, record: Record) -> None:
        reply = self._reply
        await events.put(*reply.opening())
        while not answers.are_over:
            step = await answers.next(self._service.keepalive - events.silence())
            if isinstance(step, Progress):
                await events.put(*reply.progress(step))
            elif step is not None:
                await events.put(*reply.events(step))
            if events.silence() >= self._service.keepalive:
                await events.put(reply.keepalive())
        await events.put(*reply.closing(answers.found, record.usage))


class Events:
    """Writes server-sent events."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._latest = time.monotonic()

    def silence(self) -> float:
        """Seconds since something was sent."""
        return time.monotonic() - self._latest

    async def put(self, *events: bytes) -> None:
        """Send events, one by one."""
        for each in events:
            await self.send({"type": "http.response.body", "body": each, "more_body": True})

    async def end(self) -> None:
        """No more is sent."""
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(self, message: dict[str, Any]) -> None:
        """Send a message of ASGI.

        Raises:
            Gone: nobody takes it.
        """
        with anyio.move_on_after(SEND_SECONDS) as time_left:
            await self._send(message)
        if time_left.cancelled_caught:
            raise Gone
        self._latest = time.monotonic()
