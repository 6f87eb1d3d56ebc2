"""JSON schemas of many kinds, and answers that hostile draws give under a constraint."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mlx_kimi.constraints.constraint import Constraint
from mlx_kimi.text.tokenizer import Tokenizer

NAMES = ("a", "b", "name", "größe", 'with "quotes"', "c\\d", "", "a b", "名前", "type")
PATTERNS = (r"^[a-z]{2,6}$", r"^\d{3}-\d{2}$", "^(red|green)+$", "^[A-Z][^x]{1,4}$", "b")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6")
Schema = dict[str, Any]

names = st.sampled_from(NAMES)
small = st.integers(0, 4)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-99, 9999)
    | st.sampled_from([0.5, -2.25, 1e3])
    | st.text(max_size=8)
    | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=4,
)


@st.composite
def integers(draw: st.DrawFn) -> Schema:
    least = draw(st.integers(-2000, 2000))
    schema = {"type": "integer", "minimum": least, "maximum": least + draw(st.integers(40, 5000))}
    if draw(st.booleans()):
        schema["multipleOf"] = draw(st.sampled_from([2, 3, 7, 10]))
    return schema


@st.composite
def numbers(draw: st.DrawFn) -> Schema:
    least = draw(st.sampled_from([-10.5, -1, 0, 0.25, 3]))
    schema: Schema = {"type": "number"}
    schema[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = least
    schema[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = least + draw(
        st.sampled_from([1, 2.5, 1000])
    )
    if draw(st.booleans()):
        schema["multipleOf"] = draw(st.sampled_from([0.25, 0.5]))
    return schema


@st.composite
def strings(draw: st.DrawFn) -> Schema:
    kind = draw(st.sampled_from(["plain", "length", "pattern", "format"]))
    if kind == "pattern":
        return {"type": "string", "pattern": draw(st.sampled_from(PATTERNS))}
    if kind == "format":
        return {"type": "string", "format": draw(st.sampled_from(FORMATS))}
    least = draw(small) if kind == "length" else 0
    return {"type": "string", "minLength": least, "maxLength": least + draw(st.integers(1, 12))}


leaves = st.one_of(
    integers(),
    numbers(),
    strings(),
    st.just({"type": "boolean"}),
    st.just({"type": ["string", "null"], "maxLength": 5}),
    st.builds(lambda value: {"const": value}, values),
    st.builds(lambda each: {"enum": each}, st.lists(values, min_size=1, max_size=4)),
    st.just({"$ref": "#/$defs/tree"}),
    st.just({}),
)


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    first = draw(st.lists(inner, max_size=2))
    least = draw(st.integers(0, 2))
    schema: Schema = {"type": "array", "minItems": least, "maxItems": least + 2}
    if first:
        schema["prefixItems"] = first
    schema["items"] = draw(inner)
    return schema


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(names, inner, max_size=4))
    schema: Schema = {"type": "object", "properties": properties}
    schema["required"] = [name for name in properties if draw(st.booleans())]
    more = draw(st.sampled_from(["none", "some", "pattern", "any", "required"]))
    if more == "none":
        schema["additionalProperties"] = False
    elif more == "some":
        schema["additionalProperties"] = draw(inner)
    elif more == "pattern":
        schema["patternProperties"] = {"^x_": draw(inner)}
        schema["additionalProperties"] = False
    elif more == "required":
        schema["required"].append("more")
    return schema


@st.composite
def combined(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    kind = draw(st.sampled_from(["anyOf", "allOf", "oneOf"]))
    if kind == "allOf":
        return {"allOf": [draw(objects(inner)) | {"additionalProperties": True} for _ in range(2)]}
    if kind == "oneOf":
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": tag}, "value": draw(inner)},
                    "required": ["kind"],
                }
                for tag in ("first", "second")
            ]
        }
    return {"anyOf": draw(st.lists(inner, min_size=1, max_size=3))}


nested = st.recursive(
    leaves, lambda inner: arrays(inner) | objects(inner) | combined(inner), max_leaves=6
)
TREE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 9},
        "next": {"$ref": "#/$defs/tree"},
    },
    "required": ["value"],
    "additionalProperties": False,
}


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Schemas whose answers come to an end, whatever is drawn."""
    return {**draw(nested), "$defs": {"tree": TREE}}


KEYWORDS = (
    *("type", "properties", "required", "items", "prefixItems", "anyOf", "allOf", "oneOf", "$ref"),
    *("$defs", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "multipleOf", "pattern"),
    *("minLength", "maxLength", "format", "minItems", "maxItems", "additionalProperties", "not"),
    *("patternProperties", "minProperties", "maxProperties", "if", "$id", "$schema", "x-guidance"),
)
WORDS = (
    *("object", "string", "integer", "array", "null", "#", "#/$defs/a", "#/properties/a", "("),
    *("^a", "[a-z]{1,3}", "date", "\ud800", "\0", "é" * 90, 1 << 64, 10**400, 1e308, True),
)
# Any JSON in the words of schemas.
nonsense = st.dictionaries(
    st.sampled_from(KEYWORDS),
    st.recursive(
        st.none() | st.sampled_from(WORDS) | st.integers(-3, 10) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*KEYWORDS, "a", "\ud800"]), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=5,
)


def drawn(
    tokenizer: Tokenizer, constraint: Constraint, seed: int, patience: int = 100
) -> list[int]:
    """An answer of tokens drawn from all that may follow, each as likely; often one that ends
    something, where there is one, after `patience` of them most often."""
    choose = random.Random(seed)
    matcher, answer = constraint.begin(), list[int]()
    ending = [id for text in '"}]:0' for id in tokenizer.vocabulary.encode(text, False)]
    ending = [*sorted(tokenizer.stop_ids), *ending]
    while not answer or answer[-1] not in tokenizer.stop_ids:
        assert len(answer) < 30 * patience, tokenizer.decode(answer)
        if matcher.mask is None:  # as if the model opened a call sooner or later
            opens = len(answer) > 3 and choose.random() < 0.3
            token = choose.choice([*constraint.triggers] if opens else range(256))
        else:
            token = choose.choice(allowed(matcher.mask))
            if choose.random() < (0.3 if len(answer) < patience else 0.8):
                token = next((id for id in ending if _has(matcher.mask, id)), token)
        assert matcher.take(token)
        answer.append(token)
    return answer


def allowed(mask: np.ndarray) -> Sequence[int]:
    """The ids whose bit is set."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def _has(mask: np.ndarray, id: int) -> bool:
    return bool(mask[id // 32] >> np.uint32(id % 32) & 1)
