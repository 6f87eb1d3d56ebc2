"""A row softmax as its author ships it: one threadgroup a row, whatever the row's length."""

import mlx.core as mx

THREADS = 128
SOURCE = """
  const uint at = thread_position_in_threadgroup.x;
  auto row = x + threadgroup_position_in_grid.y * N;
  device T* out = y + threadgroup_position_in_grid.y * N;
  threadgroup float partial[THREADS / 32];  // of each simdgroup: its maximum, then its sum

  float top = -INFINITY;
  for (uint i = at; i < N; i += THREADS) top = metal::max(top, float(row[i]));
  top = simd_max(top);
  if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = top;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint s = 0; s < THREADS / 32; s++) top = metal::max(top, partial[s]);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // until every maximum has been read

  float sum = 0;
  for (uint i = at; i < N; i += THREADS) sum += metal::exp(float(row[i]) - top);
  sum = simd_sum(sum);
  if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0;
  for (uint s = 0; s < THREADS / 32; s++) total += partial[s];

  for (uint i = at; i < N; i += THREADS) out[i] = T(metal::exp(float(row[i]) - top) / total);
"""


def softmax(x: mx.array) -> mx.array:
    """The softmax of each row of x [rows, N], in the dtype of x."""
    kernel = mx.fast.metal_kernel("row_softmax", ["x"], ["y"], SOURCE)
    return kernel(
        inputs=[x],
        template=[("T", x.dtype), ("N", x.shape[1]), ("THREADS", THREADS)],
        grid=(THREADS, x.shape[0], 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]
