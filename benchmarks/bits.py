"""What bits and recipes cost the pocket model: size, exact match in its tasks, KL, top-1 agreement.

    .venv/bin/python -m benchmarks.bits [--times 10]

The bundled weights are quantized and no others are kept: the reference is what they stand for, in
float32. They were trained to be rounded to 4 bits, 6 in embeddings and lm_head.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.checkpoint.config import ModelConfig, read_json
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.checkpoint.tensors import tensors
from mlx_kimi.convert.blocks import TensorReader
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.folder import copied_files, small_files
from mlx_kimi.convert.quantize import RECIPES, Scheme, scheme
from mlx_kimi.convert.report import quality
from mlx_kimi.convert.report.slices import read
from mlx_kimi.loading.load import load
from mlx_kimi.model.weights import Weights
from mlx_kimi.units import human_size
from tools.pocket import tasks

SEED = 2  # of the questions, as in tools.pocket.evaluate
COUNTS = {"sums": 30, "recall": 3, "reverse": 30, "sort": 30, "tools": 12, "facts": 30}  # long: few
Question = tuple[list[int], int]  # ids with the answer, and where the answer starts


@dataclass
class Answers:
    """Of one model: what it would say, and how likely it finds each token of the right answers."""

    right: dict[str, int] = field(default_factory=dict)  # by task
    log_p: list[np.ndarray] = field(default_factory=list)  # [tokens, vocab] of each answer


def unquantized(out: Path) -> Path:
    """The bundled model in the MLX layout and float32, without quantization."""
    out.mkdir()
    for name, data in copied_files(small_files(pocket_folder())).items():
        (out / name).write_bytes(data)
    reader = TensorReader(Checkpoint(pocket_folder()), ModelConfig.read(pocket_folder()))
    plain = {}
    for tensor in tensors(reader.config):
        arrays = read(reader, tensor)
        if tensor.matrix:
            weights = Weights(arrays, reader.config)
            arrays = {tensor.name: weights.linear(tensor.module).dequantized()}
        plain |= arrays
    mx.save_safetensors(str(out / "model.safetensors"), plain)
    written = dict(read_json(pocket_folder() / "config.json")) | {"dtype": "float32"}
    for name in ("quantization", "quantization_config"):
        written.pop(name)
    (out / "config.json").write_text(json.dumps(written))
    return out


def questions(folder: Path, task: str, count: int) -> list[Question]:
    """Held-out prompts with their right answers, up to the mark that ends them."""
    _, tokenizer = load(folder)
    end = tokenizer.control_tokens["<|im_end|>"]
    made = []
    for prompt in tasks.prompts(task, count, SEED):
        asked = tokenizer.apply_chat_template(prompt.messages, prompt.tools)
        answer = [*tokenizer.encode_with_control(prompt.expected), end]
        made.append((asked + answer, len(asked)))
    return made


def answers(folder: Path, asked: dict[str, list[Question]]) -> Answers:
    """An answer is right if each of its tokens is the likeliest: greedy decoding then gives it."""
    model, _ = load(folder)
    result = Answers()
    for task, some in asked.items():
        marks = []
        for ids, start in some:
            hidden = model.hidden(mx.array([ids[:-1]]))[0, start - 1 :]
            logits = np.array(model.logits(hidden).astype(mx.float32)).astype(np.float64)
            marks.append(logits.argmax(-1).tolist() == ids[start:])
            logits -= logits.max(-1, keepdims=True)
            result.log_p.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        if task == "tools":  # a call, and the answer after its result
            pairs = zip(marks[::2], marks[1::2], strict=True)
            marks = [first and second for first, second in pairs]
        result.right[task] = sum(marks)
    return result


def apart(expected: Answers, found: Answers) -> tuple[float, float]:
    """Mean KL in nats a token of the answers, and how often the likeliest token is the same."""
    p, q = (np.concatenate(one.log_p) for one in (expected, found))
    kl = (np.exp(p) * (p - q)).sum(-1)
    return float(kl.mean()), float((p.argmax(-1) == q.argmax(-1)).mean())


def candidates() -> Iterator[tuple[str, Scheme]]:
    for bits in (8, 4, 3, 2):
        yield f"`--bits {bits}`", scheme(bits=bits)
    for name in RECIPES:
        if name != "default":
            yield f"`--recipe {name}`", scheme(recipe=name)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1, help="so many times the questions")
    options = parser.parse_args()
    print(f"{platform.machine()} {platform.system()}, {mx.default_device()}, mlx {mx.__version__}")
    with tempfile.TemporaryDirectory() as place:
        source = unquantized(Path(place) / "source")
        counts = {task: count * options.times for task, count in COUNTS.items()}
        asked = {task: questions(source, task, count) for task, count in counts.items()}
        expected = answers(source, asked)
        titles = [f"{task} of {count}" for task, count in counts.items()]
        print(row("", "size", *titles, "KL", "top-1", "KL, text", "top-1, text"))
        print(row("---", *["---:"] * (len(counts) + 5)), flush=True)
        print(row("reference", size(source), *map(str, expected.right.values()), *["-"] * 4))
        ids = quality.sample_ids(source, quality.sample_text())
        for name, chosen in candidates():
            out = Path(place) / f"out{len(list(Path(place).iterdir()))}"
            convert(source, out, chosen, dtype="bfloat16")
            found = answers(out, asked)
            kl, same = apart(expected, found)
            on_text = quality.measure(source, out, ids).predictions.distance
            assert on_text is not None
            print(
                row(
                    name,
                    size(out),
                    *map(str, found.right.values()),
                    f"{kl:.4f}",
                    f"{same:.1%}",
                    f"{on_text.mean_kl:.4f}",
                    f"{on_text.agreement:.1%}",
                ),
                flush=True,
            )


def size(folder: Path) -> str:
    return human_size((folder / "model.safetensors").stat().st_size)


if __name__ == "__main__":
    main()
