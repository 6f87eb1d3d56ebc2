"""Messages to text, by the folder's chat template or the built-in one.

Templates are code from a downloaded folder: a child process runs them (template_renderer.py). What
people type is kept from becoming a control token in it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_kimi.errors import KimiError
from mlx_kimi.text.template_renderer import Renderer, one_line

Json = Any  # what json.dumps takes
TEMPLATE_BYTES = 1 << 20  # published templates are below 40 kB
TYPED = ("messages", "tools", "documents")  # variables that hold what people and tools wrote
COMPARED = ("role", "type")  # keys whose values templates compare

# The format of checkpoint.md for folders that carry no template. Calls and results follow the K2
# models of the same family, and so does the spacing of the tools' JSON.
BUILT_IN = """\
{%- macro text(message) -%}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content or [] -%}
      {%- if part.type != 'text' -%}
        {{- raise_exception('only text is understood, not a part of type ' ~ part.type) -}}
      {%- endif -%}
      {{- part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
  <|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role in ('system', 'developer') -%}
    <|im_system|>system<|im_middle|>{{ text(message) }}<|im_end|>
  {%- elif message.role == 'user' -%}
    <|im_user|>user<|im_middle|>{{ text(message) }}<|im_end|>
  {%- elif message.role == 'assistant' -%}
    <|im_assistant|>assistant<|im_middle|>{{ text(message) }}
    {%- if message.tool_calls -%}
      <|tool_calls_section_begin|>
      {%- for call in message.tool_calls -%}
        {%- set arguments = call.function.arguments -%}
        <|tool_call_begin|>{{ call.id or 'functions.' ~ call.function.name ~ ':' ~ loop.index0 -}}
        <|tool_call_argument_begin|>
        {{- arguments if arguments is string else arguments | tojson -}}
        <|tool_call_end|>
      {%- endfor -%}
      <|tool_calls_section_end|>
    {%- endif -%}
    <|im_end|>
  {%- elif message.role == 'tool' -%}
    <|im_system|>{{ message.name or 'tool' }}<|im_middle|>
    {{- '## Return of ' ~ message.tool_call_id ~ '\\n' }}{{ text(message) }}<|im_end|>
  {%- else -%}
    {{- raise_exception('unknown role ' ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""


class ChatTemplate:
    """The templates of a folder, ready to render.

    Args:
        name: what errors call it, the file.
        templates: by transformers' names, "default" and perhaps "tool_use".
        variables: the special tokens (bos_token, …) that templates may name.
    """

    def __init__(
        self,
        name: str,
        templates: Mapping[str, str],
        variables: Mapping[str, Json],
        renderer: Renderer | None = None,
    ) -> None:
        self.name = name
        self.variables = variables
        self._templates = templates
        self._renderer = renderer or Renderer()

    def source(self, tools: Json) -> str:
        """The text of the template that serves a chat with or without `tools`."""
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates["default"]

    def render(
        self,
        messages: Json,
        tools: Json = None,
        add_generation_prompt: bool = True,
        **variables: Json,
    ) -> str:
        """The chat as text, control tokens spelled out.

        Raises:
            KimiError: the template is wrong, refuses the messages, or passes a limit.
        """
        given = {
            "documents": None,
            **self.variables,
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._renderer.render(self.source(tools), given)
        except KimiError as error:
            raise KimiError(f"{self.name}: {error}") from None

    def close(self) -> None:
        """End the child process; it ends by itself with this one."""
        self._renderer.close()


def load_chat_template(folder: Path, config: Mapping[str, Json]) -> ChatTemplate:
    """The template of `folder`: its chat_template.jinja, else the one in tokenizer_config.json
    (`config`), else the built-in one.

    Raises:
        KimiError: the file is not text, or the entry is neither text nor a list of templates.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.name, {"default": _read(file)}, special_tokens(config))
    if config.get("chat_template") is not None:
        templates = _templates(config["chat_template"])
        name = "tokenizer_config.json: chat_template"
        return ChatTemplate(name, templates, special_tokens(config))
    return ChatTemplate("the built-in chat template", {"default": BUILT_IN}, special_tokens(config))


def _read(file: Path) -> str:
    if file.stat().st_size > TEMPLATE_BYTES:
        raise KimiError(f"{file}: a template may have {TEMPLATE_BYTES} bytes, this one has more")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise KimiError(f"{file}: must be UTF-8, but byte {error.start} is not") from None


def _templates(entry: Json) -> dict[str, str]:
    """Templates by name, from either form that transformers writes."""
    where = "tokenizer_config.json: chat_template"
    if isinstance(entry, str):
        return {"default": entry}
    if not isinstance(entry, list):
        raise KimiError(f"{where} must be a string or a list, but is {_shown(entry)}")
    templates = {}
    for number, item in enumerate(entry):
        fields = (item.get("name"), item.get("template")) if isinstance(item, dict) else ()
        if len(fields) != 2 or not all(isinstance(field, str) for field in fields):
            raise KimiError(f"{where}[{number}] must be an object with the strings name, template")
        templates[item["name"]] = item["template"]
    if "default" not in templates:
        raise KimiError(f"{where} must hold one named default, but has {sorted(templates)}")
    return templates


def special_tokens(config: Mapping[str, Json]) -> dict[str, Json]:
    """`bos_token`, `eos_token` and the like of tokenizer_config.json, as plain strings.

    Raises:
        KimiError: one of them is neither a string nor an object with a string `content`.
    """
    found: dict[str, Json] = {}
    for key in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        value = config.get(f"{key}_token")
        if value is not None:
            found[f"{key}_token"] = _token_text(f"{key}_token", value)
    more = config.get("additional_special_tokens")
    if isinstance(more, list):
        found["additional_special_tokens"] = [
            _token_text("additional_special_tokens", item) for item in more
        ]
    return found


def _token_text(key: str, value: Json) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise KimiError(f"tokenizer_config.json: {key} must be a string, but is {_shown(value)}")
    return text


def check_messages(messages: Json, tools: Json = None) -> None:
    """Refuse what no template could read.

    Raises:
        KimiError: `messages` is not a list of objects with a string `role` and a `content` that
            is a string, null or a list of parts; `tools` is not a list of objects.
    """
    for number, message in enumerate(_list("messages", messages)):
        _check_message(f"messages[{number}]", message)
    for number, tool in enumerate(_list("tools", tools or [])):
        _object(f"tools[{number}]", tool)


def _check_message(where: str, message: Json) -> None:
    _object(where, message)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise KimiError(f"{where}: role must be a string, but is {_shown(role)}")
    if content is not None and not isinstance(content, (str, list, tuple)):
        raise KimiError(
            f"{where}: content must be a string, null or a list of parts, but is {_shown(content)}"
        )
    if isinstance(content, (list, tuple)):
        for number, part in enumerate(content):
            _object(f"{where}: content[{number}]", part)
            if not isinstance(part.get("type"), str):
                raise KimiError(
                    f"{where}: content[{number}]: type must be a string, "
                    f"but is {_shown(part.get('type'))}"
                )
    for number, call in enumerate(_list(f"{where}: tool_calls", message.get("tool_calls") or [])):
        _object(f"{where}: tool_calls[{number}]", call)


def _list(where: str, value: Json) -> Iterable[Json]:
    if not isinstance(value, (list, tuple)):
        raise KimiError(f"{where} must be a list, but is {_shown(value)}")
    return value


def _object(where: str, value: Json) -> None:
    if not isinstance(value, Mapping):
        raise KimiError(f"{where} must be an object, but is {_shown(value)}")


def _shown(value: Json) -> str:
    """A value in an error: short, on one line."""
    text = one_line(repr(value))
    return text if len(text) <= 60 else text[:60] + "…"


class ControlTokens:
    """Keeps the control tokens that a template writes apart from their spellings in its data.

    Before rendering, `protect` puts a mark inside every spelling in the data; afterwards `split`
    cuts the text at the spellings that are whole, which the template wrote, and takes the marks
    out of the rest. The mark is a private-use character that no text of the chat holds.

    A spelling can also come together from two sides. So a string that ends with the beginning of
    a token, or begins with the end of one, or is a middle of one, is marked there as well. Left
    whole are middles that templates compare rather than print: `role`, `type`, keys, numbers, and
    the caller's own variables. Case does not count, as templates change it.

    What remains is a template that takes text out of the middle of a message: it could assemble a
    spelling, as it could write one.

    Args:
        names: the spellings. Those of one character have no inside to mark, and are left out.
    """

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._spelling = re.compile(pattern)
        self._spelling_in_any_case = re.compile(pattern, re.IGNORECASE)
        lower = [name.lower() for name in longest_first]
        self._joined = "\0".join(lower)
        self._starts = {name[:end] for name in lower for end in range(1, len(name))}
        self._ends = {name[start:] for name in lower for start in range(1, len(name))}
        self._longest = max(map(len, lower), default=0)

    def protect(self, data: Mapping[str, Json], *others: str) -> tuple[dict[str, Json], str]:
        """`data` with every spelling broken, and the mark, absent from `data` and `others`.

        Args:
            data: what the template is given: messages, tools and further variables.
            others: texts that also come into the rendering: the template.

        Raises:
            KimiError: `data` nests too deeply, holds what JSON cannot, or uses every private-use
                character there is.
        """
        try:
            mark = free_character([*_strings(data), *others])
            protected = {
                name: self._protect(value, mark, whole_middles=name not in TYPED)
                for name, value in data.items()
            }
        except RecursionError:
            raise KimiError("messages: lists and objects nest too deeply") from None
        return protected, mark

    def split(self, text: str, mark: str = "") -> Iterator[tuple[str, bool]]:
        """Ordinary text without marks (False) and whole control tokens (True), in order."""
        end = 0
        for found in self._spelling.finditer(text):
            yield _without(text[end : found.start()], mark), False
            yield found.group(), True
            end = found.end()
        yield _without(text[end:], mark), False

    def cuts(self, text: str) -> list[int]:
        """Places inside `text` that break every spelling in it, overlapping ones too."""
        return _places_inside(self._spelling, text)

    def _protect(self, data: Json, mark: str, whole_middles: bool) -> Json:
        if isinstance(data, str):
            return self._break(data, mark, whole_middles)
        if isinstance(data, Mapping):
            return {
                self._break(name, mark, whole_middles=True): self._protect(
                    value, mark, whole_middles or name in COMPARED
                )
                for name, value in data.items()
            }
        if isinstance(data, (list, tuple)):
            return [self._protect(item, mark, whole_middles) for item in data]
        return data

    def _break(self, text: str, mark: str, whole_middles: bool) -> str:
        places = set(_places_inside(self._spelling_in_any_case, text))
        # Templates strip white space: what counts is the text without it.
        core = text.strip()
        first = len(text) - len(text.lstrip())
        last = first + len(core)
        shortened = range(1, min(self._longest, len(core) + 1))
        if any(core[:n].lower() in self._ends for n in shortened):
            places.add(first)
        if any(core[-n:].lower() in self._starts for n in shortened):
            places.add(last)
        is_short = 0 < len(core) < self._longest
        if is_short and not whole_middles and core.lower() in self._joined:
            places.add(last)
        return _with_marks(text, mark, sorted(places)) if places else text


def _places_inside(spelling: re.Pattern[str], text: str) -> list[int]:
    places = []
    found = spelling.search(text)
    while found:
        places.append(found.start() + 1)
        found = spelling.search(text, found.start() + 1)
    return places


def _with_marks(text: str, mark: str, places: list[int]) -> str:
    return mark.join(text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True))


def _without(text: str, mark: str) -> str:
    if not mark:
        return text
    return text.replace(mark, "").replace(_escape(mark), "")  # a template may write ASCII JSON


def _escape(character: str) -> str:
    return json.dumps(character)[1:-1]


def free_character(texts: Iterable[str]) -> str:
    r"""A private-use character that is in none of `texts`, nor is its `\uXXXX` escape.

    Raises:
        KimiError: every one of the 137,468 is used.
    """
    used, escapes = set[str](), set[str]()
    for text in texts:
        used.update(text)
        if "\\u" in text:
            escapes.update(re.findall(r"\\u[0-9a-f]{4}", text))
    for first, last in ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)):
        for code in range(first, last + 1):
            if chr(code) not in used and _escape(chr(code))[:6] not in escapes:
                return chr(code)
    raise KimiError("messages: the text uses every private-use character, so none can mark it")


def _strings(data: Json) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for name, value in data.items():
            if not isinstance(name, str):
                raise KimiError(f"messages: keys must be strings, but one is {_shown(name)}")
            yield name
            yield from _strings(value)
    elif isinstance(data, (list, tuple)):
        for item in data:
            yield from _strings(item)
    elif data is not None and not isinstance(data, (bool, int, float)):
        raise KimiError(f"messages: values must be JSON, but one is {_shown(data)}")
