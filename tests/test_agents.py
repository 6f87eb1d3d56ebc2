"""Agents: what they sent when they mended a file; and, where they are installed, that they do.

They run on the real engine with scripted tokens: a file is changed, its test passes, the agent
exits 0. `npm install @openai/codex opencode-ai @anthropic-ai/claude-code` brings them. Their
prompts are made short, as the model that ships inside reads long ones slowly on a CPU.
`agent_requests` holds what they sent with their own prompts, of which the long texts are left out.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlx_kimi import load
from mlx_kimi.server.engine import Engine
from tests.processes import ENVIRONMENT, PROGRAM
from tests.scripted import Say, call, scripted
from tests.server import Running, Scripted, pocket_tokenizer, serving, until

RECORDED = sorted((Path(__file__).parent / "agent_requests").glob("*.json"))
WRONG, RIGHT = "def add(a, b):\n    return a - b\n", "def add(a, b):\n    return a + b\n"
TEST = """import unittest

from calc import add


class Test(unittest.TestCase):
    def test_add(self):
        self.assertEqual(add(2, 3), 5)
"""
CHECK = f"{sys.executable} -m unittest -q test_calc"
SAID = "Done: add adds now, and its test passes."
ASKED = "Mend add in calc.py, and run its test."
MINUTES = 4


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_what_agents_sent_is_taken_and_each_turn_begins_as_the_one_before(file: Path) -> None:
    recorded = json.loads(file.read_text(encoding="utf-8"))
    bodies = recorded["requests"]
    engine = Scripted()
    with serving(engine) as running:
        for body in bodies:
            if body.pop("uses_tools", False):
                body["tools"] = recorded["tools"]
            assert running.events(recorded["path"], body)
    turns = [
        request.ids
        for request, body in zip(engine.requests, bodies, strict=True)
        if "tools" in body
    ]
    assert len(turns) == (3 if file.stem == "codex" else 4)
    for turn, (before, after) in enumerate(pairwise(turns)):
        assert after[: len(before)] == before
        new = pocket_tokenizer().decode(after[len(before) :], skip_control=False)
        assert new.startswith("<|tool_calls_section_begin|><|tool_call_begin|>functions.")
        assert f":{turn}<|tool_call_argument_begin|>{{" in new


def steps(*answers: str) -> Say:
    """One answer after each result of a tool; a title where one is asked for."""

    def say(prompt: str) -> str:
        if "title generator" in prompt:
            return "Mend add<|im_end|>"
        return answers[prompt.count("## Return of ")]

    return say


def call_of(name: str, index: int, **arguments: Any) -> str:
    return call(name, index, json.dumps(arguments))


CODEX = steps(
    call_of("exec_command", 0, cmd="sed -i 's/a - b/a + b/' calc.py"),
    call_of("exec_command", 1, cmd=CHECK),
    f"{SAID}<|im_end|>",
)


def opencode(folder: Path) -> Say:
    file = str(folder / "calc.py")
    return steps(
        call_of("read", 0, filePath=file),
        call_of("edit", 1, filePath=file, oldString="a - b", newString="a + b"),
        call_of("bash", 2, command=CHECK, description="Run the test"),
        f"{SAID}<|im_end|>",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is to be mended, and beside it a home for the agent."""
    work = tmp_path / "work"
    (tmp_path / "home").mkdir()
    work.mkdir()
    (work / "calc.py").write_text(WRONG)
    (work / "test_calc.py").write_text(TEST)
    subprocess.run(["git", "init", "-q", str(work)], check=True)
    return work


def run(folder: Path, name: str, *arguments: str) -> str:
    """What an agent says in the end."""
    program = shutil.which(name)
    assert program is not None
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    home = str(folder.parent / "home")
    environment = {**kept, "HOME": home, "NO_PROXY": "127.0.0.1"}
    environment |= {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    done = subprocess.run(
        [program, *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def real(say: Say) -> Iterator[Running]:
    """A server whose engine is the real one, but for what it draws."""
    model, tokenizer = load()
    engine = Engine(model, prefill_slice=512)
    with scripted(tokenizer, say), serving(engine, tokenizer=tokenizer) as running:
        yield running


def check(folder: Path, running: Running, said: str, turns: int) -> None:
    """The file is mended, its test passes; what was read or drawn before was not read again."""
    assert SAID in said
    assert (folder / "calc.py").read_text() == RIGHT
    assert subprocess.run(CHECK.split(), cwd=folder).returncode == 0
    until(lambda: len([line for line in running.lines if "prompt_tokens" in line]) >= turns)
    lines = [line for line in running.lines if "prompt_tokens" in line]
    assert {line["status"] for line in running.lines} == {200}
    turn = [line for line in lines if line["completion_tokens"] > 15]  # (not a title)
    assert len(turn) == turns
    for before, line in pairwise(turn):
        assert line["cached_tokens"] >= before["prompt_tokens"] - 64, line


def test_a_script_is_what_the_real_engine_draws() -> None:
    """Without an agent: a call, whose arguments come back as an object, and what follows it."""
    tool = {"name": "read", "input_schema": {"type": "object"}}
    asked: list[Any] = [{"role": "user", "content": ASKED}]
    body = {"model": "pocket", "max_tokens": 99, "tools": [tool], "messages": asked}
    written = '{"file" : "calc.py"}'
    with real(steps(call("read", 0, written), f"{SAID}<|im_end|>")) as running:
        answer = running.post("/v1/messages", body).json()
        (block,) = answer["content"]
        assert (block["name"], block["input"]) == ("read", json.loads(written))
        result = {"type": "tool_result", "tool_use_id": block["id"], "content": WRONG}
        asked.append({"role": "assistant", "content": answer["content"]})
        asked.append({"role": "user", "content": [result]})
        last = running.post("/v1/messages", body).json()
    assert last["content"][0]["text"] == SAID
    known = sum(answer["usage"].values()) - 1  # but the token that ended the answer
    assert last["usage"]["cache_read_input_tokens"] >= known


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")


CODEX_CONFIG = """model = "pocket"
model_provider = "kimi"
model_instructions_file = "{home}/instructions.md"
web_search = "disabled"

[model_providers.kimi]
name = "kimi"
base_url = "{url}/v1"
wire_api = "responses"

[features]
goals = false
multi_agent = false
skill_search = false
"""


@pytest.mark.slow
@needs("codex")
def test_codex_mends_a_file(folder: Path) -> None:
    home = folder.parent / "home"
    (home / "instructions.md").write_text("Mend what you are asked to.")
    with real(CODEX) as running:
        (home / ".codex").mkdir()
        config = CODEX_CONFIG.format(home=home, url=running.url)
        (home / ".codex" / "config.toml").write_text(config)
        how = ("--skip-git-repo-check", "--sandbox", "danger-full-access")
        said = run(folder, "codex", "exec", *how, ASKED)
        check(folder, running, said, turns=3)


APIS = {
    "@ai-sdk/openai-compatible": "/v1/chat/completions",
    "@ai-sdk/anthropic": "/v1/messages",
    "@ai-sdk/openai": "/v1/responses",
}
OFF = ("glob", "grep", "skill", "task", "todowrite", "webfetch")


@pytest.mark.slow
@needs("opencode")
@pytest.mark.parametrize("api", APIS)
def test_opencode_mends_a_file(folder: Path, api: str) -> None:
    with real(opencode(folder)) as running:
        options = {"baseURL": f"{running.url}/v1", "apiKey": "any"}
        models = {"pocket": {"name": "pocket", "limit": {"context": 32_768, "output": 2048}}}
        kimi = {"npm": api, "name": "kimi", "options": options, "models": models}
        config = {
            "model": "kimi/pocket",
            "share": "disabled",
            "provider": {"kimi": kimi},
            "agent": {"build": {"prompt": "Mend what you are asked to."}},
            "tools": dict.fromkeys(OFF, False),
        }
        (folder / "opencode.json").write_text(json.dumps(config))
        said = run(folder, "opencode", "run", ASKED)
        check(folder, running, said, turns=4)
        assert {line["request"] for line in running.lines} == {f"POST {APIS[api]}"}


def claude(folder: Path) -> Say:
    file = str(folder / "calc.py")
    return steps(
        call_of("Read", 0, file_path=file),
        call_of("Edit", 1, file_path=file, old_string="a - b", new_string="a + b"),
        call_of("Bash", 2, command=CHECK, description="Run the test"),
        f"{SAID}<|im_end|>",
    )


@pytest.mark.slow
@needs("claude")
def test_claude_code_mends_a_file(folder: Path) -> None:
    how = ("--system-prompt", "Mend what you are asked to.", "--tools", "Read,Edit,Bash")
    allowed = ("--allowedTools", "Read,Edit,Bash", "--no-session-persistence")
    with real(claude(folder)) as running:
        launch(folder, "claude-code", running)
        said = run(folder, "claude", "-p", ASKED, *how, *allowed)
        check(folder, running, said, turns=4)


def launch(folder: Path, agent: str, running: Running) -> None:
    """What `mlx_kimi launch --write` writes, where the agent looks for it."""
    environment = {**ENVIRONMENT, "HOME": str(folder.parent / "home")}
    command = [*PROGRAM, "launch", agent, "--url", running.url, "--write"]
    subprocess.run(command, cwd=folder, env=environment, check=True)


AGENTS = {
    "claude-code": ("claude", "-p"),
    "codex": ("codex", "exec", "--skip-git-repo-check"),
    "opencode": ("opencode", "run"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "agent", [pytest.param(agent, marks=needs(command[0])) for agent, command in AGENTS.items()]
)
def test_an_agent_runs_with_what_launch_writes(folder: Path, agent: str) -> None:
    name, *arguments = AGENTS[agent]
    engine = Scripted()
    with serving(engine) as running:
        launch(folder, agent, running)
        assert "Hello." in run(folder, name, *arguments, "Say hello.")
    assert engine.requests
