"""Routing against plain numpy, sorted experts against unsorted ones, and models in two slices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.load import load_model
from mlx_kimi.metal_kernels.tuning import default_tuning, use_tuning
from mlx_kimi.model import moe
from mlx_kimi.model.forward_batch import ForwardBatch
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.linear import Linear
from mlx_kimi.model.weights import Weights
from tests.assertions import assert_close
from tests.checkpoints import EVEN, TINY, published_config, write_checkpoint
from tests.processes import live_memory

# Two float32 sums of the same few hundred products in another order.
REORDERED = 1e-5


def chosen(scores: np.ndarray, bias: np.ndarray, config: dict[str, Any]) -> list[int]:
    """The experts of one token, best first, from its sigmoid scores [E]."""
    groups, k = config["num_expert_group"], config["num_experts_per_token"]
    biased = (scores + bias).reshape(groups, -1)
    group_scores = np.sort(biased, axis=1)[:, -2:].sum(axis=1)
    best = np.argsort(-group_scores)[: config["topk_group"]]
    allowed = [g * biased.shape[1] + i for g in best for i in range(biased.shape[1])]
    return sorted(allowed, key=lambda e: -biased.reshape(-1)[e])[:k]


def routed(x: np.ndarray, gate: np.ndarray, bias: np.ndarray, config: dict[str, Any]) -> Any:
    """The experts and weights of each token [N, hidden], in float64."""
    scores = 1 / (1 + np.exp(-x.astype(float) @ gate.astype(float).T))
    experts = np.array([chosen(row, bias.astype(float), config) for row in scores])
    weights = np.take_along_axis(scores, experts, axis=1)
    if config["moe_renormalize"]:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return experts, weights * config["routed_scaling_factor"]


ROUTERS = {
    "plain": {},
    "scaled": {"routed_scaling_factor": 0.5},
    "not_renormalised": {"moe_renormalize": False},
    "every_expert": {"num_experts_per_token": 16},
    "one_expert": {"num_experts_per_token": 1},
    "groups": {"num_expert_group": 4, "topk_group": 2, "num_experts_per_token": 4},
    "one_group": {"num_expert_group": 4, "topk_group": 1, "num_experts_per_token": 4},
    "groups_of_two": {"num_expert_group": 8, "topk_group": 3},
    "all_groups": {"num_expert_group": 4, "topk_group": 4, "num_experts_per_token": 8},
}


def test_a_gathered_product_is_given_rows_at_their_distance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On NVIDIA GPUs MLX takes the stride of an axis of one row for it, and sums foreign rows."""
    distances: list[int] = []
    gather_mm = mx.gather_mm

    def watched(x: mx.array, *rest: mx.array, **how: Any) -> mx.array:
        distances.append(memoryview(x).strides[-2])  # type: ignore[arg-type, index]
        return gather_mm(x, *rest, **how)

    monkeypatch.setattr(mx, "gather_mm", watched)
    rows, experts = mx.random.normal((600, 64)), mx.array([0] * 300 + [1] * 300)
    Linear(mx.random.normal((2, 32, 64))).gather(rows[:, None], experts, sorted_indices=True)
    assert distances == [64 * 4]


@pytest.mark.parametrize("bias", ["none", "small", "negative", "large"])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_router_is_the_published_formula(name: str, bias: str) -> None:
    config = published_config([1, 2, 3], [4], **{"num_experts": 16, **ROUTERS[name]})
    rng = np.random.default_rng(3)
    gate = (rng.standard_normal((16, 64)) / 8).astype(np.float32)
    size, shift = {"none": (0, 0), "small": (0.05, 0), "negative": (0.3, -3), "large": (5, 0)}[bias]
    offset = (shift + size * rng.standard_normal(16)).astype(np.float32)
    arrays = {"gate.weight": mx.array(gate), "e_score_correction_bias": mx.array(offset)}
    model_config = ModelConfig.from_json(config)
    router = moe.Router(model_config, Weights(arrays, model_config))
    x = rng.standard_normal((120, 64)).astype(np.float32)
    experts, weights = router(mx.array(x).reshape(3, 40, 64))
    expected, expected_weights = routed(x, gate, offset, config)
    assert weights.dtype == mx.float32
    # No two of these random scores are within 1e-6, float32's error, so the choice is one.
    np.testing.assert_array_equal(np.array(experts).reshape(120, -1), expected)
    assert_close("weights", weights.reshape(120, -1), expected_weights, 1e-6)


def test_the_router_computes_in_float32_for_16_bit_activations() -> None:
    rng = np.random.default_rng(0)
    gate = rng.standard_normal((8, 64)).astype(np.float32)
    arrays = {"gate.weight": mx.array(gate), "e_score_correction_bias": mx.zeros((8,))}
    config = ModelConfig.from_json(TINY)
    x = mx.array(rng.standard_normal((1, 50, 64))).astype(mx.bfloat16)
    _, weights = moe.Router(config, Weights(arrays, config))(x)
    _, expected = routed(np.array(x.astype(mx.float32))[0], gate, np.zeros(8), TINY)
    assert_close("weights", weights[0], expected, 1e-6)


@pytest.fixture(scope="module", params=["float32", "4bit"])
def tiny(
    request: pytest.FixtureRequest, folder: Callable[..., Path], quantized: Callable[..., Path]
) -> KimiLinear:
    return load_model((folder if request.param == "float32" else quantized)("tiny"))


@pytest.mark.parametrize("T", [1, 3, 31, 32, 33, 200])
def test_sorted_experts_are_the_unsorted_ones(tiny: KimiLinear, T: int) -> None:
    experts = tiny.layers[1].mlp.switch_mlp
    rng = np.random.default_rng(T)
    x = mx.array(rng.standard_normal((2 * T, 64), np.float32))
    choice, weights = mx.array(rng.integers(0, 8, (2 * T, 2))), mx.array(rng.random((2 * T, 2)))
    shared = mx.array(rng.standard_normal((2 * T, 64), np.float32))
    results = []
    for start in (1, 10**9):
        with use_tuning(default_tuning()._replace(sort_from=start)):
            results.append(experts(x, choice, weights.astype(mx.float32), shared))
    assert_close("experts", *results, REORDERED)
    for token in (0, 2 * T - 1):
        row, expected = np.array(x[token]).astype(float), np.array(shared[token]).astype(float)
        for k in (0, 1):
            e, weight = choice[token, k].item(), weights[token, k].item()
            gate, up, down = (
                np.array(getattr(experts, f"{name}_proj").dequantized()[e]).astype(float)
                for name in ("gate", "up", "down")
            )
            h = (gate @ row) / (1 + np.exp(-gate @ row)) * (up @ row)
            expected = expected + weight * (down @ h)
        assert_close(f"token {token}", results[0][token], expected, REORDERED)


# ------------------------------------------------------------------------------------ two ranks
@pytest.fixture(scope="module", params=["tiny", "grouped", "even", "tiny_4bit", "grouped_4bit"])
def whole_and_halves(
    request: pytest.FixtureRequest,
    folder: Callable[..., Path],
    quantized: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[KimiLinear, list[KimiLinear]]:
    """A model, and the same model as two ranks load it."""
    name, *bits = request.param.split("_")
    if name == "even":
        path = write_checkpoint(tmp_path_factory.mktemp("even"), EVEN)
    else:
        path = (quantized if bits else folder)(name)
    return load_model(path), [load_model(path, shard=(rank, 2)) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 40, 200])
def test_the_parts_of_two_ranks_add_up(
    whole_and_halves: tuple[KimiLinear, list[KimiLinear]], T: int
) -> None:
    whole, halves = whole_and_halves
    width = whole.config.hidden_size
    x = mx.array(np.random.default_rng(T).standard_normal((2, T, width), np.float32))
    caches = [m.make_cache() for m in (whole, *halves)]
    for number, layer in enumerate(whole.layers):
        both = [half.layers[number] for half in halves]
        for step in range(2):  # the second one from a state that is not zero
            oracle = layer.attend(x, caches[0][number], ForwardBatch())
            parts = [
                half.attend(x, c[number], ForwardBatch())
                for half, c in zip(both, caches[1:], strict=True)
            ]
            assert_close(f"layer {number} step {step} attention", sum(parts), oracle, REORDERED)
            assert np.abs(np.array(parts[0] - parts[1])).max() > 0
        parts = [half.mlp(x) for half in both]
        assert_close(f"layer {number} MLP", sum(parts), layer.mlp(x), REORDERED)


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("T", [3, 40])  # vectors, and tiles
def test_the_experts_of_two_ranks_add_up_in_kernels(
    whole_and_halves: tuple[KimiLinear, list[KimiLinear]], T: int
) -> None:
    """A rank has half of the channels of every expert."""
    whole, halves = whole_and_halves
    x = mx.random.normal((4, T, whole.config.hidden_size), key=mx.random.key(T))
    number = next(i for i, y in enumerate(whole.layers) if isinstance(y.mlp, moe.MixtureOfExperts))
    mlps = [model.layers[number].mlp for model in (whole, *halves)]
    for mlp in mlps:
        reason = mlp.many_tokens.unsupported_reason(4 * T, mlp.router.top_k)
        assert (reason is None) == (mlp.switch_mlp.up_proj.out_features % 64 == 0)
    expected, *parts = (mlp(x) for mlp in mlps)
    assert_close("MLP", sum(parts), expected, REORDERED)
    assert mx.abs(parts[0] - parts[1]).max().item() > 0


def test_each_rank_holds_about_half(
    whole_and_halves: tuple[KimiLinear, list[KimiLinear]],
) -> None:
    whole, halves = whole_and_halves
    for number, layer in enumerate(whole.layers):
        for half in halves:
            ours, theirs = half.layers[number], layer
            assert 2 * ours.self_attn.o_proj.weight.size == theirs.self_attn.o_proj.weight.size
            if isinstance(theirs.mlp, moe.MixtureOfExperts):
                stacks = [x.mlp.switch_mlp.up_proj.weight.shape for x in (ours, theirs)]
                assert stacks[0][0] == stacks[1][0] and 2 * stacks[0][1] == stacks[1][1]


def test_a_rank_keeps_its_slice_and_not_the_whole_model(tmp_path: Path) -> None:
    # Wide, since MLX copies no slice that would save less than 16 KB.
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256}
    path = write_checkpoint(tmp_path, TINY | sizes | {"vocab_size": 64})
    kept = []
    for shard in ((0, 1), (0, 2)):
        before = live_memory()
        part = load_model(path, shard=shard)
        kept.append(mx.get_active_memory() - before)
        own = sum(array.nbytes for _, array in tree_flatten(part.parameters()))
        del part
    assert kept[1] < 1.1 * own and own < 0.6 * kept[0]


@pytest.mark.parametrize("ranks", [3, 5])
def test_ranks_that_do_not_divide_are_refused(folder: Callable[..., Path], ranks: int) -> None:
    with pytest.raises(KimiError, match=f"{ranks} ranks must divide"):
        load_model(folder("tiny"), shard=(0, ranks))


def test_ranks_that_cut_a_quantized_group_are_refused(quantized: Callable[..., Path]) -> None:
    # o_proj of the tiny model has two groups of 32 inputs: four ranks would own half a group each.
    with pytest.raises(KimiError, match="4 ranks must divide"):
        load_model(quantized("tiny"), shard=(0, 4))
