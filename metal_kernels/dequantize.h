#include "vectors.h"

// Matrices as MLX stores them: plain, or in affine groups, an element being scale * code + bias. Codes of
// 4 or 8 bits fill words of 32, the first in the lowest bits.
//
// Codes become numbers two at a time, without a shift and a conversion for each: the bits 0x6400 + n are the
// half 1024 + n, n < 1024, and less 1024 that is n exactly. Codes of 4 bits whose number is odd stand 4 bits
// too high in such a half, and stay 16 times as large: what they are multiplied by is divided by 16 instead
// (`unit_of`), which changes no digit.

// The lower and the upper 16 of these bits as numbers, each below 1024, less `Offset`.
template <int Offset>
METAL_FUNC half2 halves_of(uint bits) {
  constexpr uint origin = 0x6400 + Offset;
  return as_type<half2>(bits | 0x64006400u) - as_type<half2>(origin << 16 | origin);
}

// Code i of neighbouring words, divided by unit_of(i).
template <int Bits>
METAL_FUNC float code_of(const thread uint* words, int i) {
  if (Bits == 8) {
    return float(halves_of<0>((words[i / 4] >> (i % 2 * 8)) & 0x00ff00ffu)[i / 2 % 2]);
  }
  const uint mask = i % 2 == 0 ? 0x000f000fu : 0x00f000f0u;
  return float(halves_of<0>((words[i / 8] >> (i / 2 % 2 * 8)) & mask)[i / 4 % 2]);
}
template <int Bits>
METAL_FUNC float unit_of(int i) {
  return Bits == 4 && i % 2 == 1 ? 0.0625f : 1.0f;
}

// 4 neighbouring elements of a matrix, the first of which is number `at`, a multiple of 4. Bits is 0 where
// the matrix is plain.
template <int Bits, int Group, typename W, typename S>
METAL_FUNC float4 weights_at(const device W* w, const device S* scales, const device S* biases, int at) {
  if (Bits == 0) {
    return load<4>(w + at);
  }
  const uint word = Bits == 4 ? ((const device ushort*)w)[at / 4] : ((const device uint*)w)[at / 4];
  const float scale = float(scales[at / Group]), bias = float(biases[at / Group]);
  float4 x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = code_of<Bits>(&word, i) * (scale * unit_of<Bits>(i)) + bias;
  }
  return x;
}
