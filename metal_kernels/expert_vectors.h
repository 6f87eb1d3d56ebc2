#include "expert_walk.h"
#include "matvec.h"
#include "reduce.h"

// Products of up to 4 tokens of one expert with 8 rows of its matrices: a weight is decoded once for all of them. The
// tokens are two pairs, of which the second may have none.
constexpr constant int VectorRows = 8;
constexpr constant int VectorTokens = 4;
constexpr constant int PairSums = 2 * VectorRows;

// Loads 8 columns of each token, from `column` on: as load_columns does. The tokens are rows of x that begin at
// `tokens`.
template <int Bits, bool Affine, typename X>
METAL_FUNC void load_tokens(
    X x, const thread int* tokens, int count, int column, thread float* part, thread float* total) {
#pragma unroll
  for (int token = 0; token < VectorTokens; ++token) {
    if (token < 2 || count > 2) {
      total[token] = load_columns<Bits, Affine>(x + tokens[token], column, part + token * Columns);
    }
  }
}

// sums[16 p + 8 t + First + r] += this lane's part, 8 columns from `column` on, of row r times token 2 p + t, of
// which `part` and `total` are what load_tokens found.
template <int Rows, int First, int Bits, int Group, typename W, typename S>
METAL_FUNC void add_pairs(
    const thread float* part,
    const thread float* total,
    int count,
    thread const MatrixRows<Bits, Group, W, S>& rows,
    int column,
    thread float* sums) {
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    float numbers[Columns], scale, bias;
    load_row(rows, r, column, numbers, scale, bias);
#pragma unroll
    for (int token = 0; token < VectorTokens; ++token) {
      if (token < 2 || count > 2) {
        const float products = dot_of_columns(part + token * Columns, numbers);
        const int at = token / 2 * PairSums + token % 2 * VectorRows + First + r;
        sums[at] = fma(products, scale, sums[at]);
        if (Bits != 0 && IsAffine<S>::value) {
          sums[at] = fma(total[token], bias, sums[at]);
        }
      }
    }
  }
}

// One step of a lane, for some rows of one matrix.
template <int Rows, int First, int Bits, int Group, typename X, typename W, typename S>
METAL_FUNC void add_vector_step(
    X x,
    const thread int* tokens,
    int count,
    thread const MatrixRows<Bits, Group, W, S>& rows,
    int column,
    thread float* sums) {
  float part[VectorTokens * Columns], total[VectorTokens];
  load_tokens<Bits, IsAffine<S>::value>(x, tokens, count, column, part, total);
  add_pairs<Rows, First>(part, total, count, rows, column, sums);
}
// The same for 4 rows of two matrices. x is loaded once where both are stored alike.
template <int Bits, int Group, typename X, typename W, typename S>
METAL_FUNC void add_two_vector_steps(
    X x,
    const thread int* tokens,
    int count,
    thread const MatrixRows<Bits, Group, W, S>& first,
    thread const MatrixRows<Bits, Group, W, S>& second,
    int column,
    thread float* sums) {
  float part[VectorTokens * Columns], total[VectorTokens];
  load_tokens<Bits, IsAffine<S>::value>(x, tokens, count, column, part, total);
  add_pairs<VectorRows / 2, 0>(part, total, count, first, column, sums);
  add_pairs<VectorRows / 2, VectorRows / 2>(part, total, count, second, column, sums);
}
template <typename X, typename First, typename Second>
METAL_FUNC void add_two_vector_steps(
    X x,
    const thread int* tokens,
    int count,
    thread const First& first,
    thread const Second& second,
    int column,
    thread float* sums) {
  add_vector_step<VectorRows / 2, 0>(x, tokens, count, first, column, sums);
  add_vector_step<VectorRows / 2, VectorRows / 2>(x, tokens, count, second, column, sums);
}

// The sums of one pair over all lanes: lane 8 t + r, and lane 16 more, get that of row r and token t.
METAL_FUNC float sum_of_pair(thread float* sums, int lane) {
  const float half_sum = sums_over_half<PairSums>(sums, lane);
  return half_sum + simd_shuffle_xor(half_sum, 16);
}
