"""Kernels are tried on the GPU at hand, in a child process, and what was found out is a file."""

import dataclasses
import json
import math
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest
from click.testing import CliRunner

from mlx_kimi import backend
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.cli import tune as command
from mlx_kimi.cli.main import cli
from mlx_kimi.loading import load
from mlx_kimi.metal_kernels import tuning as kernel_tuning
from mlx_kimi.metal_kernels.kda_decode import KERNEL as KDA_DECODE
from mlx_kimi.metal_kernels.kernel import not_running, use_backend
from mlx_kimi.metal_kernels.tuning import (
    BASE,
    NO_KERNELS,
    NVIDIA,
    Choices,
    ExpertForm,
    tuning,
)
from mlx_kimi.tuning import probe, stored, tune
from mlx_kimi.tuning.events import Chosen, Done, Note, Off
from mlx_kimi.tuning.probe import PAIRS, Probe, form_at, with_forms
from mlx_kimi.tuning.sample import Case, Limits
from mlx_kimi.tuning.stored import Stored, key_of, path_of
from tests.checkpoints import TINY
from tests.emulated import emulator
from tests.processes import run
from tests.test_metal_texts import NAMES

EVENTS = (
    """read request; echo '{"event": "Trying", "kernel": "add_norm"}'; read go;"""
    """ echo '{"event": "Trying", "kernel": null}';"""
    f""" echo '{json.dumps({"event": "Chosen", "tuning": BASE})}'; echo '{{"event": "Done"}}'"""
)
SMALL = Limits(tokens=16, positions=40, repeats=0)
CONFIG = ModelConfig.from_json(TINY)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_KIMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_tuning, "backend", lambda: emulator)  # a digest is of kernels
    return tmp_path / "cache"


def worker(*fault: str) -> list[str]:
    return [sys.executable, "-m", "tests.planted_worker", *fault]


def tried(folder: Path, *fault: str, **how: Any) -> Stored:
    return tune.tune(
        folder, CONFIG, mx.float32, lambda _: None, limits=SMALL, worker=worker(*fault), **how
    )


# ------------------------------------------------------------------------------ faults in a child
HANGS = 6.0  # seconds; what does not hang has the usual 20, for a machine that others use
FAULTS = {
    "refused": "error: no such 'x'",
    "throws": "LU factorization failed",
    "wrong": "results are 1.0e-02 off, more than 1.0e-04",
    "crashes": "its process ended with signal 11",
    "hangs": f"it did not return within {HANGS:.0f} s",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kernel", ["add_norm", "expert_combine"])
def test_a_kernel_with_a_fault_is_off_and_all_others_run(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, fault: str, kernel: str
) -> None:
    if fault == "hangs":
        monkeypatch.setattr(tune, "HANGS", HANGS)
    found = tried(folder("tiny"), fault, kernel)
    assert found.complete and list(found.off) == [kernel] and FAULTS[fault] in found.off[kernel]
    start = time.perf_counter()
    again = Stored.read(found.key)
    assert again == found, "the second start reads a file"
    assert time.perf_counter() - start < 0.1
    assert tried(folder("tiny"), "crashes", "kda_decode") == found, "nothing is tried again"


@pytest.mark.slow
def test_without_a_fault_nothing_is_off(folder: Callable[..., Path]) -> None:
    found = tried(folder("tiny"))
    assert not found.off and found.tuning == tuning()
    assert found.choices.digest == Choices.default().digest


def test_a_kernel_that_never_returned_is_left_out_at_the_next_start(
    folder: Callable[..., Path],
) -> None:
    """The whole program, or the machine, went down with it: only its mark is left."""
    before = Stored.new(key_of(CONFIG, mx.float32))
    before.trying = "kda_decode"
    before.write()
    found = tried(folder("tiny"), "crashes", "kda_decode")
    assert found.off == {
        "kda_decode": "it did not return when it first ran here; `mlx_kimi tune` tries it again"
    }
    assert not Stored.read(found.key).trying  # type: ignore[union-attr]


@pytest.mark.slow
def test_its_mark_is_on_the_disk_before_a_kernel_runs(folder: Callable[..., Path]) -> None:
    program = (
        "import sys, mlx.core as mx; from pathlib import Path; from tests.test_tune import *\n"
        "tried(Path(sys.argv[1]), 'hangs', 'expert_order')"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(folder("tiny"))])
    key, limit = key_of(CONFIG, mx.float32), time.monotonic() + 60
    while time.monotonic() < limit:
        known = Stored.read(key)
        if known and known.trying == "expert_order":
            break
        time.sleep(0.05)
    child.kill()
    child.wait()
    known = Stored.read(key)
    assert known and known.trying == "expert_order" and not known.complete


@pytest.mark.slow
def test_ctrl_c_blames_no_kernel(folder: Callable[..., Path]) -> None:
    def interrupt(kernel: str) -> None:
        if kernel == "expert_order":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.tune(folder("tiny"), CONFIG, mx.float32, interrupt, limits=SMALL, worker=worker())
    known = Stored.read(key_of(CONFIG, mx.float32))
    assert known and not known.complete and not known.trying and not known.off


def test_measuring_ends_when_time_is_over_and_keeps_what_was_chosen(
    folder: Callable[..., Path],
) -> None:
    """A worker that would measure for ever, in the midst of a kernel that has not returned yet."""
    chosen = BASE._replace(splits=7)
    events = [
        {"event": "Trying", "kernel": "add_norm"},
        {"event": "Trying", "kernel": None},
        {"event": "Chosen", "tuning": chosen},
        {"event": "Trying", "kernel": "mla_attend"},
    ]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    program = f"import time\nprint({lines!r}, end='', flush=True)\n"
    start = time.perf_counter()
    found = tune.tune(
        *(folder("tiny"), CONFIG, mx.float32, lambda _: None),
        seconds=1.0,
        worker=[sys.executable, "-c", program + "time.sleep(60)"],
    )
    assert time.perf_counter() - start < 5
    assert found.complete and found.tuning == chosen and not found.off and not found.trying
    assert found.notes == ["time was over; what is not listed was not measured"]
    assert Stored.read(found.key) == found


@pytest.mark.parametrize(
    "command", [[sys.executable, "-c", "raise SystemExit(3)"], ["/no/such/program"]]
)
def test_a_worker_that_cannot_run_is_said_and_tried_at_the_next_starts(
    folder: Callable[..., Path], command: list[str]
) -> None:
    for attempt in range(1, 4):
        found = tune.tune(*(folder("tiny"), CONFIG, mx.float32, lambda _: None), worker=command)
        assert not found.off and not found.proven and found.complete == (attempt == 3)
        assert any("its process ended" in note or "cannot be st" in note for note in found.notes)


def test_a_kernel_runs_only_once_its_mark_is_on_the_disk(folder: Callable[..., Path]) -> None:
    """A worker that names kernels without end is held at the first."""
    seen = []

    def show(kernel: str) -> None:
        known = Stored.read(key_of(CONFIG, mx.float32))
        seen.append((kernel, known and known.trying))

    program = (
        "import json, sys\n"
        "sys.stdin.readline()\n"
        "for i in range(20):\n"
        "    print(json.dumps({'event': 'Trying', 'kernel': f'k{i}'}), flush=True)\n"
        "    open(sys.argv[1], 'a').write(sys.stdin.readline() and 'x')\n"
        "print(json.dumps({'event': 'Done'}), flush=True)"
    )
    told = folder("tiny").parent / "told"
    tune.tune(
        *(folder("tiny"), CONFIG, mx.float32, show),
        worker=[sys.executable, "-c", program, str(told)],
    )
    assert seen == [(f"k{i}", f"k{i}") for i in range(20)]
    assert len(told.read_text()) == 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_blames_no_kernel_and_leaves_no_child(
    folder: Callable[..., Path], number: int, tmp_path: Path
) -> None:
    program = (
        "import sys, mlx.core as mx; from pathlib import Path; from tests.test_tune import *\n"
        "tried(Path(sys.argv[1]), 'hangs', 'add_norm')"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(folder("tiny"))])
    key, limit = key_of(CONFIG, mx.float32), time.monotonic() + 60
    while not ((known := Stored.read(key)) and known.trying) and time.monotonic() < limit:
        time.sleep(0.05)
    (child,) = psutil.Process(parent.pid).children()
    parent.send_signal(number)
    assert parent.wait(20) == 128 + number
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    known = Stored.read(key)
    assert known and not known.trying and not known.off and not known.complete


def test_a_child_without_a_parent_ends_even_in_a_kernel_that_hangs(
    folder: Callable[..., Path],
) -> None:
    request = {"folder": str(folder("tiny")), "dtype": "float32", "off": {}}
    request["limits"] = dataclasses.asdict(SMALL)
    child = subprocess.Popen(
        worker("hangs", "add_norm"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin and child.stdout
    child.stdin.write(json.dumps(request).encode() + b"\n\n")
    child.stdin.flush()
    assert json.loads(child.stdout.readline())["kernel"] == "add_norm"
    child.stdin.close()
    assert child.wait(20) == 1
    child.stdout.close()


def test_two_at_once_wait_for_each_other(folder: Callable[..., Path]) -> None:
    """The second took the first one's mark for a kernel that had never returned."""
    first_began, result = threading.Event(), []

    def show(kernel: str) -> None:
        first_began.set()
        time.sleep(0.5)

    def first() -> None:
        result.append(
            tune.tune(*(folder("tiny"), CONFIG, mx.float32, show), worker=["sh", "-c", EVENTS])
        )

    thread = threading.Thread(target=first)
    thread.start()
    first_began.wait()
    second = tune.tune(
        *(folder("tiny"), CONFIG, mx.float32, lambda _: None), worker=["/no/such/program"]
    )
    thread.join()
    assert second == result[0] and second.proven and not second.off


def test_lack_of_memory_blames_no_kernel(folder: Callable[..., Path]) -> None:
    found = tried(folder("tiny"), "no memory", "kda_decode")
    assert not found.off and not found.proven and not found.complete
    assert found.notes == ["[malloc] Unable to allocate 7 bytes."]


def test_what_has_not_returned_does_not_run_without_tuning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = Stored.new(key_of(CONFIG, mx.float32))
    before.trying = "kda_decode"
    before.write()
    assert list(tune.known_choices(CONFIG, mx.float32).off) == ["kda_decode"]


# ------------------------------------------------------------------------------------- the file
@pytest.mark.parametrize("how", ["cut", "empty", "no JSON", "foreign", "older", "wrong type"])
def test_a_file_that_is_damaged_foreign_or_older_is_no_answer(how: str) -> None:
    known = Stored.new(key_of(CONFIG, mx.float32))
    known.off["kda_decode"] = "a reason"
    known.write()
    assert Stored.read(known.key) == known
    path = path_of(known.key)
    text, value = path.read_text(), json.loads(path.read_text())
    path.write_text(
        {
            "cut": text[: len(text) // 2],
            "empty": "",
            "no JSON": "\0" * 100,
            "foreign": json.dumps(value | {"key": known.key | {"gpu": "another"}}),
            "older": json.dumps(value | {"format": 0}),
            "wrong type": json.dumps(value | {"tuning": [1, 2, 3]}),
        }[how]
    )
    assert Stored.read(known.key) is None


def test_another_gpu_mlx_text_or_model_has_a_file_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = [key_of(CONFIG, mx.float32), key_of(CONFIG, mx.bfloat16)]
    wider = dataclasses.replace(CONFIG, moe_intermediate_size=128)
    keys.append(key_of(wider, mx.float32))
    monkeypatch.setattr(stored, "version", lambda _: "9.9")
    keys.append(key_of(CONFIG, mx.float32))
    monkeypatch.setattr(stored, "_texts", lambda: "another")
    keys.append(key_of(CONFIG, mx.float32))
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "another"})
    keys.append(key_of(CONFIG, mx.float32))
    assert len({path_of(key) for key in keys}) == len(keys)


def test_a_folder_that_cannot_be_written_is_no_error(
    own_folder: Path, folder: Callable[..., Path]
) -> None:
    own_folder.write_text("a file where the folder should be")
    Stored.new(key_of(CONFIG, mx.float32)).write()
    assert Stored.read(key_of(CONFIG, mx.float32)) is None


def test_every_choice_survives_the_file() -> None:
    for tuned in (BASE, NVIDIA, NVIDIA._replace(experts=(ExpertForm(0.5, "MLX"),), columns=16)):
        known = Stored(key_of(CONFIG, mx.float32), tuned, off={"a": "b"}, notes=["c"])
        known.write()
        assert Stored.read(known.key) == known


# -------------------------------------------------------------------------------- what is chosen
class Pretended(Probe):
    """Times of its own, with noise: by a rule for a case and its choices."""

    def __init__(
        self, rule: Callable[[Case, Choices], float], seed: int, noise: float = 0.01
    ) -> None:
        self.events: list[Any] = []
        self.rule, self.random, self.noise = rule, random.Random(seed), noise
        limits = dataclasses.replace(SMALL, tokens=2048, repeats=7)
        super().__init__(CONFIG, mx.float32, {}, limits, self.events.append)

    def _first_run(self, run: Any, choices: Choices) -> Any:
        case = run.args[0]
        launched = {"kda": "kda_decode", "mla": "mla_attend", "experts": "expert_combine"}[
            case.half
        ]
        return [], [] if launched in choices.off else [launched], {}

    def _allowed(self, case: Case, dtype: mx.Dtype) -> None:
        return None

    def _seconds(self, case: Case, choices: Choices, queued: int) -> float:
        return self.rule(case, choices) * math.exp(self.random.gauss(0, self.noise))

    def chosen(self) -> Choices:
        self.run()
        assert isinstance(self.events[-1], Done) and isinstance(self.events[-2], Chosen)
        off = {event.kernel: event.why for event in self.events if isinstance(event, Off)}
        return Choices(self.events[-2].tuning, off)


def test_defaults_stay_unless_they_are_clearly_beaten() -> None:
    def all_alike(case: Case, choices: Choices) -> float:
        return 1e-3 * (0.97 if choices.tuning.columns == 16 or choices.off else 1.0)

    for seed in range(10):
        assert Pretended(all_alike, seed).chosen().digest == Choices.default().digest


def test_what_is_clearly_faster_is_chosen_and_ten_runs_choose_the_same() -> None:
    def rule(case: Case, choices: Choices) -> float:
        here, time = choices.tuning, 1e-3
        if case.half == "mla" and not case.packed and case.tokens == 1:
            time *= {24: 1.0, 60: 0.7, 120: 0.69, 160: 0.9}[here.splits]
        if case.half == "kda":
            time *= 0.8 if here.columns == 16 else 1
            time *= 0.5 if "kda_decode" in choices.off else 1
        if case.half == "experts" and case.tokens > here.largest_batch:
            time *= 0.5 if form_at(here.experts, case.tokens / 4).kernels == "MLX" else 1
        return time

    found = [Pretended(rule, seed).chosen() for seed in range(10)]
    assert len({choices.digest for choices in found}) == 1
    assert found[0].tuning.splits == 60, "the first of those near the best"
    assert found[0].tuning.columns == 16
    forms = found[0].tuning.experts
    assert [form_at(forms, p).kernels for p in (3, 4, 9, 500)] == ["vectors", "MLX", "MLX", "MLX"]
    assert list(found[0].off) == ["kda_decode"]
    assert found[0].off["kda_decode"].endswith("times as fast here")


def test_what_is_nearly_enough_is_measured_until_it_is_sure() -> None:
    def rule(case: Case, choices: Choices) -> float:
        faster = 1.12 if choices.tuning.splits == 60 and case.half == "mla" else 1.0
        return 1e-3 / faster / (1.05 if choices.tuning.columns == 16 else 1.0)

    found = [Pretended(rule, seed, noise=0.035).chosen().tuning for seed in range(20)]
    assert {(tuned.splits, tuned.columns) for tuned in found} == {(60, BASE.columns)}


def test_a_time_that_is_told_is_that_of_the_tokens_that_are_named() -> None:
    def rule(case: Case, choices: Choices) -> float:
        return 1e-3 * case.tokens * pretended.sample.rounds(case)

    pretended = Pretended(rule, 0, noise=0)
    pretended.run()
    told = [e.text for e in pretended.events if isinstance(e, Note) and " ms; " in e.text]
    named = [re.search(r", (\d+) tokens?.*: (\d+)\.000 ms; ", text) for text in told]
    assert {(found[1], found[2]) for found in named if found} >= {("6", "6"), ("16", "16")}
    assert all(found and found[1] == found[2] for found in named)


def test_every_kernel_belongs_to_one_operator() -> None:
    names = [name for operator in probe.OPERATORS for name in operator]
    assert sorted(names) == sorted(NAMES)


@pytest.mark.parametrize("default", [BASE.experts, NVIDIA.experts])
def test_forms_change_where_others_were_chosen_and_nowhere_else(
    default: tuple[ExpertForm, ...],
) -> None:
    rng = random.Random(0)
    for _ in range(300):
        other = {p: ExpertForm(0, "MLX") for p in PAIRS if rng.random() < 0.4}
        found = with_forms(default, list(other.items()))
        assert found[0].pairs_from == 0
        assert [f.pairs_from for f in found] == sorted({f.pairs_from for f in found})
        for pairs in (0.1, *PAIRS, *(1.4 * p for p in PAIRS), 3.3, 3.9, 7.0, 1000):
            measured = max((p for p in PAIRS if p <= pairs), default=PAIRS[0])
            expected = other.get(measured, form_at(default, pairs))
            assert form_at(found, pairs)[1:] == expected[1:], (pairs, other)


# ---------------------------------------------------------------------------------- what it means
def test_choices_hold_within_and_the_digest_is_of_what_runs() -> None:
    changed = BASE._replace(splits=7)
    choices = Choices(changed, {"kda_decode": "too slow"})
    with use_backend(emulator):
        with choices.use():
            assert tuning() == changed
            assert not_running(KDA_DECODE) == "kda_decode is off: too slow"
        assert tuning() != changed and not_running(KDA_DECODE) is None
    same = Choices(changed, {"kda_decode": "another reason"})
    assert same.digest == choices.digest != NO_KERNELS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_tuning, "backend", lambda: None)
        assert choices.digest == NO_KERNELS
    others = [Choices(changed), Choices(BASE, choices.off), Choices(changed, {"add_norm": ""})]
    assert len({choices.digest, *(other.digest for other in others)}) == 4


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU, whose first load tries its kernels, with the emulator in its place."""
    monkeypatch.delenv("MLX_KIMI_NO_TUNE")
    monkeypatch.setattr(load, "is_traced", lambda: True)
    monkeypatch.setattr(tune, "WORKER", worker("refused", "kda_decode"))
    monkeypatch.setattr(tune.tune, "__kwdefaults__", None)
    monkeypatch.setattr(tune.tune, "__defaults__", (False, 600.0, SMALL, tune.WORKER))
    with use_backend(emulator):
        yield


@pytest.mark.slow
def test_the_first_load_tries_the_kernels_says_so_and_the_second_does_not(
    on_a_gpu: None, folder: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model = load.load_model(folder("tiny"))
    said = capfd.readouterr().err
    assert said.startswith("trying the kernels on this GPU, once")
    assert "kda_decode is off: error: no such 'x'" in said
    assert list(model.choices.off) == ["kda_decode"]
    again = load.load_model(folder("tiny"))
    assert not capfd.readouterr().err
    assert again.choices.digest == model.choices.digest
    listed = load.load_model(folder("tiny"), lazy=True)
    with listed.choices.use():
        rows = listed.layers[0].self_attn.implementations()
    assert rows[0] == ("1 token", "ops form", "kda_decode is off: error: no such 'x'")


def test_without_tuning_the_defaults_run(
    on_a_gpu: None,
    folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLX_KIMI_NO_TUNE", "1")
    model = load.load_model(folder("tiny"))
    assert model.choices == Choices.default() and not capfd.readouterr().err


# ------------------------------------------------------------------------------ versions, commands
@pytest.mark.parametrize(
    ("installed", "newer"),
    [("0.32.4", False), ("0.32.3", False), ("0.32.10", True), ("0.33.0.dev1", True), ("1.0", True)],
)
def test_an_mlx_beyond_what_was_tried_is_named(
    monkeypatch: pytest.MonkeyPatch, installed: str, newer: bool
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: installed)
    said = backend.untried()
    assert (said is not None) == newer
    assert said is None or said.startswith(f"MLX {installed} is newer than 0.32.4")


def test_the_newest_that_was_tried_is_installed_here() -> None:
    """Else `NEWEST_TRIED` is to be raised, once all tests pass."""
    assert backend.untried() is None


def test_tune_says_that_no_kernels_run_on_a_cpu() -> None:
    found = run("tune")
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr == (
        "Error: no kernels run here: there is no GPU, or MLX_KIMI_NO_KERNELS is set\n"
    )


@pytest.mark.slow
def test_tune_prints_what_it_found_and_keeps_it(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fault = partial(tune.tune, worker=worker("refused", "add_norm"), limits=SMALL)
    monkeypatch.setattr(command, "tune", with_fault)
    with use_backend(emulator):
        found = CliRunner().invoke(cli, ["tune", "-m", str(folder("tiny"))])
    assert found.exit_code == 0, found.output
    assert "off           add_norm: error: no such 'x'\n" in found.stdout
    assert "splits        24\n" in found.stdout
    assert "experts       from 3.3 tokens of an expert: tiles of 32 tokens\n" in found.stdout
    known = Stored.read(key_of(CONFIG, mx.float32))
    assert known and f"choices       {known.choices.digest}\n" in found.stdout
    assert f"kept in {path_of(known.key)}\n" in found.stdout
