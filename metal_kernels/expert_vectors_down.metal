#include "expert_vectors.h"

// What expert_tiles_down computes, of experts that have few tokens.
//
//   h                        the output of expert_vectors_gate_up
//   starts                   [E + 1] int: the answer of expert_order
//   down                     [E, M, N], packed to Bits or of a float type
//   down_{scales,biases}     [E, M, N / Group]; not read where Bits is 0: plain
//   shared_down, ...         [M, N] and so on, stored as down is; not read where not Shared
//   T                        int
//   y                        [T * TopK, M] of h's type, where Shared [T * TopK + T, M]
// Template: XT, that of h; Shared bool; E, M, N, Bits, Group int. N is a multiple of 8 and of the group, M of 8.
// Grid (32, M / 8, Z), any threadgroup (32, m, 1) that divides it: a simdgroup has up to 4 tokens of one expert, and 8
// rows of the matrix. Z is at least the number of such turns; simdgroups beyond do nothing.
const int lane = thread_position_in_grid.x;
const int first_row = thread_position_in_grid.y * VectorRows;
const ExpertTokens tokens =
    tokens_of_turn<E, VectorTokens, Shared>(starts, T, thread_position_in_grid.z, lane);
if (tokens.expert < 0) {
  return;
}
const bool is_shared = Shared && tokens.expert == E;
const auto rows_of_down = rows_from<Bits, Group>(
    is_shared ? shared_down : down,
    is_shared ? shared_down_scales : down_scales,
    is_shared ? shared_down_biases : down_biases,
    (is_shared ? 0 : tokens.expert * M) + first_row,
    N);

// Tokens beyond the last are the last again, and no one sees them.
int rows[VectorTokens];
#pragma unroll
for (int i = 0; i < VectorTokens; ++i) {
  rows[i] = min(i, tokens.count - 1) * N;
}

float sums[2 * PairSums];
#pragma unroll
for (int i = 0; i < 2 * PairSums; ++i) {
  sums[i] = 0;
}
for (int column = lane * Columns; column < N; column += Step) {
  add_vector_step<VectorRows, 0>(
      h + size_t(tokens.first) * N, rows, tokens.count, rows_of_down, column, sums);
}

#pragma unroll
for (int pair = 0; pair < 2; ++pair) {
  const int token = 2 * pair + lane / VectorRows;
  const float sum = sum_of_pair(sums + pair * PairSums, lane);
  if (lane < PairSums && token < tokens.count) {
    y[size_t(tokens.first + token) * M + first_row + lane % VectorRows] = XT(sum);
  }
}
