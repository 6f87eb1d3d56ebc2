"""One rank of several, started by `tests/test_ranks.py`: rank 0 compares with a whole model.

    python -m tests.ranks_worker FOLDER SPLIT ON_DEVICE

It prints JSON: what was found equal, and memory.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from mlx_kimi.chat.state_files import restore_states, token_arrays, write_state
from mlx_kimi.generation.decode import decode, prefill
from mlx_kimi.generation.sample import Sampler, Sampling
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.load import load_model
from mlx_kimi.model.cache import RemoteCache
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.ranks.hops import Hops
from mlx_kimi.ranks.join import follow, lead
from mlx_kimi.ranks.launched import Launched
from mlx_kimi.ranks.model import RankedModel, State

TEXT: Any = mx.random.randint(0, 200, (390,), key=mx.random.key(3)).tolist()
OTHER: Any = TEXT[:300] + mx.random.randint(0, 200, (60,), key=mx.random.key(4)).tolist()
STEP = 128


def main() -> None:
    folder, split, on_device = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "device"
    launched = Launched.here()
    assert launched is not None
    connected = partial(Hops, on_device=True if on_device else None)
    if launched.rank:
        follow(launched, lambda: folder, connected)
    before = mx.get_active_memory()
    ranked = lead(launched, folder, split, print, connected)
    memory = [held["active"] for held in ranked.memory()]
    own = mx.get_active_memory()
    whole = load_model(folder)
    found = {
        "parts": len(ranked.part),
        "memory": memory,
        "own": own - before,
        "whole": mx.get_active_memory() - own,
        "finite": ranked.first_not_finite(mx.array([TEXT[:9]])),
    }
    found |= _close(ranked, whole) if split == "heads" else _equal(ranked, whole)
    found["freed"] = _freed(ranked)
    print(json.dumps(found))


def _equal(ranked: RankedModel, whole: KimiLinear) -> dict[str, bool]:
    """By layers, all bits are equal."""
    ids = mx.array([TEXT[:40]])
    found = {"logits": bool(mx.array_equal(ranked(ids), whole(ids)).item())}
    found["text"] = _text(ranked, None) == _text(whole, None)
    if ranked.control.launched.size == 2:
        found["text of 8 bits"] = _text(ranked, 8) == _text(whole, 8)
    return found


def _close(ranked: RankedModel, whole: KimiLinear) -> dict[str, Any]:
    """By heads, sums are of other parts; what all ranks have must be the same on all."""
    ids = mx.array([TEXT[:200]])
    expected = whole(ids)
    found = {"error": (mx.abs(ranked(ids) - expected).max() / mx.abs(expected).max()).item()}
    found["tokens"] = _tokens(ranked) == _tokens(whole)
    state = TokenState(ranked)
    _answer(state, TEXT)
    remote = state.entries[-1]
    assert isinstance(remote, RemoteCache) and isinstance(remote.state, State)
    ranked.control.broadcast({"do": "latents", "start": 0, "state": remote.state.number})
    theirs = [ranked.control.receive(rank)[1] for rank in ranked.states.ranks]
    own = token_arrays((), state.entries[:-1], 0)
    found["same bits"] = all(
        bool(mx.array_equal(own[name], a).item()) for each in theirs for name, a in each.items()
    )
    found["compared"] = sum(map(len, theirs))
    with TemporaryDirectory() as name:
        folder = Path(name)
        stored = write_state(folder, state, 0)
        for model in (whole, ranked):
            resumed = TokenState(model)
            restore_states(resumed, folder, [stored])
            found[type(model).__name__] = _answer(resumed, [*state.ids, 5, 6, 7])[0]
    return found


def _text(model: KimiLinear, bits: int | None) -> list[list[int]]:
    """Answers to a prompt, to another that goes back to a snapshot, and after an interruption;
    and the bits of their last hidden states."""
    state = TokenState(model, bits, snapshot_every=128)
    found = []
    for ids in (TEXT, OTHER):
        found += _answer(state, ids)

    def interrupt(done: int, total: int) -> None:
        if done >= 2 * STEP:
            raise KeyboardInterrupt

    state = TokenState(model, bits)
    try:
        prefill(state, TEXT, STEP, interrupt)
        raise AssertionError("it was to be interrupted")
    except KeyboardInterrupt:
        found.append(list(state.ids))
    return found + _answer(state, OTHER) + _answer(state, TEXT[:300])


def _tokens(model: KimiLinear) -> list[list[int]]:
    """Of `_text` what is no bits of hidden states."""
    return [found for found in _text(model, None) if max(found) < model.config.vocab_size]


def _answer(state: TokenState, ids: list[int]) -> list[list[int]]:
    hidden, _ = prefill(state, ids, STEP)
    drawn = list(decode(state, hidden, Sampler(Sampling(), ids, state.model.config.vocab_size), 4))
    return [drawn, hidden.view(mx.uint32).reshape(-1).tolist()]  # type: ignore[list-item]


def _freed(model: RankedModel) -> int:
    """Bytes that the other ranks hold more after nine texts that nobody has any more."""
    held = []
    for count in (1, 9):
        for _ in range(count):
            TokenState(model).read(TEXT[:8])
        gc.collect()
        TokenState(model).read(TEXT[:8])
        held.append(sum(each["active"] for each in model.memory()[1:]))
    return held[1] - held[0]


if __name__ == "__main__":
    main()
