"""The text that the emulator compiles is MLX's own, byte for byte."""

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from metal_emulator.arrays import as_array
from metal_emulator.msl import ATTRIBUTES, SMALL, Input, metal_text

EIGHT = mx.zeros((2, 4))
SEVEN = mx.zeros((7,))


class Probe(NamedTuple):
    """A call of a kernel; what it computes is of no interest."""

    source: str
    inputs: dict[str, Any]
    outputs: dict[str, mx.Dtype]
    template: tuple[tuple[str, Any], ...] = ()
    header: str = ""
    atomic: bool = False


PROBES = {
    "numbers": Probe("o[0] = x;", {"x": 3, "y": 0.5, "z": True}, {"o": mx.bfloat16}),
    "sizes": Probe("thread_index_in_simdgroup", {"x": EIGHT, "k": SEVEN}, {"o": mx.float32}),
    "dimensions": Probe(
        "uint i = thread_position_in_grid.x; block_shape; x_ndim; k_strides; z_shape",
        {"x": EIGHT, "k": SEVEN, "z": mx.array(1)},
        {"o": mx.int64, "p": mx.bool_},
    ),
    "template": Probe(
        "// thread_position_in_grid, in a comment",
        {"x": EIGHT.astype(mx.float16), "empty": mx.zeros((0,), mx.int8)},
        {"o": mx.uint8},
        (("A", -3), ("T", mx.bfloat16), ("U", mx.uint8), ("F", False), ("Dk", 128)),
        "// a header\nconstant constexpr int C = 16;\n",
    ),
    "atomics": Probe("grid_size", {"x": EIGHT}, {"o": mx.uint32, "p": mx.float32}, atomic=True),
    "attributes": Probe(" ".join(ATTRIBUTES), {"x": EIGHT.astype(mx.uint16)}, {"o": mx.float16}),
}


def from_mlx(name: str, probe: Probe, folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What MLX prints while it traces the call: that needs no GPU."""
    kernel: Any = mx.fast.metal_kernel
    build = kernel(
        name=name,
        input_names=list(probe.inputs),
        output_names=list(probe.outputs),
        source=probe.source,
        header=probe.header,
        atomic_outputs=probe.atomic,
    )

    def call(x: mx.array) -> Any:
        return build(
            inputs=list(probe.inputs.values()),
            template=list(probe.template),
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)] * len(probe.outputs),
            output_dtypes=list(probe.outputs.values()),
            verbose=True,
            stream=mx.gpu,
        )

    capfd.readouterr()
    mx.export_function(str(folder / "probe.mlxfn"), call, mx.zeros((1,)))
    return capfd.readouterr().out


@pytest.mark.parametrize("name", PROBES)
def test_text_is_what_mlx_generates(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    probe = PROBES[name]
    ours = metal_text(
        name,
        [Input.of(key, as_array(x)) for key, x in probe.inputs.items()],
        list(probe.outputs.items()),
        probe.source,
        probe.header,
        probe.template,
        probe.atomic,
    )
    theirs = from_mlx(name, probe, tmp_path, capfd)
    assert theirs == f"Generated source code for `{name}`:\n```\n{ours.text}\n```\n"
    assert ours.text.split("\n")[ours.body_line - 1] == probe.source


def test_probes_reach_both_sides_of_the_smallest_device_input() -> None:
    sizes = {as_array(x).size for probe in PROBES.values() for x in probe.inputs.values()}
    assert {SMALL - 1, SMALL} <= sizes
