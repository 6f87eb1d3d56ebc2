"""Clients that talk to an engine at once, a tenth of their requests cancelled at any moment."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable

from mlx_kimi.server.engine import Engine, Failed, Finished, Request, Started, Token

CANCELLED = 0.1  # of all requests


def run_clients(
    engine: Engine,
    clients: int,
    turns: int | None = None,
    seconds: float = 0.0,
    seed: int = 0,
    beside: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Sums of what all clients were told, named as the engine's `Counters`.

    Args:
        turns: requests of each client's conversation; None: one conversation after another.
        seconds: with `turns` None, how long new requests are made.
        beside: is called a few times a second meanwhile.
    """
    sums, turn = Counter[str](), threading.Lock()
    until = time.monotonic() + seconds

    def client(number: int) -> None:
        choose = random.Random(1000 * seed + number)
        while True:
            ids: tuple[int, ...] = (5, 6, 7, number % 3)
            for _ in range(turns or 4):
                if turns is None and time.monotonic() > until:
                    return
                new = choose.choices(range(10, 500), k=choose.randrange(1, 60))
                ids = (*ids, *new)
                told, drawn = ask(engine, ids, str(number), choose)
                with turn:
                    sums.update(told)
                ids = (*ids, *drawn)
            if turns is not None:
                return

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        beside()
        time.sleep(0.2)
    names = ("submitted", "stopped", "length", "cancelled", "failed")
    counted = ("prompt_tokens", "cached_tokens", "generated_tokens")
    return {name: sums[name] for name in (*names, *counted)}


def ask(
    engine: Engine, ids: tuple[int, ...], client: str, choose: random.Random
) -> tuple[Counter[str], list[int]]:
    """One request: what was told, and the tokens drawn."""
    ticket = engine.submit(Request(ids, max_tokens=choose.randrange(1, 12), client=client))
    if choose.random() < CANCELLED:
        threading.Timer(choose.random(), ticket.cancel).start()
    told, drawn = Counter(submitted=1), list[int]()
    for event in ticket:
        if isinstance(event, Started):
            told.update(prompt_tokens=event.prompt_tokens, cached_tokens=event.cached_tokens)
        elif isinstance(event, Token):
            drawn.append(event.id)
        elif isinstance(event, Finished):
            told["stopped" if event.reason == "stop" else event.reason] += 1
        elif isinstance(event, Failed):
            told["failed"] += 1
    told["generated_tokens"] = len(drawn)
    return told, drawn
