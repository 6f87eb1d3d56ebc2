#include "dequantize.h"

// Products with matrices as MLX stores them. A lane takes 8 neighbouring columns of every 256, so
// that a simdgroup walks a row in steps of 256; rows that are no multiple of 256 long end with idle
// lanes, and rows of 2304 (9 * 256) have no such end. Eight columns never straddle a group.
constexpr constant int Columns = 8;          // of a lane, in one step
constexpr constant int Step = 32 * Columns;  // of a simdgroup

// The sum of x[i] * code i over 8 columns of a row, from `column` on.
template <int Bits>
struct Stored {
  static constexpr constant bool quantized = true;
  static float dot(const device uint32_t* row, int column, const thread float* x) {
    constexpr int PerWord = 32 / Bits;
    float sum = 0;
    for (int i = 0; i < Columns; ++i) {
      sum += x[i] * code_of<Bits>(row[column / PerWord + i / PerWord], i % PerWord);
    }
    return sum;
  }
};

// The same of a plain matrix: its elements instead of codes.
template <>
struct Stored<0> {
  static constexpr constant bool quantized = false;
  template <typename W>
  static float dot(const device W* row, int column, const thread float* x) {
    float sum = 0;
    for (int i = 0; i < Columns; ++i) {
      sum += x[i] * float(row[column + i]);
    }
    return sum;
  }
};

// sums[r] += this lane's part, 8 columns from `column` on, of row r of a matrix [rows, K], times x [K].
// x may lie anywhere: X is a pointer.
template <int Bits, int Group, int Rows, typename X, typename W, typename S>
METAL_FUNC void add_step(
    X x,
    const device W* matrix,
    const device S* scales,
    const device S* biases,
    int K,
    int column,
    thread float* sums) {
  const int words = Stored<Bits>::quantized ? K * Bits / 32 : K;  // of one row
  float part[Columns];
  float total = 0;
#pragma unroll
  for (int i = 0; i < Columns; ++i) {
    part[i] = float(x[column + i]);
    total += part[i];
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const float products = Stored<Bits>::dot(matrix + r * words, column, part);
    if (Stored<Bits>::quantized) {
      const int group = r * (K / Group) + column / Group;
      sums[r] += products * float(scales[group]) + total * float(biases[group]);
    } else {
      sums[r] += products;
    }
  }
}

// The same for rows from `row` on, over all columns of this lane. A stack of matrices may have more than 2^31
// elements: where its rows start is 64 bits wide. The steps that every lane takes are unrolled, so that the
// loads of one do not wait for the arithmetic of the one before.
template <int Bits, int Group, int Rows, typename X, typename W, typename S>
METAL_FUNC void add_products(
    X x,
    const device W* matrix,
    const device S* scales,
    const device S* biases,
    int row,
    int K,
    int lane,
    thread float* sums) {
  matrix += size_t(row) * (Stored<Bits>::quantized ? K * Bits / 32 : K);
  if (Stored<Bits>::quantized) {
    scales += size_t(row) * (K / Group);
    biases += size_t(row) * (K / Group);
  }
  int column = lane * Columns;
#pragma unroll 4
  for (int step = 0; step < K / Step; ++step, column += Step) {
    add_step<Bits, Group, Rows>(x, matrix, scales, biases, K, column, sums);
  }
  if (column < K) {
    add_step<Bits, Group, Rows>(x, matrix, scales, biases, K, column, sums);
  }
}
