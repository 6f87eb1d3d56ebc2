"""A kernel's text: its headers, each once and in order, in front of a body that keeps its lines."""

from pathlib import Path

import pytest

from mlx_kimi.metal_kernels import kernel as module
from mlx_kimi.metal_kernels.cuda import cuda
from mlx_kimi.metal_kernels.kernel import Kernel, text_of

FOLDER = Path(module.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.metal"))


def kernel(name: str) -> Kernel:
    return Kernel(name, (), ())


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files of a folder that only this test knows."""
    texts: dict[str, str] = {}
    monkeypatch.setattr(module, "text_of", texts.__getitem__)
    return texts


def test_a_header_stands_once_and_after_what_it_includes(written: dict[str, str]) -> None:
    written["k.metal"] = '#include "b.h"\n#include "a.h"\n\n// body\n'
    written["b.h"] = '#include "a.h"\n\n// b\n'
    written["a.h"] = "// a\n"
    assert kernel("k").header == "// a\n\n\n\n// b\n"


def test_the_lines_of_a_body_keep_their_numbers(written: dict[str, str]) -> None:
    written["k.metal"] = '#include "a.h"\n\n// the third line\n'
    assert kernel("k").source.split("\n")[2] == "// the third line"


def test_a_header_is_replaced_wherever_it_is_included(written: dict[str, str]) -> None:
    written["k.metal"] = '#include "b.h"\n'
    written["b.h"] = '#include "a.h"\n// b\n'
    written["other.h"] = "// other\n"
    assert kernel("k").header_with({"a.h": "other.h"}) == "// other\n\n\n// b\n"


def test_a_circle_of_headers_is_named(written: dict[str, str]) -> None:
    written["k.metal"] = '#include "a.h"\n'
    written["a.h"] = '#include "b.h"\n'
    written["b.h"] = '#include "a.h"\n'
    with pytest.raises(ValueError, match=r"\[b\.h\] includes must form no circle but a\.h is"):
        _ = kernel("k").header


@pytest.mark.parametrize("name", NAMES)
def test_a_compiler_is_given_plain_text(name: str) -> None:
    for text in (kernel(name).source, kernel(name).header, cuda(kernel(name)).header):
        assert "#include" not in text
    assert kernel(name).source.count("\n") == text_of(f"{name}.metal").count("\n")


@pytest.mark.parametrize("name", [name for name in NAMES if "tile" in text_of(f"{name}.metal")])
def test_tiles_are_those_of_the_gpu(name: str) -> None:
    apple, nvidia = text_of("tiles.h"), text_of("cuda_tiles.h")
    assert apple in kernel(name).header and nvidia not in kernel(name).header
    assert nvidia in cuda(kernel(name)).header and apple not in cuda(kernel(name)).header


def test_every_header_is_included_somewhere() -> None:
    texts = [path.read_text() for pattern in ("*.metal", "*.h") for path in FOLDER.glob(pattern)]
    headers = {path.name for path in FOLDER.glob("*.h")} - {"cuda.h", "cuda_tiles.h"}
    assert {
        name for name in headers if any(f'#include "{name}"' in text for text in texts)
    } == headers
