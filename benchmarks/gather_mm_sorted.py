"""MLX 0.32.4 multiplies sorted rows by wrong members of a stack on NVIDIA GPUs: it is shown here.

`metal_kernels/matmul.py` goes around it. Relative rms errors against the products one by one.
"""

import mlx.core as mx

E, N, K = 8, 256, 512
for rows in (64, 512, 4096):
    x, w = mx.random.normal((rows, 1, K)), mx.random.normal((E, K, N))
    experts = mx.sort(mx.random.randint(0, E, (rows,)))
    expected = mx.stack([x[i] @ w[experts[i].item()] for i in range(rows)])
    for is_sorted in (True, False):
        found = mx.gather_mm(x, w, rhs_indices=experts, sorted_indices=is_sorted)
        error = mx.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()).item()
        print(f"{mx.default_device()} {rows} rows, sorted_indices={is_sorted}: {error:.1e}")
