"""Runs cases in a child process, which may hang or die of one."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any

Found = dict[str, Any]
# An answer; one after a note that something was not used; one line of error; anything else.
OUTCOMES = ("answer", "noted", "error", "violation")


class Runner:
    """One child process, replaced when a case ends it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def run(self, target: str, seed: int) -> Found:
        """The outcome of one case: `outcome` is one of OUTCOMES."""
        child = self._child or self._start()
        assert child.stdin and child.stdout
        try:
            child.stdin.write(f"{target} {seed}\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line.endswith("\n"):
            return json.loads(line)
        self.close()
        self._log.seek(0)
        trace = self._log.read().decode("utf-8", "replace")[-8000:]
        died = {"mutator": "?", "what": "", "trace": f"the process hung or died\n{trace}"}
        return {"target": target, "seed": seed, "outcome": "violation", **died}

    def close(self) -> None:
        """End the child."""
        if self._child is not None and self._child.stdin and self._child.stdout:
            self._child.kill()
            self._child.wait()
            self._child.stdin.close()
            self._child.stdout.close()
        self._child = None

    def _start(self) -> "subprocess.Popen[str]":
        self._log = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        return self._child


def shown(found: Found) -> str:
    """A violation, for a person."""
    again = f"python -m tests.fuzz --target {found['target']} --seed {found['seed']} --cases 1"
    return f"{again}\n{found['mutator']}: {found['what']}\n{found['trace']}"


def shares(outcomes: Counter[tuple[str, str, str]]) -> str:
    """Of each target and mutator how often it ended in which way."""
    rows = sorted({(target, mutator) for target, mutator, _ in outcomes})
    return "\n".join(
        f"{target:8} {mutator:16} "
        + "  ".join(f"{kind} {outcomes[target, mutator, kind]:5}" for kind in OUTCOMES)
        for target, mutator in rows
    )
