"""Prompts read once: `mlx_kimi cache`, `generate --prompt-cache`, and sessions in their place."""

import json
import shutil
from pathlib import Path

import httpx
import pytest

from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.session import Session, read_text
from tests.processes import run
from tests.test_serve import served

NOTES = "The password of the blue door is 4821. " * 12


def asked(talker: Path, *arguments: str | Path) -> dict:
    done = run("generate", "--model", talker, "--max-tokens", "8", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_cached_prompt_is_not_read_again_and_changes_no_answer(talker, tmp_path) -> None:
    file = tmp_path / "notes"
    done = run("cache", file, "-f", "-", "--model", talker, "--system", "be brief", stdin=NOTES)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    for question in ("What is it?", "1 or 2?", "\n再见"):
        cached = asked(talker, "--prompt-cache", file, question)
        whole = f"{NOTES}\n\n{question.lstrip()}"
        plain = asked(talker, "--system", "be brief", whole)
        assert cached["token_ids"] == plain["token_ids"]
        assert plain["cached_tokens"] == 0
        assert plain["prompt_tokens"] - cached["cached_tokens"] < 40


@pytest.mark.slow
def test_a_saved_conversation_is_a_prompt_cache_and_the_other_way_round(talker, tmp_path) -> None:
    options = ("--model", talker, "--max-tokens", "4", "--sessions", tmp_path)
    assert run("chat", *options, stdin=f"{NOTES}\n/save mine\nand?\n").returncode == 0
    answer = asked(talker, "--prompt-cache", tmp_path / "mine", "so?")
    assert answer["prompt_tokens"] - answer["cached_tokens"] < 60 < answer["cached_tokens"]

    assert run("cache", tmp_path / "notes", NOTES, "--model", talker).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "notes").iterdir()}
    said = "so?\n/save\n/save more\n"
    done = run("chat", *options, "--resume", f"{tmp_path}/notes", stdin=said)
    assert "a message goes on with it" in done.stderr and "kept)" in done.stderr
    assert "notes is a prompt cache: /save needs another name" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "notes").iterdir()} == before
    _, conversation, _ = read_text(tmp_path / "more")
    assert conversation.turns[0].text == f"{NOTES}\n\nso?" and conversation.turns[0].answer


@pytest.mark.slow
def test_another_model_reads_the_prompt_again_and_says_so(talker, tmp_path) -> None:
    assert run("cache", tmp_path / "notes", NOTES).returncode == 0  # the pocket model
    options = ("generate", "--model", talker, "--max-tokens", "2", "x")
    done = run(*options, "--prompt-cache", tmp_path / "notes")
    assert done.returncode == 0
    assert "the text is read again, since the model, its quantization or" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("cache", "FILE", ""), 1, "the prompt is empty"),
        (("cache", "USED", "x"), 1, "there is a saved conversation or prompt cache already"),
        (("cache", "FILE", "x", "--latent-bits", "4"), 2, "--latent-bits must be 8"),
        (
            ("cache", "FILE", "x", "--prefill-step", "0"),
            2,
            "--prefill-step must be from 1 to 65,536",
        ),
        (("cache", "FILE", "word " * 9000), 1, "tokens but the model's context"),
        (("generate", "x", "--prompt-cache", "FILE"), 1, "no saved conversation or prompt"),
        (("generate", "x", "--prompt-cache", "USED", "--raw"), 2, "--raw has none"),
        (("generate", "x", "--prompt-cache", "USED", "--system", "s"), 2, "its own system"),
    ],
)
def test_a_mistake_is_one_clear_line(talker, tmp_path, arguments, code, said) -> None:
    session = Session(tmp_path / "used", {}).open()
    session.save(Conversation())
    session.close()
    places = {"FILE": tmp_path / "file", "USED": tmp_path / "used"}
    command = [places.get(argument, argument) for argument in arguments]
    done = run(*command, "--model", talker)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "file").exists(), "nothing half-done is left"


@pytest.mark.slow
def test_a_folder_that_holds_anything_else_is_refused_and_keeps_it(talker, tmp_path) -> None:
    """It deleted a model's weights: whatever `*.safetensors` no state was stored in."""
    model = Path(shutil.copytree(talker, tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    done = run("cache", model, "x", "--model", talker)
    assert done.returncode == 1
    assert f"{model}: holds config.json, and a new prompt cache needs a folder" in done.stderr
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_session_deletes_no_file_that_it_did_not_write(tmp_path) -> None:
    weights, state = tmp_path / "model.safetensors", tmp_path / "0-7-0123abcd.safetensors"
    weights.touch()
    state.touch()
    session = Session(tmp_path, {}).open()
    session.save(Conversation())
    session.close()
    assert weights.exists() and not state.exists()


@pytest.mark.slow
def test_what_an_interrupted_run_left_is_in_nobodys_way(talker, tmp_path) -> None:
    file = tmp_path / "notes"
    file.mkdir()
    for name in ("lock", "0-7-0123abcd.safetensors", ".0-7-0123abcd.new.safetensors"):
        (file / name).touch()
    done = run("cache", file, NOTES, "--model", talker)
    assert done.returncode == 0, done.stderr
    assert not (file / "0-7-0123abcd.safetensors").exists()


@pytest.mark.slow
def test_a_file_in_the_place_of_the_folder_is_one_clear_line(talker, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    done = run("cache", tmp_path / "file", "x", "--model", talker)
    assert done.returncode == 1
    assert "file: is a file, and OUT a new folder; -f" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_server_goes_on_from_prompt_caches(talker, tmp_path) -> None:
    texts = {"notes": NOTES * 6, "more": f"More. {NOTES}"}
    for name, text in texts.items():
        assert run("cache", tmp_path / name, text, "--model", talker).returncode == 0
    options = [word for name in texts for word in ("--prompt-cache", str(tmp_path / name))]
    for caches in (options, ()):  # the second server finds what the first has stored of the longer
        where = {"MLX_KIMI_CACHE": str(tmp_path / "cache")}
        with served("--model", str(talker), *caches, **where) as (server, url):
            for text in texts.values() if caches else (texts["notes"],):
                usage = asked_of(url, f"{text}\n\nAnd?")
                assert usage["prompt_tokens"] > 60
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                assert usage["prompt_tokens"] - cached < 40
            server.terminate()
            server.communicate(timeout=60)


def asked_of(url: str, text: str) -> dict:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    return httpx.post(f"{url}/chat/completions", json=body, timeout=60, trust_env=False).json()[
        "usage"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("latent_bits", [(), ("--latent-bits", "8")])
def test_a_server_refuses_what_it_cannot_go_on_from(talker, tmp_path, latent_bits) -> None:
    options = ("serve", "--model", talker, "--port", "0", *latent_bits)
    missing = run(*options, "--prompt-cache", tmp_path / "none")
    assert missing.returncode == 1 and "no saved conversation or prompt cache" in missing.stderr
    if latent_bits:
        assert run("cache", tmp_path / "notes", NOTES, "--model", talker).returncode == 0
    else:
        assert run("cache", tmp_path / "notes", NOTES).returncode == 0  # the pocket model
    done = run(*options, "--prompt-cache", tmp_path / "notes")
    assert done.returncode == 1 and "is read again, since" in done.stderr
    assert done.stderr.count("\n") <= 2 and "Traceback" not in done.stderr
