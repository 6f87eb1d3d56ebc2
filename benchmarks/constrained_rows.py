"""What it costs that answers obey a schema: a token with it and without, and a mask alone.

    python -m benchmarks.constrained_rows [FOLDER] [--tokens 64] [--rounds 6]
    python -m benchmarks.constrained_rows --masks [FOLDER]

Processor time is of all threads of this process; both kinds of answers take turns, so that what
else the machine does is shared. Their texts are of one length: the schema lets no answer end early.
FOLDER is a model, or for `--masks` a tokenizer's folder; else the model inside the package.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import numpy as np

from mlx_kimi import load
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.constraints.constraint import Constraint, constraint_for
from mlx_kimi.generation.sample import Sampling
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.server.engine import Engine, Request, Token
from mlx_kimi.text.tokenizer import load_tokenizer

LONG = {"type": "array", "items": {"type": "string"}, "minItems": 1000}
CASES = {
    "nothing": {},
    "a schema": {"json_schema": LONG},
    "tools, of which none is called": {
        "tools": [{"type": "function", "function": {"name": "look", "parameters": LONG}}]
    },
}
SHAPED = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
        "kind": {"enum": ["alpha", "beta", "gamma"]},
        "when": {"type": "string", "format": "date-time"},
        "child": {"$ref": "#"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=pocket_folder())
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--masks", action="store_true", help="without a model")
    given = parser.parse_args()
    if given.masks:
        time_masks(given.folder)
        return
    model, tokenizer = load(given.folder)
    constraints = {name: constraint_for(tokenizer, **each) for name, each in CASES.items()}
    for rows in (1, 8):
        costs: dict[str, list[float]] = {name: [] for name in CASES}
        for turn in range(given.rounds):
            names = list(CASES)
            for name in names[turn % 3 :] + names[: turn % 3]:
                costs[name].append(a_token(model, constraints[name], rows, given.tokens))
        first = statistics.median(costs["nothing"])
        for name, each in costs.items():
            by_round = zip(each, costs["nothing"], strict=True)
            more = statistics.median(cost / plain - 1 for cost, plain in by_round)
            print(
                f"{rows} rows, {name}: {1000 * statistics.median(each):6.2f} ms of the processor "
                f"a token, {100 * (statistics.median(each) / first - 1):+.1f} % "
                f"({100 * more:+.1f} % by rounds)",
                flush=True,
            )


def a_token(model: KimiLinear, constraint: Constraint | None, rows: int, tokens: int) -> float:
    """Seconds of the processor that a token of `rows` answers takes."""
    engine = Engine(model, prefill_slice=64, rows=rows)
    engine.start()
    answers = [
        iter(
            engine.submit(
                Request(
                    tuple(range(5 + row, 37 + row)),
                    max_tokens=tokens,
                    client=str(row),
                    constraint=constraint,
                    sampling=Sampling(temp=1.0, seed=row),
                )
            )
        )
        for row in range(rows)
    ]
    for events in answers:
        while not isinstance(next(events), Token):
            pass
    drawn = engine.status().counters.generated_tokens
    began = time.process_time()
    for events in answers:
        list(events)
    took = time.process_time() - began
    drawn = engine.status().counters.generated_tokens - drawn
    engine.stop(0)
    return took / drawn


def time_masks(folder: Path) -> None:
    """What masks of random answers take of the processor, alone."""
    tokenizer = load_tokenizer(folder)
    began = time.process_time()
    constraint_for(tokenizer, json_schema={"type": "null"})
    print(f"{tokenizer.vocab_size:,} ids, made known in {time.process_time() - began:.2f} s")
    shortest = sorted(range(tokenizer.vocab_size), key=lambda id: len(tokenizer.bytes_of(id)))
    rank = np.empty(tokenizer.vocab_size, np.int64)
    rank[shortest] = np.arange(tokenizer.vocab_size)
    for name, schema in (("a schema", SHAPED), ("any object", {"type": "object"})):
        began = time.process_time()
        constraint = constraint_for(tokenizer, json_schema=schema)
        assert constraint is not None
        constraint.begin()
        compiled = time.process_time() - began
        times = []
        for seed in range(20):
            choose, matcher = random.Random(seed), constraint.begin()
            for _ in range(100):
                began = time.process_time()
                mask = matcher.mask
                times.append(time.process_time() - began)
                assert mask is not None
                bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
                ids = np.flatnonzero(bits)
                shorter = choose.random() < 0.5
                id = int(ids[rank[ids].argmin()] if shorter else choose.choice(ids))
                began = time.process_time()
                matcher.take(id)
                times[-1] += time.process_time() - began
                if id in tokenizer.stop_ids:
                    break
        times = sorted(1e6 * each for each in times)
        print(
            f"{name}: {1000 * compiled:.1f} ms to read; a mask and its token: mean "
            f"{statistics.mean(times):.0f} µs, median {statistics.median(times):.0f}, p99 "
            f"{times[len(times) * 99 // 100]:.0f}, longest {times[-1]:.0f} ({len(times):,})"
        )


if __name__ == "__main__":
    main()
