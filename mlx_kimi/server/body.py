"""The body of a request: read within bounds of size and time, and parsed within one of depth."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import anyio
from starlette.requests import Request

from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.user_files import shown

BODY_BYTES = 16 << 20  # a context of 1M tokens is 5 MB of text
UPLOAD_SECONDS = 30.0  # for the whole body
DEPTH = 100  # of lists and objects; schemas of tools have 20
CLOSE = {"connection": "close"}  # what is left of the body is not read


async def read_body(
    request: Request, most: int = BODY_BYTES, seconds: float = UPLOAD_SECONDS
) -> bytes:
    """The bytes of a JSON body.

    Raises:
        ApiError: 415: it is not JSON; 413: it is too large; 408: it takes too long.
        ClientDisconnect: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"content-type must be application/json but is {shown(kind)}", headers=CLOSE
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "content-encoding must be identity", headers=CLOSE)
    is_larger = int(request.headers.get("content-length", 0)) > 2 * most
    body = bytearray()
    size = 0
    with anyio.move_on_after(seconds) as time:
        async for chunk in request.stream():
            size += len(chunk)
            if is_larger or size > 2 * most:
                break
            if size <= most:  # else read on, to a bound: a client that writes reads no answer
                body += chunk
    if time.cancelled_caught:
        raise ApiError(408, f"the body took longer than {seconds:g} s", headers=CLOSE)
    if is_larger or size > most:
        raise ApiError(413, f"the body must have at most {most:,} bytes", headers=CLOSE)
    return bytes(body)


def parsed(body: bytes) -> dict[str, Any]:
    """The object that a body spells.

    Raises:
        ApiError: it is no JSON object, nests too deeply, or has a number that is none in JSON.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise _not_json(f"must be UTF-8, but byte {error.start} is not") from None
    except RecursionError:
        raise _not_json(f"nests deeper than {DEPTH}") from None
    except ValueError as error:
        raise _not_json(f"must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise _not_json(f"must be a JSON object but is {shown(value)}")
    level: list[Any] = [value]
    for _ in range(DEPTH):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return value
    raise _not_json(f"nests deeper than {DEPTH}")


def _inside(value: Any) -> list[Any]:
    """The lists and objects directly in a list or an object."""
    values = value.values() if isinstance(value, dict) else value
    return [each for each in values if isinstance(each, (dict, list))]


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        _no_number(shown(text))
    return value


def _not_json(rule: str) -> ApiError:
    return ApiError(400, f"the body {rule}", code="invalid_json")
