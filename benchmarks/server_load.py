"""Many clients of one server, a tenth of them killed at random moments.

    python -m benchmarks.server_load --clients 200 --seconds 600

Says how many answers had an error that no client caused, how long /health took, how much memory the
server has come to hold beside the prefix tree, and whether its counters are the sums of the usages
in its log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
KILLED = 0.1  # share of the requests
QUESTIONS = ("What is {} + {}?", "Sort {} {} 7 3.", "What is Kimi Linear?", "Who are you?")


@dataclass
class Seen:
    """What the clients saw."""

    answers: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)  # seconds
    memory: list[int] = field(default_factory=list)  # bytes of the server without prefix tree
    completion_tokens: int = 0


def body(rng: random.Random) -> dict[str, Any]:
    """A request of one of several kinds."""
    asked: dict[str, Any] = {"max_tokens": rng.choice((8, 40, 160)), "seed": rng.randrange(1000)}
    text = rng.choice(QUESTIONS).format(rng.randrange(500), rng.randrange(500))
    asked["messages"] = [{"role": "user", "content": text}]
    if rng.random() < 0.3:
        asked["messages"][0]["content"] = "What is the weather in Paris?"
        asked["tools"] = [WEATHER]
    if rng.random() < 0.6:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    if rng.random() < 0.3:
        asked |= {"temperature": 1, "top_p": 0.9}
    return asked


async def request(port: int, method: str, path: str, content: bytes = b"") -> bytes:
    """The bytes of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode()
        )
        writer.write(content)
        return await reader.read()
    finally:
        writer.close()


async def client(port: int, seed: int, end: float, seen: Seen) -> None:
    """Ask again and again."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        asked = body(rng)
        data = json.dumps(asked).encode()
        work = asyncio.create_task(request(port, "POST", "/v1/chat/completions", data))
        if rng.random() < KILLED:
            await asyncio.sleep(rng.expovariate(1))
            seen.answers["killed" if not work.done() else "too late to kill"] += 1
            work.cancel()
            continue
        try:
            answer = (await work).decode()
        except OSError as error:
            seen.errors.append(repr(error))
            continue
        is_whole = "data: [DONE]" in answer if "stream" in asked else '"choices"' in answer
        if not answer.startswith("HTTP/1.1 200 ") or not is_whole:
            seen.errors.append(answer[:300])
            continue
        seen.answers["streamed" if "stream" in asked else "whole"] += 1
        (count,) = re.findall(r'"completion_tokens":(\d+)', answer)
        seen.completion_tokens += int(count)


async def watch(port: int, server: psutil.Process, end: float, seen: Seen) -> None:
    """How long /health takes, and what the server holds."""
    while time.monotonic() < end:
        began = time.monotonic()
        await request(port, "GET", "/health")
        seen.health.append(time.monotonic() - began)
        metrics = (await request(port, "GET", "/metrics")).decode()
        (tree,) = re.findall(r"^mlx_kimi_tree_bytes (\S+)$", metrics, re.M)
        seen.memory.append(server.memory_info().rss - int(float(tree)))
        await asyncio.sleep(0.2)


async def load(port: int, server: psutil.Process, clients: int, seconds: float) -> Seen:
    seen = Seen()
    end = time.monotonic() + seconds
    each = [client(port, seed, end, seen) for seed in range(clients)]
    await asyncio.gather(watch(port, server, end, seen), *each)
    await asyncio.sleep(2)  # for what the killed ones left
    return seen


def sums(lines: list[str]) -> Counter[str]:
    """Of the usages in a log."""
    found: Counter[str] = Counter()
    for line in lines:
        for kind in ("prompt", "cached", "completion"):
            found[kind] += json.loads(line).get(f"{kind}_tokens", 0)
    return found


def counters(port: int) -> Counter[str]:
    text = asyncio.run(request(port, "GET", "/metrics")).decode()
    found = re.findall(r"^mlx_kimi_(prompt|cached|completion)_tokens_total (\S+)$", text, re.M)
    return Counter({kind: int(float(value)) for kind, value in found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600.0)
    given = parser.parse_args()
    # A prefix tree that is soon full: its states' own overhead counts as memory beside it.
    command = [sys.executable, "-m", "mlx_kimi", "serve", "--port", "0", "--cache-memory", "128MB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    try:
        url = next(found for line in process.stderr if (found := re.search(r":(\d+)/v1", line)))
        threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
        port, server = int(url[1]), psutil.Process(process.pid)
        seen = asyncio.run(load(port, server, given.clients, given.seconds))
        counted = counters(port)
    finally:
        process.terminate()
        process.wait()
    time.sleep(0.5)
    logged = sums([line for line in lines if line.startswith("{")])
    health = sorted(seen.health)
    tenth = max(len(seen.memory) // 10, 1)
    print(f"answers: {dict(seen.answers)}; errors: {len(seen.errors)} {seen.errors[:3]}")
    print(f"tokens a second: {seen.completion_tokens / given.seconds:.1f}")
    print(
        f"/health: median {health[len(health) // 2] * 1e3:.1f} ms, "
        f"p99 {health[len(health) * 99 // 100] * 1e3:.1f} ms of {len(health)}"
    )
    print(
        "memory without the prefix tree: "
        + ", ".join(f"{m / 1e6:.0f}" for m in seen.memory[::tenth])
        + f" MB, largest {max(seen.memory) / 1e6:.0f}"
    )
    print(f"counters {dict(counted)}, sums of the log {dict(logged)}: {counted == logged}")


if __name__ == "__main__":
    main()
