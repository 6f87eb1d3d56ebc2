"""Mixture of experts: a router chooses a few for each token; shared experts see every token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.metal_kernels.experts import (
    ADD_NORM_SCORES,
    KERNELS,
    SELECT,
    SwiGLUWeights,
    add_norm_scores,
    expert_combine,
    expert_mlp,
    expert_select,
    naive_expert_select,
    router_unsupported_reason,
    unsupported_reason,
)
from mlx_kimi.metal_kernels.kernel import not_running
from mlx_kimi.metal_kernels.sorted_experts import ManyTokens
from mlx_kimi.metal_kernels.tuning import tuning
from mlx_kimi.model.layers import MLP, RMSNorm, swiglu
from mlx_kimi.offload.expert_cache import ExpertCache
from mlx_kimi.offload.optimistic import Residency

if TYPE_CHECKING:
    from mlx_kimi.model.weights import Weights


ROUTED_AT_ONCE = 16  # tokens: for each, a threadgroup of add_norm_scores reads its router's rows


class Router(nn.Module):
    """Scores each expert for each token, in float32 whatever the model's dtype."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.gate = weights.linear("gate")
        self.e_score_correction_bias = weights.array("e_score_correction_bias")
        self.top_k = config.num_experts_per_token
        self.groups = config.num_expert_group
        self.best_groups = config.topk_group
        self.renormalize = config.moe_renormalize
        self.scale = config.routed_scaling_factor

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [..., hidden] -> experts [..., k], best first, and their weights [..., k] float32.

        The bias decides who is chosen; the weights are the scores without it.
        """
        logits = self.gate(x.astype(mx.float32))
        if not_running(SELECT):
            return naive_expert_select(logits, *self._rule())
        lead = logits.shape[:-1]
        experts, weights = expert_select(logits.reshape(-1, logits.shape[-1]), *self._rule())
        return experts.reshape(*lead, -1), weights.reshape(*lead, -1)

    @property
    def has_kernels(self) -> bool:
        """Whether `norm_and_route` can run."""
        reason = not_running(ADD_NORM_SCORES, SELECT)
        return reason is None and router_unsupported_reason(self.gate.matrix) is None

    def norm_and_route(
        self, norm: RMSNorm, x: mx.array, residual: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """x, residual [N, hidden] -> the norm of their sum, the sum, experts, weights; two kernels.

        Norm and sum are [N, hidden]; the chosen experts [N, k] int32; their weights [N, k] float32.
        """
        total, normed, logits = add_norm_scores(
            residual, x, norm.weight, norm.eps, self.gate.matrix
        )
        return normed, total, *expert_select(logits, *self._rule())

    def _rule(self) -> tuple[mx.array, int, int, int, bool, float]:
        bias, scale = self.e_score_correction_bias, self.scale
        return bias, self.top_k, self.groups, self.best_groups, self.renormalize, scale


class Experts(nn.Module):
    """The routed experts in stacks."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.gate_proj = weights.linear("gate_proj")
        self.up_proj = weights.linear("up_proj")
        self.down_proj = weights.linear("down_proj")

    @property
    def count(self) -> int:
        """The experts that are here: all, or an expert cache's slots."""
        return self.gate_proj.weight.shape[0]

    def __call__(
        self, x: mx.array, experts: mx.array, weights: mx.array, shared: mx.array | None
    ) -> mx.array:
        """The weighted sum of each token's experts, and the `shared` one's output.

        x, shared [N, hidden]; experts [N, k] as places in the stacks, weights [N, k] float32 ->
        [N, hidden] in x's dtype.
        """
        k, flat = experts.shape[-1], experts.reshape(-1)
        if experts.size < tuning().sort_from:
            y = self._mlp(mx.expand_dims(x, (1, 2)), experts, False).reshape(flat.size, -1)
            return expert_combine(y, None, weights, shared)
        order = mx.argsort(flat)
        y = self._mlp(x[order // k][:, None], flat[order], True)[:, 0]
        return expert_combine(y, mx.argsort(order).reshape(-1, k), weights, shared)

    def one(self, x: mx.array, index: int) -> mx.array:
        """x [R, hidden] through one expert of the stacks -> [R, hidden]."""
        gate, up, down = (
            linear.member(index) for linear in (self.gate_proj, self.up_proj, self.down_proj)
        )
        return down(swiglu(gate(x), up(x)))

    def _mlp(self, x: mx.array, experts: mx.array, sorted_indices: bool) -> mx.array:
        gate = self.gate_proj.gather(x, experts, sorted_indices)
        up = self.up_proj.gather(x, experts, sorted_indices)
        return self.down_proj.gather(swiglu(gate, up), experts, sorted_indices)


class DecodeMoE:
    """The experts of a few tokens in four kernels, where kernels run and the matrices suit them."""

    def __init__(self, router: Router, routed: Experts, shared: MLP | None) -> None:
        self.router = router
        stacks = (routed.gate_proj, routed.up_proj, routed.down_proj)
        self.routed = SwiGLUWeights(*(linear.matrix for linear in stacks))
        self.shared = None
        if shared is not None:
            gate, up = shared.gate_up.members()
            self.shared = SwiGLUWeights(gate.matrix, up.matrix, shared.down_proj.matrix)
        self._unsupported_reason = unsupported_reason(
            router.gate.matrix, self.routed, self.shared, router.top_k
        )

    def unsupported_reason(self, tokens: int) -> str | None:
        """Why the ops form runs instead; None: it does not."""
        if why := not_running(*KERNELS):
            return why
        if tokens > (most := tuning().largest_batch):
            return f"{tokens} tokens are more than {most}: sorted by expert"
        return self._unsupported_reason

    def __call__(self, normed: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """normed [B, hidden]; experts, weights [B, k] -> [B, hidden]."""
        return expert_mlp(normed, experts, weights, self.routed, self.shared)


class MixtureOfExperts(nn.Module):
    """The weighted sum of the chosen experts, plus the shared experts unweighted.

    With an `expert_cache` the stacks hold only some experts, and an expert's place in them is its
    slot. One token runs the usual kernels on slots; many tokens are computed in waves of experts,
    so that each is read once a layer. Which operations run never depends on what is in memory:
    every memory budget gives the same bits.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.router = Router(config, weights)
        self.switch_mlp = Experts(weights.at("switch_mlp"))
        self.expert_cache = weights.expert_cache("switch_mlp")
        self.shared_experts = (
            MLP(weights.at("shared_experts")) if config.num_shared_experts else None
        )
        self.kernels = DecodeMoE(self.router, self.switch_mlp, self.shared_experts)
        self.many_tokens = ManyTokens(self.kernels.routed, self.kernels.shared, config.num_experts)

    def implementations(self) -> list[tuple[str, str, str]]:
        """Which implementation runs for how many tokens, and why: for `info --kernels`."""
        few = f"1 to {tuning().largest_batch} tokens"
        decode = "add_norm_scores, expert_select, expert_gate_up, expert_down"
        reason = self.kernels.unsupported_reason(1)
        row = (few, "ops form", reason) if reason else (few, decode, "supported shapes")
        return [row, *self.many_tokens.implementations(self.router.top_k)]

    def _waits(self, residency: Residency | None) -> bool:
        """Whether the host waits for the router here, and maybe for files; never within a graph."""
        return not (self.expert_cache is None or self.expert_cache.holds_all or residency)

    def norm_and_forward(
        self, norm: RMSNorm, x: mx.array, residual: mx.array, residency: Residency | None
    ) -> tuple[mx.array, mx.array]:
        """x, residual [B, T, hidden] -> the experts of the norm of their sum, and the sum."""
        tokens = x.shape[0] * x.shape[1]
        few = self.kernels.unsupported_reason(tokens) is None
        together = few or (tokens <= ROUTED_AT_ONCE and self.router.has_kernels)
        if not together:
            normed, residual = norm.add_norm(x, residual)
            return self(normed, residency), residual
        rows = (y.reshape(-1, x.shape[-1]) for y in (x, residual))
        normed, total, experts, weights = self.router.norm_and_route(norm, *rows)
        run = self._few if few else self._mixed
        y = run(normed, experts, weights, residency)
        return y.reshape(x.shape), total.reshape(x.shape)

    def __call__(self, x: mx.array, residency: Residency | None = None) -> mx.array:
        """x [B, T, hidden] -> [B, T, hidden]. On one of several ranks, its part of the sum.

        residency: the assumed slots, within a graph; None: experts are looked up, and read.
        """
        rows = x.reshape(-1, x.shape[-1])
        experts, weights = self.router(rows)
        return self._mixed(rows, experts, weights, residency).reshape(x.shape)

    def _mixed(
        self, rows: mx.array, experts: mx.array, weights: mx.array, residency: Residency | None
    ) -> mx.array:
        """rows [N, hidden] through their chosen experts [N, k] and the shared ones."""
        many = self.many_tokens.unsupported_reason(*experts.shape) is None
        together = many and self.many_tokens.has_shared(*experts.shape)
        cache = self.expert_cache
        if many and (cache is None or cache.holds_all):
            shared = None
            if self.shared_experts is not None and not together:
                shared = self.shared_experts(rows)
            return self.many_tokens(rows, experts, weights, shared)
        if together:
            shared = self.many_tokens.shared_alone(rows, experts.shape[1])
        else:
            shared = None if self.shared_experts is None else self.shared_experts(rows)
        if self._waits(residency) and shared is not None:
            mx.async_eval(shared)  # while the host waits for files
        if self.expert_cache and len(rows) > 1:
            y = self._by_expert(self.expert_cache, rows, experts, weights, shared)
        else:
            y = self.switch_mlp(rows, self._slot_ids(experts, residency), weights, shared)
            self._submit(y, residency)
        return y

    def _few(
        self, rows: mx.array, experts: mx.array, weights: mx.array, residency: Residency | None
    ) -> mx.array:
        """As `_mixed` does, by the kernels of a few tokens.

        Where experts are read from files, these take as many tokens at a time as have slots for
        theirs; each token has the bits that it has among all.
        """
        cache, outputs = self.expert_cache, list[mx.array]()
        if cache is None or len(rows) == 1 or not self._waits(residency):
            outputs.append(self.kernels(rows, self._slot_ids(experts, residency), weights))
        else:
            chosen = np.array(experts).astype(np.int64)
            for part in cache.with_room(chosen):
                mx.eval(outputs)  # before the slots that these read are written
                slots = mx.array(cache.slot_ids(chosen[part]), mx.int32)
                outputs.append(self.kernels(rows[part], slots, weights[part]))
        y = mx.concatenate(outputs)
        self._submit(y, residency)
        return y

    def _slot_ids(self, experts: mx.array, residency: Residency | None) -> mx.array:
        """One token's experts [1, k] -> where they are in the stacks, once they are there."""
        if self.expert_cache is None or self.expert_cache.holds_all:
            return experts
        if residency:
            return residency.slot_ids(self.expert_cache, experts)
        chosen = np.array(experts[0]).astype(np.int64)
        return mx.array(self.expert_cache.slot_ids(chosen)[None], mx.int32)

    def _submit(self, y: mx.array, residency: Residency | None) -> None:
        """Queue what reads slots before anything later; `ExpertCache.slot_ids` says why."""
        if self._waits(residency):
            mx.async_eval(y)

    def _by_expert(
        self,
        cache: ExpertCache,
        rows: mx.array,
        experts: mx.array,
        weights: mx.array,
        shared: mx.array | None,
    ) -> mx.array:
        """As `Experts` does: rows, shared [N, hidden]; experts, weights [N, k] -> [N, hidden]."""
        chosen = np.array(experts).astype(np.int64)
        k, flat = chosen.shape[1], chosen.reshape(-1)
        order = np.argsort(flat, kind="stable")  # of (token, expert) pairs, by expert
        ends = np.searchsorted(flat[order], np.arange(len(cache.slot_table) + 1))

        def pairs(expert: int) -> npt.NDArray[np.int64]:
            return order[ends[expert] : ends[expert + 1]]

        def compute(wave: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> mx.array:
            of_each = [pairs(expert) for expert in wave.tolist()]
            if self.many_tokens.unsupported_reason(*chosen.shape) is not None:
                tokens = [rows[mx.array(pairs // k)] for pairs in of_each]
                each = zip(tokens, slots.tolist(), strict=True)
                return mx.concatenate([self.switch_mlp.one(x, slot) for x, slot in each])
            counts = np.zeros(cache.slots, np.int64)
            counts[slots] = [len(pairs) for pairs in of_each]
            starts = mx.array(np.append(0, np.cumsum(counts)), mx.int32)
            sorted_pairs = mx.array(np.concatenate(of_each), mx.int32)
            return self.many_tokens.wave(rows, sorted_pairs, starts, k)

        visited, outputs = cache.for_each_expert(chosen, compute)
        places = np.empty_like(flat)
        places[np.concatenate([pairs(expert) for expert in visited])] = np.arange(len(flat))
        y, where = mx.concatenate(outputs), mx.array(places.reshape(-1, k), mx.int32)
        return expert_combine(y, where, weights, shared)
