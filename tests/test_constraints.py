"""What answers must obey: masks over the vocabulary, for JSON and for calls."""

import json
import random
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from mlx_kimi import load, stream_generate
from mlx_kimi.chat.tool_calls import Call, CallReader
from mlx_kimi.constraints.constraint import Constraint, constraint_for
from mlx_kimi.constraints.schema import Unenforceable
from mlx_kimi.errors import KimiError
from mlx_kimi.generation import drafts, lookup
from mlx_kimi.generation.decode import decode, prefill
from mlx_kimi.generation.generate import prompt_ids
from mlx_kimi.generation.sample import BatchSampler, Sampler, Sampling, masked
from mlx_kimi.generation.speculate import Speculation
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading import load as load_module
from mlx_kimi.loading.budget import Budget
from mlx_kimi.server.engine import Engine, Request, Token
from mlx_kimi.text.tokenizer import Tokenizer, load_tokenizer
from tests.schemas import Schema, allowed, drawn, nonsense, schemas
from tests.server import pocket_tokenizer
from tests.test_speculate import Guesses, always  # noqa: F401 (a fixture)
from tests.tokenizer_files import ALL_BYTES, write_sentencepiece, write_tiktoken

ASKED = "What is the weather in Paris?"
PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["alpha", "beta"]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Schema | None = None, **fields: Any) -> dict[str, Any]:
    function = {"name": name, **({"parameters": parameters} if parameters else {}), **fields}
    return {"type": "function", "function": function}


TOOLS = [tool("look", PERSON), tool("look_up", {"type": "object"}), tool("stop")]


def constraint(tokenizer: Tokenizer, **given: Any) -> Constraint:
    found = constraint_for(tokenizer, **given)
    assert found is not None
    return found


def text_and_calls(tokenizer: Tokenizer, answer: list[int]) -> tuple[str, list[Call]]:
    reader, text = CallReader(tokenizer), list[int]()
    for token in answer:
        if reader.in_text:
            text.append(token)
        reader.add(token)
    return tokenizer.decode(text), reader.calls()


# -------------------------------------------------------------------------------------- schemas
def doubled(count: int) -> Schema:
    """Definitions, each of which is written out twice in the one before."""
    text = {"type": "string", "minLength": 1}
    defs: Schema = {f"d{count}": text}
    for number in range(count):
        after = {"anyOf": [{"$ref": f"#/$defs/d{number + 1}"}, {**text, "maxLength": number + 9}]}
        defs[f"d{number}"] = {"allOf": [after, after]}
    return defs


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=[*HealthCheck])
@given(schemas())
def test_every_answer_obeys_its_schema_whatever_is_drawn(schema: Schema) -> None:
    tokenizer = pocket_tokenizer()
    try:
        found = constraint(tokenizer, json_schema=schema)
    except Unenforceable as error:
        assert "Unsatisfiable" in str(error)
        return
    answer = tokenizer.decode(drawn(tokenizer, found, seed=1))
    Draft202012Validator(schema).validate(json.loads(answer))


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[*HealthCheck])
@given(nonsense, st.booleans())
def test_any_json_in_the_place_of_a_schema_is_obeyed_or_refused(schema: Any, is_tool: bool) -> None:
    given = {"tools": [tool("f", schema)], "is_required": True}
    try:
        matcher = constraint(
            pocket_tokenizer(), **given if is_tool else {"json_schema": schema}
        ).begin()
        for seed in range(10):
            assert matcher.mask is not None
            token = random.Random(seed).choice(allowed(matcher.mask))
            assert matcher.take(token)
            if token in pocket_tokenizer().stop_ids:
                break
    except Unenforceable:
        assert not is_tool


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"minLength": "é" * 90}, "not even read"),
        ({"const": "\ud800"}, "hex escape"),
        ({"minimum": 10**400}, "out of range"),
        ({"multipleOf": True}, "multipleOf"),
        ({"properties": {"a": {"not": {}}}}, '"not"'),
        ({"if": {}, "then": {}}, '"if", "then"'),
        ({"type": "string", "format": "binary"}, "Unknown format: binary"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"$ref": "http://example.com/x"}, "http://example.com/x"),
        ({"$ref": "#/$defs/a"}, "/$defs/a"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "word"}, "Invalid type: word"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3) is greater"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "object", "minProperties": 2}, "minProperties 2"),
        ({"allOf": [{"multipleOf": 1009}, {"multipleOf": 1013}]}, "at most 10,000"),
        ({"enum": [*range(10_001)]}, "10,000 keys and items but has 10,005"),
        ({"$defs": doubled(14), "$ref": "#/$defs/d0"}, "too large"),
        ({"patternProperties": {f"^{n}$": {} for n in range(101)}}, "may be 100 but are 101"),
        ({"minimum": float("nan")}, "must be JSON"),
        ({"x-guidance": {"lenient": True}, "not": {}}, '"not"'),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_its_name(schema: Schema, said: str) -> None:
    with pytest.raises(KimiError) as raised:
        constraint_for(pocket_tokenizer(), json_schema=schema)
    assert said in str(raised.value) and "\\n" not in str(raised.value)
    assert str(raised.value).startswith("json_schema ")


def test_a_schema_of_the_largest_size_harms_nothing() -> None:
    """llguidance recurses: too deep for its stack, and the process would be gone."""
    defs: Schema = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(3300)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**defs, "d3300": True}}
    tokenizer = pocket_tokenizer()
    answer = drawn(tokenizer, constraint(tokenizer, json_schema=schema), 1)
    json.loads(tokenizer.decode(answer))


def test_white_space_comes_to_an_end() -> None:
    tokenizer = pocket_tokenizer()
    matcher = constraint(tokenizer, json_schema=PERSON).begin()
    assert all(map(matcher.take, tokenizer.encode("{")))
    (space,) = tokenizer.encode(" ")
    count = 0
    while matcher.take(space):
        count += 1
    assert 0 < count <= 40


# ---------------------------------------------------------------------------------------- calls
@pytest.mark.parametrize("is_required", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_names_outside_the_tools_are_impossible(is_required: bool, parallel: bool) -> None:
    tokenizer, names = pocket_tokenizer(), set[str]()
    found = constraint(tokenizer, tools=TOOLS, is_required=is_required, parallel=parallel)
    schemas = {each["function"]["name"]: each["function"].get("parameters") for each in TOOLS}
    most = 0
    for seed in range(40):
        text, calls = text_and_calls(tokenizer, drawn(tokenizer, found, seed))
        assert calls and all(call.is_whole for call in calls)
        assert not (is_required and text) and (parallel or len(calls) == 1)
        most = max(most, len(calls))
        for call in calls:
            assert re.fullmatch(r"functions\.[a-z_]+:\d{1,4}", call.id)
            arguments = json.loads(call.arguments)
            assert isinstance(arguments, dict) and (schemas[call.name] or not arguments)
            Draft202012Validator(schemas[call.name] or {}).validate(arguments)
            names.add(call.name)
    assert names == set(schemas) and (most > 1) == parallel


def test_only_the_named_tool_is_called() -> None:
    tokenizer = pocket_tokenizer()
    found = constraint(tokenizer, tools=TOOLS, only="look_up", is_required=True, parallel=False)
    for seed in range(10):
        _, (call,) = text_and_calls(tokenizer, drawn(tokenizer, found, seed))
        assert call.name == "look_up"


def test_an_answer_is_calls_or_json() -> None:
    tokenizer, kinds = pocket_tokenizer(), set[bool]()
    found = constraint(tokenizer, tools=TOOLS, json_schema=PERSON)
    for seed in range(30):
        answer = drawn(tokenizer, found, seed)
        text, calls = text_and_calls(tokenizer, answer)
        kinds.add(bool(calls))
        if not calls:
            Draft202012Validator(PERSON).validate(json.loads(text))
    assert kinds == {True, False}


def test_text_is_free_until_a_call_begins() -> None:
    tokenizer = pocket_tokenizer()
    matcher = constraint(tokenizer, tools=TOOLS).begin()
    for token in [*range(256), *tokenizer.encode("functions.other:0")]:
        assert matcher.mask is None and matcher.take(token)
    assert matcher.take(tokenizer.control_tokens["<|tool_calls_section_begin|>"])
    assert matcher.mask is not None
    assert allowed(matcher.mask) == [tokenizer.control_tokens["<|tool_call_begin|>"]]


@pytest.mark.parametrize(
    ("parameters", "obeyed"),
    [
        ({"properties": {"a": {"const": 1, "not": {}}}, "required": ["a"]}, {"a": 1}),
        ({"properties": {"a": {"const": 1}}, "required": ["a"], "not": {}}, {"a": 1}),
        ({"$ref": "http://example.com/x"}, {}),
    ],
)
def test_tools_that_are_not_strict_obey_as_far_as_can_be(
    parameters: Schema, obeyed: dict[str, Any]
) -> None:
    tokenizer = pocket_tokenizer()
    found = constraint(tokenizer, tools=[tool("f", parameters)], is_required=True)
    _, calls = text_and_calls(tokenizer, drawn(tokenizer, found, 1))
    assert json.loads(calls[0].arguments).items() >= obeyed.items()
    with pytest.raises(Unenforceable, match=r"tools\[0\].function.parameters cannot be enforced"):
        constraint_for(tokenizer, tools=[tool("f", parameters, strict=True)])


def test_what_cannot_be_called_is_said(tmp_path: Path) -> None:
    mute = load_tokenizer(write_sentencepiece(tmp_path))
    assert constraint_for(mute, tools=TOOLS) is None
    with pytest.raises(KimiError, match="the model has no tokens for calls"):
        constraint_for(mute, tools=TOOLS, is_required=True)
    with pytest.raises(KimiError, match="there is none"):
        constraint_for(mute, is_required=True)
    with pytest.raises(KimiError, match=r"tools\[0\] must have a function with a name"):
        constraint_for(pocket_tokenizer(), tools=[{"type": "function"}])


# -------------------------------------------------------------------------------- vocabularies
@pytest.mark.parametrize("kind", ["spaced", "plain", "many"])
def test_other_vocabularies(kind: str, tmp_path: Path) -> None:
    """sentencepiece with and without a space before texts, and as many ids as the 48B has."""
    if kind == "many":
        write_tiktoken(tmp_path, many_tokens())
    else:
        write_sentencepiece(tmp_path, add_dummy_prefix=kind == "spaced")
    tokenizer = load_tokenizer(tmp_path)
    assert kind != "many" or tokenizer.vocab_size == 163_840
    # (full-width letters, which sentencepiece would make others of)
    told = {"type": "object", "properties": {"ｆｕｌｌ": {"const": "a  b\tc é"}}}
    schema = {"allOf": [told], "required": ["ｆｕｌｌ"], "additionalProperties": PERSON}
    for schema in (PERSON, {**told, "required": ["ｆｕｌｌ"]}):
        found = constraint(tokenizer, json_schema=schema)
        for seed in range(3):
            answer = json.loads(tokenizer.decode(drawn(tokenizer, found, seed)))
            Draft202012Validator(schema).validate(answer)


def many_tokens() -> list[bytes]:
    """163,584 tokens: bytes, and words of random letters, some after a space or with quotes."""
    choose, found = random.Random(0), dict.fromkeys(ALL_BYTES)
    letters = [
        "a",
        "e",
        "i",
        "o",
        "n",
        "r",
        "st",
        "th",
        "ing",
        "漢",
        "字",
        "я",
        '"',
        '":',
        "{",
        " ",
    ]
    while len(found) < 163_584:
        word = "".join(choose.choices(letters, k=choose.randint(2, 7)))
        found[(" " * choose.randrange(2) + word).encode()] = None
    return [*found]


def test_where_one_text_is_left_its_own_tokens_alone_are_allowed() -> None:
    tokenizer = pocket_tokenizer()
    schema = {"const": "What is Kimi Linear, and what was it made for?"}
    ids = tokenizer.encode(json.dumps(schema["const"]))
    matcher = constraint(tokenizer, json_schema=schema).begin()
    for token in ids:
        assert matcher.mask is not None and allowed(matcher.mask) == [token]
        assert matcher.take(token)
    assert matcher.mask is not None and allowed(matcher.mask) == sorted(tokenizer.stop_ids)


# ---------------------------------------------------------------------------------- going back
@pytest.mark.parametrize("given", [{"json_schema": PERSON}, {"tools": TOOLS}])
def test_going_back_is_as_if_nothing_had_been_taken(given: dict[str, Any]) -> None:
    tokenizer = pocket_tokenizer()
    found = constraint(tokenizer, **given)
    answer = drawn(tokenizer, found, 3)
    masks, matcher = [], found.begin()
    for token in answer:
        masks.append(matcher.mask)
        assert matcher.take(token)
    choose, at = random.Random(1), len(answer)
    for _ in range(40):
        back = choose.randrange(at + 1)
        matcher.go_back(back)
        at = choose.randrange(back, len(answer) + 1)
        for place in range(back, at):
            mine, other = matcher.mask, masks[place]
            assert (mine is None) == (other is None)
            assert mine is None or other is None or np.array_equal(mine, other)
            assert matcher.take(answer[place])


# ----------------------------------------------------------------------------------- sampling
def test_only_what_is_allowed_is_drawn_whatever_the_logits_and_options_are() -> None:
    vocab, generator = 1000, np.random.default_rng(0)
    words = generator.integers(0, 1 << 32, size=(3, 30), dtype=np.uint32)  # for 960 of the ids
    words[1] = 0
    words[1, 7] = 16
    options = [Sampling(), Sampling(temp=1.0, top_k=3), Sampling(temp=2.0, repetition_penalty=1.5)]
    samplers = [Sampler(each, [1, 2], vocab) for each in options]
    batch = BatchSampler(samplers)
    for _ in range(20):
        logits = mx.array(generator.normal(size=(3, vocab)).astype(np.float32))
        masks = [words[0], words[1], None]
        tokens = batch(masked(logits, masks)).tolist()
        assert tokens[0] in allowed(words[0]) and tokens[1] == 7 * 32 + 4
        alone = [s(masked(logits[r : r + 1], [masks[r]])).item() for r, s in enumerate(samplers)]
        assert alone == tokens


def answered(model: Any, tokenizer: Tokenizer, **options: Any) -> list[int]:
    return [chunk.token for chunk in stream_generate(model, tokenizer, ASKED, **options)]


@pytest.mark.parametrize("sampling", [{}, {"temp": 1.0, "seed": 5, "repetition_penalty": 1.1}])
def test_a_model_of_random_weights_obeys_to_the_end(talker: Path, sampling: dict[str, Any]) -> None:
    model, tokenizer = load(talker)
    schema = {**PERSON, "required": ["name", "age", "kind"]}
    answer = answered(model, tokenizer, json_schema=schema, max_tokens=300, **sampling)
    Draft202012Validator(schema).validate(json.loads(tokenizer.decode(answer)))
    cut = answered(model, tokenizer, json_schema=schema, max_tokens=9, **sampling)
    assert cut == answer[:9]


def test_under_a_memory_budget_an_answer_obeys_as_without(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "slots_for", lambda *_: 4)  # of 8 experts
    options: dict[str, Any] = {"json_schema": PERSON, "max_tokens": 20, "temp": 1.0, "seed": 2}
    expected = answered(*load(talker), **options)
    streamed = load(talker, Budget(8 << 30))
    assert answered(*streamed, **options) == expected
    ids = tuple(prompt_ids(*streamed, ASKED))
    engine = Engine(streamed[0], tree_memory=64 << 20)
    ticket = engine.submit(
        Request(
            ids,
            max_tokens=20,
            sampling=Sampling(temp=1.0, seed=2),
            constraint=constraint(streamed[1], json_schema=PERSON),
        )
    )
    engine.start()
    assert [event.id for event in ticket if isinstance(event, Token)] == expected
    engine.stop(0)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_drafts_obey_and_change_nothing(talker: Path, always: None, p: float) -> None:  # noqa: F811
    model, tokenizer = load(talker)
    found = constraint(tokenizer, tools=TOOLS, is_required=True)

    def decoded(speculation: Speculation | None) -> list[int]:
        state, prompt = TokenState(model, snapshot_every=None), [5, 6, 7, 8] * 5
        hidden, _ = prefill(state, prompt)
        sampling = Sampling(temp=1.0, seed=7)
        sampler = Sampler(sampling, prompt, model.config.vocab_size, found.begin())
        return list(decode(state, hidden, sampler, 60, speculation))

    plain = decoded(None)
    speculation = Speculation(Guesses(plain, p, model.config.vocab_size))
    assert decoded(speculation) == plain
    assert speculation.counts.steps > 5 and (speculation.counts.accepted > 0) == (p > 0)


def test_speculation_with_a_schema_answers_as_without(
    always: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lookup, "MATCHES", (2, 1))
    monkeypatch.setattr(drafts, "LIKELY", {2: 0.5, 1: 0.5})
    loaded = load()
    schema = {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 2}
    on, off = (
        answered(*loaded, json_schema=schema, max_tokens=200, speculate=each)
        for each in ("auto", "off")
    )
    assert on == off
    Draft202012Validator(schema).validate(json.loads(loaded[1].decode(off)))
