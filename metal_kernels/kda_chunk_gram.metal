#include "reduce.h"
#include "tiles.h"
#include "vectors.h"

// What the scan of the chunkwise delta rule needs to know of each chunk of 16 tokens, all of which does not
// depend on the state. With P_i the product of the decays up to token i of the chunk, R_j of those after token j:
//
//     A_ij = beta_i sum_d k_id k_jd prod_{m=j+1..i} alpha_md, j < i      solve = (I + A)^-1 diag(beta)
//     mix_ij = sum_d q_id k_jd prod_{m=j+1..i} alpha_md, j <= i
//     k_prefix_i = P_i k_i      q_prefix_i = P_i q_i      k_suffix_j = R_j k_j      decay = P_15
//
//   q, k          [B, T, H, Dk] of any float type, q scaled
//   alpha         [B, T, H, Dk] float
//   beta          [B, T, H] float
//   T             int
//   k_prefix, q_prefix   [B * H, N, Dk / 8, 2, 64] StageT, N = ceil(T / 16): tiles of the matrices
//                 [16, Dk], those of one 8 channels together, each as tiles.h orders it
//   k_suffix      the same of the transposed matrix [Dk, 16]
//   decay         [B * H, N, Dk] float
//   solve, mix    [B * H, N, 2, 2, 64] float, in tiles; elements above the diagonal mean nothing
// Template: StageT float or half, which suffices: no staged element exceeds 1. H, Dk int; Dk is 64
// or 128.
// Grid (32, B * H, N), any threadgroup (32, n, 1) that divides it: a simdgroup owns one chunk of one
// head, a lane Dk / 32 neighbouring channels; of solve and mix, the half simdgroups own one each, a
// lane one column.
constexpr int C = 16;  // tokens of a chunk
constexpr int Channels = Dk / 32;
typedef vec<float, Channels> Slice;

const int lane = thread_position_in_grid.x;
const int head = thread_position_in_grid.y;  // b * H + h
const int chunk = thread_position_in_grid.z;
const int chunks = (T + C - 1) / C;
const int first = chunk * C;
const int channel = Channels * lane;

// Where the chunk starts in the arrays over tokens, and in the outputs.
const size_t token = (size_t(head / H) * T + first) * H + head % H;
const size_t place = size_t(head) * chunks + chunk;
const auto q_here = q + token * Dk + channel;
const auto k_here = k + token * Dk + channel;
const auto alpha_here = alpha + token * Dk + channel;
const auto k_prefix_here = k_prefix + place * (C * Dk);
const auto q_prefix_here = q_prefix + place * (C * Dk);
const auto k_suffix_here = k_suffix + place * (C * Dk);

// Tokens after the last are padding: no key, no query, no decay, no write.
const int column = lane % C;
float own_beta = 0;  // of token `column`
if (first + column < T) {
  own_beta = beta[token + column * H];
}

// The rows one after another. faded[j] is key j times all decays since token j: a product with it needs no
// other decay, and no factor is outside [0, 1]. Forward substitution on the columns of (I + A) X = I goes along:
// X is bounded by 1 however alike the keys.
Slice faded[C];
Slice prefix = filled<Channels>(1);
float X[C];
const bool upper = lane >= C;
const auto solve_here = solve + place * (C * C);
const auto mix_here = mix + place * (C * C);
#pragma unroll
for (int i = 0; i < C; ++i) {
  const bool valid = first + i < T;
  const int row = i * H * Dk;
  const Slice key = load_if<Channels>(valid, k_here + row, 0);
  const Slice query = load_if<Channels>(valid, q_here + row, 0);
  const Slice fading = load_if<Channels>(valid, alpha_here + row, 1);

  // One half of the simdgroup sums the products of keys, the other those of queries: they exchange the rest.
  // Rows of the first tile have 8 columns.
  float products[C];
  faded[i] = key;
#pragma unroll
  for (int j = 0; j < C; ++j) {
    if (j < i) {
      faded[j] *= fading;
    }
    if (j <= i) {
      const float of_key = j < i ? dot(key, faded[j]) : 0.0f;
      const float of_query = dot(query, faded[j]);
      const float sent = upper ? of_key : of_query;
      products[j] = (upper ? of_query : of_key) + simd_shuffle_xor(sent, 16);
    } else {
      products[j] = 0;
    }
  }
  // k_i . faded k_column in the lower half simdgroup, q_i . faded k_column in the upper.
  const float gram = i < 8 ? sums_over_half<8>(products, lane) : sums_over_half<16>(products, lane);
  float sum = 0;
#pragma unroll
  for (int j = 0; j < C; ++j) {
    if (j < i) {
      sum += simd_broadcast(gram, j) * X[j];
    }
  }
  X[i] = (i == column ? 1.0f : 0.0f) - simd_broadcast(own_beta, i) * sum;
  const int in_square = (i / 8 * 2 + column / 8) * Tile + in_tile(i % 8, column % 8);
  if (upper) {
    mix_here[in_square] = gram;
  } else {
    solve_here[in_square] = X[i] * own_beta;
  }

  prefix *= fading;
  const int at = (channel / 8 * 2 + i / 8) * Tile + in_tile(i % 8, channel % 8);
  store<Channels>(k_prefix_here + at, prefix * key);
  store<Channels>(q_prefix_here + at, prefix * query);
}

// After the last token the faded keys are k_suffix. Its tokens are neighbours: store 4 at a time.
store<Channels>(decay + place * Dk + channel, prefix);
#pragma unroll
for (int c = 0; c < Channels; ++c) {
#pragma unroll
  for (int j = 0; j < C; j += 4) {
    const int tile = (channel + c) / 8 * 2 + j / 8;
    const int at = tile * Tile + in_tile((channel + c) % 8, j % 8);
    store<4>(k_suffix_here + at, float4(faded[j][c], faded[j + 1][c], faded[j + 2][c], faded[j + 3][c]));
  }
}
