"""Loading on a GPU: each kernel runs once, and one that cannot run is named and left out."""

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.evaluation.kernel_report import SAMPLE
from mlx_kimi.loading.load import load_model
from mlx_kimi.loading.warm_up import warm_up
from mlx_kimi.metal_kernels import kernel as kernels
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.metal_kernels.tuning import tuning
from mlx_kimi.model import mla
from mlx_kimi.model.cache import TAIL
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.moe import MixtureOfExperts
from tests.assertions import assert_close
from tests.reference_backend import reference_backend
from tools.metal_texts import STORED, launches, unfilled_model

SAME = 1e-4  # float32, added in another order


@pytest.fixture(autouse=True)
def nothing_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_REFUSED", {})


class Recorder:
    """A backend that answers zeros, or refuses; `names` are those of all launches."""

    def __init__(self, refused: dict[str, Exception]) -> None:
        self.names: set[str] = set()
        self.refused = refused

    def __call__(self, kernel: Kernel) -> Launch:
        def launch(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            if kernel.name in self.refused:
                raise self.refused[kernel.name]
            self.names.add(kernel.name)
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch


def converse(model: KimiLinear, bits: int | None) -> None:
    """A prompt of many tokens, turns of few, and more answers than a tail holds.

    Then a batch, and a prompt longer than is expanded at a time.
    """
    cache = model.make_cache(bits)
    for T in (tuning().expand_from + 5, 9, 7, 1, TAIL, 1, 1):
        mx.eval(model(mx.zeros((1, T), mx.int32), cache))
    shapes = [(8, 3)]
    if model.norm.weight.dtype != mx.float32:  # (else all outputs are float32)
        shapes.append((1, mla.EXPANDED // model.config.num_attention_heads + tuning().expand_from))
    for shape in shapes:
        mx.eval(model(mx.zeros(shape, mx.int32), model.make_cache(bits)))


@pytest.fixture(scope="module")
def pocket() -> KimiLinear:
    return load_model(pocket_folder())


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", ["48b", "pocket", "tiny", "odd"])
def test_no_kernel_is_compiled_in_the_middle_of_an_answer(
    name: str,
    bits: int | None,
    pocket: KimiLinear,
    model: Callable[[str], KimiLinear],
) -> None:
    if name == "48b":
        network = unfilled_model(SAMPLE, mx.bfloat16, STORED["4bit"])
    else:
        network = pocket if name == "pocket" else model(name)

    def warm() -> None:
        assert warm_up(network) == {}

    before = {launched.text for launched in launches(network, warm)}
    during = launches(network, lambda: converse(network, bits))
    assert {launched.text for launched in during} <= before
    names = {launched.kernel.name for launched in during}
    assert len(names) == {"48b": 21, "pocket": 20}.get(name, len(names))  # (no kda_prepare)


def test_the_choice_of_experts_runs_once_where_no_other_kernel_of_theirs_does(
    pocket: KimiLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routers of many tokens launch it, whatever the matrices are."""
    for layer in pocket.layers:
        if isinstance(layer.mlp, MixtureOfExperts):
            for kernels_of in (layer.mlp.kernels, layer.mlp.many_tokens):
                monkeypatch.setattr(kernels_of, "_unsupported_reason", "odd sizes")
    recorder = Recorder({})
    with use_backend(recorder, traced=True):
        assert warm_up(pocket) == {}
    assert "expert_select" in recorder.names
    assert not {name for name in recorder.names if re.match("expert_(gate|down|tiles|vec)", name)}


def test_a_kernel_that_cannot_run_is_named_and_its_operator_does_without(
    pocket: KimiLinear, caplog: pytest.LogCaptureFixture
) -> None:
    """As a compiler's error is, and MLX's when a kernel needs more registers than there are."""
    refusing = Recorder(
        {
            "mla_attend": ValueError("[CustomKernel] Thread group size (512) is greater than 448"),
            "expert_select": RuntimeError("program_source:7:3: error: expected ';'\n  x y"),
        }
    )
    with use_backend(refusing, traced=True):
        refused = warm_up(pocket)
        reasons = [
            "mla_attend does not run on this GPU: [CustomKernel] Thread group size (512) is "
            "greater than 448",
            "expert_select does not run on this GPU: error: expected ';'",
        ]
        assert sorted(caplog.messages) == sorted(
            f"{reason}; MLX operations take its place, slower" for reason in reasons
        )
        refusing.names.clear()
        converse(pocket, None)
        told = str(
            [
                (layer.self_attn.implementations(), layer.mlp.implementations())
                for layer in pocket.layers
                if isinstance(layer.mlp, MixtureOfExperts)
            ]
        )
    # Those that belong together are left out together; all others run.
    left_out = {"mla_query", "mla_output", "add_norm_scores", "expert_gate_up", "expert_down"}
    assert not refusing.names & {*left_out, *refused}
    assert {"kda_decode", "kda_sequential", "kda_chunk_scan", "mla_prefill"} <= refusing.names
    assert all(reason in told for reason in reasons)


def test_a_model_without_some_kernels_answers_the_same(
    pocket: KimiLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = dict.fromkeys(("kda_decode", "kda_prepare", "add_norm", "mla_query"), "no")
    monkeypatch.setattr(kernels, "_REFUSED", refused)
    launched: list[str] = []

    def backend(kernel: Kernel) -> Launch:
        launched.append(kernel.name)
        return reference_backend(kernel)

    ids, cache = mx.array([[3, 1, 4, 1, 5, 9]]), pocket.make_cache()
    with use_backend(None):
        plain = pocket(ids)
        pocket(ids[:, :4], cache)
    with use_backend(backend, traced=True):
        logits = [pocket(ids[:, t : t + 1], cache) for t in (4, 5)]
        mx.eval(logits)
    assert_close("logits", mx.concatenate(logits, axis=1), plain[:, 4:], SAME)
    assert set(launched) == {"add_norm_scores", "expert_select", "expert_gate_up", "expert_down"}


def test_loading_warms_up_where_a_gpu_runs_kernels(caplog: pytest.LogCaptureFixture) -> None:
    backend = Recorder({"kda_finish": RuntimeError("no")})
    with use_backend(backend, traced=True):
        load_model(pocket_folder())
    assert "kda_decode" in backend.names
    assert [line.partition(" does")[0] for line in caplog.messages] == ["kda_finish"]
    with use_backend(backend, traced=True):
        load_model(pocket_folder(), lazy=True)
    assert len(caplog.messages) == 1
