"""What is known of one request when it is over: a line of the log, and the counts of /metrics."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from starlette.types import Scope

KEY = "mlx_kimi.record"  # of a scope
LONGEST = 200  # characters of what a client says of itself


@dataclass
class Usage:
    """Tokens, as a client is told."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's
    completion_tokens: int = 0

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Record:
    """One request, from its first byte to the last of its answer."""

    client: str
    method: str
    path: str
    id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    route: str = "none"  # its path as the table of routes has it
    status: int = 0  # 0: nothing was answered
    usage: Usage = field(default_factory=Usage)
    why: str | None = None  # the prefix tree held no more
    finish: list[str] = field(default_factory=list)  # how each answer ended
    error: str | None = None
    started_seconds: float | None = None  # until the prompt was read
    first_token_seconds: float | None = None
    texts: dict[str, Any] = field(default_factory=dict)  # what was asked and answered, if logged
    seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        """Seconds until now."""
        return time.perf_counter() - self.began

    def line(self) -> str:
        """As one line of JSON."""
        fields = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "id": self.id,
            "client": self.client,
            "request": f"{self.method} {self.path}",
            "status": self.status,
            "seconds": round(self.seconds, 4),
        }
        if self.usage.prompt_tokens:
            fields |= {
                "prompt_tokens": self.usage.prompt_tokens,
                "cached_tokens": self.usage.cached_tokens,
                "why": self.why,
                "completion_tokens": self.usage.completion_tokens,
                "finish": self.finish,
                "started_seconds": _rounded(self.started_seconds),
                "first_token_seconds": _rounded(self.first_token_seconds),
            }
        if self.error is not None:
            fields["error"] = self.error
        return json.dumps({**fields, **self.texts})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def record_of(scope: Scope) -> Record:
    """The record of a request that is being answered."""
    record: Record = scope[KEY]
    return record


def new_record(scope: Scope) -> Record:
    """The record of a request that begins, kept in its scope."""
    address = scope["client"][0] if scope.get("client") else "?"
    agents = [value for name, value in scope["headers"] if name == b"user-agent"]
    agent = agents[0].decode("latin-1") if agents else ""
    client = f"{address} {agent}"[:LONGEST].strip()
    record = Record(client, scope["method"][:LONGEST], scope["path"][:LONGEST])
    scope[KEY] = record
    return record
