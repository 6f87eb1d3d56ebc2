"""The program as its users run it: real processes, pipes, signals and a terminal."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.cli import generate, info
from mlx_kimi.cli.main import cli
from mlx_kimi.generation.answer import Chunk
from mlx_kimi.generation.generate import stream_generate
from mlx_kimi.loading.load import load_model
from mlx_kimi.metal_kernels.kernel import use_backend
from mlx_kimi.metal_kernels.tuning import BASE, Choices
from tests import processes
from tests.emulated import emulator
from tests.processes import ENVIRONMENT, PROGRAM

PROMPT = "Which words are names?"


run = partial(processes.run, stdin=b"")


def generated(talker: Path, *arguments: str, stdin: bytes = b"") -> str:
    done = run("generate", "--model", talker, *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


# ---------------------------------------------------------------------------------------- answers
@pytest.mark.slow
def test_stdout_is_the_answer_and_stderr_the_speeds(talker: Path) -> None:
    done = run("generate", "--model", talker, PROMPT, "--max-tokens", "5")
    asked = json.loads(generated(talker, PROMPT, "--max-tokens", "5", "--json"))
    assert done.stdout.decode() == asked["text"] + "\n"
    cut, line = done.stderr.decode().splitlines()
    assert cut == "the answer is cut at --max-tokens 5"
    for part in ("prompt", "answer 5 tokens", "tok/s", "first token", "peak memory"):
        assert part in line


@pytest.mark.slow
def test_an_answer_is_json_of_a_schema(talker: Path, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}')
    said = json.loads(generated(talker, PROMPT, "--json-schema", str(file), "--temp", "1"))
    assert isinstance(said, list) and set(said) <= {"a", "b"}
    file.write_text('{"type": "array", "uniqueItems": true}')
    done = run("generate", "--model", "no such model", PROMPT, "--json-schema", str(file))
    said = 'Error: --json-schema cannot be enforced: Unimplemented keys: ["uniqueItems"]\n'
    assert done.returncode == 2 and done.stderr.decode() == said
    file.write_text("[]")
    done = run("generate", "--model", "no such model", PROMPT, "--json-schema", str(file))
    assert "schema.json: must be a JSON object" in done.stderr.decode()


@pytest.mark.slow
def test_no_compiler_is_started(talker: Path, tmp_path: Path) -> None:
    """MLX would keep what it compiles for a CPU in the folder of temporary files."""
    done = run(
        *("generate", "--model", talker, PROMPT * 20, "--max-tokens", "3"),
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert not list(tmp_path.rglob("*"))


@pytest.mark.slow
def test_json_is_one_object_with_everything(talker: Path) -> None:
    answer = json.loads(generated(talker, PROMPT, "--max-tokens", "9", "--json"))
    assert len(answer["token_ids"]) == answer["generated_tokens"] == 9
    assert answer["finish_reason"] == "length"
    for field in ("text", "prompt_tokens", "time_to_first_token", "peak_memory", "seed"):
        assert field in answer
    speed = answer["generation_tokens_per_second"]
    assert speed == pytest.approx(8 / answer["decode_time"])


@pytest.mark.slow
def test_a_few_tokens_tell_no_speed(talker: Path) -> None:
    answer = json.loads(generated(talker, PROMPT, "--max-tokens", "2", "--json"))
    assert answer["generated_tokens"] == 2
    assert answer["generation_tokens_per_second"] is None


@pytest.mark.slow
def test_stdin_is_the_prompt_when_it_is_a_dash(talker: Path) -> None:
    prompt = "多行\nprompt 🎉"
    typed = generated(talker, prompt, "--max-tokens", "8")
    assert generated(talker, "-f", "-", "--max-tokens", "8", stdin=prompt.encode()) == typed


@pytest.mark.slow
def test_options_reach_the_model(talker: Path) -> None:
    def tokens(*options: str) -> list[int]:
        text = generated(talker, PROMPT, "--max-tokens", "9", "--json", *options)
        return json.loads(text)["token_ids"]

    plain = tokens()
    assert tokens("--system", "be brief") != plain
    assert tokens("--raw") != plain
    assert tokens("--temp", "2", "--seed", "7") == tokens("--temp", "2", "--seed", "7") != plain
    assert tokens("--temp", "2", "--seed", "7", "--top-k", "1") == plain
    assert tokens("--temp", "2", "--seed", "7", "--top-p", "0.001") == plain
    assert tokens("--temp", "2", "--seed", "7", "--min-p", "1") == plain
    assert tokens("--repetition-penalty", "0.01") != plain
    assert tokens("--prefill-step", "2") == plain
    assert tokens("--latent-bits", "8") == plain  # a short prompt is all tail, which stays as it is
    done = run("generate", "--model", talker, PROMPT, "--latent-bits", "4")
    assert done.returncode == 2 and b"--latent-bits must be 8" in done.stderr


@pytest.mark.slow
def test_check_finds_a_random_model_whole(talker: Path) -> None:
    done = run("check", "-m", talker)
    assert done.returncode == 0, done.stderr
    assert b"FAILED" not in done.stdout


@pytest.mark.slow
def test_check_fails_where_a_golden_does(talker: Path, tmp_path: Path) -> None:
    for file in talker.iterdir():
        (tmp_path / file.name).symlink_to(file)
    goldens = {"texts": {"Hello": [1]}, "chats": {}, "answers": {"hi": "certainly not this"}}
    (tmp_path / "goldens.json").write_text(json.dumps(goldens))
    done = run("check", "-m", tmp_path)
    assert done.returncode == 1
    assert done.stdout.count(b"FAILED") == 2
    assert b"2 checks failed" in done.stderr


@pytest.mark.slow
def test_info_says_what_a_model_is_and_what_runs_it() -> None:
    facts = run("info").stdout.decode()
    assert "6 KDA and 2 MLA layers" in facts and "4 bits" in facts
    kernels = run("info", "--kernels").stdout.decode()
    assert kernels.startswith("MLX's own operations run everything on this CPU: our kernels")
    assert kernels.count("\n") == 1


def test_the_table_of_kernels_is_one_and_says_what_is_fast() -> None:
    model = load_model(pocket_folder(), lazy=True)
    with use_backend(emulator):
        model.choices = Choices(BASE, {"kda_decode": "it hung"})
        table = "\n".join(info._kernels(model))
    assert table.count("tokens at a time") == 1
    for part, layers in (("KDA", 6), ("experts", 7), ("MLA", 2)):
        assert table.count(f"\n{part}, {layers} layers") == 1
    assert re.search(r"^KDA, 6 layers +1 token +slow  kda_decode is off: it hung$", table, re.M)
    assert re.search(r"^MLA, 2 layers +1 to 8 tokens +fast  mla_query, mla_attend", table, re.M)


# ----------------------------------------------------------------------------------- early endings
@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(talker: Path) -> None:
    command = [*PROGRAM, "generate", "--model", str(talker), PROMPT, "--max-tokens", "3000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


@pytest.mark.slow
def test_ctrl_c_ends_quietly(talker: Path) -> None:
    command = [*PROGRAM, "generate", "--model", str(talker), PROMPT, "--max-tokens", "4000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors.strip() == b""


@pytest.mark.slow
@pytest.mark.parametrize("imported", ["click.core", "mlx_kimi.cli.grammar", "numpy", "tiktoken"])
def test_ctrl_c_while_python_imports_is_no_traceback(imported: str) -> None:
    """Python says on stderr when each module is there."""
    command = [sys.executable, "-X", "importtime", *PROGRAM[1:], "generate", "hi"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rstrip().endswith(f" {imported}"):
                process.send_signal(signal.SIGINT)
                break
        answer, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and answer == ""
    said = [line for line in errors.splitlines() if line and not line.startswith("import time:")]
    assert not said


@pytest.mark.parametrize("tokens", [0, 3])
def test_json_of_an_interrupted_answer_holds_what_there_is(
    tokens: int, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Iterator[Chunk]:
        yield from islice(stream_generate(*arguments, **options), tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream_generate", interrupted)
    done = CliRunner().invoke(cli, ["generate", "-m", str(talker), PROMPT, "--json"])
    answer = json.loads(done.stdout)
    assert done.exit_code == 130 and done.stderr.strip() == ""
    assert answer["finish_reason"] == "interrupted"
    assert len(answer["token_ids"]) == answer["generated_tokens"] == tokens
    whole = CliRunner().invoke(cli, ["generate", "-m", str(talker), PROMPT, "--json"])
    assert answer.keys() == json.loads(whole.stdout).keys()


def test_json_is_printed_when_loading_is_interrupted(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_here", interrupted)
    done = CliRunner().invoke(cli, ["generate", "-m", str(talker), PROMPT, "--json"])
    answer = json.loads(done.stdout)
    assert done.exit_code == 130 and done.stderr.strip() == ""
    assert (answer["text"], answer["finish_reason"]) == ("", "interrupted")


@pytest.mark.slow
def test_an_answer_that_fills_the_context_says_so(talker: Path) -> None:
    done = run("generate", "-m", talker, "Hi" * 2035, stdin=b"")
    assert b"the answer is cut at the end of the context" in done.stderr


# ---------------------------------------------------------------------------------------- mistakes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "said"),
    [
        (("generate", ""), b"", 1, "the prompt is empty"),
        (("generate", "-f", "-"), b"", 1, "the prompt is empty"),
        (("generate", "-f", "-"), b"ab\xff", 1, "stdin: must be UTF-8, but byte 2 is not"),
        (("generate", "x", "--temp", "-1"), b"", 2, "--temp must be 0, or from 0.001"),
        (("generate", "x", "--max-tokens", "0"), b"", 2, "--max-tokens must be at least 1"),
        (("generate", "-f", "-"), b"word " * 20000, 1, "tokens but the model's context"),
        (("generate", "x", "--stop", b"\xff"), b"", 1, "--stop is not UTF-8"),
        (("generate", b"\xff"), b"", 1, "TEXT is not UTF-8"),
        (("chat", "--temp", "-1"), b"hi\n", 2, "--temp must be 0, or from 0.001"),
        (("chat", "--max-tokens", "0"), b"hi\n", 2, "--max-tokens must be at least 1"),
        (("generate", "x", "--temp", "warm"), b"", 2, "'warm' is not a valid float"),
        (("generate", "x", "--raw", "--system", "s"), b"", 2, "--raw has none"),
        (("generate",), b"", 2, "TEXT is missing; -f FILE reads a file, and -f - stdin"),
        (("generate", "-"), b"", 2, "TEXT is - alone; -f - reads stdin"),
        (("generate", "-f", "-", "-f", "-"), b"", 2, "-f - is given twice"),
        (("generate", "-f", "no/such"), b"", 1, "no/such: cannot be read: No such file"),
        (("generate", "two", "words"), b"", 2, "TEXT of several words needs quotes"),
        (("info", "kimi"), b"", 2, "unexpected argument 'kimi'; a model is given with -m"),
        (("convert", "out"), b"", 2, "Missing option '-m' / '--model'"),
        (("conjure",), b"", 2, "No such command 'conjure'"),
    ],
)
def test_a_mistake_is_one_clear_line(talker, arguments, stdin, code, said) -> None:
    model = ("--model", talker) if arguments[0] in ("generate", "chat") else ()
    done = run(*arguments, *model, stdin=stdin)
    assert done.returncode == code
    assert done.stdout == b""
    errors = done.stderr.decode()
    assert said in errors and "Traceback" not in errors
    assert errors.startswith("Error: ") and errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nobody/has-this", "nobody/has-this: no such folder, and the hub cannot be reached"),
        ("not a name", "a model must be a folder or a hub name"),
        ("/dev/null", "a model must be a folder or a hub name"),
        ("/dev", "/dev: no model's folder: it has no config.json"),
    ],
)
def test_a_model_that_is_nowhere_is_named(model: str, said: str) -> None:
    done = run("generate", "x", "--model", model)
    assert done.returncode == 1
    assert said in done.stderr.decode() and done.stderr.count(b"\n") == 1


def without_mlx(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    script = "import sys; sys.modules['mlx.core'] = None; from mlx_kimi.cli.main import cli; cli()"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, timeout=60
    )


def test_without_a_backend_one_line_says_what_to_install() -> None:
    done = without_mlx("generate", "x")
    assert done.returncode == 1
    assert b"install mlx_kimi[cpu]" in done.stderr and done.stderr.count(b"\n") == 1
    for asked in (("--help",), ("generate", "--help"), ("convert", "--help"), ("--version",)):
        done = without_mlx(*asked)
        assert (done.returncode, done.stderr) == (0, b"") and done.stdout


@pytest.mark.slow
def test_help_and_version_answer_at_once() -> None:
    assert b"generate" in run("--help").stdout
    assert b"--max-tokens" in run("generate", "--help").stdout
    assert run("--version").stdout.startswith(b"mlx_kimi, version ")


# Each takes long to import, and MLX may be absent.
HEAVY = "{'numpy', 'mlx.core', 'rich', 'prompt_toolkit', 'tiktoken', 'huggingface_hub'}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--help", "Commands:"),
        ("generate --help", "--max-tokens"),
        ("bench --help", "--contexts"),
        ("COMPLETE gen", "plain,generate"),
        ("COMPLETE generate --to", "plain,--top-p"),
        ("COMPLETE convert --mode mx", "plain,mxfp4"),
        ("COMPLETE generate -f note", "file,note"),
        ("COMPLETE info -m kimi", "dir,kimi"),
    ],
)
def test_help_and_completion_import_little(words: str, expected: str) -> None:
    """Time is measured elsewhere; what takes it is imports."""
    arguments = words.removeprefix("COMPLETE ").split()
    environment = dict(ENVIRONMENT)
    if words.startswith("COMPLETE"):
        environment |= {"_MLX_KIMI_COMPLETE": "bash_complete", "COMP_CWORD": str(len(arguments))}
        environment["COMP_WORDS"] = " ".join(["mlx_kimi", *arguments])
        arguments = []
    script = (
        "import sys, atexit; from mlx_kimi.__main__ import main;"
        f"atexit.register(lambda: print('heavy', sorted({HEAVY} & set(sys.modules))));"
        f"sys.argv[1:] = {arguments!r}; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60
    )
    assert expected in done.stdout and done.stdout.endswith("heavy []\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ("<&-", 0, "answer 2 tokens"),
        (">&-", 0, "answer 2 tokens"),
        ("2>&-", 0, ""),
        (">/dev/full", 1, "Error: stdout: No space left on device"),
    ],
)
def test_a_closed_or_full_stream_is_no_traceback(talker: Path, streams, code, said) -> None:
    command = f"{sys.executable} -m mlx_kimi generate --model {talker} x --max-tokens 2"
    done = subprocess.run(
        ["sh", "-c", f"{command} {streams}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_check_finds_damaged_weights(talker: Path, tmp_path: Path) -> None:
    for file in talker.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    weights = load_file(talker / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][3, 5] = np.nan
    save_file(weights, tmp_path / "model.safetensors")
    done = run("check", "-m", tmp_path)
    assert done.returncode == 1 and b"NaN or infinity, first from layers.1." in done.stdout


QUERY = ("model.layers.1.self_attn.q_proj.weight", "layers.1.self_attn")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "place", "command"),
    [
        (*QUERY, "generate hi"),
        (*QUERY, "cache OUT hi"),
        (*QUERY, "evaluate -f TEXT"),
        (*QUERY, "chat"),
        (
            "model.layers.2.block_sparse_moe.shared_experts.down_proj.weight",
            "layers.2.mlp",
            "generate hi",
        ),
        ("lm_head.weight", "lm_head", "generate hi"),
    ],
)
def test_a_model_of_nan_ends_with_one_line(
    talker: Path, tmp_path: Path, tensor: str, place: str, command: str
) -> None:
    """It answered NUL characters, exit 0."""
    folder = shutil.copytree(talker, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[tensor][3, 5] = np.nan
    save_file(weights, folder / "model.safetensors")
    (tmp_path / "text").write_text("the cat sat on the mat " * 9)
    given = {"OUT": str(tmp_path / "out"), "TEXT": str(tmp_path / "text")}
    name, *rest = (given.get(word, word) for word in command.split())
    done = run(name, "-m", folder, *rest, stdin=b"hi\n")
    said = rf"logits are NaN or infinity after \d+ tokens: {place} is the first to".encode()
    assert re.search(said, done.stderr), done.stderr
    assert done.stdout == b""
    assert done.returncode == (0 if name == "chat" else 1)  # a chat goes on with the next message
    assert not (tmp_path / "out").exists()
