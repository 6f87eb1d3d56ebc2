"""Programs' own clients over real sockets: three rounds of tools each, streamed or not, and errors
that are the client's own exceptions."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network for prices

from mlx_kimi.errors import ContextFull, KimiError
from mlx_kimi.server.engine import QueueFull
from mlx_kimi.server.security import Access
from tests.server import (
    WEATHER,
    Running,
    Scripted,
    failed,
    pocket_tokenizer,
    serving,
    serving_pocket,
    until,
)

pytestmark = pytest.mark.slow  # their imports take seconds

KEY = "secret-key-1"
SKIES = {"Paris": "sunny, 21 degrees", "London": "rainy, 9 degrees", "Zürich": "cloudy, 3 degrees"}
NEAR = 64  # tokens between two states that are kept
QUESTIONS = [f"What is the weather in {city}?" for city in SKIES]


def scripted() -> Scripted:
    """A model that calls `get_weather` for each question and then says what it heard."""
    answers = []
    for number, (city, sky) in enumerate(SKIES.items()):
        arguments = json.dumps({"city": city}, ensure_ascii=False, separators=(" , ", " : "))
        answers += [
            "<|tool_calls_section_begin|><|tool_call_begin|>"
            f"functions.get_weather:{number}<|tool_call_argument_begin|>{arguments}"
            "<|tool_call_end|><|tool_calls_section_end|>",
            f"The weather in {city} is {sky}.<|im_end|>",
        ]
    return Scripted(answers)


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return SKIES[city]


class Talk(NamedTuple):
    """What a client had of a conversation."""

    said: list[str]
    called: list[str]  # cities
    usage: tuple[int, int]  # tokens of all prompts and answers, as it was told
    logprobs: list[float]  # of the last answer; empty where the client does not ask for them


# ----------------------------------------------------------------------------------------- clients
def results_of(message: Any, called: list[str]) -> Iterator[dict[str, Any]]:
    """Run the calls of a message of OpenAI's form; `called` gets their cities."""
    for call in message.tool_calls:
        arguments = json.loads(call.function.arguments)
        called.append(arguments["city"])
        result = {"role": "tool", "tool_call_id": call.id}
        yield {**result, "content": get_weather(**arguments)}


def with_openai(url: str, stream: bool) -> Talk:
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    messages: list[Any] = []
    said, called, logprobs, usage = [], [], [], [0, 0]
    asked = {"model": "pocket", "tools": [WEATHER], "logprobs": True, "top_logprobs": 1}
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        while True:
            if stream:
                told = {"include_usage": True}
                with client.chat.completions.stream(
                    messages=messages, stream_options=told, **asked
                ) as events:
                    for _ in events:
                        pass
                    answer = events.get_final_completion()
            else:
                answer = client.chat.completions.create(messages=messages, **asked)
            (choice,) = answer.choices
            usage[0] += answer.usage.prompt_tokens
            usage[1] += answer.usage.completion_tokens
            assert answer.usage.prompt_tokens_details.cached_tokens == 2
            message = choice.message
            messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
            logprobs = [token.logprob for token in choice.logprobs.content]
            if not message.tool_calls:
                assert choice.finish_reason == "stop"
                said.append(message.content)
                break
            assert choice.finish_reason == "tool_calls"
            messages += results_of(message, called)
    return Talk(said, called, tuple(usage), logprobs)


def with_responses(url: str, stream: bool) -> Talk:
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    items: list[Any] = []
    said, called, usage, logprobs = [], [], [0, 0], []
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    asked = {"model": "pocket", "tools": [tool], "include": include, "store": False}
    for question in QUESTIONS:
        items.append({"role": "user", "content": question})
        while True:
            if stream:
                with client.responses.stream(input=items, **asked) as events:
                    for _ in events:
                        pass
                    answer = events.get_final_response()
            else:
                answer = client.responses.create(input=items, **asked)
            assert answer.status == "completed" and answer.error is None
            usage[0] += answer.usage.input_tokens
            usage[1] += answer.usage.output_tokens
            assert answer.usage.input_tokens_details.cached_tokens == 2
            items += answer.output
            calls = [item for item in answer.output if item.type == "function_call"]
            if not calls:
                (message,) = answer.output
                logprobs = [token.logprob for token in message.content[0].logprobs]
                said.append(answer.output_text)
                break
            for call in calls:
                arguments = json.loads(call.arguments)
                called.append(arguments["city"])
                result = {"type": "function_call_output", "call_id": call.call_id}
                items.append({**result, "output": get_weather(**arguments)})
    return Talk(said, called, tuple(usage), logprobs)


def with_anthropic(url: str, stream: bool) -> Talk:
    """Arguments go to the client as objects, and come back so."""
    import anthropic

    client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key=KEY, max_retries=0)
    messages: list[Any] = []
    said, called, usage = [], [], [0, 0]
    function = WEATHER["function"]
    tool = {"name": function["name"], "input_schema": function["parameters"]}
    tool["description"] = function["description"]
    asked = {"model": "claude-of-any-name", "max_tokens": 200, "tools": [tool]}
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        while True:
            if stream:
                with client.messages.stream(messages=messages, **asked) as events:
                    answer = events.get_final_message()
            else:
                answer = client.messages.create(messages=messages, **asked)
            told = answer.usage
            usage[0] += told.input_tokens + told.cache_read_input_tokens
            usage[1] += told.output_tokens
            assert told.cache_read_input_tokens == 2
            messages.append({"role": "assistant", "content": answer.content})
            calls = [block for block in answer.content if block.type == "tool_use"]
            if not calls:
                assert answer.stop_reason == "end_turn"
                said.append(answer.content[0].text)
                break
            assert answer.stop_reason == "tool_use"
            called += [call.input["city"] for call in calls]
            results = [
                {
                    "type": "tool_result",
                    "tool_use_id": call.id,
                    "content": get_weather(**call.input),
                }
                for call in calls
            ]
            messages.append({"role": "user", "content": results})
    return Talk(said, called, tuple(usage), [])


def with_litellm(url: str, stream: bool) -> Talk:
    import litellm

    litellm.suppress_debug_info = True
    messages: list[Any] = []
    said, called, logprobs, usage = [], [], [], [0, 0]
    asked = {"model": "openai/pocket", "api_base": url, "api_key": KEY, "tools": [WEATHER]}
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        while True:
            how = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            answer = litellm.completion(messages=messages, **asked, **how)
            if stream:
                answer = litellm.stream_chunk_builder(list(answer), messages=messages)
            usage[0] += answer.usage.prompt_tokens
            usage[1] += answer.usage.completion_tokens
            message = answer.choices[0].message
            messages.append(message.model_dump())
            if not message.tool_calls:
                said.append(message.content)
                break
            messages += results_of(message, called)
    return Talk(said, called, tuple(usage), logprobs)


def with_langchain(url: str, stream: bool) -> Talk:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    plain = ChatOpenAI(base_url=url, api_key=KEY, model="pocket", stream_usage=True, logprobs=True)
    model = plain.bind_tools([WEATHER])
    messages: list[Any] = []
    said, called, logprobs, usage = [], [], [], [0, 0]
    for question in QUESTIONS:
        messages.append(HumanMessage(question))
        while True:
            if stream:
                first, *others = model.stream(messages)
                answer = sum(others, first)
            else:
                answer = model.invoke(messages)
            messages.append(answer)
            usage[0] += answer.usage_metadata["input_tokens"]
            usage[1] += answer.usage_metadata["output_tokens"]
            logprobs = [
                token["logprob"] for token in answer.response_metadata["logprobs"]["content"]
            ]
            if not answer.tool_calls:
                said.append(answer.content)
                break
            for call in answer.tool_calls:
                called.append(call["args"]["city"])
                messages.append(ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]))
    return Talk(said, called, tuple(usage), logprobs)


def with_pydantic_ai(url: str, stream: bool) -> Talk:
    import asyncio

    called = []

    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        called.append(city)
        return SKIES[city]

    agent = pydantic_ai_agent(url, [get_weather])
    history: list[Any] = []
    said, usage = [], [0, 0]

    async def converse() -> None:
        for question in QUESTIONS:
            if stream:
                async with agent.run_stream(question, message_history=history[:]) as result:
                    said.append(await result.get_output())
            else:
                result = await agent.run(question, message_history=history[:])
                said.append(result.output)
            history[:] = result.all_messages()
            usage[0] += result.usage.input_tokens
            usage[1] += result.usage.output_tokens

    asyncio.run(converse())
    return Talk(said, called, tuple(usage), [])


def pydantic_ai_agent(url: str, tools: list[Callable[..., str]]) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=url, api_key=KEY)
    return Agent(OpenAIChatModel("pocket", provider=provider), tools=tools)


def with_llm(url: str, stream: bool) -> Talk:
    called, said, usage = [], [], [0, 0]

    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        called.append(city)
        return SKIES[city]

    conversation = llm_model(url).conversation(tools=[get_weather])
    for question in QUESTIONS:
        chain = conversation.chain(question, stream=stream)
        for response in chain.responses():
            text = response.text()
            found = response.usage()
            usage[0] += found.input
            usage[1] += found.output
        said.append(text)
    return Talk(said, called, tuple(usage), [])


def llm_model(url: str) -> Any:
    from llm.default_plugins.openai_models import Chat

    model = Chat("pocket", model_name="pocket", api_base=url, supports_tools=True)
    model.key = KEY
    return model


CLIENTS = [
    with_openai,
    with_responses,
    with_anthropic,
    with_litellm,
    with_langchain,
    with_pydantic_ai,
    with_llm,
]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_three_rounds_of_tools(client: Callable[[str, bool], Talk]) -> None:
    talks = []
    for stream in (False, True):
        engine = scripted()
        with serving(engine, Access(key=KEY)) as running:
            talks.append(talk := client(f"{running.url}/v1", stream))
            until(lambda: len(running.lines) == 2 * len(SKIES))
            lines = running.lines
        assert [line["finish"] for line in lines] == [["tool_calls"], ["stop"]] * 3
        told = [sum(line[f"{kind}_tokens"] for line in lines) for kind in ("prompt", "completion")]
        assert talk.usage == tuple(told)
        assert talk.called == list(SKIES)
        assert talk.said == [f"The weather in {city} is {sky}." for city, sky in SKIES.items()]
        assert_replayed(engine)
    assert talks[0] == talks[1]


def assert_replayed(engine: Scripted) -> None:
    """The last prompt holds every call as it was written, token by token."""
    tokenizer = pocket_tokenizer()
    prompt = list(engine.requests[-1].ids)
    for number, written in enumerate(engine.answers):
        before = list(engine.requests[number].ids)
        assert isinstance(written, str)
        said = tokenizer.encode_with_control(written.removesuffix("<|im_end|>"))
        if number < len(engine.answers) - 1:
            assert prompt[: len(before) + len(said)] == before + said


def test_three_rounds_of_tools_with_the_pocket_model() -> None:
    """The model that ships inside calls what is offered, and uses the result; nothing is read
    twice but a few tokens."""
    import openai

    with serving_pocket(access=Access(key=KEY)) as running:
        url = f"{running.url}/v1"
        client = openai.OpenAI(base_url=url, api_key=KEY)
        messages: list[Any] = []
        known = 0  # tokens that the model has read or drawn
        for question in ("Paris", "London", "Rome"):
            messages.append({"role": "user", "content": f"What is the weather in {question}?"})
            asked = {"model": "pocket", "messages": messages, "tools": [WEATHER]}
            answer = client.chat.completions.create(**asked)
            assert answer.usage.prompt_tokens_details.cached_tokens >= known - NEAR
            message = answer.choices[0].message
            (call,) = message.tool_calls
            assert json.loads(call.function.arguments) == {"city": question}
            messages.append(message.model_dump(exclude_none=True))
            result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}
            messages.append(result)
            known = answer.usage.total_tokens
            answer = client.chat.completions.create(**asked)
            assert answer.usage.prompt_tokens_details.cached_tokens >= known - NEAR
            message = answer.choices[0].message
            assert message.content == f"The weather in {question} is sunny, 21 degrees."
            messages.append(message.model_dump(exclude_none=True))
            known = answer.usage.total_tokens


# ------------------------------------------------------------------------------------------ errors
@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(Scripted(), Access(key=KEY)) as running:
        yield running


@pytest.fixture
def full(locked: Running) -> Iterator[Running]:
    locked.engine.refuse = QueueFull(4, 1)
    yield locked
    locked.engine.refuse = None


@pytest.fixture
def small(locked: Running) -> Iterator[Running]:
    locked.engine.refuse = ContextFull("the prompt has 9 tokens but the model's context holds 8")
    yield locked
    locked.engine.refuse = None


HI = [{"role": "user", "content": "Hi"}]


def test_openai_raises_its_own_exceptions(locked: Running, request: pytest.FixtureRequest) -> None:
    import openai

    def asks(url: str, key: str = KEY, headers: Any = None, **fields: Any) -> None:
        client = openai.OpenAI(
            base_url=url, api_key=key, max_retries=0, default_headers=headers or {}
        )
        client.chat.completions.create(**{"model": "pocket", "messages": HI, **fields})

    url = f"{locked.url}/v1"
    for error, given in (
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"extra_body": {"colour": "red"}}),
        (openai.AuthenticationError, {"key": "wrong-key-1"}),
        (openai.NotFoundError, {"model": "gpt-4o"}),
        (openai.PermissionDeniedError, {"headers": {"host": "evil.example"}}),
        (openai.PermissionDeniedError, {"headers": {"origin": "http://evil.example"}}),
        (openai.APIStatusError, {"headers": {"content-encoding": "br"}}),
        (openai.BadRequestError, {"temperature": -1, "stream": True}),
    ):
        with pytest.raises(error) as caught:
            asks(url, **given)
        assert caught.value.body["message"] and caught.value.request_id.startswith("req_")
    request.getfixturevalue("full")
    with pytest.raises(openai.InternalServerError, match="wait already"):
        asks(url)
    request.getfixturevalue("small")
    with pytest.raises(openai.BadRequestError) as caught:
        asks(url)
    assert caught.value.code == "context_length_exceeded"


def test_anthropic_raises_its_own_exceptions(
    locked: Running, request: pytest.FixtureRequest
) -> None:
    import anthropic

    def asks(key: str = KEY, headers: Any = None, **fields: Any) -> None:
        client = anthropic.Anthropic(
            base_url=locked.url, api_key=key, max_retries=0, default_headers=headers or {}
        )
        given = {"model": "pocket", "max_tokens": 9, "messages": HI, **fields}
        client.messages.create(**given)

    for error, kind, given in (
        (anthropic.BadRequestError, "invalid_request_error", {"extra_body": {"temperature": -1}}),
        (anthropic.BadRequestError, "invalid_request_error", {"messages": []}),
        (anthropic.AuthenticationError, "authentication_error", {"key": "wrong-key-1"}),
        (anthropic.NotFoundError, "not_found_error", {"model": "gpt-4o"}),
        (
            anthropic.PermissionDeniedError,
            "permission_error",
            {"headers": {"host": "evil.example"}},
        ),
        (
            anthropic.BadRequestError,
            "invalid_request_error",
            {"extra_body": {"temperature": -1}, "stream": True},
        ),
    ):
        with pytest.raises(error) as caught:
            asks(**given)
        assert caught.value.type == kind and caught.value.body["type"] == "error"
        assert caught.value.request_id == caught.value.body["request_id"]
        assert caught.value.request_id.startswith("req_")
    request.getfixturevalue("full")
    with pytest.raises(anthropic.ServiceUnavailableError, match="wait already"):
        asks()
    request.getfixturevalue("small")
    # The words by which Claude Code knows that it must make the conversation shorter.
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: [0-9]+ tokens > "):
        asks()


def test_a_stream_that_fails_raises_the_exceptions_of_each_client() -> None:
    import anthropic
    import openai

    with serving(Scripted([failed(KimiError("the GPU is gone"))])) as running:
        theirs = anthropic.Anthropic(base_url=running.url, api_key=KEY, max_retries=0)
        with (
            pytest.raises(anthropic.APIStatusError, match="the GPU is gone") as caught,
            theirs.messages.stream(model="pocket", max_tokens=9, messages=HI) as events,
        ):
            events.get_final_message()
        assert caught.value.type == "api_error" and caught.value.request_id.startswith("req_")
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
        with client.responses.stream(model="pocket", input="Hi") as events:
            *_, last = events
        assert last.type == "response.failed" and last.response.status == "failed"
        assert last.response.error.message == "the GPU is gone"


def test_both_kinds_of_clients_read_the_list_of_models(locked: Running) -> None:
    import anthropic
    import openai

    theirs = anthropic.Anthropic(base_url=locked.url, api_key=KEY)
    (model,) = theirs.models.list()
    assert (model.id, model.type, model.max_input_tokens) == ("pocket", "model", 32_768)
    assert theirs.models.retrieve("pocket") == model and model.created_at.year > 2000
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY)
    (model,) = client.models.list()
    assert (model.id, model.object) == ("pocket", "model")
    assert client.models.retrieve("pocket").created == model.created


def test_openai_asks_again_when_the_queue_was_full(full: Running) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{full.url}/v1", api_key=KEY, max_retries=1)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="pocket", messages=HI)
    until(lambda: [line["status"] for line in full.lines[-2:]] == [503, 503])


def test_litellm_raises_its_own_exceptions(locked: Running, request: pytest.FixtureRequest) -> None:
    import litellm

    litellm.suppress_debug_info = True

    def asks(key: str = KEY, model: str = "pocket", **fields: Any) -> None:
        litellm.completion(
            f"openai/{model}",
            HI,
            api_base=f"{locked.url}/v1",
            api_key=key,
            max_retries=0,
            **fields,
        )

    for error, given in (
        (litellm.BadRequestError, {"temperature": -1}),
        (litellm.AuthenticationError, {"key": "wrong-key-1"}),
        (litellm.NotFoundError, {"model": "gpt-4o"}),
    ):
        with pytest.raises(error):
            asks(**given)
    request.getfixturevalue("full")
    with pytest.raises(litellm.ServiceUnavailableError):
        asks()
    request.getfixturevalue("small")
    with pytest.raises(litellm.ContextWindowExceededError):
        asks()


def test_langchain_raises_the_exceptions_of_openai(locked: Running) -> None:
    import openai
    from langchain_openai import ChatOpenAI

    def asks(key: str = KEY, model: str = "pocket", **fields: Any) -> None:
        url = f"{locked.url}/v1"
        ChatOpenAI(base_url=url, api_key=key, model=model, max_retries=0, **fields).invoke("Hi")

    for error, given in (
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"presence_penalty": 1}),
        (openai.AuthenticationError, {"key": "wrong-key-1"}),
        (openai.NotFoundError, {"model": "gpt-4o"}),
    ):
        with pytest.raises(error):
            asks(**given)


def test_pydantic_ai_raises_its_own_exceptions(locked: Running) -> None:
    from pydantic_ai.exceptions import ModelHTTPError

    agent = pydantic_ai_agent(f"{locked.url}/v1", [])
    assert agent.run_sync("Hi").output == "Hello."
    with pytest.raises(ModelHTTPError) as caught:
        agent.run_sync("Hi", model_settings={"temperature": -1})
    assert caught.value.status_code == 400
    assert "temperature" in str(caught.value.body)


def test_llm_says_what_is_wrong(locked: Running) -> None:
    import openai

    model = llm_model(f"{locked.url}/v1")
    assert model.prompt("Hi", stream=True).text() == "Hello."
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        model.prompt("Hi", presence_penalty=1.5).text()
    model.key = "wrong-key-1"
    with pytest.raises(openai.AuthenticationError):
        model.prompt("Hi").text()
