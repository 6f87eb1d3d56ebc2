"""The child process that renders templates: bounded, replaced, and gone when its parent is."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from mlx_kimi.errors import KimiError
from mlx_kimi.text import template_renderer
from mlx_kimi.text.template_renderer import Renderer
from tests.test_chat_template import template


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    shared = Renderer()
    yield shared
    shared.close()


def doubling(start: str, doubled: str) -> str:
    """A template that doubles a variable 99 times."""
    return (
        f"{{% set n = namespace(t={start}) %}}"
        f"{{% for i in range(99) %}}{{% set n.t = {doubled} %}}{{% endfor %}}"
    )


HOSTILE = {
    "loops": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "loop_output": "{% for i in range(10**5) %}{{ 'x' * 10**6 }}{% endfor %}",
    "repeat": "{{ 'x' * 10**9 }}",
    "repeat_list": "{{ [0] * 10**9 }}",
    "repeat_10_12": "{{ 'x' * 10**12 }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "center_method": "{{ 'x'.center(10**9) }}",
    "center_filter": "{{ 'x' | center(10**9) }}",
    "format_filter": "{{ '%1000000000d' | format(1) }}",
    "format_method": "{{ '{:1000000000}'.format(1) }}",
    "power": "{{ 9**(9**9) }}",
    "digits": "{{ (9**999999) | string }}",
    "doubling": doubling("'x'", "n.t ~ n.t"),
    "doubling_plus": doubling("[1]", "n.t + n.t"),
    "doubling_join": doubling("'xx'", "n.t | join(n.t)"),
    "replace": "{{ ('x' * 10**5).replace('x', 'y' * 10**5) }}",
    "indent": "{{ [[1]] | tojson(indent=10**9) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "fill": "{{ [1] | batch(10**9, 0) | list }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "strftime": "{{ strftime_now('%Y' * 10**8) }}",
}


@pytest.fixture(scope="module")
def quick() -> Iterator[Renderer]:
    """The real limits, but one second of time, for the sake of the tests' own."""
    shared = Renderer(seconds=1.0)
    yield shared
    shared.close()


@pytest.mark.alone
@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_fails_soon(source: str, quick: Renderer) -> None:
    assert template("ok", quick).render([]) == "ok"  # the child runs
    before = time.monotonic()
    with pytest.raises(KimiError) as caught:
        template(source, quick).render([])
    assert time.monotonic() - before < 3
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


@pytest.mark.slow
def test_limits_are_named(quick: Renderer) -> None:
    for name, expected in (
        ("loops", "took longer than 1 s"),
        ("repeat", "memory"),
        (
            "loop_output",
            f"the result is longer than {template_renderer.OUTPUT_CHARACTERS} characters",
        ),
    ):
        with pytest.raises(KimiError, match=expected):
            template(HOSTILE[name], quick).render([])


def test_memory_is_watched_where_the_system_sets_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: the child gets no limit, the parent looks at it."""
    monkeypatch.setattr(template_renderer, "MUST_POLL", True)
    free = Renderer(seconds=20, memory=1 << 40)
    template("ok", free).render([])
    free.memory = 200 << 20
    with pytest.raises(KimiError, match="memory"):
        template(HOSTILE["doubling"], free).render([])
    free.close()


@pytest.mark.slow
def test_a_long_chat_renders(renderer: Renderer) -> None:
    """Near both limits, of output and of memory: four bytes a character, escaped in twelve."""
    text = "中<|im_end|>\ud800😀"
    text *= template_renderer.OUTPUT_CHARACTERS // len(text)
    chat = [{"role": "user", "content": text}]
    assert template("{{ messages[0].content }}", renderer).render(chat) == text


# The process ---------------------------------------------------------------------------------


def test_the_child_is_reused_and_replaced(renderer: Renderer) -> None:
    render = template("{{ messages }}", renderer).render
    render([])
    first = renderer._child.pid
    render([])
    assert renderer._child.pid == first
    os.kill(first, signal.SIGKILL)
    renderer._child.wait()
    assert render([]) == "[]"
    assert renderer._child.pid != first


def test_the_child_has_its_own_session(renderer: Renderer) -> None:
    template("", renderer).render([])
    child = renderer._child.pid
    assert os.getsid(child) == child != os.getsid(0)  # no terminal, no Ctrl-C


def gone(process: int) -> bool:
    """Whether `process` has ended, reaped or not."""
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True)
    return listed.stdout.strip()[:1] in (b"", b"Z")


def wait_until_gone(process: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not gone(process) and time.monotonic() < until:
        time.sleep(0.05)
    return gone(process)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["ok", HOSTILE["loops"]], ids=["idle", "busy"])
def test_the_child_dies_with_its_parent(source: str) -> None:
    script = (
        "import sys, threading\n"
        "from mlx_kimi.text.template_renderer import Renderer\n"
        "renderer = Renderer(seconds=1.5)\n"
        "renderer.render('ok', {})\n"
        "print(renderer._child.pid, flush=True)\n"
        f"renderer.render({source!r}, {{}})\n"
        "threading.Event().wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        assert not gone(child)
        time.sleep(0.3)
        parent.kill()
    assert wait_until_gone(child, 6)


def test_close_ends_the_child() -> None:
    own = Renderer()
    own.render("ok", {})
    own.close()
    assert wait_until_gone(own._child.pid, 2)


def test_an_interrupt_leaves_no_answer_behind(renderer: Renderer) -> None:
    """An answer that comes after Ctrl-C must not be taken for the next one."""
    template("ok", renderer).render([])
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        template(HOSTILE["loops"], renderer).render([])
    assert template("next", renderer).render([]) == "next"
