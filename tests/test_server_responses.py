"""OpenAI's Responses over HTTP: items and events, what codex sends, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server import JSON, WEATHER, Running, Scripted, pocket_tokenizer, serving
from tests.test_server_chat import TWO_CALLS

RESPONSES = "/v1/responses"
TOOL = {"type": "function", **WEATHER["function"]}
GROUP = {
    "type": "namespace",
    "name": "agents",
    "description": "Sub-agents.",
    "tools": [{"type": "function", "name": "spawn", "strict": False, "parameters": {}}],
}
LOGPROBS = ["message.output_text.logprobs"]
# The events of a text and of a call, without what comes several times.
TEXT = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
CALL = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]
BEGIN = ["response.created", "response.in_progress"]


@pytest.fixture(scope="module")
def hello() -> Iterator[Running]:
    with serving(Scripted(["Hello, wörld.<|im_end|>"])) as running:
        yield running


def assembled(events: list[Any]) -> dict[str, Any]:
    """The response that a stream tells; its indices, ids and sums are what clients check."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items: list[Any] = []
    for event in events[2:-1]:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
            items.append({**event["item"], "said": ""})
            continue
        item = items[event["output_index"]]
        if event["type"] == "response.output_item.done":
            said = item.pop("said")
            assert event["item"]["id"] == item["id"]
            parts = event["item"].get("content", [])
            assert said == event["item"].get("arguments", "".join(part["text"] for part in parts))
            items[event["output_index"]] = event["item"]
            continue
        assert event["item_id"] == item["id"] and event.get("content_index", 0) == 0
        if event["type"].endswith(".delta"):
            item["said"] += event["delta"]
        elif event["type"].endswith(("text.done", "arguments.done")):
            assert item["said"] == event.get("text", event.get("arguments"))
    response = events[-1]["response"]
    assert response["output"] == items
    assert {event["response"]["id"] for event in (*events[:2], events[-1])} == {response["id"]}
    return response


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{**item, "id": "", "call_id": ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "output": output}


@pytest.mark.parametrize(
    "text, fields, status, order",
    [
        ("Hello, wörld.<|im_end|>", {}, "completed", TEXT),
        ("Hello, wörld.", {"include": LOGPROBS, "top_logprobs": 2}, "completed", TEXT),
        ("One, two, three", {"max_output_tokens": 3}, "incomplete", TEXT),
        ("<|im_end|>", {}, "completed", []),
        (TWO_CALLS, {"tools": [TOOL]}, "completed", [*TEXT, *CALL, *CALL]),
        (TWO_CALLS, {"tools": [TOOL], "max_output_tokens": 20}, "incomplete", [*TEXT, *CALL]),
        (TWO_CALLS, {"tools": [TOOL], "parallel_tool_calls": False}, "completed", [*TEXT, *CALL]),
        (TWO_CALLS, {"tools": [TOOL], "tool_choice": "none"}, "completed", TEXT),
    ],
)
def test_a_stream_says_what_the_whole_answer_says(
    text: str, fields: dict[str, Any], status: str, order: list[str]
) -> None:
    body = {"model": "pocket", "input": "Hi", "instructions": "Be brief.", **fields}
    with serving(Scripted([text])) as running:
        whole = running.post(RESPONSES, body).json()
        events = running.events(RESPONSES, body)
    kinds = [event["type"] for event in events]
    once = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    assert once == [*BEGIN, *order, f"response.{status}"]
    assert without_ids(assembled(events)) == without_ids(whole)
    assert whole["status"] == status and whole["instructions"] == "Be brief."
    if whole["output"]:
        assert whole["output"][-1]["status"] == status
    usage = whole["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == 2
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert whole["incomplete_details"] == cut
    if "include" in fields:
        (part,) = whole["output"][0]["content"]
        spelled = b"".join(bytes(token["bytes"]) for token in part["logprobs"])
        assert spelled.decode() == part["text"]
        assert all(len(token["top_logprobs"]) == 2 for token in part["logprobs"])


def test_a_silent_stream_sends_events_that_every_client_sees() -> None:
    with serving(Scripted(["Hello."], before=0.7), keepalive=0.2) as running:
        events = running.events(RESPONSES, {"input": "Hi"})
    assert [event["type"] for event in events[:5]] == [BEGIN[0], *[BEGIN[1]] * 4]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_items_are_the_messages_that_a_chat_has() -> None:
    engine = Scripted()
    said = {"type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": []}
    theirs = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x", "more": 1},
        {"type": "message", "role": "assistant", "content": [said], "id": "msg_1", "phase": None},
        *(
            {"type": "function_call", "call_id": id, "name": "get_weather", "arguments": "{ }"}
            for id in ("a", "b")
        ),
        {"type": "function_call_output", "call_id": "a", "output": "sunny"},
        {
            "type": "function_call_output",
            "call_id": "b",
            "output": [{"type": "input_text", "text": "rainy"}],
        },
        {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "cloudy"},
    ]

    def calls(*ids: str, arguments: str) -> list[Any]:
        function = {"name": "get_weather", "arguments": arguments}
        return [{"id": id, "function": function} for id in ids]

    ours = [
        {"role": "system", "content": "Begin."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": calls("a", "b", arguments="{ }"),
        },
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        {"role": "tool", "tool_call_id": "b", "content": "rainy"},
        {"role": "assistant", "tool_calls": calls("c", arguments="{}")},
        {"role": "tool", "tool_call_id": "c", "content": "cloudy"},
    ]
    with serving(engine) as running:
        sent = {"input": theirs, "instructions": "Begin.", "tools": [TOOL]}
        answer = running.post(RESPONSES, sent)
        assert answer.status_code == 200, answer.text
        running.post("/v1/chat/completions", {"messages": ours, "tools": [WEATHER]})
    first, second = engine.requests
    assert first.ids == second.ids


def test_functions_of_a_namespace_are_called_by_both_names() -> None:
    """The model has one name for such; clients have two. Hosted tools are not offered."""
    written = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.agents.spawn:0"
        '<|tool_call_argument_begin|>{"a" : 1}<|tool_call_end|><|tool_calls_section_end|>'
    )
    engine = Scripted([written, "Done.<|im_end|>"])
    asked = [{"role": "user", "content": "Hi"}]
    tools = [GROUP, {"type": "web_search", "external_web_access": True}]
    with serving(engine) as running:
        answer = running.post(RESPONSES, {"input": asked, "tools": tools}).json()
        (call,) = answer["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "ok"}
        running.post(RESPONSES, {"input": [*asked, call, result], "tools": tools})
    assert (call["namespace"], call["name"]) == ("agents", "spawn")
    assert answer["tools"] == tools
    first, second = ([*request.ids] for request in engine.requests)
    said = first + pocket_tokenizer().encode_with_control(written)
    assert second[: len(said)] == said
    assert "web_search" not in pocket_tokenizer().decode(first)


@pytest.mark.parametrize(
    "fields, param, said",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "must be absent"),
        ({"conversation": "c"}, "conversation", "must be absent"),
        ({"background": True}, "background", "must be False"),
        ({"prompt": {"id": "p"}}, "prompt", "must be absent"),
        ({"truncation": "auto"}, "truncation", "must be 'disabled'"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "must be []"),
        ({"input": []}, "input", "must have at least 1 item"),
        ({"input": 3}, "input", "must be a valid list"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type", "must be 'message'"),
        ({"input": [{"role": "user"}]}, "input[0]", "must have content"),
        (
            {
                "input": [
                    {"role": "user", "content": "Hi"},
                    {"type": "function_call_output", "call_id": "a", "output": "x"},
                ]
            },
            "input[1].call_id",
            "must be the id of a call before it but is 'a'",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "must be 'input_text'",
        ),
        ({"tools": [{"type": "custom", "name": "apply_patch"}]}, "tools[0]", "of type function"),
        ({"tools": [{"type": "mcp", "server_url": "http://x"}]}, "tools[0]", "of type function"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "is missing"),
        ({"tool_choice": "required"}, None, "must have tools"),
        ({"tool_choice": {"type": "function", "name": "f"}}, None, "must have tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "must be 'function'"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
            "text.format.schema",
            "cannot be enforced",
        ),
        ({"colour": "red"}, "colour", "is not known here"),
        ({"temperature": -1}, "temperature", "must"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_its_name(
    hello: Running, fields: dict[str, Any], param: str | None, said: str
) -> None:
    answer = hello.post(RESPONSES, {"input": "Hi", **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error
    assert error["message"].startswith(param or "the request") and said in error["message"]


def test_what_is_echoed_can_be_sent(hello: Running) -> None:
    content = '{"input": "Hi", "metadata": {"a": NUMBER, "b": "\\ud800"}}'
    for number, status in (("1e999", 400), ("-1e999", 400), ("1e300", 200)):
        answer = hello.asking.post(
            RESPONSES, content=content.replace("NUMBER", number), headers=JSON
        )
        assert answer.status_code == status, answer.text
    assert answer.json()["metadata"] == {"a": 1e300, "b": "?"}


def test_what_asks_for_nothing_is_taken(hello: Running) -> None:
    nothing = {
        "store": True,
        "metadata": {"a": "b"},
        "previous_response_id": None,
        "reasoning": {"effort": "high", "summary": "auto"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "truncation": "disabled",
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "client_metadata": {"x": "y"},
        "max_tool_calls": 3,
        "include": ["reasoning.encrypted_content"],
        "stream_options": {"include_obfuscation": False},
    }
    plain = hello.post(RESPONSES, {"input": "Hi"}).json()
    answer = hello.post(RESPONSES, {"input": "Hi", **nothing}).json()
    assert [item["content"] for item in answer["output"]] == [
        item["content"] for item in plain["output"]
    ]
    assert answer["metadata"] == {"a": "b"} and answer["store"] is False
    first, second = hello.engine.requests[-2:]
    assert first.ids == second.ids
