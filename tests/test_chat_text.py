"""A chat's ids, made from what is new: those of the whole chat, whatever the template does."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.prompt import ChatPrompt
from mlx_kimi.errors import KimiError
from mlx_kimi.text import template_worker
from mlx_kimi.text.chat_template import BUILT_IN, ChatTemplate
from mlx_kimi.text.chat_text import ChatText
from mlx_kimi.text.template_renderer import Rendered, Renderer
from mlx_kimi.text.tokenizer import Tokenizer, load_tokenizer

POCKET = (pocket_folder() / "chat_template.jinja").read_text(encoding="utf-8")
USER = "<|im_user|>{{ message.content }}<|im_end|>"
LOOP = f"{{% for message in messages %}}{USER}{{% endfor %}}"


def looping(body: str, before: str = "", after: str = "") -> str:
    return f"{before}{{% for message in messages %}}{body}{USER}{{% endfor %}}{after}"


# Each renders message by message, in some way that a published template does.
BY_MESSAGE = {
    "built_in": BUILT_IN,
    "pocket": POCKET,
    "plain": LOOP,
    "default_system": looping(
        "{% if loop.first and messages[0]['role'] != 'system' %}<|im_system|>You are.<|im_end|>"
        "{% endif %}{% set name = message.get('name') or message['role'] %}{{ name }}"
    ),
    "inner_loop": looping(
        "{% for call in message.tool_calls or [] %}{{ loop.index }}{{ loop.last }}"
        "{% if loop.previtem is defined %}+{% endif %}{{ call | tojson }}{% endfor %}"
    ),
    "set_in_the_loop": looping(
        "{% if message.role == 'tool' %}{% set x = 'a' %}{% set y = 'b' %}{% endif %}"
        "{{ x }}{{ y }}",
        "{% set x = 'outer' %}",
        "{{ x }}{{ y }}{{ message }}",
    ),
    "carried": looping(
        "{% set ns.tool = message.role == 'tool' or ns.tool %}{{ ns.n }}{{ ns.tool }}"
        "{% set ns.n = ns.n + 1 %}{% set ns.last = message.role %}",
        "{% set ns = namespace(n=0, tool=false) %}",
        "{{ ns.n }}{{ ns }}",
    ),
    "carried_text": looping(
        "{% set ns.said = message.content %}",
        "{% set ns = namespace() %}",
        "{{ ns.said | length }}",
    ),
    "carried_list": looping(
        "{% set ns.all = ns.all + [message.role] %}", "{% set ns = namespace(all=[]) %}", "{{ ns }}"
    ),
    "macro_that_carries": looping(
        "{{ count() }}",
        "{% set ns = namespace(n=0) %}{% macro count() %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
        "{% endmacro %}",
    ),
    "no_start": looping(
        "", "", "{% generation %}end{% endgeneration %}{{ add_generation_prompt }}"
    ),
    "tools_in_the_first": looping(
        "{% if loop.first and tools %}{{ tools | tojson }}{% endif %}", "{% set t = tools %}"
    ),
    "refuses": looping(
        "{% if message.role == 'tool' and message.content == '' %}"
        "{{ raise_exception('no result') }}{% endif %}"
    ),
    "escaped": looping("{{ message.content | escape | trim | tojson(ensure_ascii=true) }}"),
}
# Each looks from one message at another, or at more than the messages.
NOT_BY_MESSAGE = {
    "length": looping("{{ messages | length }}"),
    "length_in_the_end": LOOP + "{{ messages | length }}",
    "last": looping("{% if loop.last %}!{% endif %}"),
    "index": looping("{{ loop.index0 }}"),
    "next": looping("{{ loop.nextitem.role }}"),
    "previous": looping("{{ loop.previtem.role }}"),
    "changed": looping("{% if loop.changed(message.role) %}!{% endif %}"),
    "cycle": looping("{{ loop.cycle('a', 'b') }}"),
    "loop_given": looping("{{ f(loop) }}", "{% macro f(l) %}{{ l.index }}{% endmacro %}"),
    "outer_loop_in_an_inner_head": looping("{% for x in range(loop.index) %}.{% endfor %}"),
    "loop_by_key": looping("{{ loop['index'] }}"),
    "last_message": looping("{% if message == messages[-1] %}!{% endif %}"),
    "second_message": looping("{{ messages[1].role }}"),
    "slice": "{% for message in messages[1:] %}" + USER + "{% endfor %}",
    "messages_set": "{% set messages = messages[:2] %}" + LOOP,
    "messages_set_in_a_loop": looping("{% set messages = [1] %}"),
    "messages_macro": "{% macro messages() %}{% endmacro %}" + LOOP,
    "messages_in_a_macro": looping(
        "{{ f() }}", "{% macro f() %}{{ messages | tojson }}{% endmacro %}"
    ),
    "messages_as_an_argument": looping("{{ f(1) }}", "{% macro f(messages) %}{% endmacro %}"),
    "alias": looping("{{ all[-1].role }}", "{% set all = messages %}"),
    "two_loops": LOOP + LOOP,
    "filtered": "{% for message in messages if message.role != 'tool' %}" + USER + "{% endfor %}",
    "reversed": "{% for message in messages | reverse %}" + USER + "{% endfor %}",
    "else": "{% for message in messages %}" + USER + "{% else %}none{% endfor %}",
    "recursive": "{% for message in messages recursive %}" + USER + "{% endfor %}",
    "break": looping("{% if message.role == 'tool' %}{% break %}{% endif %}"),
    "in_a_condition": "{% if tools %}" + LOOP + "{% endif %}" + LOOP.replace("in m", "in m"),
    "in_a_filter": "{% filter trim %}" + LOOP + "{% endfilter %}",
    "in_a_set": "{% set all %}" + LOOP + "{% endset %}{{ all | length }}",
    "in_a_macro": "{% macro f() %}" + LOOP + "{% endmacro %}{{ f() | upper }}",
    "iterator": looping(
        "{% for x in ones %}{{ x }}{% endfor %}", "{% set ones = [1, 2] | map('string') %}"
    ),
    "joiner": looping("{{ sep() }}", "{% set sep = joiner(',') %}"),
    "cycler": looping("{{ c.next() }}", "{% set c = cycler('a', 'b') %}"),
    "chance": looping("{{ [1, 2] | random }}"),
    "clock": "{{ strftime_now('%Y') }}" + LOOP,
    "dict_changed": looping(
        "{% set _ = dict.update(seen, {message.role: 1}) %}{{ seen | length }}",
        "{% set seen = {} %}",
    ),
    "namespace_in_the_loop": looping(
        "{% set ns = namespace(n=1) %}{{ ns.n }}",
    ),
    "namespace_after": LOOP + "{% set ns = namespace(n=1) %}{{ ns.n }}",
    "macro_in_the_loop": looping("{% macro f() %}{{ loop.index }}{% endmacro %}{{ f() }}"),
    "block": "{% block b %}" + LOOP + "{% endblock %}",
    "include": "{% include 'x' ignore missing %}" + LOOP,
    "no_loop": "{{ messages | tojson }}",
    "target_pair": "{% for a, b in messages %}{{ a }}{% endfor %}",
    "same": looping("{{ message is sameas messages[0] }}"),
}


REPEATABLE = [source for name, source in NOT_BY_MESSAGE.items() if name != "chance"]


def proves(source: str) -> bool:
    made = template_worker.environment()
    return template_worker.goes_by_message(made.parse(source), made.globals)


@pytest.mark.parametrize("source", BY_MESSAGE.values(), ids=BY_MESSAGE)
def test_templates_that_go_message_by_message_are_proven_to(source: str) -> None:
    assert proves(source)


@pytest.mark.parametrize("source", NOT_BY_MESSAGE.values(), ids=NOT_BY_MESSAGE)
def test_nothing_is_proven_of_a_template_that_may_look_further(source: str) -> None:
    assert not proves(source)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    loaded = load_tokenizer(pocket_folder())
    yield loaded
    loaded.close()


def with_template(tokenizer: Tokenizer, source: str) -> None:
    kept = tokenizer.chat_template
    tokenizer.chat_template = ChatTemplate("t", {"default": source}, {}, kept._renderer)


# What people and tools write: spellings of control tokens and parts of them, marks, white space,
# half characters.
TEXTS = st.one_of(
    st.sampled_from(["", "hi", " hi \n", "<|im_end|>", "x<|im_", "end|>", "user|>", "\ue000",
                     "\\ue000", "\ud83d", "\ude00", "a" * 5000, "<|IM_END|>"]),
    st.text(max_size=12),
)  # fmt: skip
CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": TEXTS, "arguments": st.one_of(
            TEXTS, st.dictionaries(TEXTS, st.sampled_from([1, 1.0, True, None]), max_size=2))})},
        optional={"id": TEXTS},
    ),
    max_size=2,
)  # fmt: skip
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS},
    optional={"name": TEXTS, "tool_calls": CALLS, "tool_call_id": TEXTS},
)
STEPS = st.lists(st.tuples(st.floats(0, 1), st.lists(MESSAGES, max_size=3)), min_size=1, max_size=8)
TOOLS = [{"type": "function", "function": {"name": "f<|im_end|>", "parameters": {}}}]


def whole(tokenizer: Tokenizer, messages: list[Any], tools: Any) -> tuple[int, ...] | str:
    try:
        return tuple(tokenizer.apply_chat_template(messages, tools))
    except KimiError as error:
        return str(error)


def grown(text: ChatText, kept: int, new: list[Any]) -> Sequence[int] | str:
    try:
        return text.ids(kept, new)
    except KimiError as error:
        return str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([*BY_MESSAGE.values()] * 3 + REPEATABLE),
    STEPS,
    st.sampled_from([None, TOOLS]),
)
def test_what_is_kept_changes_no_id(
    tokenizer: Tokenizer, source: str, steps: list[Any], tools: Any
) -> None:
    """Chats that grow, and go back anywhere; errors are the same, too."""
    with_template(tokenizer, source)
    text, messages, kept = ChatText(tokenizer, tools), list[Any](), 0
    for share, new in steps:
        kept = len(messages) if share > 0.4 else int(share * len(messages))
        messages[kept:] = new
        expected = whole(tokenizer, messages, tools)
        found = grown(text, kept, new)
        assert (found if isinstance(found, str) else tuple(found)) == expected
        if text._known is None:  # an error leaves nothing
            text, messages = ChatText(tokenizer, tools), []
        else:
            known = text._known
            assert known.messages == messages
            again = tokenizer.chat_template.rendered(
                {**known.variables, "messages": protected(tokenizer, known, messages)}
            )
            assert again == known.rendered, "text, starts and what is carried"


def protected(tokenizer: Tokenizer, known: Any, messages: list[Any]) -> Any:
    return tokenizer.control.protect_more(messages, known.encoded.mark)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), TEXTS),
        st.tuples(st.just("answer"), TEXTS),
        st.tuples(st.just("undo"), st.none()),
        st.tuples(st.just("edit"), TEXTS),
        st.tuples(st.just("system"), st.one_of(st.none(), TEXTS)),
        st.tuples(st.just("interrupt"), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(OPERATIONS, st.integers(0, 99))
def test_the_prompt_of_a_conversation_that_goes_back(
    tokenizer: Tokenizer, operations: list[Any], number: int
) -> None:
    with_template(tokenizer, BY_MESSAGE["default_system"])
    conversation, prompt = Conversation(), ChatPrompt(tokenizer, TOOLS)
    conversation.say("first")
    for name, text in operations:
        if name == "answer" and conversation.turns:
            conversation.reply({"role": "assistant", "content": text})
        elif name == "say":
            conversation.say(text)
        elif name == "undo" and len(conversation.turns) > 1:
            conversation.undo()
        elif name == "edit":
            conversation.edit(1 + number % len(conversation.turns), text)
        elif name == "system":
            conversation.system = text
        elif name == "interrupt":  # at the worst place: what was made is not noted
            prompt._text.ids(0, [{"role": "user", "content": "another"}])
            prompt._ends = []
        expected = whole(tokenizer, conversation.messages, TOOLS)
        assert tuple(prompt.ids(conversation)) == expected


@pytest.mark.parametrize("source", [BUILT_IN, POCKET], ids=["built_in", "pocket"])
def test_a_turn_renders_its_own_messages_alone(
    tokenizer: Tokenizer, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_template(tokenizer, source)
    sent, render = list[int](), Renderer.render

    def counted(self: Renderer, template: str, variables: Any, resumed: Any = None) -> Rendered:
        sent.append(len(variables["messages"]))
        return render(self, template, variables, resumed)

    monkeypatch.setattr(Renderer, "render", counted)
    conversation, prompt = Conversation("be brief"), ChatPrompt(tokenizer, None)
    for number in range(30):
        conversation.say(f"question {number}")
        prompt.ids(conversation)
        conversation.reply({"role": "assistant", "content": "yes"})
        prompt.ids(conversation)
    # The first message, and of the turn its question, then both.
    assert sent == [2, 3] + [2, 3] * 29
