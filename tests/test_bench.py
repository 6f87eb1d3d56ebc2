"""What is measured is what was asked for: these tokens, from this state, and all of it reported."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pexpect
import pytest

from mlx_kimi import load
from mlx_kimi.errors import KimiError
from mlx_kimi.evaluation import bench as module
from mlx_kimi.evaluation.bench import Bench, BenchRow
from mlx_kimi.generation.answer import Chunk
from mlx_kimi.generation.generate import stream_generate
from mlx_kimi.model import cache as caches
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import Tokenizer
from tests import processes
from tests.processes import ENVIRONMENT, PROGRAM

LIMIT = 4096  # model_max_length of `talker`
TOKENS, REPEATS = 6, 3


@pytest.fixture(scope="module")
def loaded(talker: Path) -> tuple[KimiLinear, Tokenizer]:
    return load(talker)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[Chunk]]]:
    """Prompt and chunks of every answer that a bench takes, in order."""
    seen: list[tuple[list[int], list[Chunk]]] = []

    def recorded(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> Iterator[Chunk]:
        chunks: list[Chunk] = []
        seen.append((prompt, chunks))
        for chunk in stream_generate(model, tokenizer, prompt, **options):
            chunks.append(chunk)
            yield chunk

    monkeypatch.setattr(module, "stream_generate", recorded)
    return seen


def row(**changed: Any) -> BenchRow:
    fields = {
        "context": 100,
        "read_tokens": 40,
        "read_time": 2.0,
        "time_to_first_token": 5.0,
        "token_times": (0.1, 0.4, 0.2),
        "host_times": (0.03, 0.01, 0.02),
        "active_memory": 1,
        "peak_memory": 2,
    }
    return BenchRow(**fields | changed)


# ------------------------------------------------------------------------------------- measurement
@pytest.mark.slow
def test_every_answer_has_the_tokens_that_were_asked_for(loaded, answers) -> None:
    bench = Bench(*loaded, tokens=TOKENS, repeats=REPEATS, prefill_step=16)
    for length in (20, 50):
        bench.row(length)
    lengths = [(len(prompt), len(chunks)) for prompt, chunks in answers]
    warm_up, repeats = (20, 4), [(length + 1, TOKENS) for length in (20, 50) for _ in range(3)]
    assert lengths == [warm_up, (20, 1), *repeats[:3], (50, 1), *repeats[3:]]


@pytest.mark.slow
def test_nothing_is_read_twice(loaded, answers) -> None:
    bench = Bench(*loaded, tokens=TOKENS, repeats=REPEATS)
    assert [bench.row(length).read_tokens for length in (20, 50, 51)] == [20, 30, 1]
    cached = [chunks[-1].stats.cached_tokens for _, chunks in answers[1:]]
    assert cached == [0, 20, 20, 20, 20, 50, 50, 50, 50, 51, 51, 51]


@pytest.mark.slow
def test_every_repeat_answers_as_a_fresh_run_does(loaded, answers) -> None:
    bench = Bench(*loaded, tokens=TOKENS, repeats=REPEATS)
    for length in (20, 50):
        bench.row(length)
    for prompt, chunks in answers:
        fresh = stream_generate(*loaded, prompt, max_tokens=len(chunks))
        assert [chunk.token for chunk in chunks] == [chunk.token for chunk in fresh]


@pytest.mark.slow
def test_the_state_after_a_row_is_that_of_its_context_alone(loaded) -> None:
    model = loaded[0]
    bench = Bench(*loaded, tokens=TOKENS, repeats=REPEATS)
    for length in (20, 300):  # more than one segment of latents
        bench.row(length)
    text, cache = bench._text.start(300), model.make_cache()
    for part in (text[:20], text[20:]):
        model(mx.array([part]), cache)
    left, fresh = caches.arrays(bench._state.entries), caches.arrays(cache)
    assert len(left) == len(fresh)
    for ours, theirs in zip(left, fresh, strict=True):
        assert np.array_equal(np.array(ours), np.array(theirs))


def test_the_text_is_ordinary_and_always_the_same(loaded) -> None:
    texts = [Bench(*loaded)._text for _ in range(2)]
    whole = texts[0].start(5000)
    texts[1].start(3)
    texts[1].start(700)
    assert texts[1].start(5000) == whole
    control = set(loaded[1].control_tokens.values())
    assert set(whole) == set(range(loaded[1].vocab_size)) - control
    assert Bench(*loaded, seed=1)._text.start(100) != whole[:100]


def test_no_token_ends_an_answer(loaded, answers, monkeypatch) -> None:
    monkeypatch.setattr(loaded[1], "stop_ids", frozenset(range(loaded[1].vocab_size)))
    Bench(*loaded, tokens=TOKENS, repeats=1).row(20)
    assert len(answers[-1][1]) == TOKENS
    assert loaded[1].stop_ids, "the caller's tokenizer still has its own"


@pytest.mark.slow
def test_memory_is_that_of_the_row_and_its_context(loaded) -> None:
    processes.live_memory()  # frees what earlier tests left, while nothing is measured
    bench = Bench(*loaded, tokens=TOKENS, repeats=1)
    for length in (20, 50, 2000, 2010):
        mx.eval(mx.zeros((50_000_000,)))  # the peak of before is no row's
        measured = bench.row(length)
        held = sum(array.nbytes for array in caches.arrays(bench._state.entries))
        # Reused buffers are a little too large; states kept of earlier rows would be 0.2 MB more.
        assert held <= measured.active_memory < held + 100_000
        assert measured.peak_memory > bench.weights_memory + measured.active_memory
        assert measured.peak_memory < 200_000_000


def test_times_of_rows_add_up_to_the_first_token(loaded) -> None:
    bench = Bench(*loaded, tokens=TOKENS, repeats=1)
    rows = [bench.row(length) for length in (20, 50, 90)]
    for count in (1, 2, 3):
        total = sum(r.read_time for r in rows[:count])
        assert rows[count - 1].time_to_first_token == pytest.approx(total)


@pytest.mark.alone
@pytest.mark.parametrize("busy", [True, False], ids=["working", "waiting"])
def test_what_bounds_a_token_is_named(loaded, monkeypatch, busy: bool) -> None:
    logits = KimiLinear.logits

    def slow(model: KimiLinear, hidden: mx.array) -> mx.array:
        """The host's work takes longer than the device; or the host waits, as for a device."""
        clock = time.thread_time if busy else time.monotonic
        end = clock() + 0.1
        while clock() < end:
            time.sleep(0 if busy else 0.1)
        return logits(model, hidden)

    monkeypatch.setattr(KimiLinear, "logits", slow)
    measured = Bench(*loaded, tokens=4, repeats=2).row(20)
    assert len(measured.token_times) == len(measured.host_times) == 2
    if busy:
        assert measured.host_time >= 0.1
    else:
        assert measured.bound_by == "device" and measured.host_time < 0.05


def test_numbers_of_a_row() -> None:
    assert row().prompt_speed == 20
    assert row().token_time == 0.2 and row().generation_speed == 5
    assert row().spread == pytest.approx(0.75)
    assert row(token_times=(0.1,)).spread == 0
    assert row().host_time == 0.02 and row().bound_by == "device"
    assert row(host_times=(0.19,)).bound_by == "host"


def test_progress_counts_what_is_read_and_generated(loaded) -> None:
    seen: list[tuple[str, int, int]] = []
    bench = Bench(*loaded, tokens=TOKENS, repeats=2, prefill_step=16)
    bench.row(20, lambda *now: seen.append(now))
    reading = [("reading", 0, 20), ("reading", 16, 20)]
    assert seen == [*reading, ("generating", 0, 12), ("generating", 6, 12)]


def test_a_row_needs_a_longer_context_that_fits(loaded) -> None:
    bench = Bench(*loaded, tokens=2, repeats=1)
    bench.row(20)
    with pytest.raises(ValueError, match="must be above 20 but is 20"):
        bench.row(20)
    with pytest.raises(KimiError, match="from 1 to 4,093 tokens but has 4,094"):
        bench.row(LIMIT - 2)


@pytest.mark.slow
def test_the_longest_context_is_measured(loaded, answers) -> None:
    Bench(*loaded, tokens=2, repeats=1).row(LIMIT - 3)
    assert len(answers[-1][0]) == LIMIT - 2 and len(answers[-1][1]) == 2


# ------------------------------------------------------------------------------------- the command
run = partial(processes.run, "bench")


def contexts_of(table: str) -> list[str]:
    """The first column below the titles."""
    lines = table.splitlines()
    below = next(i for i, line in enumerate(lines) if line.startswith("  context")) + 1
    return [line.split()[0] for line in lines[below:]]


@pytest.mark.slow
def test_the_pocket_model_is_measured_in_80_columns() -> None:
    done = run("--contexts", "1500,16,64", "--tokens", "4", "--repeats", "2")
    assert done.returncode == 0, done.stderr
    assert contexts_of(done.stdout) == ["16", "64", "1,500"]
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.startswith("pocket, 4 bits")
    assert done.stderr == "", "no bar where there is no terminal"


@pytest.mark.slow
def test_json_holds_everything(talker: Path, tmp_path: Path) -> None:
    options = ("--contexts", "16,64", "--tokens", "4", "--repeats", "3", "--prefill-step", "8")
    done = run("-m", talker, *options, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    assert contexts_of(done.stdout) == ["16", "64"]
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["complete"] is True
    assert report["settings"] == {
        "tokens": 4,
        "repeats": 3,
        "prefill_step": 8,
        "speculate": "off",
        "slots": None,
    }
    assert report["model"]["name"] == str(talker) and report["model"]["quantization"] is None
    assert report["model"]["model_max_length"] == LIMIT
    assert set(report["versions"]) == {"mlx_kimi", "mlx", "python"}
    assert {"system", "device", "device_name", "kernels"} <= set(report["machine"])
    for measured, (context, read) in zip(report["rows"], ((16, 16), (64, 48)), strict=True):
        assert (measured["context"], measured["read_tokens"]) == (context, read)
        assert len(measured["token_times"]) == len(measured["host_times"]) == 3
        assert measured["prompt_tokens_per_second"] == read / measured["read_time"]
        middle = sorted(measured["token_times"])[1]
        assert measured["generation_tokens_per_second"] == 1 / middle
        assert measured["token_time"] == middle
        assert measured["bound_by"] in ("host", "device")
        assert 0 < measured["active_memory"] < measured["peak_memory"]


@pytest.mark.slow
def test_json_has_stdout_for_itself(talker: Path) -> None:
    done = run("-m", talker, "--contexts", "16", "--tokens", "2", "--repeats", "1", "--json", "-")
    assert [measured["context"] for measured in json.loads(done.stdout)["rows"]] == [16]
    assert contexts_of(done.stderr) == ["16"]


@pytest.mark.slow
def test_a_terminal_shows_progress_and_a_file_gets_the_rows(talker: Path, tmp_path: Path) -> None:
    options = f"-m {talker} --contexts 16,64 --tokens 3 --repeats 2 > {tmp_path / 'rows'}"
    command = f"{' '.join(PROGRAM)} bench {options}"
    terminal = pexpect.spawn("sh", ["-c", command], env=ENVIRONMENT, encoding="utf-8", timeout=60)
    terminal.expect("context 16: reading")
    terminal.expect("context 64: generating")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert contexts_of((tmp_path / "rows").read_text()) == ["16", "64"]


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml")])
def test_a_plot_is_drawn(talker: Path, tmp_path: Path, suffix: str, start: bytes) -> None:
    file = tmp_path / f"speeds{suffix}"
    done = run(
        "-m", talker, "--contexts", "16,64", "--tokens", "3", "--repeats", "2", "--plot", file
    )
    assert done.returncode == 0, done.stderr
    assert file.read_bytes().startswith(start)
    if suffix == ".svg":
        assert "tokens a second" in file.read_text()


@pytest.mark.slow
def test_ctrl_c_keeps_the_rows_that_were_finished(talker: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ["--contexts", "16,3000", "--prefill-step", "1", "--json", str(file)]
    with subprocess.Popen(
        [*PROGRAM, "bench", "-m", str(talker), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while not (lines and lines[-1].split()[:1] == ["16"]):
            lines.append(process.stdout.readline())
            assert lines[-1], "the program ended by itself"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest == "" and errors.strip() == ""
    report = json.loads(file.read_text())
    assert report["complete"] is False
    assert [measured["context"] for measured in report["rows"]] == [16]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--contexts", "16,many"), 2, "--contexts must be numbers of tokens with commas between"),
        (("--contexts", ""), 2, "numbers of tokens with commas between them but is ''"),
        (("--contexts", "0"), 1, "a context must have from 1 to 3,967 tokens but has 0"),
        (("--contexts", "16,4096"), 1, "from 1 to 3,967 tokens but has 4,096: the model's context"),
        (("--tokens", "1"), 2, "--tokens must be at least 2 but is 1"),
        (("--repeats", "0"), 2, "--repeats must be at least 1 but is 0"),
        (("--prefill-step", "0"), 2, "--prefill-step must be from 1 to 65,536 but is 0"),
        (("--plot", "speeds.txt"), 2, "--plot must end in .png or .svg but is speeds.txt"),
        (("--json", "no/such/rows.json"), 1, "no/such must be a folder that can be written"),
        (("--plot", "no/such/plot.png"), 1, "no/such must be a folder that can be written"),
    ],
)
def test_a_mistake_is_one_clear_line(
    talker: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = run("-m", talker, *arguments)
    assert done.returncode == code
    assert done.stdout == "" and said in done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_is_there_is_not_written_over(tmp_path: Path, option: str) -> None:
    file = tmp_path / "speeds.png"
    file.write_text("mine")
    done = run("-m", "no-model", option, file)
    assert done.returncode == 1 and file.read_text() == "mine"
    assert f"{file}: already exists; remove it or choose another name" in done.stderr


@pytest.mark.slow
def test_without_matplotlib_one_line_says_what_to_install(talker: Path, tmp_path: Path) -> None:
    script = (
        "import importlib.util as util; found = util.find_spec; "
        "util.find_spec = lambda name, *rest: None if name == 'matplotlib' else found(name, *rest);"
        "from mlx_kimi.cli.main import cli; cli()"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "bench",
        "-m",
        str(talker),
        "--plot",
        str(tmp_path / "speeds.png"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pip install 'mlx_kimi[plot]'" in done.stderr and done.stderr.count("\n") == 1
