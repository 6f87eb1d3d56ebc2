#include "eights.h"
#include "tiles.h"
#include "vectors.h"

// Many tokens' attention to a block of S positions among or before them, each head with keys and values of
// its own: a softmax over those of the block that a token may see, and no tensor of scores.
//
//     score = scale * query . (key | shared key)      output = softmax(scores) values
//
// Probabilities are rounded to x's type before they weigh the values, and summed before they are rounded.
//
//   x           [B, T, Row] of any float type: a token's queries stand first, [H, Nope + Shared]
//   keys        [B, H, S, Nope] of x's type
//   latents     [B, S, LatentRow] of x's type: a position's shared key stands last
//   values      [B, H, S, V] of x's type
//   T, S, offset   int: token t sees the positions up to t + offset
//   scale       float
//   outputs     [B, T, H, V] of any float type; 0 for a token that sees no position
//   lse         [B, T, H] float: log of the sum of exp(score); below -1e29 where no position is seen
// Template: XT, that of x; H, Nope, Shared, V, Row, LatentRow, Queries, Block int. Nope, Shared and V are
// multiples of 32, Row and LatentRow of 4, Queries and Block of 8.
// Grid (32, n, B * H), n >= ceil(T / Queries), any threadgroup (32, m, 1) that divides it: a simdgroup
// owns Queries tokens of one head and walks over Block positions at a time; the last tokens, who see the
// most positions, begin first. Simdgroups beyond these do nothing.
constexpr int Dk = Nope + Shared;
constexpr int N = Queries / 8;  // tiles along the queries
constexpr int M = Block / 8;    // along the positions
constexpr float Nothing = -1e30f;  // less than any score, and finite: a difference of two is 0
typedef vec<XT, 2> Two;

const int lane = thread_position_in_grid.x;
const int groups = (T + Queries - 1) / Queries;
const int first = (groups - 1 - int(thread_position_in_grid.y)) * Queries;
const int b = thread_position_in_grid.z / H;
const int head = thread_position_in_grid.z % H;
if (first < 0) {
  return;
}
const int row = tile_row(lane);
const int column = tile_column(lane);
const int neighbours = 4 * column;  // of 32 channels a lane takes 8, of which 2 i and 2 i + 1 stand in tile i

// The queries as right factors, [channel, query].
Two query[Dk / 8][N];
#pragma unroll
for (int n = 0; n < N; ++n) {
  const auto from = x + size_t(b * T + min(first + 8 * n + row, T - 1)) * Row + head * Dk + neighbours;
#pragma unroll
  for (int e = 0; e < Dk / 32; ++e) {
    Eight<XT> eight;
    fetch_eight(eight, from + 32 * e);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      query[4 * e + i][n] = as_right<XT>(transposed<XT>(pair_of(eight, i), lane));
    }
  }
}

float2 acc[V / 8][N], running_max[N], running_sum[N];
#pragma unroll
for (int n = 0; n < N; ++n) {
  running_max[n] = filled<2>(Nothing);
  running_sum[n] = filled<2>(0);
#pragma unroll
  for (int i = 0; i < V / 8; ++i) {
    acc[i][n] = filled<2>(0);
  }
}

const auto own_keys = keys + size_t(b * H + head) * S * Nope + neighbours;
const auto own_values = values + size_t(b * H + head) * S * V + neighbours;
const auto shared_keys = latents + size_t(b) * S * LatentRow + LatentRow - Shared + neighbours;
const int end = min(S, first + Queries + offset);  // of the positions that some of these tokens see
for (int at = 0; at < end; at += Block) {
  // What lies beyond the last position is the last position again, and weighs nothing.
  int place[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    place[m] = min(at + 8 * m + row, S - 1);
  }

  // The scores: [position, query].
  float2 score[N][M];
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      score[n][m] = filled<2>(0);
    }
  }
#pragma unroll
  for (int e = 0; e < Dk / 32; ++e) {
    Eight<XT> eights[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (e < Nope / 32) {
        fetch_eight(eights[m], own_keys + place[m] * Nope + 32 * e);
      } else {
        fetch_eight(eights[m], shared_keys + size_t(place[m]) * LatentRow + 32 * e - Nope);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Two key[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        key[m] = pair_of(eights[m], i);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        multiply_add<M, XT, XT>(key, query[4 * e + i][n], score[n]);
      }
    }
  }

  // Each query's probabilities, as left factors: [query, position].
  const bool all_seen = at + Block <= min(S, first + offset + 1);
  Two probs[M][N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float2 new_max = running_max[n];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int last = min(S - 1, first + 8 * n + column + i + offset);
        const bool seen = all_seen || at + 8 * m + row <= last;
        score[n][m][i] = seen ? scale * score[n][m][i] : -INFINITY;
        new_max[i] = max(new_max[i], score[n][m][i]);
      }
    }
    float2 rescale;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      new_max[i] = max_over_rows(new_max[i]);
      rescale[i] = exp(running_max[n][i] - new_max[i]);
    }
    running_max[n] = new_max;
    running_sum[n] *= rescale;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float2 p = float2(exp(score[n][m].x - new_max.x), exp(score[n][m].y - new_max.y));
      running_sum[n] += p;
      probs[m][n] = transposed<XT>(vec<XT, 2>(XT(p.x), XT(p.y)), lane);
    }
    const float own_rescale = transposed<float>(rescale, lane)[0];  // of the query of this lane's row
#pragma unroll
    for (int i = 0; i < V / 8; ++i) {
      acc[i][n] *= own_rescale;
    }
  }

  // What they say of the values.
#pragma unroll
  for (int e = 0; e < V / 32; ++e) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      Eight<XT> eight;
      fetch_eight(eight, own_values + place[m] * V + 32 * e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        multiply_add<N, XT, XT>(probs[m], as_right<XT>(pair_of(eight, i)), acc[4 * e + i]);
      }
    }
  }
}

#pragma unroll
for (int n = 0; n < N; ++n) {
  float2 whole;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    whole[i] = max(sum_over_rows(running_sum[n][i]), 1e-30f);
    const int t = first + 8 * n + column + i;
    if (row == 0 && t < T) {
      lse[(b * T + t) * H + head] = running_max[n][i] + log(whole[i]);
    }
  }
  const float factor = 1.0f / transposed<float>(whole, lane)[0];
  const int t = first + 8 * n + row;
  if (t < T) {
#pragma unroll
    for (int i = 0; i < V / 8; i += 2) {
      const auto to = outputs + (size_t(b * T + t) * H + head) * V + i / 4 * 32 + neighbours + i % 4 * 2;
      const float2 one = acc[i][n] * factor, other = acc[i + 1][n] * factor;
      store<4>(to, float4(one.x, one.y, other.x, other.y));
    }
  }
}
