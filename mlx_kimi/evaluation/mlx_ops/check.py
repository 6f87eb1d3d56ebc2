"""Every operation of MLX that a model uses, at its shapes and dtypes, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_kimi.evaluation.mlx_ops.case import Case, Measurement, measure
from mlx_kimi.evaluation.mlx_ops.copies import copy_cases
from mlx_kimi.evaluation.mlx_ops.experts import expert_cases, member_cases
from mlx_kimi.evaluation.mlx_ops.functions import (
    elementwise_cases,
    norm_cases,
    order_cases,
    reduction_cases,
)
from mlx_kimi.evaluation.mlx_ops.operators import operator_cases
from mlx_kimi.evaluation.mlx_ops.products import (
    Places,
    Use,
    embedding_cases,
    head_cases,
    linear_cases,
    matrices,
)
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.model.moe import MixtureOfExperts
from mlx_kimi.offload.expert_cache import EMPTY


def check_mlx(model: KimiLinear) -> Iterator[Measurement]:
    """Measure one operation after another on the default device.

    The model's weights are read, not changed; of experts in files a few are read into slots.
    """
    for case in cases(model):
        yield measure(case)


def cases(model: KimiLinear) -> Iterator[Case]:
    """All that is measured; each case's operands exist until the next is asked for."""
    for part in (norm_cases, elementwise_cases, reduction_cases, order_cases, copy_cases):
        yield from part(model)
    yield from operator_cases(model)
    for use in matrices(model):
        yield from _matrix_cases(model, use)
        mx.clear_cache()  # buffers of this matrix's sizes, which the next has no use for


def _matrix_cases(model: KimiLinear, use: Use) -> Iterator[Case]:
    config, dtype = model.config, model.norm.weight.dtype
    if ".switch_mlp." in use.path:
        moe = model.layers[int(use.path.split(".")[1])].mlp
        assert isinstance(moe, MixtureOfExperts)
        present = _present(moe, config.num_experts_per_token)
        yield from expert_cases(use, dtype, config.num_experts_per_token, present)
        if moe.expert_cache is not None:
            yield from member_cases(use, dtype, present)
    elif use.role in ("embed_q", "unembed_out"):
        yield from head_cases(use, dtype, config.qk_rope_head_dim)
    elif use.role == "embed_tokens":
        yield from embedding_cases(use, dtype)
    else:
        yield from linear_cases(use, mx.float32 if use.role == "gate" else dtype)


def _present(moe: MixtureOfExperts, top_k: int) -> Places:
    """The places in the stacks that hold an expert: a token's at least."""
    cache = moe.expert_cache
    if cache is None or cache.holds_all:
        return np.arange(moe.switch_mlp.count)
    cache.slot_ids(np.arange(top_k))
    return np.flatnonzero(cache.expert_in != EMPTY)
