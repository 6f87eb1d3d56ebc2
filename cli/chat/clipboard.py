"""/copy: the clipboard of this machine or, over ssh or without one, that of the terminal."""

from __future__ import annotations

import base64
import os
import sys

import pyperclip

from mlx_kimi.errors import KimiError


def copy(text: str) -> str:
    """Copy `text`; where it went, in words.

    Raises:
        KimiError: there is neither a clipboard nor a terminal.
    """
    is_remote = any(name in os.environ for name in ("SSH_TTY", "SSH_CONNECTION"))
    if not is_remote:
        try:
            pyperclip.copy(text)
            return "in the clipboard"
        except pyperclip.PyperclipException:
            pass
    if not sys.stdout.isatty():
        raise KimiError("there is no clipboard here")
    # OSC 52: the terminal puts it into the clipboard of the machine that it runs on.
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07")
    sys.stdout.flush()
    return "sent to the terminal's clipboard, if it allows that"
