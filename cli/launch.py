"""`mlx_kimi launch`: what an agent or an editor must know to use a running server."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import click

from mlx_kimi.cli import show
from mlx_kimi.cli.agents import AGENTS, Agent, Served
from mlx_kimi.errors import KimiError

SECONDS = 10.0  # until a server must have answered
MOST = 1 << 20  # bytes of its answer


def run(agent: str, url: str, api_key: str | None, write: bool) -> None:
    chosen = AGENTS[agent]
    served = served_at(url, api_key)
    text = chosen.text(served)
    if not write:
        if chosen.file is not None:
            click.echo(f"{chosen.file}, which --write makes:", err=True)
        click.echo(show.printable(text), nl=False)
        return
    if chosen.file is None:
        raise click.UsageError(f"--write is for agents with a file, but {agent} has none")
    file = Path(chosen.file).expanduser()
    _write(file, text)
    click.echo(
        f"{file}: {chosen.title} uses {served.model} at {served.url}{_then(chosen)}", err=True
    )


def _then(agent: Agent) -> str:
    return f"; start it with `{agent.then}`" if agent.then else ""


def _write(file: Path, text: str) -> None:
    """Make a file that only its owner reads: it may hold a key."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        raise KimiError(
            f"{file}: exists already and is not changed; without --write this is printed instead"
        ) from None
    file.write_text(text, encoding="utf-8")


def served_at(url: str, key: str | None) -> Served:
    """What the server at an address such as http://127.0.0.1:8080 says of its model.

    Raises:
        KimiError: no server answers there, or it is another program.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise KimiError(f"--url must be such as http://127.0.0.1:8080 but is {url}")
    base = f"{parts.scheme}://{parts.netloc}"
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    directly = build_opener(ProxyHandler({}))  # whatever proxy the environment names
    try:
        with directly.open(
            Request(f"{base}/v1/models", headers=headers), timeout=SECONDS
        ) as answer:
            (model,) = json.loads(answer.read(MOST))["data"]
            return Served(base, str(model["id"]), int(model["max_model_len"]), key)
    except URLError as error:
        if getattr(error, "code", None) == 401:
            raise KimiError(f"{base}: asks for a key; --api-key gives it") from None
        raise KimiError(
            f"{base}: no server answers ({error.reason}); `mlx_kimi serve` starts one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise KimiError(f"{base}: what answers there is no server of mlx_kimi") from None
