"""The table of tensors against the published model's facts."""

import math
from typing import Any

import pytest

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.tensors import Join, tensors
from mlx_kimi.evaluation.random_model import PUBLISHED_48B
from tests.checkpoints import CONFIGS, tensor_shapes

KIMI_48B = {
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "auto_map": {"AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM"},
    **PUBLISHED_48B,
}


def published(config: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Every name in the checkpoint's own spelling, with the shapes that it may have."""
    model = ModelConfig.from_json(config)
    return {
        name: tensor.published_shapes(model)
        for tensor in tensors(model)
        for name in tensor.published(tensor.sources[0])
    }


def test_the_48b_has_20493_tensors() -> None:
    assert len(published(KIMI_48B)) == 20_493


def test_the_48b_has_49122681728_parameters() -> None:
    model = ModelConfig.from_json(KIMI_48B)
    assert sum(math.prod(tensor.shape) for tensor in tensors(model)) == 49_122_681_728
    assert sum(math.prod(shapes[0]) for shapes in published(KIMI_48B).values()) == 49_122_681_728


@pytest.mark.parametrize(
    "name, shape",
    {
        "model.embed_tokens.weight": (163840, 2304),
        "lm_head.weight": (163840, 2304),
        "model.layers.0.mlp.gate_proj.weight": (9216, 2304),
        "model.layers.0.self_attn.q_conv1d.weight": (4096, 1, 4),
        "model.layers.25.self_attn.A_log": (1, 1, 32, 1),
        "model.layers.25.self_attn.dt_bias": (4096,),
        "model.layers.25.self_attn.f_a_proj.weight": (128, 2304),
        "model.layers.25.self_attn.g_b_proj.weight": (4096, 128),
        "model.layers.25.self_attn.b_proj.weight": (32, 2304),
        "model.layers.26.self_attn.q_proj.weight": (6144, 2304),
        "model.layers.26.self_attn.kv_a_proj_with_mqa.weight": (576, 2304),
        "model.layers.26.self_attn.kv_b_proj.weight": (8192, 512),
        "model.layers.26.block_sparse_moe.gate.weight": (256, 2304),
        "model.layers.26.block_sparse_moe.gate.e_score_correction_bias": (256,),
        "model.layers.26.block_sparse_moe.experts.255.w2.weight": (2304, 1024),
        "model.layers.26.block_sparse_moe.shared_experts.up_proj.weight": (1024, 2304),
    }.items(),
)
def test_the_48b_has_the_published_shape_of(name: str, shape: tuple[int, ...]) -> None:
    assert published(KIMI_48B)[name][0] == shape


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shape",
    {
        "self_attn.k_conv1d.weight": (4096, 4),
        "self_attn.A_log": (32,),
        "self_attn.dt_bias": (32, 128),
    }.items(),
)
def test_extra_or_absent_ones_in_a_shape_are_the_same_tensor(
    name: str, shape: tuple[int, ...]
) -> None:
    assert shape in published(KIMI_48B)[f"model.layers.0.{name}"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_lists_what_a_checkpoint_holds(name: str) -> None:
    listed = {tensor: shapes[0] for tensor, shapes in published(CONFIGS[name]).items()}
    assert listed == tensor_shapes(CONFIGS[name])


@pytest.mark.parametrize(
    "name, shape",
    {
        "model.layers.1.mlp.switch_mlp.down_proj.weight": (256, 2304, 1024),
        "model.layers.1.mlp.gate.weight": (256, 2304),
        "model.layers.1.mlp.e_score_correction_bias": (256,),
        "model.layers.1.mlp.shared_experts.gate_proj.weight": (1024, 2304),
        "model.layers.1.self_attn.v_conv.conv.weight": (4096, 4, 1),
        "model.layers.3.self_attn.embed_q.weight": (32, 512, 128),
        "model.layers.3.self_attn.unembed_out.weight": (32, 128, 512),
    }.items(),
)
def test_the_mlx_layout_spells(name: str, shape: tuple[int, ...]) -> None:
    table = {tensor.name: tensor.shape for tensor in tensors(ModelConfig.from_json(KIMI_48B))}
    assert table[name] == shape


def test_transformers_spelling_of_a_dense_mlp_is_found() -> None:
    model = ModelConfig.from_json(KIMI_48B)
    (gate,) = (t for t in tensors(model) if t.name == "model.layers.0.mlp.gate_proj.weight")
    spelled = "model.layers.0.block_sparse_moe.gate_proj.weight"
    assert gate.found_in({spelled}) == [spelled]
    assert gate.found_in(set()) == [gate.name]


def test_every_axis_that_ranks_share_divides_by_two_in_the_48b() -> None:
    model = ModelConfig.from_json(KIMI_48B)
    split = [tensor for tensor in tensors(model) if tensor.split is not None]
    assert {t.join for t in split} >= {Join.STACK, Join.CONV, Join.KEY_HALF, Join.VALUE_HALF}
    assert all(tensor.shape[tensor.split or 0] % 2 == 0 for tensor in split)
