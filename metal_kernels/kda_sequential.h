// Sums over the N * Share neighbouring lanes that hold parts of the same N sums: lane m * Share + s of
// them, s < Share, has its part of sum i ^ m in x[i], and gets all of sum m. Each step halves the number
// of values and of lanes that share one, and in this order a lane keeps the first half wherever it
// stands: 8 sums over 32 lanes take 9 shuffles and nothing else. Overwrites x.
template <int N, int Share>
inline float sum_of_lane(thread float* x) {
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
