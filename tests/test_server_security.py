"""Who may ask, and what is refused before a model hears of it: of every route in the table."""

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.routing import Route

from mlx_kimi.errors import OptionError
from mlx_kimi.server import body, http
from mlx_kimi.server.app import routes
from mlx_kimi.server.security import Access
from mlx_kimi.server.service import Service
from tests.server import CONTEXT, JSON, Running, Scripted, pocket_tokenizer, serving, until

KEY = "secret-key-1"
PAGE = "http://localhost:3000"


def table() -> list[Route]:
    return routes(Service(Scripted(), pocket_tokenizer(), "pocket", CONTEXT))  # type: ignore[arg-type]


ROUTES = [
    (method, route.path.replace("{name:path}", "pocket"))
    for route in table()
    for method in sorted(route.methods or ())
]
# Files of the page, which a browser asks for before it can show a key. They hold nothing secret.
WITHOUT_KEY = [
    (method, path)
    for path in (
        "/",
        *(f"/page/{name}" for name in ("page.css", "icon.svg", "page.js", "api.js", "dom.js")),
        *(f"/page/{name}" for name in ("markdown.js", "messages.js", "store.js")),
        "/page/vendor/markdown-it-15.0.3.js",
    )
    for method in ("GET", "HEAD")
]
EVERYWHERE = [*ROUTES, ("GET", "/x"), ("POST", "/"), ("POST", "/v1/x")]
POSTS = [path for method, path in ROUTES if method == "POST"]


@pytest.fixture(scope="module")
def free() -> Iterator[Running]:
    with serving(access=Access(origins=(PAGE,), hosts=("mac.local",))) as running:
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(access=Access(key=KEY, origins=(PAGE,))) as running:
        yield running


def ask(running: Running, method: str, path: str, **headers: str) -> httpx.Response:
    return running.asking.request(method, path, headers={**JSON, **headers}, content="{}")


def cors(answer: httpx.Response) -> list[str]:
    return [name for name in answer.headers if name.startswith("access-control")]


def test_the_table_has_all_routes() -> None:
    assert len(ROUTES) >= 10 and {method for method, _ in ROUTES} == {"GET", "HEAD", "POST"}


def test_every_route_but_the_pages_files_wants_the_key(locked: Running) -> None:
    wrong = ({}, {"authorization": "Bearer wrong"}, {"x-api-key": KEY + "x"})
    right = ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY})
    assert {*WITHOUT_KEY} < {*EVERYWHERE}
    for method, path in WITHOUT_KEY:
        assert ask(locked, method, path).status_code == 200
    for method, path in (each for each in EVERYWHERE if each not in WITHOUT_KEY):
        for headers in wrong:
            answer = ask(locked, method, path, **headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert answer.json()["error"]["type"] == "authentication_error"
        for headers in right:
            assert ask(locked, method, path, **headers).status_code != 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "localhost.evil", "", "a@b"])
def test_a_foreign_host_is_refused(free: Running, host: str) -> None:
    for method, path in EVERYWHERE:
        assert ask(free, method, path, host=host).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3001"])
def test_a_foreign_page_is_refused(free: Running, origin: str) -> None:
    for method, path in EVERYWHERE:
        for kind in (method, "OPTIONS"):
            answer = ask(free, kind, path, origin=origin)
            assert answer.status_code == 403 and not cors(answer)


def test_no_page_may_read_unless_it_is_named(free: Running) -> None:
    for method, path in EVERYWHERE:
        answer, named = ask(free, method, path), ask(free, method, path, origin=PAGE)
        assert not cors(answer) and named.status_code == answer.status_code
        assert named.headers["access-control-allow-origin"] == PAGE
        assert "Origin" in named.headers["vary"]


def test_a_named_page_is_told_what_it_may_send(locked: Running) -> None:
    answer = ask(locked, "OPTIONS", "/v1/chat/completions", origin=PAGE)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in answer.headers["access-control-allow-headers"]
    refused = ask(locked, "GET", "/v1/models", origin=PAGE)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == PAGE


def test_names_of_this_machine_are_known(free: Running) -> None:
    for host in ("localhost", "127.0.0.1:1", "[::1]:8080", "mac.local", "MAC.local"):
        assert ask(free, "GET", "/health", host=host).status_code == 200
        assert ask(free, "GET", "/health", host=host, origin=f"http://{host}").status_code == 200


def test_beyond_this_machine_a_key_is_needed() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.4", "mac.local"):
        with pytest.raises(OptionError, match="--api-key"):
            Access(host)
        access = Access(host, KEY)
        assert access.knows_host("192.168.1.4:80") and access.knows_host("localhost")
        assert not access.knows_host("evil.example") and not access.knows_host(None)
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        assert Access(host).is_local and not Access(host).knows_host("192.168.1.4")
    for key in ("short", "with blank 123", "ümlaut-key"):
        with pytest.raises(OptionError, match="ASCII"):
            Access(key=key)
    for origin in ("*", "localhost:3000", "http://a/b", "null"):
        with pytest.raises(OptionError, match="allow_origin"):
            Access(origins=(origin,))


# ------------------------------------------------------------------------------------------- bodies
@pytest.mark.parametrize(
    "content, status",
    [
        (b"", 400),
        (b"\xff{}", 400),
        (b"[]", 400),
        (b"{", 400),
        (b'{"temperature": NaN}', 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"x":' + b"[" * 100_000, 400),
        (b'{"x":' * 100_000, 400),
        (b'{"metadata":' + b"[" * 150 + b"]" * 150 + b"}", 400),
        (b'{"messages": "' + b"x" * (body.BODY_BYTES + 1) + b'"}', 413),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bombs_and_nonsense_are_refused(free: Running, content: bytes, status: int) -> None:
    for path in POSTS:
        answer = free.asking.post(path, content=content, headers=JSON)
        assert answer.status_code == status and answer.json()["error"]["message"]
        in_pieces = free.asking.post(path, content=iter([content]), headers=JSON)
        assert in_pieces.status_code == status
    assert free.asking.get("/health").status_code == 200


def test_only_json_is_read(free: Running) -> None:
    for path in POSTS:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = free.asking.post(path, content="{}", headers={"content-type": kind})
            assert answer.status_code == 415
        packed = {**JSON, "content-encoding": "gzip"}
        assert free.asking.post(path, content="{}", headers=packed).status_code == 415


def test_other_methods_are_refused(free: Running) -> None:
    for _, path in EVERYWHERE:
        answer = ask(free, "DELETE", path)
        assert answer.status_code == (404 if path in ("/x", "/v1/x") else 405)
        assert answer.json()["error"]["type"] in ("not_found_error", "invalid_request_error")


def raw(running: Running, data: bytes) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)), timeout=10)
    opened.sendall(data)
    return opened


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
)


def test_a_slow_upload_is_ended(free: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body.read_body, "__defaults__", (body.BODY_BYTES, 0.3))
    with raw(free, HEAD + b"content-length: 100\r\n\r\n{") as opened:
        answer = opened.makefile("rb").read()  # until the server closes
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"timeout_error"' in answer


def test_a_head_that_does_not_end_is_ended(free: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.3)
    for data in (b"", HEAD):
        with raw(free, data) as opened:
            assert opened.makefile("rb").read() == b""


def test_an_endless_head_is_refused(free: Running) -> None:
    with pytest.raises(ConnectionError), raw(free, HEAD + b"x: ") as opened:
        for _ in range(1000):
            opened.sendall(b"y" * 100_000)
    assert free.asking.get("/health").status_code == 200


def test_what_is_no_http_is_told_so(free: Running) -> None:
    for data in (b"EHLO me\r\n\r\n", b"POST / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"):
        with raw(free, data) as opened:
            head, _, content = opened.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(content)["error"]["type"] == "invalid_request_error"


def test_a_huge_body_is_refused_before_it_is_sent(free: Running) -> None:
    with raw(free, HEAD + b"content-length: 99999999999\r\n\r\n{") as opened:
        assert opened.makefile("rb").read().startswith(b"HTTP/1.1 413 ")


def test_a_half_closed_socket_frees_its_place() -> None:
    engine = Scripted(before=60.0)
    content = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
    with serving(engine) as running:
        request = HEAD + b"content-length: %d\r\n\r\n" % len(content) + content
        with raw(running, request) as opened:
            until(lambda: engine.tickets)
            opened.shutdown(socket.SHUT_WR)
            until(lambda: engine.tickets[0].is_cancelled)


def test_a_body_that_is_cut_off_is_nobodys(free: Running) -> None:
    before = len(free.lines)
    raw(free, HEAD + b"content-length: 100\r\n\r\n{").close()
    until(lambda: len(free.lines) > before)
    assert free.lines[-1]["status"] == 499
