"""Text to token ids and back, from the files of a model folder and nothing else.

Two kinds of vocabulary, one interface: `tiktoken.model` of the published checkpoints, split by
Kimi's own pattern, and `tokenizer.model` of sentencepiece. No code of a folder is ever run, and no
pattern is ever guessed.
"""

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken

from mlx_kimi.errors import KimiError
from mlx_kimi.text.chat_template import (
    ChatTemplate,
    ControlTokens,
    check_messages,
    load_chat_template,
    special_tokens,
)
from mlx_kimi.text.detokenize import Pieces, StreamingDetokenizer

Json = Any
FILE_BYTES = 64 << 20  # the published tiktoken.model has 2.8 MB

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
STOP_NAMES = ("[EOS]", "<|im_end|>", "[EOT]")
SOURCE = "moonshotai/Kimi-Linear-48B-A3B-Instruct"


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


class Tokenizer:
    """One interface for both kinds of vocabulary.

    Attributes:
        vocab_size: one more than the largest id.
        control_tokens: ids of the tokens that are not text, by name.
        stop_ids: control tokens that end an answer.
        chat_template: the folder's template, or the built-in one.
    """

    def __init__(
        self, vocabulary: Vocabulary, stop_ids: Iterable[int], chat_template: ChatTemplate
    ) -> None:
        self.vocab_size = vocabulary.size
        self.control_tokens = {name: id for id, name in vocabulary.pieces.control.items()}
        self.stop_ids = frozenset(stop_ids)
        self.chat_template = chat_template
        self._vocabulary = vocabulary
        self._control = ControlTokens(self.control_tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: the spelling of a control token is text like any other."""
        return self._encode_from(text, True)

    def encode_with_control(self, text: str, mark: str = "") -> list[int]:
        """Ids of trusted text, such as a rendered template, with its control tokens.

        Args:
            text: the text.
            mark: what `ControlTokens.protect` put into spellings that are ordinary text.
        """
        ids: list[int] = []
        for piece, is_control in self._control.split(text, mark):
            if is_control:
                ids.append(self.control_tokens[piece])
            elif piece:
                ids += self._encode_from(piece, not ids)
        return ids

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Text of `ids`, without control tokens unless asked for; broken UTF-8 gives U+FFFD."""
        detokenizer = self.detokenizer(skip_control)
        return "".join([*map(detokenizer.add, ids), detokenizer.finish()])

    def detokenizer(self, skip_control: bool = True) -> StreamingDetokenizer:
        """A new stream of text; it drops control tokens, as `decode` does."""
        return StreamingDetokenizer(self._vocabulary.pieces, skip_control)

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
        template = self.chat_template
        given = {"messages": messages, "tools": tools, **variables}
        fixed = json.dumps(template.variables, ensure_ascii=False)
        protected, mark = self._control.protect(given, template.source(tools), fixed)
        text = template.render(**protected, add_generation_prompt=add_generation_prompt)
        return self.encode_with_control(text, mark)

    def close(self) -> None:
        """End the template's process; without this it ends with the program."""
        self.chat_template.close()

    def _encode_from(self, text: str, at_start: bool) -> list[int]:
        # Half a surrogate pair, which JSON and terminals can bring, is no text.
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._vocabulary.encode(valid, at_start)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        KimiError: a file is missing, cannot be read or contradicts another.
    """
    folder = Path(folder)
    settings = _read_json(folder / "tokenizer_config.json")
    config = _read_json(folder / "config.json")
    vocabulary = _load_vocabulary(folder, settings)
    _check_size(vocabulary, config)
    stops = set(_stop_ids(vocabulary, settings))
    for name, values in (
        ("config.json", config),
        ("generation_config.json", _read_json(folder / "generation_config.json")),
    ):
        stops.update(_eos_ids(name, values, vocabulary.size))
    return Tokenizer(vocabulary, stops, load_chat_template(folder, settings))


def _load_vocabulary(folder: Path, settings: Mapping[str, Json]) -> Vocabulary:
    added = _added_tokens(settings)
    if (folder / "tiktoken.model").is_file():
        return load_tiktoken(folder / "tiktoken.model", added)
    if (folder / "tokenizer.model").is_file():
        return load_sentencepiece(folder / "tokenizer.model", added)
    instead = " (tokenizer.json does not say how Kimi splits text)"
    raise KimiError(
        f"{folder}: tiktoken.model is missing"
        f"{instead if (folder / 'tokenizer.json').is_file() else ''}: "
        f"copy it from {SOURCE} on the Hugging Face hub"
    )


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
    for number, line in enumerate(_read_bytes(file).splitlines(), start=1):
        if not line.strip():
            continue
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
        raise KimiError(f"{where}: must be `base64 rank`, but is {_shown(line)}")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error:
        token = b""
    if not token:
        raise KimiError(f"{where}: the token must be base64, but is {_shown(fields[0])}")
    if not fields[1].isdigit() or len(fields[1]) > 9:
        raise KimiError(f"{where}: the rank must be an integer, but is {_shown(fields[1])}")
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
                f"tokenizer_config.json: added_tokens_decoder: {_shown(name)} must have an id in "
                f"{first}..{first + RESERVED - 1}, the ids after the ranks of tiktoken.model, "
                f"but has {id}"
            )
    taken = set(added.values())
    published = {
        first + place: name for place, name in PUBLISHED_NAMES.items() if name not in taken
    }
    numbered = {id: f"<|reserved_token_{id}|>" for id in range(first, first + RESERVED)}
    names = {**numbered, **published, **added}
    _check_names(names)
    return names


def load_sentencepiece(file: Path, added: Mapping[int, str]) -> Vocabulary:
    """The vocabulary of a sentencepiece model.

    Its control and user-defined pieces are control tokens, except the user-defined ones of one
    character or of spaces alone, which are text; so are the tokens that `added` names, which may
    also extend the vocabulary.

    Raises:
        KimiError: `file` is no sentencepiece model, or a name is given twice.
    """
    model = _read_bytes(file)
    processor = _processor(file, model)
    size = processor.get_piece_size()
    try:
        kinds, spec = _piece_kinds(model), _normalizer(model)
    except (IndexError, KeyError, TypeError, ValueError):
        kinds = []
    if len(kinds) != size:
        raise KimiError(f"{file}: must be a plain sentencepiece model, but cannot be read as one")
    spelled = [str(processor.id_to_piece(id)) for id in range(size)]
    control = {id: name for id, name in enumerate(spelled) if kinds[id] == CONTROL}
    user_defined = {
        id: name
        for id, name in enumerate(spelled)
        if kinds[id] == USER_DEFINED and len(name.strip("\u2581").strip()) > 1
    }
    control.update(user_defined)
    control.update(added)
    _check_names(control)
    text = [_piece_text(processor, id) for id in range(size)]
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


def _added_tokens(settings: Mapping[str, Json]) -> dict[int, str]:
    """Names by id of tokenizer_config.json's added_tokens_decoder."""
    where = "tokenizer_config.json: added_tokens_decoder"
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise KimiError(f"{where} must be an object, but is {_shown(entries)}")
    added: dict[int, str] = {}
    for key, entry in entries.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise KimiError(f"{where}: keys must be ids, but one is {_shown(key)}")
        name = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(name, str) or len(name) < 2:
            raise KimiError(
                f"{where}: {key} must be an object whose content is a name of two characters or "
                f"more, but is {_shown(entry)}"
            )
        if int(key) in added:
            raise KimiError(
                f"{where}: {_shown(added[int(key)])} and {_shown(name)} both have id {int(key)}"
            )
        added[int(key)] = name
    _check_names(added)
    return added


def _check_names(names: Mapping[int, str]) -> None:
    ids: dict[str, int] = {}
    for id, name in names.items():
        if name in ids:
            raise KimiError(
                f"tokenizer_config.json: added_tokens_decoder: a name must have one id, "
                f"but {_shown(name)} has {ids[name]} and {id}"
            )
        ids[name] = id


def _check_size(vocabulary: Vocabulary, config: Mapping[str, Json]) -> None:
    size = config.get("vocab_size")
    if size is None:
        return
    if not isinstance(size, int) or isinstance(size, bool):
        raise KimiError(f"config.json: vocab_size must be an integer, but is {_shown(size)}")
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
                f"but is {_shown(given)}"
            )
    return ids


def _read_bytes(file: Path) -> bytes:
    if file.stat().st_size > FILE_BYTES:
        raise KimiError(f"{file}: may have {FILE_BYTES} bytes, but has {file.stat().st_size}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise KimiError(f"{file}: cannot be read: {error.strerror}") from None


def _read_json(file: Path) -> dict[str, Json]:
    """The object in `file`, empty without the file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_bytes(file).decode(), object_pairs_hook=_object_without_doubles)
    except UnicodeDecodeError as error:
        raise KimiError(f"{file}: must be UTF-8, but byte {error.start} is not") from None
    except RecursionError:
        raise KimiError(f"{file}: nests too deeply") from None
    except ValueError as error:
        raise KimiError(f"{file}: must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise KimiError(f"{file}: must be a JSON object, but is {_shown(value)}")
    return value


def _object_without_doubles(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {_shown(double)} comes twice in one object")
    return found


def _shown(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
