"""Every damaged file ends in a right answer or in one line of error: a fixed number of cases."""

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.fuzz.runner import Runner, shares, shown
from tests.fuzz.targets import TARGETS

CASES = {"load": 60, "disk": 40, "convert": 30, "calls": 60}  # of a target; others 30


@pytest.fixture
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_damage_ends_in_an_answer_or_in_one_line(runner: Runner, target: str) -> None:
    outcomes: Counter[tuple[str, str, str]] = Counter()
    for seed in range(CASES.get(target, 30)):
        found = runner.run(target, seed)
        assert found["outcome"] != "violation", shown(found)
        outcomes[target, found["mutator"], found["outcome"]] += 1
    refused = sum(n for (*_, kind), n in outcomes.items() if kind in ("noted", "error"))
    assert refused, f"this damages nothing:\n{shares(outcomes)}"


@pytest.mark.slow
def test_a_seed_is_a_case(runner: Runner) -> None:
    first, again = (runner.run("load", 7), runner.run("load", 7))
    assert first["what"] and (first["what"], first["outcome"]) == (again["what"], again["outcome"])
