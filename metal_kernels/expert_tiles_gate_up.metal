#include "activations.h"
#include "expert_tiles.h"

// The first half of the experts of many tokens: silu(gate x) * (up x) of each token and expert it chose, in the order
// of the experts. Where Shared, the shared expert's of each token stand behind them.
//
//   x                            [T, K] of any float type
//   order, starts                [T * TopK], [E + 1] int: the answer of expert_order
//   gate, up                     [E, N, K], packed to Bits or of a float type
//   {gate,up}_{scales,biases}    [E, N, K / Group]; not read where Bits is 0: plain
//   shared_gate, shared_up, ...  [N, K] and so on, stored as gate and up are; not read where not Shared
//   T                            int
//   h                            [T * TopK, N] of x's type, where Shared [T * TopK + T, N]
// Template: XT, that of x; Skip, Shared bool; TokenTiles, E, TopK, K, N, GateBits, GateGroup, UpBits, UpGroup
// int. K is a multiple of 64 and of the groups, N of 16.
// Grid (128, ceil(N / 64), Z), threadgroup (128, 1, 1): a threadgroup has 8 TokenTiles tokens of one expert, each of
// its simdgroups 16 rows of both matrices. Z is at least the number of such turns; threadgroups beyond do nothing.
// Where Skip, tiles of 8 tokens that have none are left out; else they are computed in vain, without a branch.
constexpr int Rows = 2;  // tiles of each matrix

const int lane = thread_position_in_grid.x % 32;
const int row = tile_row(lane), column = tile_column(lane);
const int first_row = thread_position_in_grid.y * 64 + thread_position_in_grid.x / 32 * 8 * Rows;
const ExpertTokens tokens =
    tokens_of_turn<E, 8 * TokenTiles, Shared>(starts, T, thread_position_in_grid.z, lane);
if (tokens.expert < 0 || first_row >= N) {
  return;
}
const int live = Skip ? (tokens.count + 7) / 8 : TokenTiles;  // tiles of 8 tokens
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
TokenPlace places[TokenTiles];
#pragma unroll
for (int n = 0; n < TokenTiles; ++n) {
  const int first = tokens.first + min(8 * n + right_column(lane, 0), tokens.count - 1);
  const int second = tokens.first + min(8 * n + right_column(lane, 1), tokens.count - 1);
  places[n] = token_place(
      token_at<TopK>(order, T * TopK, first) * K, token_at<TopK>(order, T * TopK, second) * K, lane);
}

Fragment<float> gate_sums[TokenTiles][Rows], up_sums[TokenTiles][Rows];
clear<Rows, TokenTiles>(gate_sums);
clear<Rows, TokenTiles>(up_sums);
for (int at = 0; at < K; at += ColumnStep) {
  decltype(run_of<XT>(gates)) gate_rows[Rows];
  decltype(run_of<XT>(ups)) up_rows[Rows];
#pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      read_eight(gate_rows[r], gates, 8 * r + row, at + 8 * column, eight);
      read_eight(up_rows[r], ups, 8 * r + row, at + 8 * column, eight);
    }
    TokenRun<XT> runs[TokenTiles];
    read_tokens<TokenTiles>(runs, x, places, at + 8 * eight, live);
    add_eight<Rows, TokenTiles>(gate_rows, eight, runs, live, gate_sums);
    add_eight<Rows, TokenTiles>(up_rows, eight, runs, live, up_sums);
  }
}

#pragma unroll
for (int n = 0; n < TokenTiles; ++n) {
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const float2 g = gate_sums[n][r], u = up_sums[n][r];
    const Fragment<XT> both = transposed<XT>(vec<XT, 2>(XT(silu(g.x) * u.x), XT(silu(g.y) * u.y)), lane);
    if (8 * n + row < tokens.count) {
      *(device Fragment<XT>*)(h + size_t(tokens.first + 8 * n + row) * N + first_row + 8 * r + column) = both;
    }
  }
}
