"""Errors as OpenAI's API tells them: a status and one JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_kimi.errors import KimiError
from mlx_kimi.server.engine import OutOfMemory, QueueFull

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    500: "server_error",
    503: "overloaded_error",
}


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


def of_engine(error: KimiError) -> ApiError:
    """What the engine refused or could not finish."""
    if isinstance(error, QueueFull):
        wait = {"retry-after": str(error.retry_after)}
        return ApiError(503, str(error), code="queue_full", headers=wait)
    if isinstance(error, OutOfMemory):
        return ApiError(503, str(error), code="out_of_memory", headers={"retry-after": "10"})
    return ApiError(500, str(error), code="engine_failed")


def too_long(tokens: int, context: int) -> ApiError:
    """A prompt fills the context. Clients know the error by its code or its first words."""
    said = (
        f"This model's maximum context length is {context} tokens, the answer included, but the "
        f"prompt has {tokens}"
    )
    return ApiError(400, said, code="context_length_exceeded")


def stopping() -> ApiError:
    """What is said while the server stops."""
    wait = {"retry-after": "10"}
    return ApiError(503, "the server is stopping", code="stopping", headers=wait)
