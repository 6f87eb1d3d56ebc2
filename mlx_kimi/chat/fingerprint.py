"""Which model wrote a state: a state read by another one would make it talk nonsense."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_kimi.checkpoint.digests import Progress, digests
from mlx_kimi.checkpoint.files import Checkpoint
from mlx_kimi.user_files import is_there, read_bytes

# What decides how ids are made and what a state means, beside the weights.
FILES = (
    "config.json",
    "tiktoken.model",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)

# What a state means, counted up when it changes: a release invalidates nothing that it need not.
# Sessions that do not say it are of the first.
STATES = 1

MEANINGS = {
    "model": "the model, its quantization or its tokenizer",
    "weights": "the model, its quantization or its tokenizer",
    "states": "the format of states",
    "device": "the device that computes",
    "latent_bits": "--latent-bits",
    "tools": "the tools",
}


def fingerprint(
    folder: Path,
    latent_bits: int | None,
    tools: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What must agree for a stored state to be used.

    Args:
        tools: the schemas that the conversation begins with, as JSON.
        progress: of reading all weights, which happens once.

    Raises:
        KimiError: a file cannot be read.
    """
    checkpoint = Checkpoint(folder)
    declared = json.dumps(tools, sort_keys=True).encode()
    return {
        "model": model_hash(folder, checkpoint),
        "weights": _weights_hash(checkpoint, progress),
        "states": STATES,
        "device": "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu",
        "latent_bits": latent_bits,
        "tools": hashlib.sha256(declared).hexdigest()[:8] if tools else None,
    }


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """What of a model's fingerprint is not as it was, in words; empty when all is."""
    # (Sessions of before digests are known by the middle of each file, which "model" samples.)
    stored = {"states": 1, "weights": present.get("weights")} | dict(stored)
    changed = [MEANINGS[key] for key in MEANINGS if stored.get(key) != present.get(key)]
    return " and ".join(dict.fromkeys(changed))


def _weights_hash(checkpoint: Checkpoint, progress: Progress | None) -> str:
    """Of every byte of the weights."""
    each = digests(checkpoint.folder, checkpoint.files, progress)
    return hashlib.sha256("".join(each).encode()).hexdigest()[:32]


def model_hash(folder: Path, checkpoint: Checkpoint) -> str:
    """Of small files, headers, and the middle of each file of weights: not all is read."""
    digest = hashlib.sha256()
    for name in FILES:
        if is_there(folder / name):
            digest.update(name.encode() + read_bytes(folder / name))
    for name, stored in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, stored.dtype, stored.shape)).encode())
    for file in checkpoint.files:
        digest.update(checkpoint.sample(file))
    return digest.hexdigest()[:32]
