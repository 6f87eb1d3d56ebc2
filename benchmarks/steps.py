"""Steps of several tokens, of one text or of many, at the 48B's shape on the GPU at hand.

    .venv/bin/python -m benchmarks.steps check          # float32: steps of several tokens, and of
                                                        # rows of unlike lengths, against one token
    .venv/bin/python -m benchmarks.steps time           # what a step costs, beside mlx-lm's batches
    .venv/bin/python -m benchmarks.steps drafts         # a text that is copied, and one that is new
    .venv/bin/python -m benchmarks.steps time --trial   # of this script: a tiny model

A figure is the median of repeats, taken in turns. A draft is right by force in a text that is
copied: weights are random, so that nothing else would be; what a step computes is the same.
"""

from __future__ import annotations

import os
import sys

if "check" in sys.argv:
    os.environ["MLX_ENABLE_TF32"] = "0"

import argparse
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from benchmarks.full_size import CONFIG, peer_kernels, peer_model
from benchmarks.speed import TRIAL, Run, decode_ours, decode_theirs, in_turns, launches_of_a_step
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.evaluation.random_model import model_of, random_arrays
from mlx_kimi.generation.decode import decode, prefill
from mlx_kimi.generation.lookup import Draft, Lookup
from mlx_kimi.generation.sample import Sampler, Sampling
from mlx_kimi.generation.speculate import Speculation
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.command_buffers import enlarge_command_buffers
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import CacheEntry
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.steps import Step, keep_first

ROWS = (1, 2, 4, 8, 16)
TOKENS = (1, 2, 4, 8)
CONTEXT = 512
DECODED = 16  # steps, each submitted before the last one is awaited
SAME = 1e-4  # of the largest logit: the same numbers in float32, added in another order
# Tokens that rows have read: tails that are new, nearly full and full, and segments of each class.
LENGTHS = (5, 250, 256, 700, 1_100, 3_000, 4_352, 9_001)


def main() -> None:
    parts = {f.__name__: f for f in (check, time_steps, drafts)}
    names = {"check": "check", "time": "time_steps", "drafts": "drafts"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=names)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--trial", action="store_true", help="of this script: a tiny model")
    given = parser.parse_args()
    enlarge_command_buffers()
    print(f"mlx {mx.__version__} on {mx.device_info().get('device_name', mx.default_device())}")
    config = CONFIG | TRIAL if given.trial else CONFIG
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype = mx.float32 if given.part == "check" or on_cpu else mx.bfloat16
    arrays = random_arrays(ModelConfig.from_json(config), dtype)
    with peer_kernels():
        wanted = given.part == "time" and not given.no_peer
        peer = peer_model(config, arrays) if wanted else None
    sys.exit(parts[names[given.part]](model_of(config, arrays), peer, given.repeats))


def _ids(model: KimiLinear, T: int, B: int = 1, seed: int = 1) -> mx.array:
    return mx.random.randint(0, model.config.vocab_size, (B, T), key=mx.random.key(seed))


def _prompted(model: KimiLinear, length: int, B: int = 1, seed: int = 1) -> list[CacheEntry]:
    cache = model.make_cache()
    ids = _ids(model, length, B, seed)
    for start in range(0, length, 2048):
        model.advance(ids[:, start : start + 2048], cache)
        mx.eval(caches.arrays(cache))
    return cache


# ------------------------------------------------------------------------------------- right?
def check(model: KimiLinear, peer: Any, repeats: int) -> int:
    """How many comparisons failed."""
    failed = 0

    def compare(name: str, ours: mx.array, expected: mx.array) -> None:
        nonlocal failed
        error = (mx.abs(ours - expected).max() / mx.abs(expected).max()).item()
        right = bool(error <= SAME)  # (not where it is NaN)
        failed += not right
        print(
            f"{'ok    ' if right else 'FAILED'} {name:<64} {error:.1e} (of {SAME:.0e})", flush=True
        )

    for length in LENGTHS:
        before = _prompted(model, length, seed=length)
        ids = _ids(model, 9, seed=length + 1)
        expected = _one_by_one(model, ids, caches.snapshot(before))
        for T in TOKENS[1:]:
            cache, steps = caches.snapshot(before), list[Step]()
            ours = model.logits(model.hidden(ids[:, :T], cache, steps=steps))
            compare(f"after {length} tokens, {T} in one step", ours, expected[:, :T])
            keep_first(cache, steps, T - 1)
            after = model(ids[:, T - 1 : T], cache)
            compare("  the last of them taken back, and read alone", after, expected[:, T - 1 : T])
    for B in ROWS[1:]:
        lengths = [LENGTHS[row % len(LENGTHS)] for row in range(B)]
        alone = [_prompted(model, n, seed=row) for row, n in enumerate(lengths)]
        ids = _ids(model, 4, B, seed=B)
        expected = mx.concatenate(
            [
                _one_by_one(model, ids[row : row + 1], caches.snapshot(entries))
                for row, entries in enumerate(alone)
            ]
        )
        cache = caches.join(alone)
        compare(f"{B} rows of unlike lengths", _one_by_one(model, ids, cache), expected)
        if B < ROWS[-1]:
            T = min(4, ROWS[-1] // B)
            together = model.logits(model.hidden(ids[:, :T], caches.join(alone), steps=[]))
            compare(f"  {T} tokens of each in one step", together, expected[:, :T])
        cache = caches.take(caches.join(alone), range(1, B))
        left = _one_by_one(model, ids[1:], cache)
        compare("  without the first, which left", left, expected[1:])
    return failed


def _one_by_one(model: KimiLinear, ids: mx.array, cache: list[CacheEntry]) -> mx.array:
    """ids [B, T] -> logits [B, T, vocab]"""
    logits = []
    for t in range(ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], cache))
        mx.eval(logits[-1], caches.arrays(cache))
    return mx.concatenate(logits, axis=1)


# ---------------------------------------------------------------------------------- how fast?
def time_steps(model: KimiLinear, peer: Any, repeats: int) -> int:
    """Steps of B rows and of T tokens after CONTEXT, the wait for what is drawn included."""
    runs: dict[str, Run] = {}
    for B in ROWS:
        before = _prompted(model, CONTEXT, B)
        token = _ids(model, 1, B, seed=2)
        runs[f"{B} rows"] = lambda c=before, t=token: (
            decode_ours(model, caches.snapshot(c), t, DECODED, []) / DECODED
        )
        if peer is not None:
            with peer_kernels():
                their_cache = peer.make_cache()
                ids = _ids(model, CONTEXT, B)
                for start in range(0, CONTEXT, 128):  # MLX's product takes no more on NVIDIA GPUs
                    mx.eval(peer(ids[:, start : start + 128], their_cache))
            runs[f"{B} rows, mlx-lm"] = lambda c=their_cache, t=token: (
                decode_theirs(peer, c, t, DECODED, peer_kernels()) / DECODED
            )
        print(f"launches, {B} rows: {launches_of_a_step(model, before, token)}", flush=True)
    found = in_turns(runs, repeats)
    one = found["1 rows"]
    for name, seconds in found.items():
        rows = int(name.split()[0])
        theirs = found.get(f"{rows} rows, mlx-lm")
        beside = f"   {theirs / seconds:5.2f} x" if theirs else ""
        rate = rows / seconds
        print(
            f"{name:<18} {seconds * 1e3:7.2f} ms  {seconds / one:5.2f} of one row's, "
            f"{rate:7.1f} tok/s{beside}",
            flush=True,
        )
    del runs
    before = _prompted(model, CONTEXT)
    runs = {}
    for T in TOKENS:
        ids = _ids(model, T, seed=3)
        runs[f"T = {T}"] = lambda i=ids: _step(model, before, i)
        if T > 1:
            runs[f"T = {T}, half taken back"] = lambda i=ids, n=T // 2: _step(model, before, i, n)
        print(
            f"launches, T = {T}: {launches_of_a_step(model, before, ids, [] if T > 1 else None)}",
            flush=True,
        )
    found = in_turns(runs, 2 * repeats)
    for name, seconds in found.items():
        print(f"{name:<24} {seconds * 1e3:7.2f} ms  {seconds / found['T = 1']:5.2f} of T = 1")
    return 0


def _step(model: KimiLinear, before: list[CacheEntry], ids: mx.array, keep: int = 0) -> float:
    """Seconds of a step that is awaited; `keep`: and of going back to so many of its tokens."""
    cache, steps = caches.snapshot(before), list[Step]()
    start = time.perf_counter()
    hidden = model.hidden(ids, cache, steps=steps if ids.shape[1] > 1 else None)
    drawn = mx.argmax(model.logits(hidden), axis=-1)
    mx.async_eval(drawn, *caches.arrays(cache))
    mx.eval(drawn)
    if keep:
        keep_first(cache, steps, keep)
    mx.eval(caches.arrays(cache))
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------- drafts
class Copied:
    """A drafter that knows the text: what a copy of the prompt would propose."""

    def __init__(self, text: Sequence[int], most: int) -> None:
        self.text, self.most, self.read = text, most, 0

    def add(self, tokens: Sequence[int]) -> None:
        self.read += len(tokens)

    def propose(self, limit: int) -> Draft:
        return Draft(list(self.text[self.read : self.read + min(limit, self.most)]), 16)


class Forced(Sampler):
    """Draws the tokens of a text, whatever the logits say; what a draw computes is as ever."""

    def __init__(self, text: Sequence[int], prompt: Sequence[int], vocab: int) -> None:
        super().__init__(Sampling(), prompt, vocab)
        self.text, self.drawn = mx.array(list(text)), 0

    def __call__(self, logits: mx.array) -> mx.array:
        drawn = super().__call__(logits)
        self.drawn += 1
        return mx.where(drawn < 0, drawn, self.text[self.drawn - 1 : self.drawn])


def drafts(model: KimiLinear, peer: Any, repeats: int, tokens: int = 1000) -> int:
    """Tokens a second of a text that is copied, and of one in which nothing repeats."""
    prompt = _list(_ids(model, CONTEXT))
    text = _list(_ids(model, tokens, seed=5))
    vocab = model.config.vocab_size
    counts: dict[str, Speculation] = {}

    def timed(name: str, sampler: Sampler, speculation: Speculation | None) -> float:
        state = TokenState(model)
        hidden, _ = prefill(state, prompt)
        mx.eval(hidden)
        start = time.perf_counter()
        drawn = list(decode(state, hidden, sampler, tokens, speculation))
        seconds = time.perf_counter() - start
        assert len(drawn) == tokens
        if isinstance(sampler, Forced):
            assert drawn == text, "a forced text is what is drawn"
        if speculation is not None:
            counts[name] = speculation
        return seconds

    runs: dict[str, Run] = {"plain": lambda: timed("plain", Forced(text, prompt, vocab), None)}
    for most in (3, 7):
        name = f"copied, drafts of {most}"
        runs[name] = lambda n=name, m=most: timed(
            n, Forced(text, prompt, vocab), Speculation(Copied(text, m))
        )
    sampling = Sampling(temp=1.0, seed=3)
    runs["new text, off"] = lambda: timed("", Sampler(sampling, prompt, vocab), None)
    runs["new text, auto"] = lambda: timed(
        "new text, auto", Sampler(sampling, prompt, vocab), Speculation(Lookup(prompt))
    )
    found = in_turns(runs, repeats)
    for name, seconds in found.items():
        base = found["new text, off" if name.startswith("new") else "plain"]
        counted = f"   {counts[name].counts}" if name in counts else ""
        print(f"{name:<24} {tokens / seconds:7.1f} tok/s   {base / seconds:5.2f} x{counted}")
    return 0


def _list(ids: mx.array) -> list[int]:
    found: Any = ids[0].tolist()
    return list(found)


if __name__ == "__main__":
    main()
