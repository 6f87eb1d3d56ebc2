"""What a request may say: what is honoured, refused by its name, and ignored."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.server.body import parsed
from mlx_kimi.server.tool_ids import ToolIds
from mlx_kimi.server.validation import ChatBody, CompletionBody, checked
from tests.server import WEATHER, Running, Scripted, pocket_tokenizer, serving

HI = [{"role": "user", "content": "Hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
CALL = {"id": "a", "function": {"name": "f", "arguments": "{}"}}


def refused(body: dict[str, Any], kind: Any = ChatBody) -> ApiError:
    with pytest.raises(ApiError) as caught:
        checked(kind, parsed(json.dumps(body).encode()))
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "fields, param, said",
    [
        ({"messages": []}, "messages", "must have at least 1 item"),
        ({"messages": None}, "messages", "must be a valid list"),
        ({"colour": "red"}, "colour", "is not known here"),
        ({"\n\x1b": 1}, "\n\x1b", "is not known here"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "must be 'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "must have content"),
        ({"messages": [*HI, {"role": "user", "content": 3}]}, "messages[1].content", "but is 3"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", ""),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "must have tool_call_id"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]},
            "messages[0]",
            "must not have tool_call_id",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
            "messages[0]",
            "must be an assistant's",
        ),
        ({"messages": [{**HI[0], "mood": 1}]}, "messages[0].mood", "is not known here"),
        ({"temperature": "hot"}, "temperature", "must be a valid number but is 'hot'"),
        ({"temperature": True}, "temperature", "but is True"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "one length"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": [1]}, "stop[0]", "must be a valid string"),
        ({"top_logprobs": 3}, None, "must have logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream_options": {"include_usage": True}}, None, "must have stream"),
        ({"presence_penalty": 0.5}, "presence_penalty", "must be 0.0 but is 0.5"),
        ({"frequency_penalty": -1}, "frequency_penalty", "must be 0.0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "must be {}"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "must have json_schema"),
        ({"tool_choice": "required"}, None, "must have tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "is missing"),
        ({"tools": [{**WEATHER, "type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [WEATHER, WEATHER]}, None, "two tools of the name get_weather"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "must match pattern",
        ),
        ({"functions": []}, "functions", "must be absent"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "must be 'none'"),
        ({"modalities": ["audio"]}, "modalities", "must be ['text']"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(
    fields: dict[str, Any], param: str | None, said: str
) -> None:
    error = refused({"messages": HI, **fields})
    assert error.param == param and said in error.message and "\n" not in error.message
    assert error.message.startswith((param or "the request").replace("\n\x1b", r"\n\x1b"))


@pytest.mark.parametrize(
    "fields, param",
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": ["a"] * 5, "n": 2}, None),
        ({"prompt": "a", "messages": HI}, "messages"),
    ],
)
def test_text_completions_refuse_likewise(fields: dict[str, Any], param: str | None) -> None:
    assert refused(fields, CompletionBody).param == param


def test_what_asks_for_nothing_is_taken() -> None:
    nothing = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "n": 1,
        "modalities": ["text"],
        "functions": None,
        "stop": None,
        "max_tokens": None,
        "stream": None,
        "tools": [],
    }
    metadata = {
        "user": "me",
        "metadata": {"a": [1]},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "prediction": {"type": "content", "content": "z"},
    }
    engine = Scripted()
    ignored = {"reasoning_content": "hm", "reasoning": "hm", "refusal": None, "annotations": []}
    answer = {"role": "assistant", "content": "Ho"}
    with serving(engine) as running:
        for more in ({}, nothing | metadata):
            for said in (answer, answer | (ignored if more else {})):
                body = {"messages": [*HI, said, *HI], **more}
                assert running.post("/v1/chat/completions", body).status_code == 200
    first, *others = engine.requests
    assert all(each.ids == first.ids for each in others)


def test_the_text_is_the_same_however_it_comes_in_parts() -> None:
    engine = Scripted()
    parts = [{"type": "text", "text": "Good"}, {"type": "text", "text": " morning"}]
    with serving(engine) as running:
        for content in ("Good morning", parts):
            running.post(
                "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}
            )
        for role in ("developer", "system"):  # in any place
            messages = [*HI, {"role": role, "content": "Be brief."}]
            assert running.post("/v1/chat/completions", {"messages": messages}).status_code == 200
    assert engine.requests[0].ids == engine.requests[1].ids
    assert engine.requests[2].ids == engine.requests[3].ids


# --------------------------------------------------------------------------------- text completions
@pytest.fixture(scope="module")
def spoken() -> Iterator[Running]:
    with serving(Scripted(["One, twö."])) as running:
        yield running


def test_a_text_goes_on(spoken: Running) -> None:
    body = {"prompt": "Zero,", "logprobs": 2, "max_tokens": 50}
    answer = spoken.post("/v1/completions", body).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "One, twö." and choice["finish_reason"] == "stop"
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) > 3
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert answer["usage"]["prompt_tokens"] == len(pocket_tokenizer().encode("Zero,"))
    assert spoken.engine.requests[-1].ids == tuple(pocket_tokenizer().encode("Zero,"))


def test_a_streamed_text_is_the_whole_one(spoken: Running) -> None:
    body = {"prompt": ["Zero,", "Null,"], "n": 2, "logprobs": 1}
    whole = spoken.post("/v1/completions", body).json()
    told = {**body, "stream_options": {"include_usage": True}}
    events = spoken.events("/v1/completions", told)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    for choice in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        found = [part["logprobs"] for part in parts if part["logprobs"]]
        for name, values in choice["logprobs"].items():
            assert [value for each in found for value in each[name]] == values
    assert events[-1]["usage"] == whole["usage"]
    prompts = [request.ids for request in spoken.engine.requests[-4:]]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]


def test_token_ids_are_taken_as_they_are(spoken: Running) -> None:
    for prompt, ids in (([1, 2, 3], [(1, 2, 3)]), ([[1], [2, 3]], [(1,), (2, 3)])):
        assert spoken.post("/v1/completions", {"prompt": prompt}).status_code == 200
        assert [request.ids for request in spoken.engine.requests[-len(ids) :]] == ids
    for prompt in ("", [""], [[]]):
        answer = spoken.post("/v1/completions", {"prompt": prompt})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


# ----------------------------------------------------------------------------------------- models
def test_the_model_is_known_by_its_name_alone(spoken: Running) -> None:
    (model,) = spoken.asking.get("/v1/models").json()["data"]
    assert model["id"] == "pocket" and model["max_model_len"] == 32_768
    assert spoken.asking.get("/v1/models/pocket").json() == model
    assert spoken.asking.get("/v1/models/moonshotai/Kimi").status_code == 404
    other = spoken.chat(model="gpt-4o")
    assert other.status_code == 404 and other.json()["error"]["code"] == "model_not_found"
    assert spoken.chat(model="pocket").status_code == 200


def test_calls_are_forgotten_for_newer_ones_under_a_bound() -> None:
    ids = ToolIds(memory=1000)
    outward = [ids.new() for _ in range(100)]
    for number, each in enumerate(outward):
        ids.remember(each, f"functions.f:{number}", "{ }", "{ }")

    def native(id: str) -> str:
        call = {"id": id, "function": {"name": "f", "arguments": "{}"}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        (found,) = ids.native([message])
        return str(found["tool_calls"][0]["id"])

    assert native(outward[99]) == "functions.f:99"
    assert native(outward[0]) == "functions.f:0"  # forgotten: made of the name and the place
    assert native(outward[50]) == "functions.f:0"
