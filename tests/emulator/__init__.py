"""Runs the exact text of Metal kernels on the CPU and checks every access.

`metal_text` (msl.py) makes the text that MLX would hand to Metal. `translate` turns it into C++ for
OpenCL, which has Metal's address spaces, and clang compiles that beside the library of `shim/`.
`instrument` adds a call before each load and store. `launch` runs every thread as a fiber of
`runtime/`, which keeps for each element who touched it last and after which barrier. A fault raises
one of `findings`; `lint` finds without running what a Metal compiler would refuse.

What differs from a GPU: exp, log and their kin are the C library's; a * b + c is never fused; small
numbers are not flushed; simd_sum adds neighbours first, then pairs, prefix sums go lane by lane;
matrices multiply in float32 with one rounding a product. Registers, and with them how many threads
fit in a threadgroup, are not modelled. In a thread's own arrays an index is checked, a pointer is
not, nor what was never written. Threads change places only where they meet, so that a race shows as
one finding and not as a wrong result.

Confirmed on Linux, on x86-64 and, cross-compiled and under qemu-user, on arm64. For macOS the
runtime and kernels compile; nobody has run them there.
"""

from .emulator import EmulatedKernel, emulator, metal_kernel
from .findings import Finding

__all__ = ["EmulatedKernel", "Finding", "emulator", "metal_kernel"]
