"""`mlx_kimi check --report`: one refused kernel among others, and what the lines say."""

import re
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_kimi.cli.grammar import COMMANDS
from mlx_kimi.evaluation import kernel_report as module
from mlx_kimi.metal_kernels import kernel as kernels
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from tests.checkpoints import published_config

MESSAGE = "Thread group size (512) is greater than 448"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers whose kernels are those of the 48B, at sizes for a CPU."""
    sizes = {"kda_head_dim": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    sizes |= {"num_experts": 4 * module.LAUNCHES * 2, "hidden_size": 64, "kda_num_heads": 4}
    config = published_config(kda_layers=[2], full_attn_layers=[1], **sizes)
    quantization = {"group_size": 32, "bits": 4}
    monkeypatch.setattr(module, "SAMPLE", config | {"quantization": quantization})
    monkeypatch.setattr(module, "CONTEXT", 512)
    monkeypatch.setattr(module, "PROMPT", 200)
    monkeypatch.setattr(kernels, "_REFUSED", {})


def backend(kernel: Kernel) -> Launch:
    """Zeros; no shape of more than 256 threads runs."""

    def launch(
        *, template: Any, threadgroup: Any, output_shapes: Any, output_dtypes: Any, **_: Any
    ) -> list[mx.array]:
        if threadgroup[0] == 512 and kernel.name == "mla_attend":
            raise ValueError(MESSAGE)
        if kernel.name == "expert_tiles_down" and dict(template)["TokenTiles"] == 4:
            raise ValueError(MESSAGE)
        if kernel.name == "kda_finish":
            raise RuntimeError("program_source:1:2: error: no\nsuch word")
        return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

    return launch


def test_a_report_says_what_runs_what_is_refused_and_how_fast() -> None:
    with use_backend(backend, traced=True):
        lines = list(module.kernel_report())
    text = "\n".join(lines)
    assert "  kda_finish: REFUSED: program_source:1:2: error: no\nsuch word" in text
    compiled = text[: text.index("microseconds a launch, 1 token:")]
    names = set(re.findall(r"^  (\w+): \d+ pipelines", compiled, re.MULTILINE))
    assert len(names) == 19  # all others
    assert f"  expert_tiles_down: REFUSED: {MESSAGE}" in text
    assert re.search(r"^  mla_prefill: [\d.]+$", text, re.MULTILINE)
    assert re.search(r"expert_gate_up: [\d.]+ microseconds for [\d.]+ MB: \d+ GB/s", text)
    assert re.search(r"^  16 tokens: vectors, as here: [\d.]+; tiles 1: ", text, re.MULTILINE)
    refused = f"tiles 4, as here: REFUSED: {re.escape(MESSAGE)}; "
    assert re.search(rf"^  2048 tokens: .*{refused}MLX: [\d.]+$", text, re.MULTILINE)
    assert "  all NaN: experts [0, 0" in text
    assert "16 bits, (16, 64, 8), as here" in text and "8 bits, 24 splits, as here" in text


def test_a_model_with_a_refused_kernel_fails_its_check_and_says_where_to_look() -> None:
    with use_backend(backend, traced=True):
        result = CliRunner().invoke(COMMANDS["check"], ["--report"])
    assert result.exit_code == 1
    assert re.search(r"^mlx_kimi \S+, mlx \S+, Python", result.output, re.MULTILINE)
    assert "FAILED kernels    kda_finish does not run on this GPU: error: no" in result.output
    assert "compiled and run, each alone" in result.output


def test_without_kernels_there_is_little_to_report() -> None:
    with use_backend(None):
        assert list(module.kernel_report()) == ["no kernels run here"]
