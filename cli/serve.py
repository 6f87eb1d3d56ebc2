"""`mlx_kimi serve`: one model for many programs, over HTTP."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from mlx_kimi.chat.fingerprint import fingerprint
from mlx_kimi.chat.session import read_session, refuse_missing
from mlx_kimi.cli.given import budget_of, check_options, folder_of, with_defaults
from mlx_kimi.cli.progress import BYTES, work
from mlx_kimi.cli.ranked import load_here, refuse_what_ranks_cannot
from mlx_kimi.defaults import PREFILL_STEP, SNAPSHOT_MEMORY
from mlx_kimi.errors import KimiError
from mlx_kimi.generation.speculate import Speculate
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.server.app import make_app
from mlx_kimi.server.engine import Engine
from mlx_kimi.server.http import JsonLines, Server, address_of, listening
from mlx_kimi.server.security import Access
from mlx_kimi.server.service import Service
from mlx_kimi.server.state_store import StateStore, folder_for

TERMINATED = 143  # 128 + SIGTERM, as shells report a program that it ended


def run(
    model: str | None,
    host: str,
    port: int,
    api_key: str | None,
    allow_origin: tuple[str, ...],
    allow_host: tuple[str, ...],
    log_prompts: bool,
    rows: int,
    cache_memory: int | None,
    prompt_caches: tuple[Path, ...],
    cache_disk: int,
    prefill_slice: int | None,
    latent_bits: int | None,
    split: str | None,
    speculate: Speculate,
    memory_budget: int | None,
    context: int | None,
    **options: Any,
) -> None:
    check_options({**options, "latent_bits": latent_bits})
    access = Access(host, api_key, allow_origin, allow_host)
    budget = budget_of(memory_budget, context, prefill_slice or PREFILL_STEP, latent_bits)
    refuse_what_ranks_cannot(split, budget, speculate)
    if budget is not None:
        cache_memory = SNAPSHOT_MEMORY if cache_memory is None else cache_memory
        budget = replace(budget, snapshots=cache_memory)
    signal.signal(signal.SIGTERM, _terminated)
    for cache in prompt_caches:
        refuse_missing(cache)  # before a model is loaded
    with listening(host, port) as opened:  # first: a port in use is known at once
        folder = folder_of(model, budget)
        options = with_defaults(options, folder)
        network, tokenizer = load_here(folder, budget, split)
        name, longest = Path(model or folder).name, network.config.model_max_length
        same = _identity(folder, latent_bits) if cache_disk or prompt_caches else {}
        engine = Engine(
            network,
            rows=rows,
            tree_memory=cache_memory,
            prefill_slice=prefill_slice,
            latent_bits=latent_bits,
            store=_store(network, name, same, cache_disk, latent_bits),
            speculate=speculate,
        )
        for cache in prompt_caches:
            engine.know(_read(cache, TokenState(network, latent_bits, snapshot_every=None), same))
        service = Service(engine, tokenizer, name, longest, options, log_prompts=log_prompts)
        logging.basicConfig(handlers=[JsonLines()], level=logging.WARNING)
        engine.start()
        url = address_of(opened)
        about = f"{name} · {longest:,} tokens of context"
        click.echo(f"{about} · {url}/v1 for programs · {url}/ to chat", err=True)
        try:
            Server(make_app(service, access), service).run([opened])
        finally:
            engine.stop(patience=0)
        if (failure := engine.status().failure) is not None:
            raise KimiError(failure)


def _identity(folder: Path, latent_bits: int | None) -> dict[str, Any]:
    """What states depend on."""
    with work("reading the weights, once, to know them again", BYTES) as progress:
        return fingerprint(folder, latent_bits, progress=progress)


def _store(
    model: KimiLinear,
    name: str,
    identity: dict[str, Any],
    memory: int,
    latent_bits: int | None,
) -> StateStore | None:
    """Where states of prompts outlive the server."""
    if not memory:
        return None
    about = {"name": name, "identity": identity}
    return StateStore(folder_for(identity), about, memory, model, latent_bits)


def _read(cache: Path, state: TokenState, identity: dict[str, Any]) -> TokenState:
    """The state at the end of a prompt cache.

    Raises:
        KimiError: there is none, or it is of another model.
    """
    _, notes = read_session(cache, identity, state)
    if not state.ids:
        why = notes[0] if notes else "no states are stored there"
        raise KimiError(f"{cache}: requests cannot go on from it: {why}")
    return state


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
