"""Faults of every kind in small kernels, each with the finding that it must raise."""

from typing import NamedTuple

from metal_emulator import findings

N = 64


class Fault(NamedTuple):
    """The body of a kernel of one input `a` and one output `out` with a fault at `// here`."""

    body: str
    finding: type[findings.Finding]
    buffer: str | None = None
    grid: int = N
    threadgroup: int = N
    init: float | None = None
    words: str = ""


START = "uint i = thread_position_in_grid.x; uint lane = thread_index_in_simdgroup;\n"
# Each thread copies its element through shared memory to its neighbour in another simdgroup.
EXCHANGE = """
threadgroup float s[64];
s[i] = 0;
threadgroup_barrier(mem_flags::mem_threadgroup);
s[i] = a[i];  // here
{barrier}
out[i] = s[i ^ {step}];  // or here
"""

FAULTS = {
    "read past the end": Fault("out[i] = a[i + 1];  // here", findings.OutOfBoundsDevice, "a"),
    "read before the start": Fault(
        "out[i] = a[int(i) - 1];  // here", findings.OutOfBoundsDevice, "a"
    ),
    "read far away": Fault("out[i] = a[i + 1000000000];  // here", findings.OutOfBoundsDevice, "a"),
    "write past the end": Fault(
        "out[i == 63 ? 64 : i] = a[i];  // here", findings.OutOfBoundsDevice, "out"
    ),
    "vector between vectors": Fault(
        "out[i] = (*(const device float4*)(a + i % 32)).x;  // here", findings.Misaligned, "a"
    ),
    "vector across the end": Fault(
        "out[i] = (*(const device float4*)(a + i / 4 * 4 + 4)).x;  // here",
        findings.OutOfBoundsDevice,
        "a",
    ),
    "structure read across the end": Fault(
        """struct Row { float v[40]; };
        Row row = *(const device Row*)(a + i % 32);  // here
        out[i] = row.v[i % 40];""",
        findings.OutOfBoundsDevice,
        "a",
    ),
    "structure written across the end": Fault(
        """struct Row { float v[40]; };
        Row row;
        for (int j = 0; j < 40; j++) row.v[j] = a[(i + j) % 64];
        *(device Row*)(out + 32) = row;  // here""",
        findings.OutOfBoundsDevice,
        "out",
    ),
    "constant input": Fault("out[i] = small[i];  // here", findings.OutOfBoundsDevice, "small"),
    "shape": Fault("out[i] = a_shape[i];  // here", findings.OutOfBoundsDevice, "a_shape"),
    "read past a threadgroup array": Fault(
        "threadgroup float s[64], t[64];\nt[i] = s[i] = 0;\nout[i] = s[i == 63 ? 64 : i];  // here",
        findings.OutOfBoundsThreadgroup,
        "s",
    ),
    "write past a threadgroup array": Fault(
        "threadgroup half s[8][8];\ns[i / 8][i % 8 + i / 63] = 0;  // here\nout[i] = 0;",
        findings.OutOfBoundsThreadgroup,
        "s",
    ),
    "index past an array of the thread": Fault(
        "float s[4] = {0, 1, 2, 3};\ns[i / 4] += a[i];  // here\nout[i] = s[0];",
        findings.OutOfBoundsThread,
    ),
    "write to an input": Fault(
        "((device float*)a)[i] = 0;  // here\nout[i] = 0;", findings.WriteToInput, "a"
    ),
    "read of an output": Fault("out[i] += a[i];  // here", findings.UninitialisedRead, "out"),
    "read of threadgroup memory": Fault(
        "threadgroup float s[64];\nif (i != 7) s[i] = 0;\nout[i] = s[i];  // here",
        findings.UninitialisedRead,
        "s",
    ),
    "read of what another threadgroup left": Fault(
        "threadgroup float s[1];\nif (i == 0) s[0] = 0;\nout[i] = s[0];  // here",
        findings.UninitialisedRead,
        "s",
        threadgroup=1,
    ),
    "unwritten output": Fault("if (i != 5) out[i] = a[i];", findings.UnwrittenOutput, "out"),
    "no barrier between simdgroups": Fault(
        EXCHANGE.format(barrier="", step=32), findings.Race, "s", words="threadgroup_barrier"
    ),
    "no barrier within a simdgroup": Fault(
        EXCHANGE.format(barrier="", step=1), findings.Race, "s", 32, words="simdgroup_barrier"
    ),
    "a barrier of the simdgroup between simdgroups": Fault(
        EXCHANGE.format(barrier="simdgroup_barrier(mem_flags::mem_threadgroup);", step=32),
        findings.Race,
        "s",
        words="threads of one threadgroup",
    ),
    "a barrier for other memory": Fault(
        EXCHANGE.format(barrier="threadgroup_barrier(mem_flags::mem_device);", step=32),
        findings.Race,
        "s",
    ),
    "a barrier for no memory": Fault(
        EXCHANGE.format(barrier="threadgroup_barrier(mem_flags::mem_none);", step=32),
        findings.Race,
        "s",
    ),
    "a simdgroup barrier for other memory": Fault(
        EXCHANGE.format(barrier="simdgroup_barrier(mem_flags::mem_device);", step=1),
        findings.Race,
        "s",
    ),
    "a simd operation is no barrier": Fault(
        EXCHANGE.format(barrier="float sum = simd_sum(s[i]); s[i] = sum;", step=1),
        findings.Race,
        "s",
    ),
    "a threadgroup barrier does not order device memory": Fault(
        """out[i] = a[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float x = out[i ^ 32];  // here
        threadgroup_barrier(mem_flags::mem_device);
        out[i] = x;""",
        findings.Race,
        "out",
    ),
    "no barrier before the next round": Fault(
        """threadgroup float s[64];
        float x = 0;
        for (int round = 0; round < 2; round++) {
          s[i] = a[i];  // here
          threadgroup_barrier(mem_flags::mem_threadgroup);
          x += s[63 - i];  // or here
        }
        out[i] = x;""",
        findings.Race,
        "s",
    ),
    "a read after many reads": Fault(
        """threadgroup float s[1];
        if (i == 0) s[0] = 1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = s[0];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (i == 63) s[0] = 2;  // here""",
        findings.Race,
        "s",
    ),
    "every threadgroup writes one element": Fault(
        "out[i] = 0;\nout[0] = 1;  // here",
        findings.Race,
        "out",
        threadgroup=32,
        words="lanes of one simdgroup",
    ),
    "threadgroups write one element": Fault(
        "out[i < 32 ? i : 1] = a[i];  // here",
        findings.Race,
        "out",
        threadgroup=32,
        words="two threadgroups",
    ),
    "a threadgroup reads another's output": Fault(
        """if (i < 32) out[i] = a[i];
        threadgroup_barrier(mem_flags::mem_device);
        if (i >= 32) out[i] = out[i - 32];  // here""",
        findings.Race,
        "out",
        threadgroup=32,
        words="two threadgroups",
    ),
    "a barrier in a branch": Fault(
        "if (i < 32) threadgroup_barrier(mem_flags::mem_none);  // here\nout[i] = 0;",
        findings.BarrierDivergence,
    ),
    "a barrier after an early return": Fault(
        """out[i] = 0;
        if (i == 3) return;
        threadgroup_barrier(mem_flags::mem_none);  // here""",
        findings.BarrierDivergence,
    ),
    "two barriers in two branches": Fault(
        """if (i < 32) {
          threadgroup_barrier(mem_flags::mem_device);  // here
        } else {
          threadgroup_barrier(mem_flags::mem_none);  // or here
        }
        out[i] = 0;""",
        findings.BarrierDivergence,
    ),
    "barriers of unequal number": Fault(
        """for (uint n = 0; n < 1 + i / 32; n++)
          threadgroup_barrier(mem_flags::mem_none);  // here
        out[i] = 0;""",
        findings.BarrierDivergence,
    ),
    "a simd operation in a branch": Fault(
        "out[i] = 0;\nif (lane < 16) out[i] += simd_sum(1.0f);  // here", findings.SimdDivergence
    ),
    "a simd operation after an early return": Fault(
        "out[i] = 0;\nif (lane == 9) return;\nout[i] += simd_max(1.0f);  // here",
        findings.SimdDivergence,
    ),
    "two simd operations in two branches": Fault(
        """float x;
        if (lane < 16) x = simd_sum(a[i]);  // here
        else x = simd_sum(-a[i]);  // or here
        out[i] = x;""",
        findings.SimdDivergence,
    ),
    "a simd operation beside a barrier": Fault(
        """if (i < 7) threadgroup_barrier(mem_flags::mem_none);
        else out[i] = simd_sum(1.0f);  // here""",
        findings.SimdDivergence,
    ),
    "a matrix in a branch": Fault(
        """simdgroup_matrix<float, 8, 8> m(0.0f);
        if (lane != 0) simdgroup_load(m, a, 8);  // here
        out[i] = m.thread_elements()[0];""",
        findings.SimdDivergence,
    ),
    "a matrix in less than a simdgroup": Fault(
        """simdgroup_matrix<float, 8, 8> m(0.0f);
        simdgroup_multiply_accumulate(m, m, m, m);  // here
        out[i] = m.thread_elements()[0];""",
        findings.SimdDivergence,
        threadgroup=16,
    ),
    "a matrix past the end": Fault(
        """simdgroup_matrix<float, 8, 8> m;
        simdgroup_load(m, a + 1, 8);  // here
        out[i] = m.thread_elements()[0];""",
        findings.OutOfBoundsDevice,
        "a",
    ),
    "a matrix read back without a barrier": Fault(
        """threadgroup float s[64];
        simdgroup_matrix<float, 8, 8> m(1.0f);
        simdgroup_store(m, s, 8);
        simdgroup_load(m, s, 8);  // here
        out[i] = m.thread_elements()[0];""",
        findings.Race,
        "s",
        grid=32,
        words="lanes of one simdgroup",
    ),
    "a matrix's element read without a barrier": Fault(
        """threadgroup float s[64];
        simdgroup_matrix<float, 8, 8> m(1.0f);
        simdgroup_store(m, s, 8);
        uint row = (lane / 4 & 4) + lane / 2 % 4, column = (lane / 4 & 2) * 2 + lane % 2 * 2;
        out[i] = s[row * 8 + column];  // here""",
        findings.Race,
        "s",
        grid=32,
    ),
    "a matrix's element written after its load without a barrier": Fault(
        """threadgroup float s[64];
        s[i] = 0; s[i + 32] = 0;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_matrix<float, 8, 8> m;
        simdgroup_load(m, s, 8);
        uint row = (lane / 4 & 4) + lane / 2 % 4, column = (lane / 4 & 2) * 2 + lane % 2 * 2;
        s[row * 8 + column] = 1;  // here
        out[i] = m.thread_elements()[0];""",
        findings.Race,
        "s",
        grid=32,
    ),
    "a shuffle from nowhere": Fault(
        "out[i] = simd_shuffle(a[i], 20);  // here", findings.InactiveLane, threadgroup=16
    ),
    "too much threadgroup memory": Fault(
        "threadgroup float s[8193];  // here\ns[i] = 0;\nout[i] = s[i];",
        findings.ThreadgroupMemory,
        "s",
    ),
    "too much threadgroup memory together": Fault(
        """threadgroup half s[64][128];
        threadgroup vec<float, 4> t[1025];  // here
        s[i][0] = 0; t[i] = float4(0);
        out[i] = s[i][0] + t[i].x;""",
        findings.ThreadgroupMemory,
        "t",
    ),
    "too many threads": Fault("out[i] = 0;", findings.ThreadgroupSize, grid=1025, threadgroup=1025),
    "a slot for whoever comes first": Fault(
        "out[i] = atomic_fetch_add_explicit((device atomic<int>*)order, 1, memory_order_relaxed);",
        findings.ScheduleDependent,
        "out",
        init=0,
    ),
    "no threads": Fault("out[i] = 0;", findings.ThreadgroupSize, grid=0),
    "a wait for another thread": Fault(
        """threadgroup atomic<int> s[1];
        if (i == 0) atomic_store_explicit(s, 0, memory_order_relaxed);
        if (i == 40) atomic_store_explicit(s, 1, memory_order_relaxed);
        while (i == 0 && atomic_load_explicit(s, memory_order_relaxed) == 0) {}  // here
        out[i] = 0;""",
        findings.Endless,
    ),
    "a slot for the threadgroup that comes first": Fault(
        "out[i] = atomic_fetch_add_explicit((device atomic<int>*)order, 1, memory_order_relaxed);",
        findings.ScheduleDependent,
        "out",
        threadgroup=1,
        init=0,
    ),
    "an atomic beside a plain access": Fault(
        """threadgroup atomic<int> s[1];
        if (i != 1) atomic_store_explicit(s, 0, memory_order_relaxed);  // here
        else *(threadgroup int*)s = 1;  // or here
        out[i] = 0;""",
        findings.Race,
        "s",
    ),
}
