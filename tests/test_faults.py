"""A kernel or the GPU fails in use: the answer goes on, or what was said is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_kimi import load, load_model
from mlx_kimi.chat.chat import Chat
from mlx_kimi.chat.session import read_session
from mlx_kimi.chat.sessions import Sessions
from mlx_kimi.errors import GpuLost, KimiError
from mlx_kimi.generation.generate import stream_generate
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.budget import Budget
from mlx_kimi.metal_kernels import tuning
from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.metal_kernels.tuning import Choices
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import Tokenizer
from mlx_kimi.tuning.stored import Stored, key_of
from tests.emulated import emulator

NOT_BUILT = "[metal::Device] Unable to load kernel custom_kernel_kda_decode_3f\nerror: too many"
UNNAMED = "[metal::Device] Unable to build metal library from source\n3:1: error: no such 'x'"
HANG = "[METAL] Command buffer execution failed: Caused GPU Hang Error (00000003)."
MEMORY = "[METAL] Command buffer execution failed: Insufficient Memory (00000008)."
SAMPLINGS: list[dict[str, Any]] = [
    {"temp": 0.0},
    {"temp": 1.0, "seed": 3, "repetition_penalty": 1.3, "top_k": 50},
]
OBEYING: dict[str, Any] = {"temp": 1.0, "seed": 3, "json_schema": {"type": "array"}}
PROMPT, TOKENS = [5, 6, 7, 8] * 5, 6
Loaded = tuple[KimiLinear, Tokenizer]


@pytest.fixture
def loaded(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.setenv("MLX_KIMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "backend", lambda: emulator)  # a digest is of kernels
    return load(talker)


def fails(monkeypatch: pytest.MonkeyPatch, name: str, at: int, message: str) -> list[int]:
    """The call number `at` of `KimiLinear.hidden`, or of `TokenState.token_of`, fails once."""
    owner: Any = TokenState if name == "token_of" else KimiLinear
    method, calls = getattr(owner, name), [0]

    def once(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise RuntimeError(message)
        return method(*arguments, **named)

    monkeypatch.setattr(owner, name, once)
    return calls


def answered(loaded: Loaded, state: TokenState, **options: Any) -> list[int]:
    options = {"max_tokens": TOKENS, "prefill_step": 8, "state": state} | options
    return [chunk.token for chunk in stream_generate(*loaded, PROMPT, **options)]


@pytest.mark.parametrize("sampling", [*SAMPLINGS, OBEYING], ids=["greedy", "sampled", "obeying"])
@pytest.mark.parametrize(
    ("name", "at"),
    [*(("hidden", n) for n in (1, 2, 4)), *(("token_of", n) for n in (1, 2, 5, 6)), ("advance", 2)],
)
def test_a_kernel_that_fails_is_off_and_the_answer_is_the_same(
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    sampling: dict[str, Any],
    name: str,
    at: int,
) -> None:
    expected = answered(loaded, TokenState(loaded[0]), **sampling)
    before = loaded[0].choices.digest
    fails(monkeypatch, name, at, NOT_BUILT)
    state = TokenState(loaded[0])
    assert answered(loaded, state, **sampling) == expected
    assert state.ids == PROMPT + expected[:-1]
    assert list(loaded[0].choices.off) == ["kda_decode"]
    assert state.computed_by - {before} == {loaded[0].choices.digest}
    again = TokenState(loaded[0])
    assert answered(loaded, again, **sampling) == expected
    assert again.computed_by == {loaded[0].choices.digest}, "nothing of it is mixed"


def test_what_a_kernel_on_the_emulator_throws_costs_only_that_kernel(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an answer, for good: the model goes on in MLX operations."""
    launched = [0]

    def planted(kernel: Kernel) -> Launch:
        run = emulator(kernel)

        def launch(**how: Any) -> list[mx.array]:
            if kernel.name == "kda_decode":
                launched[0] += 1
                if launched[0] > 7:
                    raise RuntimeError(NOT_BUILT)
            return run(**how)

        return launch

    expected = answered(loaded, TokenState(loaded[0]))
    with use_backend(planted):
        state = TokenState(loaded[0])
        assert answered(loaded, state) == expected
    assert list(loaded[0].choices.off) == ["kda_decode"] and launched[0] == 8
    assert len(state.computed_by) == 2


def test_an_error_that_names_no_kernel_turns_all_off(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answered(loaded, TokenState(loaded[0]))
    fails(monkeypatch, "hidden", 3, UNNAMED)
    assert answered(loaded, TokenState(loaded[0])) == expected
    assert {"kda_decode", "mla_attend", "expert_down"} < loaded[0].choices.off.keys()


@pytest.mark.parametrize(
    ("message", "kind", "said"),
    [
        (HANG, GpuLost, "the GPU failed: [METAL] Command buffer execution failed: Caused GPU Hang"),
        (MEMORY, KimiError, "the GPU's memory is too small for this"),
        ("[matmul] shapes do not agree", RuntimeError, "[matmul] shapes"),
    ],
)
def test_other_failures_end_the_answer_and_leave_the_state(
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    kind: type[Exception],
    said: str,
) -> None:
    fails(monkeypatch, "hidden", 3, message)
    state = TokenState(loaded[0])
    with pytest.raises(kind) as caught:
        answered(loaded, state)
    assert type(caught.value) is kind and said in str(caught.value)
    assert loaded[0].choices == Choices.default()
    assert state.ids == PROMPT[: len(state.ids)] + state.ids[len(PROMPT) :]


@pytest.mark.parametrize(
    ("message", "off"), [(NOT_BUILT, ["kda_decode"]), (f"{HANG} in mla_attend", ["mla_attend"])]
)
def test_the_next_start_leaves_the_kernel_out(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, message: str, off: list[str]
) -> None:
    key = key_of(loaded[0].config, mx.float32)
    Stored.new(key).write()
    fails(monkeypatch, "hidden", 2, message)
    try:
        answered(loaded, TokenState(loaded[0]))
    except GpuLost:
        pass
    found = Stored.read(key)
    assert found and list(found.off) == off and "failed in use" in found.off[off[0]]


def test_a_failure_of_no_known_kernel_lets_the_next_start_try_all_again(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of(loaded[0].config, mx.float32)
    before = Stored.new(key)
    before.complete, before.off["mla_attend"] = True, "it hung"
    before.write()
    fails(monkeypatch, "hidden", 2, HANG)
    with pytest.raises(GpuLost):
        answered(loaded, TokenState(loaded[0]))
    found = Stored.read(key)
    assert found and not found.complete and found.off == {"mla_attend": "it hung"}


@pytest.mark.parametrize("name", ["logits", "hidden"])
def test_several_kernels_may_fail_one_after_another(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = answered(loaded, TokenState(loaded[0]))
    for at, kernel in enumerate(("kda_decode", "mla_attend", "expert_down"), start=1):
        fails(monkeypatch, name, at, NOT_BUILT.replace("kda_decode", kernel))
    state = TokenState(loaded[0])
    assert answered(loaded, state) == expected and state.ids == PROMPT + expected[:-1]
    assert {*loaded[0].choices.off} == {"kda_decode", "mla_attend", "expert_down"}


def test_a_kernel_that_is_off_already_ends_the_answer(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be tried for ever."""

    def always(*_: Any) -> Any:
        raise RuntimeError(NOT_BUILT)

    monkeypatch.setattr(KimiLinear, "logits", always)
    with pytest.raises(RuntimeError, match="kda_decode"):
        answered(loaded, TokenState(loaded[0]))


@pytest.mark.parametrize("name", ["hidden", "token_of"])
@pytest.mark.parametrize("at", [2, 3, 4, 5])
@pytest.mark.parametrize("budget", [None, Budget(8 * 10**9)])
def test_what_was_said_is_what_the_state_has_read(
    loaded: Loaded,
    talker: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget: Budget | None,
    name: str,
    at: int,
) -> None:
    """Other kernels round otherwise, here by a lot: a token that was told is not drawn anew."""
    model = load_model(talker, budget=budget)
    calls = fails(monkeypatch, name, at, NOT_BUILT)
    logits = KimiLinear.logits

    def otherwise(self: KimiLinear, hidden: mx.array) -> mx.array:
        found = logits(self, hidden)
        return found[..., ::-1] if calls[0] >= at else found

    monkeypatch.setattr(KimiLinear, "logits", otherwise)
    state = TokenState(model)
    said = answered((model, loaded[1]), state)
    assert calls[0] > at and state.ids == PROMPT + said[:-1]


def test_a_chat_keeps_what_was_said_though_the_states_are_lost(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(
        *loaded,
        sessions=Sessions(tmp_path / "sessions"),
        fingerprint={"model": "m"},
        options={"max_tokens": 8},
    )
    chat.say("one")
    list(chat.answer())
    chat.say("two")
    calls = fails(monkeypatch, "token_of", 10**9, HANG)
    failing: Callable[..., Any] = lambda *_: (_ for _ in ()).throw(RuntimeError(HANG))  # noqa: E731
    said = ""
    with pytest.raises(GpuLost):
        for chunk in chat.answer():
            said += chunk.text
            if calls[0] >= 3:
                monkeypatch.setattr(mx, "save_safetensors", failing)
                monkeypatch.setattr(TokenState, "token_of", failing)
    assert chat.session
    folder = chat.session.folder
    chat.session.close()
    conversation, _ = read_session(folder, {"model": "m"}, TokenState(loaded[0]))
    assert [turn.text for turn in conversation.turns] == ["one", "two"]
    assert conversation.turns[1].answer == said
