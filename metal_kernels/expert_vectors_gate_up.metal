#include "activations.h"
#include "expert_vectors.h"

// What expert_tiles_gate_up computes, of experts that have few tokens.
//
//   x                            [T, K] of any float type
//   order, starts                [T * TopK], [E + 1] int: the answer of expert_order
//   gate, up                     [E, N, K], packed to Bits or of a float type
//   {gate,up}_{scales,biases}    [E, N, K / Group]; not read where Bits is 0: plain
//   shared_gate, shared_up, ...  [N, K] and so on, stored as gate and up are; not read where not Shared
//   T                            int
//   h                            [T * TopK, N] of x's type, where Shared [T * TopK + T, N]
// Template: XT, that of x; Shared bool; E, TopK, K, N, GateBits, GateGroup, UpBits, UpGroup int. K is a multiple of 8
// and of the groups, N of 4.
// Grid (32, N / 4, Z), any threadgroup (32, m, 1) that divides it: a simdgroup has up to 4 tokens of one expert, and 4
// rows of both matrices. Z is at least the number of such turns; simdgroups beyond do nothing.
constexpr int Rows = VectorRows / 2;

const int lane = thread_position_in_grid.x;
const int first_row = thread_position_in_grid.y * Rows;
const ExpertTokens tokens =
    tokens_of_turn<E, VectorTokens, Shared>(starts, T, thread_position_in_grid.z, lane);
if (tokens.expert < 0) {
  return;
}
const bool is_shared = Shared && tokens.expert == E;
const int matrix_row = (is_shared ? 0 : tokens.expert * N) + first_row;
const auto gates = rows_from<GateBits, GateGroup>(
    is_shared ? shared_gate : gate,
    is_shared ? shared_gate_scales : gate_scales,
    is_shared ? shared_gate_biases : gate_biases,
    matrix_row,
    K);
const auto ups = rows_from<UpBits, UpGroup>(
    is_shared ? shared_up : up,
    is_shared ? shared_up_scales : up_scales,
    is_shared ? shared_up_biases : up_biases,
    matrix_row,
    K);

// Tokens beyond the last are the last again, and no one sees them.
int rows[VectorTokens];
#pragma unroll
for (int i = 0; i < VectorTokens; ++i) {
  rows[i] = token_at<TopK>(order, T * TopK, tokens.first + min(i, tokens.count - 1)) * K;
}

float sums[2 * PairSums];
#pragma unroll
for (int i = 0; i < 2 * PairSums; ++i) {
  sums[i] = 0;
}
for (int column = lane * Columns; column < K; column += Step) {
  add_two_vector_steps(x, rows, tokens.count, gates, ups, column, sums);
}

#pragma unroll
for (int pair = 0; pair < 2; ++pair) {
  const int token = 2 * pair + lane / VectorRows;
  const float g = sum_of_pair(sums + pair * PairSums, lane);
  const float u = simd_shuffle_xor(g, Rows);
  if (lane < PairSums && token < tokens.count && lane % VectorRows < Rows) {
    h[size_t(tokens.first + token) * N + first_row + lane % VectorRows] = XT(silu(g) * u);
  }
}
