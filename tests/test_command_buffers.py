"""Metal's command buffers: the limits are set before MLX reads them, and what follows from them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest

from benchmarks.command_buffers import (
    BASE,
    MOST_COMMITTED,
    ULTRA,
    Array,
    CommandBuffer,
    Graph,
    Limits,
    Node,
    evaluation_order,
    most_held,
)
from benchmarks.step_graphs import CONFIG_48B, step_graph
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.loading.command_buffers import MEGABYTES, OPERATIONS, enlarge_command_buffers
from mlx_kimi.loading.load import load_model
from mlx_kimi.loading.memory import needs
from mlx_kimi.metal_kernels.kernel import OFF

OURS = Limits(OPERATIONS, MEGABYTES)
NAMES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
SET = (str(OPERATIONS), str(MEGABYTES))
ROOT = Path(__file__).parents[1]


# --------------------------------------------------------------------------------- the two limits
@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Neither limit is set; afterwards all is as it was."""
    with patch.dict(os.environ):
        for name in NAMES:
            os.environ.pop(name, None)
        yield


def limits() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in NAMES)


def pretend(monkeypatch: pytest.MonkeyPatch, metal: bool, device: Any) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))


def test_are_set_before_a_model_touches_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, True, mx.gpu)
    monkeypatch.setenv(OFF, "1")  # there is no Metal to run kernels
    found: list[tuple[str, tuple[str | None, ...]]] = []

    def watch(name: str, instead: Callable[..., Any]) -> None:
        def watched(*arguments: Any, **named: Any) -> Any:
            found.append((name, limits()))
            return instead(*arguments, **named)

        monkeypatch.setattr(mx, name, watched)

    facts: dict[str, Any] = {"max_recommended_working_set_size": 1 << 40, "memory_size": 1 << 40}
    facts["architecture"] = "applegpu_g13g"  # (asked for once a process, if no test did so before)
    for name in ("load", "zeros", "concatenate", "eval"):
        watch(name, getattr(mx, name))
    watch("device_info", lambda: facts)
    watch("set_wired_limit", lambda limit: 0)
    load_model(pocket_folder())
    assert {"load", "device_info", "set_wired_limit", "eval"} <= {name for name, _ in found}
    assert {values for _, values in found} == {SET}


@pytest.mark.parametrize(
    ("metal", "device"), [(False, mx.cpu), (False, mx.gpu), (True, mx.cpu)], ids=str
)
def test_are_left_alone_without_an_apple_gpu(
    monkeypatch: pytest.MonkeyPatch, metal: bool, device: Any
) -> None:
    """On CPU, on an NVIDIA GPU, and where a Mac's user chose the CPU."""
    pretend(monkeypatch, metal, device)
    enlarge_command_buffers()
    assert limits() == (None, None)


def test_are_set_by_a_model_where_this_machine_has_an_apple_gpu() -> None:
    is_apple_gpu = sys.platform == "darwin" and mx.default_device() == mx.Device(mx.gpu)
    load_model(pocket_folder(), lazy=True)
    assert limits() == (SET if is_apple_gpu else (None, None))


@pytest.mark.parametrize(
    ("given", "expected"),
    [({NAMES[0]: "7"}, ("7", SET[1])), ({NAMES[1]: "9"}, (SET[0], "9")), ({}, SET)],
)
def test_what_the_user_set_stands(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: tuple[str, ...]
) -> None:
    pretend(monkeypatch, True, mx.gpu)
    os.environ |= given
    enlarge_command_buffers()
    assert limits() == expected
    os.environ |= dict.fromkeys(NAMES, "5")
    enlarge_command_buffers()  # the next model of one process
    assert limits() == ("5", "5")


# Says what MLX was asked before a model is loaded. A function that makes an array, a stream or a
# node of a graph, or asks the device what it is, would start the GPU.
COMMANDS = """
import sys
import mlx.core as mx
from mlx_kimi.cli.main import cli

peak, called = mx.get_peak_memory, set()

def stop():
    raise RuntimeError(f"{peak()} bytes {sorted(called - {'compile', 'default_device'})}")

def watch(name, function):
    setattr(mx, name, lambda *a, **k: called.add(name) or function(*a, **k))

for name, function in vars(mx).copy().items():
    if callable(function) and not isinstance(function, type):
        watch(name, function)
mx.metal.is_available = stop  # the first question of `enlarge_command_buffers`
for arguments in sys.stdin.read().splitlines():
    try:
        cli.main(arguments.split(), standalone_mode=False)
    except RuntimeError as error:
        print(error)
"""


def test_no_command_uses_the_gpu_before(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("some words")
    commands = (
        "generate Hi --seed 1 --memory-budget 1GB",
        "chat --seed 1",
        "bench",
        "check",
        "check --report",
        f"evaluate -f {text}",
        f"cache {tmp_path / 'new'} Hi",
        "info --kernels",
    )
    found = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="\n".join(commands),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    expected = ["0 bytes []"] * len(commands)
    assert found.stdout.splitlines() == expected, found.stderr


# --------------------------------------------------------------------------------------- the rule
def node(primitive: str, inputs: str, output: str, elements: int = 1) -> Node:
    """One whose inputs and output have so many elements."""
    made = [Array(output, elements, 2 * elements)]
    return Node(primitive, [Array(name, elements, 2 * elements) for name in inputs], made)


def counts(nodes: list[Node], limits: Limits) -> list[tuple[int, int]]:
    """Launches and elements of each command buffer, where the last node alone is wanted."""
    graph = Graph([], nodes, [[nodes[-1].outputs[0].name]])
    return [(b.launches, b.elements) for b in graph.command_buffers(limits)]


def test_a_buffer_ends_with_the_launch_that_passes_a_limit() -> None:
    chain = [node("Exp", "abcd"[i], "bcde"[i]) for i in range(4)]
    assert counts(chain, Limits(2, 1)) == [(3, 4), (1, 2)]
    large = [node("Exp", "a", "b", 1 << 19), node("Exp", "b", "c", 1 << 19)]
    # 2^19 elements each: a, b, c are one and a half times 2^20, which is not above 1.
    assert counts([*large, node("Exp", "c", "d", 1 << 19)], Limits(9, 1)) == [(3, 1 << 21)]
    assert counts([*large, node("Exp", "c", "d", 1 << 19)], Limits(9, 0)) == [
        (1, 1 << 20),
        (1, 1 << 20),
        (1, 1 << 20),
    ]


def test_a_memory_counts_once_whatever_views_it() -> None:
    views = [node("Reshape", "a", "b", 8), node("Transpose", "b", "c", 8)]
    broadcast = Node("Broadcast", [Array("c", 8, 16)], [Array("d", 80, 160)])
    assert counts([*views, broadcast, node("Add", "ad", "e", 8)], Limits(9, 9)) == [(1, 16)]
    assert counts([node("Concatenate", "abc", "d", 4)], Limits(9, 9)) == [(3, 16)]
    half = Node("Slice", [Array("a", 8, 16)], [Array("b", 4, 8)])
    assert counts([half, node("Exp", "b", "c", 4)], Limits(9, 9)) == [(1, 8)]


def test_each_evaluation_ends_a_buffer() -> None:
    chain = [node("Exp", "abcd"[i], "bcde"[i]) for i in range(4)]
    graph = Graph([], chain, [["c"], ["e", "c"]])
    found = graph.command_buffers(Limits(9, 9))
    assert [(b.piece, b.launches) for b in found] == [(0, 2), (1, 2)]


def test_users_come_after_what_they_use() -> None:
    """MLX lists b, c, d as the users' inputs are met, from the last, and evaluates backwards."""
    nodes = [node("Exp", "a", "b"), node("Exp", "b", "c"), node("Exp", "a", "d")]
    nodes.append(node("Add", "cd", "e"))
    makers = {n.outputs[0].name: n for n in nodes}
    order = evaluation_order([nodes[-1]], makers)
    assert [n.outputs[0].name for n in order] == ["b", "d", "c", "e"]


@pytest.mark.parametrize("T", [1, 32])
def test_the_order_of_the_48b_is_one(T: int) -> None:
    """Each node once, none before its inputs; with pieces that go below the widest list, too."""
    graph = recorded(T)
    makers = {array.name: n for n in graph.nodes for array in n.outputs}
    wanted = [makers[name] for piece in graph.pieces for name in piece if name in makers]
    order = evaluation_order(wanted, makers)
    place = {id(n): number for number, n in enumerate(order)}
    assert len(place) == len(order)
    for n in order:
        needed = [makers[a.name] for a in n.inputs if a.name in makers]
        assert all(place[id(maker)] < place[id(n)] for maker in needed)


def test_what_is_held_at_most() -> None:
    def buffer(piece: int, is_full: bool) -> CommandBuffer:
        return CommandBuffer(piece, made=1, is_full=is_full)

    pieces = [buffer(piece, False) for piece in range(5)]
    assert most_held(pieces) == 5
    assert most_held(pieces, ahead=1) == 2
    # MLX lets the host wait once more than MOST_COMMITTED that reached a limit are not complete.
    assert most_held([buffer(0, True)] * 50) == MOST_COMMITTED + 1


# ---------------------------------------------------------------------------------------- the 48B
recorded = cache(step_graph)


@pytest.mark.parametrize("theirs", [BASE, ULTRA])
def test_a_token_of_the_48b_is_one_command_buffer(theirs: Limits) -> None:
    graph = recorded(1)
    # 237 as counted by test_launches; swiglu of the dense MLP is three here.
    assert sum(n.launches for n in graph.nodes) == 237 + 2
    stacks = 256 * 1024 * 2304 // 8  # words of 4 bits: 75.5 M
    large = [n for n in graph.nodes if max(a.elements for a in n.inputs) == stacks]
    assert len(large) == 52  # two launches of each of 26 layers
    default = graph.command_buffers(theirs)
    assert len(default) == 52 + 3  # embedding, lm_head, and what ends with the token
    assert sum(b.launches for b in default) == 239
    (ours,) = graph.command_buffers(OURS)
    assert ours.launches == 239
    # The limit that is meant never to be reached is above a model in 16 bits, too.
    assert ours.elements >> 20 < MEGABYTES
    assert 48e9 / 2**20 < MEGABYTES


@pytest.mark.parametrize("T", [1, 9, 31, 127, 128, 511, 512, 2048])
def test_buffers_hold_no_more_than_is_booked_as_work_space(T: int) -> None:
    """`loading/memory.py` books it for a step of 2048 tokens, and any step must do with it.

    Nothing of a step completes before all of it is submitted, but what `SubmitLimit` waits for:
    two pieces, of one or more halves of layers. Of single tokens, two steps are submitted at a
    time (`decode`).
    """
    work = needs(CONFIG_48B, 0, number=2).work
    held = most_held(recorded(T).command_buffers(OURS), ahead=None if T == 1 else 1)
    assert (2 * held if T == 1 else held) <= work
    if T == 2048:  # within MLX's limits a half is a few buffers, all of them unfinished
        assert held == most_held(recorded(T).command_buffers(ULTRA), ahead=1)


def test_recording_a_step_takes_no_memory() -> None:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    step_graph(2048)
    assert mx.get_peak_memory() - before < 1e6  # of weights of 27.6 GB
