"""What agents are told of a running server."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlx_kimi.cli.agents import AGENTS
from mlx_kimi.server.security import Access
from tests.processes import ENVIRONMENT, PROGRAM
from tests.server import CONTEXT, serving

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEY = 'a-"quoted"-key'


def launched(
    url: str, agent: str, *options: str, key: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    env = ENVIRONMENT | ({"MLX_KIMI_API_KEY": key} if key else {})
    env |= {"HOME": str(cwd)} if cwd else {}
    command = [*PROGRAM, "launch", agent, "--url", url, *options]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)


@pytest.mark.slow
def test_each_agent_is_told_the_address_the_model_and_the_key() -> None:
    with serving(access=Access("127.0.0.1", KEY)) as server:
        said = {agent: launched(server.url, agent, key=KEY).stdout for agent in AGENTS}
        openai = f"{server.url}/v1"
        env = json.loads(said["claude-code"])["env"]
        assert env["ANTHROPIC_BASE_URL"] == server.url
        assert (env["ANTHROPIC_AUTH_TOKEN"], env["ANTHROPIC_MODEL"]) == (KEY, "pocket")

        codex = tomllib.loads(said["codex"])
        provider = codex["model_providers"][codex["model_provider"]]
        assert (codex["model"], codex["model_context_window"]) == ("pocket", CONTEXT)
        assert (provider["base_url"], provider["wire_api"]) == (openai, "responses")
        assert provider["env_key"] == "MLX_KIMI_API_KEY"  # not the key itself

        opencode = json.loads(said["opencode"])
        name, model = opencode["model"].split("/")
        provider = opencode["provider"][name]
        assert provider["options"] == {"baseURL": openai, "apiKey": KEY}
        assert provider["models"][model]["limit"]["context"] == CONTEXT

        aider = yaml.safe_load(said["aider"])
        assert aider == {
            "openai-api-base": openai,
            "openai-api-key": KEY,
            "model": "openai/pocket",
        }
        (model,) = yaml.safe_load(said["continue"])["models"]
        assert (model["apiBase"], model["apiKey"], model["model"]) == (openai, KEY, "pocket")
        words = shlex.split(said["openai"])
        assert words == ["export", f"OPENAI_BASE_URL={openai}", f"OPENAI_API_KEY={KEY}"]

        (refused,) = launched(server.url, "codex").stderr.splitlines()
        assert refused == f"Error: {server.url}: asks for a key; --api-key gives it"


@pytest.mark.slow
def test_a_file_is_made_for_its_owner_and_never_changed(tmp_path: Path) -> None:
    with serving() as server:
        for agent, file in (("opencode", "opencode.json"), ("codex", ".codex/config.toml")):
            printed = launched(server.url, agent).stdout
            done = launched(server.url, agent, "--write", cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            made = tmp_path / file
            assert made.read_text() == printed and os.stat(made).st_mode & 0o777 == 0o600
            made.write_text("mine")
            again = launched(server.url, agent, "--write", cwd=tmp_path)
            assert again.returncode == 1 and "exists already" in again.stderr
            assert made.read_text() == "mine"
        assert launched(server.url, "openai", "--write").returncode == 2


@pytest.mark.slow
def test_no_server_or_another_one_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    (line,) = launched(url, "codex").stderr.splitlines()
    assert line.startswith(f"Error: {url}: no server answers") and "mlx_kimi serve" in line
    (line,) = launched("pocket", "codex").stderr.splitlines()
    assert line == "Error: --url must be such as http://127.0.0.1:8080 but is pocket"
