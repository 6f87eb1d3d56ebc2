"""The child process that renders chat templates: one JSON request a line in, one JSON answer out.

It is run as a file by `python -I`, so that it imports jinja2 and the standard library alone. A
template is code from a downloaded folder: here it can neither hold up nor fill up the program
that uses it, because the parent kills this process at a deadline (template_renderer.py).
"""

import json
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: the parent's deadline and poll remain
    resource = None  # type: ignore[assignment]

FILE_NAME = "<template>"  # what jinja2 calls a template made from a string, in tracebacks
MESSAGE_CHARACTERS = 500  # of a template's own error; the parent prints one line


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks what a model wrote; here it only renders it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the block, in its own scope as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that start with an underscore, Python's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: jinja2's own filter would escape `<`, `>`, `&` and `'`."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: str) -> None:
    """End the rendering with the template's own message."""
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(form: str) -> str:
    """The local time in the form of `strftime`."""
    return datetime.now().strftime(form)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment that published chat templates are written for, transformers' own."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals["namespace"] = Namespace
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


def failing_line(error: BaseException) -> int | None:
    """The template's line that raised `error`, the innermost one."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE_NAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def describe(error: BaseException) -> str:
    """What went wrong, in words short enough for one line."""
    if isinstance(error, MemoryError):
        return "ran out of the memory a template may use"
    if isinstance(error, RecursionError):
        return "recursion is too deep"
    return str(error)[:MESSAGE_CHARACTERS] or type(error).__name__


class Output(list[str]):
    """The pieces of a rendering, as long as they fit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.room = limit
        self.limit = limit

    def append(self, piece: str) -> None:
        """Keep `piece`; OverflowError when the whole is longer than the limit."""
        self.room -= len(piece)
        if self.room < 0:
            raise OverflowError(f"the result is longer than {self.limit} characters")
        super().append(piece)


def answer(
    compiled: Callable[[str], jinja2.Template], request: dict[str, Any]
) -> dict[str, str | int | None]:
    """Render one request: {"text": …}, or {"error": …, "line": …}."""
    output = Output(request["limit"])
    try:
        for piece in compiled(request["template"]).generate(request["variables"]):
            output.append(piece)
        return {"text": "".join(output)}
    except Exception as error:
        del output
        return {"error": describe(error), "line": failing_line(error)}


def limit_memory(size: int) -> None:
    """Let an allocation beyond `size` bytes fail, where the system can (not on macOS)."""
    if resource is not None:
        set_limit(resource.RLIMIT_AS, size)
        set_limit(resource.RLIMIT_CORE, 0)


def limit_time(seconds: int) -> None:
    """Let the system end this process after `seconds` more of work, even with its parent gone."""
    if resource is not None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        set_limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + seconds + 1)


def set_limit(kind: int, value: int) -> None:
    """Set the soft limit, no higher than the hard one."""
    _, hard = resource.getrlimit(kind)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (soft, hard))


def send(message: dict[str, str | int | None]) -> None:
    """Write one line for the parent."""
    written = json.dumps(message, ensure_ascii=False)
    sys.stdout.buffer.write(written.encode("utf-8", "surrogatepass") + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Answer requests until the parent closes the pipe or dies."""
    limit_memory(int(sys.argv[1]))
    compiled = lru_cache(maxsize=4)(environment().from_string)  # a chat renders one again and again
    send({})  # ready
    for line in sys.stdin.buffer:
        request = json.loads(line)
        limit_time(request["seconds"])
        send(answer(compiled, request))


if __name__ == "__main__":
    main()
