"""A Chromium without a window, and a page that it shows.

`python -m tests.browser` tells where this machine has one; it fails where none runs, and says why.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

NAMES = (
    *("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
FOREIGN = "evil.example"  # a name that leads to this machine, as its owner could let it
NEEDED = "MLX_KIMI_NEEDS_BROWSER"  # set in the environment: a browser that is missing is a failure
PATIENCE = 30_000  # milliseconds
expect.set_options(timeout=PATIENCE)


def executable() -> str | None:
    """Where this machine has a Chromium; None if it has none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; a test that asks for it on a machine without one is skipped, or fails."""
    path = executable()
    if path is None:
        said = "no Chromium is installed: apt install chromium, or brew install --cask chromium"
        if os.environ.get(NEEDED):
            pytest.fail(f"{said} ({NEEDED} is set)")
        pytest.skip(said)
    with sync_playwright() as driver:
        names = f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"
        browser = driver.chromium.launch(executable_path=path, args=[names, "--no-proxy-server"])
        yield browser
        browser.close()


@dataclass
class Chat:
    """The page, as a reader uses it.

    Attributes:
        requests: "METHOD URL" of all that the page has asked for, or tried to.
        console: errors and warnings that it has caused.
    """

    page: Page
    url: str
    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", lambda r: self.requests.append(f"{r.method} {r.url}"))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("console", self._hear)
        self.page.goto(self.url)

    def _hear(self, message: object) -> None:
        if message.type in ("error", "warning"):  # type: ignore[attr-defined]
            self.console.append(message.text)  # type: ignore[attr-defined]

    @property
    def field(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    @property
    def answer(self) -> Locator:
        """The text of the last answer."""
        return self.page.locator(".assistant .text").last

    @property
    def state(self) -> Locator:
        """The line below the last answer."""
        return self.page.locator(".assistant .state").last

    @property
    def asked(self) -> list[str]:
        """What the user has said, as it is shown."""
        return self.page.locator(".user .text").all_inner_texts()

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def send(self, text: str) -> None:
        self.field.fill(text)
        self.field.press("Enter")

    def say(self, text: str) -> str:
        """Send a message; what the whole answer shows."""
        self.send(text)
        self.wait()
        return self.answer.inner_text()

    def wait(self) -> None:
        """Until no answer is being written."""
        expect(self.button("Send")).to_be_visible()
        expect(self.page.locator(".assistant").last).to_have_attribute("aria-busy", "false")

    def wait_for_text(self, characters: int = 1) -> None:
        """Until an answer that is being written has some text."""
        expect(self.button("Stop")).to_be_visible()
        script = (
            "n => [...document.querySelectorAll('.assistant .text')].at(-1).textContent.length >= n"
        )
        self.page.wait_for_function(script, arg=characters)

    @property
    def foreign(self) -> list[str]:
        """Requests that went elsewhere."""
        own = urlsplit(self.url).netloc
        return [each for each in self.requests if urlsplit(each.split()[1]).netloc != own]


def opened(context: BrowserContext, url: str) -> Chat:
    """The page of a server, in a new tab."""
    return Chat(context.new_page(), url)


def _tried() -> str:
    """Where a Chromium is that shows a page."""
    path = executable()
    if path is None:
        sys.exit("no Chromium is installed")
    try:
        with chromium() as browser:
            browser.new_page().close()
    except Exception as error:
        sys.exit(f"{path} does not run: {error}")
    return path


if __name__ == "__main__":
    print(_tried())
