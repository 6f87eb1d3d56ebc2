"""`check` finds a wrong operation of MLX: faults are planted, and each is one named line."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.checkpoint.config import QUANTIZATION_MODES, Quantization
from mlx_kimi.cli import check
from mlx_kimi.cli.main import cli
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.quantize import scheme
from mlx_kimi.evaluation.mlx_ops import products
from mlx_kimi.evaluation.mlx_ops.case import Measurement, primitives, spread
from mlx_kimi.evaluation.mlx_ops.check import cases, check_mlx
from mlx_kimi.evaluation.mlx_ops.float64 import host, weights
from mlx_kimi.generation.sample import Sampler, Sampling
from mlx_kimi.loading import load
from mlx_kimi.loading.budget import Budget
from mlx_kimi.loading.load import load_model
from mlx_kimi.metal_kernels.attention import SubmitLimit
from mlx_kimi.model.cache import arrays
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.layers import RMSNorm
from mlx_kimi.model.linear import Linear


def is_of_16_bits_on_cpu(m: Measurement) -> bool:
    """What MLX's CPU backend lacks or gets wrong in 16 bits; models are float32 there.

    gather_mm is for float32 alone, and quantized products are summed in 16 bits, which errs by
    more than we allow (benchmarks/quantized_matmul_16_bits.py).
    """
    lacking = m.raised == "[GatherMM::eval] Currently only supports float32."
    rough = m.what.startswith(("quantized_matmul", "gather_qmm")) and m.error < 0.2
    return "float16" in m.what and (lacking or rough)


def wrong(model: KimiLinear) -> list[Measurement]:
    return [measured for measured in check_mlx(model) if measured.is_wrong]


@pytest.fixture(scope="module")
def pocket() -> KimiLinear:
    return load_model(pocket_folder())


@pytest.fixture(scope="module")
def small(
    folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """`small("tiny", 4)`: a checkpoint in so many bits; 0: not quantized."""

    @cache
    def written(name: str, bits: int) -> Path:
        if not bits:
            return folder(name)
        out = tmp_path_factory.mktemp("small") / "model"
        convert(folder(name), out, scheme(bits=bits, group_size=32))
        return out

    return written


# ----------------------------------------------------------------------------------- healthy
def test_the_pocket_model_passes(pocket: KimiLinear) -> None:
    assert not wrong(pocket)


@pytest.mark.parametrize(
    ("name", "bits", "dtype"),
    [
        *(("odd", 0, dtype) for dtype in (mx.float32, mx.bfloat16)),
        *(("grouped", 4, dtype) for dtype in (mx.float32, mx.bfloat16)),
        *(("tiny", 8, dtype) for dtype in (mx.float32, mx.float16)),
    ],
)
def test_small_models_pass(
    small: Callable[[str, int], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    bits: int,
    dtype: mx.Dtype,
) -> None:
    monkeypatch.setattr(load, "compute_dtype", lambda arrays: dtype)
    found = wrong(load_model(small(name, bits)))
    assert [str(m) for m in found if dtype == mx.float32 or not is_of_16_bits_on_cpu(m)] == []


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_other_modes_pass(folder: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    convert(folder("tiny"), tmp_path / "out", scheme(mode))
    assert not wrong(load_model(tmp_path / "out"))


def test_experts_in_files_are_checked_in_their_slots(
    small: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "slots_for", lambda *_: 3)
    model = load_model(small("tiny", 4), budget=Budget(10**9))
    found = list(check_mlx(model))
    stack = "switch_mlp.down_proj 3 x 64 x 64 in 4 bits"
    assert any(m.what.startswith("gather_qmm") and stack in m.what for m in found)
    assert any("switch_mlp.down_proj[0]" in m.what for m in found)
    assert not [m for m in found if m.is_wrong]


@pytest.mark.parametrize(
    ("mode", "bits"),
    [(mode, bits) for mode, (_, all_bits) in QUANTIZATION_MODES.items() for bits in all_bits],
)
def test_float64_unpacks_what_mlx_packed(mode: str, bits: int) -> None:
    group_size = QUANTIZATION_MODES[mode][0][0]
    w = mx.random.normal((7, 128), key=mx.random.key(0))
    packed = [*mx.quantize(w, group_size, bits, mode), None][:3]
    ours = weights(Linear(*packed, Quantization(group_size, bits, mode)), np.arange(7))
    theirs = mx.dequantize(*packed, group_size, bits, mode)
    # code * scale + bias, rounded once or twice
    np.testing.assert_allclose(ours, host(theirs), rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------ nothing forgotten
def steps(model: KimiLinear, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[mx.array]]:
    """Unevaluated results of all that a model does: few and many tokens, padding, one, sampling."""
    monkeypatch.setattr(SubmitLimit, "submit", lambda *_: None)  # which would evaluate
    for bits in (None, 8):
        cache = model.make_cache(bits)
        for tokens, lengths in ((5, None), (300, None), (1, None), (7, [4])):
            logits = model(mx.array([list(range(tokens))]), cache, lengths)
            yield [logits, *arrays(cache)]
            mx.eval(logits, *arrays(cache))
    logits = logits[:, -1]
    for sampling in (
        Sampling(),
        Sampling(1.0, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=0),
    ):
        yield [Sampler(sampling, [1, 2], logits.shape[-1])(logits)]


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Graphs whose every primitive shows."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("uncompiled")
def test_every_primitive_of_the_model_is_checked(
    small: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(small("grouped", 4))
    used = {p for results in steps(model, monkeypatch) for p in primitives(*results)}
    checked = {p for case in cases(model) for p in primitives(case.run())}
    assert {"GatherQMM", "QuantizedMatmul", "GatherMM", "ArgSort", "CumSum"} <= used
    assert used - checked == set()


def test_every_matrix_of_the_model_is_checked(
    tiny: KimiLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product with a quantized matrix or a stack, by operation, shape and whether sorted."""
    seen: set[tuple[Any, ...]] = set()
    for name in ("quantized_matmul", "gather_qmm", "gather_mm"):
        original = getattr(mx, name)

        def recorded(*args: Any, _name: str = name, _original: Any = original, **how: Any) -> Any:
            form = (how.get(key) for key in ("bits", "transpose", "sorted_indices"))
            seen.add((_name, args[1].shape, *form))
            return _original(*args, **how)

        monkeypatch.setattr(mx, name, recorded)
    for results in steps(tiny, monkeypatch):
        mx.eval(results)
    used = set(seen)
    seen.clear()
    for case in cases(tiny):
        case.run()
    assert len(used) >= 10
    assert used - seen == set()


# ---------------------------------------------------------------------------------- planted faults
Function = Callable[..., mx.array]
concatenate = mx.concatenate  # as it is before faults are planted


def another_expert(real: Function) -> Function:
    def fault(x: mx.array, w: mx.array, *rest: Any, rhs_indices: mx.array, **how: Any) -> mx.array:
        return real(x, w, *rest, rhs_indices=(rhs_indices + 1) % w.shape[0], **how)

    return fault


def misread_if_sorted(real: Function) -> Function:
    """As MLX 0.32.4 on CUDA."""

    def fault(x: mx.array, *rest: Any, sorted_indices: bool = False, **how: Any) -> mx.array:
        return real(x[:1] + 0 * x if sorted_indices else x, *rest, sorted_indices=False, **how)

    return fault


def last_row_lost(real: Function) -> Function:
    def fault(*args: Any, **how: Any) -> mx.array:
        y = real(*args, **how)
        few = 1 < y.shape[-2] < 16
        return concatenate([y[..., :-1, :], y[..., :1, :]], axis=-2) if few else y

    return fault


def one_output_lost(real: Function) -> Function:
    def fault(*args: Any, **how: Any) -> mx.array:
        y = real(*args, **how)
        return y * (mx.arange(y.shape[-1]) != y.shape[-1] - 1)

    return fault


def scaled(real: Function) -> Function:
    return lambda *args, **how: real(*args, **how) * 1.01


def without_eps(real: Function) -> Function:
    return lambda x, weight, eps: real(x, weight, 1e-30)


def swapped(real: Function) -> Function:
    """The first two change places."""

    def fault(*args: Any, **how: Any) -> mx.array:
        y = real(*args, **how)
        return concatenate([y[..., 1:2], y[..., :1], y[..., 2:]], axis=-1)

    return fault


def refused(real: Function) -> Function:
    def fault(*args: Any, **how: Any) -> mx.array:
        raise ValueError("[here] not implemented")

    return fault


def rough(real: Function) -> Function:
    return lambda *args: real(*args) + 1e-3


FAULTS: list[tuple[Any, str, Callable[[Function], Function], str]] = [
    (mx, "gather_qmm", another_expert, "gather_qmm, "),
    (mx, "gather_qmm", misread_if_sorted, "sorted rows"),
    (mx, "gather_mm", misread_if_sorted, "gather_mm, "),
    (mx, "quantized_matmul", last_row_lost, "quantized_matmul, "),
    (mx, "quantized_matmul", one_output_lost, "quantized_matmul, "),
    (mx, "quantized_matmul", refused, "[here] not implemented"),
    (mx, "dequantize", scaled, "matmul, "),
    (mx, "matmul", scaled, "matmul, "),
    (mx.fast, "rms_norm", without_eps, "rms_norm, "),
    (mx, "argsort", swapped, "argsort, "),
    (mx, "take_along_axis", swapped, "take_along_axis, "),
    (mx, "exp", rough, "exp, "),
    (mx, "logaddexp", rough, "logaddexp, "),
    (mx, "cumsum", scaled, "cumsum, "),
    (mx, "softmax", scaled, "softmax, "),
    (mx, "contiguous", swapped, "contiguous, "),
    (mx, "concatenate", swapped, "concatenate, "),
]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("module", "name", "fault", "said"), FAULTS, ids=lambda x: getattr(x, "__name__", x)
)
def test_a_wrong_operation_is_named(
    tiny: KimiLinear, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, fault: Any, said: str
) -> None:
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    found = (str(m) for m in check_mlx(tiny) if m.is_wrong)
    assert any(said in line for line in found)
    if name in ("gather_qmm", "gather_mm", "quantized_matmul"):  # nothing else is blamed
        assert all(line.startswith(name) or "[here]" in line for line in found)


@pytest.fixture(scope="module")
def tiny(small: Callable[[str, int], Path]) -> KimiLinear:
    return load_model(small("tiny", 4))


@pytest.mark.parametrize("operand", ["x", "scales"])
def test_reading_beyond_an_operand_is_found(
    tiny: KimiLinear, monkeypatch: pytest.MonkeyPatch, operand: str
) -> None:
    """A product that adds zero times the element behind its operand."""
    real, surround, inner = mx.quantized_matmul, products.between_nan, dict[int, mx.array]()

    def noted(x: mx.array, count: int) -> mx.array:
        part = surround(x, count)
        inner[id(part)] = part
        if part.dtype != mx.uint32:  # x arrives as [1, T, in]
            whole = part[None]
            inner[id(whole)] = whole
        return part

    def fault(x: mx.array, w: mx.array, scales: mx.array, *rest: Any, **how: Any) -> mx.array:
        y = real(x, w, scales, *rest, **how)
        read = x if operand == "x" else scales
        if id(scales) not in inner:  # (what lies behind other arrays is not ours to read)
            return y
        behind = mx.as_strided(read, (1,), (1,), read.size)
        return y + 0 * behind

    monkeypatch.setattr(products, "between_nan", noted)
    monkeypatch.setattr(mx, "quantized_matmul", fault)
    found = wrong(tiny)
    assert found and all(m.what.startswith("quantized_matmul, ") for m in found)
    assert all("between NaN" in m.what and np.isnan(m.error) for m in found)


def test_check_says_what_is_wrong_and_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "gather_qmm", another_expert(mx.gather_qmm))
    monkeypatch.setattr(check, "_answers", lambda *_: [])
    done = CliRunner().invoke(cli, ["check"])
    lines = [line for line in done.output.splitlines() if line.startswith("FAILED")]
    assert done.exit_code == 1 and len(lines) > 1
    pattern = (
        r"FAILED mlx        gather_qmm, \d+ (sorted )?rows, .* \d+ x \d+ in 4 bits.*, float32: "
    )
    pattern += r"off by \d\.\de[+-]\d\d, tolerance 0.0001"
    assert all(re.fullmatch(pattern, line) for line in lines), lines
    assert re.search(r"ok     mlx        \d+ operations of MLX within", done.output)


def test_damaged_weights_are_no_fault_of_mlx(small: Callable[[str, int], Path]) -> None:
    model = load_model(small("tiny", 0))
    for path, module in model.named_modules():
        if isinstance(module, Linear | RMSNorm) and path.startswith("layers"):
            module.weight = mx.where(mx.arange(module.weight.shape[-1]) == 5, mx.nan, module.weight)
    assert not wrong(model)


@pytest.mark.parametrize("count", [1, 2, 64, 65, 66, 1000])
def test_samples_have_the_first_the_last_and_odd_places(count: int) -> None:
    places = spread(count, 64)
    assert len(places) == min(count, 64) == len(set(places.tolist()))
    assert places[0] == 0 and places[-1] == count - 1
    assert count == 1 or (places % 2).any()
