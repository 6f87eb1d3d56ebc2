"""What POST /v1/messages may say, and the same as a chat of OpenAI's form.

Clients send fields of many betas: those that are not known are ignored, and so are hints, such as
how much to think. What would change the prompt or the answer is refused by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from mlx_kimi.server.tool_ids import check_results
from mlx_kimi.server.validation import (
    MOST_STOPS,
    NAME,
    ChatBody,
    StopText,
    check_has,
    checked,
    only,
)

Json = dict[str, Any]
# Claude Code opens the system prompt with a line that changes from request to request.
BILLING = re.compile(r"\s*x-anthropic-billing-header:[^\n]*\n*")
BETWEEN = "\n\n"  # two texts of a message
# What a block of each type must have.
NEEDED = {
    "text": ("text",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
    "thinking": (),
    "redacted_thinking": (),
}
TOOL_CHOICES = {"auto": "auto", "none": "none", "any": "required"}
NAMES = {"response_format": "output_config.format"}


class Lenient(BaseModel):
    """No value of another type; fields that are not listed are ignored."""

    model_config = ConfigDict(
        extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def without_billing(text: str) -> str:
    """A system prompt without the line of Claude Code's that would make it another each time."""
    found = BILLING.match(text)
    return text[found.end() :] if found else text


class Text(Lenient):
    """A text, of a system prompt or a result."""

    type: Literal["text"]
    text: str


class Block(Lenient):
    """A part of a message's content. The model reads text alone, and does not think."""

    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: Json | None = None
    tool_use_id: str | None = None
    content: str | list[Text] | None = None
    is_error: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Block:
        check_has(self, self.type, NEEDED[self.type])
        return self

    @property
    def call(self) -> Json:
        """As a call of OpenAI's form."""
        arguments = json.dumps(self.input, ensure_ascii=False)
        return {"id": self.id, "function": {"name": self.name, "arguments": arguments}}

    @property
    def result(self) -> Json:
        """As a message of OpenAI's form."""
        text = _text(self.content)
        said = f"Error: {text}" if self.is_error else text
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": said}


class Message(Lenient):
    """What was said."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    @model_validator(mode="after")
    def _check(self) -> Message:
        allowed = {"user": "tool_result", "assistant": "tool_use"}.get(self.role)
        kinds = {block.type for block in self.blocks} - {"text", allowed}
        if self.role == "assistant":
            kinds -= {"thinking", "redacted_thinking"}
        for kind in kinds:
            rule = f"must not have a {kind}, as a {self.role}'s"
            raise PydanticCustomError("invalid_value", "{rule}", {"rule": rule})
        return self

    @property
    def blocks(self) -> list[Block]:
        """Its content, unless that is a text."""
        return [] if isinstance(self.content, str) else self.content

    @property
    def plain(self) -> Iterator[Json]:
        """As messages of OpenAI's form: a result is one by itself."""
        if self.role == "system":
            yield from _system(self.content)
            return
        if isinstance(self.content, str):
            yield {"role": self.role, "content": self.content}
            return
        if self.role == "assistant":
            calls = [block.call for block in self.content if block.type == "tool_use"]
            said = _text([block for block in self.content if block.type == "text"])
            yield {"role": "assistant", "content": said, **({"tool_calls": calls} if calls else {})}
            return
        texts: list[Block] = []
        for block in self.content:
            if block.type == "text":
                texts.append(block)
                continue
            if texts:
                yield {"role": "user", "content": _text(texts)}
                texts = []
            yield block.result
        if texts:
            yield {"role": "user", "content": _text(texts)}


def _text(content: str | Sequence[Block | Text] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return BETWEEN.join(block.text or "" for block in content)


def _system(content: str | Sequence[Block | Text] | None) -> Iterator[Json]:
    """A system message, unless nothing is left of it."""
    texts = [content] if isinstance(content, str) else [block.text for block in content or ()]
    said = BETWEEN.join(filter(None, (without_billing(text or "") for text in texts)))
    if said:
        yield {"role": "system", "content": said}


class Tool(Lenient):
    """A tool that the client runs. All are offered at once, deferred or not."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    input_schema: Json
    strict: bool | None = None
    input_examples: Annotated[list[Any] | None, only([])] = None

    @property
    def plain(self) -> Json:
        """As a tool of OpenAI's form."""
        function = {"name": self.name, "parameters": self.input_schema, "strict": self.strict}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class ToolChoice(Lenient):
    """Whether tools may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            has = "have" if self.type == "tool" else "not have"
            rule = f"must {has} name, as of type {self.type}"
            raise PydanticCustomError("invalid_value", "{rule}", {"rule": rule})
        return self

    @property
    def plain(self) -> str | Json:
        """As OpenAI's chats have it."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return TOOL_CHOICES[self.type]


class OutputConfig(Lenient):
    """How the answer must look. `effort` is a hint for models that think."""

    format: Json | None = None
    task_budget: Annotated[Any, only()] = None

    @property
    def plain(self) -> Json | None:
        """As the response_format of OpenAI's chats."""
        if self.format is None:
            return None
        if self.format.get("type") != "json_schema":
            return self.format
        schema = {"name": "answer", "schema": self.format.get("schema"), "strict": True}
        return {"type": "json_schema", "json_schema": schema}


class Edit(Lenient):
    """A change of the prompt. Of thinking, which there is none of, nothing is to be cleared."""

    type: Literal["clear_thinking_20251015"]


class ContextManagement(Lenient):
    """Changes of the prompt that the server would make."""

    edits: list[Edit] | None = None


class Metadata(Lenient):
    """Who asks."""

    user_id: str | None = None


def _ends_with_a_question(messages: list[Message]) -> list[Message]:
    if messages[-1].role == "assistant":
        rule = "must not end with an assistant's: an answer that is begun is not gone on with"
        raise PydanticCustomError("unsupported_value", "{rule}", {"rule": rule})
    return messages


class MessagesBody(Lenient):
    """POST /v1/messages and, but for the fields of an answer, /v1/messages/count_tokens"""

    model: str
    messages: Annotated[
        list[Message], FailFast(), Field(min_length=1), AfterValidator(_ends_with_a_question)
    ]
    system: str | list[Text] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    metadata: Metadata | None = None
    output_config: OutputConfig | None = None
    output_format: Annotated[Any, only()] = None
    context_management: ContextManagement | None = None
    mcp_servers: Annotated[Any, only([])] = None
    container: Annotated[Any, only()] = None
    compaction: Annotated[Any, only()] = None
    thread: Annotated[Any, only()] = None

    @property
    def _ids(self) -> Iterator[tuple[str, str | None, bool]]:
        """Of calls and results, for `check_results`."""
        for m, message in enumerate(self.messages):
            for b, block in enumerate(message.blocks):
                where = f"messages[{m}].content[{b}]"
                if block.type == "tool_use":
                    yield f"{where}.id", block.id, True
                elif block.type == "tool_result":
                    yield f"{where}.tool_use_id", block.tool_use_id, False

    @property
    def chat(self) -> ChatBody:
        """The same in the words of OpenAI's chats.

        Raises:
            ApiError: a result answers no call, or it asks for what those cannot, either.
        """
        check_results(self._ids)
        said = [*_system(self.system), *(each for m in self.messages for each in m.plain)]
        chat: Json = {
            "messages": said,
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "tools": None if self.tools is None else [tool.plain for tool in self.tools],
            "user": self.metadata and self.metadata.user_id,
        }
        if self.tool_choice is not None:
            chat["tool_choice"] = self.tool_choice.plain
            chat["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.output_config is not None:
            chat["response_format"] = self.output_config.plain
        return checked(ChatBody, chat, NAMES)


def read(value: Mapping[str, Any]) -> tuple[str, ChatBody]:
    """The model that a request names, and the request as a chat.

    Raises:
        ApiError: a field has no value that can be honoured.
    """
    body = checked(MessagesBody, dict(value))
    return body.model, body.chat
