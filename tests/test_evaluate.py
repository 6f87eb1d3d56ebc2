"""Perplexity and KL: against float64, and in the right order of quantizations."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.cli.grammar import COMMANDS
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.quantize import scheme
from mlx_kimi.errors import KimiError
from mlx_kimi.evaluation.evaluate import evaluate
from mlx_kimi.loading.load import load

TEXT = "KDA is Kimi Delta Attention. 12 + 30 = 42. Sorted: 1, 2, 3. " * 8


def log_softmax(logits: mx.array) -> np.ndarray:
    x = np.array(logits.astype(mx.float32)).astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.slow
def test_is_the_equation_in_float64() -> None:
    found = evaluate(pocket_folder(), TEXT, tokens=150, window=70).model
    model, tokenizer = load(pocket_folder())
    ids, losses = tokenizer.encode(TEXT)[:150], []
    for start in (0, 70, 140):
        part = ids[start : start + 70]
        log_p = log_softmax(model(mx.array([part]))[0])
        losses += [-log_p[i, part[i + 1]] for i in range(len(part) - 1)]
    assert found.tokens == len(losses) == 69 + 69 + 9
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.slow
def test_a_model_is_no_distance_from_itself() -> None:
    found = evaluate(pocket_folder(), TEXT, pocket_folder(), tokens=60)
    assert found.model == found.reference and found.distance is not None
    assert found.distance.agreement == 1 and abs(found.distance.mean_kl) < 1e-6


@pytest.mark.slow
def test_fewer_bits_are_further_away(talker: Path, tmp_path: Path) -> None:
    distances = []
    for bits in (8, 4, 2):
        out = tmp_path / f"{bits}"
        convert(talker, out, scheme(bits=bits, group_size=32))
        found = evaluate(out, TEXT, talker, tokens=80).distance
        assert found is not None
        distances.append(found)
    kl = [d.mean_kl for d in distances]
    assert 0 < kl[0] < kl[1] < kl[2]
    assert distances[0].median_kl <= distances[0].high_kl
    assert distances[0].agreement >= distances[2].agreement


def test_bad_input_is_one_line(talker: Path, tmp_path: Path) -> None:
    for how, match in (
        ({"text": "x"}, "the text must have at least 2 tokens but has 1"),
        ({"text": TEXT, "tokens": 1}, "tokens must be at least 2 but is 1"),
        ({"text": TEXT, "window": 0}, "window must be at least 2 but is 0"),
        ({"text": TEXT, "against": talker}, "have other tokenizers"),
    ):
        with pytest.raises(KimiError, match=match):
            evaluate(pocket_folder(), **how)


def test_a_full_disk_is_found_before(monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda place: full)
    with pytest.raises(KimiError, match="--tokens takes fewer"):
        evaluate(pocket_folder(), TEXT, pocket_folder())


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT)
    options = ["-f", str(file), "--tokens", "50", "--against", str(pocket_folder())]
    text = CliRunner().invoke(COMMANDS["evaluate"], options).output
    assert "perplexity" in text and "same likeliest  100.00%" in text
    found = json.loads(CliRunner().invoke(COMMANDS["evaluate"], [*options, "--json"]).output)
    assert found["model"]["tokens"] == 49 and found["distance"]["agreement"] == 1
    file.write_bytes(b"ab\xff")
    result = CliRunner().invoke(COMMANDS["evaluate"], options)
    assert str(result.exception).endswith("must be UTF-8, but byte 2 is not")
