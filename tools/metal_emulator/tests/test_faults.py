"""Every fault planted, every fault found: its kind, its line and its buffer."""

from typing import Any

import mlx.core as mx
import pytest
from metal_emulator import findings, metal_kernel
from planted import FAULTS, START, N


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name: str) -> None:
    fault = FAULTS[name]
    body = START + fault.body
    kernel = metal_kernel("planted", ["a", "small"], ["out", "order"], body)
    with pytest.raises(fault.finding) as raised:
        kernel(
            inputs=[mx.arange(N).astype(mx.float32), mx.zeros((3,))],
            grid=(fault.grid, 1, 1),
            threadgroup=(fault.threadgroup, 1, 1),
            output_shapes=[(N,), (fault.init is not None,)],
            output_dtypes=[mx.float32, mx.int32],
            init_value=fault.init,
        )
    found = raised.value
    assert str(found).startswith("planted: ")
    assert fault.words in str(found)
    assert found.buffer == fault.buffer
    marked = [n for n, text in enumerate(body.split("\n"), 1) if "here" in text]
    assert found.line in marked if marked else found.line is None


# In natural order the thread that writes is also the last that has read: a check that forgot the
# readers before it would find nothing. Who comes last to a barrier goes on first.
READERS = {
    "lanes of one simdgroup": (
        """threadgroup float s[1];
        if (i == 0) s[0] = 1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = s[0];
        if (i == 30) s[0] = 2;  // here""",
        32,
        32,
    ),
    "threads of one threadgroup": (
        """threadgroup float s[1];
        if (i == 0) s[0] = 1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = s[0];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (i == 62) s[0] = 2;  // here""",
        64,
        64,
    ),
    "two threadgroups": (
        """float x = out[0];
        threadgroup_barrier(mem_flags::mem_device);
        if (i == 32) out[0] = x;  // here""",
        64,
        32,
    ),
    "threads of one": (
        """threadgroup atomic<int> s[1];
        if (i == 0) atomic_store_explicit(s, 1, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (i == 0) out[i] = *(threadgroup int*)s;
        else out[i] = atomic_load_explicit(s, memory_order_relaxed);
        if (i == 62) atomic_store_explicit(s, 2, memory_order_relaxed);  // here""",
        64,
        64,
    ),
}


@pytest.mark.parametrize("between", READERS)
def test_every_reader_counts_not_only_the_last(between: str) -> None:
    text, grid, threadgroup = READERS[between]
    kernel = metal_kernel("planted", ["a"], ["out"], START + text, schedules=(0,))
    with pytest.raises(findings.Race, match=f"race between {between}") as raised:
        kernel(
            inputs=[0],
            grid=(grid, 1, 1),
            threadgroup=(threadgroup, 1, 1),
            output_shapes=[(grid,)],
            output_dtypes=[mx.float32],
            init_value=0,
        )
    assert "here" in (START + text).split("\n")[(raised.value.line or 0) - 1]


def test_vector_of_a_slice_is_found() -> None:
    """MLX passes a contiguous slice as it is, wherever it starts."""
    body = START + "out[i] = (*(const device float4*)(a + i / 4 * 4)).x;"
    launch: dict[str, Any] = dict(
        inputs=[mx.zeros((N,))],
        grid=(N, 1, 1),
        threadgroup=(N, 1, 1),
        output_shapes=[(N,)],
        output_dtypes=[mx.float32],
    )
    metal_kernel("planted", ["a"], ["out"], body)(**launch)
    with pytest.raises(findings.Misaligned, match=r"line 2: .* a\[0\] of 64 is not aligned"):
        metal_kernel("planted", ["a"], ["out"], body, slices=True)(**launch)


def test_fault_of_a_helper_names_its_line() -> None:
    header = "\ntemplate <typename P>\nfloat first(P p, uint i) {\n  return p[i + 64];\n}\n"
    kernel = metal_kernel("planted", ["a"], ["out"], START + "out[i] = first(a, i);", header=header)
    with pytest.raises(findings.OutOfBoundsDevice, match=r"^planted: header line 4: .* a\[64\]"):
        kernel(
            inputs=[mx.zeros((N,))],
            grid=(N, 1, 1),
            threadgroup=(N, 1, 1),
            output_shapes=[(N,)],
            output_dtypes=[mx.float32],
        )
