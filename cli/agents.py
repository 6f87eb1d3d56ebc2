"""How agents and editors are told of a server: a file of theirs, or a command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROVIDER = "mlx_kimi"
NO_KEY = "none"  # where a program insists on one


@dataclass(frozen=True)
class Served:
    """A server as its clients see it."""

    url: str  # without a path
    model: str
    context: int  # tokens
    key: str | None

    @property
    def openai(self) -> str:
        """The base URL of OpenAI's API."""
        return f"{self.url}/v1"


@dataclass(frozen=True)
class Agent:
    """A program that can use the server.

    Attributes:
        title: what it is, in words.
        file: where its configuration is, in the current folder or in ~; None: it is a command line.
        text: what stands there.
        then: how it is started.
    """

    title: str
    file: str | None
    text: Callable[[Served], str]
    then: str = ""


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _claude_code(served: Served) -> str:
    env = {
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_AUTH_TOKEN": served.key or NO_KEY,
        "ANTHROPIC_MODEL": served.model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": served.model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return _json({"env": env})


def _codex(served: Served) -> str:
    lines = [
        f"model = {json.dumps(served.model)}",
        f'model_provider = "{PROVIDER}"',
        f"model_context_window = {served.context}",
        "",
        f"[model_providers.{PROVIDER}]",
        f'name = "{PROVIDER}"',
        f"base_url = {json.dumps(served.openai)}",
        'wire_api = "responses"',
    ]
    if served.key is not None:
        lines.append('env_key = "MLX_KIMI_API_KEY"')
    return "\n".join(lines) + "\n"


def _opencode(served: Served) -> str:
    limit = {"context": served.context, "output": served.context // 4}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": PROVIDER,
        "options": {"baseURL": served.openai, "apiKey": served.key or NO_KEY},
        "models": {served.model: {"name": served.model, "limit": limit}},
    }
    return _json(
        {
            "$schema": "https://opencode.ai/config.json",
            "model": f"{PROVIDER}/{served.model}",
            "provider": {PROVIDER: provider},
        }
    )


def _aider(served: Served) -> str:
    return (
        f"openai-api-base: {json.dumps(served.openai)}\n"
        f"openai-api-key: {json.dumps(served.key or NO_KEY)}\n"
        f"model: {json.dumps(f'openai/{served.model}')}\n"
    )


def _continue(served: Served) -> str:
    return (
        f"name: {PROVIDER}\nversion: 0.0.1\nschema: v1\nmodels:\n"
        f"  - name: {json.dumps(served.model)}\n"
        "    provider: openai\n"
        f"    model: {json.dumps(served.model)}\n"
        f"    apiBase: {json.dumps(served.openai)}\n"
        f"    apiKey: {json.dumps(served.key or NO_KEY)}\n"
        "    roles: [chat, edit, apply]\n"
    )


def _openai(served: Served) -> str:
    key = shlex.quote(served.key or NO_KEY)
    return f"export OPENAI_BASE_URL={shlex.quote(served.openai)} OPENAI_API_KEY={key}\n"


AGENTS = {
    "claude-code": Agent("Claude Code", ".claude/settings.local.json", _claude_code, "claude"),
    "codex": Agent("Codex", "~/.codex/config.toml", _codex, "codex"),
    "opencode": Agent("OpenCode", "opencode.json", _opencode, "opencode"),
    "aider": Agent("aider", ".aider.conf.yml", _aider, "aider"),
    "continue": Agent("Continue", "~/.continue/config.yaml", _continue),
    "openai": Agent("programs that use OpenAI's library", None, _openai),
}
