"""How many kernels a GPU launches for a result, counted from MLX's graph of it."""

from __future__ import annotations

import re
from collections import Counter
from io import StringIO

import mlx.core as mx

# Primitives that give another view of the same memory. (A reshape of what is not contiguous would
# copy; an array that a layer reshapes is contiguous here.)
VIEWS = {
    "AsStrided",
    "Broadcast",
    "Copy",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
}


def launches(*results: mx.array) -> Counter[str]:
    """Launches by primitive, of a graph that is not evaluated yet.

    A concatenation copies its parts one by one.
    """
    text = StringIO()
    mx.export_to_dot(text, *results)
    return _count(text.getvalue())


def _count(dot: str) -> Counter[str]:
    nodes = dict(re.findall(r'(\d+) \[label ="([^"]+)", shape=rectangle\]', dot))
    found: Counter[str] = Counter()
    for number, name in nodes.items():
        if name in VIEWS:
            continue
        parts = len(re.findall(rf"-> {number}\b", dot)) if name == "Concatenate" else 1
        found[name] += parts
    return found
