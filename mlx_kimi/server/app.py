"""The routes."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import TextIO

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_kimi.server import (
    anthropic_messages,
    openai_chat,
    openai_completions,
    openai_responses,
    web_page,
)
from mlx_kimi.server.api_errors import ApiError, told
from mlx_kimi.server.json_text import Json
from mlx_kimi.server.record import new_record, record_of
from mlx_kimi.server.respond import Understand, count, respond
from mlx_kimi.server.security import Access, Gate
from mlx_kimi.server.service import Service

REQUEST_ID = ("x-request-id", "request-id")  # OpenAI's name, and Anthropic's
Endpoint = Callable[[Request], Awaitable[Response]]


def routes(service: Service) -> list[Route]:
    """Every path that is answered."""

    def completions(understand: Understand) -> Endpoint:
        async def answer(request: Request) -> Response:
            return await respond(service, understand, request)

        return answer

    async def count_tokens(request: Request) -> Response:
        return await count(service, anthropic_messages.counted, request)

    async def health(request: Request) -> Response:
        status = service.engine.status()
        is_well = status.state != "failed"
        fields = {"status": "ok" if is_well else "failed", "failure": status.failure}
        return Json(fields, 200 if is_well else 503)

    async def ready(request: Request) -> Response:
        status = service.engine.status()
        state = "stopping" if service.is_stopping else status.state
        fields = {
            "status": state,
            "model": service.name,
            "queued": status.queued,
            "reading": status.reading,
            "decoding": status.decoding,
        }
        return Json(fields, 200 if state == "ready" else 503)

    async def metrics(request: Request) -> Response:
        text = generate_latest(service.metrics.registry)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(request: Request) -> Response:
        ends = {"has_more": False, "first_id": service.name, "last_id": service.name}
        return Json({"object": "list", "data": [_model(service)], **ends})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return Json(_model(service))

    return [
        _route("GET", "/health", health),
        _route("GET", "/ready", ready),
        _route("GET", "/metrics", metrics),
        _route("GET", "/v1/models", models),
        _route("GET", "/v1/models/{name:path}", model),
        _route("POST", "/v1/chat/completions", completions(openai_chat.understood)),
        _route("POST", "/v1/completions", completions(openai_completions.understood)),
        _route("POST", "/v1/responses", completions(openai_responses.understood)),
        _route("POST", "/v1/messages", completions(anthropic_messages.understood)),
        _route("POST", "/v1/messages/count_tokens", count_tokens),
        *(_route("GET", path, web_page.file) for path in web_page.FILES),
    ]


def _route(method: str, path: str, endpoint: Endpoint) -> Route:
    async def answer(request: Request) -> Response:
        record_of(request.scope).route = path
        return await endpoint(request)

    return Route(path, answer, methods=[method])


def _model(service: Service) -> dict[str, str | int]:
    """As OpenAI's clients read it, and Anthropic's."""
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "mlx_kimi",
        "max_model_len": service.context,
        "type": "model",
        "display_name": service.name,
        "created_at": datetime.fromtimestamp(service.started, timezone.utc).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": service.context,
        "max_tokens": service.context,
    }


def make_app(service: Service, access: Access, log: TextIO | None = None) -> ASGIApp:
    """The server as an application. `log`: a file for a line a request; None: stderr."""
    inner = Starlette(
        routes=routes(service),
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _fault},
    )
    inner.router.redirect_slashes = False
    return Recorder(Gate(inner, access), service, log or sys.stderr)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return told(error, request.scope)


async def _http_error(request: Request, error: Exception) -> Response:
    """Of the table of routes: there is no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path} is not answered here: {error.detail}"
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    known = ApiError(error.status_code, said, code=code, headers=error.headers)
    return await _api_error(request, known)


async def _fault(request: Request, error: Exception) -> Response:
    said = f"the server has a fault; its log tells of {record_of(request.scope).id}"
    return told(ApiError(500, said, code="fault"), request.scope)


class Recorder:
    """Stands before everything: gives each request an id, and tells of it when it is over."""

    def __init__(self, app: ASGIApp, service: Service, log: TextIO) -> None:
        self._app, self._service, self._log = app, service, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = new_record(scope)

        async def sends(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                for name in REQUEST_ID:
                    headers[name] = record.id
            await send(message)

        try:
            await self._app(scope, receive, sends)
        except Exception as error:
            record.error = "".join(traceback.format_exception(error))
        except asyncio.CancelledError:  # the server has waited long enough, and stops
            record.error = "stopping"
        finally:
            record.seconds = record.elapsed()
            self._service.metrics.add(record)
            print(record.line(), file=self._log, flush=True)
