"""Where MLX ends Metal's command buffers, and what they hold: by its rule, from a graph's sizes.

MLX 0.32 commits a command buffer after the operation with which it has more than so many launches,
or more than so many "megabytes". Those are the elements, of any dtype, of the arrays that its
launches read or write, each memory once, in units of 2^20. Every evaluation ends its last buffer,
too. The arrays that a launch touches stay in memory until its buffer completes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.launches import VIEWS

MOST_WIDE = 20  # arrays that MLX puts in order at a time (its MLX_BFS_MAX_WIDTH)
MOST_COMMITTED = 10  # buffers that reached a limit and are not complete: with more, MLX waits


class Limits(NamedTuple):
    """What a command buffer may have without being committed."""

    operations: int
    megabytes: int  # of 2^20 elements


BASE, ULTRA = Limits(40, 40), Limits(50, 50)  # MLX's: of base and Pro chips; of Max and Ultra


class Array(NamedTuple):
    """Its name in a graph, and its size."""

    name: str
    elements: int
    nbytes: int


@dataclass(eq=False)
class Node:
    """A primitive, or one of our kernels."""

    primitive: str
    inputs: list[Array]
    outputs: list[Array]

    @property
    def launches(self) -> int:
        """None of a view; a concatenation copies its parts one by one; one of all others."""
        if self.primitive in VIEWS:
            return 0
        return len(self.inputs) if self.primitive == "Concatenate" else 1


@dataclass
class CommandBuffer:
    """What is in one."""

    piece: int  # which evaluation it belongs to
    launches: int = 0
    elements: int = 0
    made: int = 0  # bytes of the arrays that its launches make
    is_full: bool = False  # reached a limit
    seen: set[str] = field(default_factory=set)  # memories

    def add(self, node: Node, memories: Memories, limits: Limits) -> None:
        self.launches += node.launches
        self.made += sum(array.nbytes for array in node.outputs)
        for array in (*node.inputs, *node.outputs):
            name, elements = memories.of(array)
            if name not in self.seen:
                self.seen.add(name)
                self.elements += elements
        self.is_full = self.launches > limits.operations or self.elements >> 20 > limits.megabytes


class Memories:
    """Whose memory views are, and how many elements of it MLX counts."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, int]] = {}

    def of(self, array: Array) -> tuple[str, int]:
        return self._known.get(array.name, (array.name, array.elements))

    def note(self, view: Node) -> None:
        """A broadcast counts as what it repeats, a slice as what it has.

        (MLX counts the elements from a slice's first to its last, which are more between rows.)
        """
        name, elements = self.of(view.inputs[0])
        for array in view.outputs:
            self._known[array.name] = name, min(elements, array.elements)


@dataclass
class Graph:
    """What a step computes."""

    stored: list[Node]  # of weights alone, computed when they were loaded
    nodes: list[Node]
    pieces: list[list[str]]  # names of the arrays that are evaluated together, one after another

    def command_buffers(self, limits: Limits) -> list[CommandBuffer]:
        """In the order of their commits."""
        memories = Memories()
        for node in self.stored:
            if not node.launches:
                memories.note(node)
        makers = {array.name: node for node in self.nodes for array in node.outputs}
        found: list[CommandBuffer] = []
        for number, names in enumerate(self.pieces):
            wanted = [makers[name] for name in names if name in makers]
            order = evaluation_order(wanted, makers)
            found += _committed(number, order, limits, memories)
            for array in (array for node in order for array in node.outputs):
                del makers[array.name]
        return found


def evaluation_order(wanted: Sequence[Node], makers: dict[str, Node]) -> list[Node]:
    """The order in which MLX evaluates the nodes that `wanted` need, of those in `makers`.

    It lists users before what they use, breadth first, up to `MOST_WIDE` at a time, and evaluates
    from the end of the list.
    """
    root = Node("Synchronize", [node.outputs[0] for node in wanted], [])
    needs: dict[Node, list[Node]] = {}
    uses: dict[Node, int] = {}
    unvisited = [root]
    while unvisited:
        node = unvisited.pop()
        needs[node] = [makers[a.name] for a in node.inputs if a.name in makers]
        for maker in needs[node]:
            if maker not in uses:
                unvisited.append(maker)
            uses[maker] = uses.get(maker, 0) + 1
    listed, reached = [root], 0
    postponed: list[tuple[Node, int]] = []  # from which of its inputs on
    while reached < len(listed) or postponed:
        if reached < len(listed):
            node, first = listed[reached], 0
            reached += 1
        else:
            node, first = postponed.pop()
        for place in range(first, len(needs[node])):
            if len(listed) - reached >= MOST_WIDE:
                postponed.append((node, place))
                break
            maker = needs[node][place]
            uses[maker] -= 1
            if not uses[maker]:
                listed.append(maker)
    return listed[:0:-1]


def _committed(
    piece: int, order: Iterable[Node], limits: Limits, memories: Memories
) -> list[CommandBuffer]:
    found = [CommandBuffer(piece)]
    for node in order:
        if not node.launches:
            memories.note(node)
            continue
        if found[-1].is_full:
            found.append(CommandBuffer(piece))
        found[-1].add(node, memories, limits)
    return found if found[-1].launches else []


def most_held(buffers: Iterable[CommandBuffer], ahead: int | None = None) -> int:
    """Bytes of the arrays that unfinished command buffers make, at most, if the GPU is slow.

    More than there are in truth: MLX also writes results over inputs that nothing else uses.

    Args:
        ahead: evaluations that may be unfinished when the next begins; None: any number.
    """
    unfinished: list[CommandBuffer] = []
    most = 0
    for buffer in buffers:
        if ahead is not None:
            unfinished = [b for b in unfinished if b.piece >= buffer.piece - ahead]
        full = [place for place, b in enumerate(unfinished) if b.is_full]
        if len(full) > MOST_COMMITTED:  # they complete in order
            unfinished = unfinished[full[0] + 1 :]
        unfinished.append(buffer)
        most = max(most, sum(b.made for b in unfinished))
    return most
