"""The page to chat in, as it is sent. Its files hold nothing secret, and need no key."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

SCRIPT, STYLE = "text/javascript; charset=utf-8", "text/css; charset=utf-8"
# By route: the file in `page`, and what it is.
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", STYLE),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page/page.js": ("page.js", SCRIPT),
    "/page/api.js": ("api.js", SCRIPT),
    "/page/dom.js": ("dom.js", SCRIPT),
    "/page/markdown.js": ("markdown.js", SCRIPT),
    "/page/messages.js": ("messages.js", SCRIPT),
    "/page/store.js": ("store.js", SCRIPT),
    "/page/vendor/markdown-it-15.0.3.js": ("vendor/markdown-it-15.0.3.js", SCRIPT),
}
# Nothing comes from elsewhere or goes there, no text becomes a script, no page frames this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # another version may be served here tomorrow
}


def needs_no_key(method: str, path: str) -> bool:
    """Whether a request is for the page alone."""
    return method in ("GET", "HEAD") and path in FILES


async def file(request: Request) -> Response:
    """One of the page's files."""
    name, kind = FILES[request.url.path]
    return Response(_read(name), headers={**HEADERS, "content-type": kind})


@cache
def _read(name: str) -> bytes:
    return (files("mlx_kimi.server") / "page" / name).read_bytes()
