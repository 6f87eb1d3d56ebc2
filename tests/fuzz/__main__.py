"""`python -m tests.fuzz --minutes N`: damaged files for as long as one likes."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Lock

from tests.fuzz.runner import Runner, shares, shown
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Run cases, print violations, and count."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long; default 5")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; default 0")
    parser.add_argument("--target", choices=list(TARGETS), help="one alone; default all in turns")
    parser.add_argument("--cases", type=int, help="no more than so many")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default 2")
    options = parser.parse_args()
    targets = [options.target] if options.target else list(TARGETS)
    counts: Counter[tuple[str, str, str]] = Counter()
    ends = time.monotonic() + 60 * options.minutes
    following, lock = _cases(targets, options.seed, options.cases), Lock()

    def work() -> None:
        runner = Runner()
        while time.monotonic() < ends:
            with lock:
                case = next(following, None)
            if case is None:
                break
            found = runner.run(*case)
            with lock:
                counts[found["target"], found["mutator"], found["outcome"]] += 1
                if found["outcome"] == "violation":
                    print(shown(found), flush=True)
                elif options.cases == 1:
                    print(f"{found['mutator']}: {found['what']}\n{found.get('said', '')}")
        runner.close()

    with ThreadPoolExecutor(options.jobs) as pool:
        for job in [pool.submit(work) for _ in range(min(options.jobs, options.cases or 99))]:
            job.result()
    total = Counter[str]()
    for (_, _, outcome), number in counts.items():
        total[outcome] += number
    print(shares(counts))
    print(
        f"{total.total()} cases: {total['answer']} answers, {total['noted']} after a note, "
        f"{total['error']} one-line errors, {total['violation']} violations"
    )
    return 1 if total["violation"] else 0


def _cases(targets: list[str], seed: int, most: int | None) -> Iterator[tuple[str, int]]:
    for number in count() if most is None else range(most):
        yield targets[number % len(targets)], seed + number // len(targets)


if __name__ == "__main__":
    sys.exit(main())
