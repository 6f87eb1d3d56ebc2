"""`mlx_kimi serve` as a program: its first request, a port in use, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx
import pytest

from mlx_kimi.cli.interrupts import INTERRUPTED
from mlx_kimi.cli.serve import TERMINATED
from tests.processes import ENVIRONMENT, PROGRAM, run

FAILING = """
import time
from mlx_kimi.__main__ import main
from mlx_kimi.server import engine
def fails(*arguments):
    time.sleep(2)
    raise RuntimeError("There is no Stream(gpu, 1) in current thread.")
engine.measured_slice = fails
main()
"""


@contextmanager
def served(
    *options: str, program: Sequence[str] = PROGRAM, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program, and the URL that it says it listens on."""
    process = subprocess.Popen(
        [*program, "serve", "--port", "0", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **environment},
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "http://" in line)
        found = re.search(r"http://\S+/v1", line)
        assert found
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def ask(url: str, key: str = "") -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "What is 347 + 58?"}], "model": "pocket"}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/chat/completions", json=body, headers=headers, trust_env=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)]
)
def test_it_answers_at_once_and_ends_in_order(number: signal.Signals, code: int) -> None:
    with served() as (process, url):
        answer = ask(url).json()
        assert answer["choices"][0]["message"]["content"] == "347 + 58 = 405."
        port = url.split(":")[-1].removesuffix("/v1")
        taken = run("serve", "--port", port)
        assert taken.returncode == 1 and taken.stdout == ""
        assert taken.stderr.startswith(f"Error: --host 127.0.0.1 --port {port}: ")
        assert len(taken.stderr.splitlines()) == 1
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code and stdout == ""
    lines = [json.loads(line) for line in stderr.splitlines() if line]
    assert [line["status"] for line in lines] == [200]
    assert "347 + 58" not in stderr  # (an id may have 347 in it)


@pytest.mark.slow
def test_a_key_comes_from_the_environment() -> None:
    with served(MLX_KIMI_API_KEY="secret-key-1") as (_, url):
        assert ask(url).status_code == 401
        assert ask(url, "secret-key-1").status_code == 200


@pytest.mark.parametrize(
    "options, said",
    [
        (["--host", "0.0.0.0"], "--host must be 127.0.0.1 without --api-key but is 0.0.0.0"),
        (["--api-key", "x"], "--api-key must be 8 to 200 visible ASCII characters"),
        (["--allow-origin", "*"], "--allow-origin must be like http://localhost:3000 but is *"),
        (["--port", "70000"], "Invalid value for --port"),
        (["--temp", "-1"], "--temp must be 0, or from 0.001 to 1000 but is -1"),
    ],
)
def test_what_cannot_be_served_is_one_line(options: list[str], said: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_KIMI_API")}
    done = run("serve", "--port", "0", *options, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_it_ends_with_its_engine() -> None:
    with served("--cache-disk", "0GB", program=(sys.executable, "-c", FAILING)) as (process, url):
        answer = ask(url)
        _, stderr = process.communicate(timeout=30)
    said = "the engine failed: There is no Stream(gpu, 1) in current thread."
    assert answer.status_code == 500 and answer.json()["error"]["message"] == said
    *log, last = stderr.splitlines()
    assert process.returncode == 1 and last == f"Error: {said}"
    assert [json.loads(line).get("status") for line in log] == [None, 500]  # its traceback, once


@pytest.mark.slow
def test_a_budget_bounds_the_context_that_is_told() -> None:
    options = ("--memory-budget", "1GB", "--context", "512", "--cache-memory", "50MB")
    with served(*options, "--prefill-slice", "64") as (_, url):
        assert ask(url).json()["choices"][0]["message"]["content"] == "347 + 58 = 405."
        (model,) = httpx.get(f"{url}/models", trust_env=False).json()["data"]
        assert model["max_model_len"] == 512
        long = {"prompt": "word " * 600}
        answer = httpx.post(f"{url}/completions", json=long, trust_env=False)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_an_address_of_another_machine_is_one_line() -> None:
    done = run("serve", "--host", "192.0.2.1", "--port", "0", "--api-key", "secret-key-1")
    assert done.returncode == 1 and done.stderr.startswith("Error: --host 192.0.2.1 --port 0: ")
