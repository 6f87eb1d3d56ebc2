"""Convert: same numbers here and in mlx-lm, same bytes twice, all or nothing, in little memory."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlx_kimi.checkpoint.config import QUANTIZATION_MODES
from mlx_kimi.checkpoint.files import INDEX, Checkpoint
from mlx_kimi.cli.main import cli
from mlx_kimi.convert import blocks
from mlx_kimi.convert.convert import Summary, convert
from mlx_kimi.convert.quantize import RECIPES, scheme
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.load import load_model
from tests.assertions import assert_close, assert_same_bits
from tests.checkpoints import (
    FULL_WIDTH,
    ODD,
    TINY,
    entries,
    published_config,
    token_ids,
    write_checkpoint,
)

# Every width is a multiple of 64, those of the experts and the hidden state of 128.
EVEN = published_config(
    kda_layers=[1, 2, 4],
    full_attn_layers=[3],
    hidden_size=128,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    kda_head_dim=64,
    moe_intermediate_size=128,
)

# Between float32 runs that add in another order, and mlx-lm's kv_a_layernorm, whose epsilon is 1e-5
# instead of 1e-6: a relative change of 5e-6 where the mean square is 1.
SAME = 1e-4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EVEN in float32, published, three shards. Not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("even"), EVEN, shards=3)


@pytest.fixture(scope="module")
def four_bits(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` converted with the defaults. Not to be changed."""
    out = tmp_path_factory.mktemp("even_4bit") / "out"
    convert(source, out, scheme())
    return out


def logits(folder: Path, config: dict[str, Any] = EVEN) -> np.ndarray:
    return np.array(load_model(folder)(mx.array(token_ids(config, 40))[None]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def arrays(folder: Path) -> dict[str, mx.array]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.array(name) for name in checkpoint.tensors}


def assert_same_tensors(ours: Path, other: Path) -> None:
    found, expected = arrays(ours), arrays(other)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert_same_bits(name, found[name].view(mx.uint8), array.view(mx.uint8))


def mlx_lm(folder: Path) -> Any:
    from mlx_lm.utils import load_model as load_theirs

    return load_theirs(folder)[0]


def quantized_by_mlx_lm(source: Path, out: Path, group_size: int, bits: int, mode: str) -> Path:
    from mlx_lm import utils

    model, config = utils.load_model(source)
    model, config = utils.quantize_model(model, config, group_size, bits, mode)
    utils.save_model(out, model)
    utils.save_config(config, out / "config.json")
    return out


# ------------------------------------------------------------------------------- what comes out
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("tiny", {}),
        ("tiny", {"dtype": "bfloat16", "shards": 2}),
        ("odd", {"layout": "transformers", "shards": 3}),
        ("odd", {"layout": "transformers", "dtype": "bfloat16"}),
        ("odd_tied", {}),
        ("odd_tied", {"layout": "transformers"}),
        ("grouped", {}),
    ],
    ids=str,
)
def test_unquantized_it_is_the_same_model(
    folder: Callable[..., Path], tmp_path: Path, name: str, how: dict[str, Any]
) -> None:
    source = folder(name, **how)
    convert(source, tmp_path / "out", None)
    convert(tmp_path / "out", tmp_path / "again", None)  # the MLX layout is a source as well
    ids = mx.array(token_ids(json.loads((source / "config.json").read_text()), 40))[None]
    expected = np.array(load_model(source)(ids))
    assert_same_bits("logits", np.array(load_model(tmp_path / "out")(ids)), expected)
    assert_same_tensors(tmp_path / "again", tmp_path / "out")
    stored = {tensor.dtype for tensor in Checkpoint(source).tensors.values()}
    assert {tensor.dtype for tensor in Checkpoint(tmp_path / "out").tensors.values()} == stored


@pytest.mark.parametrize("how", [{}, {"layout": "transformers"}], ids=str)
def test_mlx_lm_loads_it_unquantized(tmp_path: Path, how: dict[str, Any]) -> None:
    source = write_checkpoint(tmp_path / "source", EVEN, **how)
    convert(source, tmp_path / "out", None)
    ids = mx.array(token_ids(EVEN, 40))[None]
    assert_close("logits", mlx_lm(tmp_path / "out")(ids), load_model(source)(ids), SAME)


@pytest.mark.slow
def test_mlx_lm_computes_the_same_at_4_bits(four_bits: Path) -> None:
    prompt = mx.array(token_ids(EVEN, 20))[None]
    ours, theirs = load_model(four_bits), mlx_lm(four_bits)
    our_cache, their_cache = ours.make_cache(), theirs.make_cache()
    ids = prompt
    for step in range(64):
        found, expected = ours(ids, our_cache)[:, -1], theirs(ids, cache=their_cache)[:, -1]
        assert_close(f"logits of step {step}", found, expected, SAME)
        ids = mx.argmax(found, axis=-1, keepdims=True)
        assert ids.item() == mx.argmax(expected).item(), f"greedy token {step}"


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ((64, 4, "affine"), "float32"),
        ((64, 4, "affine"), "bfloat16"),
        ((32, 3, "affine"), "bfloat16"),
        ((32, 4, "mxfp4"), "float32"),
        ((16, 4, "nvfp4"), "bfloat16"),
    ],
)
def test_the_tensors_are_those_of_mlx_lm(
    tmp_path: Path, options: tuple[int, int, str], dtype: str
) -> None:
    source = write_checkpoint(tmp_path / "source", EVEN, dtype=dtype)
    theirs = quantized_by_mlx_lm(source, tmp_path / "theirs", *options)
    group_size, bits, mode = options
    convert(source, tmp_path / "ours", scheme(mode, bits, group_size, "router-8bit"))
    assert_same_tensors(tmp_path / "ours", theirs)
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    expected = json.loads((theirs / "config.json").read_text())
    assert ours["quantization"] == expected["quantization"] == ours["quantization_config"]
    index = json.loads((tmp_path / "ours" / INDEX).read_text())
    # Theirs leaves A_log, dt_bias and the score bias out, ours counts every parameter.
    assert index["metadata"].pop("total_parameters") == 1_828_894
    their_index = json.loads((theirs / INDEX).read_text())
    assert their_index["metadata"].pop("total_parameters") == 1_828_894 - 3 * (2 + 128 + 8)
    assert index == their_index


def test_a_folder_quantized_by_mlx_lm_loads_here(source: Path, tmp_path: Path) -> None:
    theirs = quantized_by_mlx_lm(source, tmp_path / "theirs", 64, 4, "affine")
    ids = mx.array(token_ids(EVEN, 40))[None]
    assert_close("logits", load_model(theirs)(ids), mlx_lm(theirs)(ids), SAME)


def test_an_older_folder_keeps_kv_b_proj_whole(four_bits: Path, tmp_path: Path) -> None:
    """Its halves must be the rows that the quantized matrix stands for, neither more nor less."""
    name = "model.layers.2.self_attn.kv_b_proj"
    published = arrays(write_checkpoint(tmp_path / "source", EVEN))
    packed = mx.quantize(published[f"{name}.weight"], group_size=64, bits=4)
    kept = {
        other: array
        for other, array in arrays(four_bits).items()
        if "embed_q" not in other and "unembed_out" not in other
    }
    old = {
        f"{name}.{part}": x for part, x in zip(("weight", "scales", "biases"), packed, strict=True)
    }
    exact = {f"{name}.weight": mx.dequantize(*packed, group_size=64, bits=4)}
    for folder, added in (("old", old), ("exact", exact)):
        (tmp_path / folder).mkdir()
        mx.save_safetensors(str(tmp_path / folder / "model.safetensors"), kept | added)
        config = (four_bits / "config.json").read_bytes()
        (tmp_path / folder / "config.json").write_bytes(config)
    assert_same_bits("logits", logits(tmp_path / "old"), logits(tmp_path / "exact"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [
        (mode, bits, group_size)
        for mode, (group_sizes, widths) in QUANTIZATION_MODES.items()
        for bits in widths
        for group_size in group_sizes
    ],
)
def test_every_mode_loads_here_and_in_mlx_lm(
    tmp_path: Path, source: Path, mode: str, bits: int, group_size: int
) -> None:
    report = convert(source, tmp_path / "out", scheme(mode, bits, group_size))
    ids = mx.array(token_ids(EVEN, 12))[None]
    assert_close("logits", load_model(tmp_path / "out")(ids), mlx_lm(tmp_path / "out")(ids), SAME)
    assert {tensor.shape[-1] % group_size for tensor in report.kept_unquantized} <= {64}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_here_and_in_mlx_lm(source: Path, tmp_path: Path, recipe: str) -> None:
    convert(source, tmp_path / "out", scheme(recipe=recipe))
    ids = mx.array(token_ids(EVEN, 12))[None]
    assert_close("logits", load_model(tmp_path / "out")(ids), mlx_lm(tmp_path / "out")(ids), SAME)


def test_a_recipe_is_written_into_the_config(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", scheme(bits=5, recipe="embeddings-6bit"))
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert quantization == {
        "group_size": 64,
        "bits": 5,
        "mode": "affine",
        "lm_head": {"group_size": 64, "bits": 6},
        "model.embed_tokens": {"group_size": 64, "bits": 6},
    }


def test_a_width_that_the_group_does_not_divide_stays_unquantized(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    report = convert(folder("odd"), tmp_path / "out", scheme(group_size=32))
    widths = {tensor.module.split(".")[-1]: tensor.shape[-1] for tensor in report.kept_unquantized}
    assert widths == {"embed_q": 40, "unembed_out": 48, "o_proj": 280, "down_proj": 144}
    stored = Checkpoint(tmp_path / "out")
    for tensor in report.kept_unquantized:
        assert stored.tensors[tensor.name].dtype == "F32"
        assert f"{tensor.module}.scales" not in stored
    assert np.isfinite(logits(tmp_path / "out", ODD)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_that_of_scales_and_unquantized_tensors(
    source: Path, tmp_path: Path, dtype: str
) -> None:
    convert(source, tmp_path / "out", scheme(), dtype)
    short = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    for name, tensor in Checkpoint(tmp_path / "out").tensors.items():
        kept = name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))  # float32 in SRC
        packed = tensor.dtype == "U32" and name.endswith(".weight")
        assert packed or tensor.dtype == ("F32" if kept else short), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert np.isfinite(logits(tmp_path / "out")).all()

    before, after = arrays(source), arrays(tmp_path / "out")
    norm = before["model.norm.weight"].astype(getattr(mx, dtype))
    assert mx.array_equal(after["model.norm.weight"], norm)
    expected = mx.quantize(before["lm_head.weight"].astype(getattr(mx, dtype)))
    for part, array in zip(("weight", "scales", "biases"), expected, strict=True):
        assert mx.array_equal(after[f"lm_head.{part}"], array), part


def test_transformers_config_gets_the_published_fields(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", TINY, layout="transformers")
    convert(source, tmp_path / "out", None)
    written = json.loads((source / "config.json").read_text())
    result = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.items() <= {**result, **written}.items()
    for field in ("linear_attn_config", "first_k_dense_replace", "rope_theta", "mla_use_nope"):
        assert field not in written
        assert result[field] == TINY[field]


def test_a_published_config_is_kept(source: Path, four_bits: Path) -> None:
    result = json.loads((four_bits / "config.json").read_text())
    del result["quantization"], result["quantization_config"]
    assert result == json.loads((source / "config.json").read_text())


def test_files_beside_the_weights(source: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", TINY)
    for name in ("tiktoken.model", "chat_template.jinja", "modeling_kimi.py", "notes.txt"):
        (folder / name).write_text(name)
    (folder / "tokenizer_config.json").symlink_to(folder / "notes.txt")  # as the hub's cache does
    convert(folder, tmp_path / "out", None)
    copied = {"tiktoken.model", "chat_template.jinja", "tokenizer_config.json"}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == copied | {"config.json", "model.safetensors", INDEX}
    assert not (tmp_path / "out" / "tokenizer_config.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "notes.txt"


# ------------------------------------------------------------------------------------- the files
def test_two_runs_give_the_same_bytes(source: Path, four_bits: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", scheme())
    assert contents(tmp_path / "out") == contents(four_bits)


@pytest.mark.parametrize("block", [2_000, 40_000])
def test_blocks_of_rows_give_the_same_bytes(
    source: Path, four_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    convert(source, tmp_path / "out", scheme())
    assert contents(tmp_path / "out") == contents(four_bits)


def test_shards_hold_the_same_tensors(source: Path, four_bits: Path, tmp_path: Path) -> None:
    limit = 100_000
    report = convert(source, tmp_path / "out", scheme(), max_shard=limit)
    assert report.shards > 3
    assert_same_tensors(tmp_path / "out", four_bits)
    assert_same_bits("logits", logits(tmp_path / "out"), logits(four_bits))
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert list(weight_map) == sorted(weight_map)
    for number in range(1, report.shards + 1):
        name = f"model-{number:05}-of-{report.shards:05}.safetensors"
        modules = {tensor.rsplit(".", 1)[0] for tensor, file in weight_map.items() if file == name}
        assert (tmp_path / "out" / name).stat().st_size < limit + 10_000 or len(modules) == 1


def test_a_file_begins_with_an_aligned_header(four_bits: Path) -> None:
    data = (four_bits / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "mlx"}
    spans = [entry["data_offsets"] for entry in header.values()]
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert 8 + length + spans[-1][1] == len(data)


def test_progress_counts_what_is_read(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(source, tmp_path / "out", None, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


# ------------------------------------------------------------------------------- when it goes wrong
class Usage(NamedTuple):
    """What shutil.disk_usage says, as far as convert reads it."""

    free: int


def refused(source: Path, out: Path, match: str, **how: Any) -> None:
    """The conversion is a KimiError of one line, and nothing that it made is left."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    with pytest.raises(KimiError, match=match) as error:
        convert(source, out, scheme(), **how)
    assert "\n" not in str(error.value)
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else []) == before


def test_it_refuses_to_overwrite(source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        refused(source, tmp_path / name, f"{name}: already exists")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_no_conversions_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("theirs")
    refused(source, tmp_path / "out", "out.partial: exists and is no conversion's")
    assert (tmp_path / "out.partial" / "model.safetensors").read_text() == "theirs"


@pytest.mark.parametrize("text", ["Monday\n", "0000000g {}\n", "12345678 [1]\n", "x"])
def test_a_journal_of_somebody_else_is_left_alone(source: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "out.partial" / "model").mkdir(parents=True)
    files = [tmp_path / "out.partial" / name for name in ("journal", "model/theirs")]
    for file in files:
        file.write_text(text)
    refused(source, tmp_path / "out", "out.partial: exists and is no conversion's")
    assert [file.read_text() for file in files] == [text, text]


@pytest.mark.parametrize("torn", ["", "0", "0123abcd", '0123abcd {"the', "\0" * 40])
def test_a_journal_that_a_power_cut_tore_is_begun_anew(
    source: Path, tmp_path: Path, torn: str
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "journal").write_text(torn)
    convert(source, tmp_path / "out", None)
    assert not (tmp_path / "out.partial").exists()


def test_what_somebody_put_beside_the_journal_stays(source: Path, tmp_path: Path) -> None:
    note = tmp_path / "out.partial" / "note"
    convert(source, tmp_path / "out", None, progress=lambda *_: note.write_text("mine") and None)
    assert note.read_text() == "mine" and not (tmp_path / "out.partial" / "journal").exists()


def test_places_where_it_cannot_write(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "a" / "b", "a: no such folder, so that b cannot be made")
    refused(source, source / "out", "cannot lie inside its source")
    (tmp_path / "link").symlink_to(source)
    refused(source, tmp_path / "link" / "out", "cannot lie inside its source")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder closed even to root")
def test_a_parent_that_is_not_writable(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free=10**12))
    with pytest.raises(KimiError, match="^/proc/out.partial: cannot be made: "):
        convert(source, "/proc/out", scheme())


def test_a_quantized_source_is_refused(four_bits: Path, tmp_path: Path) -> None:
    refused(four_bits, tmp_path / "out", r"is quantized already \(affine, 4 bits, group 64\)")


def test_a_full_disk_is_told_with_numbers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free=700_000))
    refused(source, tmp_path / "out", "out: needs 1.20 MB but its disk has 0.70 MB free")


def test_a_disk_that_fills_up_leaves_nothing(source: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # of 1,190,000
    try:
        refused(source, tmp_path / "out", "out: File too large; nothing of the conversion is kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("at", [1, 30])
def test_ctrl_c_before_a_record_leaves_nothing(source: Path, tmp_path: Path, at: int) -> None:
    calls = []

    def interrupt(done: int, total: int) -> None:
        assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
        calls.append(done)
        if len(calls) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", scheme(), progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def changed(source: Path, name: str, value: float) -> str:
    """Put `value` into the last element of a tensor; its file."""
    file = Checkpoint(source).tensors[name].file
    path = source / file
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    end = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][1]
    data[end - 4 : end] = np.float32(value).tobytes()
    path.write_bytes(data)
    return file


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.block_sparse_moe.experts.5.w2.weight",
        "model.layers.2.self_attn.kv_b_proj.weight",
        "model.layers.0.self_attn.dt_bias",
        "model.norm.weight",
    ],
)
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, name: str, value: float) -> None:
    source = write_checkpoint(tmp_path / "source", EVEN, shards=2)
    file = changed(source, name, value)
    refused(source, tmp_path / "out", f"^{file}: {name} holds NaN or infinity$")


def test_a_weight_beyond_the_dtype_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", EVEN)
    changed(source, "lm_head.weight", 1e5)
    message = "lm_head.weight has values beyond float16; choose another dtype"
    refused(source, tmp_path / "out", message, dtype="float16")


def test_huge_finite_weights_are_no_error(tmp_path: Path) -> None:
    """Their sum overflows."""
    source = write_checkpoint(tmp_path / "source", EVEN)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed(source, name, 3e38)
    convert(source, tmp_path / "out", None)


def truncate(path: Path, count: int = 1000) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - count)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: truncate(s / "model.safetensors"), "not a whole safetensors file"),
        (lambda s: (s / "model.safetensors").write_bytes(b"x"), "not a whole safetensors file"),
        (lambda s: (s / "model.safetensors").unlink(), "no weights"),
        (lambda s: (s / "config.json").unlink(), "no model's folder: it has no config.json"),
        (lambda s: (s / "config.json").write_text("{"), "must be JSON"),
        (
            lambda s: (s / "config.json").write_text(json.dumps(EVEN | {"num_experts": 9})),
            "experts.8",
        ),
        (
            lambda s: (s / "config.json").write_text(
                json.dumps(EVEN | {"quantization_config": {"quant_method": "fp8"}})
            ),
            "quantized by another tool",
        ),
        (
            lambda s: (s / "config.json").write_text(json.dumps(EVEN | {"num_hidden_layers": 3})),
            "layer",
        ),
    ],
)
def test_a_damaged_source_is_named(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    source = write_checkpoint(tmp_path / "source", EVEN)
    damage(source)
    refused(source, tmp_path / "out", message)


def test_a_source_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", EVEN)

    def shrink(done: int, total: int) -> None:
        truncate(source / "model.safetensors")

    refused(source, tmp_path / "out", r"model.safetensors: was cut to [\d,]+ of ", progress=shrink)


def rewrite(file: Path, other: Path) -> None:
    time.sleep(0.02)  # (times of files have a grain)
    with file.open("r+b") as opened:
        opened.write(other.read_bytes())


def rewrite_and_set_the_time_back(file: Path, other: Path) -> None:
    before = file.stat().st_mtime_ns
    rewrite(file, other)
    os.utime(file, ns=(before, before))


def replace_it(file: Path, other: Path) -> None:
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    os.replace(other, file)


@pytest.mark.parametrize("shard", [0, 2])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rewrite, "was written to while it is being read"),
        (rewrite_and_set_the_time_back, "was written to while it is being read"),
        (replace_it, "was (removed|replaced) while it is being read"),
    ],
)
def test_two_models_are_never_mixed(
    source: Path, tmp_path: Path, change: Callable[[Path, Path], None], said: str, shard: int
) -> None:
    """A shard becomes that of a model of the same shapes, while it is read or before its turn."""
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    other = write_checkpoint(tmp_path / "other", EVEN, seed=9, shards=3)
    name = sorted(path.name for path in mine.glob("*.safetensors"))[shard]
    changed = False

    def meanwhile(done: int, total: int) -> None:
        nonlocal changed
        if not changed:
            changed = True
            change(mine / name, other / name)

    refused(mine, tmp_path / "out", said, progress=meanwhile)


@pytest.mark.slow
def test_the_files_beside_the_weights_are_those_that_were_read_first(
    source: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    (mine / "LICENSE").write_text("free")
    config = (mine / "config.json").read_text()

    def meanwhile(done: int, total: int) -> None:
        (mine / "LICENSE").write_text("not free")
        (mine / "config.json").write_text(config.replace("}", ', "rms_norm_eps": 0.5}'))

    convert(mine, tmp_path / "out", scheme(), progress=meanwhile)
    convert(source, tmp_path / "expected", scheme())
    (tmp_path / "expected" / "LICENSE").write_text("free")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


# ------------------------------------------------------------------------------- the command line
def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", "-m", *map(str, arguments)])


def test_the_command_reports_on_stderr(
    source: Path, four_bits: Path, folder: Callable[..., Path], tmp_path: Path
) -> None:
    result = run(source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "in 1 file, made from" in result.stderr and "bits per weight" in result.stderr
    assert "Not quantized" not in result.stderr
    assert contents(tmp_path / "out") == contents(four_bits)

    result = run(folder("odd"), tmp_path / "odd", "--group-size", 32)
    assert "the group does not divide the width: 3 x self_attn.embed_q (width 40)" in result.stderr


@pytest.mark.slow
def test_the_commands_options_reach_the_conversion(source: Path, tmp_path: Path) -> None:
    options = ["--bits", 8, "--group-size", 32, "--dtype", "bfloat16"]
    assert run(source, tmp_path / "a", *options, "--recipe", "router-8bit").exit_code == 0
    convert(source, tmp_path / "b", scheme("affine", 8, 32, "router-8bit"), "bfloat16")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert run(source, tmp_path / "c", "--no-quantize").exit_code == 0
    assert "quantization" not in json.loads((tmp_path / "c" / "config.json").read_text())


def test_it_takes_a_folder_in_the_mlx_layout(source: Path, four_bits: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "plain", None)
    arguments = ["convert", "-m", str(tmp_path / "plain"), str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*arguments, "--bits", "4"])
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out") == contents(four_bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "7"], "--bits must be 2, 3, 4, 5, 6, 8 for mode affine but is 7"),
        (["--mode", "mxfp4", "--bits", "8"], "--bits must be 4 for mode mxfp4 but is 8"),
        (["--mode", "nvfp4", "--group-size", "64"], "--group-size must be 16 for mode nvfp4"),
        (["--mode", "int4"], "'int4' is not one of"),
        (["--recipe", "best"], "'best' is not one of"),
        (["--dtype", "float64"], "'float64' is not one of"),
        (["--no-quantize", "--bits", "4"], "--no-quantize and --bits exclude each other"),
        (["--bits", "four"], "'four' is not a valid integer"),
    ],
)
def test_bad_options_are_clicks_errors(
    source: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run(source, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_one_line_and_exit_code_1(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run(source, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ") and "already exists" in result.stderr
    assert run(tmp_path / "absent", tmp_path / "new").exit_code == 1


# ------------------------------------------------------------------------------------------ memory
PEAK = """
import sys
from pathlib import Path
import rich.progress
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.quantize import scheme

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

before = peak()
convert(sys.argv[1], sys.argv[2], scheme())
print(before, peak())
"""


def write_zeros(folder: Path, config: dict[str, Any], dtype: str) -> Path:
    """A checkpoint of zeros in one file that takes no room on disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for entry in entries(config, dtype, "published"):
        span = [end, end + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": span}
        end = span[1]
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_a_few_blocks(tmp_path: Path, dtype: str) -> None:
    """Layers of the 48B, with fewer experts and an embedding of 9 or 18 blocks."""
    config = FULL_WIDTH | {"vocab_size": 1 << 16, "num_experts": 8}
    source = write_zeros(tmp_path / "source", config, dtype)
    assert (source / "model.safetensors").stat().st_size > 1.2e9
    command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, after = map(int, output.split())
    print(f"{dtype}: {(after - before) / 1e6:.0f} MB above {before / 1e6:.0f} MB")
    # 187 and 173 MB here. Four blocks of 33.5 MB as read, one in MLX, one for what MLX needs, four
    # as written, and what MLX may keep: the size of the model is in none of them.
    assert after - before < 272e6


def test_the_report_counts(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", scheme())
    assert isinstance(report, Summary)
    assert report.out_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.source_bytes == sum(p.stat().st_size for p in source.glob("*.safetensors"))
    weights = sum(
        np.prod(entry.shape, dtype=int) for entry in entries(EVEN, "float32", "published")
    )
    assert report.parameters == weights
