"""States of prompts on the disk: they outlive the engine, are whole or absent, and keep a bound."""

import json
import random
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi import load
from mlx_kimi.errors import KimiError
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import CacheEntry, KDACache, LatentCache
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.server import state_store
from mlx_kimi.server.engine import Engine, Request, Started, Token
from mlx_kimi.server.prefix_tree import PrefixTree, State, as_array
from mlx_kimi.server.state_store import LEAST_TOKENS, StateStore, StoredText
from tests.processes import ENVIRONMENT, PROGRAM, run
from tests.server import until

PLENTY = 1 << 30
ABOUT = {"name": "pocket", "identity": {}}


@pytest.fixture(scope="module")
def model() -> KimiLinear:
    return load()[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "states"


def opened(folder: Path, model: KimiLinear, memory: int = PLENTY, bits: int | None = None):
    return StateStore(folder, ABOUT, memory, model, bits)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


def disk(folder: Path) -> int:
    """Bytes, as `du` counts them."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())


def entries_of(model: KimiLinear, length: int, bits: int | None = None) -> list[CacheEntry]:
    """A cache of so many tokens, of random numbers."""
    c = model.config
    found: list[CacheEntry] = []
    for entry in model.make_cache(bits):
        if isinstance(entry, LatentCache):
            entry.append(mx.random.normal((1, length, c.latent_width)))
            found.append(entry)
        else:
            conv = mx.random.normal((1, c.short_conv_kernel_size - 1, 3 * c.kda_width))
            state = mx.random.normal((1, c.kda_num_heads, c.kda_head_dim, c.kda_head_dim))
            found.append(KDACache((length,), conv, state))
    mx.eval(caches.arrays(found))
    return found


def numbers(entries: list[CacheEntry]) -> list[np.ndarray]:
    """What a cache holds, however its latents are divided."""
    found = []
    for entry in entries:
        if isinstance(entry, LatentCache):
            parts = [each.plain(192, mx.float32) for each in entry.segments(0)]
            found.append(np.array(mx.concatenate(parts, axis=1)))
        else:
            found += [np.array(entry.conv_tail), np.array(entry.state)]
    return found


def grown(model: KimiLinear, entries: list[CacheEntry], more: int) -> list[CacheEntry]:
    """The cache after so many more tokens."""
    later = entries_of(model, 1)
    for before, entry in zip(entries, later, strict=True):
        if isinstance(entry, LatentCache):
            assert isinstance(before, LatentCache)
            old = before.snapshot()
            old.append(mx.random.normal((1, more, model.config.latent_width)))
            later[later.index(entry)] = old
    mx.eval(caches.arrays(later))
    return later


def ids_of(length: int, seed: int = 0) -> np.ndarray:
    return as_array(np.random.default_rng(seed).integers(5, 700, length).tolist())


# ---------------------------------------------------------------------------------- the engine
def asked(engine: Engine, prompt: list[int], first: int = 0) -> tuple[int, str, list[int]]:
    """How much of a prompt was known, why no more, and the answer."""
    boundaries = (first,) if first else ()
    events = list(engine.submit(Request(tuple(prompt), boundaries, max_tokens=8)))
    (started,) = [event for event in events if isinstance(event, Started)]
    return started.cached_tokens, started.why, [e.id for e in events if isinstance(e, Token)]


@pytest.fixture
def engines(model: KimiLinear, folder: Path) -> Iterator[list[Engine]]:
    """Those that a test has started."""
    found: list[Engine] = []
    yield found
    for engine in found:
        engine.stop(5)


def started(engines: list[Engine], model: KimiLinear, folder: Path, **options: int) -> Engine:
    """One that begins after those before have ended."""
    for engine in engines:
        engine.stop(5)
    store = opened(folder, model, **options)
    engines.append(Engine(model, tree_memory=PLENTY, prefill_slice=128, store=store))
    engines[-1].start()
    return engines[-1]


def test_the_same_turn_and_the_next_go_on_after_a_restart(
    engines: list[Engine], model: KimiLinear, folder: Path
) -> None:
    prompt = ids_of(700).tolist()
    engine = started(engines, model, folder)
    known, _, answer = asked(engine, prompt, first=300)
    assert known == 0
    engine = started(engines, model, folder)
    assert asked(engine, prompt) == (700, "all of it was read before", answer)
    longer = [*prompt, *answer, *ids_of(500, seed=1).tolist()]
    cold = asked(started(engines, model, folder.with_name("other")), longer)
    engine = started(engines, model, folder)
    known, _, said = asked(engine, longer)
    assert (known, said) == (700, cold[2])
    shared = [*prompt[:300], *ids_of(50, seed=2).tolist()]
    assert asked(engine, shared)[0] == 300  # the end of the system message and tools
    engine = started(engines, model, folder)
    assert asked(engine, longer)[0] == len(longer)


def test_what_is_evicted_from_memory_is_read_from_the_disk(
    engines: list[Engine], model: KimiLinear, folder: Path
) -> None:
    store = opened(folder, model)
    engine = Engine(model, tree_memory=3 << 20, prefill_slice=128, store=store)
    engines.append(engine)
    engine.start()
    texts = [ids_of(400, seed).tolist() for seed in range(8)]
    answers = [asked(engine, text)[2] for text in texts]
    assert engine.status().tree_bytes <= 3 << 20 and engine.status().counters.evicted
    for text, answer in zip(texts, answers, strict=True):
        assert asked(engine, text) == (400, "all of it was read before", answer)


@pytest.mark.parametrize("kind", ["tokens", "state"])
def test_a_damaged_file_is_a_cold_read_with_its_reason(
    engines: list[Engine], model: KimiLinear, folder: Path, kind: str
) -> None:
    prompt = ids_of(400).tolist()
    answer = asked(started(engines, model, folder), prompt)[2]
    engines[-1].stop(5)
    (file,) = [path for path in files(folder) if f".{kind}." in path.name]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # of the latents, or of a KDA state
    file.write_bytes(data)
    engine = started(engines, model, folder)
    known, why, said = asked(engine, prompt)
    assert (known, said) == (0, answer)
    assert why == f"its stored state cannot be read: {file.name} is damaged"
    engine = started(engines, model, folder)  # stored again
    assert asked(engine, prompt)[0] == 400


# ---------------------------------------------------------------------------------- the store
@pytest.mark.parametrize("bits", [None, 8])
def test_a_state_is_what_it_was(model: KimiLinear, folder: Path, bits: int | None) -> None:
    store = opened(folder, model, bits=bits)
    entries = entries_of(model, 700, bits)
    hidden = mx.random.normal((1, 1, model.config.hidden_size))
    text = store.put(None, ids_of(700), entries, hidden)
    more = grown(model, entries, 333)
    next_text = store.put(text, ids_of(333, seed=1), more, None)
    store.close()
    store = opened(folder, model, bits=bits)
    known = store.known()
    assert [len(each.ids) for each in known] == [700, 1033]
    assert known[1].ids.tolist() == [*ids_of(700).tolist(), *ids_of(333, seed=1).tolist()]
    for each, expected in zip(known, (entries, more), strict=True):
        found, last = store.load(each.text)
        for one, other in zip(numbers(found), numbers(expected), strict=True):
            assert one.tobytes() == other.tobytes()
        assert (last is None) == (each.text.length != 700)
    assert text is not None and next_text is not None and next_text.before is text
    store.close()


def test_a_long_text_is_written_in_pieces(model: KimiLinear, folder: Path) -> None:
    store = opened(folder, model)
    tree = PrefixTree(PLENTY, store)
    ids, entries = ids_of(9000), entries_of(model, 4096)
    tree.insert(ids[:4096], State(caches.snapshot(entries)))
    entries = grown(model, entries, 9000 - 4096)
    tree.insert(ids, State(entries, mx.zeros((1, 1, model.config.hidden_size))))
    store.close()
    store = opened(folder, model)
    tree = PrefixTree(PLENTY, store)
    sizes = [len(files(folder)), *(each.text.length for each in store.known())]
    assert sizes == [3, 4096, 9000]  # tokens, and tokens with their state
    found = tree.find(ids)
    assert found.length == 9000 and found.node is not None
    state = tree.load(found.node, is_whole=True)
    for one, other in zip(numbers(state.entries), numbers(entries), strict=True):
        assert one.tobytes() == other.tobytes()
    assert tree.find(ids[:5000]).length == 0  # of the first piece there is no state
    store.close()


def test_a_text_is_written_once_and_turns_write_what_is_new(
    model: KimiLinear, folder: Path
) -> None:
    store = opened(folder, model)
    entries, text, new = entries_of(model, 1000), None, 0
    ids = ids_of(1000)
    for turn in range(60):
        text = store.put(text, ids, entries, None)
        assert text is not None
        again = store.put(text.before, ids, entries, None)
        assert again is text
        kda = [each for each in entries if isinstance(each, KDACache)]
        new += sum(array.nbytes for each in kda for array in each.arrays())
        latents = len(entries) - len(kda)
        new += len(ids) * latents * 4 * model.config.latent_width
        ids = ids_of(300, seed=turn + 1)
        entries = grown(model, entries, 300)
    store.close()
    assert store.written <= 1.1 * new
    assert store.written == sum(path.stat().st_size for path in files(folder))


def test_a_long_conversation_is_stored_to_its_end(model: KimiLinear, folder: Path) -> None:
    """Its earlier states go for the latest, its tokens stay."""
    memory = 10 << 20  # 20 states would be 17 MB, the tokens of all turns are 8
    store = opened(folder, model, memory)
    entries, text, ids = entries_of(model, 300), None, ids_of(300)
    for turn in range(20):
        text = store.put(text, ids, entries, None)
        assert text is not None and store.bytes <= memory
        until(lambda text=text: text.is_written)
        ids = ids_of(256, seed=turn + 1)
        before, entries = entries, grown(model, entries, 256)
    store.close()
    store = opened(folder, model, memory)
    latest = store.known()[-1]
    assert latest.text.length == 300 + 19 * 256 == len(latest.ids)
    for one, other in zip(numbers(store.load(latest.text)[0]), numbers(before), strict=True):
        assert one.tobytes() == other.tobytes()
    store.close()


def test_the_folder_never_holds_more_than_its_bound(model: KimiLinear, folder: Path) -> None:
    """Conversations of random lengths, that go on in turns; the latest can always go on."""
    memory, chance = 12 << 20, random.Random(0)
    store = opened(folder, model, memory)
    stop, largest = threading.Event(), [0]

    def watch() -> None:
        while not stop.is_set():
            try:
                largest[0] = max(largest[0], disk(folder))
            except FileNotFoundError:  # deleted meanwhile
                continue

    watching = threading.Thread(target=watch)
    watching.start()
    talks: list[tuple[StoredText, list[CacheEntry]]] = []
    for turn in range(60):
        if talks and chance.random() < 0.6:
            text, entries = talks.pop(chance.randrange(len(talks)))
            if not text.is_kept:
                continue
            more = chance.randrange(LEAST_TOKENS, 900)
            entries = grown(model, entries, more)
            found = store.put(text, ids_of(more, seed=turn), entries, None)
        else:
            count = chance.randrange(LEAST_TOKENS, 2000)
            entries = entries_of(model, count)
            found = store.put(None, ids_of(count, seed=turn), entries, None)
        if found is not None:
            talks = [*talks[-5:], (found, entries)]
        assert store.bytes <= memory
    last = talks[-1][0]
    stop.set()
    watching.join()
    store.close()
    assert 8 << 20 < largest[0] <= memory
    store = opened(folder, model, memory)
    assert last.address in {each.text.address for each in store.known()}
    assert store.bytes == disk(folder) + 4096  # (an empty lock takes no block)
    store.close()
    store = opened(folder, model, 3 << 20)  # less than before
    store.known()
    assert store.bytes <= 3 << 20 and disk(folder) <= 3 << 20
    store.close()


def test_what_an_interrupted_server_left_is_no_state(model: KimiLinear, folder: Path) -> None:
    store = opened(folder, model)
    text = store.put(None, ids_of(400), entries_of(model, 400), None)
    more = grown(model, entries_of(model, 400), 300)
    store.put(text, ids_of(300, seed=1), more, None)
    store.close()
    whole = files(folder)
    unfinished = folder / f".{whole[0].stem}.new.safetensors"
    unfinished.write_bytes(b"half")
    (folder / "notes.txt").write_text("not ours")
    for path in whole:
        if path.name.startswith(text.address) and ".tokens." in path.name:
            path.unlink()  # all others are of no use
    store = opened(folder, model)
    assert store.known() == []
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "lock", "notes.txt"]
    store.close()


def test_one_server_has_a_folder_and_a_full_disk_ends_no_answer(
    engines: list[Engine], model: KimiLinear, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started(engines, model, folder)
    with pytest.raises(KimiError, match="another server keeps its states there; --cache-disk 0GB"):
        opened(folder, model)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(state_store, "write_bytes_durably", full)
    prompt = ids_of(400).tolist()
    answer = asked(engine, prompt)[2]
    assert asked(engine, prompt) == (400, "all of it was read before", answer)
    engine.stop(5)
    assert files(folder) == []


# ---------------------------------------------------------------------------------- the program
@pytest.mark.slow
def test_a_server_that_is_killed_reads_nothing_twice(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "MLX_KIMI_CACHE": str(tmp_path)}
    body = {"messages": [{"role": "user", "content": "Remember this: " + "kda mla moe " * 200}]}

    def ask(kill: bool) -> int:
        command = [*PROGRAM, "serve", "--port", "0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stderr is not None
        line = next(line for line in process.stderr if "http://" in line)
        url = re.search(r"http://\S+/v1", line)
        assert url
        with process:
            answer = httpx.post(
                f"{url[0]}/chat/completions",
                json={**body, "max_tokens": 4},
                timeout=60,
                trust_env=False,
            )
            until(lambda: list(tmp_path.rglob("*.state.safetensors")))
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        usage = answer.json()["usage"]
        return usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]

    assert ask(kill=True) > LEAST_TOKENS
    assert ask(kill=False) < 64  # the state before the answer's own first tokens is stored
    (listed,) = json.loads(run("cache", "list", "--json", env=environment).stdout)
    assert listed["model"] == "pocket" and listed["states"] >= 1 and listed["size"] > 1 << 19
    refused = run("cache", "wipe", "other", env=environment)
    assert refused.returncode == 1 and refused.stderr.startswith("Error: other: no states are ")
    wiped = run("cache", "wipe", "pocket", env=environment)
    assert wiped.returncode == 0 and wiped.stderr.startswith("deleted pocket: ")
    assert json.loads(run("cache", "list", "--json", env=environment).stdout) == []
    assert ask(kill=False) > LEAST_TOKENS
