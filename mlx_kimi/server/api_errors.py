"""Errors as OpenAI's and Anthropic's APIs tell them: a status and one JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from mlx_kimi.errors import KimiError
from mlx_kimi.server.engine import OutOfMemory, QueueFull
from mlx_kimi.server.json_text import Json
from mlx_kimi.server.record import record_of

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    500: "server_error",
    503: "overloaded_error",
}
ANTHROPIC_TYPES = {**TYPES, 413: "request_too_large", 500: "api_error"}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: one line: the thing, the rule and the value.
        param: the field of the request that breaks the rule.
        code: one word for programs.
        headers: further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = str(KimiError(message))  # one line, whatever a request names
        self.headers = dict(headers or {})

    @property
    def shortly(self) -> str:
        """For a log: no value of the request, which may be part of a prompt."""
        return " ".join(each for each in (self.code, self.param) if each) or str(self.status)

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def anthropic_body(self, request: str) -> dict[str, Any]:
        """As JSON of Anthropic's form. `request`: the id of the request."""
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        error = {"type": kind, "message": self.message}
        return {"type": "error", "error": error, "request_id": request}


def speaks_anthropic(scope: Scope) -> bool:
    """Whether a request is one of Anthropic's API, by its path or its header."""
    path = scope["path"]
    names = [name for name, _ in scope["headers"]]
    return path.startswith("/v1/messages") or b"anthropic-version" in names


def told(error: ApiError, scope: Scope) -> Json:
    """An error as the client of this request understands it, which is kept for the log."""
    record = record_of(scope)
    record.error = error.shortly
    is_theirs = speaks_anthropic(scope)
    body = error.anthropic_body(record.id) if is_theirs else error.body
    return Json(body, error.status, error.headers)


def of_engine(error: KimiError) -> ApiError:
    """What the engine refused or could not finish."""
    if isinstance(error, QueueFull):
        wait = {"retry-after": str(error.retry_after)}
        return ApiError(503, str(error), code="queue_full", headers=wait)
    if isinstance(error, OutOfMemory):
        return ApiError(503, str(error), code="out_of_memory", headers={"retry-after": "10"})
    return ApiError(500, str(error), code="engine_failed")


def too_long(tokens: int, context: int) -> ApiError:
    """A prompt fills the context. Clients know the error by its code or by these words: OpenAI's
    by the first, Anthropic's by those with the numbers."""
    said = (
        f"This model's maximum context length is {context} tokens, the answer included: prompt is "
        f"too long: {tokens} tokens > {context} maximum"
    )
    return ApiError(400, said, code="context_length_exceeded")


def stopping() -> ApiError:
    """What is said while the server stops."""
    wait = {"retry-after": "10"}
    return ApiError(503, "the server is stopping", code="stopping", headers=wait)
