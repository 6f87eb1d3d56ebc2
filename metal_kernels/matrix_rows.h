#include "dequantize.h"

// Rows of a matrix [..., K]. Where it is plain Bits is 0, and scales and biases are not read; nor are biases of
// small floats. W is the type of a plain element, or a byte.
template <int Bits, int Group, typename W, typename S>
struct MatrixRows {
  const device W* weight;
  const device S* scales;
  const device S* biases;
  int K;

  METAL_FUNC int row_size() const {
    return Bits == 0 ? K : K * Bits / 8;
  }
  // The place of an element's scale and bias.
  METAL_FUNC int group_of(int row, int column) const {
    return row * (K / Group) + column / Group;
  }
};
// Those from `row` on. A stack of matrices may have more than 2^31 elements: where its rows start is 64 bits
// wide.
template <int Bits, int Group, typename W, typename S, typename B>
METAL_FUNC MatrixRows<Bits, Group, W, S> rows_from(
    const device W* weight, const device S* scales, const device B*, int row, int K) {
  return {weight + size_t(row) * K, scales, scales, K};
}
template <int Bits, int Group, typename S, typename B>
METAL_FUNC MatrixRows<Bits, Group, uint8_t, S> rows_from(
    const device uint32_t* weight, const device S* scales, const device B* biases, int row, int K) {
  const size_t groups = size_t(row) * (K / Group);
  return {
      (const device uint8_t*)weight + size_t(row) * (K * Bits / 8),
      scales + groups,
      (const device S*)biases + groups,
      K};
}
