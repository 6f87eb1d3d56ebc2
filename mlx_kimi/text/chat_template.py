"""Messages to text, by the folder's chat template or the built-in one.

Templates are code from a downloaded folder: a child process runs them (template_renderer.py). What
people type is kept from becoming a control token in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mlx_kimi.errors import KimiError
from mlx_kimi.text.template_renderer import OUTPUT_CHARACTERS, Rendered, Renderer
from mlx_kimi.user_files import Json, decoded, is_there, read_bytes, shown

TEMPLATE_BYTES = 1 << 20  # published templates are below 40 kB

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
        given = {**variables, "messages": messages, "tools": tools}
        return self.rendered({**given, "add_generation_prompt": add_generation_prompt}).text

    def rendered(self, variables: Mapping[str, Json], resumed: Json = None) -> Rendered:
        """What the template makes of `variables`, messages and tools among them.

        Raises:
            KimiError: as of `render`.
        """
        given = {"documents": None, **self.variables, **variables}
        try:
            return self._renderer.render(self.source(given.get("tools")), given, resumed)
        except KimiError as error:
            raise KimiError(f"{self.name}: {error}") from None

    def continued(
        self,
        known: Rendered,
        variables: Mapping[str, Json],
        messages: Sequence[Json],
        kept: int,
    ) -> Rendered | None:
        """What `rendered` would make of the first `kept` messages of `known` and others after them.

        The first message is rendered again, which the others may look at, and compared.

        Args:
            known: what it made of the same variables.
            messages: the first, and those after the kept ones.

        Returns:
            None where that is not certain.
        """
        if not 1 <= kept < len(known.starts) or known.carried[kept] is None:
            return None
        given = {**variables, "messages": list(messages)}
        try:
            new = self.rendered(given, resumed=known.carried[kept])
        except KimiError:  # with all messages it says the same, and the right line
            return None
        begin, same = new.starts[1], known.starts[kept]
        text = known.text[:same] + new.text[begin:]
        if known.text[: known.starts[1]] != new.text[:begin] or len(text) > OUTPUT_CHARACTERS:
            return None
        starts = [*known.starts[:kept], *(start - begin + same for start in new.starts[1:])]
        return Rendered(text, starts, [*known.carried[:kept], *new.carried[1:]])

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
    if is_there(file):
        return ChatTemplate(file.name, {"default": _read(file)}, special_tokens(config))
    if config.get("chat_template") is not None:
        templates = _templates(config["chat_template"])
        name = "tokenizer_config.json: chat_template"
        return ChatTemplate(name, templates, special_tokens(config))
    return ChatTemplate("the built-in chat template", {"default": BUILT_IN}, special_tokens(config))


def _read(file: Path) -> str:
    text = decoded(read_bytes(file, TEMPLATE_BYTES), file)
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as files of text are read


def _templates(entry: Json) -> dict[str, str]:
    """Templates by name, from either form that transformers writes."""
    where = "tokenizer_config.json: chat_template"
    if isinstance(entry, str):
        return {"default": entry}
    if not isinstance(entry, list):
        raise KimiError(f"{where} must be a string or a list, but is {shown(entry)}")
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
        raise KimiError(f"tokenizer_config.json: {key} must be a string, but is {shown(value)}")
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
        raise KimiError(f"{where}: role must be a string, but is {shown(role)}")
    if content is not None and not isinstance(content, (str, list, tuple)):
        raise KimiError(
            f"{where}: content must be a string, null or a list of parts, but is {shown(content)}"
        )
    if isinstance(content, (list, tuple)):
        for number, part in enumerate(content):
            _object(f"{where}: content[{number}]", part)
            if not isinstance(part.get("type"), str):
                raise KimiError(
                    f"{where}: content[{number}]: type must be a string, "
                    f"but is {shown(part.get('type'))}"
                )
    for number, call in enumerate(_list(f"{where}: tool_calls", message.get("tool_calls") or [])):
        _object(f"{where}: tool_calls[{number}]", call)


def _list(where: str, value: Json) -> Iterable[Json]:
    if not isinstance(value, (list, tuple)):
        raise KimiError(f"{where} must be a list, but is {shown(value)}")
    return value


def _object(where: str, value: Json) -> None:
    if not isinstance(value, Mapping):
        raise KimiError(f"{where} must be an object, but is {shown(value)}")
