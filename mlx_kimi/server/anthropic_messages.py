"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's API has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import from_json

from mlx_kimi.server.answers import Whole
from mlx_kimi.server.anthropic_body import read
from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.server.blocks import Block, BlocksReply
from mlx_kimi.server.body import parsed
from mlx_kimi.server.engine import Token
from mlx_kimi.server.json_text import json_bytes
from mlx_kimi.server.openai_chat import asked, prompt
from mlx_kimi.server.record import Usage
from mlx_kimi.server.reply import Json
from mlx_kimi.server.service import Service
from mlx_kimi.server.sse import event
from mlx_kimi.server.validation import ChatBody

ANY_MODEL = "claude-"  # clients name theirs, whatever is served
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesReply(BlocksReply):
    """An answer as a message of content blocks."""

    prefix = "msg"
    body: ChatBody

    def whole(self, answers: Sequence[Whole], usage: Usage) -> Json:
        self.fill(answers[0])
        return {
            **self._message(),
            "content": [_content(block) for block in self.blocks],
            **_end(answers[0]),
            "usage": _usage(usage),
        }

    def opening(self) -> list[bytes]:
        """The prompt's length is known; how much of it is cached, at the end alone."""
        usage = _usage(Usage(prompt_tokens=len(self.requests[0].ids)))
        message = {**self._message(), "content": [], **_end(None), "usage": usage}
        return [_event("message_start", message=message)]

    def begins(self, block: Block) -> Iterator[bytes]:
        yield _event("content_block_start", index=block.number, content_block=_content(block))
        if block.number == 0:
            yield self.keepalive()

    def grows(self, block: Block, text: str, tokens: Sequence[Token]) -> Iterator[bytes]:
        delta = {"type": "text_delta", "text": text}
        if block.call_id is not None:
            delta = {"type": "input_json_delta", "partial_json": text}
        yield _event("content_block_delta", index=block.number, delta=delta)

    def ends(self, block: Block) -> Iterator[bytes]:
        yield _event("content_block_stop", index=block.number)

    def keepalive(self) -> bytes:
        return _event("ping")

    def closing(self, answers: Sequence[Whole], usage: Usage) -> list[bytes]:
        end = _event("message_delta", delta=_end(answers[0]), usage=_usage(usage))
        return [end, _event("message_stop")]

    def failed(self, error: ApiError, request: str) -> bytes:
        return event(error.anthropic_body(request), "error")

    def _message(self) -> Json:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._model}


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _content(block: Block) -> Json:
    """A block as far as it is known."""
    if block.call_id is None:
        return {"type": "text", "text": block.text}
    found = _object(block.text)
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": found}


def _object(arguments: str) -> Json:
    """What arguments spell, as far as they do: clients read a cut stream in the same way.

    Nothing where they are no JSON, or have a number that none can be sent for, such as 1e999.
    """
    try:
        found = from_json(arguments, allow_partial=True)
        json_bytes(found)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _end(whole: Whole | None) -> Json:
    """Why an answer is over, if it is."""
    if whole is None:
        return {"stop_reason": None, "stop_sequence": None}
    if whole.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": whole.stop_string}
    return {"stop_reason": STOP_REASONS[whole.finish], "stop_sequence": None}


def _usage(usage: Usage) -> Json:
    """Tokens as Anthropic counts them: what was cached is no part of `input_tokens`."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


# Fields, by our names.
SCHEMAS = {"json_schema": "output_config.format.schema", "function.parameters": "input_schema"}


def _chat(service: Service, raw: bytes) -> ChatBody:
    model, body = read(parsed(raw))
    if not model.startswith(ANY_MODEL):
        service.check_model(model)
    return body


def understood(service: Service, raw: bytes, client: str) -> MessagesReply:
    """What a body asks for.

    Raises:
        ApiError: it is no such request, the template refuses the messages, or a schema cannot be
            enforced.
    """
    body = _chat(service, raw)
    return MessagesReply(
        body, service.name, service.tokenizer, *asked(service, body, client, SCHEMAS)
    )


def counted(service: Service, raw: bytes) -> int:
    """The tokens of a body's prompt.

    Raises:
        ApiError: as `understood`.
    """
    return len(prompt(service, _chat(service, raw)))
