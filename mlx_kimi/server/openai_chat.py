"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_kimi.errors import KimiError
from mlx_kimi.server.answers import Step, Whole
from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.server.body import parsed
from mlx_kimi.server.completion import Completion
from mlx_kimi.server.constrained import constraint_of
from mlx_kimi.server.engine import Request, Token
from mlx_kimi.server.reader import AnswerReader, SentCall, stop_ids
from mlx_kimi.server.reply import Json
from mlx_kimi.server.service import Service
from mlx_kimi.server.validation import ChatBody, checked
from mlx_kimi.text.tokenizer import Tokenizer

SCHEMA = {"json_schema": "response_format.json_schema.schema"}  # fields, by our names


class ChatReply(Completion):
    """Answers as messages."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    body: ChatBody

    def choice(self, number: int, whole: Whole) -> Json:
        message: Json = {"role": "assistant", "content": whole.text, "refusal": None}
        if whole.calls:
            message |= {"content": whole.text or None, "tool_calls": whole.calls}
        return {
            "index": number,
            "message": message,
            "logprobs": self.logprobs(whole.tokens),
            "finish_reason": whole.finish,
        }

    def parts(self, step: Step) -> list[Json]:
        found = []
        if step.begins:
            found.append(self._part(step, {"role": "assistant", "content": ""}))
        if not step.delta.is_empty:
            delta: Json = {}
            if step.delta.text or step.delta.tokens:
                delta["content"] = step.delta.text
            if step.delta.calls:
                delta["tool_calls"] = [_call(call) for call in step.delta.calls]
            found.append(self._part(step, delta, self.logprobs(step.delta.tokens)))
        if step.finish:
            found.append({**self._part(step, {}), "finish_reason": step.finish})
        return found

    def logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.body.logprobs:
            return None
        return {"content": [self.spelled(token) for token in tokens], "refusal": None}

    def _part(self, step: Step, delta: Json, logprobs: Json | None = None) -> Json:
        return {
            "index": step.choice,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": None,
        }


def _call(call: SentCall) -> Json:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.number, "function": function}
    function = {"name": call.name, **function}
    return {"index": call.number, "id": call.id, "type": "function", "function": function}


def understood(service: Service, raw: bytes, client: str) -> ChatReply:
    """What a body asks for. Takes a while: it renders and encodes the messages.

    Raises:
        ApiError: it is no such request, the template refuses the messages, or a schema cannot be
            enforced.
    """
    body = checked(ChatBody, parsed(raw))
    service.check_model(body.model)
    return ChatReply(body, service.name, service.tokenizer, *asked(service, body, client))


def asked(
    service: Service, body: ChatBody, client: str, names: Mapping[str, str] | None = None
) -> tuple[list[Request], list[AnswerReader]]:
    """What the engine is asked for a chat, in whichever API's words it came; and who reads it.

    Args:
        names: of `constraint_of`, where the request was put into other words.

    Raises:
        ApiError: as `prompt`, a value is out of its range, or a schema cannot be enforced.
    """
    tokenizer = service.tokenizer
    ids = prompt(service, body)
    stops = stop_ids(tokenizer, bool(body.offered), body.one_call)
    constraint = constraint_of(
        tokenizer,
        body.asked,
        only=body.only_tool,
        is_required=body.must_call,
        parallel=not body.one_call,
        json_schema=body.schema_of_text,
        names=names or SCHEMA,
    )
    requests = [
        Request(
            ids=tuple(ids),
            boundaries=boundaries(tokenizer, ids),
            sampling=sampling,
            max_tokens=service.max_tokens(body.max_completion_tokens or body.max_tokens),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            client=f"{client} {body.user or ''}".strip(),
            stop_ids=stops,
            wants_progress=bool(body.return_progress and body.stream),
            constraint=constraint,
        )
        for sampling in service.samplings(body, body.choices)
    ]
    readers = [AnswerReader(tokenizer, body.stops, service.tool_ids, stops) for _ in requests]
    return requests, readers


def prompt(service: Service, body: ChatBody) -> list[int]:
    """The ids of a chat's messages and tools.

    Raises:
        ApiError: a result answers no call, or the template refuses the messages.
    """
    messages = service.tool_ids.native([message.plain for message in body.messages])
    try:
        return service.tokenizer.apply_chat_template(messages, body.offered or None)
    except KimiError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None


def boundaries(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int, ...]:
    """The lengths of the prefixes of a prompt that end with a whole message, or with the tools.

    A message ends with a token that ends answers, and no message's text can spell one. The last of
    these prefixes is the prompt without what asks for an answer.
    """
    return tuple(at + 1 for at, id in enumerate(ids) if id in tokenizer.stop_ids)
