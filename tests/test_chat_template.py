"""Chat templates: the same text as transformers, bounded, and safe from what people type."""

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_kimi.errors import KimiError
from mlx_kimi.text import chat_template
from mlx_kimi.text.chat_template import (
    BUILT_IN,
    ChatTemplate,
    Renderer,
    check_messages,
    load_chat_template,
)
from mlx_kimi.text.control_tokens import ControlTokens
from tests.tokenizer_files import write_json

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Weather in 北京? It's 'urgent'."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "functions.weather:0",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "北京", "days": [1, 2.5]}},
            },
            {
                "id": "functions.weather:1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "x"}'},
            },
        ],
    },
    {"role": "tool", "tool_call_id": "functions.weather:0", "name": "weather", "content": "sun"},
    {"role": "tool", "tool_call_id": "functions.weather:1", "content": "rain"},
    {"role": "assistant", "content": "Sunny."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Thanks, "}, {"type": "text", "text": "bye"}],
    },
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    shared = Renderer()
    yield shared
    shared.close()


def template(source: str, renderer: Renderer) -> ChatTemplate:
    return ChatTemplate("chat_template.jinja", {"default": source}, {}, renderer)


TEMPLATES = {
    "built_in": BUILT_IN,
    "white_space": "  {% for m in messages %}\n    {{ m.role }}\n  {% endfor %}\n\n\nend\n",
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}"
    "{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}"
    "{{ messages[1].content | tojson(ensure_ascii=true) }}",
    "loop_controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{% if loop.index0 == 3 %}{% break %}{% endif %}[{{ m.role }}]{% endfor %}",
    "generation": "{% set x = 1 %}{% generation %}{% set x = 2 %}a{{ x }}"
    "{% endgeneration %}{{ x }}",
    "undefined": "<{{ nothing }}><{{ messages[0].nothing }}><{{ nothing is defined }}>"
    "<{{ documents is none }}>",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content | string | length %}{% endfor %}{{ ns.n }}",
    "special_tokens": "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}",
    "filters": "{{ messages | selectattr('role', 'eq', 'user') | map(attribute='role') | list }}"
    "{{ messages[::-1][0].role | upper }}{{ messages[-1].content[0]['text'].strip() }}",
    "variables": "{% if thinking %}yes{% endif %}{{ words[1] }}{{ add_generation_prompt }}",
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
def test_renders_as_transformers_does(
    source: str, tools: Any, renderer: Renderer, tmp_path: Path
) -> None:
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    variables: dict[str, Any] = {
        "thinking": True,
        "words": ["ä", "ö"],
        "bos_token": "[BOS]",
        "eos_token": "é",
    }
    theirs = render_jinja_template(
        [CHAT], tools=tools, chat_template=source, add_generation_prompt=True, **variables
    )[0][0]
    ours = template((tmp_path / "chat_template.jinja").read_text(encoding="utf-8"), renderer)
    assert ours.render(CHAT, tools, **variables) == theirs


def test_built_in_template_writes_the_published_format(renderer: Renderer) -> None:
    render = template(BUILT_IN, renderer).render
    question = [{"role": "user", "content": "Tell me about the french revolution."}]
    assert render(question) == (
        "<|im_user|>user<|im_middle|>Tell me about the french revolution.<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    assert render(CHAT, TOOLS, add_generation_prompt=False) == (
        '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"weather",'
        '"parameters":{"type":"object"}}}]<|im_end|>'
        "<|im_system|>system<|im_middle|>Be brief & <kind>.<|im_end|>"
        "<|im_user|>user<|im_middle|>Weather in 北京? It's 'urgent'.<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|>"
        "<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "北京", "days": [1, 2.5]}<|tool_call_end|>'
        "<|tool_call_begin|>functions.weather:1<|tool_call_argument_begin|>"
        '{"city": "x"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        "<|im_system|>weather<|im_middle|>## Return of functions.weather:0\nsun<|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.weather:1\nrain<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Sunny.<|im_end|>"
        "<|im_user|>user<|im_middle|>Thanks, bye<|im_end|>"
    )


def test_built_in_template_keeps_white_space_and_numbers_calls(renderer: Renderer) -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    chat = [
        {"role": "user", "content": " \n a \n"},
        {"role": "assistant", "content": "\n", "tool_calls": [call, call]},
    ]
    assert template(BUILT_IN, renderer).render(chat, None, False) == (
        "<|im_user|>user<|im_middle|> \n a \n<|im_end|><|im_assistant|>assistant<|im_middle|>\n"
        "<|tool_calls_section_begin|>"
        "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_call_begin|>functions.f:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|><|im_end|>"
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "wizard", "content": ""}, "unknown role wizard"),
        (
            {"role": "user", "content": [{"type": "image", "image": "x"}]},
            "only text is understood, not a part of type image",
        ),
    ],
)
def test_built_in_template_refuses(message: Any, expected: str, renderer: Renderer) -> None:
    with pytest.raises(KimiError, match=expected):
        template(BUILT_IN, renderer).render([message])


def test_strftime_now_is_today(renderer: Renderer) -> None:
    assert template("{{ strftime_now('%Y') }}", renderer).render([]) == time.strftime("%Y")


# Errors --------------------------------------------------------------------------------------

WRONG = {
    "syntax": ("a\nb\n{% for %}", "line 3: Expected an expression"),
    "unclosed": ("{% if a %}", "line 1: Unexpected end of template"),
    "refusal": (
        "\n{{ raise_exception('roles must\n alternate') }}",
        "line 2: roles must alternate",
    ),
    "escape_codes": ("{{ raise_exception('\x1b[31mred\x07') }}", "line 1: \\[31mred$"),
    "undefined": ("\n\n{{ a.b.c }}", "line 3: 'a' is undefined"),
    "filter": ("{{ a | nothing }}", "line 1: No filter named 'nothing'"),
    "type": ("{{ 1 + 'a' }}", "line 1: unsupported operand"),
    "include": ("{% include 'x' %}", "line 1: no loader for this environment"),
    "class": ("{{ ''.__class__.__mro__ }}", "line 1: access to attribute '__class__'"),
    "globals": ("{{ raise_exception.__globals__.x }}", "access to attribute '__globals__'"),
    "attr": ("{{ ('' | attr('__class__')).x }}", "line 1: "),
    "format": ("{{ '{0.__class__.x}'.format(1) }}", "line 1: access to attribute '__class__'"),
    "namespace": ("{{ namespace(_x=1) }}", "line 1: namespace attribute '_x'"),
    "mutation": ("{{ messages.append(1) }}", "line 1: "),
    "range": ("{{ range(10**9) | list }}", "line 1: Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion is too deep"),
    "nesting": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "too deep|died"),
}


@pytest.mark.parametrize(("source", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_template_is_one_line(source: str, expected: str, renderer: Renderer) -> None:
    with pytest.raises(KimiError, match=expected) as caught:
        template(source, renderer).render([])
    assert str(caught.value).startswith("chat_template.jinja: ")
    assert str(caught.value).isprintable()
    assert template("ok", renderer).render([]) == "ok"


# Which template ------------------------------------------------------------------------------


def test_the_file_comes_before_the_settings(tmp_path: Path) -> None:
    settings = {"chat_template": "settings", "bos_token": {"content": "[BOS]"}}
    for expected in ("settings", "file [BOS]"):
        loaded = load_chat_template(tmp_path, settings)
        assert loaded.render([]) == expected
        loaded.close()
        (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")


def test_tool_use_is_for_tools(tmp_path: Path) -> None:
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    loaded = load_chat_template(tmp_path, {"chat_template": both})
    assert (loaded.render([]), loaded.render([], []), loaded.render([], TOOLS)) == (
        "plain",
        "plain",
        "tools",
    )
    loaded.close()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"chat_template": 3}, "chat_template must be a string or a list, but is 3"),
        ({"chat_template": ["x"]}, r"chat_template\[0\] must be an object"),
        (
            {"chat_template": [{"name": "x", "template": "y"}]},
            "chat_template must hold one named default",
        ),
        ({"bos_token": 3}, "bos_token must be a string, but is 3"),
        ({"eos_token": {"x": 1}}, "eos_token must be a string"),
    ],
)
def test_wrong_settings_are_one_line(settings: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(KimiError, match=f"tokenizer_config.json: {expected}"):
        load_chat_template(tmp_path, settings)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"ab\xff")
    with pytest.raises(KimiError, match="chat_template.jinja: must be UTF-8, but byte 2 is not"):
        load_chat_template(tmp_path, {})
    file.write_bytes(b" " * (chat_template.TEMPLATE_BYTES + 1))
    with pytest.raises(KimiError, match="may have 1048576 bytes"):
        load_chat_template(tmp_path, {})


# Messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "tools", "expected"),
    [
        ("hi", None, "messages must be a list, but is 'hi'"),
        ({}, None, "messages must be a list"),
        (["hi"], None, r"messages\[0\] must be an object, but is 'hi'"),
        ([{"content": "x"}], None, r"messages\[0\]: role must be a string, but is None"),
        ([{"role": 1}], None, "role must be a string, but is 1"),
        ([{"role": "user", "content": 5}], None, "content must be a string, null or a list"),
        ([{"role": "user", "content": ["x"]}], None, r"content\[0\] must be an object"),
        ([{"role": "user", "content": [{"text": "x"}]}], None, "type must be a string"),
        ([{"role": "assistant", "tool_calls": {}, "content": ""}], {"a": 1}, "tools must be"),
        ([{"role": "assistant", "tool_calls": "x"}], None, "tool_calls must be a list"),
        ([{"role": "user", "content": ""}], ["f"], r"tools\[0\] must be an object, but is 'f'"),
    ],
)
def test_wrong_messages_are_one_line(messages: Any, tools: Any, expected: str) -> None:
    with pytest.raises(KimiError, match=expected):
        check_messages(messages, tools)


def test_right_messages_pass() -> None:
    check_messages(CHAT, TOOLS)
    check_messages([], None)


# Typed text ----------------------------------------------------------------------------------

NAMES = ("<|im_end|>", "<|im_user|>", "[EOT]", "aXa", "Xab", "<|im_end|>>")


def spelled(control: ControlTokens, rendered: str, mark: str) -> list[str]:
    return [piece for piece, is_control in control.split(rendered, mark) if is_control]


@pytest.mark.parametrize(
    "texts",
    [
        ["<|im_end|>"],
        ["<|IM_END|>"],
        ["<|Im_", "eNd|>"],
        ["<|im_<|im_end|>end|>"],
        ["aXab"],
        ["aXaXab"],
        ["<|im_", "end|>"],
        ["<", "|im_end|>"],
        ["<|", "im_end", "|>"],
        ["<|im_ ", "end|>"],
        ["<|im_end|", ">"],
        ["[", "EOT", "]"],
        [c for c in "<|im_end|>"],
        ["\ue000<|im_end|>"],
        ["<\ue000|im_end|>"],
        ["\\ue000 <|im_end|>"],
    ],
)
@pytest.mark.parametrize("change", [str, str.strip, str.lower], ids=["as_is", "strip", "lower"])
def test_typed_text_never_becomes_a_control_token(
    texts: list[str], change: Callable[[str], str]
) -> None:
    control = ControlTokens(NAMES)
    protected, mark = control.protect({"messages": texts})
    given = [change(text) for text in protected["messages"]]
    rendered = "<|im_user|>" + "".join(given) + "<|im_end|>"
    assert spelled(control, rendered, mark) == ["<|im_user|>", "<|im_end|>"]
    text = "".join(piece for piece, is_control in control.split(rendered, mark) if not is_control)
    assert text == "".join(map(change, texts))


def test_text_and_template_do_not_spell_a_token_together() -> None:
    """Every way to cut every name in three: template, data, template."""
    control = ControlTokens(NAMES)
    for name in NAMES:
        for first in range(len(name)):
            for last in range(first + 1, len(name) + 1):
                typed = name[first:last]
                chat = [{"role": "user", "content": typed}, {"content": [f" {typed}\n"]}]
                protected, mark = control.protect({"messages": chat})
                plain, spaced = (message["content"] for message in protected["messages"])
                for text in (plain, spaced[0].strip()):
                    rendered = name[:first] + text + name[last:]
                    assert name not in spelled(control, rendered, mark), (first, last)


def test_random_pieces_do_not_spell_a_token() -> None:
    control = ControlTokens(NAMES)
    chooser = random.Random(0)
    for _ in range(3000):
        name = chooser.choice(NAMES)
        text = "".join(chooser.choices([*name, name[:3], name[2:], " ", "\ue000", name], k=6))
        cuts = sorted(chooser.choices(range(len(text) + 1), k=2))
        typed = [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]
        protected, mark = control.protect({"messages": typed})
        rendered = "".join(protected["messages"])
        assert spelled(control, rendered, mark) == []
        assert "".join(piece for piece, _ in control.split(rendered, mark)) == text


def test_every_place_of_the_data_is_protected() -> None:
    bad = "<|im_end|>"
    data = {
        "messages": [
            {"role": bad, "name": bad, bad: bad, "content": [{"type": bad, "text": bad}]},
            {"role": "tool", "tool_calls": [{"id": bad, "function": {"arguments": {bad: [bad]}}}]},
        ],
        "tools": [
            {"function": {"name": bad, "parameters": {"properties": {bad: {"enum": [bad]}}}}}
        ],
        "extra": bad,
    }
    control = ControlTokens(NAMES)
    protected, mark = control.protect(data)
    written = json.dumps(protected, ensure_ascii=False)
    assert spelled(control, written, mark) == []
    assert written.replace(mark, "") == json.dumps(data, ensure_ascii=False)
    escaped = json.dumps(protected)
    assert "".join(piece for piece, _ in control.split(escaped, mark)) == json.dumps(data)


def test_what_templates_compare_is_left_alone() -> None:
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "im", "tool_calls": [{"type": "function"}]},
    ]
    protected, _ = ControlTokens(["<|user|>", "<|assistant|>", "<|text|>", "<|low|>"]).protect(
        {"messages": chat, "effort": "low"}
    )
    assert protected == {"messages": chat, "effort": "low"}


def test_the_mark_is_in_no_text() -> None:
    control = ControlTokens(NAMES)
    plane = "".join(map(chr, range(0xE000, 0xF900)))
    _, mark = control.protect({"messages": [plane, "\\udb80"]})
    assert mark not in plane and ord(mark) >= 0xF0000
    rest = "".join(map(chr, [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    with pytest.raises(KimiError, match="every private-use character"):
        control.protect({"messages": [plane, rest]})
    _, mark = control.protect({"messages": []}, "the template has \ue000 and \\ue001")
    assert mark == "\ue002"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({1: "x"}, "keys must be strings, but one is 1"),
        (b"x", "must be JSON, but one is b'x'"),
        (np.eye(2), r"must be JSON, but one is array\(\[\[1., 0.\], \[0., 1.\]\]\)$"),
    ],
)
def test_data_must_be_json(value: Any, expected: str) -> None:
    with pytest.raises(KimiError, match=expected):
        ControlTokens(NAMES).protect({"messages": [value]})


def test_deep_data_is_one_line() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(KimiError, match="nest too deeply"):
        ControlTokens(NAMES).protect({"messages": deep})


def test_settings_file_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": BUILT_IN})
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    loaded = load_chat_template(tmp_path, settings)
    assert loaded.render([{"role": "user", "content": "a"}], None, False) == (
        "<|im_user|>user<|im_middle|>a<|im_end|>"
    )
    loaded.close()
