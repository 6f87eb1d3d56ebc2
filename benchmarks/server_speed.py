"""Requests at once: tokens a second and time to the first token, beside mlx-lm's server.

    python -m benchmarks.server_speed                    # the pocket model, on a CPU
    python -m benchmarks.server_speed FOLDER --context 30000   # one of `random_folder`

Both serve the same folder, one after the other, and answer the same requests, which stream. Last, a
conversation of `--context` tokens goes on by a turn: how long until its answer begins.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.full_size import peer_kernels
from mlx_kimi.bundled import pocket_folder

START = 600.0  # seconds that a server may take to load and, on NVIDIA GPUs, to compile
WORDS = ("river", "stone", "seven", "light", "garden", "number", "table", "seed", "cloud", "road")
SERVERS = ("mlx_kimi", "mlx_lm")


@dataclass
class Answer:
    first: float  # seconds to the first token
    tokens: int
    prompt: int  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=pocket_folder())
    parser.add_argument("--words", type=int, default=60, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer, at most")
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=2000, help="tokens, about")
    parser.add_argument("--servers", nargs="*", choices=SERVERS, default=SERVERS)
    parser.add_argument("--serve-peer", type=int, metavar="PORT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve_peer:
        return serve_peer(given.folder, given.serve_peer)
    rates = {}
    for name in given.servers:
        with served(name, given.folder) as url:
            print(name, flush=True)
            rates[name] = asyncio.run(measure(url, given))
    if len(rates) > 1:
        ours, theirs = rates.values()
        for count in given.at_once:
            print(f"{count} at once: {ours[count] / theirs[count]:.2f} x as many tokens a second")


# ------------------------------------------------------------------------------------ servers
@contextmanager
def served(name: str, folder: Path) -> Iterator[str]:
    """The address of a server that has answered once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as made:
        if name == "mlx_kimi":
            command = ["mlx_kimi", "serve", "-m", str(folder), "--port", str(port)]
            command += ["--cache-disk", "0GB"]  # neither server keeps anything
        else:
            command = ["benchmarks.server_speed", for_peer(folder, Path(made)), "--serve-peer"]
            command.append(str(port))
        log = Path(made) / "log"
        with log.open("w") as lines:
            server = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=lines, stderr=subprocess.STDOUT
            )
        try:
            deadline = time.monotonic() + START
            while not _answers(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} did not start: {log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield url
        except BaseException:  # Ctrl-C, too
            print(log.read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            server.terminate()
            server.wait()


def _answers(url: str) -> bool:
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    try:
        address = f"{url}/v1/chat/completions"
        return httpx.post(address, json=asked, timeout=START, trust_env=False).is_success
    except httpx.TransportError:
        return False


def for_peer(folder: Path, made: Path) -> str:
    """The same folder with a tokenizer that transformers reads without the folder's own code."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = str(folder / "tiktoken.model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {int(id): token["content"] for id, token in config["added_tokens_decoder"].items()}
    names = [named.get(id, f"<|{id}|>") for id in range(min(named), max(named) + 1)]
    specials = dict.fromkeys(names)
    converter = TikTokenConverter(vocab_file=ranks, extra_special_tokens=specials)
    target = made / "folder"
    target.mkdir()
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            (target / file.name).symlink_to(file.resolve())
    converter.converted().save(str(target / "tokenizer.json"))
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (target / "tokenizer_config.json").write_text(json.dumps(kept))
    return str(target)


def serve_peer(folder: Path, port: int) -> None:
    with peer_kernels():
        from mlx_lm import server

        server.ThreadingHTTPServer.request_queue_size = 64  # 5 connections wait else
        sys.argv = ["mlx_lm.server", "--model", str(folder), "--port", str(port)]
        server.main()


# ------------------------------------------------------------------------------------ requests
async def measure(url: str, given: argparse.Namespace) -> dict[int, float]:
    """Tokens a second of so many requests at once."""
    rates: dict[int, float] = {}
    alone = httpx.Limits(max_keepalive_connections=0)  # mlx-lm's server closes what it has answered
    async with httpx.AsyncClient(
        base_url=url, timeout=600, trust_env=False, limits=alone
    ) as client:
        for count in given.at_once:
            # So that what is compiled for a number of rows is not measured.
            await _together(client, count, 8, given.words, seed=-count)
            tokens, seconds, firsts = 0, 0.0, list[float]()
            for round_ in range(given.rounds):
                began = time.perf_counter()
                answers = await _together(client, count, given.tokens, given.words, round_)
                seconds += time.perf_counter() - began
                tokens += sum(answer.tokens for answer in answers)
                firsts += [answer.first for answer in answers]
            rates[count] = tokens / seconds
            p50, p99 = np.quantile(firsts, (0.5, 0.99)) * 1e3
            print(
                f"  {count:>2} at once, {answers[0].prompt} tokens: {rates[count]:7.1f} tok/s, "
                f"first token p50 {p50:.0f}, p99 {p99:.0f} ms",
                flush=True,
            )
        asked = [{"role": "user", "content": _text(given.context, "long")}]
        for turn in ("read", "asked again", *(f"with {n} more turns" for n in range(1, 5))):
            if turn.startswith("with"):
                asked.append({"role": "assistant", "content": "seven"})
                asked.append({"role": "user", "content": "And now?"})
            answer = await _ask(client, asked, 8)
            print(
                f"  {answer.prompt} tokens {turn}: first token after {answer.first:.3f} s",
                flush=True,
            )
    return rates


async def _together(
    client: httpx.AsyncClient, count: int, tokens: int, words: int, seed: int
) -> list[Answer]:
    asked = [[{"role": "user", "content": _text(words, f"{seed} {n}")}] for n in range(count)]
    return await asyncio.gather(*(_ask(client, messages, tokens) for messages in asked))


def _text(words: int, seed: str) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


async def _ask(client: httpx.AsyncClient, messages: list[Any], tokens: int) -> Answer:
    asked = {"messages": messages, "max_tokens": tokens, "stream": True, "temperature": 1.0}
    asked["stream_options"] = {"include_usage": True}
    first, usage, began = 0.0, dict[str, int](), time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            said = any(choice["delta"].get("content") for choice in chunk["choices"])
            if said and not first:
                first = time.perf_counter() - began
            usage = chunk.get("usage") or usage
    seconds = time.perf_counter() - began
    return Answer(first or seconds, usage["completion_tokens"], usage["prompt_tokens"])


if __name__ == "__main__":
    main()
