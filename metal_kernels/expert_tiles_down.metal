#include "expert_tiles.h"

// The second half of the experts of many tokens: down h of each token and expert it chose, both in the
// order of the experts.
//
//   h                        the output of expert_tiles_gate_up
//   starts                   [E + 1] int: the answer of expert_order
//   down                     [E, M, N], packed to Bits or of a float type
//   down_{scales,biases}     [E, M, N / Group]; not read where Bits is 0: plain
//   shared_down, ...         [M, N] and so on, stored as down is; not read where not Shared
//   T                        int
//   y                        [T * TopK, M] of h's type, where Shared [T * TopK + T, M]
// Template: XT, that of h; Skip, Shared bool; TokenTiles, E, M, N, Bits, Group int. N is a multiple of 64 and of
// the group, M of 32.
// Grid (128, ceil(M / 128), Z), threadgroup (128, 1, 1): a threadgroup has 8 TokenTiles tokens of one expert, each of
// its simdgroups 32 rows of the matrix. Z and Skip are as of expert_tiles_gate_up.
constexpr int Rows = 4;  // tiles of the matrix

const int lane = thread_position_in_grid.x % 32;
const int row = tile_row(lane), column = tile_column(lane);
const int first_row = thread_position_in_grid.y * 128 + thread_position_in_grid.x / 32 * 8 * Rows;
const ExpertTokens tokens =
    tokens_of_turn<E, 8 * TokenTiles, Shared>(starts, T, thread_position_in_grid.z, lane);
if (tokens.expert < 0 || first_row >= M) {
  return;
}
const int live = Skip ? (tokens.count + 7) / 8 : TokenTiles;  // tiles of 8 tokens
const bool is_shared = Shared && tokens.expert == E;
const auto rows = rows_from<Bits, Group>(
    is_shared ? shared_down : down,
    is_shared ? shared_down_scales : down_scales,
    is_shared ? shared_down_biases : down_biases,
    (is_shared ? 0 : tokens.expert * M) + first_row,
    N);
const auto from = h + size_t(tokens.first) * N;

// Tokens beyond the last are the last again, and no one sees them.
TokenPlace places[TokenTiles];
#pragma unroll
for (int n = 0; n < TokenTiles; ++n) {
  const int first = min(8 * n + right_column(lane, 0), tokens.count - 1);
  const int second = min(8 * n + right_column(lane, 1), tokens.count - 1);
  places[n] = token_place(first * N, second * N, lane);
}

Fragment<float> sums[TokenTiles][Rows];
clear<Rows, TokenTiles>(sums);
for (int at = 0; at < N; at += ColumnStep) {
  decltype(run_of<XT>(rows)) runs[Rows];
#pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      read_eight(runs[r], rows, 8 * r + row, at + 8 * column, eight);
    }
    TokenRun<XT> token_runs[TokenTiles];
    read_tokens<TokenTiles>(token_runs, from, places, at + 8 * eight, live);
    add_eight<Rows, TokenTiles>(runs, eight, token_runs, live, sums);
  }
}

#pragma unroll
for (int n = 0; n < TokenTiles; ++n) {
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const Fragment<XT> both = transposed<XT>(vec<XT, 2>(XT(sums[n][r].x), XT(sums[n][r].y)), lane);
    if (8 * n + row < tokens.count) {
      *(device Fragment<XT>*)(y + size_t(tokens.first + 8 * n + row) * M + first_row + 8 * r + column) = both;
    }
  }
}
