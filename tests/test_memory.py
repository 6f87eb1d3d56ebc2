"""What a model is said to need is what it takes; what does not fit is refused unread."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import psutil
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.checkpoint.tensors import Join, tensors
from mlx_kimi.cli.grammar import COMMANDS
from mlx_kimi.defaults import SNAPSHOT_MEMORY
from mlx_kimi.errors import KimiError
from mlx_kimi.evaluation.random_model import PUBLISHED_48B
from mlx_kimi.loading.budget import Budget, slots_for
from mlx_kimi.loading.load import check_headers, load_model
from mlx_kimi.loading.memory import (
    ANY_SIZE,
    Machine,
    MemoryEstimate,
    needs,
    refuse_what_does_not_fit,
)
from mlx_kimi.model import cache as caches
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.units import human_size
from tests.checkpoints import TINY, write_checkpoint
from tests.processes import live_memory
from tests.tokenizer_files import trained_tokens, write_tiktoken

GB = 10**9
CONFIG_48B = ModelConfig.from_json(PUBLISHED_48B)
BFLOAT16_48B = 98_245_363_456  # bytes


@pytest.fixture(scope="module")
def pocket() -> KimiLinear:
    return load_model(pocket_folder())


def machine(monkeypatch: pytest.MonkeyPatch, limit: int, total: int) -> None:
    there = Machine(limit, total, "this Mac gives its GPU")
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: there))


# ------------------------------------------------------------------------------------ what it needs
def test_the_48b_needs_what_its_sizes_say() -> None:
    plain = needs(CONFIG_48B, 0, number=2)
    assert plain.state == 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2)  # 41.4 MiB
    assert plain.latent == 7 * 576 * 2
    assert needs(CONFIG_48B, 0, latent_bits=8, number=2).latent == 7 * 648
    # On an H200 the last step of 131,072 tokens took 2.09 GB, state and latents among it.
    measured = 2.09e9 - plain.state - 131_072 * plain.latent
    assert 0.75 * measured < plain.work < 1.25 * measured


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, Budget(8 * GB)])
def test_weights_state_and_latents_are_exact(budget: Budget | None) -> None:
    before = live_memory()
    model = load_model(pocket_folder(), budget=budget)
    taken = live_memory() - before
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert abs(taken - weights) < 0.01 * weights
    cache = model.make_cache()
    mx.eval(model(mx.array([[1] * 700]), cache), caches.arrays(cache))
    wanted = needs(model.config, weights)
    held = sum(array.nbytes for array in caches.arrays(cache))
    assert held == wanted.state + 700 * wanted.latent
    assert wanted.at(700) == weights + held + wanted.work


@pytest.mark.slow
def test_the_work_space_is_about_what_a_step_takes(pocket: KimiLinear) -> None:
    cache, wanted = pocket.make_cache(), needs(pocket.config, 0)
    mx.eval(pocket.hidden(mx.array([[1] * 2048]), cache), caches.arrays(cache))
    before = live_memory()
    mx.reset_peak_memory()
    mx.eval(pocket.hidden(mx.array([[2] * 2048]), cache), caches.arrays(cache))
    assert wanted.work / 8 < mx.get_peak_memory() - before < wanted.work


@pytest.mark.parametrize(
    ("limit", "longest"), [(99, 0), (100, 0), (109, 0), (110, 1), (205, 10), (10**6, 50)]
)
def test_the_longest_context_is_what_still_fits(limit: int, longest: int) -> None:
    wanted = MemoryEstimate(weights=60, state=10, latent=10, work=30)
    assert wanted.longest(limit, most=50) == longest
    assert longest in (0, 50) or wanted.at(longest) <= limit < wanted.at(longest + 1)


# -------------------------------------------------------------------------------- what does not fit
def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 104 * GB, 128 * GB)
    refuse_what_does_not_fit(Path("kimi"), CONFIG_48B, BFLOAT16_48B)


@pytest.mark.parametrize(
    ("limit", "advice"),
    [
        (60, "`mlx_kimi convert --bits 8` makes 52.19 GB of it"),
        (31, "`mlx_kimi convert --bits 4` makes 27.63 GB of it"),
        (18, "`mlx_kimi convert --bits 2` makes 15.35 GB of it"),
        (8, f"no quantization of it fits; {ANY_SIZE}=1 in the environment loads it all the same"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(
    limit: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, limit * GB, 64 * GB)
    with pytest.raises(KimiError) as error:
        refuse_what_does_not_fit(Path("kimi"), CONFIG_48B, BFLOAT16_48B)
    assert str(error.value).startswith("kimi: needs 98.25 GB for its weights and about ")
    assert f"this Mac gives its GPU {limit}.00 GB of 64.00 GB; {advice}" in str(error.value)
    streams = (
        f"; or `generate` and `chat` with --memory-budget {limit}GB read experts from the disk"
    )
    assert str(error.value).endswith(streams) == (limit > 8)
    monkeypatch.setenv(ANY_SIZE, "1")
    refuse_what_does_not_fit(Path("kimi"), CONFIG_48B, BFLOAT16_48B)


@pytest.mark.parametrize("here", [0, 5 * GB])
def test_a_budget_is_offered_where_it_would_be_taken(
    here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=here))
    routed = sum(t.join is Join.STACK and math.prod(t.shape) for t in tensors(CONFIG_48B)) * 2
    one_slot = routed // CONFIG_48B.num_experts
    taken, offered = [], []
    for limit in range(6, 24):
        machine(monkeypatch, limit * GB, 64 * GB)
        with pytest.raises(KimiError) as error:
            refuse_what_does_not_fit(Path("kimi"), CONFIG_48B, BFLOAT16_48B)
        offered.append(f"--memory-budget {limit}GB" in str(error.value))
        budget = Budget(limit * GB, snapshots=SNAPSHOT_MEMORY)
        try:
            slots_for(budget, CONFIG_48B, BFLOAT16_48B - routed, one_slot)
            taken.append(True)
        except KimiError:
            taken.append(False)
    assert offered == taken == sorted(taken) and {*taken} == {False, True}


@pytest.mark.parametrize("model", ["pocket", "tiny in bfloat16"])
def test_headers_and_a_load_refuse_the_same_budgets(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What loading and reading take was asked for by the load alone."""
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=0))
    folder = pocket_folder()
    if model != "pocket":
        # (of few layers and a wide embedding, which takes more to be read than to be used)
        config = TINY | {"vocab_size": len(trained_tokens()) + 256, "hidden_size": 4096}
        folder = write_tiktoken(write_checkpoint(tmp_path / "tiny", config, dtype="bfloat16"))

    def refusal(load: Callable[..., Any], memory: int) -> str:
        try:
            load(folder, checkpoint=Checkpoint(folder), budget=Budget(memory, 64, prefill_step=8))
        except KimiError as error:
            return str(error)
        return ""

    least = int(re.search(r"make ([\d,]+) MB", refusal(load_model, 1))[1].replace(",", ""))
    for memory in (1, (least - 2) * 10**6, least * 10**6):
        assert refusal(check_headers, memory) == refusal(load_model, memory)
    assert refusal(load_model, (least - 2) * 10**6) and not refusal(load_model, least * 10**6)


def test_a_load_that_cannot_fit_reads_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 10 * 10**6, 20 * 10**6)
    before = live_memory()
    mx.reset_peak_memory()
    with pytest.raises(KimiError, match=r"needs 7\.51 MB for its weights"):
        load_model(pocket_folder())
    assert mx.get_peak_memory() - before < 10**5


def test_info_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*options: str) -> str:
        return CliRunner().invoke(COMMANDS["info"], options).output

    machine(monkeypatch, 160 * 10**6, 500 * 10**6)
    fits = [line.endswith(" fits") for line in said().splitlines() if " tokens  " in line]
    assert fits == [True, False]  # 4,096 and 32,768
    assert "1,000 tokens    0.14 GB  fits" in said("--context", "1000")
    machine(monkeypatch, 10**6, 500 * 10**6)
    assert "does not fit; a load says what would" in said()
    result = CliRunner().invoke(COMMANDS["info"], ["--context", "40000"])
    assert isinstance(result.exception, KimiError)
    assert (
        str(result.exception) == "--context must be at most model_max_length = 32,768 but is 40,000"
    )


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (999, "999 B"),
        (36_400, "36 kB"),
        (100_000, "0.10 MB"),
        (1_184_000, "1.18 MB"),
        (99_000_000, "99.00 MB"),
        (100_000_000, "0.10 GB"),
        (27_640_000_000, "27.64 GB"),
    ],
)
def test_a_size_is_said_in_the_unit_that_suits_it(count: int, said: str) -> None:
    assert human_size(count) == said


def test_this_machine_has_memory() -> None:
    here = Machine.here()
    assert 0 < here.limit <= here.total
