"""`mlx_kimi bench`: how fast a model is here, by context length, and what bounds it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import click
import mlx.core as mx

from mlx_kimi import __version__
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import tensors
from mlx_kimi.cli import show
from mlx_kimi.cli.given import budget_of, folder_of
from mlx_kimi.cli.progress import Work, work
from mlx_kimi.cli.ranked import load_here, refuse_what_ranks_cannot
from mlx_kimi.errors import KimiError, OptionError
from mlx_kimi.evaluation.bench import Bench, BenchRow, check_fits, check_settings
from mlx_kimi.generation.speculate import Speculate
from mlx_kimi.metal_kernels.kernel import backend
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.ranks.launched import Launched
from mlx_kimi.units import human_size

DASH = Path("-")
PLOTS = (".png", ".svg")
COLUMNS = (  # two lines of title, width
    ("", "context", 9),
    ("prompt", "tok/s", 7),
    ("first", "token s", 8),
    ("answer", "tok/s", 7),
    ("", "±", 6),
    ("token", "ms", 8),
    ("host", "ms", 7),
    ("", "bound", 7),
    ("context", "memory", 10),
    ("peak", "memory", 10),
)
LEGEND = """\
prompt       speed of the tokens after the row above, which go on from its state
first token  time to it for the whole context: this row and those above
answer       {tokens} tokens, the median of {repeats}; ± half the range
host         work of Python and MLX to submit a token, while the device computes
             the one before; bound says which of the two a token waits for
memory       of the context, above the weights; peak, weights included
"""


def run(
    model: str | None,
    contexts: str,
    tokens: int,
    repeats: int,
    prefill_step: int,
    speculate: Speculate,
    split: str | None,
    memory_budget: int | None,
    context: int | None,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    check_settings(tokens, repeats, prefill_step)
    budget = budget_of(memory_budget, context, prefill_step)
    refuse_what_ranks_cannot(split, budget, speculate)
    lengths = _lengths(contexts)
    _check_files(json_file, plot_file)
    folder = folder_of(model, budget)
    config = ModelConfig.read(folder)
    for length in lengths:  # before gigabytes are read
        check_fits(length, tokens, config.model_max_length)
        if budget and budget.context:
            check_fits(length, tokens, budget.context, "--context")
    if budget:  # room for what is measured, unless told
        budget = replace(budget, context=budget.context or max(lengths) + tokens + 1)
    network, tokenizer = load_here(folder, budget, split)
    how = {"tokens": tokens, "repeats": repeats, "prefill_step": prefill_step}
    bench = Bench(network, tokenizer, **how, speculate=speculate)
    facts = _facts(model or "pocket", network, bench)
    for line in (*_heading(facts), LEGEND.format(tokens=tokens, repeats=repeats), *_titles()):
        click.echo(line, err=json_file == DASH)  # then stdout is for JSON alone
    rows: list[BenchRow] = []
    try:
        for length in lengths:
            # A drawing thread would be measured: it is drawn between steps only.
            with work(f"context {length:,}", "tokens", by_itself=False) as doing:
                rows.append(bench.row(length, partial(_show, doing, length)))
            click.echo(_line(rows[-1]), err=json_file == DASH)
            if rows[-1].experts:
                spent = show.experts(rows[-1].experts, repeats * (tokens - 1))
                click.echo(f"          {spent}", err=json_file == DASH)
            if rows[-1].drafts:
                click.echo(f"          {show.drafts(rows[-1].drafts)}", err=json_file == DASH)
    finally:  # what was measured before Ctrl-C is written, too
        report = {**facts, "complete": len(rows) == len(lengths), "rows": list(map(_json, rows))}
        if json_file:
            _write(json_file, json.dumps(report, indent=2) + "\n")
        if plot_file and rows:
            _plot(plot_file, _heading(facts)[0], rows)


def _show(doing: Work, length: int, what: str, done: int, total: int) -> None:
    doing.at(f"context {length:,}: {what}")
    doing(done, total)


def _lengths(contexts: str) -> list[int]:
    try:
        return sorted({int(length) for length in contexts.split(",")})
    except ValueError:
        raise OptionError(
            "contexts",
            f"must be numbers of tokens with commas between them but is {contexts!r}",
        ) from None


def _check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """What can be known before minutes of measuring."""
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        if file in (None, DASH):
            continue
        if not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
            raise KimiError(f"{option} {file}: {file.parent} must be a folder that can be written")
        if file.is_symlink() or file.is_file():  # (not a device: that is written to)
            raise KimiError(f"{file}: already exists; remove it or choose another name")
    if plot_file and plot_file.suffix.lower() not in PLOTS:
        raise OptionError("plot_file", f"must end in {' or '.join(PLOTS)} but is {plot_file}")
    if plot_file and not find_spec("matplotlib"):
        raise KimiError("--plot needs matplotlib: pip install 'mlx_kimi[plot]'")


def _facts(name: str, network: KimiLinear, bench: Bench) -> dict[str, Any]:
    """The model, the machine, the versions and the settings, without which speeds mean nothing."""
    config = network.config
    q = config.quantization
    return {
        "model": {
            "name": name,
            "parameters": sum(prod(tensor.shape) for tensor in tensors(config)),
            "quantization": asdict(q) if q else None,
            "compute_dtype": str(network.norm.weight.dtype).removeprefix("mlx.core."),
            "model_max_length": config.model_max_length,
            "weights_memory": bench.weights_memory,
        },
        "machine": {
            "system": platform.platform(),
            "device": str(mx.default_device()),
            "kernels": backend() is not None,
            "choices": network.choices.digest,
            "rank": [launched.rank, launched.size] if (launched := Launched.here()) else [0, 1],
            **mx.device_info(),
        },
        "versions": {
            "mlx_kimi": __version__,
            "mlx": version("mlx"),
            "python": platform.python_version(),
        },
        "settings": {
            "tokens": bench.tokens,
            "repeats": bench.repeats,
            "prefill_step": bench.prefill_step,
            "speculate": bench.speculate,
            "slots": network.offload.slots if network.offload else None,
        },
    }


def _heading(facts: dict[str, Any]) -> list[str]:
    model, machine, versions = facts["model"], facts["machine"], facts["versions"]
    q = model["quantization"]
    stored = f"{q['bits']} bits" if q else model["compute_dtype"]
    kernels = "with our kernels" if machine["kernels"] else "without our kernels"
    rank, ranks = machine["rank"]
    own = f", rank {rank}'s own memory and weights of {ranks}" if ranks > 1 else ""
    return [
        f"{model['name']}, {stored}, on {machine.get('device_name', '?')} ({machine['device']})",
        f"{human_size(model['weights_memory'])} of weights; mlx_kimi {versions['mlx_kimi']}, "
        f"mlx {versions['mlx']} {kernels}{own}",
    ]


def _titles() -> list[str]:
    return [_aligned([column[line] for column in COLUMNS]) for line in (0, 1)]


def _line(row: BenchRow) -> str:
    return _aligned(
        [
            f"{row.context:,}",
            _speed(row.prompt_speed),
            f"{row.time_to_first_token:.2f}",
            _speed(row.generation_speed),
            f"{row.spread:.1%}" if len(row.token_times) > 1 else "-",
            f"{row.token_time * 1e3:.2f}",
            f"{row.host_time * 1e3:.2f}",
            row.bound_by,
            human_size(row.active_memory),
            human_size(row.peak_memory),
        ]
    )


def _aligned(cells: list[Any]) -> str:
    return "".join(
        f"{cell:>{width}}" for cell, (*_, width) in zip(cells, COLUMNS, strict=True)
    ).rstrip()


def _speed(tokens: float) -> str:
    return f"{tokens:.1f}" if tokens < 1000 else f"{tokens:.0f}"


def _json(row: BenchRow) -> dict[str, Any]:
    return {
        **show.json_fields(row),
        "prompt_tokens_per_second": row.prompt_speed,
        "generation_tokens_per_second": row.generation_speed,
        "token_time": row.token_time,
        "host_time": row.host_time,
        "spread": row.spread,
        "bound_by": row.bound_by,
    }


def _write(file: Path, text: str) -> None:
    if file == DASH:
        click.echo(text, nl=False)
    else:
        file.write_text(text, encoding="utf-8")


def _plot(file: Path, title: str, rows: Sequence[BenchRow]) -> None:
    """Tokens a second against context; of answers, with the range of the repeats."""
    from matplotlib.figure import Figure  # here: it takes half a second, and few ask

    contexts = [row.context for row in rows]
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title)
    prompt, answer = figure.subplots(1, 2)
    # (Markers at the edge of the axes are whole.)
    prompt.plot(contexts, [row.prompt_speed for row in rows], "o-", clip_on=False)
    speeds = [row.generation_speed for row in rows]
    slower = [row.generation_speed - 1 / max(row.token_times) for row in rows]
    faster = [1 / min(row.token_times) - row.generation_speed for row in rows]
    answer.errorbar(contexts, speeds, (slower, faster), fmt="o-", capsize=3, clip_on=False)
    for axes, what in ((prompt, "prompt, from the context before"), (answer, "answer")):
        axes.set_title(what)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("tokens a second")
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
