"""MLX 0.32.4's `gather_mm` misreads sorted rows whose unit axis came from indexing, on NVIDIA GPUs.

Relative rms errors against the same product unsorted; `metal_kernels/matmul.py` lays rows out anew.
"""

import mlx.core as mx

x, w = mx.random.normal((512, 256)), mx.random.normal((8, 256, 64))
experts = mx.sort(mx.random.randint(0, 8, (512,)))
for made, rows in (("x[:, None]", x[:, None]), ("x.reshape(-1, 1, 256)", x.reshape(-1, 1, 256))):
    expected = mx.gather_mm(rows, w, rhs_indices=experts)
    found = mx.gather_mm(rows, w, rhs_indices=experts, sorted_indices=True)
    error = mx.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()).item()
    print(f"{mx.default_device()}, {made}: {error:.1e}")
