"""Run the checkpoints of tests/checkpoints.py through transformers and store the logits.

    python -m tests.reference.make [name...]

Needs the `reference` and `dev` extras; the tests read only the files that this writes. The stored
logits are transformers' own code run in float64. Printed beside them, as max|difference| over
max|logits|, is how far every other way to compute the same logits is from them.
"""

import json
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx_lm.utils import load_model
from safetensors import safe_open
from transformers import DynamicCache, KimiLinearForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear as modeling

from tests.checkpoints import CONFIGS, Config, fingerprint, token_ids, write_checkpoint

SEED = 2
LONG, SHORT = 150, 7  # tokens
STEPS = {"full_width": 24}  # tokens to repeat one by one; elsewhere all
SMALLEST_GAP = 5e-5  # between a chosen expert's biased score and a refused one's


def load(folder: Path, config: Config) -> Any:
    """The folder as transformers' model in float32, each path the plain one."""
    model = KimiLinearForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    if config["tie_word_embeddings"]:  # transformers never ties this model's
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    return model.eval()


@contextmanager
def float64(model: Any) -> Iterator[None]:
    """Let the model compute in float64, also where its code says float32."""
    in_float64 = types.SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    model.double()
    with (
        mock.patch.object(modeling, "torch", in_float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield
    model.float()


@torch.no_grad()
def one_pass(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits [T, vocab] of all tokens at once (the chunkwise delta rule)."""
    return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


@torch.no_grad()
def step_by_step(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits [T, vocab] of one token after another through the cache (the recurrence)."""
    cache = DynamicCache(config=model.config)
    steps = [model(torch.tensor([[i]]), past_key_values=cache).logits[0] for i in ids.tolist()]
    return torch.cat(steps).numpy()


def mlx_lm_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits [T, vocab] of mlx-lm, in float32 on the CPU."""
    with mx.stream(mx.cpu):
        model, _ = load_model(folder)
        return np.array(model(mx.array(ids)[None])[0])


def router_gap(model: Any, ids: np.ndarray) -> float:
    """The smallest distance, over tokens and layers, from a choice to another choice."""
    gaps: list[float] = []

    def record(router: Any, _: Any, output: Any) -> None:
        scores = output[0].sigmoid() + router.e_score_correction_bias  # [T, experts]
        groups = scores.unflatten(-1, (router.num_group, -1))
        group_scores = groups.topk(2).values.sum(-1)
        if router.topk_group < router.num_group:
            gaps.append(distance(group_scores, router.topk_group))
        kept = torch.zeros_like(group_scores).scatter(
            -1, group_scores.topk(router.topk_group)[1], 1
        )
        masked = groups.masked_fill(kept[..., None] == 0, -torch.inf).flatten(-2)
        gaps.append(distance(masked, router.top_k))

    routers = [m for m in model.modules() if isinstance(m, modeling.KimiLinearTopkRouter)]
    hooks = [router.register_forward_hook(record) for router in routers]
    one_pass(model, ids)
    for hook in hooks:
        hook.remove()
    return min(gaps)


def distance(scores: torch.Tensor, count: int) -> float:
    """How far the lowest of the `count` best lies above the best of the rest."""
    best = scores.topk(count + 1).values
    return (best[:, -2] - best[:, -1]).min().item()


def check_layout(folder: Path, config: Config) -> None:
    """Fail unless transformers, saving the folder's model again, writes what the folder holds."""
    load(folder, config).save_pretrained(folder / "again")
    if described(folder) != described(folder / "again"):
        raise SystemExit(f"{folder.name}: transformers {transformers.__version__} saves otherwise")


def described(folder: Path) -> Any:
    """A folder's config, and the dtype and shape of each of its tensors."""
    with safe_open(folder / "model.safetensors", "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        tensors = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    return json.loads((folder / "config.json").read_text()), tensors


def difference(ours: np.ndarray, exact: np.ndarray) -> float:
    """max|ours - exact| / max|exact|."""
    return float(np.abs(ours - exact).max() / np.abs(exact).max())


def make(name: str, config: Config, folder: Path) -> None:
    """Write `<name>.npz` and print what it was checked against."""
    ids, short_ids = token_ids(config, LONG, SEED), token_ids(config, SHORT, SEED)
    steps = ids[: STEPS.get(name, LONG)]
    published = write_checkpoint(folder / "published", config, SEED)
    model = load(published, config)
    single = one_pass(model, ids)
    single_steps = step_by_step(model, steps)
    with float64(model):
        exact, short_exact = one_pass(model, ids), one_pass(model, short_ids)
        exact_steps = step_by_step(model, steps)
        gap = min(router_gap(model, ids), router_gap(model, short_ids))
    del model
    if gap < SMALLEST_GAP:
        raise SystemExit(f"{name}: two experts are {gap:.1e} apart, choose another SEED")
    check_layout(write_checkpoint(folder / "own", config, SEED, layout="transformers"), config)
    if not np.array_equal(one_pass(load(folder / "own", config), ids), single):
        raise SystemExit(f"{name}: the two layouts give different logits")
    print(
        f"{name}: float64 steps {difference(exact_steps, exact[: len(steps)]):.1e}, "
        f"float32 pass {difference(single, exact):.1e}, "
        f"float32 steps {difference(single_steps, exact[: len(steps)]):.1e}, "
        f"mlx-lm {difference(mlx_lm_logits(published, ids), exact):.1e}, "
        f"max|logits| {np.abs(exact).max():.1f}, smallest router gap {gap:.1e}"
    )
    path = Path(__file__).parent / f"{name}.npz"
    np.savez_compressed(
        path,
        seed=SEED,
        fingerprint=fingerprint(config, SEED),
        ids=ids,
        logits=exact.astype(np.float32),
        short_ids=short_ids,
        short_logits=short_exact.astype(np.float32),
        versions=np.array(
            [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
        ),
    )
    print(f"  {path.name} {path.stat().st_size / 1000:.0f} kB, both layouts agree")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            make(name, CONFIGS[name], Path(folder))
