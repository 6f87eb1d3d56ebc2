#include "matrix_rows.h"

// Products with matrices as MLX stores them. A lane takes 8 neighbouring columns of every 256, so
// that a simdgroup walks a row in steps of 256; rows that are no multiple of 256 long end with idle
// lanes, and rows of 2304 (9 * 256) have no such end. Eight columns never straddle a group.
constexpr constant int Columns = 8;          // of a lane, in one step
constexpr constant int Step = 32 * Columns;  // of a simdgroup

// 8 columns of a row, from `column` on: codes, each divided by its unit.
template <int Bits, bool Affine>
struct Stored {
  static METAL_FUNC void load_numbers(const device uint8_t* row, int column, thread float* numbers) {
    uint words[2] = {0, 0};
    load_codes<Bits>(row + column / Columns * Bits, words);
#pragma unroll
    for (int i = 0; i < Columns; ++i) {
      numbers[i] = code_of<Bits, Affine>(words, i);
    }
  }
};

// The same of a plain matrix: its elements.
template <bool Affine>
struct Stored<0, Affine> {
  template <typename W>
  static METAL_FUNC void load_numbers(const device W* row, int column, thread float* numbers) {
#pragma unroll
    for (int i = 0; i < Columns; i += 4) {
      const float4 four = load<4>(row + column + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        numbers[i + j] = four[j];
      }
    }
  }
};

// The same of row r, and its scale and bias there: 1 and 0 where the matrix has none.
template <int Bits, int Group, typename W, typename S>
METAL_FUNC void load_row(
    thread const MatrixRows<Bits, Group, W, S>& rows,
    int r,
    int column,
    thread float* numbers,
    thread float& scale,
    thread float& bias) {
  constexpr bool Affine = IsAffine<S>::value;
  Stored<Bits, Affine>::load_numbers(rows.weight + r * rows.row_size(), column, numbers);
  const int group = rows.group_of(r, column);
  scale = Bits == 0 ? 1.0f : scale_of<Bits, Group>(rows.scales[group]);
  bias = Bits != 0 && Affine ? float(rows.biases[group]) : 0.0f;
}

METAL_FUNC float dot_of_columns(const thread float* part, const thread float* numbers) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Columns; ++i) {
    sum += part[i] * numbers[i];
  }
  return sum;
}

// Loads 8 columns of x, from `column` on, each times the unit of the code that it will be multiplied by, and
// returns their sum without units. x may lie anywhere: X is a pointer.
template <int Bits, bool Affine, typename X>
METAL_FUNC float load_columns(X x, int column, thread float* part) {
  float total = 0;
#pragma unroll
  for (int i = 0; i < Columns; i += 4) {
    const float4 four = load<4>(x + column + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      part[i + j] = four[j] * unit_of<Bits, Affine && Bits != 0>(i + j);
      total += four[j];
    }
  }
  return total;
}

// sums[r] += this lane's part, 8 columns from `column` on, of row r times x, of which `part` and `total` are
// what load_columns found.
template <int Rows, int Bits, int Group, typename W, typename S>
METAL_FUNC void add_columns(
    const thread float* part,
    float total,
    thread const MatrixRows<Bits, Group, W, S>& rows,
    int column,
    thread float* sums) {
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    float numbers[Columns], scale, bias;
    load_row(rows, r, column, numbers, scale, bias);
    const float products = dot_of_columns(part, numbers);
    if (Bits == 0) {
      sums[r] += products;
    } else if (IsAffine<S>::value) {
      sums[r] += products * scale + total * bias;
    } else {
      sums[r] += products * scale;
    }
  }
}

// One step of a lane: sums[r] += its part of row r times x [K].
template <int Rows, int Bits, int Group, typename X, typename W, typename S>
METAL_FUNC void add_step(
    X x, thread const MatrixRows<Bits, Group, W, S>& rows, int column, thread float* sums) {
  float part[Columns];
  const float total = load_columns<Bits, IsAffine<S>::value>(x, column, part);
  add_columns<Rows>(part, total, rows, column, sums);
}

// The same for rows of two matrices. x is loaded once where both are stored alike.
template <int Rows, int Bits, int Group, typename X, typename W, typename S>
METAL_FUNC void add_step(
    X x,
    thread const MatrixRows<Bits, Group, W, S>& first,
    thread const MatrixRows<Bits, Group, W, S>& second,
    int column,
    thread float* first_sums,
    thread float* second_sums) {
  float part[Columns];
  const float total = load_columns<Bits, IsAffine<S>::value>(x, column, part);
  add_columns<Rows>(part, total, first, column, first_sums);
  add_columns<Rows>(part, total, second, column, second_sums);
}
template <int Rows, typename X, typename First, typename Second>
METAL_FUNC void add_step(
    X x,
    thread const First& first,
    thread const Second& second,
    int column,
    thread float* first_sums,
    thread float* second_sums) {
  add_step<Rows>(x, first, column, first_sums);
  add_step<Rows>(x, second, column, second_sums);
}

// All columns of a lane. The steps that every lane takes are unrolled, so that the loads of one do not wait for
// the arithmetic of the one before.
template <int Rows, int Bits, int Group, typename X, typename W, typename S>
METAL_FUNC void add_products(
    X x, MatrixRows<Bits, Group, W, S> rows, int lane, thread float* sums) {
  int column = lane * Columns;
#pragma unroll 4
  for (int step = 0; step < rows.K / Step; ++step, column += Step) {
    add_step<Rows>(x, rows, column, sums);
  }
  if (column < rows.K) {
    add_step<Rows>(x, rows, column, sums);
  }
}
template <int Rows, typename X, typename First, typename Second>
METAL_FUNC void add_products(
    X x,
    First first,
    Second second,
    int lane,
    thread float* first_sums,
    thread float* second_sums) {
  int column = lane * Columns;
#pragma unroll 2
  for (int step = 0; step < first.K / Step; ++step, column += Step) {
    add_step<Rows>(x, first, second, column, first_sums, second_sums);
  }
  if (column < first.K) {
    add_step<Rows>(x, first, second, column, first_sums, second_sums);
  }
}
