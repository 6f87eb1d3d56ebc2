"""Text to token ids and back, from the files of a model folder and nothing else.

Two kinds of vocabulary, one interface: `tiktoken.model` of the published checkpoints, split by
Kimi's own pattern, and `tokenizer.model` of sentencepiece. No code of a folder is ever run, and no
pattern is ever guessed.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

from mlx_kimi.errors import KimiError
from mlx_kimi.text.chat_template import (
    ChatTemplate,
    check_messages,
    load_chat_template,
    special_tokens,
)
from mlx_kimi.text.control_tokens import REMEMBERED, SHORT, ControlTokens
from mlx_kimi.text.detokenize import REPLACEMENT, StreamingDetokenizer
from mlx_kimi.text.sentencepiece_vocabulary import load_sentencepiece
from mlx_kimi.text.tiktoken_vocabulary import load_tiktoken
from mlx_kimi.text.vocabulary import Vocabulary, check_names, is_text
from mlx_kimi.user_files import Json, is_there, read_json_if_there, shown

STOP_NAMES = ("[EOS]", "<|im_end|>", "[EOT]")
SOURCE = "moonshotai/Kimi-Linear-48B-A3B-Instruct"


class Encoded(NamedTuple):
    """The ids of a text, and where both may be cut: behind each of its control tokens."""

    text: str = ""
    mark: str = ""
    ids: Sequence[int] = ()
    ends: Sequence[int] = ()  # of its control tokens
    counts: Sequence[int] = ()  # of the ids up to each end

    def shared(self, text: str, mark: str, longest: int) -> int:
        """How many control tokens another text begins with too, so that the ids are the same.

        `longest`: characters of a control token. So many more must be the same: a longer token
        might begin where one of these does.
        """

        def differs(end: int) -> bool:
            needed = end + longest
            return needed > len(self.text) or not text.startswith(self.text[:needed])

        return bisect_left(self.ends, True, key=differs) if mark == self.mark else 0


class Tokenizer:
    """One interface for both kinds of vocabulary.

    Attributes:
        vocabulary: of the folder's file.
        vocab_size: one more than the largest id.
        control_tokens: ids of the tokens that are not text, by name.
        stop_ids: control tokens that end an answer.
        chat_template: the folder's template, or the built-in one.
        control: what keeps control tokens apart from their spellings.
    """

    def __init__(
        self, vocabulary: Vocabulary, stop_ids: Iterable[int], chat_template: ChatTemplate
    ) -> None:
        self.vocab_size = vocabulary.size
        self.control_tokens = {name: id for id, name in vocabulary.pieces.control.items()}
        self.stop_ids = frozenset(stop_ids)
        self.chat_template = chat_template
        self.vocabulary = vocabulary
        self.control = ControlTokens(self.control_tokens)
        self._encode_short = lru_cache(REMEMBERED)(vocabulary.encode)
        self._latest = Encoded()  # a chat's next text begins as this one does

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: the spelling of a control token is text like any other."""
        return self._encode_from(text, True)

    def encode_with_control(self, text: str, mark: str = "") -> list[int]:
        """Ids of trusted text, such as a rendered template, with its control tokens.

        Args:
            text: the text.
            mark: what `ControlTokens.protect` put into spellings that are ordinary text.
        """
        same = self._latest.shared(text, mark, self.control.longest)
        self._latest = self.encode_after(self._latest, same, text, mark)
        return list(self._latest.ids)

    def encode_after(self, known: Encoded, same: int, text: str, mark: str) -> Encoded:
        """The same for a text that shares its first `same` control tokens with `known`."""
        ends, counts = [*islice(known.ends, same)], [*islice(known.counts, same)]
        ids = [*islice(known.ids, counts[-1] if counts else 0)]
        start = ends[-1] if ends else 0
        new = self.control.ends(text, start)
        for begin, end in pairwise([start, *new, len(text)]):
            for piece, is_control in self.control.split(text[begin:end], mark):
                if is_control:
                    ids.append(self.control_tokens[piece])
                elif piece:
                    ids += self._encode_from(piece, not ids)
            counts.append(len(ids))
        ends += new
        counts.pop()
        return Encoded(text, mark, ids, ends, counts)

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Text of `ids`, without control tokens unless asked for; broken UTF-8 gives U+FFFD."""
        detokenizer = self.detokenizer(skip_control)
        return "".join([*map(detokenizer.add, ids), detokenizer.finish()])

    def bytes_of(self, id: int) -> bytes:
        """What an id stands for by itself: a character may need several; a control token's name."""
        pieces = self.vocabulary.pieces
        name = pieces.control.get(id)
        if name is not None:
            return name.encode("utf-8", "replace")
        return pieces.text[id] if 0 <= id < len(pieces.text) else REPLACEMENT

    def detokenizer(self, skip_control: bool = True) -> StreamingDetokenizer:
        """A new stream of text; it drops control tokens, as `decode` does."""
        return StreamingDetokenizer(self.vocabulary.pieces, skip_control)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Json]],
        tools: Sequence[Mapping[str, Json]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Json,
    ) -> list[int]:
        """Ids of a chat. Nothing in the messages, tools or variables becomes a control token.

        Raises:
            KimiError: the messages have no chat's form, or the template fails or refuses them.
        """
        check_messages(messages, tools)
        given = {"messages": messages, "tools": tools, **variables}
        protected, mark = self.protect(given)
        text = self.chat_template.render(**protected, add_generation_prompt=add_generation_prompt)
        return self.encode_with_control(text, mark)

    def protect(self, given: Mapping[str, Json]) -> tuple[dict[str, Json], str]:
        """A template's variables as `ControlTokens.protect` gives them, and the mark."""
        template = self.chat_template
        fixed = json.dumps(template.variables, ensure_ascii=False)
        return self.control.protect(given, template.source(given.get("tools")), fixed)

    def close(self) -> None:
        """End the template's process; without this it ends with the program."""
        self.chat_template.close()

    def _encode_from(self, text: str, at_start: bool) -> list[int]:
        # Half a surrogate pair, which JSON and terminals can bring, is no text.
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if len(valid) > SHORT:
            return self.vocabulary.encode(valid, at_start)
        return list(self._encode_short(valid, at_start))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        KimiError: a file is missing, cannot be read or contradicts another.
    """
    folder = Path(folder)
    settings = read_json_if_there(folder / "tokenizer_config.json")
    config = read_json_if_there(folder / "config.json")
    vocabulary = _load_vocabulary(folder, settings)
    _check_size(vocabulary, config)
    stops = set(_stop_ids(vocabulary, settings))
    for name, values in (
        ("config.json", config),
        ("generation_config.json", read_json_if_there(folder / "generation_config.json")),
    ):
        stops.update(_eos_ids(name, values, vocabulary.size))
    return Tokenizer(vocabulary, stops, load_chat_template(folder, settings))


def _load_vocabulary(folder: Path, settings: Mapping[str, Json]) -> Vocabulary:
    added = _added_tokens(settings)
    if is_there(folder / "tiktoken.model"):
        return load_tiktoken(folder / "tiktoken.model", added)
    if is_there(folder / "tokenizer.model"):
        return load_sentencepiece(folder / "tokenizer.model", added)
    instead = " (tokenizer.json does not say how Kimi splits text)"
    raise KimiError(
        f"{folder}: tiktoken.model is missing"
        f"{instead if (folder / 'tokenizer.json').is_file() else ''}: "
        f"copy it from {SOURCE} on the Hugging Face hub"
    )


def _added_tokens(settings: Mapping[str, Json]) -> dict[int, str]:
    """Names by id of tokenizer_config.json's added_tokens_decoder."""
    where = "tokenizer_config.json: added_tokens_decoder"
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise KimiError(f"{where} must be an object, but is {shown(entries)}")
    added: dict[int, str] = {}
    for key, entry in entries.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise KimiError(f"{where}: keys must be ids, but one is {shown(key)}")
        name = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(name, str) or len(name) < 2 or not is_text(name):
            raise KimiError(
                f"{where}: {key} must be an object whose content is a name of two characters or "
                f"more, and no half of a surrogate pair, but is {shown(entry)}"
            )
        if int(key) in added:
            raise KimiError(
                f"{where}: {shown(added[int(key)])} and {shown(name)} both have id {int(key)}"
            )
        added[int(key)] = name
    check_names(added)
    return added


def _check_size(vocabulary: Vocabulary, config: Mapping[str, Json]) -> None:
    size = config.get("vocab_size")
    if size is None:
        return
    if not isinstance(size, int) or isinstance(size, bool):
        raise KimiError(f"config.json: vocab_size must be an integer, but is {shown(size)}")
    if vocabulary.size > size:
        raise KimiError(
            f"{vocabulary.file}: has {vocabulary.size} ids with its control tokens, "
            f"but vocab_size of config.json allows {size}"
        )


def _stop_ids(vocabulary: Vocabulary, settings: Mapping[str, Json]) -> Iterator[int]:
    names = {*STOP_NAMES, special_tokens(settings).get("eos_token")}
    return (id for id, name in vocabulary.pieces.control.items() if name in names)


def _eos_ids(file: str, config: Mapping[str, Json], size: int) -> list[int]:
    given = config.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for id in ids:
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < size:
            raise KimiError(
                f"{file}: eos_token_id must be an id below {size} or a list of them, "
                f"but is {shown(given)}"
            )
    return ids
