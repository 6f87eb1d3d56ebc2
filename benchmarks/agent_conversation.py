"""What a server reads of an agent's day, how long that takes, and how long others wait meanwhile.

    python -m benchmarks.agent_conversation [FOLDER] [--scale S]

An agent's conversation (28 tools, 20 rounds, 30,000 tokens; two sub-agents, a title, an edit) runs
over the engine. Beside it one client streams an answer all the time: its longest wait between two
tokens is the gap. FOLDER is a model; else the one inside the package. S: the share of the tokens.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

from mlx_kimi import load
from mlx_kimi.server.engine import Engine, Request, Started, Ticket, Token
from tests.agent_conversation import FULL, Recorded, Sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    given = parser.parse_args()
    model, tokenizer = load(given.folder)
    engine = Engine(model)
    engine.start()
    while engine.status().state == "starting":
        time.sleep(0.1)
    print(f"slices of {engine.status().prefill_slice} tokens")
    sizes = Sizes(*(max(1, round(n * given.scale)) for n in vars(FULL).values()))
    text = range(10, min(tokenizer.control_tokens.values()))
    over, gaps = threading.Event(), list[float]()
    streaming = threading.Thread(target=stream, args=(engine, text, over, gaps))
    streaming.start()
    recorded, most = Recorded(text, sizes), 0
    for turn in recorded.turns():
        began = time.perf_counter()
        first = 0.0
        started = None
        for event in engine.submit(turn.request):
            if isinstance(event, Started):
                started = event
            elif isinstance(event, Token):
                first = first or time.perf_counter() - began
                turn.answer.append(event.id)
        assert started is not None
        read = started.prompt_tokens - started.cached_tokens
        if turn.new < started.prompt_tokens:
            most = max(most, read - turn.new)
        print(
            f"{turn.name:14} {started.prompt_tokens:6,} tokens, {turn.new:6,} new, {read:6,} read, "
            f"first token after {first:6.2f} s ({started.why})",
            flush=True,
        )
    over.set()
    streaming.join()
    engine.stop(0)
    status = engine.status()
    gaps.sort()
    print(f"read again at most {most} tokens; {status.counters}")
    print(f"tree: {status.tree_states} states, {status.tree_bytes / 1e6:.0f} MB")
    print(f"gaps: median {gaps[len(gaps) // 2]:.3f} s, longest {gaps[-1]:.3f} s")


def stream(engine: Engine, text: range, over: threading.Event, gaps: list[float]) -> None:
    """One answer after another, until it is over; the time before each of its tokens but the
    first."""
    number = 0
    while not over.is_set():
        number += 1
        ticket: Ticket = engine.submit(Request((text[number % len(text)],) * 20, max_tokens=200))
        latest = None
        for event in ticket:
            if isinstance(event, Token):
                now = time.perf_counter()
                if latest is not None:
                    gaps.append(now - latest)
                latest = now
            if over.is_set():
                ticket.cancel()


if __name__ == "__main__":
    main()
