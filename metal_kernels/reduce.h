// Sums over lanes and over threadgroups. The order of the additions is part of each: another one gives
// other bits.

// The sum of x over all threads of a threadgroup of so many simdgroups, in each of them. `partial` serves
// this sum alone.
template <int Simdgroups>
METAL_FUNC float sum_over_threadgroup(float x, int index, threadgroup float* partial) {
  x = simd_sum(x);
  if (index % 32 == 0) {
    partial[index / 32] = x;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0;
#pragma unroll
  for (int i = 0; i < Simdgroups; ++i) {
    total += partial[i];
  }
  return total;
}

// The sums of x[0], x[1], ... over a simdgroup: lane r gets that of x[r], r < Rows, all others nothing.
template <int Rows>
METAL_FUNC float sum_of_rows(const thread float* x, int lane) {
  float own = 0;
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const float sum = simd_sum(x[r]);
    own = lane == r ? sum : own;
  }
  return own;
}

// The sum of all elements of 4 neighbouring lanes, the first a multiple of 4, in each of them.
METAL_FUNC float sum_over_four_lanes(float4 x) {
  float sum = (x.x + x.y) + (x.z + x.w);
  sum += simd_shuffle_xor(sum, 1);
  return sum + simd_shuffle_xor(sum, 2);
}

// Sums over the 16 lanes of each half of a simdgroup, N of them at once, N = 8 or 16: a lane gets that
// of x[lane % N]. Each step halves the number of values and of lanes that share one, so that 16 sums
// take 15 shuffles, where a reduction of each would take 64. Overwrites x.
template <int N>
METAL_FUNC float sums_over_half(thread float* x, int lane) {
#pragma unroll
  for (int width = N / 2; width > 0; width /= 2) {
    const bool upper = (lane & width) != 0;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      // (Both are read first: a choice between elements would be an index that varies, and x in memory.)
      const float low = x[i], high = x[i + width];
      const float kept = upper ? high : low;
      const float sent = upper ? low : high;
      x[i] = kept + simd_shuffle_xor(sent, width);
    }
  }
  return N == 16 ? x[0] : x[0] + simd_shuffle_xor(x[0], 8);
}

// Sums over the N * Share neighbouring lanes that hold parts of the same N sums: lane m * Share + s of
// them, s < Share, has its part of sum i ^ m in x[i], and gets all of sum m. Each step halves the number
// of values and of lanes that share one, and in this order a lane keeps the first half wherever it
// stands: 8 sums over 32 lanes take 9 shuffles and nothing else. Overwrites x.
template <int N, int Share>
METAL_FUNC float sum_of_lane(thread float* x) {
#pragma unroll
  for (int width = N / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      x[i] += simd_shuffle_xor(x[i + width], width * Share);
    }
  }
  float sum = x[0];
#pragma unroll
  for (int step = 1; step < Share; step *= 2) {
    sum += simd_shuffle_xor(sum, step);
  }
  return sum;
}
