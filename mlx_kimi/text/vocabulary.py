"""What the two kinds of tokenizer files have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import shown


@dataclass(frozen=True)
class Pieces:
    """What every id stands for.

    Attributes:
        text: UTF-8 bytes by id; a character may be spread over several ids.
        control: the names of control tokens by id.
        droppable: ids whose first character is a space that sentencepiece puts before a text and
            takes off again; empty where there is no such rule.
        drops_more: take it off every piece until one leaves text, not off the first alone.
    """

    text: Sequence[bytes]
    control: Mapping[int, str]
    droppable: frozenset[int] = frozenset()
    drops_more: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """What the two kinds of tokenizer files have in common.

    Attributes:
        file: the file's name, for errors.
        encode: ordinary text to ids. The second argument says that the text starts a sequence:
            sentencepiece puts a space before it.
        pieces: what the ids stand for.
        size: one more than the largest id.
    """

    file: str
    encode: Callable[[str, bool], list[int]]
    pieces: Pieces
    size: int


MOST_IDS = 1 << 20  # of text; the published vocabulary has 163,584
# Every message of a chat is searched for the names of control tokens.
MOST_NAMES, LONGEST_NAME = 4096, 1024  # published: 256 of at most 30 characters
ALL_NAMES = 1 << 18  # characters of all names together


def is_text(name: str) -> bool:
    """Whether it can be written as UTF-8: JSON can spell half a surrogate pair, which cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def check_names(names: Mapping[int, str]) -> None:
    """Refuse names of which two ids have one, and more of them than a chat is searched for.

    Raises:
        KimiError: so it is.
    """
    ids: dict[str, int] = {}
    together = sum(map(len, names.values()))
    if len(names) > MOST_NAMES or together > ALL_NAMES:
        raise KimiError(
            f"there may be {MOST_NAMES} control tokens with {ALL_NAMES} characters of names, but "
            f"there are {len(names)} with {together}"
        )
    for id, name in names.items():
        if len(name) > LONGEST_NAME:
            raise KimiError(
                f"the name of control token {id} may have {LONGEST_NAME} characters, but "
                f"{shown(name)} has {len(name)}"
            )
        if name in ids:
            raise KimiError(
                f"tokenizer_config.json: added_tokens_decoder: a name must have one id, "
                f"but {shown(name)} has {ids[name]} and {id}"
            )
        ids[name] = id
