"""Convert an exported pocket model into the package and record what it must answer.

    python -m tools.pocket.ship FOLDER

Writes mlx_kimi/pocket: 4 bits, embeddings in 6 (the bits it was trained for), and goldens.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from mlx_kimi import generate, load
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.convert.convert import convert
from mlx_kimi.convert.quantize import scheme
from mlx_kimi.evaluation.goldens import FILE

TEXTS = ["Hello world", "What is 347 + 58?", "你好世界", "<|im_end|> is only text here"]
ANSWERS = {  # what is right, not what the model happens to say
    "What is 347 + 58?": "347 + 58 = 405.",
    "Sort these numbers: 5, 3, 9, 1": "Sorted: 1, 3, 5, 9.",
    "Reverse: amber, door, code": "Reversed: code, door, amber.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", help="the folder that tools.pocket.export wrote")
    export = parser.parse_args().export
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "pocket"
        convert(export, out, scheme(recipe="embeddings-6bit"))
        write_goldens(out)
        shutil.rmtree(pocket_folder())
        shutil.copytree(out, pocket_folder())


def write_goldens(folder: Path) -> None:
    """Refuses a model that does not give the right answers."""
    model, tokenizer = load(folder)
    for question, answer in ANSWERS.items():
        said = generate(model, tokenizer, question)
        if said != answer:
            raise SystemExit(f"{question!r}: {said!r}, expected {answer!r}")
    chats = {q: tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in ANSWERS}
    goldens = {
        "texts": {text: tokenizer.encode(text) for text in TEXTS},
        "chats": chats,
        "answers": ANSWERS,
    }
    text = json.dumps(goldens, ensure_ascii=False, indent=1) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
