"""Tokenizers from real files: the published split, control tokens, streaming, bad input."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
import sentencepiece
import tiktoken

from mlx_kimi.errors import KimiError
from mlx_kimi.text.tiktoken_vocabulary import RUN_CHARACTERS, cut
from mlx_kimi.text.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer_files import (
    ALL_BYTES,
    SAMPLE,
    rank_lines,
    trained_tokens,
    write_json,
    write_sentencepiece,
    write_tiktoken,
)

# The published pattern, spelled here once more and in one piece.
PUBLISHED = (
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}"
    r"\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}"
    r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m"
    r"|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "CamelCaseWord": ["Camel", "Case", "Word"],
    "I'm fine": ["I'm", " fine"],
    "IT'S": ["IT'S"],
    "中文English混合": ["中文", "English", "混合"],
    "getHTTPResponse()": ["get", "HTTPResponse", "()"],
    "1234567890": ["123", "456", "789", "0"],
    "a  b": ["a", " ", " b"],
    "x = 1;\n\n  y": ["x", " =", " ", "1", ";\n\n", " ", " y"],
    "日本語ひらがな": ["日本語", "ひらがな"],
    "snake_case": ["snake", "_case"],
}


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    tokenizer = load_tokenizer(write_tiktoken(tmp_path_factory.mktemp("tiktoken")))
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def sentences(sentence_folder: Path) -> Iterator[Tokenizer]:
    tokenizer = load_tokenizer(sentence_folder)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(params=["kimi", "sentences"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def id_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    return tokenizer.vocabulary.pieces.text[id]


def random_texts(count: int, alphabet: str = "aB1 \n\t'.<|中é😀[]ー\u0301") -> list[str]:
    chooser = random.Random(1)
    words = [*alphabet, *SAMPLE.split(), "'s", "  ", "\r\n", "<|im_end|>", "<tool>x", "[EOT]"]
    return ["".join(chooser.choices(words, k=chooser.randrange(30))) for _ in range(count)]


# Encoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "parts"), SPLITS.items())
def test_text_is_split_as_published(text: str, parts: list[str], tmp_path: Path) -> None:
    """Every part is a token, and so is everything longer that a wrong split could find."""
    whole = {text[a:b].encode() for a in range(len(text)) for b in range(a + 1, len(text) + 1)}
    tokens = dict.fromkeys([*ALL_BYTES, *sorted(whole)])
    tokenizer = load_tokenizer(write_tiktoken(tmp_path, tokens))
    assert [id_bytes(tokenizer, id).decode() for id in tokenizer.encode(text)] == parts
    assert regex.findall(PUBLISHED, text, flags=regex.V1) == parts
    tokenizer.close()


def test_ids_are_those_of_tiktoken_with_the_published_pattern(kimi: Tokenizer) -> None:
    ranks = {token: rank for rank, token in enumerate(trained_tokens())}
    oracle = tiktoken.Encoding(
        "oracle", pat_str=PUBLISHED, mergeable_ranks=ranks, special_tokens={}
    )
    for text in [SAMPLE, *random_texts(500)]:
        assert kimi.encode(text) == oracle.encode_ordinary(text)
    assert len(kimi.encode(SAMPLE)) < len(SAMPLE.encode()) / 2  # the merges took part


def test_decode_undoes_encode(kimi: Tokenizer) -> None:
    for text in [SAMPLE, "", "\0", *random_texts(300)]:
        assert kimi.decode(kimi.encode(text)) == text


def slow_cut(text: str) -> list[str]:
    """The published rule, character by character."""
    pieces = []
    for start in range(0, len(text), 400_000):
        part, begin, run = text[start : start + 400_000], 0, 0
        for place, character in enumerate(part):
            same = place and character.isspace() == part[place - 1].isspace()
            run = run + 1 if same else 1
            if run > 25_000:
                pieces.append(part[begin:place])
                begin, run = place, 1
        pieces.append(part[begin:])
    return pieces


@pytest.mark.parametrize(
    "text",
    [
        "a" * 25_000 + " " * 25_000 + "b",
        "a" * 25_001,
        "x" + " " * 50_000 + "y",
        "x " * 10 + "y" * 50_001 + " " * 75_002 + "z",
        "word " * 100_000,
        "a" * 399_999 + " b" * 3,
    ],
    ids=len,
)
def test_long_runs_are_cut_as_published(text: str) -> None:
    assert list(cut(text)) == slow_cut(text)
    assert "".join(cut(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [" " * 1_000_000, "a" * 1_000_000, ("x" + " " * (RUN_CHARACTERS - 1)) * 40, "\u0301" * 500_000],
    ids=["spaces", "letters", "almost", "marks"],
)
def test_a_million_characters(text: str, kimi: Tokenizer) -> None:
    before = time.monotonic()
    assert kimi.decode(kimi.encode(text)) == text
    assert time.monotonic() - before < 10


def test_half_a_surrogate_pair_is_replaced(kimi: Tokenizer, sentences: Tokenizer) -> None:
    assert kimi.decode(kimi.encode("a\ud800b")) == "a\ufffdb"
    assert sentences.decode(sentences.encode("a\ud800b")) == "a b"  # its NFKC makes a space of it


# Control tokens ------------------------------------------------------------------------------


def test_published_names_are_the_default(kimi: Tokenizer) -> None:
    first = len(trained_tokens())
    names = {
        "[BOS]": 163584, "[EOS]": 163585, "<|im_end|>": 163586, "<|im_user|>": 163587,
        "<|im_assistant|>": 163588, "<|start_header_id|>": 163590, "<|end_header_id|>": 163591,
        "[EOT]": 163593, "<|im_system|>": 163594, "<|tool_calls_section_begin|>": 163595,
        "<|tool_calls_section_end|>": 163596, "<|tool_call_begin|>": 163597,
        "<|tool_call_argument_begin|>": 163598, "<|tool_call_end|>": 163599,
        "<|im_middle|>": 163601, "[UNK]": 163838, "[PAD]": 163839,
    }  # fmt: skip
    for name, id in names.items():
        assert kimi.control_tokens[name] == id - 163584 + first
    unnamed = f"<|reserved_token_{first + 5}|>"
    assert kimi.control_tokens[unnamed] == first + 5
    assert len(kimi.control_tokens) == 256
    assert kimi.vocab_size == first + 256
    assert kimi.stop_ids == {first + 1, first + 2, first + 9}


def added(names: dict[int, str]) -> dict[str, Any]:
    return {str(id): {"content": name, "special": True} for id, name in names.items()}


def test_the_folder_names_its_tokens(tmp_path: Path) -> None:
    names = {258: "<|stop|>", 260: "<|im_end|>"}
    write_tiktoken(tmp_path, ALL_BYTES, added_tokens_decoder=added(names), eos_token="<|stop|>")
    write_json(tmp_path / "config.json", {"eos_token_id": 300, "vocab_size": 512})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [301, 65]})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.control_tokens["<|stop|>"] == 258
    assert tokenizer.control_tokens["<|im_end|>"] == 260
    assert tokenizer.control_tokens["<|im_user|>"] == 259
    assert len(tokenizer.control_tokens) == 256
    assert tokenizer.stop_ids == {257, 258, 260, 265, 300, 301, 65}
    tokenizer.close()


def test_typed_control_tokens_are_text(tokenizer: Tokenizer) -> None:
    controls = set(tokenizer.control_tokens.values())
    for name in tokenizer.control_tokens:
        for text in (name, f"a {name} b", name + name, name[:3] + name + name[3:]):
            ids = tokenizer.encode(text)
            assert controls.isdisjoint(ids)
            assert tokenizer.decode(ids) == text


def test_trusted_control_tokens_are_tokens(tokenizer: Tokenizer) -> None:
    end = tokenizer.control_tokens["<|im_end|>"]
    user = tokenizer.control_tokens["<|im_user|>"]
    ids = tokenizer.encode_with_control("<|im_user|>the model<|im_end|><|im_end|>")
    assert (ids[0], ids[-2:]) == (user, [end, end])
    assert tokenizer.decode(ids) == "the model"
    assert tokenizer.decode(ids, skip_control=False) == "<|im_user|>the model<|im_end|><|im_end|>"
    assert tokenizer.encode_with_control("the model") == tokenizer.encode("the model")
    assert tokenizer.encode_with_control("") == []


def test_what_was_encoded_before_changes_no_ids(tmp_path: Path) -> None:
    """Random texts that grow, shrink and change, with names that begin with each other."""
    first = len(trained_tokens())
    names = {first: "<a", first + 1: "<ab>", first + 2: "<ab><a>", first + 3: "b><"}
    write_tiktoken(tmp_path, added_tokens_decoder=added(names))
    tokenizer, fresh = load_tokenizer(tmp_path), load_tokenizer(tmp_path)
    chooser, text = random.Random(0), ""
    pieces = ["<", "a", "b", ">", "word ", "\ue000", "\ud83d", *names.values()]
    for _ in range(3000):
        kept = text[: chooser.randint(0, len(text))] if chooser.random() < 0.3 else text
        text = kept + "".join(chooser.choices(pieces, k=chooser.randint(0, 6)))
        mark = chooser.choice(["\ue000", "\ue000", "\ue000", ""])
        fresh._latest = type(fresh._latest)()
        assert tokenizer.encode_with_control(text, mark) == fresh.encode_with_control(text, mark)
    tokenizer.close()
    fresh.close()


def test_apply_chat_template_gives_the_published_ids(kimi: Tokenizer) -> None:
    id = kimi.control_tokens
    question = "Tell me about the french revolution."
    assert kimi.apply_chat_template([{"role": "user", "content": question}]) == [
        id["<|im_user|>"],
        *kimi.encode("user"),
        id["<|im_middle|>"],
        *kimi.encode(question),
        id["<|im_end|>"],
        id["<|im_assistant|>"],
        *kimi.encode("assistant"),
        id["<|im_middle|>"],
    ]


@pytest.mark.parametrize(
    "typed",
    [
        "<|im_end|>",
        "<|im_<|im_end|>end|>",
        "<|im_end",
        "|>",
        "<",
        "[EOT]",
        "\ue000<|im_end|>",
        "im",
    ],
)
def test_a_message_cannot_end_itself(typed: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": typed},
            {"role": "tool", "name": typed, "tool_call_id": typed, "content": typed},
        ],
        tools=[{"function": {"name": typed, typed: typed}}],
    )
    plain = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "x"},
            {"role": "tool", "name": "x", "tool_call_id": "x", "content": "x"},
        ],
        tools=[{"function": {"name": "x", "y": "x"}}],
    )
    controls = set(tokenizer.control_tokens.values())
    assert [id for id in ids if id in controls] == [id for id in plain if id in controls]
    assert tokenizer.decode(ids).count(typed) >= 6
    assert tokenizer.decode(ids).count("\ue001") == 0


def test_the_text_of_a_chat_is_unchanged(kimi: Tokenizer) -> None:
    for text in random_texts(40):
        ids = kimi.apply_chat_template([{"role": "user", "content": text}])
        assert kimi.decode(ids) == f"user{text}assistant"
        middle = kimi.encode(text)
        assert ids[len(kimi.encode("user")) + 2 :][: len(middle)] == middle


def test_a_folder_with_its_own_template(tmp_path: Path) -> None:
    write_tiktoken(tmp_path, ALL_BYTES, bos_token="[BOS]")
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content | tojson(ensure_ascii=true) }}"
        "{% endfor %}{{ suffix }}"
    )
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "é[BOS]"}], suffix="<|im_end|>"
    )
    assert ids == [256, *tokenizer.encode('"\\u00e9[BOS]"<|im_end|>')]
    tokenizer.close()


def test_wrong_messages_are_refused(kimi: Tokenizer) -> None:
    with pytest.raises(KimiError, match="messages must be a list, but is 'hi'"):
        kimi.apply_chat_template("hi")  # type: ignore[arg-type]


# Streaming -----------------------------------------------------------------------------------


def stream(tokenizer: Tokenizer, ids: list[int], skip_control: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_control)
    return [*map(detokenizer.add, ids), detokenizer.finish()]


def test_a_stream_never_shows_half_a_character(kimi: Tokenizer) -> None:
    ids = list("a中😀é".encode())  # the ranks of single bytes are the bytes
    assert stream(kimi, ids) == ["a", "", "", "中", "", "", "", "😀", "", "é", ""]


def test_bytes_are_replaced_once_they_cannot_be_completed(kimi: Tokenizer) -> None:
    assert stream(kimi, [0xF0, 0x9F, 0x41]) == ["", "", "\ufffdA", ""]
    assert stream(kimi, [0xF0, 0x9F]) == ["", "", "\ufffd"]
    assert stream(kimi, [0xFF, 0x80]) == ["\ufffd", "\ufffd", ""]


def test_characters_do_not_join_across_a_control_token(kimi: Tokenizer) -> None:
    end = kimi.control_tokens["<|im_end|>"]
    assert stream(kimi, [0xE4, end, 0xBD, 0xA0]) == ["", "\ufffd", "\ufffd", "\ufffd", ""]
    assert kimi.decode([0x41, end, 0x42], skip_control=False) == "A<|im_end|>B"


def test_an_unknown_id_is_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, -1, 10**9]) == "\ufffd" * 3


def test_decode_is_utf8_of_the_bytes(kimi: Tokenizer) -> None:
    """Against Python's decoder of the whole, for random ids and random bytes."""
    chooser = random.Random(2)
    texts = len(trained_tokens())
    for limit in (256, texts):
        for _ in range(2000):
            ids = [chooser.randrange(limit) for _ in range(chooser.randrange(12))]
            whole = b"".join(id_bytes(kimi, id) for id in ids).decode("utf-8", "replace")
            assert kimi.decode(ids) == whole
            assert "".join(stream(kimi, ids)) == whole


def test_a_stream_is_decode_for_all_ids(tokenizer: Tokenizer) -> None:
    chooser = random.Random(3)
    for skip in (True, False):
        for _ in range(1000):
            ids = [chooser.randrange(tokenizer.vocab_size) for _ in range(chooser.randrange(12))]
            assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


# sentencepiece -------------------------------------------------------------------------------


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("remove_extra_whitespaces", [True, False])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_decodes_as_the_library_does(
    add_dummy_prefix: bool, remove_extra_whitespaces: bool, model_type: str, tmp_path: Path
) -> None:
    write_sentencepiece(
        tmp_path,
        model_type=model_type,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
        user_defined_symbols=[],
    )
    tokenizer = load_tokenizer(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in [SAMPLE, "  two  spaces ", *random_texts(200)]:
        ids = library.encode(text)
        assert tokenizer.encode(text) == ids
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == library.decode(ids)
    chooser = random.Random(4)
    spaces = [id for id in range(library.get_piece_size()) if library.id_to_piece(id)[0] == "▁"]
    not_bytes = [id for id in range(library.get_piece_size()) if not library.is_byte(id)]
    for _ in range(2000):
        ids = chooser.choices(spaces, k=chooser.randrange(3))
        ids += chooser.choices(not_bytes, k=chooser.randrange(5))
        assert "".join(stream(tokenizer, ids)) == library.decode(ids)
    tokenizer.close()


def test_sentencepiece_control_tokens(sentences: Tokenizer) -> None:
    assert {"<|im_end|>", "<|im_user|>", "<s>", "</s>", "<tool>", "<tool>x"} <= set(
        sentences.control_tokens
    )
    assert "\n" not in sentences.control_tokens  # text, though user-defined
    assert sentences.stop_ids == {sentences.control_tokens["<|im_end|>"]}


def test_a_spelling_costs_no_other_merges(sentences: Tokenizer) -> None:
    half = len(sentences.encode("the sentence"))
    assert len(sentences.encode("the sentence<tool>the sentence")) <= 3 * half + len("<tool>")


def test_normalization_makes_no_control_token(sentences: Tokenizer) -> None:
    ids = sentences.encode("a \uff1ctool\uff1e b")  # full width: NFKC makes <tool> of it
    assert set(sentences.control_tokens.values()).isdisjoint(ids)
    assert sentences.decode(ids) == "a <tool> b"


def test_sentencepiece_settings(sentence_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentence_folder / "tokenizer.model").read_bytes())
    size = load_tokenizer(sentence_folder).vocab_size
    names = {size + 1: "<|call|>"}
    write_json(
        tmp_path / "tokenizer_config.json",
        {"added_tokens_decoder": added(names), "eos_token": "</s>"},
    )
    write_json(tmp_path / "config.json", {"eos_token_id": size + 1})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.encode_with_control("<|call|>") == [size + 1]
    assert tokenizer.stop_ids == {
        tokenizer.control_tokens[name] for name in ("</s>", "<|im_end|>", "<|call|>")
    }
    tokenizer.close()


def test_a_strange_sentencepiece_model(sentence_folder: Path, tmp_path: Path) -> None:
    """Followed by a field of a kind that protobuf has given up."""
    model = (sentence_folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model + b"\xfb\x06\xfc\x06")
    with pytest.raises(KimiError, match="tokenizer.model: must be a .*sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_that_is_no_utf8(sentence_folder: Path, tmp_path: Path) -> None:
    model = (sentence_folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model.replace(b"\xe2\x96\x81a", b"\xff\xfe\xfda", 1))
    with pytest.raises(KimiError, match="tokenizer.model: must be a plain sentencepiece model"):
        load_tokenizer(tmp_path)


def test_more_lines_than_any_vocabulary_has_are_refused_at_once(tmp_path: Path) -> None:
    lines = b"".join(GOOD) + b"\n" * (1 << 20) + b"AAAA 257\n"
    (tmp_path / "tiktoken.model").write_bytes(lines)
    with pytest.raises(KimiError, match="tiktoken.model: may have 1048576 lines, but has more"):
        load_tokenizer(tmp_path)


def test_a_broken_sentencepiece_model(tmp_path: Path) -> None:
    for content in (b"", b"abc", b"\x0a\xff\xff\xff"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(KimiError, match="tokenizer.model: must be a sentencepiece model"):
            load_tokenizer(tmp_path)


# Bad input -----------------------------------------------------------------------------------

GOOD = rank_lines([*ALL_BYTES, b"ab"]).splitlines(keepends=True)


def changed(line: int, content: bytes) -> bytes:
    return b"".join([*GOOD[: line - 1], content, *GOOD[line:]])


BAD_RANKS = {
    "empty": (b"", "must hold lines `base64 rank`, but is empty"),
    "blank": (b"\n\n", "but is empty"),
    "base64": (changed(3, b"?? 2\n"), "line 3: the token must be base64, but is b'??'"),
    "no_bytes": (changed(3, b"==== 2\n"), "line 3: the token must be base64"),
    "padding": (changed(3, b"Ag= 2\n"), "line 3: the token must be base64"),
    "not_ascii": (changed(3, b"\xff\xfe 2\n"), "line 3: the token must be base64"),
    "one_field": (changed(257, b"YWI=\n"), "line 257: must be `base64 rank`, but is b'YWI='"),
    "three_fields": (changed(257, b"YWI= 256 1\n"), "line 257: must be `base64 rank`"),
    "word": (changed(2, b"AQ== x\n"), "line 2: the rank must be an integer, but is b'x'"),
    "fraction": (changed(2, b"AQ== 1.0\n"), "line 2: the rank must be an integer"),
    "negative": (changed(2, b"AQ== -1\n"), "line 2: the rank must be an integer"),
    "underscore": (changed(2, b"AQ== 1_0\n"), "line 2: the rank must be an integer"),
    "huge": (changed(2, b"AQ== " + b"9" * 5000 + b"\n"), "line 2: the rank must be an integer"),
    "gap": (changed(257, b"YWI= 300\n"), "line 257: rank 300, but no line has rank 256"),
    "same_rank": (changed(257, b"YWI= 255\n"), "line 257: rank 255 is taken by line 256"),
    "same_token": (changed(257, GOOD[0].replace(b" 0", b" 256")), "already has rank 0"),
    "no_byte": (changed(66, b"YWJj 65\n"), "every byte must be a token, but 0x41 is not"),
}


@pytest.mark.parametrize(("content", "expected"), BAD_RANKS.values(), ids=BAD_RANKS)
def test_bad_ranks_are_one_line(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(KimiError) as caught:
        load_tokenizer(tmp_path)
    assert expected in str(caught.value)
    assert "tiktoken.model" in str(caught.value) and str(caught.value).isprintable()


def test_ranks_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(map(bytes.strip, reversed(GOOD))))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("cab") == [0x63, 256]
    assert tokenizer.decode([0x63, 256]) == "cab"
    tokenizer.close()


DOUBLE = '{"added_tokens_decoder": {"257": {"content": "<a>"}, "257": {"content": "<b>"}}}'
DECODER = "tokenizer_config.json: added_tokens_decoder"
BAD_SETTINGS = {
    "not_json": ("tokenizer_config.json", "{", "must be JSON"),
    "not_utf8": ("tokenizer_config.json", b'{"a": "\xff"}', "must be UTF-8, but byte 7 is not"),
    "list": ("tokenizer_config.json", "[1]", "must be a JSON object, but is [1]"),
    "deep": ("tokenizer_config.json", "[" * 10**6, "nests too deeply"),
    "long_number": ("tokenizer_config.json", "1" * 5000, "must be JSON"),
    "config_list": ("config.json", "null", "must be a JSON object, but is None"),
    "decoder_list": (
        "tokenizer_config.json", {"added_tokens_decoder": [1]},
        f"{DECODER} must be an object, but is [1]",
    ),
    "key": (
        "tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<a>"}}},
        f"{DECODER}: keys must be ids, but one is 'x'",
    ),
    "entry": (
        "tokenizer_config.json", {"added_tokens_decoder": {"257": "<a>"}},
        f"{DECODER}: 257 must be an object whose content is a name",
    ),
    "no_name": ("tokenizer_config.json", {"added_tokens_decoder": added({258: ""})}, "258 must be"),
    "short": ("tokenizer_config.json", {"added_tokens_decoder": added({258: "x"})}, "two char"),
    "surrogate": (
        "tokenizer_config.json", {"added_tokens_decoder": added({258: "x\ud800"})}, "surrogate",
    ),
    "long": (
        "tokenizer_config.json", {"added_tokens_decoder": added({258: "x" * 50_000})},
        "the name of control token 258 may have 1024 characters, but 'xxx",
    ),
    "longer": (
        "tokenizer_config.json", {"added_tokens_decoder": added({258: "x" * 10**6})},
        "4096 control tokens with 262144 characters of names, but there are 1 with 1000000",
    ),
    "many": (
        "tokenizer_config.json",
        {"added_tokens_decoder": added({id: f"<{id}>" for id in range(258, 5000)})},
        "there may be 4096 control tokens",
    ),
    "too_low": (
        "tokenizer_config.json", {"added_tokens_decoder": added({5: "<a>"})},
        f"{DECODER}: '<a>' must have an id in 257..512",
    ),
    "too_high": (
        "tokenizer_config.json", {"added_tokens_decoder": added({513: "<a>"})}, "but has 513",
    ),
    "two_ids": (
        "tokenizer_config.json", {"added_tokens_decoder": added({300: "<a>", 301: "<a>"})},
        "a name must have one id, but '<a>' has 300 and 301",
    ),
    "reserved": (
        "tokenizer_config.json",
        {"added_tokens_decoder": added({300: "<|reserved_token_301|>"})}, "has 300 and 301",
    ),
    "two_names": ("tokenizer_config.json", DOUBLE, "the key '257' comes twice"),
    "two_names_0": (
        "tokenizer_config.json", DOUBLE.replace('"257"', '"0257"', 1), "both have id 257",
    ),
    "template": ("tokenizer_config.json", {"chat_template": 1}, "chat_template must be a string"),
    "eos_token": ("tokenizer_config.json", {"eos_token": [1]}, "eos_token must be a string"),
    "size": ("config.json", {"vocab_size": 512}, "has 513 ids with its control tokens, but"),
    "size_type": ("config.json", {"vocab_size": "x"}, "vocab_size must be an integer, but is 'x'"),
    "eos_type": ("config.json", {"eos_token_id": "x"}, "config.json: eos_token_id must be an id"),
    "eos_bool": ("config.json", {"eos_token_id": True}, "eos_token_id must be an id below 513"),
    "eos_high": ("generation_config.json", {"eos_token_id": [1, 513]}, "but is [1, 513]"),
    "eos_low": ("generation_config.json", {"eos_token_id": -1}, "generation_config.json: eos_"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_one_line(name: str, content: Any, expected: str, tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(b"".join(GOOD))
    if isinstance(content, dict):
        content = json.dumps(content)
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(KimiError) as caught:
        load_tokenizer(tmp_path)
    assert expected in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("present", [[], ["tokenizer.json"]], ids=["nothing", "tokenizer.json"])
def test_a_missing_vocabulary_names_its_file_and_source(present: list[str], tmp_path: Path) -> None:
    for name in present:
        (tmp_path / name).write_text("{}")
    with pytest.raises(KimiError) as caught:
        load_tokenizer(tmp_path)
    for part in (str(tmp_path), "tiktoken.model is missing", "moonshotai/Kimi-Linear-48B"):
        assert part in str(caught.value)
    assert ("tokenizer.json does not say" in str(caught.value)) == bool(present)


def test_tiktoken_comes_before_sentencepiece(sentence_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentence_folder / "tokenizer.model").read_bytes())
    (tmp_path / "tiktoken.model").write_bytes(b"".join(GOOD))
    assert load_tokenizer(tmp_path).vocab_size == 513
