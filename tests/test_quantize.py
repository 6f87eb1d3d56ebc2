"""Which tensor gets how many bits."""

import math

import pytest

from mlx_kimi.checkpoint.config import ModelConfig, Quantization
from mlx_kimi.checkpoint.tensors import Tensor, tensors
from mlx_kimi.convert.plan import TensorPlan
from mlx_kimi.convert.quantize import RECIPES, Scheme, scheme
from mlx_kimi.evaluation.random_model import PUBLISHED_48B
from tests.checkpoints import TINY

REAL = ModelConfig.from_json(PUBLISHED_48B)


def named(config: ModelConfig, ending: str) -> list[Tensor]:
    found = [tensor for tensor in tensors(config) if tensor.module.endswith(ending)]
    assert found, ending
    return found


def bits(chosen: Scheme, ending: str, config: ModelConfig = REAL) -> list[int | None]:
    """The bits of every module whose path ends so, in the order of the layers."""
    asked = [chosen.asked_for(tensor, config) for tensor in named(config, ending)]
    return [None if q is None else q.bits for q in asked]


def gigabytes(chosen: Scheme | None) -> float:
    """The size of the 48B's converted weights."""
    plans = (
        TensorPlan(
            tensor,
            "BF16",
            chosen.asked_for(tensor, REAL) if chosen else None,
            kept_unquantized=False,
        )
        for tensor in tensors(REAL)
    )
    return sum(output.nbytes for plan in plans for output in plan.outputs) / 1e9


def test_the_table_has_as_many_weights_as_the_48b() -> None:
    assert sum(math.prod(tensor.shape) for tensor in tensors(REAL)) == 49_122_681_728


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("affine", Quantization(64, 4, "affine")),
        ("mxfp4", Quantization(32, 4, "mxfp4")),
        ("nvfp4", Quantization(16, 4, "nvfp4")),
        ("mxfp8", Quantization(32, 8, "mxfp8")),
    ],
)
def test_defaults_of_a_mode(mode: str, expected: Quantization) -> None:
    assert scheme(mode).default == expected
    assert scheme(mode, expected.bits, expected.group_size).default == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "bits must be 2, 3, 4, 5, 6, 8 for mode affine but is 7"),
        ({"group_size": 16}, "group-size must be 32, 64, 128 for mode affine but is 16"),
        ({"mode": "mxfp4", "bits": 8}, "bits must be 4 for mode mxfp4 but is 8"),
        ({"mode": "nvfp4", "group_size": 64}, "group-size must be 16 for mode nvfp4 but is 64"),
        ({"mode": "int4"}, "mode must be one of affine, mxfp4, nvfp4, mxfp8 but is int4"),
        ({"recipe": "none"}, "recipe must be one of default, .* but is none"),
    ],
)
def test_contradicting_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheme(**options)


def test_only_matrices_are_quantized() -> None:
    for tensor in tensors(REAL):
        chosen = scheme(recipe="router-8bit").asked_for(tensor, REAL)
        assert (chosen is not None) == tensor.matrix
    for ending in (".A_log", ".dt_bias", "_score_correction_bias", "norm", "_conv.conv"):
        assert set(bits(scheme(), ending)) == {None}


def test_the_router_is_not_quantized_unless_asked() -> None:
    for name in RECIPES:
        widths = {8} if name == "router-8bit" else {None}
        assert set(bits(scheme(recipe=name), ".mlp.gate")) == widths


def test_the_router_may_be_8_bit_in_groups_of_64_as_in_mlx_lm() -> None:
    for options in ({}, {"bits": 2, "group_size": 128}, {"mode": "mxfp4"}):
        for router in named(REAL, ".mlp.gate"):
            chosen = scheme(**options, recipe="router-8bit")
            assert chosen.asked_for(router, REAL) == Quantization(64, 8)


def test_embeddings_get_6_bits_in_the_commands_groups() -> None:
    chosen = scheme(bits=3, group_size=32, recipe="embeddings-6bit")
    for ending in ("model.embed_tokens", "lm_head"):
        assert chosen.asked_for(named(REAL, ending)[0], REAL) == Quantization(32, 6)
    assert set(bits(chosen, "q_proj")) == {3}


@pytest.mark.parametrize(
    ("recipe", "low", "down"), [("experts-3bit", 3, 4), ("experts-2bit", 2, 3)]
)
def test_recipes_for_experts(recipe: str, low: int, down: int) -> None:
    chosen = scheme(recipe=recipe)
    # Layer 0 is dense; an eighth of 27 layers is 3.
    edges, inner = [4, 4], 21
    for x in ("gate", "up"):
        assert bits(chosen, f".switch_mlp.{x}_proj") == edges + [low] * inner + [4, 4, 4]
    assert bits(chosen, ".switch_mlp.down_proj") == edges + [down] * inner + [4, 4, 4]
    for ending in ("shared_experts.down_proj", "o_proj", "embed_q", "lm_head"):
        assert set(bits(chosen, ending)) == {6}
    assert set(bits(scheme(bits=4, recipe=recipe), "o_proj")) == {4}


def test_a_model_of_few_layers_has_edges() -> None:
    tiny = ModelConfig.from_json(TINY)  # layer 0 is dense
    assert bits(scheme(recipe="experts-2bit"), ".switch_mlp.up_proj", tiny) == [2, 2, 4]


def test_an_override_in_another_mode_is_affine() -> None:
    chosen = scheme("mxfp4", recipe="embeddings-6bit")
    assert chosen.asked_for(named(REAL, "lm_head")[0], REAL) == Quantization(64, 6, "affine")
    assert chosen.asked_for(named(REAL, "o_proj")[0], REAL) == Quantization(32, 4, "mxfp4")


def test_recipes_state_their_size() -> None:
    for name, recipe in RECIPES.items():
        assert f" {gigabytes(scheme(recipe=name)):.1f} GB" in recipe.reason, name


def test_sizes_of_the_48b() -> None:
    # The router keeps 16 bits: 0.02 GB more than 4 bits all over.
    assert gigabytes(scheme(bits=4)) == pytest.approx(27.655, abs=0.005)
    assert gigabytes(scheme(bits=6)) == pytest.approx(39.93, abs=0.005)
    assert gigabytes(None) == pytest.approx(98.25, abs=0.005)
