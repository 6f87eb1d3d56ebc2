#include "eights.h"
#include "tiles.h"
#include "vectors.h"

// Many tokens' attention to a block of S columns among or before them, each head with keys and values of
// its own: a softmax over those of the block that a token may see, and no tensor of scores.
//
//     score = scale * query . (key | shared key)      output = softmax(scores) values
//
// Shares are rounded to x's type before they weigh the values, and summed before they are rounded.
//
//   x           [B, T, Row] of any float type: a token's queries stand first, [H, Nope + Shared]
//   keys        [B, H, S, Nope] of x's type
//   latents     [B, S, LatentRow] of x's type: a column's shared key stands last
//   values      [B, H, S, V] of x's type
//   T, S, offset   int: token t sees the columns up to t + offset
//   scale       float
//   outputs     [B, T, H, V] of any float type; 0 for a token that sees no column
//   log_totals  [B, T, H] float: log of the sum of exp(score); below -1e29 where no column is seen
// Template: XT, that of x; H, Nope, Shared, V, Row, LatentRow, Queries, Block int. Nope, Shared and V are
// multiples of 32, Row and LatentRow of 4, Queries and Block of 8.
// Grid (32, n, B * H), n >= ceil(T / Queries), any threadgroup (32, m, 1) that divides it: a simdgroup
// owns Queries tokens of one head and walks over Block columns at a time; the last tokens, who see the
// most columns, begin first. What is over does nothing.
constexpr int Dk = Nope + Shared;
constexpr int N = Queries / 8;  // tiles along the queries
constexpr int M = Block / 8;    // along the columns
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

float2 output[V / 8][N], highest[N], total[N];
#pragma unroll
for (int n = 0; n < N; ++n) {
  highest[n] = filled<2>(Nothing);
  total[n] = filled<2>(0);
#pragma unroll
  for (int i = 0; i < V / 8; ++i) {
    output[i][n] = filled<2>(0);
  }
}

const auto own_keys = keys + size_t(b * H + head) * S * Nope + neighbours;
const auto own_values = values + size_t(b * H + head) * S * V + neighbours;
const auto shared_keys = latents + size_t(b) * S * LatentRow + LatentRow - Shared + neighbours;
const int end = min(S, first + Queries + offset);  // of the columns that some of these tokens see
for (int at = 0; at < end; at += Block) {
  // What lies beyond the last column is the last column again, and weighs nothing.
  int place[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    place[m] = min(at + 8 * m + row, S - 1);
  }

  // The scores: [column, query].
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

  // Each query's shares, as left factors: [query, column].
  const bool all_seen = at + Block <= min(S, first + offset + 1);
  Two share[M][N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float2 most = highest[n];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int last = min(S - 1, first + 8 * n + column + i + offset);
        const bool seen = all_seen || at + 8 * m + row <= last;
        score[n][m][i] = seen ? scale * score[n][m][i] : -INFINITY;
        most[i] = max(most[i], score[n][m][i]);
      }
    }
    float2 fade;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = max_over_rows(most[i]);
      fade[i] = exp(highest[n][i] - most[i]);
    }
    highest[n] = most;
    total[n] *= fade;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float2 shares = float2(exp(score[n][m].x - most.x), exp(score[n][m].y - most.y));
      total[n] += shares;
      share[m][n] = transposed<XT>(vec<XT, 2>(XT(shares.x), XT(shares.y)), lane);
    }
    const float kept = transposed<float>(fade, lane)[0];  // of the query of this lane's row
#pragma unroll
    for (int i = 0; i < V / 8; ++i) {
      output[i][n] *= kept;
    }
  }

#pragma unroll
  for (int e = 0; e < V / 32; ++e) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      Eight<XT> eight;
      fetch_eight(eight, own_values + place[m] * V + 32 * e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        multiply_add<N, XT, XT>(share[m], as_right<XT>(pair_of(eight, i)), output[4 * e + i]);
      }
    }
  }
}

#pragma unroll
for (int n = 0; n < N; ++n) {
  float2 whole;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    whole[i] = max(sum_over_rows(total[n][i]), 1e-30f);
    const int t = first + 8 * n + column + i;
    if (row == 0 && t < T) {
      log_totals[(b * T + t) * H + head] = highest[n][i] + log(whole[i]);
    }
  }
  const float share = 1.0f / transposed<float>(whole, lane)[0];
  const int t = first + 8 * n + row;
  if (t < T) {
#pragma unroll
    for (int i = 0; i < V / 8; i += 2) {
      const auto to = outputs + (size_t(b * T + t) * H + head) * V + i / 4 * 32 + neighbours + i % 4 * 2;
      const float2 one = output[i][n] * share, other = output[i + 1][n] * share;
      store<4>(to, float4(one.x, one.y, other.x, other.y));
    }
  }
}
