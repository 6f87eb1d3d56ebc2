"""Text from token ids, one token at a time and never half a character."""

import codecs

from mlx_kimi.text.vocabulary import Pieces

REPLACEMENT = "\ufffd".encode()


class StreamingDetokenizer:
    """Text that is safe to print, as tokens arrive.

    Bytes wait until they are a character; those that can no longer become one turn into U+FFFD.
    A control token ends what waits: characters never join across it. An id that the vocabulary
    lacks becomes U+FFFD. `"".join(map(add, ids)) + finish()` is `Tokenizer.decode(ids)`.
    """

    def __init__(self, pieces: Pieces, skip_control: bool = True) -> None:
        self._pieces = pieces
        self._skip_control = skip_control
        self._at_start = bool(pieces.droppable)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Take one id; return the text that it completes, possibly none."""
        name = self._pieces.control.get(token)
        if name is None:
            return self._decoder.decode(self._bytes(token))
        waiting = self.finish()
        if self._skip_control:
            return waiting
        self._at_start = False
        return waiting + name

    def finish(self) -> str:
        """The rest: U+FFFD if bytes still wait for the end of their character, else nothing."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        known = 0 <= token < len(self._pieces.text)
        piece = self._pieces.text[token] if known else REPLACEMENT
        if self._at_start and token in self._pieces.droppable:
            piece = piece[1:]
            self._at_start = not piece and self._pieces.drops_more
        elif piece:
            self._at_start = False
        return piece
