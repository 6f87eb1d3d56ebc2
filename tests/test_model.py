"""The whole model: transformers' logits, mlx-lm's, and its own however the text is cut up."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.loading.load import load_model
from mlx_kimi.model import cache, mla
from mlx_kimi.model.cache import CacheEntry
from mlx_kimi.model.kimi_linear import KimiLinear
from tests.assertions import assert_close, assert_same_bits
from tests.checkpoints import CONFIGS, reference, token_ids

# The stored logits are float64's. Transformers' own float32 is up to 1e-5 away from them, in
# logits of deep products; five times that is room for another order of sums.
REFERENCE = 5e-5
# Two float32 runs of different steps, forms and segments, each within REFERENCE of the truth.
SPLIT = 1e-4

Models = Callable[[str], KimiLinear]


def assert_gives_reference_logits(folder: Path, name: str, count: int | None = None) -> None:
    """Of the first `count` tokens; None: of all that are stored."""
    model, stored = load_model(folder), reference(name)
    for prefix in ("", "short_"):
        ids, expected = (stored[f"{prefix}{what}"][:count] for what in ("ids", "logits"))
        logits = model(mx.array(ids)[None])
        assert_close(f"{prefix}logits", logits[0], expected, REFERENCE)


@pytest.mark.parametrize("how", [{}, {"shards": 3}, {"layout": "transformers"}], ids=str)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "full_width"])
def test_logits_are_those_of_transformers(
    folder: Callable[..., Path], name: str, how: dict[str, Any]
) -> None:
    assert_gives_reference_logits(folder(name, **how), name)


@pytest.mark.slow
def test_logits_are_those_of_transformers_at_full_width(folder: Callable[..., Path]) -> None:
    # 64 of the 150 stored tokens: two chunks of the delta rule. A CPU takes 0.3 s for each token.
    assert_gives_reference_logits(folder("full_width"), "full_width", 64)


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_a_16_bit_folder_is_the_model_of_its_rounded_weights(
    folder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    path = folder(name, dtype="bfloat16")
    tensors = mx.load(str(path / "model.safetensors"))
    assert isinstance(tensors, dict)
    widened = {k: v.astype(mx.float32) for k, v in tensors.items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), widened)
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    ids = mx.array(token_ids(CONFIGS[name], 40))[None]
    # On the CPU everything is float32; elsewhere activations round to 8 bits, layer after layer.
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    assert_close(
        "logits", load_model(path)(ids), load_model(tmp_path)(ids), 1e-6 if on_cpu else 0.1
    )


@pytest.mark.parametrize(
    "how",
    [{}, {"bits": 8, "group_size": 64}, {"mode": "mxfp4"}, {"bits": 3}],
    ids=str,
)
@pytest.mark.parametrize("name", ["tiny", "grouped"])
def test_quantized_logits_are_those_of_mlx_lm(
    quantized: Callable[..., Path], name: str, how: dict[str, Any]
) -> None:
    from mlx_lm import utils

    path = quantized(name, **how)
    peer, _ = utils.load_model(path)
    ids = mx.array(token_ids(CONFIGS[name], 60))[None]
    assert_close("logits", load_model(path)(ids), peer(ids), SPLIT)


def test_a_quantized_kv_b_proj_is_the_matrix_that_it_stands_for(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Older quantizations keep kv_b_proj whole: the same numbers as its halves, dequantized."""
    tensors = mx.load(str(folder("tiny") / "model.safetensors"))
    assert isinstance(tensors, dict)
    config = json.loads((folder("tiny") / "config.json").read_text())
    name = "model.layers.3.self_attn.kv_b_proj"
    packed, scales, biases = mx.quantize(tensors.pop(f"{name}.weight"), 32, 4)
    whole = mx.dequantize(packed, scales, biases, 32, 4)
    parts = {"weight": packed, "scales": scales, "biases": biases}
    logits = []
    for kind, arrays in (("whole", {"weight": whole}), ("packed", parts)):
        path = tmp_path / kind
        path.mkdir()
        named = {f"{name}.{part}": array for part, array in arrays.items()}
        mx.save_safetensors(str(path / "model.safetensors"), tensors | named)
        quantization = {"quantization": {"group_size": 32, "bits": 4}} if kind == "packed" else {}
        (path / "config.json").write_text(json.dumps(config | quantization))
        logits.append(load_model(path)(mx.array(token_ids(config, 30))[None]))
    assert_same_bits("logits", *logits)


# ------------------------------------------------------------------------- one text, cut up
def read(
    model: KimiLinear, ids: np.ndarray, steps: Sequence[int], entries: list[CacheEntry]
) -> Any:
    """The logits [B, T, vocab] of `ids` [B, T] read in steps of these sizes, the last repeated."""
    logits, start, number = [], 0, 0
    while start < ids.shape[1]:
        size = steps[min(number, len(steps) - 1)]
        logits.append(model(mx.array(ids[:, start : start + size]), entries))
        mx.async_eval(logits[-1], *cache.arrays(entries))
        start, number = start + size, number + 1
    return mx.concatenate(logits, axis=1)


def rows_of_ids(name: str, B: int, T: int) -> np.ndarray:
    return token_ids(CONFIGS[name], B * T, seed=B).reshape(B, T)


@pytest.fixture(scope="module")
def one_pass(model: Models) -> Callable[..., Any]:
    """The text, and its logits in one pass after `past` tokens that were read before."""
    known: dict[Any, Any] = {}

    def computed(name: str, B: int, T: int, past: int) -> Any:
        key = (name, B, T, past)
        if key not in known:
            ids, entries = rows_of_ids(name, B, past + T), model(name).make_cache()
            if past:
                model(name)(mx.array(ids[:, :past]), entries)
            saved = cache.snapshot(entries)
            known[key] = ids[:, past:], saved, model(name)(mx.array(ids[:, past:]), entries)
        return known[key]

    return computed


@pytest.mark.slow
@pytest.mark.parametrize("steps", [[3], [16], [17], [64], [512], [100, 1, 400, 2]], ids=str)
@pytest.mark.parametrize(
    "name, B, past", [("tiny", 1, 0), ("tiny", 3, 37), ("odd", 1, 37), ("odd", 3, 0)]
)
def test_any_split_gives_the_same_logits(
    model: Models, one_pass: Callable[..., Any], name: str, B: int, past: int, steps: list[int]
) -> None:
    ids, saved, expected = one_pass(name, B, 600, past)
    entries = cache.snapshot(saved)
    assert_close("logits", read(model(name), ids, steps, entries), expected, SPLIT)
    assert all(entry.lengths == (past + 600,) * B for entry in entries)


@pytest.mark.slow
@pytest.mark.parametrize("name, B, T, past", [("tiny", 1, 600, 0), ("odd", 3, 290, 37)])
def test_token_by_token_gives_the_logits_of_one_pass(
    model: Models, one_pass: Callable[..., Any], name: str, B: int, T: int, past: int
) -> None:
    ids, saved, expected = one_pass(name, B, T, past)
    assert_close("logits", read(model(name), ids, [1], cache.snapshot(saved)), expected, SPLIT)


@pytest.mark.slow
@pytest.mark.parametrize("expand_from", [1, 20, 10**9])
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_any_split_over_many_segments_and_both_forms_of_mla_is_the_same(
    model: Models,
    one_pass: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    expand_from: int,
) -> None:
    ids, _, expected = one_pass(name, 1, 600, 0)
    monkeypatch.setattr(cache, "TAIL", 16)
    monkeypatch.setattr(mla, "expanding_pays", lambda T, _: T >= expand_from)
    entries = model(name).make_cache()
    steps = [*random.Random(4).choices([1, 2, 15, 16, 17, 40], k=30), 7]
    assert_close("logits", read(model(name), ids, steps, entries), expected, SPLIT)
    latents = next(entry for entry in entries if isinstance(entry, cache.LatentCache))
    assert len(latents.frozen[0]) > 3


def test_a_single_token_text_is_read(model: Models) -> None:
    ids = rows_of_ids("odd", 1, 20)
    whole = model("odd")(mx.array(ids))
    assert_close("logits", model("odd")(mx.array(ids[:, :1])), whole[:, :1], SPLIT)


# ------------------------------------------------------------------------------ unequal rows
class Rows:
    """Several texts read one by one and as one padded batch, which must agree at every piece."""

    def __init__(self, model: KimiLinear, count: int, seed: int = 0) -> None:
        self.model, self.rng = model, np.random.default_rng(seed)
        self.single = [model.make_cache() for _ in range(count)]
        self.batch = model.make_cache()

    def read(self, lengths: Sequence[int], padding: int = 0) -> None:
        """Read a random piece of each length, right-padded by `padding` more than needed."""
        T = max(lengths) + padding
        ids = self.rng.integers(0, self.model.config.vocab_size, (len(lengths), T))
        logits = self.model(mx.array(ids), self.batch, lengths=lengths)
        for row, n in enumerate(lengths):
            if n:
                alone = self.model(mx.array(ids[row : row + 1, :n]), self.single[row])
                assert_close(f"row {row}", logits[row, :n], alone[0], SPLIT)
        for entry in self.batch:
            assert entry.lengths == tuple(self._length(row) for row in range(len(lengths)))

    def _length(self, row: int) -> int:
        return self.single[row][0].lengths[0] if self.single[row][0].lengths else 0

    def take(self, rows: Sequence[int]) -> None:
        self.batch = cache.take(self.batch, rows)
        self.single = [cache.snapshot(self.single[row]) for row in rows]

    def join(self, *others: "Rows") -> None:
        batches = [self.batch, *(other.batch for other in others)]
        self.batch = cache.join(batches)
        self.single += [row for other in others for row in other.single]


@pytest.fixture(params=["tiny", "odd"])
def rows(request: pytest.FixtureRequest, model: Models) -> Callable[..., Rows]:
    return lambda count, seed=0: Rows(model(request.param), count, seed)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(5, 300, 17), (1, 2, 3), (256, 255, 257), (8, 8, 1)], ids=str)
def test_unequal_rows_are_single_runs(rows: Callable[..., Rows], lengths: tuple[int, ...]) -> None:
    # (By this seed no token's last expert and the next are closer than 8e-6: that a batch adds in
    # another order cannot exchange them.)
    batch = rows(3, seed=2)
    batch.read(lengths)
    batch.read((40, 1, 200))
    batch.read((0, 3, 9), padding=4)
    for _ in range(3):
        batch.read((1, 1, 1))
    batch.read((1, 0, 1))
    batch.read((20, 20, 20))


def test_a_row_may_begin_later_than_the_others(rows: Callable[..., Rows]) -> None:
    batch = rows(2)
    batch.read((0, 30))
    batch.read((1, 1))
    batch.read((33, 2))


@pytest.mark.slow
def test_padding_alone_changes_nothing(rows: Callable[..., Rows]) -> None:
    batch = rows(2)
    batch.read((7, 30), padding=300)
    batch.read((0, 0), padding=5)
    batch.read((3, 1))


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [(1,), (2, 0), (0, 0, 1, 2), (2, 1, 0)], ids=str)
def test_taken_rows_go_on_as_before(rows: Callable[..., Rows], chosen: tuple[int, ...]) -> None:
    batch = rows(3)
    batch.read((290, 3, 40))
    batch.take(chosen)
    batch.read([1] * len(chosen))
    batch.read([5 * n + 1 for n in range(len(chosen))])


@pytest.mark.slow
def test_joined_rows_of_different_lengths_go_on_as_before(rows: Callable[..., Rows]) -> None:
    first, second, third = rows(2, 1), rows(1, 2), rows(1, 3)
    first.read((30, 4))
    second.read((560,))
    third.read((1,))
    first.join(second, third)
    first.read((1, 1, 1, 1))
    first.read((2, 0, 17, 200))
    first.take((3, 2, 0))
    fourth = rows(1, 4)
    fourth.read((100,))
    fourth.join(first)
    for _ in range(2):
        fourth.read((1, 1, 1, 1))


def test_padded_tokens_may_be_any_id(model: Models) -> None:
    ids = rows_of_ids("odd", 2, 50)
    other = np.where(np.arange(50) < [[50], [20]], ids, 0)
    logits = []
    for batch in (ids, other):
        entries = model("odd").make_cache()
        model("odd")(mx.array(batch), entries, lengths=[50, 20])
        logits.append(model("odd")(mx.array(ids[:, :3]), entries))
    assert_same_bits("logits", *logits)


def test_an_empty_cache_cannot_be_joined(model: Models) -> None:
    read_entries, empty = model("odd").make_cache(), model("odd").make_cache()
    model("odd")(mx.array([[1, 2]]), read_entries)
    for entries in zip(read_entries, empty, strict=True):
        with pytest.raises(ValueError, match="join"):
            type(entries[0]).join(entries)


def test_empty_entries_give_empty_rows(model: Models) -> None:
    entries = [entry.take([0, 1]) for entry in model("tiny").make_cache()]
    ids = mx.array(rows_of_ids("tiny", 2, 5))
    assert_same_bits("logits", model("tiny")(ids, entries), model("tiny")(ids))
