"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_kimi.server.answers import Step, Whole
from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.server.body import parsed
from mlx_kimi.server.completion import Completion
from mlx_kimi.server.engine import Request, Token
from mlx_kimi.server.reader import AnswerReader, stop_ids
from mlx_kimi.server.reply import Json
from mlx_kimi.server.service import Service
from mlx_kimi.server.validation import CompletionBody, checked


class CompletionReply(Completion):
    """Answers as text that goes on from a prompt."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"
    body: CompletionBody

    def choice(self, number: int, whole: Whole) -> Json:
        return self._part(number, whole.text, self.logprobs(whole.tokens), whole.finish)

    def parts(self, step: Step) -> list[Json]:
        delta, found = step.delta, []
        if not delta.is_empty:
            found.append(self._part(step.choice, delta.text, self.logprobs(delta.tokens), None))
        if step.finish:
            found.append(self._part(step.choice, "", None, step.finish))
        return found

    def logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if self.body.logprobs is None:
            return None
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._name(id): p for id, p in token.top} for token in tokens],
        }

    def _name(self, id: int) -> str:
        spelling = self._tokenizer.bytes_of(id)
        try:
            return spelling.decode()
        except UnicodeDecodeError:  # half a character, as OpenAI spells it
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)

    @staticmethod
    def _part(number: int, text: str, logprobs: Json | None, finish: str | None) -> Json:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}


def understood(service: Service, raw: bytes, client: str) -> CompletionReply:
    """What a body asks for.

    Raises:
        ApiError: it is no such request.
    """
    body = checked(CompletionBody, parsed(raw))
    service.check_model(body.model)
    tokenizer = service.tokenizer
    prompts = [
        tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts
    ]
    if not all(prompts):
        raise ApiError(400, "prompt must have a token", param="prompt", code="invalid_value")
    stops = stop_ids(tokenizer, may_call=False)
    samplings = service.samplings(body, body.choices)
    requests = [
        Request(
            ids=tuple(ids),
            sampling=sampling,
            max_tokens=service.max_tokens(body.max_tokens),
            logprobs=body.logprobs,
            client=f"{client} {body.user or ''}".strip(),
            stop_ids=stops,
            wants_progress=bool(body.return_progress and body.stream),
        )
        for ids in prompts
        for sampling in samplings
    ]
    readers = [AnswerReader(tokenizer, body.stops, service.tool_ids, stops) for _ in requests]
    return CompletionReply(body, service.name, tokenizer, requests, readers)
