"""States of the prompts that were read, found again by their tokens: a radix tree.

A state is a snapshot of a cache: references to arrays, which states of one text share. A node is
the end of some text, or where two texts part; some nodes hold the state after their last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_kimi.defaults import SNAPSHOT_EVERY
from mlx_kimi.model import cache as caches
from mlx_kimi.model.cache import CacheEntry
from mlx_kimi.server.state_store import StateStore, StoredText

# What an eviction looks at, so that none takes long: these nodes, and a fork a state at most.
MOST_STATES = 2048
NODES_REMEMBERED = 128  # whose states were evicted, to say so
TOKENS_REMEMBERED = 1 << 20  # of theirs and all others; 4 bytes each
HALF_LIFE = 64  # requests after which it is half as likely that a state is wanted again


@dataclass(frozen=True)
class State:
    """A cache after a node's last token, computed."""

    entries: list[CacheEntry]
    hidden: mx.array | None = None  # [1, 1, hidden] of that token, where a prompt ended
    is_shared: bool = False  # other prompts go on from here: the end of system message and tools
    is_answer: bool = False  # the token is the last of an answer, which no prompt may ever repeat

    def arrays(self) -> list[mx.array]:
        return [*caches.arrays(self.entries), *([] if self.hidden is None else [self.hidden])]


@dataclass(eq=False)
class Node:
    """The text from the root to here."""

    ids: np.ndarray  # [n] int32, what follows the parent's text
    length: int  # tokens of the whole text
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)  # by the first token
    state: State | None = None
    stored: StoredText | None = None  # on the disk
    was_evicted: bool = False
    used: int = 0  # the number of the latest request that went on from here
    returns: int = 0  # requests that went on from here though a later state was known


class Found(NamedTuple):
    """What a prompt can go on from."""

    node: Node | None  # with a state, in memory or stored; None: nothing
    shared: int  # tokens that some text begins with, too
    why: str  # why there is no later state, in words

    @property
    def length(self) -> int:
        """Tokens that need not be read."""
        return 0 if self.node is None else self.node.length


class PrefixTree:
    """States of texts, in bounded memory. An array that several states share counts once.

    Where the memory is full, the state goes whose loss costs least: tokens to be read again, times
    how likely they are wanted. The latest state of a conversation stands for all of it; earlier
    ones are for those who go back, which the more do the nearer it is.
    """

    def __init__(self, memory: int, store: StateStore | None = None) -> None:
        """`memory`: bytes of all states. `store`: keeps some on the disk; it may hold some now."""
        self.memory, self._store = memory, store
        self.bytes = self.states = self.evicted = 0
        self._nodes = self._tokens = 0  # of the whole tree, without the root
        self._root = Node(np.zeros(0, np.int32), 0, None)
        self._requests = 0
        self._held: dict[int, list[int]] = {}  # by array's identity: states, bytes
        for known in store.known() if store else ():
            self._node(known.ids).stored = known.text

    # ------------------------------------------------------------------------------- looking up
    def find(self, ids: np.ndarray) -> Found:
        """The latest state that the prompt ids [T] int32 can go on from."""
        node, best, lost = self._root, None, 0
        shared = 0
        while node.length < len(ids):
            child = node.children.get(int(ids[node.length]))
            if child is None:
                break
            count = common_prefix(child.ids, ids[node.length :])
            shared = node.length + count
            if count < len(child.ids):
                break
            node = child
            if _can_be_gone_on_from(node, is_whole=node.length == len(ids)):
                best = node
            elif node.was_evicted:
                lost = node.length
        return Found(best, shared, _why(best, lost, shared, len(ids), is_end=not node.children))

    def use(self, found: Found) -> None:
        """A request goes on from there."""
        self._requests += 1
        if found.node is not None:
            found.node.returns += any(map(_is_of_a_prompt, _below(found.node)))
            found.node.used = self._requests

    def load(self, node: Node, is_whole: bool) -> State:
        """The state of a node that `find` gave; `is_whole`: for a prompt that ends there.

        Raises:
            KimiError: it is on the disk, and cannot be read; `find` does not give it again.
        """
        stored = node.stored if node.stored and node.stored.has_state else None
        if node.state is None or (is_whole and node.state.hidden is None):
            assert self._store is not None and stored is not None
            state = State(*self._store.load(stored))
            if node.state is None:
                self._hold(node, state)
                self.fit()
            return state
        if self._store is not None and stored is not None:
            self._store.touch(stored)
        return node.state

    # ------------------------------------------------------------------------------- adding
    def insert(self, ids: np.ndarray, state: State) -> None:
        """Keep the state after the text ids [T] int32, if there is none yet, as memory allows."""
        node = self._node(ids)
        node.used = max(node.used, self._requests)
        if node.state is not None:
            return
        self._put(node, state)
        self._hold(node, state)
        self.fit()

    def _put(self, node: Node, state: State) -> None:
        """Store a state where prompts go on: at the end of one, or of what several begin with. Of a
        long text between, its tokens: no piece takes the engine long."""
        if self._store is None or state.is_answer:
            return
        before, parts = node.parent, [node.ids]
        while before is not None and not (before.stored and before.stored.is_kept):
            parts.append(before.ids)
            before = before.parent
        ids = np.concatenate(parts[::-1])
        goes_on = state.hidden is not None or state.is_shared
        if goes_on or len(ids) >= SNAPSHOT_EVERY:
            text = before.stored if before is not None else None
            put = self._store.put(text, ids, state.entries, state.hidden, with_state=goes_on)
            node.stored = put or node.stored

    def _hold(self, node: Node, state: State) -> None:
        node.state, node.was_evicted = state, False
        self.states += 1
        for array in state.arrays():
            held = self._held.setdefault(id(array), [0, array.nbytes])
            self.bytes += 0 if held[0] else held[1]
            held[0] += 1

    def _node(self, ids: np.ndarray) -> Node:
        """The node of a text, made where there is none."""
        node = self._root
        while node.length < len(ids):
            rest = ids[node.length :]
            child = node.children.get(int(rest[0]))
            if child is None:
                child = Node(rest.copy(), len(ids), node, used=self._requests)
                node.children[int(rest[0])] = child
                self._nodes += 1
                self._tokens += len(rest)
                return child
            count = common_prefix(child.ids, rest)
            if count < len(child.ids):
                child = _split(child, count)
                self._nodes += 1
            node = child
        return node

    # ------------------------------------------------------------------------------- forgetting
    def fit(self) -> None:
        """Evict states until the rest takes no more than `memory`."""
        while self.states and (self.bytes > self.memory or self.states > MOST_STATES):
            costs = list(self._costs())
            self._evict(min(costs, key=lambda pair: pair[1])[0])
        if self._remembers_more_than(1):
            while self._remembers_more_than(0.5) and (nodes := self._forgettable()):
                for node in nodes[: -(-len(nodes) // 2)]:
                    self._forget(node)

    def clear(self, memory: int) -> None:
        """Evict states until the rest takes no more than so many bytes."""
        kept, self.memory = self.memory, memory
        self.fit()
        self.memory = kept

    def _evict(self, node: Node) -> None:
        assert node.state is not None
        for array in node.state.arrays():
            held = self._held[id(array)]
            held[0] -= 1
            if not held[0]:
                self.bytes -= held[1]
                del self._held[id(array)]
        node.state, node.was_evicted = None, True
        self.states -= 1
        self.evicted += 1

    def _costs(self) -> Iterator[tuple[Node, float]]:
        """What the loss of each state costs: tokens, times how likely they are wanted again.

        Where prompts part, the longest goes on, or one that is almost as long and was used later.
        Its latest state stands for all its tokens; that of another for those since they parted.
        """
        nodes = list(_below(self._root))  # parents before children
        longest = {self._root: 0.0}  # tokens of the longest text at or below a node, aged
        nearest = dict[Node, int]()  # the length of the next later state below
        for node in reversed(nodes):
            parent = node.parent
            assert parent is not None
            own = self._aged(node, node.length) if _is_of_a_prompt(node) else 0.0
            longest[node] = max(own, longest.get(node, 0.0))
            longest[parent] = max(longest.get(parent, 0.0), longest[node])
            later = node.length if _is_of_a_prompt(node) else nearest.get(node)
            if later is not None:
                nearest[parent] = min(later, nearest.get(parent, later))
        before = {self._root: 0}  # the length of the latest state at or above a node
        parted = {self._root: 0}  # where the longer text parts from a node's
        for node in nodes:
            parent = node.parent
            assert parent is not None
            before[node] = node.length if node.state else before[parent]
            parted[node] = parent.length if longest[parent] > longest[node] else parted[parent]
            if node.state is None:
                continue
            cost = float(node.length - before[parent])
            if node in nearest:
                back = nearest[node] - node.length
                cost *= node.returns + 1 / (1 + back / SNAPSHOT_EVERY)
            elif _is_of_a_prompt(node):
                cost = node.length - parted[node]
            yield node, self._aged(node, cost)

    def _aged(self, node: Node, value: float) -> float:
        return value / (1 + (self._requests - node.used) / HALF_LIFE)

    def _remembers_more_than(self, share: float) -> bool:
        """Of what may be remembered beside the states."""
        stored = 0 if self._store is None else self._store.texts
        nodes = self._nodes - 2 * (self.states + stored)  # (forks are no more than those)
        return self._tokens > share * TOKENS_REMEMBERED or nodes > share * NODES_REMEMBERED

    def _forgettable(self) -> list[Node]:
        """Nodes that hold no state, where no texts part; those used longest ago first."""
        nodes = [
            node
            for node in _below(self._root)
            if len(node.children) < 2
            and not node.state
            and not (node.stored and node.stored.is_kept)
        ]
        return sorted(nodes, key=lambda node: node.used)

    def _forget(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        self._nodes -= 1
        if node.children:
            (only,) = node.children.values()
            only.ids, only.parent = np.concatenate([node.ids, only.ids]), parent
            parent.children[int(only.ids[0])] = only
        else:
            del parent.children[int(node.ids[0])]
            self._tokens -= len(node.ids)


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two arrays [n] and [m] begin with in common."""
    shortest = min(len(first), len(second))
    differs = first[:shortest] != second[:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def as_array(ids: Sequence[int]) -> np.ndarray:
    """Token ids as the tree takes them."""
    return np.array(ids, np.int32)


def _below(node: Node) -> Iterator[Node]:
    """All nodes under one, parents before children."""
    waiting = list(node.children.values())
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children.values()


def _can_be_gone_on_from(node: Node, is_whole: bool) -> bool:
    """`is_whole`: nothing follows, and the hidden state of its last token is needed."""
    if node.state is not None and (node.state.hidden is not None or not is_whole):
        return True
    stored = node.stored
    return stored is not None and stored.has_state and (stored.is_answered or not is_whole)


def _is_of_a_prompt(node: Node) -> bool:
    return node.state is not None and not node.state.is_answer


def _split(node: Node, count: int) -> Node:
    """A new node after the first `count` tokens of this one's, which is then its child."""
    parent = node.parent
    assert parent is not None
    middle = Node(node.ids[:count].copy(), parent.length + count, parent, used=node.used)
    middle.children[int(node.ids[count])] = node
    parent.children[int(node.ids[0])] = middle
    node.ids, node.parent = node.ids[count:].copy(), middle
    return middle


def _why(best: Node | None, lost: int, shared: int, total: int, is_end: bool) -> str:
    known = 0 if best is None else best.length
    if known == total:
        return "all of it was read before"
    if not shared:
        return "no earlier prompt begins with these tokens"
    if lost > known:
        return f"its state after token {lost:,} was evicted for memory"
    if known == shared and is_end:
        return f"what follows token {known:,} is new"
    if shared == total:
        return "no state is kept where it ends"
    return f"differs from what was read at token {shared:,}"
