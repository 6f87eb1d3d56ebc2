"""What requests may say: fields that change the answer are checked, metadata is ignored.

What cannot be honoured is refused by its name, unless its value asks for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.user_files import shown

MOST_CHOICES = 8  # answers to one request: each takes a row
MOST_STOPS = 4
NAME = r"^[A-Za-z0-9_.-]{1,128}$"  # of a function: what a call's id can spell

Body = TypeVar("Body", bound=BaseModel)
Ignored = Any


def only(*values: Any) -> AfterValidator:
    """Accepts values that ask for nothing; the first is the one to name."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(each) and value == each for each in (None, *values)):
            rule = f"must be {shown(values[0]) if values else 'absent'} but is {shown(value)}"
            raise PydanticCustomError("unsupported_value", "{rule}", {"rule": rule})
        return value

    return AfterValidator(check)


def check_has(value: BaseModel, kind: str, names: Sequence[str]) -> None:
    """Refuse what lacks one of the fields that its kind needs."""
    for name in names:
        if getattr(value, name) is None:
            rule = f"must have {name}, as a {kind}"
            raise PydanticCustomError("invalid_value", "{rule}", {"rule": rule})


class Strict(BaseModel):
    """No field but the listed ones, and no value of another type."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Part(Strict):
    """A part of a message's content. The model reads text alone."""

    type: Literal["text"]
    text: str
    cache_control: Ignored = None


class CalledFunction(Strict):
    """What a call asks for."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Ignored = None  # of a stream


class Message(Strict):
    """What was said."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Annotated[Any, only()] = None
    reasoning: Ignored = None
    reasoning_content: Ignored = None
    reasoning_details: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Annotated[Any, only()] = None
    provider_specific_fields: Ignored = None
    cache_control: Ignored = None

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        rule = ""
        if self.content is None and not self.tool_calls:
            rule = "must have content"
        elif self.tool_calls and self.role != "assistant":
            rule = f"must be an assistant's to have tool_calls but is a {self.role}'s"
        elif (self.role == "tool") != (self.tool_call_id is not None):
            has = "have" if self.role == "tool" else "not have"
            rule = f"must {has} tool_call_id, as a {self.role}'s"
        if rule:
            raise PydanticCustomError("invalid_value", "{rule}", {"rule": rule})
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        content = self.content or ""
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        # `developer` is OpenAI's newer name, which no template knows.
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        return message


class Function(Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that is offered."""

    type: Literal["function"]
    function: Function
    cache_control: Ignored = None

    @property
    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        function = self.function.model_dump(exclude={"strict"}, exclude_none=True)
        return {"type": "function", "function": function}

    @property
    def asked(self) -> dict[str, Any]:
        """The same, with whether all of its schema is to be enforced."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class NamedFunction(Strict):
    """A function, by its name."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """What an answer must be JSON of; with `strict` or without."""

    model_config = ConfigDict(**Strict.model_config, validate_by_alias=True)

    name: str | None = None
    description: str | None = None
    value: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What kind of text an answer is."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            rule = "must have json_schema if, and only if, its type is json_schema"
            raise PydanticCustomError("invalid_value", "{rule}", {"rule": rule})
        return self


StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Penalty = Annotated[float | None, only(0.0)]


class Drawn(Strict):
    """What all kinds of answers take: how they are drawn and sent, and who asks."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None


class CommonBody(Drawn):
    """What both kinds of completion take."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    logit_bias: Annotated[dict[str, Any] | None, only({})] = None
    return_progress: bool | None = None

    @property
    def stops(self) -> Sequence[str]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _check_stream(self) -> CommonBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid_value", "must have stream to have stream_options")
        return self


class ChatBody(CommonBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only("medium")] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    functions: Annotated[Any, only()] = None
    function_call: Annotated[Any, only("none")] = None
    prediction: Ignored = None  # a hint that makes answers faster elsewhere

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatBody:
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        names = [tool.function.name for tool in self.tools or ()]
        rule = ""
        if len(lengths) > 1:
            rule = "must have one length in max_tokens and max_completion_tokens"
        elif self.top_logprobs is not None and not self.logprobs:
            rule = "must have logprobs to have top_logprobs"
        elif len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            rule = f"must not have two tools of the name {double}"
        elif self.must_call and not names:
            rule = "must have tools for tool_choice to ask for one"
        elif self.only_tool is not None and self.only_tool not in names:
            rule = f"must have the tool that tool_choice names, {shown(self.only_tool)}"
        if rule:
            raise PydanticCustomError("invalid_value", "{rule}", {"rule": rule})
        return self

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as a chat template takes them."""
        return [] if self.tool_choice == "none" else [tool.plain for tool in self.tools or ()]

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The same, each with whether all of its schema is to be enforced."""
        return [] if self.tool_choice == "none" else [tool.asked for tool in self.tools or ()]

    @property
    def only_tool(self) -> str | None:
        """The name of the tool that must be called, if one is named."""
        choice = self.tool_choice
        return choice.function.name if isinstance(choice, NamedTool) else None

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or self.only_tool is not None

    @property
    def one_call(self) -> bool:
        """Whether the answer may have one call at most."""
        return self.parallel_tool_calls is False or self.only_tool is not None

    @property
    def schema_of_text(self) -> dict[str, Any] | None:
        """What the answer's text is JSON of."""
        format = self.response_format
        if format is None or format.type == "text":
            return None
        return {"type": "object"} if format.json_schema is None else format.json_schema.value


Prompt = str | list[int] | list[str] | list[list[int]]


class CompletionBody(CommonBody):
    """POST /v1/completions"""

    prompt: Annotated[Prompt, Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Annotated[bool | None, only(False)] = None
    best_of: Annotated[Any, only(1)] = None
    suffix: Annotated[str | None, only("")] = None

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionBody:
        if len(self.prompts) * self.choices > MOST_CHOICES:
            rule = f"must ask for at most {MOST_CHOICES} answers, prompts times n"
            raise PydanticCustomError("invalid_value", "{rule}", {"rule": rule})
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        is_ids = isinstance(self.prompt[0], int)
        return [self.prompt] if is_ids else self.prompt  # type: ignore[return-value]


def checked(
    kind: type[Body], value: dict[str, Any], names: Mapping[str, str] | None = None
) -> Body:
    """A request of this kind.

    Args:
        names: what errors call its fields, where the request was put into other words.

    Raises:
        ApiError: a field is unknown, or has no value that can be honoured.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _api_error(error, names or {}) from None


PLAIN_KINDS = ("str", "int", "float", "constrained-str", "constrained-int")
CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
OUR_CODES = ("unsupported_value", "invalid_value")


def _api_error(error: ValidationError, names: Mapping[str, str]) -> ApiError:
    """The first complaint; of those about one value that may be of several kinds, the one of the
    kind that fits best."""
    complaints = error.errors(include_url=False, include_context=False)
    first = complaints[0]["loc"][:1]
    complaint = max(
        (each for each in complaints if each["loc"][:1] == first),
        key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")),
    )
    name = _name(complaint)
    name = names.get(name, name)
    kind = complaint["type"]
    code = kind if kind in OUR_CODES else CODES.get(kind, "invalid_value")
    where = name or "the request"
    return ApiError(400, f"{where} {_rule(complaint)}", param=name or None, code=code)


def _name(complaint: ErrorDetails) -> str:
    """Where it is: messages[0].content."""
    loc = complaint["loc"]
    name = ""
    for number, each in enumerate(loc):
        is_last = number == len(loc) - 1
        if isinstance(each, int):
            name += f"[{each}]"
        elif not _is_kind(each) or (is_last and complaint["type"] == "extra_forbidden"):
            name += f".{each}" if name else each
    return name[:200]


def _is_kind(each: str) -> bool:
    """Whether pydantic names one of the kinds that a value may be of, and no field."""
    return (
        "[" in each
        or each[:1].isupper()
        or each in ("str", "int", "float", "constrained-str", "constrained-int")
    )


def _rule(complaint: ErrorDetails) -> str:
    kind, said, value = complaint["type"], complaint["msg"], complaint["input"]
    if kind == "extra_forbidden":
        return "is not known here"
    if kind == "missing":
        return "is missing"
    if kind in OUR_CODES:
        return said
    rule = re.sub(r"^(Input|String|List|Dictionary|Value) should", "must", said)
    return f"{rule} but is {shown(value)}"
