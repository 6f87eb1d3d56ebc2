"""The smallest memory budget that is accepted is about what the run then takes, and never less."""

import sys

import pytest

from benchmarks.budget import RATIO, measured
from mlx_kimi.bundled import pocket_folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize(("context", "step"), [(256, 64), (2048, 64), (2048, 2048)])
def test_the_smallest_budget_is_what_a_run_takes(context: int, step: int) -> None:
    """It was 590 MB for a process of 83 MB, whatever the context and the step."""
    given = pocket_folder(), context, step, 16
    budget = measured(*given)
    peak = measured(*given, memory=budget)
    print(f"{budget / 1e6:.0f} MB accepted, {peak / 1e6:.0f} MB taken")
    assert peak <= budget <= RATIO * peak
