"""Answers that obey, in the engine's rows and over a socket with the clients that ask for them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLParserLimits
from pydantic import BaseModel, Field

from mlx_kimi import load, stream_generate
from mlx_kimi.constraints import constraint as constraint_module
from mlx_kimi.constraints.constraint import constraint_for
from mlx_kimi.generation.sample import Sampling
from mlx_kimi.server import engine as engine_module
from mlx_kimi.server.engine import Engine, Event, Failed, Finished, Request, Token
from tests.schemas import Schema
from tests.server import WEATHER, Running, serving_pocket
from tests.test_constraints import PERSON, TOOLS, tool
from tests.test_engine import fails, rows_of_steps

KEY = "any-key-at-all"
TREE: Schema = {
    "type": "array",
    "items": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]},
    "maxItems": 2,
}


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)
    kind: Literal["large", "small"]


class Size(BaseModel):
    """How large something is."""

    kind: Literal["large", "small"]


@pytest.fixture(scope="module")
def pocket() -> Any:
    return load()


# --------------------------------------------------------------------------------------- rows
def requests(tokenizer: Any) -> list[Request]:
    """Of answers that must obey in several ways, or in none, with unlike options."""
    given: list[dict[str, Any] | None] = [
        {"json_schema": PERSON},
        None,
        {"tools": TOOLS, "is_required": True},
        {"tools": [WEATHER]},
        {"json_schema": TREE},
        None,
    ]
    samplings = [
        Sampling(),
        Sampling(temp=1.0, seed=3),
        Sampling(temp=0.8, seed=4, top_p=0.9, repetition_penalty=1.2),
    ]
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    ids = tuple(tokenizer.apply_chat_template(asked, [WEATHER]))
    return [
        Request(
            ids[number % 2 :],
            sampling=samplings[number % 3],
            max_tokens=16 + number,
            logprobs=2 if number % 2 else None,
            stop_ids=tokenizer.stop_ids,
            constraint=None if each is None else constraint_for(tokenizer, **each),
        )
        for number, each in enumerate(given)
    ]


def answered(model: Any, requests: list[Request], rows: int, sizes: set[int]) -> list[list[Event]]:
    engine = Engine(model, prefill_slice=64, rows=rows)
    sizes |= (counted := rows_of_steps(engine))
    tickets = [engine.submit(request) for request in requests]
    engine.start()
    try:
        found = [list(ticket) for ticket in tickets]
    finally:
        engine.stop(0)
    sizes |= counted
    return found


def ids(events: list[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def test_rows_that_obey_and_rows_that_need_not_answer_together_as_alone(
    pocket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "DECODE_SHARE", 0.0)
    model, tokenizer = pocket
    asked, sizes = requests(tokenizer), set[int]()
    alone = [answered(model, [request], 1, set())[0] for request in asked]
    together = answered(model, asked, 6, sizes)
    assert list(map(ids, together)) == list(map(ids, alone)) and max(sizes) >= 4
    for mine, other in zip(together, alone, strict=True):
        assert mine[-1] == other[-1] and isinstance(mine[-1], Finished)
        for token, same in zip(mine, other, strict=True):
            if isinstance(token, Token) and isinstance(same, Token):
                assert token.logprob == pytest.approx(same.logprob, abs=1e-3)
    # The row whose text is free until it calls something is as if nothing were asked of it.
    free = Request(**{**vars(asked[3]), "constraint": None})
    assert ids(answered(model, [free], 1, set())[0])[:8] == ids(alone[3])[:8]


def test_an_answer_is_that_of_stream_generate(pocket: Any) -> None:
    model, tokenizer = pocket
    asked = requests(tokenizer)[0]
    expected = [
        chunk.token
        for chunk in stream_generate(
            model, tokenizer, asked.ids, json_schema=PERSON, max_tokens=asked.max_tokens
        )
    ]
    assert ids(answered(model, [asked], 1, set())[0]) == expected


@pytest.mark.parametrize("place", ["prefill", "decode"])
def test_a_kernel_that_fails_changes_no_answer(
    talker: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    monkeypatch.setenv("MLX_KIMI_CACHE", str(tmp_path))
    monkeypatch.setattr(engine_module, "DECODE_SHARE", 0.0)
    model, tokenizer = load(talker)
    monkeypatch.setattr(model, "choices", model.choices)
    constraint = constraint_for(tokenizer, json_schema=PERSON)
    asked = [
        Request(tuple(range(5 + n, 40)), max_tokens=20, constraint=constraint, sampling=sampling)
        for n, sampling in enumerate([Sampling(), Sampling(temp=1.0, seed=3)])
    ]
    expected = [ids(answered(model, [each], 1, set())[0]) for each in asked]
    message = "[metal::Device] Unable to load kernel custom_kernel_kda_decode_3f"
    fails(monkeypatch, 2, message, place)
    assert [ids(events) for events in answered(model, asked, 2, set())] == expected
    assert list(model.choices.off) == ["kda_decode"]


def test_what_takes_too_long_to_find_out_ends_its_row_alone(
    pocket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "DECODE_SHARE", 0.0)
    model, tokenizer = pocket
    monkeypatch.setattr(constraint_module, "LIMITS", LLParserLimits(max_lexer_states=200))
    text = {"type": "string", "pattern": "(.*a.{12})*(.*b.{12})*(.*c.{12})*e"}
    hard = constraint_for(tokenizer, json_schema=text)
    simple = requests(tokenizer)[1]
    asked = [simple, Request(simple.ids, max_tokens=3000, constraint=hard, sampling=Sampling(2.0))]
    first, second = answered(model, asked, 2, set())
    assert isinstance(first[-1], Finished) and ids(first)
    assert isinstance(second[-1], Failed) and "cannot go on as it must" in str(second[-1].error)


# ------------------------------------------------------------------------------------- sockets
@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving_pocket() as running:
        yield running


def formatted(schema: Schema, **fields: Any) -> Schema:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **fields}}


@pytest.mark.parametrize(("stream", "strict"), [(True, True), (False, False)])
def test_every_choice_of_an_answer_obeys(running: Running, stream: bool, strict: bool) -> None:
    fields = {"response_format": formatted(PERSON, strict=strict), "n": 2, "temperature": 1.0}
    fields |= {"seed": 4, "logprobs": True, "top_logprobs": 1}
    texts = {0: "", 1: ""}
    if stream:
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        for event in running.events("/v1/chat/completions", body):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
    else:
        for choice in running.chat(**fields).json()["choices"]:
            assert choice["finish_reason"] == "stop"
            spelled = "".join(each["token"] for each in choice["logprobs"]["content"])
            assert spelled == choice["message"]["content"]
            texts[choice["index"]] = choice["message"]["content"]
    for text in texts.values():
        Draft202012Validator(PERSON).validate(json.loads(text))


def test_an_answer_may_be_any_object_and_is_cut_or_stopped(running: Running) -> None:
    any_object = {"response_format": {"type": "json_object"}}
    choice = running.chat(**any_object, max_tokens=5).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("{")
    choice = running.chat(response_format=formatted(PERSON), stop=[":"]).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and '"name' in choice["message"]["content"]
    assert ":" not in choice["message"]["content"]


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_a_tool_is_called_where_it_must_be(running: Running, choice: str) -> None:
    named = {"type": "function", "function": {"name": choice}}
    city: Schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}}
    tools = [tool("get_weather", city), tool("other", strict=True)]
    for seed in range(2):
        answer = running.chat(
            tools=tools,
            tool_choice=choice if choice == "required" else named,
            parallel_tool_calls=False,
            temperature=1.5,
            seed=seed,
        ).json()["choices"][0]
        assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
        (call,) = answer["message"]["tool_calls"]
        assert call["function"]["name"] in ("other", "get_weather")
        if choice != "required":
            assert call["function"]["name"] == choice
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "get_weather":
            Draft202012Validator(city).validate(arguments)
        else:
            assert arguments == {}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "must have json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
        (
            {"response_format": formatted({"uniqueItems": True})},
            "response_format.json_schema.schema",
            'cannot be enforced: Unimplemented keys: ["uniqueItems"]',
        ),
        ({"tool_choice": "required"}, None, "must have tools"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice", "must be 'auto'"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            None,
            "must have the tool that tool_choice names, 'other'",
        ),
        (
            {
                "tools": [
                    WEATHER,
                    {
                        "type": "function",
                        "function": {"name": "f", "strict": True, "parameters": {"not": {}}},
                    },
                ]
            },
            "tools[1].function.parameters",
            'cannot be enforced: Unimplemented keys: ["not"]',
        ),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_its_name(
    running: Running, fields: dict[str, Any], param: str | None, said: str
) -> None:
    answer = running.chat(**fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and said in error["message"]


# ------------------------------------------------------------------------------------- clients
def test_openai_parses_what_it_asked_for(running: Running) -> None:
    from openai import OpenAI, pydantic_function_tool

    client = OpenAI(base_url=f"{running.url}/v1", api_key=KEY)
    said: Any = [{"role": "user", "content": "What is Paris?"}]
    answer = client.chat.completions.parse(model="pocket", messages=said, response_format=City)
    assert isinstance(answer.choices[0].message.parsed, City)
    with client.chat.completions.stream(
        model="pocket", messages=said, response_format=City, temperature=1, seed=1
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)
    answer = client.chat.completions.parse(
        model="pocket",
        messages=said,
        tools=[pydantic_function_tool(City)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1,
        seed=2,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls and isinstance(calls[0].function.parsed_arguments, City)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_its_model(running: Running, method: Any) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=f"{running.url}/v1", api_key=KEY, model="pocket", temperature=1, seed=3
    )
    found = chat.with_structured_output(City, method=method).invoke("What is Paris?")
    assert isinstance(found, City)


@pytest.mark.parametrize("kind", ["tool", "native"])
def test_pydantic_ai_gets_its_output(running: Running, kind: str) -> None:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{running.url}/v1", api_key=KEY)
    model = OpenAIChatModel("pocket", provider=provider)
    output: Any = ToolOutput(City) if kind == "tool" else NativeOutput(City)
    agent = Agent(model, output_type=output, model_settings={"temperature": 1, "seed": 3})
    assert isinstance(agent.run_sync("What is Paris?").output, City)


def test_anthropic_gets_a_call_and_its_model(running: Running) -> None:
    from anthropic import Anthropic

    client = Anthropic(base_url=running.url, api_key=KEY)
    asked: Any = {"model": "pocket", "messages": [{"role": "user", "content": "What is Paris?"}]}
    asked |= {"max_tokens": 500, "extra_body": {"temperature": 1.0}}
    tools = [
        {"name": name, "input_schema": City.model_json_schema(), "strict": True}
        for name in ("first", "second")
    ]
    for choice in ({"type": "any"}, {"type": "tool", "name": "second"}):
        once = {**choice, "disable_parallel_tool_use": True}
        message = client.messages.create(**asked, tools=tools, tool_choice=once)
        (call,) = message.content
        assert call.type == "tool_use" and message.stop_reason == "tool_use"
        assert call.name in [choice.get("name", "first"), "second"]
        City.model_validate(call.input)
    # (this client leaves out lengths, so that a text need not end)
    assert isinstance(client.messages.parse(**asked, output_format=Size).parsed_output, Size)


def test_responses_are_parsed(running: Running) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{running.url}/v1", api_key=KEY)
    answer = client.responses.parse(model="pocket", input="What is Paris?", text_format=City)
    assert isinstance(answer.output_parsed, City)
