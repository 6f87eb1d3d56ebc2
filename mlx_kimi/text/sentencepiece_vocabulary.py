"""`tokenizer.model` of sentencepiece: pieces, their kinds, and spaces before a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from mlx_kimi.errors import KimiError
from mlx_kimi.text.control_tokens import ControlTokens
from mlx_kimi.text.vocabulary import MOST_IDS, Pieces, Vocabulary, check_names
from mlx_kimi.user_files import read_bytes


def load_sentencepiece(file: Path, added: Mapping[int, str]) -> Vocabulary:
    """The vocabulary of a sentencepiece model.

    Its control and user-defined pieces are control tokens, except the user-defined ones of one
    character or of spaces alone, which are text; so are the tokens that `added` names, which may
    also extend the vocabulary.

    Raises:
        KimiError: `file` is no sentencepiece model, or a name is given twice.
    """
    model = read_bytes(file)
    processor = _processor(file, model)
    size = processor.get_piece_size()
    if size > MOST_IDS:
        raise KimiError(f"{file}: may have {MOST_IDS} pieces, but has {size}")
    try:
        kinds, spec = _piece_kinds(model), _normalizer(model)
        spelled = [str(processor.id_to_piece(id)) for id in range(size)]
        text = [_piece_text(processor, id) for id in range(size)]
    except (IndexError, KeyError, TypeError, ValueError):  # (of these: a piece that is no UTF-8)
        kinds = []
    if len(kinds) != size:
        raise KimiError(f"{file}: must be a plain sentencepiece model, but cannot be read as one")
    control = {id: name for id, name in enumerate(spelled) if kinds[id] == CONTROL}
    user_defined = {
        id: name
        for id, name in enumerate(spelled)
        if kinds[id] == USER_DEFINED and len(name.strip("\u2581").strip()) > 1
    }
    control.update(user_defined)
    control.update(added)
    check_names(control)
    spaced = [id for id, name in enumerate(spelled) if name.startswith("\u2581")]
    pieces = Pieces(text, control, frozenset(spaced if any(spec) else ()), drops_more=spec[1])
    inside = _processor(file, model + INSIDE)
    encode = _SentencePieceEncoder(processor, inside, control, user_defined.values())
    return Vocabulary(file.name, encode, pieces, max(size - 1, *control) + 1)


# Fields of sentencepiece_model.proto, and kinds of pieces.
PIECES, NORMALIZER_SPEC = 1, 3
PIECE_KIND, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 3, 3, 4
CONTROL, USER_DEFINED = 3, 4
# normalizer_spec { add_dummy_prefix: false remove_extra_whitespaces: false } behind a model that
# has one: protobuf merges a message that comes twice. Text inside a sequence keeps its spaces.
INSIDE = bytes(
    (NORMALIZER_SPEC << 3 | 2, 4, ADD_DUMMY_PREFIX << 3, 0, REMOVE_EXTRA_WHITESPACES << 3, 0)
)


class _SentencePieceEncoder:
    """Ordinary text to ids, without user-defined control tokens that the library would find."""

    def __init__(
        self,
        at_start: sentencepiece.SentencePieceProcessor,
        inside: sentencepiece.SentencePieceProcessor,
        control: Iterable[int],
        user_defined: Iterable[str],
    ) -> None:
        self._at_start, self._inside = at_start, inside
        self._control = frozenset(control)
        self._found_by_library = ControlTokens(user_defined)

    def __call__(self, text: str, at_start: bool) -> list[int]:
        places = self._found_by_library.cuts(text)
        ids: list[int] = []
        for begin, end in zip([0, *places], [*places, len(text)], strict=True):
            processor = self._at_start if at_start and not begin else self._inside
            ids += self._encode(processor, text[begin:end])
        return ids

    def _encode(self, processor: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
        ids: list[int] = processor.encode(text)
        if self._control.isdisjoint(ids):
            return ids
        # Normalization made a spelling, of full-width letters for instance.
        letters = [id for letter in text for id in self._inside.encode(letter)]
        return [id for id in letters if id not in self._control]


def _processor(file: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, ValueError):
        raise KimiError(f"{file}: must be a sentencepiece model, but is not") from None


def _piece_text(processor: sentencepiece.SentencePieceProcessor, id: int) -> bytes:
    piece: str = processor.id_to_piece(id)
    if processor.is_byte(id):
        return bytes([int(piece[3:5], 16)])  # spelled <0xE4>
    if processor.is_unknown(id):
        return str(processor.decode([id])).encode()
    return piece.replace("\u2581", " ").encode()


def _piece_kinds(model: bytes) -> list[int]:
    pieces = (value for field, value in _fields(model) if field == PIECES)
    return [int(dict(_fields(piece)).get(PIECE_KIND, 1)) for piece in pieces]


def _normalizer(model: bytes) -> tuple[bool, bool]:
    """add_dummy_prefix and remove_extra_whitespaces."""
    spec: dict[int, Any] = {}
    for field, value in _fields(model):
        if field == NORMALIZER_SPEC:
            spec.update(_fields(value))
    return bool(spec.get(ADD_DUMMY_PREFIX, 1)), bool(spec.get(REMOVE_EXTRA_WHITESPACES, 1))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protobuf message, which sentencepiece has found to be sound."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while message[at] & 0x80:
        value |= (message[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return value | message[at] << shift, at + 1
