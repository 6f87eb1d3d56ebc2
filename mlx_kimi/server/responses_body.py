"""What POST /v1/responses may say, and the same as a chat of OpenAI's older form.

Nothing is stored: what an earlier response would have to be looked up for is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    FailFast,
    Field,
    Tag,
    model_validator,
)

from mlx_kimi.server.tool_ids import check_results
from mlx_kimi.server.validation import (
    ChatBody,
    Drawn,
    Ignored,
    StreamOptions,
    Strict,
    check_has,
    checked,
    only,
)

Json = dict[str, Any]
# What an item of each type must have.
NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
# Tools that a server of OpenAI runs itself. Here none is; that they may be called obliges nobody.
HOSTED = ("web_search", "image_generation", "file_search", "code_interpreter")  # and later ones
LOGPROBS = "message.output_text.logprobs"  # in `include`; nothing else is left out of an answer
NAMES = {"response_format": "text.format"}
Role = Literal["user", "assistant", "system", "developer"]


class Part(Strict):
    """A part of an item's content. The model reads text alone."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None
    parsed: Ignored = None  # of OpenAI's own client
    prompt_cache_breakpoint: Ignored = None


class Item(Strict):
    """What was said, called or answered. Reasoning of other models is not read."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Role | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None
    summary: Ignored = None
    encrypted_content: Ignored = None
    caller: Ignored = None
    parsed_arguments: Ignored = None
    internal_chat_message_metadata_passthrough: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _without_thoughts(cls, value: Any) -> Any:
        is_reasoning = isinstance(value, dict) and value.get("type") == "reasoning"
        return {"type": "reasoning"} if is_reasoning else value

    @model_validator(mode="after")
    def _check(self) -> Item:
        check_has(self, self.type, NEEDED[self.type])
        return self

    @property
    def call(self) -> Json:
        """As a call of a chat."""
        name = full_name(self.namespace, self.name or "")
        return {"id": self.call_id, "function": {"name": name, "arguments": self.arguments}}


def full_name(namespace: str | None, name: str) -> str:
    """What the model calls a function."""
    return name if namespace is None else f"{namespace}.{name}"


def _text(content: str | Sequence[Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def messages(items: Sequence[Item]) -> list[Json]:
    """Items as messages of a chat: what the model said in one answer is one message."""
    found: list[Json] = []
    for item in items:
        if item.type == "message":
            found.append({"role": item.role, "content": _text(item.content)})
        elif item.type == "function_call":
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            found[-1].setdefault("tool_calls", []).append(item.call)
        elif item.type == "function_call_output":
            result = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
            found.append(result)
    return found


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    defer_loading: Ignored = None
    allowed_callers: Ignored = None
    output_schema: Ignored = None

    def plain(self, namespace: str | None = None) -> Json:
        """As a tool of a chat."""
        function = {
            "name": full_name(namespace, self.name),
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict,
        }
        return {"type": "function", "function": function}


class Namespace(Strict):
    """Functions under one name."""

    type: Literal["namespace"]
    name: str
    description: str | None = None
    tools: list[FunctionTool]


class Hosted(BaseModel):
    """A tool that OpenAI's server would run."""

    type: str


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind.startswith(HOSTED):
        return "[hosted]"
    return f"[{kind}]" if kind in ("function", "namespace") else None


Tool = Annotated[
    Annotated[FunctionTool, Tag("[function]")]
    | Annotated[Namespace, Tag("[namespace]")]
    | Annotated[Hosted, Tag("[hosted]")],
    Discriminator(
        _kind,
        custom_error_type="unsupported_value",
        custom_error_message="must be of type function, or a namespace of such",
    ),
]


class ChosenFunction(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: str
    namespace: str | None = None


class TextConfig(Strict):
    """How the answer must look. `verbosity` is a hint."""

    format: Json | None = None
    verbosity: Ignored = None

    @property
    def plain(self) -> Json | None:
        """As the response_format of a chat."""
        if self.format is None or self.format.get("type") != "json_schema":
            return self.format
        schema = {name: value for name, value in self.format.items() if name != "type"}
        return {"type": "json_schema", "json_schema": schema}


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesBody(Drawn):
    """POST /v1/responses"""

    input: Annotated[list[Item], FailFast(), Field(min_length=1), BeforeValidator(_as_items)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    previous_response_id: Annotated[Any, only()] = None
    conversation: Annotated[Any, only()] = None
    prompt: Annotated[Any, only()] = None
    background: Annotated[Any, only(False)] = None
    truncation: Annotated[Any, only("disabled")] = None
    context_management: Annotated[Any, only([])] = None
    moderation: Annotated[Any, only()] = None
    reasoning: Ignored = None  # a hint for models that think
    max_tool_calls: Ignored = None  # of tools that a server runs
    client_metadata: Ignored = None
    prompt_cache_options: Ignored = None

    @property
    def functions(self) -> list[tuple[str | None, FunctionTool]]:
        """What may be called, each with its namespace."""
        found: list[tuple[str | None, FunctionTool]] = []
        for tool in self.tools or ():
            if isinstance(tool, FunctionTool):
                found.append((None, tool))
            elif isinstance(tool, Namespace):
                found += [(tool.name, each) for each in tool.tools]
        return found

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def chat(self) -> ChatBody:
        """The same in the words of a chat.

        Raises:
            ApiError: a result answers no call, or it asks for what that cannot, either.
        """
        check_results(
            (f"input[{number}].call_id", item.call_id, item.type == "function_call")
            for number, item in enumerate(self.input)
            if item.call_id is not None
        )
        said = [{"role": "system", "content": self.instructions}] if self.instructions else []
        said += messages(self.input)
        drawn = {name: getattr(self, name) for name in Drawn.model_fields}
        chat: Json = {
            **drawn,
            "messages": said,
            "max_tokens": self.max_output_tokens,
            "tools": [tool.plain(space) for space, tool in self.functions],
            "parallel_tool_calls": self.parallel_tool_calls,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs,
            "response_format": self.text and self.text.plain,
        }
        chosen = self.tool_choice
        if isinstance(chosen, ChosenFunction):
            name = full_name(chosen.namespace, chosen.name)
            chat["tool_choice"] = {"type": "function", "function": {"name": name}}
        else:
            chat["tool_choice"] = chosen
        return checked(ChatBody, chat, NAMES)
