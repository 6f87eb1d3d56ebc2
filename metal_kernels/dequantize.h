#include "vectors.h"

// Matrices as MLX stores them: plain, or in affine groups, an element being scale * code + bias. Codes of
// 4 or 8 bits fill words of 32, the first in the lowest bits.

// Code i of a word.
template <int Bits>
METAL_FUNC float code_of(uint word, int i) {
  return float((word >> (Bits * i)) & ((1u << Bits) - 1));
}

// 4 neighbouring elements of a matrix, the first of which is number `at`, a multiple of 4. Bits is 0 where
// the matrix is plain.
template <int Bits, int Group, typename W, typename S>
METAL_FUNC float4 weights_at(const device W* w, const device S* scales, const device S* biases, int at) {
  if (Bits == 0) {
    return load<4>(w + at);
  }
  const uint codes =
      Bits == 4 ? ((const device ushort*)w)[at / 4] : ((const device uint*)w)[at / 4];
  float4 x;
  for (int i = 0; i < 4; ++i) {
    x[i] = code_of<Bits>(codes, i);
  }
  return x * float(scales[at / Group]) + float(biases[at / Group]);
}
