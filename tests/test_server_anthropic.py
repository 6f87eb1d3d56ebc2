"""Anthropic's Messages over HTTP: blocks, events, what Claude Code sends, and what is refused."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_kimi.server.anthropic_body import without_billing
from tests.scripted import call
from tests.server import Running, Scripted, pocket_tokenizer, serving, serving_pocket
from tests.test_server_chat import TWO_CALLS

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
IMAGE = {"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}
BILLING = "x-anthropic-billing-header: cc_version=2.1.{}.3d9; cc_entrypoint=cli; cch={:05x};"


@pytest.fixture(scope="module")
def hello() -> Iterator[Running]:
    with serving(Scripted(["Hello, wörld.<|im_end|>"])) as running:
        yield running


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "claude-opus-4-6", "max_tokens": 100, "messages": HI, **fields}


def assembled(events: list[Any]) -> dict[str, Any]:
    """The message that a stream tells, and that its events come in their order."""
    start, *rest = events
    assert start["type"] == "message_start"
    message, arguments, opened = start["message"], "", None
    assert message["stop_reason"] is None and message["content"] == []
    for event in rest:
        kind = event["type"]
        if kind == "content_block_start":
            assert opened is None and event["index"] == len(message["content"])
            opened, arguments = event["content_block"], ""
            message["content"].append(opened)
        elif kind == "content_block_delta":
            assert event["index"] == len(message["content"]) - 1 and opened is not None
            if opened["type"] == "text":
                assert event["delta"]["type"] == "text_delta"
                opened["text"] += event["delta"]["text"]
            else:
                assert event["delta"]["type"] == "input_json_delta"
                arguments += event["delta"]["partial_json"]
        elif kind == "content_block_stop":
            assert opened is not None
            if opened["type"] == "tool_use" and arguments.endswith("}"):
                opened["input"] = json.loads(arguments)
            opened = None
        elif kind == "message_delta":
            message |= {**event["delta"], "usage": event["usage"]}
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    assert opened is None and kinds[-2:] == ["message_delta", "message_stop"]
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{**block, "id": None} for block in message["content"]]
    return {**message, "id": None, "content": content}


@pytest.mark.parametrize(
    "text, fields, reason, stop, kinds",
    [
        ("Hello, wörld.<|im_end|>", {}, "end_turn", None, ["text"]),
        ("One, two, three", {"max_tokens": 3}, "max_tokens", None, ["text"]),
        (
            "One, two, three",
            {"stop_sequences": [" three", "wo, th"]},
            "stop_sequence",
            "wo, th",
            ["text"],
        ),
        ("<|im_end|>", {}, "end_turn", None, []),
        (TWO_CALLS, {"tools": [TOOL]}, "tool_use", None, ["text", "tool_use", "tool_use"]),
        (TWO_CALLS, {"tools": [TOOL], "max_tokens": 20}, "max_tokens", None, ["text", "tool_use"]),
        (
            TWO_CALLS,
            {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            "tool_use",
            None,
            ["text", "tool_use"],
        ),
        (
            TWO_CALLS,
            {"tools": [TOOL], "tool_choice": {"type": "none"}},
            "end_turn",
            None,
            ["text"],
        ),
        (TWO_CALLS, {}, "end_turn", None, ["text"]),
    ],
)
def test_a_stream_says_what_the_whole_answer_says(
    text: str, fields: dict[str, Any], reason: str, stop: str | None, kinds: list[str]
) -> None:
    with serving(Scripted([text])) as running:
        whole = running.post(MESSAGES, body(**fields)).json()
        events = running.events(f"{MESSAGES}?beta=true", body(**fields))
        counted = running.post(COUNT, body(**fields)).json()["input_tokens"]
    told = events[0]["message"]["usage"]
    assert told["input_tokens"] == counted and told["output_tokens"] == 0
    assert without_ids(assembled(events)) == without_ids(whole)
    usage = whole["usage"]
    assert usage["cache_read_input_tokens"] == 2
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, stop)
    assert [block["type"] for block in whole["content"]] == kinds
    assert whole["type"] == "message" and whole["model"] == "pocket"


def test_events_come_in_the_order_that_clients_know() -> None:
    with serving(Scripted([TWO_CALLS])) as running:
        events = running.events(MESSAGES, body(tools=[TOOL]))
    kinds = [event["type"] for event in events]
    order = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert order == [
        *("message_start", block[0], "ping", block[1], block[2]),
        *block,
        *block,
        *("message_delta", "message_stop"),
    ]
    ids = [e["content_block"]["id"] for e in events if e.get("index") and "content_block" in e]
    assert len(set(ids)) == 2 and all(id.replace("_", "").isalnum() for id in ids)


@pytest.mark.parametrize(
    "written, sent",
    [
        ('{"city": "Zürich"}', {"city": "Zürich"}),
        ("", {}),
        ('{"city": 1e999}', {}),
        ('{"city": NaN}', {}),
        ("[1]", {}),
        ("no JSON", {}),
    ],
)
def test_whatever_the_model_writes_as_arguments_is_an_object(written: str, sent: Any) -> None:
    answer = call("get_weather", 0, written)
    with serving(Scripted([answer])) as running:
        whole = running.post(MESSAGES, body(tools=[TOOL]))
        (event,) = [
            each
            for each in running.events(MESSAGES, body(tools=[TOOL]))
            if each["type"] == "content_block_start"
        ]
    assert whole.status_code == 200 and whole.json()["content"][0]["input"] == sent
    assert event["content_block"]["input"] == {}


def test_a_silent_stream_pings() -> None:
    with serving(Scripted(["Hello."], before=0.7), keepalive=0.2) as running:
        kinds = [event["type"] for event in running.events(MESSAGES, body())]
    assert kinds[0] == "message_start" and kinds[1:4] == ["ping"] * 3


# ------------------------------------------------------------------------------------------ prompts
def rendered(engine: Scripted, number: int = -1) -> str:
    return pocket_tokenizer().decode(engine.requests[number].ids, skip_control=False)


def test_blocks_are_the_messages_that_a_chat_has() -> None:
    """Results are messages by themselves; thoughts are not read; system prompts stand anywhere."""
    engine = Scripted()
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Zürich"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True}
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    text = [{"type": "text", "text": "no such city", **cached}]
    theirs = {
        "system": [
            {"type": "text", "text": "Be brief.", **cached},
            {"type": "text", "text": "Go."},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": [thought, {"type": "text", "text": "Well."}, call]},
            {
                "role": "user",
                "content": [{**result, "content": text}, {"type": "text", "text": "?"}],
            },
            {"role": "system", "content": "Stop."},
        ],
        "tools": [{**TOOL, "type": "custom", **cached, "eager_input_streaming": True}],
    }
    ours = [
        {"role": "system", "content": "Be brief.\n\nGo."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Well.",
            "tool_calls": [
                {"id": "a", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "Error: no such city"},
        {"role": "user", "content": "?"},
        {"role": "system", "content": "Stop."},
    ]
    function = {"name": TOOL["name"], "parameters": TOOL["input_schema"]}
    function["description"] = TOOL["description"]
    tools = [{"type": "function", "function": function}]
    with serving(engine) as running:
        answer = running.post(MESSAGES, body(**theirs))
        assert answer.status_code == 200, answer.text
        assert running.post("/v1/chat/completions", {"messages": ours, "tools": tools})
    assert rendered(engine, 0) == rendered(engine, 1)


def test_what_claude_code_sends_is_taken(hello: Running) -> None:
    """The fields of a turn as it sends them; only those that the model can use change anything."""
    system = [
        {"type": "text", "text": BILLING.format(107, 0xEB6C6)},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
    ]
    plain = body(system="You are an agent.", tools=[TOOL])
    sent = body(
        system=system,
        tools=[{**TOOL, "eager_input_streaming": True, "defer_loading": True}],
        metadata={"user_id": '{"session_id": "s"}'},
        thinking={"type": "enabled", "budget_tokens": 31999},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
        temperature=1,
        speed="fast",
        diagnostics={"previous_message_id": None},
        a_field_of_tomorrow={"x": 1},
    )
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219"}
    for each in (plain, sent):
        answer = hello.post(f"{MESSAGES}?beta=true", each, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["request-id"] == answer.headers["x-request-id"]
    first, second = hello.engine.requests[-2:]
    assert first.ids == second.ids and second.client.endswith('{"session_id": "s"}')
    assert second.sampling.temp == 1


def test_a_billing_line_is_no_part_of_a_prompt() -> None:
    line = BILLING.format(1, 2)
    assert without_billing(line) == ""
    assert without_billing(f"{line}\nYou are\n{line}") == f"You are\n{line}"
    assert without_billing("You are") == "You are"


def test_the_next_turn_is_cached_although_the_billing_line_changed() -> None:
    """On the model that ships inside: all that was read or drawn before, but a few tokens."""
    system = "You are a helpful assistant. " * 8
    messages: list[Any] = []
    known = 0  # tokens of the prompt before
    with serving_pocket() as running:
        for number, question in enumerate(["What is 347 + 58?", "What is 12 + 9?", "And 3 + 4?"]):
            messages.append({"role": "user", "content": question})
            line = BILLING.format(number, number)
            opened = [{"type": "text", "text": line}, {"type": "text", "text": system}]
            asked = body(
                system=opened if number % 2 else f"{line}\n{system}",
                messages=messages,
                max_tokens=12,
            )
            counted = running.post(COUNT, asked).json()["input_tokens"]
            answer = running.post(MESSAGES, asked).json()
            usage = answer["usage"]
            assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted
            assert usage["cache_read_input_tokens"] >= known - 64
            known = counted
            messages.append({"role": "assistant", "content": answer["content"]})


# --------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "fields, said",
    [
        ({"messages": []}, "messages must have at least 1 item"),
        ({"model": None}, "model must be a valid string"),
        ({"max_tokens": 0}, "max_tokens must be greater than or equal to 1"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type must"),
        (
            {"messages": [*HI, {"role": "assistant", "content": "I"}]},
            "messages must not end with an assistant's",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]},
            "messages[0].content[0] must have id, as a tool_use",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking"}]}]},
            "messages[0] must not have a thinking, as a user's",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}
                ]
            },
            "messages[0].content[0].tool_use_id must be the id of a call before it but is 'x'",
        ),
        ({"system": [IMAGE]}, "system[0].type must be 'text' but is 'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type must"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema is missing"),
        (
            {"tools": [{**TOOL, "strict": True, "input_schema": {"not": {}}}]},
            'tools[0].input_schema cannot be enforced: Unimplemented keys: ["not"]',
        ),
        ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools[0].input_examples must be []"),
        ({"tool_choice": {"type": "any"}}, "must have tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice names, 'f'"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice must have name"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "output_config.format.schema cannot be enforced",
        ),
        ({"output_format": {"type": "json_schema"}}, "output_format must be absent"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management.edits[0].type must be 'clear_thinking_20251015'",
        ),
        ({"mcp_servers": [{"url": "http://127.0.0.1"}]}, "mcp_servers must be []"),
        ({"container": "c"}, "container must be absent"),
        ({"temperature": -1}, "temperature must"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_its_name(
    hello: Running, fields: dict[str, Any], said: str
) -> None:
    answer = hello.post(MESSAGES, body(**fields))
    error = answer.json()
    assert answer.status_code == 400 and error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error" and said in error["error"]["message"]
    assert "\n" not in error["error"]["message"]
    is_of_the_answer = "max_tokens" in fields or "temperature" in fields or "enforced" in said
    if not is_of_the_answer:
        assert hello.post(COUNT, body(**fields)).json()["error"] == error["error"]


def test_errors_have_the_form_of_the_api_that_is_asked(hello: Running) -> None:
    theirs = {"anthropic-version": "2023-06-01"}
    for path, headers in ((f"{MESSAGES}/x", {}), ("/v1/x", theirs)):
        error = hello.post(path, {}, headers=headers).json()
        assert error["type"] == "error" and error["error"]["type"] == "not_found_error"
    assert "param" in hello.post("/v1/x", {}).json()["error"]
    other = hello.post(MESSAGES, body(model="gpt-4o"))
    assert other.status_code == 404 and other.json()["error"]["type"] == "not_found_error"
