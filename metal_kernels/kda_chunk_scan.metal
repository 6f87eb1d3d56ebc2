#include "tiles.h"
#include "vectors.h"

// The delta rule over chunks of 16 tokens, from what kda_chunk_gram found out about each. With S the
// state before a chunk, [Dk, Dv] as in the paper:
//
//     D = solve (V - k_prefix S)      O = q_prefix S + mix D      S <- diag(decay) S + k_suffix^T D
//
//   k_prefix, q_prefix, k_suffix, decay, solve, mix   as kda_chunk_gram describes them
//   v             [B, T, H, Dv] of any float type
//   state         [B, H, Dv, Dk] float: the transpose of S
//   T             int
//   o             [B, T, H, Dv] float
//   new_state     [B, H, Dv, Dk] float
// Template: StageT, that of k_prefix, q_prefix and k_suffix; H, Dk, Dv, Columns int; Columns is 8 or 16
// and divides Dv.
// Grid (32, Dv / Columns, B * H), any threadgroup (32, n, 1) that divides it: a simdgroup owns
// Columns columns of one head's S, in tiles in its registers from the first chunk to the last.
constexpr int C = 16;                // tokens of a chunk
constexpr int Is = C / 8;            // tiles along the tokens
constexpr int Js = Columns / 8;      // along the simdgroup's columns of values
constexpr int Ds = Dk / 8;           // along the channels
typedef vec<StageT, 2> Staged;

const int lane = thread_position_in_grid.x;
const int head = thread_position_in_grid.z;  // b * H + h
const int chunks = (T + C - 1) / C;
const size_t text = size_t(head / H) * T;  // its first token
const int row = tile_row(lane);
const int value = thread_position_in_grid.y * Columns + tile_column(lane);

// The state lies transposed in memory: the two elements of a fragment are a row apart.
const int origin = (head * Dv + value) * Dk + row;
float2 S[Js][Ds];
#pragma unroll
for (int j = 0; j < Js; ++j) {
#pragma unroll
  for (int d = 0; d < Ds; ++d) {
    const int at = origin + 8 * j * Dk + 8 * d;
    S[j][d] = float2(state[at], state[at + Dk]);
  }
}

for (int n = 0; n < chunks; ++n) {
  // Where the chunk starts in the arrays of chunks and in those over tokens.
  const size_t chunk = size_t(head) * chunks + n;
  const size_t token = (text + n * C) * H + head % H;
  const auto k_prefix_here = k_prefix + chunk * (C * Dk) + 2 * lane;
  const auto q_prefix_here = q_prefix + chunk * (C * Dk) + 2 * lane;
  const auto k_suffix_here = k_suffix + chunk * (C * Dk) + 2 * lane;
  const auto decay_here = decay + chunk * Dk + row;
  const auto solve_here = solve + chunk * (C * C) + 2 * lane;
  const auto mix_here = mix + chunk * (C * C) + 2 * lane;
  const auto v_here = v + token * Dv + value;
  const auto o_here = o + token * Dv + value;

  // kv_mem = k_prefix S is what the state holds for the keys, q_prefix S what it holds for the queries.
  float2 kv_mem[Js][Is], output[Js][Is];
#pragma unroll
  for (int j = 0; j < Js; ++j) {
#pragma unroll
    for (int i = 0; i < Is; ++i) {
      kv_mem[j][i] = output[j][i] = filled<2>(0);
    }
  }
#pragma unroll
  for (int d = 0; d < Ds; ++d) {
    Staged keys[Is], queries[Is];
#pragma unroll
    for (int i = 0; i < Is; ++i) {
      keys[i] = fetch<2>(k_prefix_here + (d * Is + i) * Tile);
      queries[i] = fetch<2>(q_prefix_here + (d * Is + i) * Tile);
    }
#pragma unroll
    for (int j = 0; j < Js; ++j) {
      const float2 held = as_right<float>(S[j][d]);
      multiply_add<Is, StageT, float>(keys, held, kv_mem[j]);
      multiply_add<Is, StageT, float>(queries, held, output[j]);
    }
  }

  // D = solve (V - k_prefix S) is what each token writes, and mix D what the outputs see of that. The tiles of
  // `solve` and `mix` above the diagonal mean nothing and take no part.
  float2 solve_first[Is], mix_first[Is], solve_last[1], mix_last[1];  // tiles of the two columns
#pragma unroll
  for (int i = 0; i < Is; ++i) {
    solve_first[i] = load<2>(solve_here + 2 * i * Tile);
    mix_first[i] = load<2>(mix_here + 2 * i * Tile);
  }
  solve_last[0] = load<2>(solve_here + 3 * Tile);
  mix_last[0] = load<2>(mix_here + 3 * Tile);
  float2 delta[Js][Is];
#pragma unroll
  for (int j = 0; j < Js; ++j) {
    float2 v_minus_mem[Is];
#pragma unroll
    for (int i = 0; i < Is; ++i) {
      const int t = 8 * i + row;  // of the chunk
      const int at = t * H * Dv + 8 * j;
      v_minus_mem[i] = as_right<float>(load_if<2>(n * C + t < T, v_here + at, 0) - kv_mem[j][i]);
      delta[j][i] = filled<2>(0);
    }
    multiply_add<2, float, float>(solve_first, v_minus_mem[0], delta[j]);
    multiply_add<1, float, float>(solve_last, v_minus_mem[1], delta[j] + 1);
#pragma unroll
    for (int i = 0; i < Is; ++i) {
      delta[j][i] = as_right<float>(delta[j][i]);
    }
    multiply_add<2, float, float>(mix_first, delta[j][0], output[j]);
    multiply_add<1, float, float>(mix_last, delta[j][1], output[j] + 1);
#pragma unroll
    for (int i = 0; i < Is; ++i) {
      const int t = 8 * i + row;
      if (n * C + t < T) {
        store<2>(o_here + t * H * Dv + 8 * j, output[j][i]);
      }
    }
  }

  // The state after the chunk, two tiles at a time.
#pragma unroll
  for (int d = 0; d < Ds; d += 2) {
    const float fading[2] = {decay_here[8 * d], decay_here[8 * d + 8]};
#pragma unroll
    for (int j = 0; j < Js; ++j) {
      S[j][d] *= fading[0];
      S[j][d + 1] *= fading[1];
    }
#pragma unroll
    for (int i = 0; i < Is; ++i) {
      const Staged keys[2] = {
          fetch<2>(k_suffix_here + (d * Is + i) * Tile),
          fetch<2>(k_suffix_here + ((d + 1) * Is + i) * Tile)};
#pragma unroll
      for (int j = 0; j < Js; ++j) {
        multiply_add<2, StageT, float>(keys, delta[j][i], &S[j][d]);
      }
    }
  }
}

#pragma unroll
for (int j = 0; j < Js; ++j) {
#pragma unroll
  for (int d = 0; d < Ds; ++d) {
    const int at = origin + 8 * j * Dk + 8 * d;
    new_state[at] = S[j][d].x;
    new_state[at + Dk] = S[j][d].y;
  }
}
