"""How many kernels a GPU launches for one token of the 48B, counted from MLX's graph of it."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from benchmarks.launches import launches
from mlx_kimi.evaluation.random_model import PUBLISHED_48B
from mlx_kimi.loading.load import load_model
from mlx_kimi.metal_kernels import fused, matmul
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.model import layers
from mlx_kimi.model.cache import CacheEntry, LatentCache, arrays
from mlx_kimi.model.forward_batch import ForwardBatch
from mlx_kimi.model.kimi_linear import KimiLinear
from tests.checkpoints import published_config, write_checkpoint

LINEAR = PUBLISHED_48B["linear_attn_config"]
MOST = 285


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> KimiLinear:
    """All layers of the 48B, each of them small."""
    sizes = {"moe_intermediate_size": 64, "num_experts_per_token": 8, "num_experts": 16}
    config = published_config(LINEAR["kda_layers"], LINEAR["full_attn_layers"], **sizes)
    folder = write_checkpoint(tmp_path_factory.mktemp("small"), config, 0)
    return load_model(folder)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of our kernels as they are launched, and rms_norm: one launch on a GPU."""
    names: list[str] = []

    for module in (fused, layers):
        monkeypatch.setattr(module, "compiles", lambda: True)  # as on a GPU; nothing is evaluated

    def result(name: str, inputs: Any, shapes: Any, dtypes: Any) -> list[mx.array]:
        names.append(name)
        outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        mx.eval(outputs)
        return mx.depends(outputs, [x for x in inputs if isinstance(x, mx.array)])

    def kernels(kernel: Kernel) -> Launch:
        def launch(*, inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> Any:
            return result(kernel.name, inputs, output_shapes, output_dtypes)

        return launch

    def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        return result("rms_norm", (x, weight), [x.shape], [x.dtype])[0]

    monkeypatch.setattr(mx.fast, "rms_norm", rms_norm)
    with use_backend(kernels):
        yield names


def after_a_token(model: KimiLinear, B: int = 1) -> list[CacheEntry]:
    cache = model.make_cache()
    with use_backend(None):
        model(mx.array([[1]] * B), cache)
    mx.eval(arrays(cache))
    for entry in cache:  # as every token but the first of a tail finds it
        if isinstance(entry, LatentCache):
            entry.tail = entry.roomy_tail(B, model.config.latent_width, mx.float32)
    mx.eval(arrays(cache))
    return cache


@pytest.mark.slow
def test_a_token_of_the_48b_is_few_launches(model: KimiLinear, counted: list[str]) -> None:
    cache = after_a_token(model)
    counted.clear()
    token = mx.argmax(model.logits(model.run(mx.array([[1]]), cache, ForwardBatch())), axis=-1)
    found = launches(token, *arrays(cache))
    # The first layer has a dense MLP. Then the embedding, the last norm, lm_head and the choice.
    total = sum(found.values()) + len(counted)
    assert total == 8 + 19 * 8 + 7 * 10 + 4
    assert total + 3 <= MOST  # a quantized embedding has three arrays to look up, and is unpacked


@pytest.mark.slow
@pytest.mark.parametrize("B, T", [(1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (8, 1), (16, 1), (2, 8)])
def test_a_few_tokens_of_the_48b_are_few_launches(
    model: KimiLinear, counted: list[str], monkeypatch: pytest.MonkeyPatch, B: int, T: int
) -> None:
    """Texts of a batch, drafts, or both: as many as for one token, but for the experts of many."""
    cache, steps = after_a_token(model, B), [] if T > 1 else None
    monkeypatch.setattr(matmul, "copy_pays", lambda rows, size: False)  # as on a GPU
    counted.clear()
    plan = next(entry.plan(B, T) for entry in cache if isinstance(entry, LatentCache))
    batch = ForwardBatch(plan=plan, steps=steps)
    hidden = model.run(mx.array([[1] * T] * B), cache, batch)
    tokens = mx.argmax(model.logits(hidden), axis=-1)
    found = launches(tokens, *arrays(cache))
    total = sum(found.values()) + len(counted)
    print(f"{B} x {T}: {total} launches, {dict(found)}")
    assert total <= 300


@pytest.mark.parametrize(("number", "most", "expected"), [(1, 9, 8), (3, 13, 10)])
def test_a_layer_with_experts_is_few_launches(
    model: KimiLinear, counted: list[str], number: int, most: int, expected: int
) -> None:
    cache = after_a_token(model)
    x, residual = (mx.ones((1, 1, model.config.hidden_size)) for _ in range(2))
    mx.eval(x, residual)
    counted.clear()
    layer = model.layers[number]
    results = layer(x, residual, cache[number], ForwardBatch())
    found = launches(*results, *cache[number].arrays())
    assert sum(found.values()) + len(counted) == expected <= most, (found, counted)
