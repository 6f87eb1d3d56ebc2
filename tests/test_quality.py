"""Quality reports: against float64, the ordinary run of the model, and `evaluate`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.cli.main import cli
from mlx_kimi.convert.blocks import TensorReader
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.quantize import scheme
from mlx_kimi.convert.report import quality
from mlx_kimi.convert.report.layerwise import Layers
from mlx_kimi.convert.report.quality import Quality, measure, sample_ids, sample_text
from mlx_kimi.errors import KimiError
from mlx_kimi.evaluation.evaluate import evaluate
from mlx_kimi.evaluation.random_model import PUBLISHED_48B
from mlx_kimi.loading.load import load_model
from mlx_kimi.model.forward_batch import ForwardBatch
from tests.checkpoints import CONFIGS, WIDE, write_checkpoint
from tests.processes import peak_memory
from tests.tokenizer_files import trained_tokens, write_tiktoken

# Sums of float32 in another order: experts and blocks of rows come one after another here.
ROUNDING = 2e-5
LENGTHS = [9, 9, 5]  # the last window is shorter


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the small models in several slices: 2 experts of TINY, 100 ids."""
    monkeypatch.setattr("mlx_kimi.convert.report.layerwise.EXPERTS", 2 * 4 * 3 * 64 * 64)
    monkeypatch.setattr("mlx_kimi.convert.report.layerwise.ROWS", 100)
    monkeypatch.setattr("mlx_kimi.convert.report.divergence.BLOCK", 100)
    monkeypatch.setattr("mlx_kimi.convert.report.weight_error.SLICE", 1 << 12)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(token) for token in np.random.default_rng(3).integers(0, 200, sum(LENGTHS))]


def opened(folder: Path) -> Layers:
    return Layers(TensorReader(Checkpoint(folder), ModelConfig.read(folder)))


def quantized(source: Path, out: Path, bits: int = 4) -> Path:
    convert(source, out, scheme(bits=bits, group_size=32))
    return out


def relative(expected: mx.array, found: mx.array) -> float:
    a, b = (np.array(x).astype(np.float64) for x in (expected, found))
    return float(np.linalg.norm(b - a) / np.linalg.norm(a))


@pytest.mark.parametrize("name", ["tiny", "odd", "odd_tied", "grouped"])
@pytest.mark.parametrize("bits", [None, 3], ids=["plain", "3bit"])
def test_layer_by_layer_is_the_ordinary_run(
    folder: Callable[..., Path], tmp_path: Path, name: str, bits: int | None
) -> None:
    path = folder(name) if bits is None else quantized(folder(name), tmp_path / "out", bits)
    vocab = CONFIGS[name]["vocab_size"]
    batch = mx.array(np.random.default_rng(1).integers(0, vocab, (2, 40)))
    lengths = [40, 25]
    layers = opened(path)
    x = layers.embedded(batch)
    for number in range(len(layers.config.layers)):
        x = layers.run(number, x, ForwardBatch.padded(lengths))
    expected = load_model(path).hidden(batch, lengths=lengths)
    for row, length in enumerate(lengths):
        assert relative(expected[row, :length], layers.normed(x)[row, :length]) < ROUNDING


@pytest.mark.slow
def test_errors_of_layers_are_those_of_the_ordinary_layers(
    talker: Path, tmp_path: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "WINDOW", 9)
    out = quantized(talker, tmp_path / "out")
    found = measure(talker, out, ids)
    plain, packed = load_model(talker), load_model(out)
    outputs: list[tuple[list[mx.array], ...]] = [([], [], []) for _ in plain.layers]
    for start in range(0, len(ids), 9):
        window = mx.array([ids[start : start + 9]])
        x, y = plain.embed_tokens.rows(window), packed.embed_tokens.rows(window)
        for number in range(len(plain.layers)):

            def run(model, z, number=number):
                entry = model.make_cache()[number]
                return sum(model.layers[number](z, None, entry, ForwardBatch()))

            after, alone, y = run(plain, x), run(packed, x), run(packed, y)
            for kept, array in zip(outputs[number], (after, alone, y), strict=True):
                kept.append(array[0])
            x = after
    assert [layer.number for layer in found.layers] == [0, 1, 2, 3]
    for layer, kept in zip(found.layers, outputs, strict=True):
        after, alone, together = map(mx.concatenate, kept)
        assert layer.alone == pytest.approx(relative(after, alone), rel=1e-3)
        assert layer.together == pytest.approx(relative(after, together), rel=1e-3)
        assert 0 < layer.alone < 1


@pytest.mark.slow
def test_errors_of_weights_are_the_equation_in_float64(talker: Path, tmp_path: Path) -> None:
    out = quantized(talker, tmp_path / "out")
    found = measure(talker, out, [1, 2, 3])
    source, written = (
        load_file(talker / "model.safetensors"),
        mx.load(str(out / "model.safetensors")),
    )

    def error(*families: tuple[str, list[str]]) -> float:
        difference, whole = 0.0, 0.0
        for module, names in families:
            parts = {p: written[f"{module}.{p}"] for p in ("weight", "scales", "biases")}
            q = mx.dequantize(parts["weight"], parts["scales"], parts["biases"], 32, 4)
            w = np.stack([source[name].astype(np.float64) for name in names]).reshape(q.shape)
            difference += np.square(np.array(q).astype(np.float64) - w).sum()
            whole += np.square(w).sum()
        return float(np.sqrt(difference / whole))

    layer = "model.layers.1"
    qkv = [(f"{layer}.self_attn.{x}_proj", [f"{layer}.self_attn.{x}_proj.weight"]) for x in "qkv"]
    experts = [f"{layer}.block_sparse_moe.experts.{e}.w2.weight" for e in range(8)]
    # The sums of squares are float32 within a piece.
    exact = {"rel": 1e-5}
    weights = found.layers[1].weights
    assert weights["q, k, v"] == pytest.approx(error(*qkv), **exact)
    down = error((f"{layer}.mlp.switch_mlp.down_proj", experts))
    assert weights["experts down"] == pytest.approx(down, **exact)
    head = error(("lm_head", ["lm_head.weight"]))
    assert found.outside["lm_head"] == pytest.approx(head, **exact)
    assert weights["router"] == weights["rest"] == found.outside["rest"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1023, 700])
def test_predictions_are_those_of_evaluate(talker: Path, tmp_path: Path, tokens: int) -> None:
    out = quantized(talker, tmp_path / "out")
    found = measure(talker, out, sample_ids(talker, sample_text())[:tokens]).predictions
    expected = evaluate(out, sample_text(), talker, tokens=tokens, window=quality.WINDOW)
    assert found.model.tokens == expected.model.tokens == tokens - 2
    assert found.model.loss == pytest.approx(expected.model.loss, rel=1e-6)
    assert found.reference is not None and expected.reference is not None
    assert found.reference.loss == pytest.approx(expected.reference.loss, rel=1e-6)
    a, b = found.distance, expected.distance
    assert a is not None and b is not None and a.agreement == b.agreement
    assert a.mean_kl == pytest.approx(b.mean_kl, abs=1e-5)
    for name in ("median_kl", "high_kl"):
        # Of one token: logits are up to 4, so that ROUNDING moves each model's by 8e-5 at most.
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1.6e-4)


@pytest.mark.slow
def test_a_conversion_that_changes_nothing_costs_nothing(talker: Path, tmp_path: Path) -> None:
    convert(talker, tmp_path / "out", None)
    found = measure(talker, tmp_path / "out", list(range(40)))
    d = found.predictions.distance
    assert d is not None and d.agreement == 1 and abs(d.mean_kl) < 1e-12
    for layer in found.layers:
        assert {*layer.weights.values(), layer.alone, layer.together} == {0}


@pytest.mark.slow
def test_fewer_bits_cost_more(talker: Path, tmp_path: Path) -> None:
    ids = sample_ids(talker, sample_text())[:100]
    found = [measure(talker, quantized(talker, tmp_path / f"{b}", b), ids) for b in (8, 4, 2)]

    def rises(of: Callable[[Quality], float]) -> bool:
        good, fair, bad = map(of, found)
        return 0 < good < fair < bad

    assert rises(lambda q: q.layers[2].weights["experts gate"])
    assert rises(lambda q: q.layers[2].alone)
    assert rises(lambda q: q.layers[-1].together)
    assert rises(lambda q: q.predictions.distance.mean_kl)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transformers", "mlx"])
def test_the_layout_of_the_source_does_not_matter(
    folder: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    published, ids = folder("odd_tied"), list(range(50))
    other = tmp_path / "other"
    if layout == "mlx":
        convert(published, other, None)
    else:
        other = folder("odd_tied", layout="transformers")
    out = quantized(published, tmp_path / "out")
    assert measure(other, out, ids) == measure(published, out, ids)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_other_modes(talker: Path, tmp_path: Path, mode: str) -> None:
    convert(talker, tmp_path / "out", scheme(mode=mode))
    ids = sample_ids(talker, sample_text())[:40]
    found = measure(talker, tmp_path / "out", ids).predictions.distance
    expected = evaluate(tmp_path / "out", sample_text(), talker, tokens=40).distance
    assert found is not None and expected is not None
    assert found.mean_kl == pytest.approx(expected.mean_kl, abs=1e-5)


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(talker: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model as load_peer  # here: it takes seconds

    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("Sorted: 1, 2, 3. " * 9)
    options = ["--report", "--report-text", str(text), "--group-size", "32"]
    result = CliRunner().invoke(cli, ["convert", "-m", str(talker), str(out), *options])
    assert result.exit_code == 0, result.output
    assert "  3  MLA, moe" in result.stdout and "KL divergence" in result.stdout
    assert "quality.json" in result.stderr and "of memory" in result.stderr
    assert "layer" not in result.stderr and "bits per weight" not in result.stdout
    whole = json.loads((out / "quality.json").read_text())
    assert len(whole["layers"]) == 4 and whole["predictions"]["model"]["perplexity"] > 1
    shown = f"{whole['predictions']['distance']['mean_kl']:.5f} nats a token"
    assert shown in result.stdout
    ids = mx.array([[1, 2, 3]])
    assert relative(load_model(out)(ids), load_peer(out)[0](ids)) < 1e-4


@pytest.mark.slow
def test_a_folder_in_the_mlx_layout_is_reported_too(talker: Path, tmp_path: Path) -> None:
    convert(talker, tmp_path / "plain", None)
    asked = ["convert", "-m", str(tmp_path / "plain"), str(tmp_path / "out"), "--report"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 0, result.output
    assert "same likeliest" in result.stdout and (tmp_path / "out" / "quality.json").exists()


def test_bad_input_is_one_line_before_the_conversion(
    talker: Path, folder: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "text"
    for source, content, options, line in (
        (talker, b"ab\xff", ["--report"], "text: must be UTF-8, but byte 2 is not"),
        (talker, b"", ["--report"], "the text must have at least 2 tokens but has 0"),
        (talker, b"text", [], "--report-text needs --report"),
        (folder("tiny"), b"text", ["--report"], "tiktoken.model"),
    ):
        text.write_bytes(content)
        asked = ["convert", "-m", str(source), str(tmp_path / "out"), "--report-text", str(text)]
        result = CliRunner().invoke(cli, [*asked, *options])
        assert result.exit_code != 0 and line in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
        assert not list(tmp_path.glob("out*"))


def test_interrupted_it_leaves_the_conversion_whole(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_kimi.convert.report.quality.Layers.run", interrupt)
    result = CliRunner().invoke(
        cli, ["convert", "-m", str(talker), str(tmp_path / "out"), "--report"]
    )
    assert result.exit_code == 130 and not result.stdout
    assert "out is whole; the report was not finished" in result.stderr
    load_model(tmp_path / "out")


def test_damage_is_named(talker: Path, tmp_path: Path) -> None:
    out = quantized(talker, tmp_path / "out")
    (out / "config.json").unlink()
    with pytest.raises(KimiError, match="config.json"):
        measure(talker, out, [1, 2, 3])


# A layer of 32 experts of the 48B's width: 0.5 GB in bfloat16. In float32 they alone would take
# 0.91 GB, so that neither the model nor that layer may ever be whole.
MANY_EXPERTS = WIDE | {
    "vocab_size": len(trained_tokens()) + 256,
    "num_experts": 32,
    "num_experts_per_token": 1,
    "first_k_dense_replace": 2,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
def test_memory_stays_under_what_is_stated(tmp_path: Path) -> None:
    """Of the whole process, seen from outside."""
    source = write_checkpoint(tmp_path / "source", MANY_EXPERTS, dtype="bfloat16")
    write_tiktoken(source)
    (tmp_path / "text").write_text(sample_text()[:80])
    code = "from mlx_kimi.cli.main import cli; cli()"
    asked = ["convert", "-m", str(source), str(tmp_path / "out"), "--report"]
    command = [sys.executable, "-c", code, *asked, "--report-text", str(tmp_path / "text")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    peak = peak_memory(process)
    _, said = process.communicate()
    weights = (source / "model.safetensors").stat().st_size
    limit = quality.peak_memory(ModelConfig.read(source))
    print(
        f"{weights / 1e6:.0f} MB of weights; took {peak / 1e6:.0f} of {limit / 1e6:.0f} MB; {said}"
    )
    assert process.returncode == 0 and f"at most {limit / 1e9:.2f} GB of memory" in said
    assert 50e6 < peak < limit
    assert quality.peak_memory(ModelConfig.from_json(PUBLISHED_48B)) < 2.05e9  # as README says
