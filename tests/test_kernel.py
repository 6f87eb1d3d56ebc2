"""A kernel's text: its headers, each once and in order, in front of a body that keeps its lines."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_kimi.defaults import PREFILL_STEP, PREFILL_STEP_LIMIT
from mlx_kimi.metal_kernels import (
    add_norm,
    experts,
    kda_chunk,
    kda_decode,
    kda_prepare,
    kda_sequential,
    mla_decode,
    mla_prefill,
    sorted_experts,
    source,
    split_kv,
)
from mlx_kimi.metal_kernels import kernel as module
from mlx_kimi.metal_kernels.cuda import cuda
from mlx_kimi.metal_kernels.kernel import NARROW_SIZE, Kernel, use_backend
from mlx_kimi.metal_kernels.source import text_of
from mlx_kimi.metal_kernels.split_kv import SplitKVPlan

FOLDER = Path(module.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.metal"))


def kernel(name: str) -> Kernel:
    return Kernel(name, (), ())


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files of a folder that only this test knows."""
    texts: dict[str, str] = {}
    monkeypatch.setattr(source, "text_of", texts.__getitem__)
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


TILED = [
    name for name in NAMES if re.search(r'"(\w*tiles|mla_attend).h"', text_of(f"{name}.metal"))
]


@pytest.mark.parametrize("name", TILED)
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


# ------------------------------------------------------------------------------ sizes and indices
MODULES = (add_norm, experts, kda_chunk, kda_decode, kda_prepare, kda_sequential)
KERNELS = {
    found.name: found
    for module in (*MODULES, mla_decode, mla_prefill, sorted_experts)
    for found in vars(module).values()
    if isinstance(found, Kernel)
}


def launched(kernel: Kernel, large: str) -> list[mx.array]:
    """A launch whose array `large` has 2^31 elements; nothing runs, and nothing is allocated."""
    shapes = {name: (8,) for name in (*kernel.inputs, *kernel.outputs)}
    shapes[large] = (1 << 16, 1 << 15)
    with use_backend(lambda _: lambda **__: []):
        return kernel(
            inputs=[mx.zeros(shapes[name]) for name in kernel.inputs],
            output_shapes=[shapes[name] for name in kernel.outputs],
        )


def test_every_kernel_is_known_here() -> None:
    assert sorted(KERNELS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_array_beyond_32_bits_is_refused_by_name_unless_its_offsets_are_wide(name: str) -> None:
    kernel = KERNELS[name]
    for array in (*kernel.inputs, *kernel.outputs):
        if array in kernel.wide:
            assert launched(kernel, array) == []
        else:
            with pytest.raises(ValueError, match=rf"^\[{name}\] {array} must have fewer than 2147"):
                launched(kernel, array)


@pytest.mark.parametrize("name", [name for name in NAMES if KERNELS[name].wide])
def test_offsets_into_wide_arrays_have_64_bits(name: str) -> None:
    """(An emulator's launch of such a size would take tens of gigabytes.)"""
    text = re.sub(r"//.*", "", KERNELS[name].source)
    wide = {"size_t(", *re.findall(r"const size_t (\w+) =", text)}
    arrays = "|".join(KERNELS[name].wide)
    for found in re.finditer(rf"\b({arrays})\b(?: \+ |\[)([^;]*);", text):
        assert any(each in found[2] for each in wide), found[0]
    if "matvec.h" in text_of(f"{name}.metal"):  # which matrices, whole, are given to
        assert KERNELS[name].header.count("size_t(row) * ") == 3


def test_more_splits_than_one_softmax_takes_are_refused() -> None:
    most = 8 * split_kv.MOST_SPLITS - 256  # of 8 positions each, beside a tail of 256
    assert SplitKVPlan.uniform(256, 256, [most], positions=8).capacities == (1024,)
    with pytest.raises(ValueError, match="a text must have at most 1024 splits but has 1025"):
        SplitKVPlan.uniform(256, 256, [most + 8], positions=8)


def test_the_longest_prefill_step_keeps_every_array_of_the_48b_within_32_bits() -> None:
    """MLX's own kernels count in 32 bits. The largest array is the outputs of 8 experts a token."""
    assert PREFILL_STEP <= PREFILL_STEP_LIMIT
    assert PREFILL_STEP_LIMIT * 8 * 2304 < NARROW_SIZE <= 2 * PREFILL_STEP_LIMIT * 8 * 2304


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.h")), ids=lambda path: path.name)
def test_every_helper_is_forced_inline(path: Path) -> None:
    """A helper left as a call would put its arrays of a thread into memory."""
    if path.name != "cuda.h":
        assert not re.findall(r"^\s*(?:static\s+)?inline\b.*", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["reduce.h"])
def test_no_choice_stands_between_elements_of_one_array(name: str) -> None:
    """It is a choice between places: an index that varies, which keeps the array in memory."""
    assert not re.findall(r"\? (\w+)\[[^\]]*\] : \1\[[^\]]*\];", (FOLDER / name).read_text())
