"""The child process that renders chat templates: one JSON request a line in, one JSON answer out.

It is run as a file by `python -I`, so that it imports jinja2 and the standard library alone. A
template is code from a downloaded folder: here it can neither hold up nor fill up the program
that uses it, because the parent kills this process at a deadline (template_renderer.py).
"""

import json
import sys
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from functools import lru_cache, partial
from itertools import takewhile
from typing import Any, NamedTuple

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
CARRIED_CHARACTERS = 100  # of a text that a namespace carries from message to message

# What `goes_by_message` lets a template use.
STATEMENTS = (
    nodes.Output,
    nodes.Assign,
    nodes.AssignBlock,
    nodes.If,
    nodes.For,
    nodes.Macro,
    nodes.Scope,
)
FUNCTIONS = ("range", "dict", "raise_exception")
RESERVED = ("messages", "loop", "self", "caller")
FILTERS = frozenset(  # none gives an iterator, which could be used up by one message
    "abs capitalize count d default dictsort e escape first float indent int join last length list "
    "lower replace round safe sort string title tojson trim upper".split()
)


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

    made: "list[Namespace]" = []  # by the present rendering, in order

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        super().__init__(attributes)
        Namespace.made.append(self)

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


def goes_by_message(tree: nodes.Template, functions: Collection[str]) -> bool:
    """Whether a template renders message after message, each without a look at the others.

    Then the text up to a message stays as it is whatever follows, and goes on with what that
    message, the first one, and what namespaces hold there give. For `messages` is used in one loop
    at the top, and as `messages[0]`; of that loop's `loop` only `first` is. Nothing else lives from
    one message to the next: names that a loop sets end with each round, the sandbox lets nothing be
    changed, no iterator is kept, and neither clocks nor chance are asked.

    Args:
        functions: names that a template can use without being given them.
    """
    loops = [node for node in tree.body if isinstance(node, nodes.For) and _is(node.iter)]
    if len(loops) != 1:
        return False
    loop = loops[0]
    if not isinstance(loop.target, nodes.Name) or loop.test or loop.else_ or loop.recursive:
        return False
    at_top = set(map(id, tree.body))
    carried = {  # namespaces, made before the loop
        id(node.node)
        for node in takewhile(lambda node: node is not loop, tree.body)
        if isinstance(node, nodes.Assign) and _is_call(node.node, ("namespace",))
    }

    def is_known(node: nodes.Node, in_inner_loop: bool) -> bool:
        """Whether this, and all in it, is what the proof knows."""
        if isinstance(node, nodes.Name):
            is_inner = node.name == "loop" and node.ctx == "load" and in_inner_loop
            return is_inner or node.name not in (*RESERVED, *functions)
        if isinstance(node, nodes.Macro):
            fits = id(node) in at_top and node.name not in RESERVED
        elif isinstance(node, nodes.Filter):
            fits = node.name in FILTERS
        elif isinstance(node, nodes.Test):
            fits = node.name != "sameas"
        else:
            fits = isinstance(node, (*STATEMENTS, nodes.Expr, nodes.Helper))
        body: set[int] = set()
        if isinstance(node, nodes.For) and node is not loop:
            body = set(map(id, node.body))
        return fits and all(
            is_known(part, in_inner_loop or id(part) in body)
            for part in node.iter_child_nodes()
            if part is not _proven(node)
        )

    def _proven(node: nodes.Node) -> nodes.Node | None:
        """The part of a node that is right in its place."""
        if node is loop:
            return loop.iter
        if isinstance(node, nodes.Getitem) and _is(node.node) and _is_zero(node.arg):
            return node.node
        if isinstance(node, nodes.Getattr) and _is(node.node, "loop") and node.attr == "first":
            return node.node
        if isinstance(node, nodes.Call) and (_is_call(node, FUNCTIONS) or id(node) in carried):
            return node.node
        return None

    return all(is_known(node, False) for node in tree.body)


def _is(node: nodes.Node, name: str = "messages") -> bool:
    return isinstance(node, nodes.Name) and node.name == name and node.ctx == "load"


def _is_call(node: nodes.Node, names: Collection[str]) -> bool:
    return isinstance(node, nodes.Call) and any(_is(node.node, name) for name in names)


def _is_zero(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and type(node.value) is int and node.value == 0


class Messages(list[Any]):
    """Messages that note, as a loop takes them, what has been rendered before each and after all.

    Attributes:
        starts: characters.
        carried: what the namespaces hold, one after another; None where that is not plain.
    """

    def __init__(
        self, messages: list[Any], output: Output, resumed: list[dict[str, Any]] | None
    ) -> None:
        """`resumed`: what the namespaces shall hold after the first message."""
        super().__init__(messages)
        self.starts: list[int] = []
        self.carried: list[list[dict[str, Any]] | None] = []
        self._output, self._resumed = output, resumed

    def __iter__(self) -> Iterator[Any]:
        for message in super().__iter__():
            self._note()
            yield message
        self._note()

    @property
    def noted(self) -> dict[str, Any]:
        return {"starts": self.starts, "carried": self.carried}

    def _note(self) -> None:
        held = [space._Namespace__attrs for space in Namespace.made]
        if self._resumed is not None and len(self.starts) == 1:
            for attributes, values in zip(held, self._resumed, strict=True):
                attributes.clear()
                attributes.update(values)
        is_kept = all(_is_carried(value) for values in held for value in values.values())
        self.starts.append(self._output.limit - self._output.room)
        self.carried.append([dict(values) for values in held] if is_kept else None)


def _is_carried(value: Any) -> bool:
    """Whether a namespace's value is the same after a way through JSON, and short."""
    if type(value) is str:
        return len(value) <= CARRIED_CHARACTERS
    return value is None or type(value) in (bool, int)


class Compiled(NamedTuple):
    """A template, and whether it goes message by message."""

    template: jinja2.Template
    by_message: bool


def compile_in(made: ImmutableSandboxedEnvironment, source: str) -> Compiled:
    """The template of a text."""
    return Compiled(made.from_string(source), goes_by_message(made.parse(source), made.globals))


def answer(compiled: Callable[[str], Compiled], request: dict[str, Any]) -> dict[str, Any]:
    """Render one request: {"text": …}, or {"error": …, "line": …}.

    Of a template that goes message by message also `starts` and `carried` of `Messages`.
    """
    output, messages = Output(request["limit"]), None
    Namespace.made.clear()
    try:
        template, by_message = compiled(request["template"])
        variables = request["variables"]
        if by_message and isinstance(variables.get("messages"), list):
            messages = Messages(variables["messages"], output, request.get("resumed"))
            variables["messages"] = messages
        for piece in template.generate(variables):
            output.append(piece)
        text: dict[str, Any] = {"text": "".join(output)}
        return text if messages is None else text | messages.noted
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


def send(message: dict[str, Any]) -> None:
    """Write one line for the parent."""
    written = json.dumps(message, ensure_ascii=False)
    sys.stdout.buffer.write(written.encode("utf-8", "surrogatepass") + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Answer requests until the parent closes the pipe or dies."""
    limit_memory(int(sys.argv[1]))
    # A chat renders one template again and again.
    compiled = lru_cache(maxsize=4)(partial(compile_in, environment()))
    send({})  # ready
    for line in sys.stdin.buffer:
        request = json.loads(line)
        limit_time(request["seconds"])
        send(answer(compiled, request))


if __name__ == "__main__":
    main()
