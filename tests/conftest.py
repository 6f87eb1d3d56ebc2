"""What every test file shares: exact float32 products, and tiny models that are made once."""

import os

# MLX's float32 products are TF32 (10 bits of fraction) on some GPUs unless this is set before mlx
# is imported. The oracles here are float64.
os.environ["MLX_ENABLE_TF32"] = "0"

# No test tries kernels but those that ask.
os.environ["MLX_KIMI_NO_TUNE"] = "1"

import atexit
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from mlx_kimi.loading.load import load_model
from mlx_kimi.metal_kernels.kernel import use_backend
from mlx_kimi.model.kimi_linear import KimiLinear
from tests.checkpoints import CONFIGS, TINY, write_checkpoint
from tests.emulated import emulator
from tests.tokenizer_files import trained_tokens, write_tiktoken

# What was started with nohup, or by a script in its background, ignores Ctrl-C, and so would every
# program that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What programs find out again, of this run alone; and settings, of which there are none.
if "PYTEST_XDIST_WORKER" not in os.environ:  # (else the controller's)
    os.environ["MLX_KIMI_CACHE"] = tempfile.mkdtemp(prefix="mlx_kimi_cache_")
    os.environ["MLX_KIMI_CONFIG"] = os.path.join(os.environ["MLX_KIMI_CACHE"], "config.toml")
    Path(os.environ["MLX_KIMI_CONFIG"]).touch()
    atexit.register(shutil.rmtree, os.environ["MLX_KIMI_CACHE"], ignore_errors=True)

SEED = 2  # the stored reference logits are of this seed's weights


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`folder("tiny", shards=3)`: a checkpoint on disk, written once. Not to be changed."""

    @cache
    def written(name: str, **how: Any) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp(name), CONFIGS[name], SEED, **how)

    return written


@pytest.fixture(scope="session")
def model(folder: Callable[..., Path]) -> Callable[[str], KimiLinear]:
    """`model("tiny")`: a float32 model of the published layout, loaded once."""
    return cache(lambda name: load_model(folder(name)))


@pytest.fixture(scope="session")
def quantized(
    folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`quantized("tiny")`: the same model as mlx-lm quantizes and writes it. Not to be changed."""

    @cache
    def written(name: str, group_size: int = 32, bits: int = 4, mode: str = "affine") -> Path:
        from mlx_lm import utils  # here: it takes seconds, and few tests ask

        path = tmp_path_factory.mktemp(f"{name}_{mode}_{bits}")
        model, config = utils.load_model(folder(name))
        model, config = utils.quantize_model(model, config, group_size, bits, mode)
        utils.save_model(path, model)
        utils.save_config(config, path / "config.json")
        return path

    return written


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole random model with a tokenizer. What it says means nothing. Not to be changed.

    Its greedy answers never end by themselves: no control token is ever the likeliest.
    """
    path = tmp_path_factory.mktemp("talker")
    first_control = len(trained_tokens())
    write_checkpoint(path, TINY | {"vocab_size": first_control + 256, "eos_token_id": None}, SEED)
    write_tiktoken(path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][first_control:] = 0
    save_file(weights, path / "model.safetensors")
    return path


@pytest.fixture
def emulated() -> Iterator[None]:
    """Kernels run on the emulator, which raises a finding for a fault."""
    with use_backend(emulator):
        yield
