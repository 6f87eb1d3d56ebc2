"""What an answer must obey, and how far one answer has come in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from mlx_kimi.constraints.deep import deeply
from mlx_kimi.constraints.grammar import Grammar, Offered, can_call, of_calls, of_json
from mlx_kimi.constraints.schema import (
    Unenforceable,
    enforced,
    enforced_arguments,
    shortly,
)
from mlx_kimi.constraints.vocabulary import vocabulary_of
from mlx_kimi.errors import KimiError
from mlx_kimi.text.tokenizer import Tokenizer

COMPILED = 32  # grammars that are kept, of all models
# A state of the automaton that reads characters takes 2 kB.
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class Constraint:
    """What an answer must obey; many answers may, at the same time."""

    def __init__(self, vocabulary: LLTokenizer, grammar: Grammar) -> None:
        """Raises KimiError where the grammar is too large."""
        self.triggers, self.stop_ids = grammar.triggers, frozenset(vocabulary.eos_tokens)
        try:
            self._compiled = deeply(
                lambda: LLMatcher(vocabulary, grammar.text, log_level=0, limits=LIMITS)
            )
            said = self._compiled.get_error()
        except ValueError as error:
            said = str(error)
        if said:
            said = shortly(said.partition("\n")[0])
            raise KimiError(f"what the answer must obey cannot be enforced: {said}")

    def begin(self) -> Matcher:
        """For an answer without a token yet."""
        return Matcher(self)

    def matcher(self) -> LLMatcher:
        """A new matcher of the grammar."""
        return self._compiled.deep_copy()


class Matcher:
    """How far an answer has come in what it must obey."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self._count = 0  # tokens that were taken
        self._began: int | None = None  # of these, those before the grammar holds; None: all so far
        self._is_over = False  # a token that ends the answer was taken, too
        self._matcher: LLMatcher | None = None
        self._mask: np.ndarray | None = None
        if not constraint.triggers:
            self._began, self._matcher = 0, constraint.matcher()

    @property
    def mask(self) -> np.ndarray | None:
        """The tokens that may follow, a bit each, [vocabulary / 32] uint32; None: all.

        Raises:
            KimiError: to go on takes more than limits allow.
        """
        if self._matcher is None:
            return None
        if self._mask is None:
            self._mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
            if self._matcher.is_error() or not self._mask.any():
                said = shortly(self._matcher.get_error().partition("\n")[0])
                raise KimiError(f"the answer cannot go on as it must: {said}")
        return self._mask

    def take(self, token: int) -> bool:
        """Go on by a token; False: it may not follow, and nothing is changed."""
        if self._matcher is None and token in self._constraint.triggers:
            self._matcher, self._began = self._constraint.matcher(), self._count
        if self._matcher is not None:
            if self._is_over or not self._taken(self._matcher, token):
                return False
            self._mask = None
        self._count += 1
        return True

    def _taken(self, matcher: LLMatcher, token: int) -> bool:
        if token in self._constraint.stop_ids:
            self._is_over = matcher.is_accepting()
            return self._is_over
        return matcher.try_consume_tokens([token]) == 1

    def go_back(self, count: int) -> None:
        """To where so many tokens had been taken."""
        back, self._count = self._count - count, count
        if not back or self._matcher is None or self._began is None:
            return
        self._mask = None
        if self._constraint.triggers and count <= self._began:
            self._matcher = self._began = None
        else:
            self._matcher.rollback(back - self._is_over)
        self._is_over = False


def constraint_for(
    tokenizer: Tokenizer,
    *,
    json_schema: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    only: str | None = None,
    is_required: bool = False,
    parallel: bool = True,
) -> Constraint | None:
    """What an answer must obey; None: nothing.

    Args:
        json_schema: what is said without a call is JSON of this schema.
        tools: what may be called, in the form that chat templates take. Arguments obey their
            schemas: with `strict` in all they say, else as far as can be enforced.
        only: the name of the one tool that may be called.
        is_required: the answer is a call; else it may begin with text, or be one.
        parallel: it may be several calls.

    Raises:
        Unenforceable: a schema cannot be enforced, or no tool can be called as is required.
        KimiError: all of it together is too large.
    """
    answer = None if json_schema is None else enforced(json_schema, "json_schema")
    offered = [*_offered(tools or (), only)]
    if offered and can_call(tokenizer):
        grammar = of_calls(
            tokenizer, offered, is_required=is_required, parallel=parallel, schema=answer
        )
    elif is_required:
        what = "the model has no tokens for calls" if offered else "there is none"
        raise Unenforceable("tools", f"must be such that one can be called, but {what}")
    elif answer is not None:
        grammar = of_json(answer)
    else:
        return None
    return _compiled(vocabulary_of(tokenizer), grammar)


def _offered(tools: Sequence[Mapping[str, Any]], only: str | None) -> Iterator[Offered]:
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Unenforceable(f"tools[{number}]", "must have a function with a name")
        if only in (None, function["name"]):
            where = f"tools[{number}].function.parameters"
            is_strict = bool(function.get("strict"))
            schema = enforced_arguments(function.get("parameters"), where, is_strict)
            yield Offered(function["name"], schema)


_compiled = lru_cache(COMPILED)(Constraint)
