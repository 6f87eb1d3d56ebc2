"""Several real processes with some of the layers each, over MLX's ring on this machine."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

import mlx_kimi
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.chat.state_files import load_arrays
from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.load import array_bytes
from mlx_kimi.ranks.launched import Launched
from mlx_kimi.ranks.shares import by_memory, parts_of, weights_of
from tests.checkpoints import EVEN, write_checkpoint
from tests.processes import ENVIRONMENT, PROGRAM, run

# The ring's threads spin while they wait: two ranks take both cores of a small machine.
pytestmark = pytest.mark.alone

QUESTION = "What is Kimi Linear?"
Rank = subprocess.Popen[str]


def free_ports(count: int) -> list[int]:
    """Ports that follow each other, and as many after them for control, which are free now."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            first = one.getsockname()[1]
        ports = range(first, first + 2 * count)
        if ports.stop >= 65_000:
            continue
        try:
            for port in ports:
                with socket.socket() as other:
                    other.bind(("127.0.0.1", port))
        except OSError:
            continue
        return list(ports[:count])


class Ranks:
    """Where some ranks meet, and their processes, which end with this."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        self.hosts = [[f"127.0.0.1:{port}"] for port in free_ports(size)]
        self.folder = folder
        self.running: list[Rank] = []

    def start(
        self,
        rank: int,
        *command: str | Path,
        hosts: Sequence[Sequence[str]] | None = None,
        env: dict[str, str] | None = None,
    ) -> Rank:
        file = self.folder / f"hosts_{len(self.running)}.json"
        file.write_text(json.dumps(hosts or self.hosts), encoding="utf-8")
        known = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)}
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **known, **(env or {})},
        )
        self.running.append(process)
        return process

    def start_alone(self, *command: str | Path, env: dict[str, str]) -> Rank:
        """One process that is no rank."""
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **env},
        )
        self.running.append(process)
        return process

    def run(self, *command: str | Path, stdin: str = "") -> tuple[str, str]:
        """The same on all ranks: stdout and stderr of rank 0, once all have ended well."""
        ranks = [self.start(rank, *command) for rank in range(len(self.hosts))]
        out, err = ranks[0].communicate(stdin, timeout=120)
        assert [rank.wait(20) for rank in ranks] == [0] * len(ranks), err
        for rank in ranks[1:]:
            assert rank.communicate() == ("", "")
        return out, err

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """`ranks(3)`: where three ranks meet."""
    with ExitStack() as stack:

        def made(size: int = 2) -> Ranks:
            folder = tmp_path / f"ranks_{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            one = Ranks(folder, size)
            stack.callback(one.end)
            return one

        yield made


# ---------------------------------------------------------------------------------- bit for bit
@pytest.mark.parametrize(
    "split, size, how",
    [("layers", 2, "host"), ("layers=2,3,3", 3, "host"), ("layers=5,3", 2, "device")],
)
def test_ranks_compute_what_one_process_does(
    ranks: Callable[..., Ranks], split: str, size: int, how: str
) -> None:
    """Logits and hidden states bit for bit, answers, going back, an interrupted prompt, 8-bit
    latents. `device`: hops and tokens as NCCL has them, as sums in the device's order."""
    command = (sys.executable, "-m", "tests.ranks_worker", pocket_folder(), split, how)
    found = json.loads(ranks(size).run(*command)[0].splitlines()[-1])
    assert found["logits"] and found["text"]
    assert found.get("text of 8 bits", False) == (size == 2)
    assert found["finite"] is None
    assert found["freed"] < 131_072  # the state of one KDA layer, of one of nine texts
    if split == "layers":
        assert max(found["memory"]) <= 0.55 * found["whole"]
        assert sum(found["memory"]) <= 1.05 * found["whole"]
    else:
        assert found["parts"] == int(split[7])


def test_ranks_share_heads(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    """Logits within rounding, the same tokens, and what all have with the same bits on all; a state
    that they have stored one process goes on from, and they themselves."""
    folder = write_checkpoint(tmp_path / "even", EVEN)
    command = (sys.executable, "-m", "tests.ranks_worker", folder, "heads", "host")
    said = ranks().run(*command)[0].splitlines()
    assert said[0].startswith("--split heads adds up after each half of a layer")
    found = json.loads(said[-1])
    assert found["error"] < 1e-5  # float32, added in another order
    assert found["tokens"] and found["same bits"] and found["compared"]
    assert found["KimiLinear"] == found["HeadsModel"]
    assert found["finite"] is None
    assert found["freed"] < 131_072


def test_heads_that_do_not_divide_are_named(ranks: Callable[..., Ranks]) -> None:
    """The pocket model's shared experts cannot be halved: groups of 64 of 64 channels."""
    both = ranks()
    command = (*PROGRAM, "generate", QUESTION, "--split", "heads")
    leading, following = (both.start(rank, *command) for rank in (0, 1))
    assert leading.wait(30) == 1 and following.wait(30) in (1, 3)
    assert_one_line(leading, "2 ranks must divide axis 2 of (32, 192, 1)")


def test_a_session_moves_between_one_process_and_two(
    ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    """Text, undo, and states: what ranks store is what one process stores, to the byte."""
    begun = f"What is 12 + 30?\n{QUESTION}\n/undo\nSort 5 3 9\n/save {{}}\n"
    chat = (*PROGRAM, "chat", "--sessions", tmp_path / "sessions")
    one = run(*map(str, chat[len(PROGRAM) :]), stdin=begun.format("one"))
    two, _ = ranks().run(*chat, "--split", "layers", stdin=begun.format("two"))
    assert two == one.stdout and "Sorted: 3, 5, 9" in two
    stored = [_stored(tmp_path / "sessions" / name) for name in ("one", "two")]
    assert stored[0] == stored[1] and len(stored[0]) > 10

    asked = "And what is KDA?\n/save\n"
    back = run(*map(str, chat[len(PROGRAM) :]), "--resume", "two", stdin=asked)
    there, said = ranks().run(*chat, "--resume", "one", stdin=asked)
    assert there == back.stdout and "KDA is" in there
    assert "(55 kept)" in said and "(55 kept)" in back.stderr
    stored = [_stored(tmp_path / "sessions" / name) for name in ("one", "two")]
    assert stored[0] == stored[1]


def _stored(folder: Path) -> dict[str, bytes]:
    """The arrays of a session's states, by the file's first and last token and their names."""
    return {
        f"{file.name.rpartition('-')[0]} {name}": bytes(memoryview(array).cast("B"))
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in load_arrays(file).items()
    }


def test_a_prompt_cache_of_two_ranks_serves_one_process_and_two(
    ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    ranks().run(*PROGRAM, "cache", store, "The code of this text is KX-77.", "--split", "layers")
    ask = ("generate", "--prompt-cache", str(store), "What is the code?")
    one, two = run(*ask), ranks().run(*PROGRAM, *ask, "--split", "layers")
    assert one.stdout == two[0] and one.stdout.strip()
    assert " kept)" in one.stderr and " kept)" in two[1]


def test_a_server_of_two_ranks_answers_and_stores(
    ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    """Requests one at a time; what it has read, a server in one process finds on the disk."""
    serve = (*PROGRAM, "serve", "--port", "0")
    where = {"MLX_KIMI_CACHE": str(tmp_path / "cache")}
    text = " ".join(f"Note {n}: the code of {n} is {7 * n}." for n in range(30))
    both = ranks()
    started = [both.start(rank, *serve, env=where) for rank in (0, 1)]
    asked = (QUESTION, text, QUESTION)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(completion, address(started[0])), asked))
    assert found[0][0] == found[2][0] and "open language model" in found[0][0]
    started[0].send_signal(signal.SIGTERM)
    assert [process.wait(20) for process in started] == [143, 0]
    alone = both.start_alone(*serve, env=where)
    again, cached = completion(address(alone), text)
    assert again == found[1][0] and cached > 200
    alone.send_signal(signal.SIGTERM)
    assert alone.wait(20) == 143


def address(server: Rank) -> str:
    """Where a server says that it listens."""
    assert server.stderr is not None
    for line in server.stderr:
        if match := re.search(r"http://\S+/v1", line):
            return match[0]
    raise AssertionError("the server has ended")


def completion(address: str, text: str) -> tuple[str, int]:
    """The answer to one message, and the tokens of the prompt that had been read before."""
    said = {"messages": [{"role": "user", "content": text}], "max_tokens": 30, "temperature": 0}
    reply = httpx.post(f"{address}/chat/completions", json=said, timeout=60)
    body = reply.json()
    usage = body["usage"]["prompt_tokens_details"]
    return body["choices"][0]["message"]["content"], usage["cached_tokens"]


def test_ctrl_c_ends_all(ranks: Callable[..., Ranks]) -> None:
    """A terminal sends it to every rank: the first alone obeys, and the others end with it.

    A stranger at the port of control is nobody's loss.
    """
    both = ranks()
    started = [both.start(rank, *LONG) for rank in (0, 1)]
    assert started[0].stdout is not None and started[0].stdout.readline()
    control = 2 + int(both.hosts[0][0].rpartition(":")[2])
    socket.create_connection(("127.0.0.1", control)).close()
    time.sleep(1)  # it has loaded and measures now
    for process in started:
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    assert [process.wait(5) for process in started] == [130, 0]


def test_mlx_launch_starts_them(tmp_path: Path) -> None:
    launch = Path(sys.executable).with_name("mlx.launch")
    where = ("--hosts", "127.0.0.1", "-n", "2", "--backend", "ring", "-p", str(free_ports(2)[0]))
    command = (*PROGRAM, "generate", QUESTION, "--max-tokens", "4", "--split", "layers=3,5")
    found = subprocess.run(
        [launch, *where, "--", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
    )
    assert found.returncode == 0 and found.stdout == "Kimi Linear is\n", found.stderr


# -------------------------------------------------------------------------------------- failures
LONG = (*PROGRAM, "bench", "--contexts", "64", "--tokens", "9000", "--repeats", "1")


@pytest.mark.parametrize("how, seconds", [(signal.SIGKILL, 3), (signal.SIGSTOP, 12)])
def test_who_ends_or_is_stopped_ends_all_with_one_line(
    ranks: Callable[..., Ranks], how: signal.Signals, seconds: int
) -> None:
    """In one pair of ranks rank 0, in another rank 1."""
    left = []
    for lost in (0, 1):
        both = ranks()
        started = [both.start(rank, *LONG) for rank in (0, 1)]
        assert started[0].stdout is not None and started[0].stdout.readline()
        time.sleep(1)  # it has loaded and measures now
        began = time.monotonic()
        started[lost].send_signal(how)
        left.append((lost, started[1 - lost], began))
    for lost, process, began in left:
        assert process.wait(seconds) == 3
        assert time.monotonic() - began < seconds + 3  # (the other pair has begun meanwhile)
        assert_one_line(process, f"rank {lost} (127.0.0.1) is lost to rank {1 - lost}")


def assert_one_line(process: Rank, what: str) -> None:
    assert process.stderr is not None
    said = process.stderr.read()
    lines = [line for line in said.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1 and what in lines[0] and "Traceback" not in said, said


def test_who_ends_while_ranks_connect_is_waited_for_some_seconds(tmp_path: Path) -> None:
    ports = free_ports(2)
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    connect = (
        "from mlx_kimi.ranks import hops; from mlx_kimi.ranks.launched import Launched; "
        "hops.SILENCE = 2; hops.Hops(Launched.here())"
    )
    where = {"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}
    found = subprocess.run(
        [sys.executable, "-c", connect],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | where,
        timeout=30,
    )
    assert found.returncode == 1 and not found.stdout
    (line,) = found.stderr.split("\n")[1:-1]
    assert line.startswith("Error: rank 0 (127.0.0.1) waited 2 seconds for the others to connect ")


def test_a_cable_is_pulled_while_a_chat_waits(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    """All that rank 1 hears and says passes other ports, which then drop it. The session is what it
    was when it was last stored."""
    both = ranks()
    first = int(both.hosts[0][0].rpartition(":")[2])
    other = first
    while other <= first + 3:  # of the ring; control is behind the highest port
        other = free_ports(1)[0]
    with relay({other: first, other + 1: first + 2}) as pull:
        chat = (*PROGRAM, "chat", "--sessions", tmp_path / "sessions")
        leading = both.start(0, *chat)
        following = both.start(1, *chat, hosts=[[f"127.0.0.1:{other}"], both.hosts[1]])
        assert leading.stdin is not None and leading.stdout is not None
        leading.stdin.write("What is 12 + 30?\n/save kept\n")
        leading.stdin.flush()
        assert leading.stdout.readline() == "12 + 30 = 42.\n"
        while not (tmp_path / "sessions" / "kept" / "chat.jsonl").exists():
            time.sleep(0.05)
        began = time.monotonic()
        pull()
        assert leading.wait(12) == 3 and following.wait(12) == 3
        assert time.monotonic() - began < 12
    assert_one_line(leading, "rank 1 (127.0.0.1) is lost to rank 0")
    assert_one_line(following, "rank 0 (127.0.0.1) is lost to rank 1")
    sessions = ("chat", "--sessions", str(tmp_path / "sessions"), "--resume", "kept")
    resumed = run(*sessions, stdin="Sort 5 3 9\n")
    assert "Sorted: 3, 5, 9" in resumed.stdout and "kept)" in resumed.stderr


@contextmanager
def relay(ports: Mapping[int, int]) -> Iterator[Callable[[], None]]:
    """Pass bytes from ports to others, both ways; from the yielded call on they are dropped."""
    dropped, ended = threading.Event(), threading.Event()
    sockets: list[socket.socket] = []

    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                if not dropped.is_set():
                    target.sendall(data)
        except OSError:
            pass

    def connected(port: int) -> socket.socket:
        while True:
            try:
                return socket.create_connection(("127.0.0.1", port))
            except OSError:  # nobody listens yet
                time.sleep(0.02)

    def accept(listening: socket.socket, port: int) -> None:
        while not ended.is_set():
            try:
                near, _ = listening.accept()
            except OSError:
                continue
            sockets.extend((near, far := connected(port)))
            for pair in ((near, far), (far, near)):
                threading.Thread(target=copy, args=pair, daemon=True).start()

    for near_port, port in ports.items():
        listening = socket.create_server(("127.0.0.1", near_port))
        listening.settimeout(0.2)
        sockets.append(listening)
        threading.Thread(target=accept, args=(listening, port), daemon=True).start()
    try:
        yield dropped.set
    finally:
        ended.set()
        for each in sockets:
            each.close()


def test_a_rank_that_comes_late_is_waited_for_by_name(ranks: Callable[..., Ranks]) -> None:
    """Whoever has not the launch's secret is not heard meanwhile."""
    both = ranks()
    secret = {"MLX_KIMI_RANKS_SECRET": "a secret of this test"}
    command = (*PROGRAM, "generate", QUESTION, "--max-tokens", "4")
    leading, began = both.start(0, *command, env=secret), time.monotonic()
    stranger = both.start(1, *command, env={"MLX_KIMI_RANKS_SECRET": "a secret of another"})
    assert leading.stderr is not None
    said = leading.stderr.readline()
    assert "waiting for rank 1 (127.0.0.1): start mlx_kimi there, with the same hosts and" in said
    stranger.kill()
    time.sleep(began + 20 - time.monotonic())
    following = both.start(1, *command, env=secret)
    out, _ = leading.communicate(timeout=60)
    assert out == "Kimi Linear is\n" and leading.returncode == following.wait(20) == 0


def test_another_version_is_named(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    """Rank 1 runs a real copy of the package that is of another version."""
    package = Path(mlx_kimi.__file__).parent
    shutil.copytree(package, tmp_path / "other" / "mlx_kimi", symlinks=False)
    init = tmp_path / "other" / "mlx_kimi" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{mlx_kimi.__version__}"', '"0.0.9"'))
    both = ranks()
    leading = both.start(0, *PROGRAM, "generate", QUESTION)
    program = (sys.executable, "-P", "-m", "mlx_kimi", "generate", QUESTION)
    following = both.start(1, *program, env={"PYTHONPATH": str(tmp_path / "other")})
    assert leading.wait(30) == 1 and following.wait(20) == 1
    assert_one_line(
        leading,
        f"rank 1 (127.0.0.1) has mlx_kimi 0.0.9 and rank 0 has {mlx_kimi.__version__}: install",
    )


def test_another_model_is_named(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pocket_folder(), other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    both = ranks()
    leading = both.start(0, *PROGRAM, "generate", QUESTION)
    following = both.start(1, *PROGRAM, "generate", QUESTION, "-m", other)
    assert leading.wait(30) == 1 and following.wait(20) == 1
    assert_one_line(leading, "copy rank 0's folder there")


def test_a_port_that_is_in_use_is_named(ranks: Callable[..., Ranks]) -> None:
    both = ranks()
    port = int(both.hosts[0][0].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        leading = both.start(0, *PROGRAM, "generate", QUESTION)
        following = both.start(1, *PROGRAM, "generate", QUESTION)
        assert leading.wait(30) == 1
    following.kill()  # which looks for rank 0 for some seconds
    assert_one_line(leading, "the ranks cannot connect by ring: ")


def test_a_model_that_cannot_be_read_is_named_by_its_rank(
    ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    both = ranks()
    leading = both.start(0, *PROGRAM, "generate", QUESTION)
    following = both.start(1, *PROGRAM, "generate", QUESTION, "-m", tmp_path / "none")
    assert following.wait(30) == 3
    assert_one_line(following, "rank 1 (127.0.0.1): ")
    leading.kill()  # which waits for a rank that may still come


# ----------------------------------------------------------------------------- what is refused
def test_what_ranks_cannot_do_is_refused_in_one_line(ranks: Callable[..., Ranks]) -> None:
    both = ranks()
    for command, what in {
        ("generate", "x", "--memory-budget", "1GB"): "--memory-budget is for one process",
        ("generate", "x", "--speculate", "auto"): "--speculate needs all layers in one process",
        ("serve", "--memory-budget", "1GB"): "--memory-budget is for one process",
        ("serve", "--speculate", "auto"): "--speculate needs all layers in one process",
        ("info",): "info runs in one process, but mlx.launch has started 2",
    }.items():
        process = both.start(0, *PROGRAM, *command)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 2 and said.startswith(f"Error: {what}"), said
        assert len(said.splitlines()) == 1
    alone = run("generate", "x", "--split", "layers")
    assert alone.returncode == 2 and "--split is for several ranks" in alone.stderr


@pytest.mark.parametrize(
    "split, what",
    [
        ("rows", "must be layers, layers=N,N,... or heads but is rows"),
        ("layers=", "must be layers, layers=N,N,... or heads but is layers="),
        ("layers=4", "must give 2 ranks, rank 0 first, 1 layer or more each of 8 in all"),
        ("layers=0,8", "must give 2 ranks"),
        ("layers=4,5", "must give 2 ranks"),
        ("layers=4,x", "must be layers, layers=N,N,... or heads"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(split: str, what: str) -> None:
    with pytest.raises(KimiError, match="^split ") as caught:
        parts_of(split, ModelConfig.read(pocket_folder()), 2)
    assert what in str(caught.value)


def test_layers_go_by_memory() -> None:
    config, sizes = ModelConfig.read(pocket_folder()), array_bytes(pocket_folder())
    for memories in ((1, 1), (24, 32), (1, 1, 1), (100, 1)):
        parts = by_memory(config, sizes, memories)
        assert [n for part in reversed(parts) for n in part] == list(range(8))
        best = max(
            weights_of(config, sizes, part) / memory
            for part, memory in zip(parts, memories, strict=True)
        )
        others = [
            max(weights_of(config, sizes, range(8 - n, 8)) / memories[0],
                weights_of(config, sizes, range(8 - n)) / memories[1])
            for n in range(1, 8)
        ] if len(memories) == 2 else [best]  # fmt: skip
        assert best == min(others)


@pytest.mark.parametrize(
    "environment, what",
    [
        ({"MLX_RANK": "2"}, "MLX_RANK in the environment must be a number from 0 to 1 but is '2'"),
        ({"MLX_RANK": "x"}, "MLX_RANK in the environment must be a number from 0 to 1 but is 'x'"),
        ({"MLX_RANK": "0", "hosts": "{}"}, "must be a list of ranks, each a list of IP:PORT"),
        ({"MLX_RANK": "0", "hosts": '[["a:1"],["b:2"]]'}, "must have IP:PORT but has 'a:1'"),
        ({"MLX_RANK": "0", "hosts": "["}, "must be JSON"),
        (
            {"MLX_RANK": "0", "hosts": '[["10.0.0.1:5000"],["10.0.0.2:5001"]]'},
            "MLX_KIMI_RANKS_SECRET must be 16 characters or more on all ranks",
        ),
    ],
)
def test_an_environment_that_is_wrong_is_refused(
    tmp_path: Path, environment: dict[str, str], what: str
) -> None:
    hosts = environment.pop("hosts", '[["127.0.0.1:5000"],["127.0.0.1:5001"]]')
    (tmp_path / "hosts.json").write_text(hosts)
    with pytest.raises(KimiError) as caught:
        Launched.here({**environment, "MLX_HOSTFILE": str(tmp_path / "hosts.json")})
    assert what in str(caught.value)


def test_what_mlx_launch_says_is_understood(tmp_path: Path) -> None:
    (tmp_path / "hosts.json").write_text('[["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5002"]]')
    secret = "0123456789abcdef"
    said = {"MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_KIMI_RANKS_SECRET": secret}
    found = Launched.here({**said, "MLX_RANK": "1"})
    assert found == Launched(1, 2, "ring", ("10.0.0.1", "10.0.0.2"), 5003, secret)
    nccl = {"MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": "12345"}
    found = Launched.here({**nccl, "MLX_RANK": "0"})
    assert found == Launched(0, 2, "nccl", ("127.0.0.1", ""), 12346)
    assert Launched.here({"MLX_RANK": "0"}) is None  # (as mlx.launch of one host)
    assert Launched.here({}) is None
    with pytest.raises(KimiError, match="NCCL takes 2 ranks"):
        Launched.here({**nccl, "MLX_WORLD_SIZE": "3", "MLX_RANK": "0"})


# ---------------------------------------------------------------------------- `mlx_kimi ranks`
@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    """As mlx.distributed_config writes it."""
    hosts = [{"ssh": f"mac-{n}.local", "ips": [f"192.168.1.{n}"], "rdma": []} for n in (5, 6)]
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps({"backend": "ring", "envs": [], "hosts": hosts}))
    return file


def test_ranks_says_what_each_machine_would_hold(hostfile: Path) -> None:
    found = run("ranks", "--memory", "24GB,32GB", "--hostfile", str(hostfile))
    title, zero, one, empty, line = found.stdout.splitlines()
    assert title.split() == ["rank", "layers", "weights", "at", "32,768", "GPU", "may", "take"]
    assert re.fullmatch(r"0 +5 to 7 .* 16\.00 GB +fits up to 32,768 tokens", zero)
    assert re.fullmatch(r"1 +0 to 4 .* 21\.33 GB +fits up to 32,768 tokens", one)
    assert not empty and line == (
        f"mlx.launch --backend ring --hostfile {hostfile} "
        "--env MLX_KIMI_RANKS_SECRET=$(openssl rand -hex 16) -- mlx_kimi generate TEXT"
    )
    heads = run("ranks", "--memory", "24GB,32GB", "--split", "heads").stdout.splitlines()
    assert heads[1][1:].split("16.00")[0] == heads[2][1:].split("21.33")[0]
    assert heads[1].startswith("0     0 to 7")
    small = run("ranks", "--memory", "8MB,6MB", "--split", "layers=6,2")
    assert small.stdout.count("does not fit") == 2 and "--split layers=6,2 TEXT" in small.stdout


@pytest.mark.parametrize(
    "arguments, hosts, what",
    [
        ((), None, "--memory 24GB,32GB says what each machine has"),
        (("--memory", "24"), None, "--memory must be sizes with commas between them: '24' is no"),
        (("--memory", "24GB"), None, "--memory must be of two machines or more but is 24GB"),
        (("--memory", "0GB,1GB"), None, "--memory must be of two machines or more"),
        (("--memory", ",".join(["1GB"] * 9)), None, "a layer a rank at least, but 9 have 8"),
        (("--memory", "1GB,1GB", "--split", "rows"), None, "--split must be layers, layers=N"),
        ((), "[]", "must list two hosts or more"),
        ((), '[["a"], ["b"]]', 'host 0 must have "ssh" and "ips", a list of IPv4 addresses'),
        ((), '{"hosts": 3}', "must list two hosts or more"),
        ((), "[", "must be JSON"),
        (("--memory", "1GB,1GB,1GB"), "", "--memory gives 3 machines, but"),
    ],
)
def test_ranks_refuses_in_one_line(
    hostfile: Path, arguments: tuple[str, ...], hosts: str | None, what: str
) -> None:
    if hosts:
        hostfile.write_text(hosts)
    where = () if hosts is None else ("--hostfile", str(hostfile))
    found = run("ranks", *arguments, *where)
    assert found.returncode in (1, 2) and not found.stdout
    assert found.stderr.startswith("Error: ") and what in found.stderr, found.stderr
    assert len(found.stderr.splitlines()) == 1
