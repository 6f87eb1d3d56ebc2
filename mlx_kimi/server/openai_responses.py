"""POST /v1/responses, as OpenAI's API has it, but that nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_kimi.server.answers import Whole
from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.server.blocks import Block, BlocksReply
from mlx_kimi.server.body import parsed
from mlx_kimi.server.engine import Token
from mlx_kimi.server.openai_chat import asked
from mlx_kimi.server.record import Usage
from mlx_kimi.server.reply import Json
from mlx_kimi.server.responses_body import ResponsesBody, full_name
from mlx_kimi.server.service import Service
from mlx_kimi.server.sse import event
from mlx_kimi.server.validation import ChatBody, checked

ECHOED = ("instructions", "max_output_tokens", "temperature", "top_p", "metadata", "user")


class ResponsesReply(BlocksReply):
    """An answer as a response of output items."""

    prefix = "resp"
    body: ChatBody

    def __init__(self, given: ResponsesBody, raw: Json, *args: Any) -> None:
        """`raw`: the same as it came."""
        super().__init__(*args)
        found = ((space, tool.name) for space, tool in given.functions)
        self._functions = {full_name(*each): each for each in found}
        self._echo = {name: raw.get(name) for name in ECHOED}
        self._echo |= {
            "parallel_tool_calls": given.parallel_tool_calls is not False,
            "tool_choice": raw.get("tool_choice") or "auto",
            "tools": raw.get("tools") or [],
            "text": raw.get("text") or {"format": {"type": "text"}},
        }
        self._sent = 0  # events

    def whole(self, answers: Sequence[Whole], usage: Usage) -> Json:
        self.fill(answers[0])
        return self._over(answers[0], usage)

    def opening(self) -> list[bytes]:
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._response("in_progress")) for kind in kinds]

    def begins(self, block: Block) -> Iterator[bytes]:
        where = {"output_index": block.number}
        yield self._event("response.output_item.added", **where, item=self._item(block, False))
        if block.call_id is None:
            part = {"content_index": 0, "part": self._part(block)}
            yield self._event("response.content_part.added", **self._where(block), **part)

    def grows(self, block: Block, text: str, tokens: Sequence[Token]) -> Iterator[bytes]:
        where, delta = self._where(block), {"delta": text}
        if block.call_id is not None:
            yield self._event("response.function_call_arguments.delta", **where, **delta)
        else:
            more = {"content_index": 0, **delta, "logprobs": self._logprobs(tokens)}
            yield self._event("response.output_text.delta", **where, **more)

    def ends(self, block: Block) -> Iterator[bytes]:
        where = self._where(block)
        if block.call_id is not None:
            name = self._functions.get(block.name, (None, block.name))[1]
            said = {"name": name, "arguments": block.text}
            yield self._event("response.function_call_arguments.done", **where, **said)
        else:
            where["content_index"] = 0
            whole = {"text": block.text, "logprobs": self._logprobs(block.tokens)}
            yield self._event("response.output_text.done", **where, **whole)
            yield self._event("response.content_part.done", **where, part=self._part(block))
        done = {"output_index": block.number, "item": self._item(block)}
        yield self._event("response.output_item.done", **done)

    def keepalive(self) -> bytes:
        """An event: some clients do not see comments, and take the stream for dead."""
        return self._event("response.in_progress", response=self._response("in_progress"))

    def closing(self, answers: Sequence[Whole], usage: Usage) -> list[bytes]:
        response = self._over(answers[0], usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def failed(self, error: ApiError, request: str) -> bytes:
        told = {"code": "server_error", "message": error.message}
        output = [self._item(block) for block in self.blocks]
        response = {**self._response("failed"), "error": told, "output": output}
        return self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sent += 1
        return event({"type": kind, "sequence_number": self._sent - 1, **fields}, kind)

    def _over(self, whole: Whole, usage: Usage) -> Json:
        is_cut = whole.finish == "length"
        return {
            **self._response("incomplete" if is_cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self._item(block) for block in self.blocks],
            "usage": _usage(usage),
        }

    def _response(self, status: str) -> Json:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **self._echo,
        }

    def _where(self, block: Block) -> Json:
        return {"item_id": _item_id(block), "output_index": block.number}

    def _item(self, block: Block, is_over: bool = True) -> Json:
        """A block as an output item, of which clients get no content before it is over."""
        status = "in_progress"
        if is_over:
            status = "incomplete" if block.is_cut else "completed"
        head = {"id": _item_id(block), "status": status}
        if block.call_id is None:
            content = [self._part(block)] if is_over else []
            return {**head, "type": "message", "role": "assistant", "content": content}
        space, name = self._functions.get(block.name, (None, block.name))
        call = {"call_id": block.call_id, "name": name, "arguments": block.text}
        named = {} if space is None else {"namespace": space}
        return {**head, "type": "function_call", **call, **named}

    def _part(self, block: Block) -> Json:
        logprobs = self._logprobs(block.tokens)
        return {
            "type": "output_text",
            "text": block.text,
            "annotations": [],
            "logprobs": logprobs,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> list[Json]:
        return [self.spelled(token) for token in tokens] if self.body.logprobs else []


def _item_id(block: Block) -> str:
    return f"{'msg' if block.call_id is None else 'fc'}_{block.id}"


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


# Fields, by our names.
SCHEMAS = {"json_schema": "text.format.schema", "function.parameters": "parameters"}


def understood(service: Service, raw: bytes, client: str) -> ResponsesReply:
    """What a body asks for.

    Raises:
        ApiError: it is no such request, the template refuses the messages, or a schema cannot be
            enforced.
    """
    value = parsed(raw)
    given = checked(ResponsesBody, value)
    service.check_model(given.model)
    body = given.chat
    each = asked(service, body, client, SCHEMAS)
    return ResponsesReply(given, value, body, service.name, service.tokenizer, *each)
