"""The exception for what a user can act on."""

LONGEST = 2400  # characters: 30 lines of 80
CUT = " … "


class KimiError(Exception):
    """A failure whose message is one line: the thing, the rule and the value that broke it."""

    def __init__(self, message: str) -> None:
        # Names come from files: no line break or terminal code in them may reach the screen. They
        # have any length, and are cut before they are spelled out, which makes them longer.
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in _cut(message))
        super().__init__(_cut(shown))


def _cut(text: str) -> str:
    """At most LONGEST characters: the beginning and the end."""
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - len(CUT)) // 2
    return text[:half] + CUT + text[-half:]


class OptionError(KimiError):
    """An option's value breaks a rule. A command says its name as it was typed."""

    def __init__(self, name: str, rule: str) -> None:
        super().__init__(f"{name} {rule}")
        self.name, self.rule = name, rule


class ContextFull(KimiError):
    """A conversation is longer than the model's context."""


class GpuLost(KimiError):
    """The GPU failed, and nothing can run on it any more in this process."""


def in_words(error: Exception) -> str:
    """What the system, a path or MLX says of a failure, for a person."""
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename is not None else ""
        return str(KimiError(named + error.strerror))
    return str(KimiError(" ".join(str(error).split()) or type(error).__name__))


def beyond_budget(what: str, tokens: int, limit: int) -> str:
    """What is said of a text that is longer than a memory budget leaves room for."""
    return f"--context must be more than the {tokens:,} tokens of {what} but is {limit:,}"
