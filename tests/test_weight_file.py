"""Files of weights that change, or cannot be read, while a model is loaded from them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_kimi.bundled import pocket_folder
from mlx_kimi.checkpoint import files as checkpoint_files
from mlx_kimi.errors import KimiError
from mlx_kimi.loading.load import load_model
from tests.checkpoints import TINY, write_checkpoint

loading = import_module("mlx_kimi.loading.load")  # (`mlx_kimi.loading.load` is its function, too)
FILE = "model.safetensors"
MEANWHILE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {  # of (file, another) -> said
    "pipe": (lambda path, _: (path.unlink(), os.mkfifo(path)), "Not a regular file"),
    "folder": (lambda path, _: (path.unlink(), path.mkdir()), "Is a directory"),
    "removed": (lambda path, _: path.unlink(), "No such file or directory"),
    "shorter": (lambda path, _: os.truncate(path, 9000), "was cut to 9,000 of"),
    "empty": (lambda path, _: os.truncate(path, 0), "was cut to 0 of"),
    "another": (lambda path, other: os.replace(other, path), "was replaced"),
    "touched": (lambda path, _: os.utime(path, ns=(0, 0)), "was written to"),
}
MOMENTS = {  # (module, function): right before or after it
    "before_opening": (checkpoint_files, "lazy_arrays"),
    "before_mlx_opens": (mx, "load"),
    "before_reading": (loading, "_read_weights"),
    "after_reading": (loading, "_read_weights"),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", MEANWHILE)
def test_a_file_that_changes_while_it_is_loaded_is_named(
    folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    change: str,
) -> None:
    """Headers were checked; then a pipe was waited for, and another model's weights were taken."""
    path = shutil.copytree(folder("tiny"), tmp_path / "model") / FILE
    other = write_checkpoint(tmp_path / "other", TINY, seed=9)
    (made, said), (module, name) = MEANWHILE[change], MOMENTS[moment]
    own = getattr(module, name)

    def meanwhile(*given: Any, **options: Any) -> Any:
        if moment == "after_reading":
            own(*given, **options)
        made(path, other / FILE)
        return None if moment == "after_reading" else own(*given, **options)

    monkeypatch.setattr(module, name, meanwhile)
    with _nobody_waits_for(path):
        with pytest.raises(KimiError) as caught:
            load_model(path.parent)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(f"{path}: ") and said in message
    assert "while the model was loaded" in message


@contextmanager
def _nobody_waits_for(pipe: Path) -> Iterator[None]:
    """Who does gets an empty one after 10 s. (Of another process: MLX waits with Python's lock.)"""
    opens = subprocess.Popen(["sh", "-c", 'sleep 10; : > "$0"', pipe])
    try:
        yield
        assert opens.poll() is None, "the pipe was waited for"
    finally:
        opens.kill()
        opens.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="disk errors are made by LD_PRELOAD")
@pytest.mark.parametrize("budget", [[], ["--memory-budget", "1GB", "--context", "64"]], ids=str)
def test_weights_that_the_disk_cannot_read_are_one_line(tmp_path: Path, budget: list[str]) -> None:
    """MLX's error was a traceback."""
    library = tmp_path / "disk_errors.so"
    source = Path(__file__).with_name("disk_errors.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    weights = pocket_folder() / FILE
    ran = subprocess.run(
        [sys.executable, "-m", "mlx_kimi", "generate", "Hello", *budget],
        env=os.environ | {"LD_PRELOAD": str(library), "BAD_FILE_SIZE": str(weights.stat().st_size)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and not ran.stdout
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"Error: {weights.parent}: cannot load model.layers.") and FILE in line
