"""What reads the files: each target makes a sound folder once, and reads damaged copies of it."""

import contextlib
import ipaddress
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from safetensors.numpy import load_file, save_file

from mlx_kimi import load
from mlx_kimi.chat.chat import Chat
from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.fingerprint import fingerprint
from mlx_kimi.chat.session import read_session
from mlx_kimi.chat.sessions import Sessions
from mlx_kimi.chat.tool_calls import CallReader
from mlx_kimi.chat.tools import Toolbox
from mlx_kimi.cli.ranks import hosts_in
from mlx_kimi.convert import output
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.quantize import scheme
from mlx_kimi.errors import LONGEST, KimiError
from mlx_kimi.generation.generate import prompt_ids, stream_generate
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.budget import Budget
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.ranks.launched import SECRET, Launched
from mlx_kimi.text.tokenizer import Tokenizer
from tests.checkpoints import TINY, write_checkpoint
from tests.fuzz import cases
from tests.fuzz.damage import Damage, Json, Mutator, at_open, fault, race
from tests.test_chat_lines import ODD, OPTIONS, typed
from tests.tokenizer_files import trained_tokens, write_json, write_sentencepiece, write_tiktoken

SEED = 2
ASKED = [{"role": "user", "content": "What is it? <|im_end|> 你好"}]
NEXT = "and now?"
TEMPLATE = """\
{%- for m in messages -%}
  {{- '<|im_assistant|>' if m.role == 'assistant' else '<|im_user|>' -}}{{ m.content }}<|im_end|>
{%- endfor -%}
<|im_assistant|>"""
NOT_USED = ("the text is read again", "is damaged", "its last change is lost", "damaged: ")
FORGED = ("a prompt cache stays as it is",)  # said of a session that was made to say it is one

Answer = list[int]  # the prompt's ids, and those of the next tokens


class Wrong(Exception):
    """What was accepted gave another answer than it must."""


def complete_model(folder: Path, sentencepiece: bool = False) -> Path:
    """A tiny random model in two shards with every small file that is read."""
    size = 2048 if sentencepiece else len(trained_tokens()) + 256
    config = TINY | {"vocab_size": size, "eos_token_id": None}
    write_checkpoint(folder, config, SEED, shards=2)
    first = size - 256
    names = {"<|im_user|>": first + 3, "<|im_end|>": first + 2, "<|im_assistant|>": first + 4}
    if sentencepiece:
        write_sentencepiece(folder)
        names = {"<extra>": 1500, "<more>": 1501}
    else:
        write_tiktoken(folder)
    added = {str(id): {"content": name, "special": True} for name, id in names.items()}
    settings = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    write_json(folder / "tokenizer_config.json", settings)
    ends = {"eos_token_id": [1500 if sentencepiece else first], "do_sample": False}
    write_json(folder / "generation_config.json", ends)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    # No control token is ever the likeliest: answers do not end by themselves.
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        if "lm_head.weight" in weights:
            weights["lm_head.weight"][first:] = 0
            save_file(weights, file)
    return folder


def answer(
    model: KimiLinear, tokenizer: Tokenizer, messages: Sequence[dict[str, Json]], state: Any = None
) -> Answer:
    """A prompt's ids and two tokens after it, greedily."""
    ids = prompt_ids(model, tokenizer, messages)
    stream = stream_generate(model, tokenizer, ids, max_tokens=2, state=state)
    return [*ids, *(chunk.token for chunk in stream)]


class World:
    """The sound folders, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.scratch = folder / "case"  # where cases may write; empty before each
        self.answers: dict[Path, Answer] = {}

    @cached_property
    def plain(self) -> Path:
        return complete_model(self.folder / "plain")

    @cached_property
    def packed(self) -> Path:
        convert(self.plain, self.folder / "packed", scheme(bits=4, group_size=32))
        return self.folder / "packed"

    @cached_property
    def pieces(self) -> Path:
        return complete_model(self.folder / "pieces", sentencepiece=True)

    @cached_property
    def loaded(self) -> tuple[KimiLinear, Tokenizer]:
        return load(self.plain)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.plain, None)

    @cached_property
    def session(self) -> Path:
        """A conversation of three turns."""
        chat = self.chat(Sessions(self.folder / "sessions"))
        for text in ("What is KDA?", "and 你好? " * 20, "3"):
            chat.say(text)
            list(chat.answer())
        chat.save_as("sound")
        assert chat.session
        chat.session.close()
        return chat.session.folder

    @cached_property
    def interrupted(self) -> Path:
        """A folder with what an interrupted conversion left."""
        folder = self.folder / "interrupted"
        folder.mkdir()

        def stop(done: int, total: int) -> None:
            if done > total / 2:
                raise InterruptedError

        with mock.patch.object(output, "SYNC", 1 << 16), contextlib.suppress(KimiError):
            convert(self.plain, folder / "out", scheme(bits=4, group_size=32), progress=stop)
        assert len((folder / "out.partial" / "journal").read_bytes().splitlines()) > 3
        return folder / "out.partial"

    def chat(self, sessions: Sessions) -> Chat:
        return Chat(*self.loaded, sessions=sessions, fingerprint=self.fingerprint, options=OPTIONS)

    def sound_answer(self, folder: Path) -> Answer:
        """What an undamaged folder answers."""
        if folder not in self.answers:
            model, tokenizer = load(folder)
            self.answers[folder] = answer(model, tokenizer, ASKED)
            tokenizer.close()
        return self.answers[folder]


# ---------------------------------------------------------------------------------- models
def load_damaged(world: World, rng: Random, damage: Mutator) -> Damage:
    """Load a model and its tokenizer, and generate two tokens."""
    sound = rng.choice((world.plain, world.packed, world.pieces))
    if damage is cases.pieces:
        sound = world.pieces
    expected = world.sound_answer(sound)
    copy = Path(shutil.copytree(sound, world.scratch / "model"))
    done = damage(rng, copy)
    budget = Budget(1 << 30, 256, prefill_step=64) if rng.random() < 0.2 else None
    with saying(done):
        model, tokenizer = load(copy, budget)
        try:
            given = answer(model, tokenizer, ASKED)
            fingerprint(copy, None)
        finally:
            tokenizer.close()
        refuse_another(done, given, expected)
    return done


def find_ranks(world: World, rng: Random, damage: Mutator) -> Damage:
    """Read where ranks are: MLX's file for a rank, and the one of mlx.launch."""
    folder = world.scratch / "hosts"
    folder.mkdir(parents=True)
    write_json(folder / "ranks.json", [["127.0.0.1:5000", "127.0.0.2:5001"], ["127.0.0.1:5002"]])
    machines = [{"ssh": f"mac-{n}", "ips": [f"10.0.0.{n}"], "rdma": [None]} for n in (1, 2)]
    write_json(folder / "hosts.json", {"backend": "ring", "envs": [], "hosts": machines})
    done = damage(rng, folder)
    environment = {"MLX_RANK": "1", "MLX_HOSTFILE": str(folder / "ranks.json")}
    with saying(done):
        launched = Launched.here(environment | {SECRET: "0123456789abcdef"})
        found = [*hosts_in(folder / "hosts.json"), *(launched.hosts if launched else ())]
        if not all(ipaddress.IPv4Address(host) for host in found):
            raise Wrong(f"these are no hosts: {found}")
    return done


def convert_damaged(world: World, rng: Random, damage: Mutator) -> Damage:
    """Convert a folder, and load the result."""
    sound = rng.choice((world.plain, world.plain, world.pieces))
    copy, out = Path(shutil.copytree(sound, world.scratch / "model")), world.scratch / "out"
    done = damage(rng, copy)
    with saying(done):
        convert(copy, out, scheme(bits=rng.choice((4, 8)), group_size=32))
        model, tokenizer = load(out)
        answer(model, tokenizer, ASKED)
        tokenizer.close()
    return done


def resume_conversion(world: World, rng: Random, damage: Mutator) -> Damage:
    """Go on with an interrupted conversion whose record is damaged."""
    expected = world.sound_answer(world.packed)
    partial = Path(shutil.copytree(world.interrupted, world.scratch / "out.partial"))
    done = damage(rng, partial)
    with saying(done):
        convert(world.plain, world.scratch / "out", scheme(bits=4, group_size=32))
        model, tokenizer = load(world.scratch / "out")
        given = answer(model, tokenizer, ASKED)
        tokenizer.close()
        refuse_another(done, given, expected)
    return done


# ------------------------------------------------------------------------------- conversations
def resume(world: World, rng: Random, damage: Mutator) -> Damage:
    """Go on with a saved conversation: the answer is that of the same text read anew."""
    copy = Path(shutil.copytree(world.session, world.scratch / "sessions" / "one"))
    sound = conversation_of(world, world.session)
    done = damage(rng, copy)
    with saying(done):
        sessions = Sessions(copy.parent)
        sessions.list()
        chat = world.chat(sessions)
        try:
            notes = chat.load("one")
            read = Conversation(chat.conversation.system, list(chat.conversation.turns))
            chat.say(NEXT)
            given = [chunk.token for chunk in chat.answer()]
        finally:
            if chat.session:
                chat.session.close()
        if done.same:
            read.say(NEXT)
            refuse_another_text(done, notes, read, sound, damage)
            anew = answer(*world.loaded, read.messages)
            refuse_another(done, given, anew[-len(given) :])
    return done._replace(is_noted=bool(notes))


def use_prompt_cache(world: World, rng: Random, damage: Mutator) -> Damage:
    """Ask after a stored prompt: the answer is that of the same text read anew."""
    copy = Path(shutil.copytree(world.session, world.scratch / "cache"))
    done = damage(rng, copy)
    with saying(done):
        state = TokenState(world.loaded[0], None, snapshot_every=None)
        conversation, notes = read_session(copy, world.fingerprint, state)
        conversation.say(NEXT)
        given = answer(*world.loaded, conversation.messages, state=state)
        if done.same:
            refuse_another(done, given, answer(*world.loaded, conversation.messages))
    return done._replace(is_noted=bool(notes))


def conversation_of(world: World, folder: Path) -> Conversation:
    state = TokenState(world.loaded[0], None, snapshot_every=None)
    return read_session(folder, world.fingerprint, state)[0]


def refuse_another_text(
    done: Damage, notes: list[str], read: Conversation, sound: Conversation, damage: Mutator
) -> None:
    """Without a note the text is the one that was saved, unless its checksum was forged."""
    same = read.messages[:-1] == sound.messages
    if not notes and not same and damage is not cases.session_values:
        raise Wrong("another text was read, and no note says so")
    known = NOT_USED + (FORGED if damage is cases.session_values else ())
    if notes and not any(said in note for note in notes for said in known):
        raise Wrong(f"notes that this test does not know: {notes}")


# ------------------------------------------------------------------------------- what is typed
def tool_calls(world: World, rng: Random, damage: Mutator) -> Damage:
    """Read any tokens as an answer with calls, run the calls, and put them into the next prompt."""
    model, tokenizer = world.loaded
    control = list(tokenizer.control_tokens.values())
    spelled = [name for name in tokenizer.control_tokens if "tool" in name]
    texts = ("{}", "[", '{"a": 1}', "functions.add:0", ":0", "\n", "null", "9" * 5000, "[" * 9999)
    odd = ('{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', '{"self": 1}', "é", *spelled)
    reader, tokens = CallReader(tokenizer), list[int]()
    for _ in range(rng.randint(1, 30)):
        kind = rng.random()
        if kind < 0.6:
            tokens.append(tokenizer.control_tokens[rng.choice(spelled)])
        elif kind < 0.7:
            tokens.append(rng.choice(control))
        elif kind < 0.8:
            tokens += [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 9))]
        else:
            tokens += tokenizer.encode(rng.choice((*texts, *odd)))
    done = Damage(f"{len(tokens)} tokens: {tokens[:12]}", same=True)
    with saying(done):
        for token in tokens:
            reader.add(token)
        calls = reader.calls()
        box = Toolbox({"add": add})
        said: dict[str, Any] = {"role": "assistant", "content": ""}
        messages: list[dict[str, Any]] = [*ASKED, said]
        said["tool_calls"] = [call.message for call in calls if call.is_whole]
        for call in calls:
            result = {"role": "tool", "tool_call_id": call.id, "content": box.run(call)}
            messages.append(result | {"name": call.name})
        ids = prompt_ids(model, tokenizer, messages)
        typed_ids = prompt_ids(model, tokenizer, ASKED)
        known = [id for id in typed_ids if id in control]
        if len([id for id in ids if id in control]) > len(known) * len(messages):
            raise Wrong("text of a call became a control token")
    return done


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


def lines(world: World, rng: Random, damage: Mutator) -> Damage:
    """Lines typed into a chat, of odd parts."""
    from mlx_kimi.cli.chat.commands import COMMANDS

    begins = ("", "/", *(f"/{name} " for name in COMMANDS))
    odd = ("\u2028", "\udfff", "'", '"', "\\", "1", "2", "/undo", "<|im_end|>", "s", "\t", "٣")
    written = [
        rng.choice(begins) + "".join(rng.choice((*ODD, *odd)) for _ in range(rng.randint(0, 4)))
        for _ in range(rng.randint(1, 6))
    ]
    done = Damage(f"lines {[ascii(line)[:60] for line in written]}")
    world.scratch.mkdir(exist_ok=True)
    with contextlib.chdir(world.scratch), saying(done):
        errors = typed(world.chat(Sessions(world.scratch / "sessions")), *written)
        for error in errors:
            if "\n" in error or len(error) > 2 * LONGEST:
                raise Wrong(f"an error of {len(error)} characters: {error[:300]!r}")
        if errors:
            raise KimiError(errors[0])
    return done


# ------------------------------------------------------------------------------------- judging
def refuse_another(done: Damage, given: Answer, expected: Answer) -> None:
    if done.same and given != expected:
        raise Wrong(f"tokens {given[-8:]}, expected {expected[-8:]}")


class saying(contextlib.AbstractContextManager[None]):
    """Within, an error is given what was done."""

    def __init__(self, done: Damage) -> None:
        self._done = done

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        at_open.disarm()
        if error is not None:
            error.done = self._done  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Target:
    """What reads, and the damage that it meets."""

    read: Callable[[World, Random, Mutator], Damage]
    mutators: tuple[Mutator, ...]


def nothing(rng: Random, folder: Path) -> Damage:
    """No damage to a folder: the target makes its input itself."""
    return Damage("")


OF_WEIGHTS = (cases.header_entry, cases.header_names, cases.header_length, cases.index)
OF_CONFIG = (cases.config, cases.config, cases.quantization)
OF_TEXT = (cases.settings, cases.names, cases.ranks, cases.pieces, cases.template)
OF_SESSION = (cases.session_bytes, cases.session_header, cases.session_values)
OF_DISK = (fault, race)
TARGETS = {
    "load": Target(load_damaged, (*OF_WEIGHTS, *OF_CONFIG, *OF_TEXT)),
    "disk": Target(load_damaged, OF_DISK),
    "convert": Target(convert_damaged, (*OF_WEIGHTS, *OF_CONFIG, *OF_TEXT, fault)),
    "resume": Target(resume, (*OF_SESSION, cases.session_states, *OF_DISK, cases.lock)),
    "cache": Target(use_prompt_cache, (*OF_SESSION, cases.session_states, *OF_DISK, cases.lock)),
    "journal": Target(resume_conversion, (cases.journal_bytes, cases.journal_values, fault)),
    "hosts": Target(find_ranks, (cases.hosts,)),
    "calls": Target(tool_calls, (nothing,)),
    "lines": Target(lines, (nothing,)),
}
