"""A tokenizer as llguidance knows it, made once, when the first answer must obey something."""

from __future__ import annotations

from threading import Lock
from weakref import WeakKeyDictionary

from llguidance import LLTokenizer

from mlx_kimi.errors import KimiError
from mlx_kimi.text.tokenizer import Tokenizer
from mlx_kimi.text.vocabulary import Vocabulary

_made: WeakKeyDictionary[Tokenizer, LLTokenizer] = WeakKeyDictionary()
_turn = Lock()


class _Wrapper:
    """What `LLTokenizer` asks of a tokenizer: the bytes of ids, and the ids of a text.

    Where a grammar leaves one text alone, masks allow only the ids that are given for it here.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, eos_token_id: int) -> None:
        pieces = vocabulary.pieces
        self.eos_token_id = eos_token_id
        self.special_token_ids = [*pieces.control]
        self.tokens = [*pieces.text, *[b""] * (vocabulary.size - len(pieces.text))]
        for id, name in pieces.control.items():
            self.tokens[id] = name.encode("utf-8", "replace")
        self._encode = vocabulary.encode
        self._ids = {piece: id for id, piece in enumerate(self.tokens) if id not in pieces.control}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        ids = self._encode(text, False)
        spelled = text.encode()
        # Normalization may give the ids of another text.
        is_same = b"".join(self.tokens[id] for id in ids) == spelled
        return ids if is_same else self._longest_pieces(spelled)

    def _longest_pieces(self, text: bytes) -> list[int]:
        ids, at = list[int](), 0
        while at < len(text):
            lengths = range(min(self._longest, len(text) - at), 0, -1)
            length = next((n for n in lengths if text[at : at + n] in self._ids), 0)
            if not length:
                break  # what is left has no ids at all
            ids.append(self._ids[text[at : at + length]])
            at += length
        return ids


def vocabulary_of(tokenizer: Tokenizer) -> LLTokenizer:
    """The tokenizer for llguidance: of 163,840 ids it takes a second to make.

    Raises:
        KimiError: no token ends an answer.
    """
    with _turn:
        made = _made.get(tokenizer)
        if made is None:
            if not tokenizer.stop_ids:
                raise KimiError("an answer can obey a schema only where some token can end it")
            stops = sorted(tokenizer.stop_ids)
            # (its types ask for a class that takes the tokenizer of another package)
            wrapper: object = _Wrapper(tokenizer.vocabulary, stops[0])
            made = LLTokenizer(wrapper, eos_token=stops)  # type: ignore[arg-type]
            _made[tokenizer] = made
        return made
