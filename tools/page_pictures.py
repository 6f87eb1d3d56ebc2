"""Draws the pictures of the page to chat in: dark on a desktop, light on a phone.

    python -m tools.page_pictures docs

A real browser shows the page of a server with the pocket model. On the phone it answers by itself;
on the desktop the tokens of its answers are given, as it has not learnt to write code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, ViewportSize

from mlx_kimi import load
from mlx_kimi.server.engine import Engine
from tests.browser import chromium, opened
from tests.scripted import scripted
from tests.server import serving, serving_pocket
from tools.screens import ANSWER

QUESTION = "How are numbers added up?"
DESKTOP, PHONE = ViewportSize(width=1200, height=760), ViewportSize(width=360, height=720)
EARLIER = ("Sort these numbers: 42 7 19 3", "What is Kimi Linear?")  # in the list beside


def main() -> None:
    folder = Path(sys.argv[1])
    with chromium() as browser:
        model, tokenizer = load()

        def say(prompt: str) -> str:
            return (ANSWER if QUESTION in prompt else "Yes.") + "<|im_end|>"

        with scripted(tokenizer, say), serving(Engine(model), tokenizer=tokenizer) as running:
            _draw(
                browser, running.url, folder / "page_dark.png", "dark", DESKTOP, *EARLIER, QUESTION
            )
        with serving_pocket() as running:
            asked = ("What is 347 + 58?", "What is Kimi Linear?")
            _draw(browser, running.url, folder / "page_phone_light.png", "light", PHONE, *asked)


def _draw(
    browser: Browser,
    url: str,
    file: Path,
    shade: Literal["dark", "light"],
    size: ViewportSize,
    *asked: str,
) -> None:
    """The page after these questions, on a desktop each in a conversation of its own."""
    is_phone = size == PHONE
    context = browser.new_context(
        viewport=size, color_scheme=shade, has_touch=is_phone, device_scale_factor=1.5
    )
    chat = opened(context, url)
    for question in asked:
        if not is_phone:
            chat.button("New chat").click()
        chat.field.fill(question)
        chat.button("Send").click()
        chat.wait()
    chat.page.screenshot(path=file)
    context.close()
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
