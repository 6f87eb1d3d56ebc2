"""A JSON schema, checked: what of it can be enforced, as llguidance takes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from mlx_kimi.constraints.deep import deeply
from mlx_kimi.errors import OptionError

OBJECT = {"type": "object"}
# Between the parts of JSON, at most: a model that likes white space must come to an end.
WHITE_SPACE = r"[ \n\t]{1,40}"
# The automaton of a multiple has so many states; of 1,234,567 it took 20 seconds to make.
LARGEST_MULTIPLE = 10_000
LARGEST = 10_000  # keys and items of a schema; OpenAI takes 5,000 properties
MOST_PATTERNS = 100  # of keys: each is compared with each other
KEPT = 1024  # schemas, of which it is remembered what can be enforced
DATA = ("const", "enum", "default", "examples")  # keywords whose values are no schemas


class Unenforceable(OptionError):
    """A schema says what no mask can hold an answer to."""


def enforced(schema: Mapping[str, Any], name: str) -> str:
    """The schema for a grammar, all of it enforced.

    Raises:
        Unenforceable: some of it cannot be; `name` is the option that it is.
    """
    text, complaint = _checked(_as_json(schema, name), is_lenient=False)
    if complaint:
        raise Unenforceable(name, f"cannot be enforced: {complaint}")
    return text


def enforced_arguments(schema: Mapping[str, Any] | None, name: str, is_strict: bool) -> str:
    """The same for the arguments of a tool, which are an object; without a schema, an empty one.

    Unless it is strict, keywords that cannot be enforced are left out, as agents offer such tools;
    of a schema that cannot even be read, what remains is that the arguments are an object.

    Raises:
        Unenforceable: it is strict, and some of it cannot be enforced.
    """
    if schema is None:
        schema = {"additionalProperties": False}
    schema = {**schema, **OBJECT}
    if is_strict:
        return enforced(schema, name)
    for is_lenient in (False, True):
        text, complaint = _checked(_as_json(schema, name), is_lenient)
        if not complaint:
            return text
    return enforced(OBJECT, name)


def _as_json(schema: Mapping[str, Any], name: str) -> str:
    try:
        return json.dumps({**schema, "x-guidance": None}, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise Unenforceable(name, "must be JSON") from None


@lru_cache(KEPT)
def _checked(schema_json: str, is_lenient: bool) -> tuple[str, str]:
    """The schema with our options for llguidance, and what of it cannot be enforced, if any."""
    schema = json.loads(schema_json)
    schema["x-guidance"] = {"whitespace_pattern": WHITE_SPACE, "lenient": is_lenient}
    text = json.dumps(schema)
    complaint = next(_beyond_llguidance(schema), "") or _complaint(text)
    return text, shortly(complaint)


def _complaint(schema: str) -> str:
    """What llguidance cannot enforce; empty: it can all."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema)
        is_wrong, said = deeply(lambda: LLMatcher.validate_grammar_with_warnings(grammar))
    except ValueError as error:  # it cannot read half a surrogate pair, or a huge number
        return f"not even read: {error}"
    return said[0] if is_wrong else ""


def shortly(said: str) -> str:
    """What llguidance says, in one line."""
    return " ".join(said.split())[:300]


def _beyond_llguidance(schema: dict[str, Any]) -> Iterator[str]:
    """What llguidance would accept, and not enforce, or compute for ever."""
    multiple, patterns = 1, 0
    size = _size(schema)
    if size > LARGEST:
        yield f"it may have {LARGEST:,} keys and items but has {size:,}"
        return
    for each in _objects(schema):
        least, needed = each.get("minProperties"), each.get("required")
        named = len(needed) if isinstance(needed, list) else 0
        # Keys that no list names may be drawn twice, and count once.
        if isinstance(least, int) and least > max(1, named):
            yield f"minProperties {least}, which is more than are required by name"
        keys = each.get("patternProperties")
        patterns += len(keys) if isinstance(keys, dict) else 0
        step = each.get("multipleOf")
        if isinstance(step, (int, float)) and not isinstance(step, bool) and step > 0:
            multiple = math.lcm(multiple, _digits(step))
    if patterns > MOST_PATTERNS:
        yield f"patternProperties, of which there may be {MOST_PATTERNS} but are {patterns:,}"
    if multiple > LARGEST_MULTIPLE:
        yield f"multipleOf, whose least common multiple must be at most {LARGEST_MULTIPLE:,}"


def _digits(number: float) -> int:
    """A decimal without its point and the zeros behind it."""
    return int("".join(map(str, Decimal(repr(number)).normalize().as_tuple().digits)))


def _size(value: Any) -> int:
    if not isinstance(value, (dict, list)):
        return 0
    return len(value) + sum(map(_size, value.values() if isinstance(value, dict) else value))


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for key, inner in value.items():
            if key not in DATA:
                yield from _objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner)
