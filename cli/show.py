"""What commands print besides answers: speeds, on stderr. What a terminal may get."""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mlx_kimi.units import counted, human_size

if TYPE_CHECKING:
    from mlx_kimi.evaluation.bench import BenchRow
    from mlx_kimi.evaluation.evaluate import Distance
    from mlx_kimi.generation.answer import Stats
    from mlx_kimi.generation.drafts import Drafts
    from mlx_kimi.offload.stats import Counts

# Joiners of emoji and of Arabic and Indic scripts are format characters like those that turn the
# direction of text, which could make it read as something else.
JOINERS = "\u200c\u200d"
REFUSED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats, lone surrogates, separators of lines


def printable(text: str) -> str:
    """`text` as a terminal may get it: no control codes but any system's line breaks and tabs."""
    text = text.replace("\r\n", "\n")
    return "".join(
        c
        if c.isprintable() or c in "\n\t" or c in JOINERS or unicodedata.category(c) not in REFUSED
        else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def one_line(text: str, limit: int) -> str:
    """`printable` text without line breaks and tabs, and of so many characters at most."""
    line = "".join(ascii(c)[1:-1] if c in "\n\t" else c for c in printable(text[:limit]))
    rest = len(text) - limit
    return line if rest <= 0 else f"{line}… and {rest:,} characters more"


class Printable:
    """`printable` for a text that comes in pieces: they may end within a line break."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """What can be shown by now."""
        text = self._held + text
        self._held = "\r" if text.endswith("\r") else ""
        return printable(text.removesuffix("\r"))

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return printable(held)


class AnswerWriter:
    """Prints pieces of an answer at once, as they are where nobody looks."""

    def __init__(self) -> None:
        self._printable = Printable() if sys.stdout.isatty() else None

    def write(self, text: str) -> None:
        click.echo(self._printable.add(text) if self._printable else text, nl=False)

    def end(self) -> None:
        """End the last line."""
        click.echo(self._printable.end() if self._printable else "")


def speed(tokens_a_second: float | None) -> list[str]:
    """In words, if there were enough tokens to tell."""
    return [] if tokens_a_second is None else [f"{tokens_a_second:.1f} tok/s"]


def speeds(stats: Stats) -> str:
    """The closing line of an answer."""
    cached = f" ({stats.cached_tokens} kept)" if stats.cached_tokens else ""
    prompt = [f"{counted(stats.prompt_tokens, 'token')}{cached}", *speed(stats.prompt_speed)]
    answer = [counted(stats.generated_tokens, "token"), *speed(stats.generation_speed)]
    return (
        f"prompt {', '.join(prompt)} | answer {', '.join(answer)} | "
        f"first token {stats.time_to_first_token:.2f} s | "
        f"peak memory {human_size(stats.peak_memory)}"
        + (f" | {experts(stats.experts, stats.generated_tokens - 1)}" if stats.experts else "")
        + (f" | {drafts(stats.drafts)}" if stats.drafts else "")
    )


def drafts(counts: Drafts) -> str:
    """What came of the tokens that were guessed."""
    if not counts.steps:
        return "no drafts"
    steps = counted(counts.steps, "step")
    return f"drafts {counts.accepted} of {counts.proposed} right, in {steps}"


def experts(counts: Counts, tokens: int) -> str:
    """What reading experts from the disk cost for so many tokens."""
    each = counts.bytes_read / max(tokens, 1)
    return (
        f"experts {counts.hit_rate:.1%} in memory, {human_size(each)} a token read, "
        f"waited {counts.stall_time:.2f} s"
    )


def json_fields(record: Stats | BenchRow) -> dict[str, Any]:
    """The fields for `--json`, whose keys for the counts of experts programs may know."""
    fields = asdict(record)
    if counts := record.experts:
        fields["experts"] = {
            "asked": counts.lookups,
            "read": counts.misses,
            "bytes_read": counts.bytes_read,
            "waited": counts.stall_time,
        }
    return fields


def distance(found: Distance) -> list[str]:
    """How far a model's predictions are from a reference's."""
    return [
        f"KL divergence   {found.mean_kl:.5f} nats a token; median {found.median_kl:.5f}, "
        f"99 % below {found.high_kl:.5f}",
        f"same likeliest  {found.agreement:.2%} of the tokens",
    ]
