#include "reduce.h"
#include "vectors.h"

// The delta rule, one token after another, on rows of the state that never leave the registers:
//
//     S <- S diag(alpha)      S <- S + beta (v - S k) k^T      o = S q
//
//   q, k          [B, T, H, Dk] of any float type, q scaled
//   v             [B, T, H, Dv] of any float type
//   alpha         [B, T, H, Dk] float, the decay of each channel; 1 and beta 0 for padding
//   beta          [B, T, H] float
//   state         [B, H, Dv, Dk] float: the transpose of the paper's S, so that a row is contiguous
//   T             int
//   o             [B, T, H, Dv] float
//   new_state     [B, H, Dv, Dk] float
// Template: H, Dk, Dv int; Dk is 32, 64 or 128, Dv a multiple of 32.
// Grid (32, Dv * Dk / 1024, B * H), any threadgroup (32, n, 1) that divides it: Dk / 4 neighbouring
// lanes share 8 rows of one head's state. A lane owns 4 channels of all 8, so that what it loads of q, k
// and alpha serves 8 rows; and it has the sums over one of them, of which it writes the output.
constexpr int Rows = 8;              // of a lane
constexpr int Lanes = Dk / 4;        // that share rows
constexpr int Share = Lanes / Rows;  // of them, have the same row's sums

const int lane = thread_position_in_grid.x;
const int first = (thread_position_in_grid.y * (32 / Lanes) + lane / Lanes) * Rows;
const int own = lane % Lanes / Share;  // the row of its sums
const int head = thread_position_in_grid.z;  // b * H + h

// The lane's part of the rows: S[r] is of row r ^ own, the order that `sum_of_lane` asks for.
const int part = lane % Lanes * 4;
const int place = (head * Dv + first) * Dk + part;
float4 S[Rows];
#pragma unroll
for (int r = 0; r < Rows; ++r) {
  S[r] = load<4>(state + place + (r ^ own) * Dk);
}

// The head's rows in the arrays over tokens: b * T * H + h is the first, H further the next.
int token = head / H * T * H + head % H;
for (int t = 0; t < T; ++t, token += H) {
  const float4 key = load<4>(k + token * Dk + part);
  const float4 query = load<4>(q + token * Dk + part);
  const float4 fading = load<4>(alpha + token * Dk + part);
  const int row = token * Dv + first + own;

  // The state decays, S <- S diag(alpha), and kv_mem = S k is what it holds for this key.
  float products[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    S[r] *= fading;
    products[r] = dot(S[r], key);
  }
  const float kv_mem = sum_of_lane<Rows, Share>(products);

  // Each row is corrected by what its own lanes found, S <- S + delta k^T, and S q answers the query.
  const float delta = beta[token] * (float(v[row]) - kv_mem);
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    S[r] += (r == 0 ? delta : simd_shuffle_xor(delta, r * Share)) * key;
    products[r] = dot(S[r], query);
  }
  const float answer = sum_of_lane<Rows, Share>(products);
  if (lane % Share == 0) {
    o[row] = answer;
  }
}

#pragma unroll
for (int r = 0; r < Rows; ++r) {
  store<4>(new_state + place + (r ^ own) * Dk, S[r]);
}
