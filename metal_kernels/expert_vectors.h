#include "expert_walk.h"
#include "matvec.h"
#include "reduce.h"

// Products of up to 4 tokens of one expert with 8 rows of its matrices: a weight is decoded once for all of them. The
// tokens are two pairs, of which the second may have none.
constexpr constant int VectorRows = 8;
constexpr constant int VectorTokens = 4;
constexpr constant int PairSums = 2 * VectorRows;

// sums[16 p + 8 t + First + r] += this lane's part, 8 columns from `column` on, of row r times token 2 p + t. The
// tokens are rows of x that begin at `tokens`.
template <int Rows, int First, int Bits, int Group, typename X, typename W, typename S>
METAL_FUNC void add_pairs(
    X x,
    const thread int* tokens,
    int count,
    thread const MatrixRows<Bits, Group, W, S>& rows,
    int column,
    thread float* sums) {
  constexpr bool Affine = IsAffine<S>::value;
  float part[VectorTokens * Columns], total[VectorTokens];
#pragma unroll
  for (int token = 0; token < VectorTokens; ++token) {
    if (token < 2 || count > 2) {
      total[token] = load_columns<Bits, Affine>(x + tokens[token], column, part + token * Columns);
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    float numbers[Columns];
    Stored<Bits, Affine>::load_numbers(rows.weight + r * rows.row_size(), column, numbers);
    const int group = r * (rows.K / Group) + column / Group;
    const float scale = Bits == 0 ? 1.0f : scale_of<Bits, Group>(rows.scales[group]);
    const float bias = Bits != 0 && Affine ? float(rows.biases[group]) : 0.0f;
#pragma unroll
    for (int token = 0; token < VectorTokens; ++token) {
      if (token < 2 || count > 2) {
        const float products = dot_of_columns(part + token * Columns, numbers);
        const int at = token / 2 * PairSums + token % 2 * VectorRows + First + r;
        sums[at] = fma(products, scale, sums[at]);
        if (Bits != 0 && Affine) {
          sums[at] = fma(total[token], bias, sums[at]);
        }
      }
    }
  }
}

// The sums of one pair over all lanes: lane 8 t + r, and lane 16 more, get that of row r and token t.
METAL_FUNC float sum_of_pair(thread float* sums, int lane) {
  const float half_sum = sums_over_half<PairSums>(sums, lane);
  return half_sum + simd_shuffle_xor(half_sum, 16);
}
