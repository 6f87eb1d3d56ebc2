"""The page to chat in, shown by a real browser: with the engine, whose tokens a script says, or
with the program that is killed under it."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ViewportSize, expect

from mlx_kimi import load
from mlx_kimi.cli.chat.dialect import parse_inline
from mlx_kimi.errors import KimiError
from mlx_kimi.server import web_page
from mlx_kimi.server.engine import Engine, QueueFull
from mlx_kimi.server.security import Access
from tests.browser import FOREIGN, Chat, chromium, opened
from tests.processes import ENVIRONMENT, PROGRAM
from tests.scripted import call, scripted
from tests.server import WEATHER, Running, Scripted, failed, serving, until
from tests.test_chat_markdown import AS_WRITTEN, FRAGMENTS
from tests.test_server_security import ROUTES

pytestmark = pytest.mark.slow
KEY = "secret-key-1"
LONG = " ".join(map(str, range(1, 1001)))  # takes long
PROBES = (Path(__file__).parent / "page_probes.js").read_text(encoding="utf-8").strip()
PHONE = ViewportSize(width=360, height=740)


def say(prompt: str) -> str:
    """Answers with what the last message asks for: `say ...`, `count`, `call`."""
    asked = prompt.removesuffix("<|im_assistant|>assistant<|im_middle|>")
    asked = asked.removesuffix("<|im_end|>").rpartition("<|im_middle|>")[2]
    if asked.startswith("call "):
        return call("get_weather", 0, asked.removeprefix("call ")) + "<|im_end|>"
    return LONG if asked == "count" else asked.removeprefix("say ") + "<|im_end|>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(
    browser: Browser,
) -> Iterator[Running]:  # (after the browser: else it starts for nothing)
    model, tokenizer = load()
    with scripted(tokenizer, say), serving(Engine(model), tokenizer=tokenizer) as running:
        yield running


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context()
    made.grant_permissions(["clipboard-read", "clipboard-write"])
    yield made
    made.close()


@pytest.fixture
def chat(context: BrowserContext, server: Running) -> Iterator[Chat]:
    """The page, of which at the end nothing has gone elsewhere and nothing was complained about."""
    shown = opened(context, server.url)
    yield shown
    assert not shown.foreign and not shown.console


def is_idle(server: Running) -> bool:
    ready = server.asking.get("/ready").json()
    return not (ready["queued"] or ready["reading"] or ready["decoding"])


def test_all_files_are_sent_and_the_library_is_the_published_one() -> None:
    folder = Path(web_page.__file__).parent / "page"
    sent = {name for name, _ in web_page.FILES.values()}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found - sent == {"vendor/LICENSES.txt"}
    (library,) = (name for name in sent if name.startswith("vendor/"))
    digest = sha256((folder / library).read_bytes()).hexdigest()
    assert digest in (folder / "vendor/LICENSES.txt").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------- answers
def test_an_answer_is_the_apis(chat: Chat, server: Running) -> None:
    text = "A `std::vector<int>` and a std::vector<int>: **yes**.\n\n```c++\nint *a;\n```\nEnd."
    api = server.chat(f"say {text}").json()
    assert api["choices"][0]["message"]["content"] == text
    shown = chat.say(f"say {text}")
    assert "A std::vector<int> and a std::vector<int>: yes." in shown and "int *a;" in shown
    chat.page.locator(".assistant").get_by_label("Copy the answer").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == text
    chat.button("Copy the code").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "int *a;"
    usage = chat.page.locator(".usage").inner_text()
    prompt, drawn = api["usage"]["prompt_tokens"], api["usage"]["completion_tokens"]
    assert re.fullmatch(rf"{drawn} tokens · [\d.]+ tok/s · prompt {prompt} · \d+ cached", usage)
    assert chat.say("say " + LONG[:50]) == LONG[:50]
    (body,) = [line for line in server.lines[-1:] if "completion_tokens" in line]
    assert body["cached_tokens"] > prompt  # the conversation was sent again, as it was


def test_stop_frees_the_row_and_keeps_the_text(chat: Chat, server: Running) -> None:
    for stop in (lambda: chat.button("Stop").click(), lambda: chat.field.press("Escape")):
        chat.send("count")
        chat.wait_for_text(20)
        stop()
        chat.wait()
        until(lambda: is_idle(server))
        kept = chat.answer.inner_text()
        assert len(kept) >= 20 and LONG.startswith(kept) and kept != LONG
        expect(chat.state).to_have_text("Stopped.")
    chat.button("Continue").click()
    chat.wait()
    assert chat.asked == ["count", "count", "Continue."]


def test_retry_and_edit(chat: Chat) -> None:
    assert chat.say("say one") == "one" and chat.say("say two") == "two"
    chat.button("Retry").click()
    chat.wait()
    assert chat.asked == ["say one", "say two"] and chat.answer.inner_text() == "two"
    chat.page.get_by_label("Edit your message").first.click()
    field = chat.page.locator(".editing textarea")
    field.fill("say three")
    field.press("Escape")
    assert chat.asked == ["say one", "say two"]
    chat.page.get_by_label("Edit your message").first.click()
    field.fill("say three")
    field.press("Enter")
    chat.wait()
    expect(chat.page.locator(".assistant")).to_have_count(1)
    assert chat.asked == ["say three"] and chat.answer.inner_text() == "three"


def test_an_answer_that_is_cut_says_so_and_settings_are_sent(chat: Chat, server: Running) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("System prompt").fill("Be <b>brief</b>.")
    chat.page.get_by_label("Temperature").fill("0")
    chat.page.get_by_label("Most tokens").fill("3")
    chat.button("Done").click()
    chat.say("say one two three four five six")
    assert chat.state.inner_text().startswith("Cut after 3 tokens")
    chat.page.reload()
    with chat.page.expect_request("**/v1/chat/completions") as sent:
        chat.button("Retry").click()
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be <b>brief</b>."}
    assert body["temperature"] == 0 and body["max_tokens"] == 3 and body["stream"] is True
    chat.wait()


def test_a_call_is_shown_and_takes_a_result(chat: Chat, server: Running) -> None:
    chat.button("Settings").click()
    chat.page.get_by_text("Tools", exact=True).click()
    tools = chat.page.get_by_label("Functions that the model may call")
    tools.fill("{}")
    chat.button("Done").click()
    expect(chat.page.get_by_role("alert")).to_have_text("Tools must be a JSON array.")
    tools.fill(json.dumps([WEATHER]))
    chat.button("Done").click()
    chat.send('call {"city": "<img src=x onerror=hacked=1>"}')
    chat.wait()
    shown = chat.page.get_by_label("Call of get_weather", exact=True)
    assert json.loads(shown.locator("pre").inner_text()) == {"city": "<img src=x onerror=hacked=1>"}
    chat.page.get_by_label("Result of get_weather").fill("<script>hacked=1</script>")
    with chat.page.expect_request("**/v1/chat/completions") as sent:
        chat.button("Send the result").click()
    chat.wait()
    _, asking, result = sent.value.post_data_json["messages"]
    assert result["content"] == "<script>hacked=1</script>" and result["role"] == "tool"
    assert result["tool_call_id"] == asking["tool_calls"][0]["id"]
    assert chat.page.locator(".result pre").inner_text() == "<script>hacked=1</script>"
    assert chat.page.evaluate("typeof hacked") == "undefined"


# -------------------------------------------------------------------------- what browsers do to it
def test_a_reload_in_the_middle_keeps_what_came(chat: Chat, server: Running) -> None:
    chat.send("count")
    chat.wait_for_text(20)
    chat.page.reload()
    until(lambda: is_idle(server))
    kept = chat.answer.inner_text()
    assert len(kept) >= 20 and LONG.startswith(kept) and kept != LONG
    expect(chat.state).to_have_text("The page was closed before the answer ended.")
    expect(chat.button("Continue")).to_be_visible()
    chat.button("Retry").click()
    chat.wait_for_text(len(kept) + 1)
    chat.button("Stop").click()
    chat.wait()
    assert chat.asked == ["count"]


def test_tabs_do_not_overwrite_each_other(context: BrowserContext) -> None:
    with serving(Scripted([LONG, "mine", "more"], between=0.03)) as running:
        chat, other = opened(context, running.url), opened(context, running.url)
        chat.send("count")
        chat.wait_for_text(20)
        assert other.say("say mine") == "mine"
        titles = other.page.locator("#conversations .open")
        expect(titles).to_have_text(["say mine", "count"])
        # The other tab opens what is being written, and sees it grow; then it goes on by itself.
        titles.last.click()
        seen = len(other.answer.inner_text())
        other.page.wait_for_function(
            "n => document.querySelector('.assistant .text').textContent.length > n", arg=seen
        )
        assert other.say("say more") == "more"
        expect(chat.page.locator("#notice")).to_contain_text("this one goes on as a copy")
        chat.button("Stop").click()
        chat.wait()
        for tab, asked in ((chat, ["count"]), (other, ["count", "say more"])):
            assert tab.asked == asked
            expect(tab.page.locator("#conversations .open")).to_have_count(3)
            tab.page.reload()
            assert tab.asked == asked
        assert LONG.startswith(chat.answer.inner_text())


def test_conversations_are_kept_listed_and_deleted(chat: Chat) -> None:
    chat.say("say <b>first</b>")
    chat.button("New chat").click()
    chat.say("say second")
    titles = chat.page.locator("#conversations .open")
    expect(titles).to_have_text(["say second", "say <b>first</b>"])
    titles.last.click()
    assert chat.answer.inner_text() == "<b>first</b>"
    chat.page.get_by_label("Delete “say <b>first</b>”").click()
    expect(titles).to_have_text(["say second"])
    expect(chat.page.locator("article")).to_have_count(0)
    chat.button("Undo").click()
    expect(titles).to_have_count(2)
    chat.page.on("dialog", lambda dialog: dialog.accept())
    chat.button("Settings").click()
    chat.button("Delete all conversations").click()
    expect(titles).to_have_count(0)


def test_a_store_that_is_damaged_or_full_stops_nobody(chat: Chat) -> None:
    damaged = ["", "{", "null", "[]", '{"messages": 7}', '{"updated": 1, "messages": [null]}']
    damaged += ['{"updated": 1, "messages": [{"role": "assistant", "content": "x"}]}']
    script = "texts => texts.forEach((text, n) => localStorage.setItem('mlx_kimi.chat.' + n, text))"
    chat.page.evaluate(script, damaged)
    chat.page.evaluate("localStorage.setItem('mlx_kimi.settings', '[')")
    chat.page.evaluate("sessionStorage.setItem('mlx_kimi.open', '3')")
    chat.page.reload()
    assert chat.say("say one") == "one"
    chat.page.evaluate("for (let n = 0; n < 7; n++) localStorage.removeItem('mlx_kimi.chat.' + n)")
    chat.page.evaluate(
        "for (let n = 5e6; n >= 1; n /= 2)"
        " try { localStorage.setItem('x' + n, 'x'.repeat(n)) } catch {}"
    )
    assert chat.say("say two") == "two"
    expect(chat.page.locator("#notice")).to_contain_text("This browser keeps no more")
    chat.page.evaluate("localStorage.clear()")


def test_no_link_sends_anything(chat: Chat, server: Running) -> None:
    before = len(server.lines)
    for link in ("?q=Hello&prompt=Hello&message=Hello", "#Hello", "?q=Hello#q=Hello"):
        chat.page.goto(f"{server.url}/{link}")
        chat.page.wait_for_load_state("networkidle")
        assert chat.field.input_value() == "" and not chat.asked
    assert not [each for each in chat.requests if each.startswith("POST")]
    assert not [line for line in server.lines[before:] if line["request"].startswith("POST")]


# ---------------------------------------------------------------------------------------- failures
@contextmanager
def program(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`mlx_kimi serve`, and the address of its page."""
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--cache-disk", "0GB", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "http://" in line)
        found = re.search(r"http://[\d.:]+/(?= |$)", line)
        assert found, line
        Thread(target=process.stderr.read, daemon=True).start()
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def test_a_server_that_is_killed_and_started_again(context: BrowserContext) -> None:
    numbers = " ".join(str(n * 37 % 100) for n in range(80))
    with program("--port", "0") as (process, url):
        chat = opened(context, url)
        assert chat.say("What is 347 + 58?") == "347 + 58 = 405."
        chat.send(f"Sort these numbers: {numbers}")
        chat.wait_for_text()
        os.kill(process.pid, signal.SIGKILL)
        chat.wait()
    kept = chat.answer.inner_text()
    assert kept
    expect(chat.state).to_have_text(
        "The connection was lost before the answer ended. What came is kept."
    )
    chat.send("What is 1 + 2?")
    chat.wait()
    expect(chat.state).to_contain_text("The server cannot be reached.")
    chat.page.locator("#model").evaluate("element => { element.textContent = 'earlier' }")
    with program("--port", url.rstrip("/").rpartition(":")[2]) as (_, again):
        assert again == url
        chat.button("Retry").click()
        chat.wait()
        expect(chat.page.locator("#model")).to_have_text("pocket")  # looked for again
        assert chat.answer.inner_text() == "1 + 2 = 3."
        assert chat.say("What is 2 + 2?") == "2 + 2 = 4."
    assert chat.page.locator(".assistant .text").all_inner_texts()[1] == kept


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(context: BrowserContext) -> None:
    with serving(Scripted(["Hello.<|im_end|>"]), Access(key=KEY)) as running:
        chat = opened(context, running.url)
        field = chat.page.get_by_label("This server wants its API key")
        expect(field).to_be_focused()
        chat.send("Hi")
        chat.wait()
        expect(chat.state).to_contain_text("API key")
        field.fill("wrong-key")
        field.press("Enter")
        expect(field).to_be_visible()
        field.fill(KEY)
        field.press("Enter")
        expect(chat.answer).to_have_text("Hello.")
        expect(field).to_be_hidden()
        assert chat.page.locator("#model").inner_text() == "pocket"
        chat.page.reload()
        assert chat.say("Hi") == "Hello."
        stored = "JSON.stringify([{...localStorage}, document.cookie, location.href])"
        assert KEY not in chat.page.evaluate(stored)
        assert chat.page.evaluate("sessionStorage.getItem('mlx_kimi.key')") == KEY
        other = opened(context, running.url)
        expect(other.page.get_by_label("This server wants its API key")).to_be_visible()


@pytest.mark.parametrize(
    "engine, said, text",
    [
        (
            Scripted(refuse=QueueFull(256, 7)),
            "Busy: retry in 7 s. 256 requests wait already; ask again in 7 s",
            "",
        ),
        (Scripted([failed(KimiError("<b>no</b> GPU"))]), "<b>no</b> GPU", "a"),
    ],
    ids=["busy", "failed"],
)
def test_an_error_is_one_line_and_can_be_retried(
    context: BrowserContext, engine: Scripted, said: str, text: str
) -> None:
    with serving(engine) as running:
        chat = opened(context, running.url)
        assert chat.say("Hi") == text
        expect(chat.state).to_have_text(said)
        expect(chat.page.get_by_role("log")).not_to_contain_text("undefined")
        engine.refuse, engine.answers = None, ["Hello."]
        chat.button("Retry").click()
        expect(chat.answer).to_have_text("Hello.")
        expect(chat.state).to_be_hidden()


def test_a_long_prompt_tells_how_much_is_read(browser: Browser) -> None:
    with serving(Scripted(["Hello."], between=0.5)) as running:
        for motion in ("reduce", "no-preference"):
            context = browser.new_context(reduced_motion=motion)  # type: ignore[arg-type]
            chat = opened(context, running.url)
            chat.send("Hi")
            expect(chat.state).to_have_text(re.compile(r"Reading the prompt: 2 of \d+ tokens"))
            moves = chat.state.evaluate("element => getComputedStyle(element).animationName")
            assert moves == ("none" if motion == "reduce" else "breathe")
            chat.button("Stop").click()
            chat.wait()
            context.close()


def test_it_works_where_a_browser_trusts_less(context: BrowserContext) -> None:
    """From another machine, over http, a page has no clipboard of the newer kind."""
    with serving(access=Access(hosts=(FOREIGN,))) as running:
        chat = opened(context, running.url.replace("127.0.0.1", FOREIGN))
        assert chat.page.evaluate("isSecureContext") is False
        assert chat.say("Hi") == "Hello."
        copy = chat.page.get_by_label("Copy the answer")
        copy.click()
        expect(copy).to_have_text("Copied")
        chat.field.press("ControlOrMeta+v")
        expect(chat.field).to_have_value("Hello.")
        assert not chat.console


# ---------------------------------------------------------------------------------------- markdown
TAGS = set(
    "p h2 h3 h4 h5 h6 ul ol li hr div span button pre code table thead tbody tr th td".split()
)
TAGS |= {"a", "em", "strong"}
ATTRIBUTES = {"dir", "class", "tabindex", "type", "aria-label", "value"}
LINK_ATTRIBUTES = {"href", "title", "target", "rel"}
MARKS = re.compile(r"[\s*_`~#+.)|:\-\[\](]")  # and white space


def rendered(chat: Chat, text: str, cuts: list[int] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = chat.page.evaluate(PROBES + ".rendered", [text, cuts or [len(text)]])
    assert set(found["tags"]) <= TAGS and set(found["names"]) <= ATTRIBUTES | LINK_ATTRIBUTES
    assert all(re.match("https?://|mailto:", link) for link in found["links"])
    assert found["grown"] == found["whole"]
    return found


def test_what_is_no_mark_is_shown_as_it_is_written(chat: Chat) -> None:
    """As a terminal shows it, but for headings, items and links, which a page has."""
    for text in AS_WRITTEN:
        if "http://evil" in text:
            continue
        lines = [re.sub(r"^(#+ |[-+*] (?=\S)|\d+[.] )", "", line) for line in text.split("\n")]
        found = rendered(chat, text)["shown"].split("\n")
        assert [line for line in found if line] == [line for line in lines if line], text


def test_nothing_of_an_answer_is_lost_however_it_comes(chat: Chat) -> None:
    for text in (">" * 5000, "- " * 5000, "*a " * 5000, r"\( " * 5000, "` " * 5000, "**a " * 5000):
        found = rendered(chat, text, [4000, len(text)])["all"]
        assert MARKS.sub("", found) == MARKS.sub("", text)
    rng = Random(3)
    for _ in range(150):
        lines = ["".join(rng.choices(FRAGMENTS, k=rng.randint(0, 4))) for _ in range(8)]
        text = "\n".join(lines)
        units = len(text.encode("utf-16-le")) // 2  # as scripts count
        cuts = [*sorted(rng.sample(range(units + 1), min(5, units))), units]
        found = rendered(chat, text, cuts)["all"].replace("Copy", "")
        expected = text.replace("\x00", "\ufffd")
        assert MARKS.sub("", found) == MARKS.sub("", expected), text


def test_the_page_reads_marks_as_the_terminal_does(chat: Chat) -> None:
    rng = Random(4)
    within = [each for each in FRAGMENTS if "http" not in each and "\n" not in each.strip()]
    words = [each for each in within if each.isprintable()]
    lines = [f"a {''.join(rng.choices(words, k=rng.randint(1, 6)))} z" for _ in range(600)]
    found = chat.page.evaluate(PROBES + ".styled", lines)
    for line, texts in zip(lines, found, strict=True):
        assert joined(texts) == joined(_terminal(line)), line


def _terminal(line: str) -> Iterator[tuple[str, str]]:
    styles: list[str] = []
    for token in parse_inline(line):
        if token.nesting > 0:
            styles += [token.tag]
        elif token.nesting < 0:
            styles.pop()
        else:
            style = {each for tag in styles for each in tag.split()}
            style |= {"code"} if token.type == "code_inline" else set()
            yield (
                " ".join(each for each in ("bold", "italic", "code") if each in style),
                token.content,
            )


def joined(texts: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Neighbours of one style as one."""
    groups = groupby((text for text in texts if text[1]), key=itemgetter(0))
    return [(style, "".join(text for _, text in group)) for style, group in groups]


HOSTILE = """<script>hacked = 1</script><img src=x onerror="hacked=1">
<iframe src="https://evil.example"></iframe><svg onload=hacked=1><style>*{display:none}</style>

[click](javascript:hacked=1) [data](data:text/html,<script>hacked=1</script>) [ok](https://a.example/?a="b)
![picture](https://evil.example/p.png) <javascript:hacked=1> javascript:hacked=1 vbscript:x
[x](https://a.example/" onmouseover="hacked=1) <https://b.example/" onclick=hacked=1>
[ref]: javascript:hacked=1
[ref]

```<img src=x onerror=hacked=1>
</code></pre><script>hacked=1</script>
```
| <img src=x onerror=hacked=1> | `</td><script>hacked=1</script>` |
|---|---|
| &lt;script&gt; | [x](javascript:alert(1)) |"""


def test_a_hostile_answer_is_inert(context: BrowserContext) -> None:
    with serving(Scripted([HOSTILE])) as running:
        chat = opened(context, running.url)
        shown = chat.say("Hi")
        chat.page.reload()
        assert chat.answer.inner_text() == shown
        for said in (
            "<script>hacked = 1</script><img src=x",
            "[click](javascript:hacked=1) [data](data:text/html,",
            "</code></pre><script>hacked=1</script>",
            "&lt;script&gt;",
            "[ref]: javascript:hacked=1",
        ):
            assert said in shown
        assert chat.page.evaluate("typeof hacked") == "undefined"
        links = chat.page.locator(".assistant a").all()
        assert "https://b.example/" in [link.get_attribute("href") for link in links]
        for link in links:
            assert re.match("https?://", link.get_attribute("href") or "")
            assert link.get_attribute("rel") == "noopener noreferrer"
            assert link.get_attribute("target") == "_blank"
        rendered(chat, HOSTILE)
        assert not chat.foreign and not chat.console


def test_names_are_inert(context: BrowserContext) -> None:
    """A model's, which is its folder's."""
    with serving() as running:
        running.service.name = "<img src=x onerror=hacked=1>"
        chat = opened(context, running.url)
        expect(chat.page.locator("#model")).to_have_text("<img src=x onerror=hacked=1>")
        assert chat.say("<b>Hi</b>") == "Hello." and chat.asked == ["<b>Hi</b>"]
        assert chat.page.evaluate("typeof hacked") == "undefined"


def test_a_script_of_another_place_is_refused(chat: Chat) -> None:
    policy = chat.page.request.get(chat.url).headers["content-security-policy"]
    assert policy == web_page.POLICY
    failures: list[str | None] = []
    chat.page.on("requestfailed", lambda request: failures.append(request.failure))
    blocked = chat.page.evaluate(PROBES + ".refused")
    assert {"script", "html", "ask"} <= set(blocked)
    assert {"img-src", "style-src-elem", "connect-src", "require-trusted-types-for"} <= set(blocked)
    assert chat.console and all(re.search("Content Security|Trusted", e) for e in chat.console)
    assert chat.foreign == ["GET https://evil.example/x.png"] and failures == ["csp"]
    chat.console.clear()
    chat.requests.clear()


# -------------------------------------------------------------------------------- how it looks


@pytest.mark.parametrize("shade", ["dark", "light"])
def test_texts_stand_out(browser: Browser, server: Running, shade: Any) -> None:
    context = browser.new_context(color_scheme=shade)
    chat = opened(context, server.url)
    chat.say(
        "say A **b** `c` [d](https://a.example)\n\n```py\nx\n```\n- e\n\n|f|g|\n|---|---|\n|h|i|"
    )
    chat.send("count")
    chat.wait_for_text(20)
    chat.button("Stop").click()
    chat.wait()
    chat.page.get_by_label("Delete “").first.hover()
    found = chat.page.evaluate(PROBES + ".contrast")
    chat.page.evaluate("document.querySelector('#key-form').hidden = false")
    chat.button("Settings").click()
    chat.page.get_by_text("Tools", exact=True).click()
    found += chat.page.evaluate(PROBES + ".contrast")
    assert len(found) > 60 and {"py", "d", "e", "Stopped.", "Use it", "Done"} <= {
        t for _, t in found
    }
    assert not [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5]
    ground = chat.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 128 * 3) == (shade == "dark")
    context.close()


def test_a_phone_shows_all_without_scrolling_sideways(browser: Browser) -> None:
    word = "x" * 100
    text = f"{word} `{word}`\n\n```\n{word}\n```\n\n|{word}|{word}|\n|---|---|\n\n- {word}"
    context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True)
    with serving(Scripted([text])) as running:
        chat = opened(context, running.url)
        chat.field.fill(word)
        chat.button("Send").click()
        chat.wait()
        _phone(chat)
    context.close()


def _phone(chat: Chat) -> None:
    assert chat.page.evaluate(PROBES + ".tooWide") == []
    chat.button("Conversations").click()
    expect(chat.button("New chat")).to_be_focused()
    chat.button("New chat").click()
    expect(chat.page.locator("article")).to_have_count(0)
    expect(chat.field).not_to_be_focused()  # which would raise the phone's keyboard
    chat.button("Settings").click()
    assert chat.page.evaluate(PROBES + ".tooWide") == []


def test_the_keyboard_does_it_all(chat: Chat) -> None:
    keys = chat.page.keyboard
    expect(chat.field).to_be_focused()
    keys.type("say one")
    keys.press("Shift+Enter")
    keys.type("two")
    keys.press("Enter")
    chat.wait()
    assert chat.asked == ["say one\ntwo"]
    keys.press("ArrowUp")
    expect(chat.page.locator(".editing textarea")).to_be_focused()
    keys.press("ControlOrMeta+a")
    keys.type("count")
    keys.press("Enter")
    chat.wait_for_text(10)
    expect(chat.field).to_be_focused()
    keys.press("Escape")
    chat.wait()
    assert chat.asked == ["count"]
    focused = []
    for _ in range(40):
        keys.press("Tab")
        name, outline = chat.page.evaluate(PROBES + ".focused")
        focused.append(name)
        # The message's frame changes its colour; and nothing stands for the browser's own parts.
        assert outline != "none" or name in ("Message", ""), name
        if name == "Retry":
            break
    assert {"New chat", "count", "Settings", "Edit your message", "Retry"} <= set(focused)
    keys.press("Enter")
    chat.wait_for_text(10)
    expect(chat.field).to_be_focused()
    keys.press("Escape")
    chat.wait()


def test_it_follows_the_answer_only_for_a_reader_at_its_end(chat: Chat) -> None:
    chat.page.set_viewport_size({"width": 400, "height": 400})
    chat.say("say " + "line\n" * 12)
    end = "(({ scrollTop, scrollHeight, clientHeight }) => scrollHeight - scrollTop - clientHeight)"
    far = f"{end}(document.querySelector('#scroll'))"
    assert chat.page.evaluate(far) < 2
    chat.send("count")
    chat.wait_for_text(10)
    chat.page.evaluate("document.querySelector('#scroll').scrollTop = 0")
    chat.wait_for_text(250)
    assert chat.page.evaluate("document.querySelector('#scroll').scrollTop") == 0
    chat.button("Latest ↓").click()
    assert chat.page.evaluate(far) < 2
    chat.wait_for_text(400)
    assert chat.page.evaluate(far) < 48
    chat.button("Stop").click()
    chat.wait()


# ----------------------------------------------------------------------------------- other pages
@contextmanager
def other_page() -> Iterator[str]:
    """The origin of an empty page that somebody else serves."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()

        def log_message(self, *said: Any) -> None:
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    Thread(target=other.serve_forever, daemon=True).start()
    try:
        yield f"http://{FOREIGN}:{other.server_port}"
    finally:
        other.shutdown()
        other.server_close()


@pytest.mark.parametrize("key", [None, KEY], ids=["free", "key"])
def test_a_page_of_elsewhere_can_read_nothing(context: BrowserContext, key: str | None) -> None:
    routes = [route for route in ROUTES if route[0] != "HEAD"]
    with other_page() as origin, other_page() as named:
        access = Access(key=key, origins=(named,))
        with serving(Scripted(), access) as running:
            read = {}
            for at in (origin, named, running.url):
                page = context.new_page()
                page.goto(at)
                arguments = [running.url, routes, key or KEY, at != running.url]
                read[at], framed = page.evaluate(PROBES + ".readable", arguments)
                assert not framed
            assert read[origin] == []
            # The same script reads all of them from a page that is allowed to.
            for at in (named, running.url):
                assert {tuple(route) for route in read[at]} == set(routes)


def test_a_page_whose_name_leads_here_is_refused(context: BrowserContext) -> None:
    with serving() as running:
        page = context.new_page()
        answer = page.goto(running.url.replace("127.0.0.1", FOREIGN))
        assert answer is not None and answer.status == 403
        assert "--allow-host" in page.content()
