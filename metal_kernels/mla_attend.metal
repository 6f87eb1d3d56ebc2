#include "latents.h"
#include "mla_attend.h"
#include "tiles.h"
#include "vectors.h"

// A token's attention to a part of what came before it, for many heads at once: each latent is read once for
// all heads of a threadgroup. A text may have several tokens, of which each sees one more than the one
// before. Every split is an online softmax by itself, which mla_output merges with the others. With z a
// latent, s its shared key, and q the scaled query of a head:
//
//     score = q . (z | s)      m = max score      l = sum of exp(score - m)      acc = sum of exp(score - m) z
//
//   queries       [B * tokens, H, Lora + Shared] float, as mla_query makes them: scaled
//   tail          [B, Room, Lora + Shared] of any float type: the latest latents of each text
//   segment1 ...  [rows, row] of StoredT, plain or packed as latents.h says; those beyond the last are any
//                 array
//   splits        [1 + 5 * Splits] int: `tokens`, of a text; then of each split its array, 0 for the tail; its
//                 text; its first row there, in the tail within the text's room; its positions, of which
//                 there are none in a split that is not used; and how many of them the first token sees, and
//                 one more each token after it. There may be less than none: m is -infinity there, and all
//                 else 0. A split has a multiple of 8 positions unless it is the last of its rows.
//   acc           [Splits, tokens, H, Lora] float; not written where a split is not used
//   m_and_l       [Splits, tokens, H, 2] float
// Template: TailT; StoredT, the same or, where Packed (a bool), uint; H, Heads, Lora, Shared, Channels,
// Block, Room int. Heads, of a threadgroup, Shared and Block are multiples of 8; Channels is 32 or 64 and
// divides Lora.
// Grid (32 * Lora / Channels, Splits, tokens * ceil(H / Heads)), threadgroup (32 * Lora / Channels, 1, 1): a
// threadgroup owns the heads of one token in one split, a simdgroup a slice of Channels channels of the
// queries, latents and acc, and some of the shared key's tiles of 8. It walks in blocks of Block positions.
//
// Of packed rows the codes are multiplied, as latents.h says. A simdgroup's channels lie in one group, so
// with k the keys and (x, y) the line of a row there:
//
//     score += x (query . k) + y (sum of query)     acc = sum of (prob x) k + sum of prob y
//
// The shared key's tiles lie in one group each, and add to the score the same way. The tail stays plain.
typedef AttendSizes<Heads, Lora, Shared, Channels, Block> Sizes;
constexpr int Width = Lora + Shared;
constexpr int HeadGroups = (H + Heads - 1) / Heads;
constexpr int M = Sizes::PositionTiles;
constexpr int N = Sizes::HeadTiles;

typedef float2 Two;
typedef typename Key<StoredT>::type KeyT;
threadgroup Two query_sums[Packed ? Sizes::Simdgroups * (1 + Sizes::Pairs) * N * 4 : 1];
threadgroup Two partial[Sizes::Simdgroups * N * M * Tile / 2];
threadgroup Two probs[Heads * Sizes::Stride / 2];
threadgroup float rescale[Heads];

const int index = thread_position_in_threadgroup.x;
const int lane = index % 32;
const int slice = index / 32;
const int split = threadgroup_position_in_grid.y;
const int token = threadgroup_position_in_grid.z / HeadGroups;  // of the split's text
const int first_head = threadgroup_position_in_grid.z % HeadGroups * Heads;
const int row = tile_row(lane);
const int channel = Channels * slice + 4 * tile_column(lane);  // the first of 8 neighbours of a lane
const int pair = Lora + 8 * slice + tile_column(lane);

// Where this split lies: `count` positions of a segment, the tail being number 0.
const int tokens = splits[0];
const int segment = splits[1 + 5 * split];
const int text = splits[2 + 5 * split];
const size_t start = splits[3 + 5 * split];
const int size = splits[4 + 5 * split];
const int count = min(size, splits[5 + 5 * split] + token);
if (size == 0) {
  return;
}
const device StoredT* chosen =
    segment <= 1 ? segment1 : segment == 2 ? segment2 : segment == 3 ? segment3
    : segment == 4 ? segment4 : segment == 5 ? segment5 : segment == 6 ? segment6
    : segment == 7 ? segment7 : segment == 8 ? segment8 : segment == 9 ? segment9
    : segment == 10 ? segment10 : segment == 11 ? segment11 : segment == 12 ? segment12
    : segment == 13 ? segment13 : segment == 14 ? segment14 : segment == 15 ? segment15
    : segment == 16 ? segment16 : segment == 17 ? segment17 : segment == 18 ? segment18 : segment19;
// The tail of packed segments is plain: another type, with pointers and keys of its own.
const bool in_tail = Packed && segment == 0;
const auto tail_rows = tail + (size_t(text) * Room + start) * Width;
const auto rows = (segment == 0 ? as_stored(tail, chosen) : chosen) +
    (size_t(segment == 0 ? text * Room : 0) + start) * row_size(chosen, Width);

float2 query[Sizes::Tiles + Sizes::Pairs][N];
load_queries<Sizes, Packed, H>(queries + size_t(text * tokens + token) * H * Width, slice, first_head, lane, query, query_sums);
if (Packed) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

float2 acc_tiles[Sizes::Tiles][N];
float acc_bias[N];  // a lane's part of the sum of prob y
float2 m[Sizes::Turns], l[Sizes::Turns];
#pragma unroll
for (int n = 0; n < N; ++n) {
  acc_bias[n] = 0;
#pragma unroll
  for (int i = 0; i < Sizes::Tiles; ++i) {
    acc_tiles[i][n] = filled<2>(0);
  }
}
#pragma unroll
for (int turn = 0; turn < Sizes::Turns; ++turn) {
  m[turn] = filled<2>(-INFINITY);
  l[turn] = filled<2>(0);
}

// The fragments of a block are keys and values at once. The first round of the loop only loads.
vec<KeyT, 2> key[Sizes::Tiles + Sizes::Pairs][M];
float2 line[1 + Sizes::Pairs][M];
Fetched<StoredT, Sizes::Eights, Sizes::Pairs> ahead[M];
vec<TailT, 2> tail_key[Sizes::Tiles + Sizes::Pairs][M];
for (int at = count > 0 ? -Block : 0; at < count; at += Block) {
  // The next block is loaded before this one is used: memory is farther away than anything else. Rows
  // beyond the last are the last row again: their scores are masked, but must be numbers.
  const int next = at + Block + row;
  if (at + Block < count && !in_tail) {
#pragma unroll
    for (int t = 0; t < M; ++t) {
      const auto from = rows + min(next + 8 * t, count - 1) * row_size(rows, Width);
      fetch_row(ahead[t], from, channel, pair, 8 * Sizes::Simdgroups, Width);
    }
  }

  if (at >= 0) {
    if (in_tail) {
      partial_scores<Sizes, Packed, TailT>(tail_key, query, line, query_sums, slice, lane, partial);
    } else {
      partial_scores<Sizes, Packed, KeyT>(key, query, line, query_sums, slice, lane, partial);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    block_softmax<Sizes>(partial, slice, lane, count - at, m, l, (threadgroup float*)probs, rescale);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float2 prob[M][N];
    rescale_and_load<Sizes>(probs, rescale, lane, prob, acc_tiles, acc_bias);
    if (Packed) {
      apply_lines<M, N>(line[0], lane, prob, acc_bias);
    }
    if (in_tail) {
      add_values<Sizes::Tiles, M, N, TailT>(tail_key, prob, acc_tiles);
    } else {
      add_values<Sizes::Tiles, M, N, KeyT>(key, prob, acc_tiles);
    }
  }

  if (in_tail) {
    // The tail is not loaded ahead: the registers for that would be taken from all other splits, too.
    Fetched<TailT, Sizes::Eights, Sizes::Pairs> fetched[M];
#pragma unroll
    for (int t = 0; t < M; ++t) {
      const auto from = tail_rows + min(next + 8 * t, count - 1) * Width;
      fetch_row(fetched[t], from, channel, pair, 8 * Sizes::Simdgroups, Width);
    }
    as_keys<M>(fetched, tail_key, line);
  } else {
    as_keys<M>(ahead, key, line);
  }
}

const size_t place = (size_t(split) * tokens + token) * H + first_head;
write_acc<Sizes, Packed, H>(acc_tiles, acc_bias, slice, first_head, lane, acc + place * Lora);
write_m_and_l<Sizes, H>(m, l, slice, first_head, lane, m_and_l + 2 * place);
