"""Renders templates in a child process (template_worker.py), bounded in time, memory and output.

Templates are code from a downloaded folder: this process never runs them.
"""

import importlib.util
import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import Json

WORKER = Path(__file__).with_name("template_worker.py")
RENDER_SECONDS = 4.0  # a long chat renders in 0.1 s; a person does not wait longer for an error
START_SECONDS = 30.0  # Python and jinja2 take 0.2 s to start, far longer beside a loading model
OUTPUT_CHARACTERS = 1 << 23  # twice the text of a full context, 1,048,576 tokens of about 4
MEMORY_BYTES = 512 << 20  # holds the longest request and answer in their several copies
POLL_SECONDS = 0.1  # between looks at the memory of a child where the system sets no limit
MESSAGE_CHARACTERS = 300  # of a template's error that are shown


class Rendered(NamedTuple):
    """What a template gave.

    Attributes:
        starts: characters before each message and after all; empty unless the template was proven
            to go message by message (`goes_by_message` in template_worker.py).
        carried: what its namespaces held at each start; None where that cannot be taken up.
    """

    text: str
    starts: Sequence[int] = ()
    carried: Sequence[Json] = ()


class Renderer:
    """The child process: started at once, used again for every rendering, replaced when it fails.

    It has a session of its own, so that the terminal's Ctrl-C does not reach it, and ends when its
    pipe closes, which the death of this process does.
    """

    def __init__(self, seconds: float = RENDER_SECONDS, memory: int = MEMORY_BYTES) -> None:
        self.seconds = seconds
        self.memory = memory
        self._turn = threading.Lock()
        self._child = self._start()
        self._ready = False

    def render(
        self, template: str, variables: Mapping[str, Json], resumed: Json = None
    ) -> Rendered:
        """Render `template`.

        Args:
            resumed: of `Rendered.carried`: what namespaces shall hold after the first message.

        Raises:
            KimiError: it is wrong, it failed, or it passed a limit; without the template's name.
        """
        try:
            request = json.dumps(
                {
                    "template": template,
                    "variables": variables,
                    "resumed": resumed,
                    "seconds": int(self.seconds) + 1,
                    "limit": OUTPUT_CHARACTERS,
                }
            ).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise KimiError(f"its variables must be JSON: {one_line(str(error))}") from None
        with self._turn:
            answer = self._answer(request + b"\n")
        if "text" in answer:
            return Rendered(answer["text"], answer.get("starts", ()), answer.get("carried", ()))
        line = f"line {answer['line']}: " if answer.get("line") else ""
        raise KimiError(line + one_line(answer["error"]))

    def close(self) -> None:
        """End the child."""
        self._finalizer()

    def _start(self) -> "subprocess.Popen[bytes]":
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _LAUNCH, str(self.memory), str(WORKER), *_jinja_folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._finalizer = weakref.finalize(self, _end, child)
        return child

    def _answer(self, request: bytes) -> dict[str, Json]:
        if self._child.poll() is not None:
            self._replace()
        if not self._ready:
            started = self._ask(b"", START_SECONDS)
            if "error" in started:
                return {"error": f"its process did not start: {started['error']}"}
            self._ready = True
        return self._ask(request, self.seconds)

    def _ask(self, request: bytes, seconds: float) -> dict[str, Json]:
        """Send a line, if any, and read one; a child that gave no clean answer is replaced."""
        watch = _Watch(self._child, seconds, self.memory)
        try:
            with watch:
                answer = _exchange(self._child, request)
        except BaseException:  # Ctrl-C too: an answer would come later, to the wrong question
            self._replace()
            raise
        if answer is None:
            self._replace()
            return {"error": watch.reason or "its process died"}
        return answer

    def _replace(self) -> None:
        self._finalizer()
        self._child, self._ready = self._start(), False


# `-I` leaves out the folder of the script, and folders that only this process knows of (a user's
# own packages, PYTHONPATH): jinja2's come as arguments.
_LAUNCH = (
    "import runpy, sys; sys.path += sys.argv[3:]; runpy.run_path(sys.argv[2], None, '__main__')"
)


def _jinja_folders() -> list[str]:
    found = (importlib.util.find_spec(name) for name in ("jinja2", "markupsafe"))
    return [str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin]


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()  # it keeps nothing that could be lost
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe:
            try:
                pipe.close()
            except BrokenPipeError:  # a request that it never read
                pass


def _exchange(child: "subprocess.Popen[bytes]", request: bytes) -> dict[str, Json] | None:
    """One question, one answer; None when the child died over it."""
    assert child.stdin and child.stdout
    try:
        child.stdin.write(request)
        child.stdin.flush()
    except BrokenPipeError:
        return None
    line = child.stdout.readline(8 * OUTPUT_CHARACTERS)  # the child stops long before
    if not line.endswith(b"\n"):
        return None
    answer = json.loads(line.decode("utf-8", "surrogatepass"))
    return answer if isinstance(answer, dict) else None


class _Watch:
    """A thread that kills the child at the deadline or when it holds too much memory."""

    def __init__(self, child: "subprocess.Popen[bytes]", seconds: float, memory: int) -> None:
        self.reason = ""
        self._child, self._seconds, self._memory = child, seconds, memory
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        deadline = time.monotonic() + self._seconds
        while not self._done.wait(POLL_SECONDS):
            if time.monotonic() >= deadline:
                self.reason = f"took longer than {self._seconds:g} s"
            elif MUST_POLL and resident_bytes(self._child.pid) > self._memory:
                self.reason = "ran out of the memory a template may use"
            if self.reason:
                self._child.kill()
                return


MUST_POLL = sys.platform == "darwin"  # macOS accepts RLIMIT_AS and does not enforce it


def resident_bytes(process: int) -> int:
    """The memory that a process holds, by `ps`; 0 when it has ended."""
    listed = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True)
    return int(listed.stdout.strip() or 0) * 1024


def one_line(text: str) -> str:
    """`text` without line breaks and terminal controls, cut to a line that can be read."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(plain.split())[:MESSAGE_CHARACTERS]
