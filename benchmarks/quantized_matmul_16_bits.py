"""MLX 0.32.4's `quantized_matmul` of 16-bit rows sums in 16 bits on CPU: relative rms errors.

Models are float32 there: `mlx_kimi/loading/load.py` sees to it.
"""

import mlx.core as mx

for columns in (128, 1024, 8192):
    x, w = mx.random.normal((8, columns), mx.bfloat16), mx.random.normal((256, columns))
    q = mx.quantize(w.astype(mx.bfloat16), 64, 8)
    expected = x.astype(mx.float32) @ mx.dequantize(*q, 64, 8).astype(mx.float32).T
    error = mx.quantized_matmul(x, *q, group_size=64, bits=8) - expected
    print(mx.default_device(), columns, mx.sqrt((error**2).mean() / (expected**2).mean()).item())
