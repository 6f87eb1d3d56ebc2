#include "eights.h"
#include "latents.h"
#include "tiles.h"
#include "vectors.h"

// One token's attention to a part of what came before it, for many heads at once: each latent is read
// once for all heads of a threadgroup. With l a latent, s its shared key, and the query scaled:
//
//     score = query . (l | s)      output = sum of exp(score - highest) l      total = the same of 1
//
//   queries       [B, H, Lora + Shared] float, as mla_query makes them: scaled
//   tail          [B, Room, Lora + Shared] of any float type; sizes[0] of its rows are latents
//   segment1 ...  [B, sizes[1], row] and so on: rows of StoredT, plain or packed as latents.h says; those
//                 beyond the last are any array
//   plan          [2 + 2 * (Segments + 1)] int: columns of a split, splits, then of the tail and of each
//                 segment the first split, and last the sizes. A split lies in one segment, and has a
//                 multiple of 8 columns unless it is the segment's last. Splits of the tail's room that
//                 hold no latent yet are empty: highest is -infinity there, and all else 0.
//   outputs       [B, Splits, H, Lora] float
//   sums          [B, Splits, H, 2] float: highest, total
// Template: TailT; StoredT, the same or, where Packed (a bool), uint; H, Heads, Lora, Shared, Channels,
// Block, Room, Segments int. Heads, of a threadgroup, Shared and Block are multiples of 8; Channels is 32
// or 64 and divides Lora.
// Grid (32 * Lora / Channels, Splits, B * ceil(H / Heads)), threadgroup (32 * Lora / Channels, 1, 1): a
// threadgroup owns the heads of one text in one split, a simdgroup Channels channels of the queries,
// latents and outputs, and some of the shared keys' tiles of 8. It walks in blocks of Block columns.
//
// Of packed rows the codes are multiplied, as latents.h says. A simdgroup's channels lie in one group, so
// with k the keys and (x, y) the line of a row there:
//
//     score += x (query . k) + y (sum of query)     output = sum of (share x) k + sum of share y
//
// The shared keys' tiles lie in one group each, and add to the score the same way. The tail stays plain.
constexpr int Width = Lora + Shared;
constexpr int Simdgroups = Lora / Channels;
constexpr int Tiles = Channels / 8;
constexpr int Eights = Channels / 32;                              // of a lane, in a row of the latents
constexpr int Pairs = (Shared / 8 + Simdgroups - 1) / Simdgroups;  // in one of the shared keys, at most
constexpr int HeadTiles = Heads / 8;
constexpr int ColumnTiles = Block / 8;
constexpr int Stride = ColumnTiles % 2 == 0 ? Block + 8 : Block;  // of heads: 4 are in 32 banks
constexpr int HeadGroups = (H + Heads - 1) / Heads;
constexpr int Turns = (HeadTiles + Simdgroups - 1) / Simdgroups;

typedef float2 Two;
typedef typename Key<StoredT>::type KeyT;
threadgroup Two query_sums[Packed ? Simdgroups * (1 + Pairs) * HeadTiles * 4 : 1];
threadgroup Two partial[Simdgroups * HeadTiles * ColumnTiles * Tile / 2];
threadgroup Two shares[Heads * Stride / 2];
threadgroup float fading[Heads];

const int index = thread_position_in_threadgroup.x;
const int lane = index % 32;
const int part = index / 32;
const int split = threadgroup_position_in_grid.y;
const int b = threadgroup_position_in_grid.z / HeadGroups;
const int first_head = threadgroup_position_in_grid.z % HeadGroups * Heads;
const int row = tile_row(lane);
const int column = tile_column(lane);

// Where this split lies.
int segment = 0;
for (int i = 1; i <= Segments; ++i) {
  segment += plan[2 + i] <= split;
}
const int size = plan[2 + Segments + 1 + segment];
const int start = (split - plan[2 + segment]) * plan[0];
const int end = min(start + plan[0], size);
const device StoredT* chosen =
    segment <= 1 ? segment1 : segment == 2 ? segment2 : segment == 3 ? segment3
    : segment == 4 ? segment4 : segment == 5 ? segment5 : segment == 6 ? segment6
    : segment == 7 ? segment7 : segment == 8 ? segment8 : segment == 9 ? segment9
    : segment == 10 ? segment10 : segment == 11 ? segment11 : segment == 12 ? segment12
    : segment == 13 ? segment13 : segment == 14 ? segment14 : segment == 15 ? segment15
    : segment == 16 ? segment16 : segment == 17 ? segment17 : segment == 18 ? segment18
    : segment == 19 ? segment19 : segment == 20 ? segment20 : segment == 21 ? segment21
    : segment == 22 ? segment22 : segment == 23 ? segment23 : segment == 24 ? segment24
    : segment == 25 ? segment25 : segment26;
const bool in_tail = Packed && segment == 0;  // where its type is another
const auto fresh_rows = tail + size_t(b) * Room * Width;
const auto rows =
    (segment == 0 ? as_stored(tail, chosen) : chosen) +
    size_t(b) * (segment == 0 ? Room : size) * row_size(chosen, Width);

// Of 32 channels a lane takes 8 neighbours, of which 2 i and 2 i + 1 stand in tile i; the same fragment
// is a key and a value. Queries and outputs follow that order of the channels.
const int channel = Channels * part + 4 * column;
const int pair = Lora + 8 * part + column;
float2 query[Tiles + Pairs][HeadTiles];
float2 query_sum[HeadTiles];  // over a lane's channels of one line
#pragma unroll
for (int i = 0; i < Tiles + Pairs; ++i) {
  const int tile = part + (i - Tiles) * Simdgroups;  // of the shared keys
  const int latent = Channels * part + i / 4 * 32 + row / 2 * 8 + i % 4 * 2 + row % 2;
  const int at = i < Tiles ? latent : Lora + 8 * tile + row;
#pragma unroll
  for (int n = 0; n < HeadTiles; ++n) {
    const int head = first_head + 8 * n + column;
    const auto from = queries + (b * H + head) * Width + at;
    const float first = at < Width && head < H ? from[0] : 0.0f;
    const float second = at < Width && head + 1 < H ? from[Width] : 0.0f;
    query[i][n] = as_right<float>(float2(first, second));
    if (Packed) {
      query_sum[n] = (0 < i && i < Tiles ? query_sum[n] : filled<2>(0)) + float2(first, second);
    }
    if (Packed && i >= Tiles - 1) {
      const float2 sum = float2(sum_over_rows(query_sum[n].x), sum_over_rows(query_sum[n].y));
      if (row == 0) {
        query_sums[((part * (1 + Pairs) + i - (Tiles - 1)) * HeadTiles + n) * 4 + column / 2] = sum;
      }
    }
  }
}
if (Packed) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

float2 output[Tiles][HeadTiles];
float offset[HeadTiles];  // a lane's part of the sum of share y
#pragma unroll
for (int n = 0; n < HeadTiles; ++n) {
  offset[n] = 0;
#pragma unroll
  for (int i = 0; i < Tiles; ++i) {
    output[i][n] = filled<2>(0);
  }
}
float highest[Turns][2], total[Turns][2];
#pragma unroll
for (int turn = 0; turn < Turns; ++turn) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    highest[turn][i] = -INFINITY;
    total[turn][i] = 0;
  }
}

vec<KeyT, 2> key[Tiles + Pairs][ColumnTiles];
float2 line[1 + Pairs][ColumnTiles];
Fetched<StoredT, Eights, Pairs> ahead[ColumnTiles];
vec<TailT, 2> fresh_key[Tiles + Pairs][ColumnTiles];  // those in the tail of packed segments
for (int at = start < end ? start - Block : end; at < end; at += Block) {
  // Ask for the next block before this one: nothing else is as far away. After the last row comes the
  // last row again, which must be some number.
  const int next = at + Block + row;
  if (at + Block < end && !in_tail) {
#pragma unroll
    for (int m = 0; m < ColumnTiles; ++m) {
      const auto from = rows + min(next + 8 * m, end - 1) * row_size(rows, Width);
      fetch_row(ahead[m], from, channel, pair, 8 * Simdgroups, Width);
    }
  }

  if (at >= start) {
    // What this simdgroup's channels add to the scores: [column, head].
    float2 score[HeadTiles][ColumnTiles];
#pragma unroll
    for (int n = 0; n < HeadTiles; ++n) {
#pragma unroll
      for (int m = 0; m < ColumnTiles; ++m) {
        score[n][m] = filled<2>(0);
      }
    }
    const threadgroup Two* sums_of_latents = query_sums + part * (1 + Pairs) * HeadTiles * 4 + column / 2;
    if (in_tail) {
      add_scores<Tiles, ColumnTiles, HeadTiles, TailT, Packed>(
          fresh_key, query, line[0], sums_of_latents, score);
    } else {
      add_scores<Tiles, ColumnTiles, HeadTiles, KeyT, Packed>(
          key, query, line[0], sums_of_latents, score);
    }
#pragma unroll
    for (int i = 0; i < Pairs; ++i) {
      if (part + i * Simdgroups < Shared / 8) {
        const int t = Tiles + i;
        const threadgroup Two* sums_of_pair = sums_of_latents + (1 + i) * HeadTiles * 4;
        if (in_tail) {
          add_scores<1, ColumnTiles, HeadTiles, TailT, Packed>(
              fresh_key + t, query + t, line[1 + i], sums_of_pair, score);
        } else {
          add_scores<1, ColumnTiles, HeadTiles, KeyT, Packed>(
              key + t, query + t, line[1 + i], sums_of_pair, score);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < HeadTiles; ++n) {
#pragma unroll
      for (int m = 0; m < ColumnTiles; ++m) {
        partial[((part * HeadTiles + n) * ColumnTiles + m) * 32 + lane] = score[n][m];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // One simdgroup makes shares of the whole scores of 8 heads; a lane keeps the sums of its columns.
#pragma unroll
    for (int turn = 0; turn < Turns; ++turn) {
      const int n = part + turn * Simdgroups;
      if (n < HeadTiles) {
        float2 whole[ColumnTiles];
#pragma unroll
        for (int m = 0; m < ColumnTiles; ++m) {
          whole[m] = filled<2>(0);
#pragma unroll
          for (int i = 0; i < Simdgroups; ++i) {
            whole[m] += partial[((i * HeadTiles + n) * ColumnTiles + m) * 32 + lane];
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int head = 8 * n + column + i;
          const float before = highest[turn][i];
          float most = -INFINITY;
#pragma unroll
          for (int m = 0; m < ColumnTiles; ++m) {
            whole[m][i] = at + 8 * m + row < end ? whole[m][i] : -INFINITY;
            most = max(most, whole[m][i]);
          }
          highest[turn][i] = max(before, max_over_rows(most));
          const float fade = exp(before - highest[turn][i]);
          total[turn][i] *= fade;
#pragma unroll
          for (int m = 0; m < ColumnTiles; ++m) {
            const float share = exp(whole[m][i] - highest[turn][i]);
            total[turn][i] += share;
            ((threadgroup float*)shares)[head * Stride + 8 * m + row] = share;
          }
          if (row == 0) {
            fading[head] = fade;
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float2 share[ColumnTiles][HeadTiles];
#pragma unroll
    for (int n = 0; n < HeadTiles; ++n) {
      const float fade = fading[8 * n + row];
#pragma unroll
      for (int m = 0; m < ColumnTiles; ++m) {
        share[m][n] = shares[((8 * n + row) * Stride + 8 * m + column) / 2];
      }
#pragma unroll
      for (int i = 0; i < Tiles; ++i) {
        output[i][n] *= fade;
      }
      offset[n] *= fade;
    }
    if (Packed) {
#pragma unroll
      for (int m = 0; m < ColumnTiles; ++m) {
        const int first = tile_lane(column, 0), second = tile_lane(column + 1, 0);
        const float2 own = line[0][m];
        const float2 scales = float2(simd_shuffle(own.x, first), simd_shuffle(own.x, second));
        const float2 biases = float2(simd_shuffle(own.y, first), simd_shuffle(own.y, second));
#pragma unroll
        for (int n = 0; n < HeadTiles; ++n) {
          offset[n] += dot(share[m][n], biases);
          share[m][n] *= scales;
        }
      }
    }
    if (in_tail) {
      add_outputs<Tiles, ColumnTiles, HeadTiles, TailT>(fresh_key, share, output);
    } else {
      add_outputs<Tiles, ColumnTiles, HeadTiles, KeyT>(key, share, output);
    }
  }

  if (in_tail) {
    // (The tail is short, and a block of it more would be held by every lane of the other splits.)
    Fetched<TailT, Eights, Pairs> fresh[ColumnTiles];
#pragma unroll
    for (int m = 0; m < ColumnTiles; ++m) {
      const auto from = fresh_rows + min(next + 8 * m, end - 1) * Width;
      fetch_row(fresh[m], from, channel, pair, 8 * Simdgroups, Width);
    }
    as_keys<ColumnTiles>(fresh, fresh_key, line);
  } else {
    as_keys<ColumnTiles>(ahead, key, line);
  }
}

const int place = (b * plan[1] + split) * H + first_head;
#pragma unroll
for (int n = 0; n < HeadTiles; ++n) {
  const int head = 8 * n + row;
  const float added = Packed ? sum_over_columns(offset[n]) : 0;
  if (first_head + head < H) {
#pragma unroll
    for (int i = 0; i < Tiles; i += 2) {
      const auto to = outputs + (place + head) * Lora + channel + i / 4 * 32 + i % 4 * 2;
      const float4 four = float4(output[i][n].x, output[i][n].y, output[i + 1][n].x, output[i + 1][n].y);
      store<4>(to, Packed ? four + added : four);
    }
  }
}
#pragma unroll
for (int turn = 0; turn < Turns; ++turn) {
  const int n = part + turn * Simdgroups;
  if (n < HeadTiles) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 8 * n + column + i;
      const float whole = sum_over_rows(total[turn][i]);
      if (row == 0 && first_head + head < H) {
        sums[2 * (place + head)] = highest[turn][i];
        sums[2 * (place + head) + 1] = whole;
      }
    }
  }
}
