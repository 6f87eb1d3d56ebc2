"""Who may ask: the Host and Origin of a request, and its key.

A web page that a browser shows can send requests to this machine. Its Origin tells; and a name of
its own that it lets point here, in Host. Neither reads an answer, nor is one given.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_kimi.errors import OptionError
from mlx_kimi.server.api_errors import ApiError, told
from mlx_kimi.server.web_page import needs_no_key
from mlx_kimi.user_files import shown

LOCAL = ("localhost", "127.0.0.1", "::1")
METHODS = "GET, POST"
HEADERS = "anthropic-beta, anthropic-version, authorization, content-type, x-api-key"
REMEMBERED = "600"  # seconds that a browser remembers a permission


@dataclass(frozen=True)
class Access:
    """What is allowed.

    Attributes:
        host: the address or name that is listened on.
        key: what requests must show, or None.
        origins: web pages that may read answers, such as http://localhost:3000.
        hosts: further names of this machine.
    """

    host: str = "127.0.0.1"
    key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.key is not None and not re.fullmatch(r"[!-~]{8,200}", self.key):
            raise OptionError("api_key", "must be 8 to 200 visible ASCII characters")
        if self.key is None and not self.is_local:
            raise OptionError(
                "host",
                f"must be 127.0.0.1 without --api-key but is {self.host}, which other machines "
                "can reach",
            )
        for origin in self.origins:
            parts = urlsplit(origin)
            if not parts.scheme or not parts.netloc or f"{parts.scheme}://{parts.netloc}" != origin:
                raise OptionError(
                    "allow_origin", f"must be like http://localhost:3000 but is {origin}"
                )

    @property
    def is_local(self) -> bool:
        """Whether this machine alone can ask."""
        return self.host == "localhost" or _is_loopback(self.host)

    def knows_host(self, header: str | None) -> bool:
        """Whether a request means this server: a name that others can choose does not."""
        name = host_name(header or "")
        if name is None:
            return False
        allowed = {each.lower() for each in (*LOCAL, self.host, *self.hosts)}
        return name in allowed or _is_loopback(name) or (not self.is_local and _is_address(name))

    def knows_origin(self, origin: str, host: str) -> bool:
        """Whether a page may ask: one that is named, or of this server itself."""
        return origin in self.origins or origin in (f"http://{host}", f"https://{host}")

    def knows_key(self, headers: Headers) -> bool:
        """Whether a request shows the key. Takes as long for a wrong one as for another."""
        if self.key is None:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        given = (bearer, headers.get("x-api-key", ""))
        wanted = self.key.encode()
        found = [hmac.compare_digest(each.encode("utf-8", "replace"), wanted) for each in given]
        return any(found)


def host_name(header: str) -> str | None:
    """The name or address in a Host header, without its port; None if it is none."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?", header)
    return (found[1] or found[2]).lower() if found else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


class Gate:
    """Stands before all routes."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        try:
            self._check(headers, origin)
            if origin is not None and scope["method"] == "OPTIONS":
                return await _allowed(origin)(scope, receive, send)
            is_open = needs_no_key(scope["method"], scope["path"])
            if not is_open and not self._access.knows_key(headers):
                said = "the key must be in Authorization: Bearer KEY, or in x-api-key"
                wants = {"www-authenticate": "Bearer"}
                raise ApiError(401, said, code="invalid_api_key", headers=wants)
        except ApiError as error:
            answer = told(error, scope)
            return await answer(scope, receive, _with_cors(send, origin, self._access.origins))
        await self._app(scope, receive, _with_cors(send, origin, self._access.origins))

    def _check(self, headers: Headers, origin: str | None) -> None:
        host = headers.get("host")
        if not self._access.knows_host(host):
            said = f"Host must be a name of this server (--allow-host) but is {shown(host)}"
            raise ApiError(403, said, code="host_not_allowed")
        if origin is not None and not self._access.knows_origin(origin, host or ""):
            said = f"Origin must be allowed (--allow-origin) but is {shown(origin)}"
            raise ApiError(403, said, code="origin_not_allowed")


def _allowed(origin: str) -> Response:
    """The answer to a browser that asks whether a page may ask."""
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": METHODS,
            "access-control-allow-headers": HEADERS,
            "access-control-max-age": REMEMBERED,
            "access-control-allow-origin": origin,
            "vary": "Origin",
        },
    )


def _with_cors(send: Send, origin: str | None, origins: Iterable[str]) -> Send:
    """Lets a page that is named read the answer."""
    if origin is None or origin not in origins:
        return send

    async def sends(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers["access-control-allow-origin"] = origin
            headers.add_vary_header("Origin")
        await send(message)

    return sends
