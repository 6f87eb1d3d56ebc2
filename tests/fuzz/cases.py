"""Damage that knows the formats: headers of weights, configs, tokenizers, sessions, journals."""

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.damage import (
    FAULTS,
    HOSTILE,
    Damage,
    Json,
    change_bytes,
    change_json,
    change_text,
    change_value,
    put,
    short,
    written,
)

INDEX = "model.safetensors.index.json"
DTYPES = (
    "F32",
    "F16",
    "BF16",
    "U32",
    "U8",
    "I8",
    "I64",
    "F64",
    "BOOL",
    "F8_E4M3",
    "C64",
    "f32",
    "X",
)
SHAPES: tuple[Json, ...] = (
    *([], [0], [1], [-1], [2**32, 2**32], [2**62, 4], [2**63], [10**30], [1.0], ["1"], [None], "x"),
    *(None, 5, [[1]], [1] * 5000, [True, True]),
)


# ---------------------------------------------------------------------------------- safetensors
def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_header(file: Path, text: bytes, data: bytes, size: int | None = None) -> None:
    """A safetensors file of this header; `size` is what its first bytes say of its length."""
    put(file, (len(text) if size is None else size).to_bytes(8, "little") + text + data)


def weights(rng: Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def header_entry(rng: Random, folder: Path) -> Damage:
    """One tensor of a header has another place, shape or dtype."""
    file = weights(rng, folder)
    header, data = parts(file)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, other = header[name], header[rng.choice([k for k in header if k != "__metadata__"])]
    begin, end = entry["data_offsets"]
    kind = rng.choice(("offsets", "offsets", "shape", "shape", "dtype", "any", "other's place"))
    if kind == "offsets":
        near = ([begin + 1, end + 1], [begin, end - 1], [end, begin], [begin, end + 8], [0, end])
        far = ([begin, len(data) + 8], [2**63, 2**64], [-8, end], [begin], [0, 0], [1.0, 2.0], 7)
        entry["data_offsets"] = rng.choice((*near, *far))
    elif kind == "shape":
        shape = entry["shape"]
        near = (
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            shape[1:],
            [*shape, 0],
            [s * 2 for s in shape],
        )
        entry["shape"] = rng.choice((*near, *SHAPES))
    elif kind == "dtype":
        entry["dtype"] = rng.choice((*DTYPES, *HOSTILE))
    elif kind == "any":
        change_value(rng, entry)
    else:
        entry["data_offsets"] = other["data_offsets"]
    put_header(file, written(header).encode(), data)
    return Damage(f"{file.name}: {name}: {kind}: {short(entry)}")


def header_names(rng: Random, folder: Path) -> Damage:
    """A tensor is there twice, under another name, not at all, or beside one that nobody knows."""
    file = weights(rng, folder)
    header, data = parts(file)
    name = rng.choice([key for key in header if key != "__metadata__"])
    kind = rng.choice(("twice", "renamed", "removed", "more", "metadata", "moved"))
    text = written(header)
    if kind == "twice":
        entry = header[name] | {"shape": [1], "dtype": rng.choice(DTYPES)}
        text = text[:-1] + f", {written(name)}: {written(entry)}}}"
    else:
        new = rng.choice(("x", "", "\ud800", "lm_head.x", name + ".scales", "é" * 10_000))
        if kind == "more":
            for number in range(rng.choice((1, 200))):
                end = len(data)
                header[f"{new}{number or ''}"] = {
                    **{"dtype": rng.choice(DTYPES), "shape": [0], "data_offsets": [end, end]}
                }
        elif kind == "metadata":
            header["__metadata__"] = rng.choice((*HOSTILE, {"format": "mlx"}, {"a": 1}))
        elif kind == "moved":
            others = [f for f in sorted(folder.glob("*.safetensors")) if f != file]
            if others:
                other, more = parts(others[0])
                begin, end = header[name]["data_offsets"]
                place = [len(more), len(more) + end - begin]
                other[name] = header[name] | {"data_offsets": place}
                put_header(others[0], written(other).encode(), more + data[begin:end])
        else:
            entry = header.pop(name)
            if kind == "renamed":
                header[new] = entry
        text = written(header)
    put_header(file, text.encode("utf-8", "surrogatepass"), data)
    return Damage(f"{file.name}: {name}: {kind}")


def header_length(rng: Random, folder: Path) -> Damage:
    """The length of a header, its text or the data behind it is wrong."""
    file = weights(rng, folder)
    header, data = parts(file)
    text = written(header).encode()
    kind = rng.choice(("length", "length", "text", "less", "more", "spaces", "nothing behind"))
    size = None
    if kind == "length":
        n = len(text)
        size = rng.choice((0, 1, 7, n - 1, n + 1, n + 8, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1))
    elif kind == "text":
        what, text = change_text(rng, text)
        kind = what
    elif kind == "less":
        data = data[: -rng.choice((1, 8, len(data) // 2, len(data)))]
    elif kind == "more":
        data += bytes(rng.choice((1, 8, 4096)))
    elif kind == "spaces":
        text += b" " * rng.choice((1, 8, 10**6, 9 * 10**7))
    else:
        data = b""
    put_header(file, text, data, size)
    return Damage(f"{file.name}: {kind} {size or ''}", same=kind == "spaces")


def weight_bytes(rng: Random, folder: Path) -> Damage:
    return change_bytes(rng, weights(rng, folder))


# --------------------------------------------------------------------------------- JSON of a model
def index(rng: Random, folder: Path) -> Damage:
    """The index names other files, other tensors, or is something else."""
    file = folder / INDEX
    if not file.exists():
        put(file, written({"weight_map": {"x": "model.safetensors"}}).encode())
    if rng.random() < 0.4:
        return change_json(rng, file)
    value = json.loads(file.read_bytes())
    name = rng.choice(list(value["weight_map"]))
    names = [path.name for path in sorted(folder.iterdir())]
    other = rng.choice((*names, "x.safetensors", "../x.safetensors", "/dev/zero", *HOSTILE))
    value["weight_map"][name] = other
    put(file, written(value).encode())
    return Damage(f"{INDEX}: {name} is in {short(other)}")


def config(rng: Random, folder: Path) -> Damage:
    return change_json(rng, folder / "config.json")


def quantization(rng: Random, folder: Path) -> Damage:
    """Quantization that contradicts itself, the weights, or what MLX has."""
    file = folder / "config.json"
    value = json.loads(file.read_bytes())
    group = rng.choice((16, 32, 64, 128, 32.0, 64.0, 0, -32, True, 48, "32", 2**40, None))
    bits = rng.choice((2, 3, 4, 5, 6, 8, 4.0, 0, -4, True, 7, "4", 16, None))
    mode = rng.choice(("affine", "affine", "affine", "mxfp4", "nvfp4", "mxfp8", "x", None, 4))
    made = {"group_size": group, "bits": bits, "mode": mode}
    if rng.random() < 0.5:  # what MLX has, and these weights have not
        made = {"group_size": rng.choice((32, 64, 128)), "bits": rng.choice((2, 4, 8))}
    found = value.get("quantization")
    if rng.random() < 0.5 and isinstance(found, dict):
        path = rng.choice(("model.layers.1.self_attn.q_proj", "lm_head", "model.embed_tokens", "x"))
        found[path] = rng.choice((made, True, False, None, {}, [], 4))
    else:
        value["quantization"] = made
    put(file, written(value).encode())
    return Damage(f"quantization: {short(made)}")


def settings(rng: Random, folder: Path) -> Damage:
    name = rng.choice(("tokenizer_config.json", "tokenizer_config.json", "generation_config.json"))
    return change_json(rng, folder / name)


def hosts(rng: Random, folder: Path) -> Damage:
    """What says where ranks are, to a rank or to a person."""
    change = rng.choice((change_json, change_bytes))
    return change(rng, folder / rng.choice(("ranks.json", "hosts.json")))


def names(rng: Random, folder: Path) -> Damage:
    """Names of control tokens that are long, odd, many, or have odd ids."""
    file = folder / "tokenizer_config.json"
    value = json.loads(file.read_bytes())
    added = value["added_tokens_decoder"]
    kind = rng.choice(("long", "long", "odd", "many", "id", "twice", "eos"))
    key = rng.choice(list(added))
    if kind == "long":
        added[key]["content"] = rng.choice("ax<") * rng.choice((50_000, 200_000, 2_000_000))
    elif kind == "odd":
        odd = ("\ud800x", "x\udfff", "\0\0", "\n\n", "(?i)", "[[", "é\u0301", " x", "ß" * 9)
        added[key]["content"] = rng.choice(odd)
    elif kind == "many":
        count, size = rng.choice(((300, 3000), (20_000, 20), (3000, 250)))
        first = max(map(int, added)) + 1
        added |= {str(first + i): {"content": f"<{i}{'x' * size}>"} for i in range(count)}
    elif kind == "id":
        added[rng.choice(("0", "-1", "1e3", "9" * 9, "9" * 5000, "٣", "", "007"))] = added.pop(key)
    elif kind == "twice":
        added[str(int(key) + 1)] = added[key]
    else:
        value["eos_token"] = rng.choice(HOSTILE)
    put(file, written(value).encode())
    return Damage(f"names: {kind} {key}")


# ------------------------------------------------------------------------------------ tokenizers
def ranks(rng: Random, folder: Path) -> Damage:
    """Lines of tiktoken.model, or bytes of a sentencepiece model."""
    file = folder / "tiktoken.model"
    if not file.is_file():
        return change_bytes(rng, folder / "tokenizer.model")
    if rng.random() < 0.3:
        return change_bytes(rng, file)
    lines = file.read_bytes().splitlines()
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    token, rank = lines[at].split()
    long = base64.b64encode(b"x" * 10**6)
    new = rng.choice(
        (
            *(
                b"",
                b"x",
                token,
                b"%s -1" % token,
                b"%s 1.0" % token,
                b"%s %s" % (token, b"9" * 5000),
            ),
            *(b"@@ %s" % rank, b"\xff\xff %s" % rank, b"= %s" % rank, b"%s %s x" % (token, rank)),
            *(b"%s %s" % (long, rank), lines[other], b"%s 99999999" % token, token + b" \xd9\xa3"),
            *(b"%s %s" % (lines[other].split()[0], rank), b"%s %d" % (token, other)),
        )
    )
    lines[at] = new
    if rng.random() < 0.03:
        lines += (
            base64.b64encode(b"%07d" % i) + b" %d" % (len(lines) + i) for i in range(3_000_000)
        )
    put(file, b"\n".join(lines))
    return Damage(f"tiktoken.model: line {at} became {short(new)}")


def pieces(rng: Random, folder: Path) -> Damage:
    """A sentencepiece model whose pieces are no UTF-8, of other kinds, or of other lengths."""
    file = folder / "tokenizer.model"
    if not file.is_file():
        return ranks(rng, folder)
    data = file.read_bytes()
    kind = rng.choice(("piece", "piece", "kind", "byte", "append", "bytes"))
    at = rng.randrange(len(data))
    if kind == "bytes":
        return change_bytes(rng, file)
    if kind == "append":
        piece = rng.choice((b"\xff\xfe", b"", b"x" * 60_000, b"<0xZZ>", b"\0", b"<x>", b"\xe2\x96"))
        number = rng.choice((1, 2, 3, 4, 5, 6, 7, 127))
        body = b"\x0a" + varint(len(piece)) + piece + b"\x15\0\0\0\0\x18" + varint(number)
        put(file, data + (b"\x0a" + varint(len(body)) + body) * rng.choice((1, 2)))
        return Damage(f"tokenizer.model: a piece {short(piece)} of kind {number}")
    old, new = {
        "piece": (b"\xe2\x96\x81", b"\xff\xfe\xfd"),
        "kind": (b"\x18\x03", b"\x18" + bytes([rng.choice((0, 1, 2, 4, 5, 6, 9, 127))])),
        "byte": (b"<0x", rng.choice((b"<0y", b"<0\xff", b"<00"))),
    }[kind]
    found = data.find(old, at)
    found = data.find(old) if found < 0 else found
    if found >= 0:
        data = data[:found] + new + data[found + len(old) :]
    put(file, data)
    return Damage(f"tokenizer.model: {kind} at {found}")


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    more = number >> 7
    return bytes([number & 0x7F | 0x80]) + varint(more) if more else bytes([number])


TEMPLATES = (
    *(b"", b"{{", b"{% for m in messages %}", b"{{ messages[0].x.y }}", b"{{ 1/0 }}", b"\xff\xfe"),
    *(b"{{ 'x' * 100000000 }}", b"{% for i in range(10**9) %}{% endfor %}", b"{{ messages }}"),
    *(b"{{ '\\ud800' }}", b"{{ raise_exception('a\\nb' * 9999) }}", b"{{ ''.__class__ }}", b"\0"),
    *(b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", b"{{ [[]] | tojson(indent=10**9) }}"),
    *(b"{% set x = namespace(a=1) %}{{ x.a }}", b"{{ raise_exception(messages) }}", b"(" * 10**6),
    *(b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}", b"{{ 9 ** 9 ** 9 }}", b"x" * (1 << 21)),
    *(b"{{ '%1000000000d' % 1 }}", b"{{ messages | map(attribute='content') | list }}"),
)


def template(rng: Random, folder: Path) -> Damage:
    """Another chat template."""
    file = folder / "chat_template.jinja"
    text = rng.choice(TEMPLATES) if rng.random() < 0.7 else None
    if text is None:
        return change_bytes(rng, file)
    put(file, text)
    return Damage(f"template: {short(text)}")


# ------------------------------------------------------------------------- sessions and journals
TEXT = "chat.jsonl"


def session_bytes(rng: Random, folder: Path) -> Damage:
    """Damage to a saved conversation: what is used must still be true."""
    file = rng.choice(sorted(path for path in folder.iterdir() if path.name != "lock"))
    done = change_bytes(rng, file)
    return Damage(done.what, same=True)


def session_header(rng: Random, folder: Path) -> Damage:
    """The first line of the text, which says what the others must be."""
    file = folder / TEXT
    first, _, body = file.read_bytes().partition(b"\n")
    value = json.loads(first)
    what = change_value(rng, value)
    put(file, written(value).encode() + b"\n" + body)
    return Damage(f"first line: {what}", same=True)


def forged(folder: Path, change: Callable[[list[Json]], str]) -> str:
    """Change what a session's text says, with the checksums that belong to it."""
    (folder / "chat.copy.jsonl").unlink(missing_ok=True)
    file = folder / TEXT
    first, *lines = file.read_bytes().splitlines(keepends=True)
    records = [json.loads(line)[1] for line in lines]
    what, crc = change(records), 0
    for record in (written(record).encode() for record in records):
        crc = zlib.crc32(record, crc)
        first += b'["%08x", %b]\n' % (crc, record)
    put(file, first)
    return what


def session_values(rng: Random, folder: Path) -> Damage:
    """Another text, with its checksum: states that do not belong to it must not be used."""
    return Damage(forged(folder, lambda lines: change_value(rng, lines)), same=True)


def session_states(rng: Random, folder: Path) -> Damage:
    """Files of states of another form, with their checksums."""
    damaged = rng.choice((header_entry, header_names, header_length, weight_bytes))
    what = damaged(rng, folder).what

    def say(lines: list[Json]) -> str:
        for stored in (stored for line in lines for stored in line.get("states", [])):
            if not (folder / stored["file"]).is_file():  # (of a turn before)
                continue
            stored["checksum"] = zlib.crc32((folder / stored["file"]).read_bytes())
        return what

    return Damage(forged(folder, say))


def lock(rng: Random, folder: Path) -> Damage:
    """Another thing in the place of the lock."""
    file, kind = folder / "lock", rng.choice(FAULTS)
    file.unlink()
    kind(file)
    return Damage(f"lock {kind.__name__}", same=True)


def journal_bytes(rng: Random, folder: Path) -> Damage:
    """A damaged journal: what is made in the end must be the same."""
    return Damage(change_bytes(rng, folder / "journal").what, same=True)


def journal_values(rng: Random, folder: Path) -> Damage:
    """A journal that says something else, with its checksums."""
    file = folder / "journal"
    records = [json.loads(line[9:]) for line in file.read_bytes().splitlines()]
    what = change_value(rng, records)
    lines = []
    for record in records:
        text = written(record).encode()
        lines.append(b"%08x %s\n" % (zlib.crc32(text), text))
    put(file, b"".join(lines))
    return Damage(f"journal: {what}")
