"""Malformed requests to a server: `python -m tests.fuzz.requests 10000` sends so many.

Each ends in an answer, an error of the API or a closed connection: never in status 500.
"""

import argparse
import gc
import json
import re
import socket
import subprocess
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import httpx
import psutil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_kimi.server.answers import Answers
from mlx_kimi.server.exchange import Exchange
from mlx_kimi.server.reader import AnswerReader
from mlx_kimi.server.record import Record
from tests.processes import PROGRAM
from tests.server import JSON, WEATHER, Scripted, serving, until

OWN: dict[str, Callable[[dict[str, Any]], bool]] = {  # which of the bodies are a route's
    "/v1/chat/completions": lambda body: "messages" in body and "system" not in body,
    "/v1/completions": lambda body: "prompt" in body,
    "/v1/responses": lambda body: "input" in body,
    "/v1/messages": lambda body: "system" in body,
    "/v1/messages/count_tokens": lambda body: "system" in body,
}
PATHS = list(OWN)
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}
BODIES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}], "model": "pocket"},
    {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}], "n": 2},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        "tools": [WEATHER],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    },
    {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "f", "strict": True}}, WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "it",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"anyOf": [{"minimum": 3}, {"$ref": "#/$defs/b"}]}},
                    "required": ["a"],
                    "$defs": {"b": {"type": "string", "pattern": "^a{1,3}$", "enum": ["a"]}},
                },
            },
        },
    },
    {
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["a", "b"],
        "max_tokens": 5,
    },
    {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "sunny"},
            {"type": "reasoning", "summary": []},
        ],
        "instructions": "Be.",
        "tools": [{"type": "function", "name": "f"}, {"type": "web_search"}],
        "include": ["message.output_text.logprobs"],
        "stream": True,
        "max_output_tokens": 4,
    },
    {
        "model": "claude-x",
        "max_tokens": 4,
        "system": [{"type": "text", "text": "Be.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a", "content": "sunny"}],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "stop_sequences": ["a"],
        "stream": True,
    },
    {"prompt": "Hi", "max_tokens": 3, "logprobs": 1, "stream": True},
    {"prompt": [[1, 2], [3]], "echo": False, "stop": "x", "min_p": 0.1, "top_k": 3},
]
ENDS = (  # of streams
    *("data: [DONE]", "event: message_stop", "event: response.completed"),
    "event: response.incomplete",
)
WORDS = [
    *("<|im_end|>", "<|tool_call_begin|>", "\0", "\ud800", "\u202e", "", "é" * 300, "{{ 7 * 7 }}"),
    *("file:///etc/passwd", "http://127.0.0.1/", "functions.f:0", "-1", "[DONE]", "\r\n\r\n"),
]
NUMBERS = [0, -1, 1 << 31, 1 << 64, -(1 << 70), 10**400, 1.5, -0.0, 1e308, 1e-308]
MORE_KEYS = {"role", "content", "type", "x", "logit_bias"}
KEYS = sorted(MORE_KEYS | {key for body in BODIES for key in body})
LEAVES = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=20)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a body with each of its keys or indices."""
    if isinstance(value, dict):
        here = [(value, key) for key in value]
    elif isinstance(value, list):
        here = [(value, index) for index in range(len(value))]
    else:
        return []
    return here + [place for holder, key in here for place in places(holder[key])]


@st.composite
def bodies(draw: st.DrawFn, of: list[dict[str, Any]] = BODIES) -> bytes:
    """A body that was right, with some of its values changed, and perhaps some of its bytes."""
    body = json.loads(json.dumps(draw(st.sampled_from(of))))
    for _ in range(draw(st.integers(0, 3))):
        found = places(body)
        change = draw(st.sampled_from(["replace", "delete", "add", "nest"]))
        holder, key = draw(st.sampled_from(found)) if found else (body, "x")
        if change == "add":
            body[draw(st.sampled_from(KEYS) | st.text(max_size=8))] = draw(VALUES)
        elif change == "delete" and found:
            del holder[key]
        elif change == "nest" and found:
            for _ in range(draw(st.integers(1, 150))):
                holder[key] = [holder[key]]
        elif found:
            holder[key] = draw(VALUES)
    data = json.dumps(body).encode()
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=6)) + data[at + draw(st.integers(0, 6)) :]
    return data


def sent(path: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """A path with a body, mostly of its own kind."""
    own = [body for body in BODIES if OWN[path](body)]
    return st.tuples(st.just(path), bodies(own) | bodies(own) | bodies())


@st.composite
def streams_of_bytes(draw: st.DrawFn) -> bytes:
    """What a connection sends, whose heads may be wrong, too."""
    method = draw(st.sampled_from([b"POST", b"GET", b"OPTIONS", b"post", b"X" * 300, b""]))
    path = draw(st.sampled_from([*PATHS, "/v1/models/%00", "/../etc/passwd", "*", "/%ff", "//x"]))
    body = draw(bodies())
    lines = [
        b"Host: localhost",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
    ]
    extra = [
        *(b"Content-Length: -1", b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Host: x"),
        *(b"Expect: 100-continue", b"Upgrade: websocket", b"Connection: upgrade, close", b":"),
        *(b"Authorization: Bearer \xff", b"Origin: null", b"Content-Type: text/plain; x", b"\0: a"),
    ]
    lines += draw(st.lists(st.sampled_from(extra) | st.binary(max_size=20), max_size=2))
    kept = [line for line in lines if draw(st.integers(0, 9))]
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b""]))
    head = b"\r\n".join([method + b" " + path.encode() + b" " + version, *kept])
    return head + b"\r\n\r\n" + body


def send_bodies(client: httpx.Client, count: int, seen: Counter[int]) -> None:
    """Send bodies to all routes that take any."""

    @_examples(count)
    @given(st.sampled_from(PATHS).flatmap(sent))
    def one(path_and_body: tuple[str, bytes]) -> None:
        path, body = path_and_body
        answer = client.post(path, content=body, headers=JSON)
        seen[answer.status_code] += 1
        assert answer.status_code in (200, 400, 404), (answer.status_code, body)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"] and error["type"] and "\n" not in error["message"], error
        elif not answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.json().keys() & {"choices", "output", "content", "input_tokens"}
        else:
            assert answer.text.split("\n\n")[-2].startswith(ENDS), answer.text

    one()


def send_bytes(client: httpx.Client, count: int, seen: Counter[int]) -> None:
    """Send anything, each on a connection of its own that then sends no more."""
    host, port = client.base_url.host, client.base_url.port or 80

    @_examples(count)
    @given(streams_of_bytes())
    def one(data: bytes) -> None:
        with socket.create_connection((host, port), timeout=60) as opened:
            try:
                opened.sendall(data)
                opened.shutdown(socket.SHUT_WR)
                answer = opened.makefile("rb").read()
            except ConnectionError:
                answer = b""
        status = int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0
        seen[status] += 1
        assert status < 500, (data, answer)

    one()


def _examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def send(client: httpx.Client, count: int) -> Counter[int]:
    """Send `count` requests; how many had which status."""
    seen: Counter[int] = Counter()
    send_bodies(client, count - count // 3, seen)
    send_bytes(client, count // 3, seen)
    assert client.get("/health").status_code == 200
    return seen


def attack(count: int) -> Counter[int]:
    """Send `count` requests to a server of this process, and see that nothing stays of them."""
    before = leftovers()  # of servers that other tests have running
    with serving(Scripted(["Hello, wörld.<|im_end|>"])) as running:
        seen = send(running.asking, count)
        assert not [line for line in running.lines if line["status"] == 500]
        until(lambda: not leftovers() - before)
    return seen


def leftovers() -> Counter[str]:
    """What a server of this process holds of requests, by type."""
    gc.collect()
    kinds = (Answers, Exchange, AnswerReader, Record)
    return Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, kinds))


def main() -> None:
    """Send as many requests as asked for to the program itself; say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    count = parser.parse_args().count
    command = [*PROGRAM, "serve", "--port", "0", "--max-tokens", "4", "--cache-memory", "20MB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr)
        url = next(found[0] for line in lines if (found := re.search(r"http://[\d.:]+", line)))
        threading.Thread(target=lambda: deque(lines, 0), daemon=True).start()
        try:
            with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
                send(client, 1000)
                before = psutil.Process(process.pid).memory_info().rss
                seen = send(client, count)
                after = psutil.Process(process.pid).memory_info().rss
        finally:
            process.terminate()
    print(", ".join(f"{number} of status {status}" for status, number in sorted(seen.items())))
    print(f"memory of the server: {before / 1e6:.0f} MB after 1,000, then {after / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
