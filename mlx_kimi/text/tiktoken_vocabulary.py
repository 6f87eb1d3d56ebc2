"""`tiktoken.model` of the published checkpoints: ranks, Kimi's own split, 256 control tokens."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import tiktoken

from mlx_kimi.errors import KimiError
from mlx_kimi.text.vocabulary import MOST_IDS, Pieces, Vocabulary, check_names
from mlx_kimi.user_files import read_bytes, shown

# How Kimi models cut text before merging bytes. The class intersection `&&` is understood by the
# engine of tiktoken and not by Python's `re`.
SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# Longer texts are cut first, as the published tokenizer does: a million spaces exhaust the engine.
TEXT_CHARACTERS = 400_000
RUN_CHARACTERS = 25_000  # consecutive characters that are all, or none of them, white space
LONG_RUN = re.compile(rf"(?<!\s)\s{{{RUN_CHARACTERS + 1},}}|(?<!\S)\S{{{RUN_CHARACTERS + 1},}}")

RESERVED = 256  # ids after the ranks
PUBLISHED_NAMES = {  # counted from the first of them, 163584 in the published checkpoint
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}


def load_tiktoken(file: Path, added: Mapping[int, str]) -> Vocabulary:
    """The vocabulary of ranks in `file`, and the 256 control tokens after them.

    Raises:
        KimiError: the file is no such list, or `added` names ids that are not among the 256.
    """
    ranks = _read_ranks(file)
    names = _reserved_names(len(ranks), added)
    control = {name: id for id, name in names.items()}
    encoding = tiktoken.Encoding(
        file.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=control
    )

    def encode(text: str, at_start: bool) -> list[int]:
        return [id for piece in cut(text) for id in encoding.encode_ordinary(piece)]

    text = sorted(ranks, key=ranks.__getitem__)
    return Vocabulary(file.name, encode, Pieces(text, names), len(ranks) + RESERVED)


def cut(text: str) -> Iterator[str]:
    """`text` in pieces of at most 400,000 characters, and runs of at most 25,000."""
    for start in range(0, len(text), TEXT_CHARACTERS):
        part = text[start : start + TEXT_CHARACTERS]
        begin = 0
        for run in LONG_RUN.finditer(part):
            for end in range(run.start() + RUN_CHARACTERS, run.end(), RUN_CHARACTERS):
                yield part[begin:end]
                begin = end
        yield part[begin:]


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Ranks by token: every rank from 0 on, every single byte, nothing twice."""
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}  # by rank
    for number, line in enumerate(read_bytes(file).splitlines(), start=1):
        if not line.strip():
            continue
        if number > MOST_IDS:
            raise KimiError(f"{file}: may have {MOST_IDS} lines, but has more")
        where = f"{file}: line {number}"
        token, rank = _parse_rank(where, line)
        if rank in lines:
            raise KimiError(f"{where}: rank {rank} is taken by line {lines[rank]}")
        if token in ranks:
            raise KimiError(f"{where}: the token of rank {rank} already has rank {ranks[token]}")
        ranks[token], lines[rank] = rank, number
    _check_ranks(file, ranks, lines)
    return ranks


def _parse_rank(where: str, line: bytes) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2:
        raise KimiError(f"{where}: must be `base64 rank`, but is {shown(line)}")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error:
        token = b""
    if not token:
        raise KimiError(f"{where}: the token must be base64, but is {shown(fields[0])}")
    if not fields[1].isdigit() or len(fields[1]) > 9:
        raise KimiError(f"{where}: the rank must be an integer, but is {shown(fields[1])}")
    return token, int(fields[1])


def _check_ranks(file: Path, ranks: Mapping[bytes, int], lines: Mapping[int, int]) -> None:
    if not ranks:
        raise KimiError(f"{file}: must hold lines `base64 rank`, but is empty")
    missing = next((rank for rank in range(len(ranks)) if rank not in lines), None)
    if missing is not None:
        last = max(lines)
        raise KimiError(
            f"{file}: line {lines[last]}: rank {last}, but no line has rank {missing}: "
            f"ranks must count up from 0"
        )
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise KimiError(f"{file}: every byte must be a token, but 0x{byte:02X} is not")


def _reserved_names(first: int, added: Mapping[int, str]) -> dict[int, str]:
    """The names of the 256 ids from `first` on: the folder's, the published ones, numbers."""
    for id, name in added.items():
        if not first <= id < first + RESERVED:
            raise KimiError(
                f"tokenizer_config.json: added_tokens_decoder: {shown(name)} must have an id in "
                f"{first}..{first + RESERVED - 1}, the ids after the ranks of tiktoken.model, "
                f"but has {id}"
            )
    taken = set(added.values())
    published = {
        first + place: name for place, name in PUBLISHED_NAMES.items() if name not in taken
    }
    numbered = {id: f"<|reserved_token_{id}|>" for id in range(first, first + RESERVED)}
    names = {**numbered, **published, **added}
    check_names(names)
    return names
