"""Answers that are known beforehand, so that a converted model can be checked where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_kimi.checkpoint.fields import read_json
from mlx_kimi.errors import KimiError

FILE = "goldens.json"
PUBLISHED_VOCABULARY = 163840  # tokens of the 48B's tokenizer, and of no other known Kimi Linear


@dataclass(frozen=True)
class Goldens:
    """`texts` and `chats` (one user message each) with their token ids, questions with answers."""

    texts: dict[str, list[int]]
    chats: dict[str, list[int]]
    answers: dict[str, str]  # greedy


# From the published tokenizer: facts about moonshotai/Kimi-Linear-48B-A3B-Instruct.
PUBLISHED = Goldens(
    texts={
        "Hello world": [19180, 2695],
        "Hello, world!": [19180, 11, 2695, 0],
        "你好世界": [33845, 2243],
        "1234567890": [6694, 12972, 16242, 15],
        "中文English混合": [16717, 44372, 13935],
    },
    chats={
        "Tell me about the french revolution.": [
            *(163587, 2482, 163601, 69211, 1019, 1215, 276, 64782, 25317, 13, 163586),
            *(163588, 69702, 163601),
        ]
    },
    answers={},
)


def goldens_of(folder: Path, vocab_size: int) -> Goldens | None:
    """What is known of the model in `folder`: its own goldens.json, else the published model's.

    Raises:
        KimiError: goldens.json is damaged.
    """
    if (folder / FILE).exists():
        return _read(folder / FILE)
    return PUBLISHED if vocab_size == PUBLISHED_VOCABULARY else None


def _read(path: Path) -> Goldens:
    value = read_json(path)
    kinds: dict[str, Any] = {"texts": list, "chats": list, "answers": str}
    for name, kind in kinds.items():
        part = value.get(name)
        if not isinstance(part, dict) or not all(isinstance(v, kind) for v in part.values()):
            raise KimiError(f"{path}: {name} must be an object of {kind.__name__} values")
    return Goldens(value["texts"], value["chats"], value["answers"])
