"""Grammars of whole answers, as llguidance spells them: JSON, and calls as Kimi writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_kimi.text.call_tokens import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    CALL_END,
    SECTION_BEGIN,
    SECTION_END,
    marks,
)
from mlx_kimi.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Grammar:
    """What an answer must obey.

    Attributes:
        text: the grammar. Its tokens of the vocabulary have ids, which no text can spell.
        triggers: it holds from the first of these tokens on; none: from the answer's first token.
    """

    text: str
    triggers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Offered:
    """A tool that may be called.

    Attributes:
        arguments: the schema of its arguments, as `schema.enforced_arguments` gives it.
    """

    name: str
    arguments: str


def of_json(schema: str) -> Grammar:
    """An answer that is JSON of a schema, as `schema.enforced` gives it."""
    return Grammar(f"start: %json {schema}")


def can_call(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the tokens that calls are made of."""
    return all(marks(tokenizer, name) for name in (CALL_BEGIN, ARGUMENT_BEGIN, CALL_END))


def of_calls(
    tokenizer: Tokenizer,
    tools: Sequence[Offered],
    *,
    is_required: bool,
    parallel: bool,
    schema: str | None = None,
) -> Grammar:
    """An answer that is calls, or may be.

    Args:
        tokenizer: one that can call.
        is_required: the answer is nothing but calls; else it may be text, up to the first call.
        parallel: there may be several calls.
        schema: of an answer that calls nothing, as `schema.enforced` gives it; None: any text.
    """
    begin, end = marks(tokenizer, *SECTION_BEGIN), marks(tokenizer, *SECTION_END)
    has_section = bool(begin and end)
    calls = "call+" if parallel else "call"
    section = f"{_any_of(begin)} {calls} {_any_of(end)}" if has_section else calls
    lines = []
    triggers = frozenset[int]()
    if is_required:
        lines = [f"start: {section}"]
    elif schema is not None:
        lines = [f"start: {section} | answer", f"answer: %json {schema}"]
    else:
        # Some models leave out the section.
        lines = [f"start: {section} | {calls}" if has_section else f"start: {calls}"]
        triggers = begin | marks(tokenizer, CALL_BEGIN)
    call = [_any_of(marks(tokenizer, name)) for name in (CALL_BEGIN, ARGUMENT_BEGIN, CALL_END)]
    lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        id = json.dumps(f"functions.{tool.name}:", ensure_ascii=False)
        lines += [
            f"call_{number}: {call[0]} ID_{number} {call[1]} arguments_{number} {call[2]}",
            f"ID_{number}: {id} /(0|[1-9][0-9]{{0,3}})/",
            f"arguments_{number}: %json {tool.arguments}",
        ]
    return Grammar("\n".join(lines), triggers)


def _any_of(ids: frozenset[int]) -> str:
    return f"<[{','.join(map(str, sorted(ids)))}]>"
