"""A local stand-in that speaks the hub's protocol, with the faults that tests ask it for."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "someone/tiny-kimi"
PACE = 1 << 22  # bytes that are sent at once
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the repository NAME. Weights are counted without their headers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.commit = COMMIT
        self.asked: list[str] = []  # files whose content was asked for
        self.resumed: list[str] = []  # those of which only the rest was
        self.sent: dict[str, int] = {}  # bytes of each file's content
        self.bytes = 0  # of all contents, headers of weights included
        self.break_after: int | None = None  # bytes of the first weights, once
        self.failing: set[str] = set()  # files that give the status 500
        self.swapped: dict[str, str] = {}  # a file -> the one whose whole content is sent for it
        self.delay = 0.0  # seconds for every 4 MB
        self.short: set[str] = set()  # files whose second half is never sent

    def environment(self, home: Path) -> dict[str, str]:
        """For a process whose hub is this, and whose cache is `home`."""
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(home)}
        return os.environ | here | {"HF_HUB_OFFLINE": "0"}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        try:
            self.respond(body=True)
        except (BrokenPipeError, ConnectionResetError):
            pass  # who asked was killed

    def respond(self, body: bool) -> None:
        path = self.path.split("?")[0]
        files = sorted(self.server.folder.iterdir())
        sizes = [(file.name, file.stat().st_size) for file in files]
        if path.startswith(f"/api/models/{NAME}/tree/"):
            self.send([{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes], body)
        elif path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": n, "size": s} for n, s in sizes]
            about = {"id": NAME, "sha": self.commit(path), "private": False}
            self.send(about | {"siblings": siblings}, body)
        elif path.startswith(f"/{NAME}/resolve/"):
            self.file(self.server.folder / path.rsplit("/", 1)[1], body)
        else:
            self.send_error(404)

    def file(self, file: Path, body: bool) -> None:
        if not file.is_file():
            self.send_error(404)
            return
        # Headers of weights come from the right file: they are asked for by their range.
        swapped = None if self.headers.get("Range") else self.server.swapped.get(file.name)
        source = file.with_name(swapped or file.name)
        size = source.stat().st_size
        start, stop = self.range(size)
        if body and stop == size:
            self.server.asked.append(file.name)
            if file.name in self.server.failing:
                self.send_error(500)
                return
            if start:
                self.server.resumed.append(file.name)
        partly = (start, stop) != (0, size)
        self.send_response(206 if partly else 200)
        self.send_header("ETag", f'"{file.name}-{size}"')
        self.send_header("X-Repo-Commit", self.commit(self.path))
        self.send_header("Accept-Ranges", "bytes")
        if partly:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if body:
            self.content(source, file.name, start, stop, size)

    def commit(self, path: str) -> str:
        """The commit that a path names, or the newest."""
        return next((part for part in path.split("/") if len(part) == 40), self.server.commit)

    def range(self, size: int) -> tuple[int, int]:
        """The bytes that are asked for."""
        wanted = self.headers.get("Range")
        if not wanted or self.command == "HEAD":
            return 0, size
        first, last = wanted.removeprefix("bytes=").split("-")
        return int(first), min(int(last) + 1, size) if last else size

    def content(self, source: Path, name: str, start: int, stop: int, size: int) -> None:
        """The bytes, or as many of them as the fault lets through."""
        if self.server.break_after and source.suffix == ".safetensors" and stop == size:
            stop, self.server.break_after = self.server.break_after, None
        elif name in self.server.short and stop == size:
            stop = max(size // 2, start)
        with source.open("rb") as content:
            content.seek(start)
            for at in range(start, stop, PACE):
                self.server.bytes += self.wfile.write(content.read(min(PACE, stop - at)))
                time.sleep(self.server.delay)
        if stop == size:
            self.server.sent[name] = self.server.sent.get(name, 0) + stop - start
        self.close_connection = True

    def send(self, answer: object, body: bool) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """The stand-in at work in a thread."""
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
