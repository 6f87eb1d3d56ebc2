"""A long prompt read once, for many questions: a session whose last message is not finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.session import Session, refuse_used
from mlx_kimi.defaults import PREFILL_STEP
from mlx_kimi.generation.decode import prefill
from mlx_kimi.generation.generate import prompt_ids
from mlx_kimi.generation.not_finite import not_finite
from mlx_kimi.generation.token_state import TokenState, common_prefix
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import Tokenizer


def write_prompt_cache(
    folder: Path,
    model: KimiLinear,
    tokenizer: Tokenizer,
    conversation: Conversation,
    fingerprint: Mapping[str, Any],
    *,
    latent_bits: int | None = None,
    prefill_step: int = PREFILL_STEP,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Read a conversation whose last message has no answer, and store it; the tokens read.

    Raises:
        KimiError: `refuse_used` refuses `folder`, or the conversation is longer than the context.
    """
    refuse_used(folder)
    ids = _before_any_question(model, tokenizer, conversation)
    state = TokenState(model, latent_bits, snapshot_every=None)
    last, _ = prefill(state, ids, prefill_step, progress)
    if not mx.isfinite(last).all().item():
        raise not_finite(model, ids)
    session = Session(folder, fingerprint).open()
    session.is_prompt_cache = True
    session.save(conversation, state)
    session.close()
    return len(ids)


def _before_any_question(
    model: KimiLinear, tokenizer: Tokenizer, conversation: Conversation
) -> list[int]:
    """The tokens that the prompt begins with, whatever is asked after it."""
    prompts = []
    for question in ("a", "1"):
        asked = Conversation(conversation.system, list(conversation.turns))
        asked.say(question)
        prompts.append(prompt_ids(model, tokenizer, asked.messages))
    return prompts[0][: common_prefix(*prompts)]
