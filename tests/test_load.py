"""Folders that are not a whole model: each fault is named in one line, at once."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.quantize import scheme
from mlx_kimi.errors import LONGEST, KimiError
from mlx_kimi.loading.budget import Budget
from mlx_kimi.loading.load import load, load_model
from tests.assertions import assert_close
from tests.checkpoints import TINY, token_ids, write_checkpoint
from tests.conftest import SEED
from tests.processes import live_memory

Header = dict[str, Any]
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"  # [64, 64]


@pytest.fixture
def copy(tmp_path: Path, folder: Callable[..., Path]) -> Callable[..., Path]:
    """`copy(shards=3)`: a tiny model's folder that a test may spoil."""
    return lambda **how: shutil.copytree(folder("tiny", **how), tmp_path / "model")


def refusal(folder: Path) -> str:
    """The error that loading gives, after checking that it is one line and comes at once."""
    start = time.process_time()
    with pytest.raises(KimiError) as caught:
        load_model(folder)
    assert time.process_time() - start < 1  # second of the processor
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def read(path: Path) -> tuple[Header, bytes]:
    """The header and the data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """A safetensors file; `length` replaces the true length of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change the tensors of a file, given and taken as float32, uint32 or float16."""
    tensors = {name: np.array(array) for name, array in mx.load(str(path)).items()}
    change(tensors)
    mx.save_safetensors(str(path), {name: mx.array(array) for name, array in tensors.items()})


# ----------------------------------------------------------------------------------- one tensor
EVERY_KIND = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.down_proj.weight",
    Q_PROJ,
    "model.layers.2.self_attn.k_conv1d.weight",
    "model.layers.1.self_attn.A_log",
    "model.layers.1.self_attn.dt_bias",
    "model.layers.1.self_attn.o_norm.weight",
    "model.layers.1.self_attn.f_b_proj.weight",
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.3.self_attn.kv_b_proj.weight",
    "model.layers.3.self_attn.kv_a_layernorm.weight",
    "model.layers.3.block_sparse_moe.gate.weight",
    "model.layers.3.block_sparse_moe.gate.e_score_correction_bias",
    "model.layers.3.block_sparse_moe.experts.5.w2.weight",
    "model.layers.3.block_sparse_moe.shared_experts.up_proj.weight",
]
of_every_kind = pytest.mark.parametrize("name", EVERY_KIND)


def named(name: str, message: str) -> bool:
    """Whether an error names a tensor: experts of one matrix may share an entry."""
    return name in message or name.replace("experts.5.", "experts.{5}.") in message


@of_every_kind
def test_a_missing_tensor_is_named_with_its_file(copy: Callable[..., Path], name: str) -> None:
    folder = copy()
    rewritten(folder / FILE, lambda tensors: tensors.pop(name))
    message = refusal(folder)
    assert named(name, message) and FILE in message and "missing" in message


@of_every_kind
def test_a_misshapen_tensor_is_named_with_both_shapes(copy: Callable[..., Path], name: str) -> None:
    folder = copy()
    shapes = []

    def widen(tensors: dict[str, np.ndarray]) -> None:
        shapes.append(tensors[name].shape)
        tensors[name] = np.zeros((*tensors[name].shape[:-1], tensors[name].shape[-1] + 1))
        shapes.append(tensors[name].shape)

    rewritten(folder / FILE, widen)
    message = refusal(folder)
    assert named(name, message) and FILE in message and "config.json" in message
    for shape in shapes:
        assert f"({', '.join(map(str, shape))})" in message


@of_every_kind
def test_a_tensor_of_whole_numbers_is_named(copy: Callable[..., Path], name: str) -> None:
    folder = copy()
    rewritten(folder / FILE, lambda t: t.update({name: t[name].astype(np.int32)}))
    message = refusal(folder)
    assert named(name, message) and FILE in message and "I32" in message


@pytest.mark.parametrize(
    "name",
    [
        "visual.proj.weight",
        "model.layers.4.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.block_sparse_moe.experts.8.w1.weight",
        "line\nbreak \x1b[31m.weight",
        "",
    ],
)
def test_an_extra_tensor_is_named(copy: Callable[..., Path], name: str) -> None:
    folder = copy()
    header, data = read(folder / FILE)
    header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    write(folder / FILE, header, data + bytes(4))
    message = refusal(folder)
    assert "no place in the model" in message and name.split("\n")[0] in message


def test_all_faults_are_named_at_once(copy: Callable[..., Path]) -> None:
    folder = copy()

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        for e in (0, 1, 2, 6):
            del tensors[f"model.layers.2.block_sparse_moe.experts.{e}.w3.weight"]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
        tensors["model.layers.0.self_attn.dt_bias"] = np.zeros(64, np.uint8)
        tensors["extra"] = np.zeros(1)

    rewritten(folder / FILE, spoil)
    message = refusal(folder)
    for part in (
        "model.norm.weight",
        "model.layers.2.block_sparse_moe.experts.{0..2,6}.w3.weight",
        "lm_head.weight has shape (255, 64), expected (256, 64)",
        "model.layers.0.self_attn.dt_bias has dtype U8",
        "extra",
    ):
        assert part in message


def test_a_missing_tensor_of_a_shard_is_named_with_that_shard(copy: Callable[..., Path]) -> None:
    folder = copy(shards=3)
    file = json.loads((folder / INDEX).read_text())["weight_map"][Q_PROJ]
    rewritten(folder / file, lambda tensors: tensors.pop(Q_PROJ))
    message = refusal(folder)
    assert Q_PROJ in message and file in message


# ---------------------------------------------------------------------------------- quantized
QUANTIZED = "model.layers.0.self_attn.o_proj"  # [64, 64]: 4 bits in groups of 32


@pytest.fixture
def quantized_copy(tmp_path: Path, quantized: Callable[..., Path]) -> Path:
    return shutil.copytree(quantized("tiny"), tmp_path / "model")


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_a_spoilt_part_of_a_quantized_matrix_is_named(
    quantized_copy: Path, part: str, fault: str
) -> None:
    name = f"{QUANTIZED}.{part}"

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        whole = tensors.pop(name)
        if fault == "shape":
            tensors[name] = whole[:, :1]
        elif fault == "dtype":
            tensors[name] = whole.astype(np.int32)

    rewritten(quantized_copy / FILE, spoil)
    assert f"{QUANTIZED}" in refusal(quantized_copy)


@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 64}, {"mode": "mxfp4"}], ids=str)
def test_quantization_that_the_file_contradicts_is_named(
    quantized_copy: Path, change: dict[str, Any]
) -> None:
    path = quantized_copy / "config.json"
    config = json.loads(path.read_text())
    config["quantization"].update(change)
    path.write_text(json.dumps(config))
    message = refusal(quantized_copy)  # every matrix is wrong: the first are named
    assert "model.embed_tokens" in message and len(message) < 2 * LONGEST
    assert "more like these" in message


def test_groups_that_do_not_divide_a_row_are_named(quantized_copy: Path) -> None:
    """Of rows of 64 weights a group of 128 leaves nothing: scales of no element would fit."""
    path = quantized_copy / "config.json"
    config = json.loads(path.read_text())
    config["quantization"]["group_size"] = 128
    path.write_text(json.dumps(config))
    assert "groups of 128 weights must divide its rows of 64" in refusal(quantized_copy)


def test_scales_without_quantization_in_the_config_are_named(quantized_copy: Path) -> None:
    path = quantized_copy / "config.json"
    config = json.loads(path.read_text())
    del config["quantization"], config["quantization_config"]
    path.write_text(json.dumps(config))
    message = refusal(quantized_copy)
    assert "model.embed_tokens.scales is there but config.json gives no quantization" in message


# --------------------------------------------------------------------------- damaged files
def one(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> Header:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "seven_bytes": lambda path: path.write_bytes(b"1234567"),
    "garbage": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n" * 3),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "truncated_header": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "header_only": lambda path: write(path, read(path)[0], b""),
    "trailing": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "length_zero": lambda path: write(path, *read(path), length=0),
    "length_beyond_file": lambda path: write(path, *read(path), length=10**7),
    "length_huge": lambda path: write(path, *read(path), length=2**64 - 1),
    "length_short": lambda path: write(path, *read(path), length=50),
    "not_json": lambda path: write(path, b"{'x': 1}", b""),
    "array": lambda path: write(path, b"[]", b""),
    "null": lambda path: write(path, b"null", b""),
    "deep": lambda path: write(path, b'{"x":' * 100_000, b""),
    "invalid_utf8": lambda path: write(path, b'{"\xff": 1}', b""),
    "no_tensors": lambda path: write(path, {}, b""),
    "offsets_beyond": lambda path: write(path, one(offsets=(0, 400), shape=(100,)), bytes(4)),
    "offsets_backwards": lambda path: write(path, one(offsets=(4, 0)), bytes(4)),
    "offsets_negative": lambda path: write(path, one(offsets=(-4, 0)), bytes(4)),
    "offsets_text": lambda path: write(path, one(offsets="04"), bytes(4)),
    "offsets_overlap": lambda path: write(path, {**one(), "y": one()["x"]}, bytes(4)),
    "offsets_hole": lambda path: write(path, {**one(), "y": one(offsets=(8, 12))["x"]}, bytes(12)),
    "shape_of_other_size": lambda path: write(path, one(shape=(2,)), bytes(4)),
    "shape_huge": lambda path: write(path, one(shape=(2**62, 4)), bytes(4)),
    "shape_negative": lambda path: write(path, one(shape=(-1,)), bytes(4)),
    "shape_text": lambda path: write(path, one(shape="1"), bytes(4)),
    "twice": lambda path: write(
        path, json.dumps(one())[:-1].encode() + b", " + json.dumps(one())[1:].encode(), bytes(4)
    ),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "dtype_unknown": lambda path: write(path, one(dtype="F31"), bytes(4)),
    "dtype_number": lambda path: write(path, one(dtype=32), bytes(4)),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "dangling_link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("fault", DAMAGED)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_damaged_file_is_named(copy: Callable[..., Path], fault: str, shards: int) -> None:
    folder = copy(shards=shards)
    path = next(folder.glob("*.safetensors"))
    DAMAGED[fault](path)
    message = refusal(folder)
    assert path.name in message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=lambda x: repr(x[:3])
)
def test_an_index_that_is_no_json_object_is_named(
    copy: Callable[..., Path], content: bytes
) -> None:
    folder = copy(shards=2)
    (folder / INDEX).write_bytes(content)
    assert INDEX in refusal(folder)


@pytest.mark.parametrize("shape", [(64, 63), (64, 65), (0,), (2**40, 2**40)], ids=str)
def test_a_shape_in_the_header_is_checked_against_the_config(
    copy: Callable[..., Path], shape: tuple[int, ...]
) -> None:
    folder = copy()
    header, data = read(folder / FILE)
    header[Q_PROJ]["shape"] = shape
    write(folder / FILE, header, data)
    assert FILE in refusal(folder)


# ----------------------------------------------------------------------------- the folder
def spoil_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    [
        "absent.safetensors",
        "../outside.safetensors",
        "sub/inside.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "config.json",
        "a\x00b.safetensors",
        "a\nb.safetensors",
        "n" * 5000 + ".safetensors",
        5,
        None,
        True,
        ["model-00001-of-00002.safetensors"],
        {"file": "model-00001-of-00002.safetensors"},
        -1e30,
    ],
    ids=lambda file: repr(file)[:30],
)
def test_an_index_may_only_name_files_of_its_folder(copy: Callable[..., Path], file: Any) -> None:
    folder = copy(shards=2)
    (folder.parent / "outside.safetensors").write_bytes((folder / "config.json").read_bytes())
    spoil_index(folder, lambda weight_map: weight_map.update({Q_PROJ: file}))
    assert INDEX in refusal(folder)


@pytest.mark.parametrize("value", [None, [], {}, "x", 3, [["a", "b"]]], ids=repr)
def test_an_index_must_hold_a_weight_map(copy: Callable[..., Path], value: Any) -> None:
    folder = copy(shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": value}))
    assert "weight_map" in refusal(folder)


def test_a_missing_shard_is_named(copy: Callable[..., Path]) -> None:
    folder = copy(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(folder)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_files_is_named_with_both(copy: Callable[..., Path], indexed: bool) -> None:
    folder = copy(shards=2)
    if not indexed:
        (folder / INDEX).unlink()
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = mx.load(str(first))
    assert isinstance(tensors, dict) and Q_PROJ in tensors
    rewritten(second, lambda t: t.update({Q_PROJ: np.array(tensors[Q_PROJ])}))
    message = refusal(folder)
    assert Q_PROJ in message and first.name in message and second.name in message


def test_a_tensor_in_another_file_than_the_index_says_is_named(copy: Callable[..., Path]) -> None:
    folder = copy(shards=2)
    second = "model-00002-of-00002.safetensors"
    spoil_index(folder, lambda weight_map: weight_map.update({Q_PROJ: second}))
    message = refusal(folder)
    assert Q_PROJ in message and second in message


def test_shards_without_an_index_are_read(copy: Callable[..., Path]) -> None:
    folder = copy(shards=3)
    ids = mx.array([[1, 2, 3]])
    expected = load_model(folder)(ids)
    (folder / INDEX).unlink()
    assert mx.array_equal(load_model(folder)(ids), expected)


def test_a_folder_without_weights_says_so(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / FILE).unlink()
    assert "no weights" in refusal(folder)


def test_an_index_without_any_file_names_them(copy: Callable[..., Path]) -> None:
    folder = copy(shards=2)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "model-00001-of-00002.safetensors" in refusal(folder)


@pytest.mark.parametrize("kind", ["absent", "file", "no_config", "config_of_another_model"])
def test_what_is_no_model_folder_is_named(copy: Callable[..., Path], kind: str) -> None:
    folder = copy()
    if kind == "absent":
        folder = folder / "absent"
    elif kind == "file":
        folder = folder / FILE
    elif kind == "no_config":
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["no/such/folder", "", "/no/such", "a b/c", "x" * 5000])
def test_load_says_what_a_model_can_be(name: str) -> None:
    with pytest.raises(KimiError) as caught:
        load(name)
    assert str(caught.value).isprintable()


def test_a_config_that_asks_for_more_than_the_files_hold_fails_at_once(
    copy: Callable[..., Path],
) -> None:
    folder = copy()
    config = {**TINY, "vocab_size": 1 << 24, "hidden_size": 1 << 20, "num_experts": 1 << 14}
    (folder / "config.json").write_text(json.dumps(config))
    before = live_memory()
    assert "model.embed_tokens.weight" in refusal(folder)
    assert mx.get_active_memory() - before < 1 << 20  # bytes; one of those matrices is 64 TB


def test_a_refused_folder_leaves_no_file_open(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "config.json").write_text(json.dumps({**TINY, "vocab_size": 257}))
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        refusal(folder)
    assert len(os.listdir("/dev/fd")) <= before + 2


# ---------------------------------------------------------------------------------------- dtypes
def test_16_bit_activations_stay_16_bit_whatever_single_tensors_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where folders keep their dtype. No experts: MLX's CPU has none in 16 bits."""
    dense = TINY | {"first_k_dense_replace": 4}
    path = write_checkpoint(tmp_path / "model", dense, SEED, dtype="bfloat16")
    weights = mx.load(str(path / "model.safetensors"))
    name = "model.layers.0.input_layernorm.weight"
    weights[name] = weights[name].astype(mx.float32)
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    wide = load_model(path)
    monkeypatch.setitem(load_model.__globals__, "compute_dtype", lambda arrays: mx.bfloat16)
    narrow = load_model(path)
    ids = mx.array(token_ids(dense, 300))[None]
    logits = narrow(ids)
    assert logits.dtype == mx.bfloat16
    assert narrow.layers[0].self_attn.A_log.dtype == mx.float32
    # Eight bits of fraction through four layers and their residuals; rms, since logits near 0
    # carry the error of large ones.
    assert_close("logits", logits, wide(ids), np.inf, 3e-2)


# ---------------------------------------------------------------------------------- no numbers
@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("model.norm.weight", "norm.weight"),
        ("model.layers.1.input_layernorm.weight", "layers.1.input_layernorm.weight"),
        ("model.layers.0.self_attn.A_log", "layers.0.self_attn.A_log"),
        ("model.layers.0.self_attn.q_conv1d.weight", "layers.0.self_attn.taps"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_small_weight_that_is_no_number_is_named(
    copy: Callable[..., Path], tensor: str, said: str, value: float
) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[tensor].reshape(-1)[0] = value

    folder = copy()
    rewritten(folder / FILE, change)
    assert refusal(folder) == f"{folder}: {said} has NaN or infinity: the weights are damaged"


@pytest.mark.parametrize(
    ("mode", "bad"), [("affine", np.nan), ("mxfp4", 0xFF), ("mxfp8", 0xFF), ("nvfp4", 0x7F)]
)
def test_a_scale_that_is_no_number_is_named(
    tmp_path: Path, folder: Callable[..., Path], mode: str, bad: float
) -> None:
    out = tmp_path / "out"
    convert(folder("tiny"), out, scheme(mode))
    load_model(out)
    name = next(iter(out.glob("*.safetensors")))
    tensors = mx.load(str(name))
    scales = np.array(tensors["model.layers.1.self_attn.o_proj.scales"])
    scales[3, 0] = bad
    tensors["model.layers.1.self_attn.o_proj.scales"] = mx.array(scales)
    mx.eval(tensors)
    mx.save_safetensors(str(name), tensors, {"format": "mlx"})
    assert "layers.1.self_attn.o_proj.scales has NaN or infinity" in refusal(out)


# ------------------------------------------------------------------------------------- threads
@pytest.mark.parametrize("name", ["published", "quantized", "pocket", "under a budget"])
def test_any_thread_may_use_what_a_model_holds(name: str, folder, quantized) -> None:
    """A server's engine is another thread than loads, and MLX evaluates an array only in the thread
    that described it."""
    folders = {"published": folder("tiny"), "quantized": quantized("tiny")}
    budget = Budget(8 << 30) if name == "under a budget" else None
    model = load_model(folders.get(name, pocket_folder()), budget=budget)
    held = dict(arrays_within(model, "model", set()))
    left: list[str] = []

    def look() -> None:
        for path, array in held.items():
            try:
                mx.eval(array)
            except RuntimeError:  # There is no Stream(cpu, 0) in current thread.
                left.append(path)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert len(held) > 50 and not left


def arrays_within(x: Any, path: str, seen: set[int]) -> Iterator[tuple[str, mx.array]]:
    """Whatever `x` leads to, in attributes, slots, mappings and sequences."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, mx.array):
        yield path, x
        return
    slots = {name for kind in type(x).__mro__ for name in getattr(kind, "__slots__", ())}
    members = {**getattr(x, "__dict__", {}), **{n: getattr(x, n) for n in slots if hasattr(x, n)}}
    if isinstance(x, dict):
        members |= x
    elif isinstance(x, (list, tuple)):
        members |= dict(enumerate(x))
    for name, member in members.items():
        yield from arrays_within(member, f"{path}.{name}", seen)
