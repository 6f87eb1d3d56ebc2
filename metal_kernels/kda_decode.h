#include "vectors.h"

// The sum of all elements of the 4 neighbouring lanes that share a row, in each of them.
inline float sum_over_row(float4 x) {
  float sum = (x.x + x.y) + (x.z + x.w);
  sum += simd_shuffle_xor(sum, 1);
  return sum + simd_shuffle_xor(sum, 2);
}

// 4 neighbouring elements of a matrix, the first of which is number `at`, a multiple of 4.
// Bits 0: the matrix is plain. 4 or 8: affine, as MLX packs it, the first element in the lowest bits.
template <int Bits, int Group, typename W, typename S>
inline float4 weights_at(const device W* w, const device S* scales, const device S* biases, int at) {
  if (Bits == 0) {
    return load<4>(w + at);
  }
  const uint packed =
      Bits == 4 ? ((const device ushort*)w)[at / 4] : ((const device uint*)w)[at / 4];
  const uint mask = (1u << Bits) - 1;
  float4 x;
  for (int i = 0; i < 4; ++i) {
    x[i] = float((packed >> (Bits * i)) & mask);
  }
  return x * float(scales[at / Group]) + float(biases[at / Group]);
}
