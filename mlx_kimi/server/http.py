"""The server's sockets: what is listened on, how long heads may take, and how it stops."""

from __future__ import annotations

import asyncio
import json
import logging
import socket

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.server.json_text import json_bytes
from mlx_kimi.server.service import Service

HEAD_SECONDS = 20.0  # until a request's line and headers are whole, and between two requests
PATIENCE = 10.0  # seconds that answers may still take when the server stops
BACKLOG = 512


def listening(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; port 0 is any that is free.

    Raises:
        KimiError: the port is in use or may not be used, or there is no such address here.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise KimiError(f"--host {host}: {in_words(error)}") from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        raise KimiError(f"--host {host} --port {port}: {in_words(error)}") from None
    opened.setblocking(False)
    return opened


def address_of(opened: socket.socket) -> str:
    """Where it listens, as a URL."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Protocol(H11Protocol):
    """Closes connections whose next request does not come."""

    _waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait(self.cycle)

    def connection_lost(self, error: Exception | None) -> None:
        if self._waits is not None:
            self._waits.cancel()
        super().connection_lost(error)

    def send_400_response(self, msg: str) -> None:
        """Say that what came is no HTTP, as other errors are told."""
        error = ApiError(400, "the request must be HTTP/1.1, and its head at most 64 KiB")
        body = json_bytes(error.body)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        head = h11.Response(status_code=400, headers=list(headers.items()), reason="Bad Request")
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait(self, latest: RequestResponseCycle | None) -> None:
        if self._waits is not None:
            self._waits.cancel()
        self._waits = self.loop.call_later(HEAD_SECONDS, self._close_unless_after, latest)

    def _close_unless_after(self, latest: RequestResponseCycle | None) -> None:
        if self.cycle is latest:
            self.transport.close()


class Server(uvicorn.Server):
    """Serves until a signal, or until the engine has failed.

    After a signal, answers end by themselves for a while, and then by force.
    """

    def __init__(self, app: ASGIApp, service: Service, patience: float = PATIENCE) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # what a client says of its address is not believed
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=int(patience) + 2,
        )
        super().__init__(config)
        self._service, self._patience = service, patience

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is over."""
        return await super().on_tick(counter) or self._service.engine.status().failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and wait for those that are being answered."""
        self._service.is_stopping = True
        loop = asyncio.get_running_loop()
        ends = loop.call_later(self._patience, self._service.end_answers)
        try:
            await super().shutdown(sockets)
        finally:
            ends.cancel()
            self._service.close()


class JsonLines(logging.StreamHandler):  # (not generic before Python 3.11)
    """What libraries say, as lines of JSON between those of requests."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        said = super().format(record)
        return json.dumps({"log": record.name, "level": record.levelname, "message": said})
