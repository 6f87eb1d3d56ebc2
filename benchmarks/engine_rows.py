"""What a token costs while 1, 2, 4, 8 and 16 answers run together.

    python -m benchmarks.engine_rows [FOLDER] [--tokens 48]

Processor time is of all threads of this process; where others use the machine, it is steadier than
time by the clock. FOLDER is a model; else the one inside the package.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from mlx_kimi import load
from mlx_kimi.server.engine import Engine, Request, Token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    given = parser.parse_args()
    model, _ = load(given.folder)
    for rows in (1, 2, 4, 8, 16):
        engine = Engine(model, prefill_slice=64, rows=rows)
        engine.start()
        prompts = [tuple(range(5 + row, 37 + row)) for row in range(rows)]
        answers = [
            iter(engine.submit(Request(ids, max_tokens=given.tokens, client=str(row))))
            for row, ids in enumerate(prompts)
        ]
        for events in answers:
            while not isinstance(next(events), Token):
                pass
        drawn = engine.status().counters.generated_tokens
        processor, clock = time.process_time(), time.perf_counter()
        for events in answers:
            list(events)
        processor, clock = time.process_time() - processor, time.perf_counter() - clock
        drawn = engine.status().counters.generated_tokens - drawn
        print(
            f"{rows:2} rows: {1000 * processor / drawn:6.2f} ms of the processor a token, "
            f"{drawn / clock:7.1f} tokens/s in all",
            flush=True,
        )
        engine.stop(0)


if __name__ == "__main__":
    main()
