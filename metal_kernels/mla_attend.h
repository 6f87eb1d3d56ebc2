#include "latents.h"
#include "tiles.h"
#include "vectors.h"

// The phases of mla_attend. A block of positions passes scores, softmax and accumulate; after the last
// block the split is written. All simdgroups of a threadgroup share the positions; each owns a slice of
// the channels. m is the running maximum of the scores of a head, l the running sum of exp(score - m),
// and acc the running sum of exp(score - m) times the latents.

// Sizes that the phases share. Tiles are 8 x 8; H and Lora are those of the whole layer.
template <int Heads, int Lora_, int Shared, int Channels, int Block>
struct AttendSizes {
  static constexpr constant int Lora = Lora_;
  static constexpr constant int Width = Lora + Shared;          // of a latent with its shared key
  static constexpr constant int Simdgroups = Lora / Channels;   // of a threadgroup
  static constexpr constant int Tiles = Channels / 8;           // of a slice, along the latent
  static constexpr constant int Eights = Channels / 32;         // of a lane, in a row of the latents
  static constexpr constant int SharedTiles = Shared / 8;       // of the shared key, dealt out to the slices
  static constexpr constant int Pairs = (SharedTiles + Simdgroups - 1) / Simdgroups;  // of a slice, at most
  static constexpr constant int HeadTiles = Heads / 8;
  static constexpr constant int PositionTiles = Block / 8;
  static constexpr constant int Turns = (HeadTiles + Simdgroups - 1) / Simdgroups;  // at the softmax
  // Between the probabilities of two heads, so that 4 heads lie in 32 banks.
  static constexpr constant int Stride = PositionTiles % 2 == 0 ? Block + 8 : Block;
};

// ------------------------------------------------------------------------------------------- queries
// Loads this slice's channels of all heads, as right factors [channel, head]: the tiles of the latent,
// then those of the shared key. Where Packed, query_sums gets their sums over the channels of each line.
template <typename Sizes, bool Packed, int H>
METAL_FUNC void load_queries(
    const device float* queries,  // [H, Width] of this text
    int slice,
    int first_head,
    int lane,
    thread Fragment<float> (*query)[Sizes::HeadTiles],
    threadgroup float2* query_sums) {
  constexpr int Width = Sizes::Width;
  const int row = tile_row(lane), column = tile_column(lane);
  float2 sums[Sizes::HeadTiles];  // over a lane's channels of one line
#pragma unroll
  for (int i = 0; i < Sizes::Tiles + Sizes::Pairs; ++i) {
    const int tile = slice + (i - Sizes::Tiles) * Sizes::Simdgroups;  // of the shared key
    const int latent = Sizes::Tiles * 8 * slice + i / 4 * 32 + row / 2 * 8 + i % 4 * 2 + row % 2;
    const int channel = i < Sizes::Tiles ? latent : Sizes::Lora + 8 * tile + row;
#pragma unroll
    for (int n = 0; n < Sizes::HeadTiles; ++n) {
      const int head = first_head + 8 * n + column;
      const device float* from = queries + head * Width + channel;
      const float first = channel < Width && head < H ? from[0] : 0.0f;
      const float second = channel < Width && head + 1 < H ? from[Width] : 0.0f;
      query[i][n] = as_right<float>(float2(first, second));
      if (Packed) {
        sums[n] = (0 < i && i < Sizes::Tiles ? sums[n] : filled<2>(0)) + float2(first, second);
      }
      if (Packed && i >= Sizes::Tiles - 1) {
        const float2 sum = float2(sum_over_rows(sums[n].x), sum_over_rows(sums[n].y));
        if (row == 0) {
          const int line = slice * (1 + Sizes::Pairs) + i - (Sizes::Tiles - 1);
          query_sums[(line * Sizes::HeadTiles + n) * 4 + column / 2] = sum;
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------- phase 1: scores
// score += channel . query, over I tiles of channels of one line, for M tiles of positions and N of heads.
// Where Packed, query_sums[4 n] are the query's sums over those channels, for a lane's two heads of tile n.
template <int I, int M, int N, typename K, bool Packed>
METAL_FUNC void add_scores(
    const thread Fragment<K> (*key)[M],
    const thread Fragment<float> (*query)[N],
    const thread float2* line,
    const threadgroup float2* query_sums,
    thread Fragment<float> (*score)[M]) {
  float2 sum[N][M];
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      sum[n][m] = Packed ? filled<2>(0) : score[n][m];
    }
  }
#pragma unroll
  for (int i = 0; i < I; ++i) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      multiply_add<M, K, float>(key[i], query[i][n], sum[n]);
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float2 whole = Packed ? query_sums[4 * n] : filled<2>(0);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      score[n][m] = Packed ? score[n][m] + sum[n][m] * line[m].x + whole * line[m].y : sum[n][m];
    }
  }
}

// Leaves in `partial` what this slice's channels add to the scores of a block, [position, head].
template <typename Sizes, bool Packed, typename K>
METAL_FUNC void partial_scores(
    const thread Fragment<K> (*key)[Sizes::PositionTiles],
    const thread Fragment<float> (*query)[Sizes::HeadTiles],
    const thread Fragment<float> (*line)[Sizes::PositionTiles],
    const threadgroup float2* query_sums,
    int slice,
    int lane,
    threadgroup float2* partial) {
  constexpr int M = Sizes::PositionTiles, N = Sizes::HeadTiles;
  float2 score[N][M];
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      score[n][m] = filled<2>(0);
    }
  }
  const threadgroup float2* sums = query_sums + slice * (1 + Sizes::Pairs) * N * 4 + tile_column(lane) / 2;
  add_scores<Sizes::Tiles, M, N, K, Packed>(key, query, line[0], sums, score);
#pragma unroll
  for (int i = 0; i < Sizes::Pairs; ++i) {
    if (slice + i * Sizes::Simdgroups < Sizes::SharedTiles) {
      const int tile = Sizes::Tiles + i;
      add_scores<1, M, N, K, Packed>(
          key + tile, query + tile, line[1 + i], sums + (1 + i) * N * 4, score);
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      partial[((slice * N + n) * M + m) * 32 + lane] = score[n][m];
    }
  }
}

// --------------------------------------------------------------------------------- phase 2: softmax
// The whole scores of the 8 heads of tile n, [position, head]: the sums of what the slices left in `partial`.
template <typename Sizes>
METAL_FUNC void sum_of_slices(const threadgroup float2* partial, int n, int lane, thread float2* score) {
  constexpr int M = Sizes::PositionTiles;
#pragma unroll
  for (int t = 0; t < M; ++t) {
    score[t] = filled<2>(0);
#pragma unroll
    for (int i = 0; i < Sizes::Simdgroups; ++i) {
      score[t] += partial[((i * Sizes::HeadTiles + n) * M + t) * 32 + lane];
    }
  }
}

// Raises m and l of the heads of which this simdgroup takes the softmax, 8 a turn, and leaves for all
// simdgroups probs = exp(score - m) [head, position] and rescale = exp(m before - m) [head]. Positions
// from `left` on do not exist. A lane's l is over its own positions, its m over all.
template <typename Sizes>
METAL_FUNC void block_softmax(
    const threadgroup float2* partial,
    int slice,
    int lane,
    int left,
    thread float2* m,
    thread float2* l,
    threadgroup float* probs,
    threadgroup float* rescale) {
  constexpr int M = Sizes::PositionTiles;
  const int row = tile_row(lane), column = tile_column(lane);
#pragma unroll
  for (int turn = 0; turn < Sizes::Turns; ++turn) {
    const int n = slice + turn * Sizes::Simdgroups;
    if (n < Sizes::HeadTiles) {
      float2 score[M];
      sum_of_slices<Sizes>(partial, n, lane, score);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = 8 * n + column + i;
        const float m_before = m[turn][i];
        float m_block = -INFINITY;
#pragma unroll
        for (int t = 0; t < M; ++t) {
          score[t][i] = 8 * t + row < left ? score[t][i] : -INFINITY;
          m_block = max(m_block, score[t][i]);
        }
        m[turn][i] = max(m_before, max_over_rows(m_block));
        const float fade = exp(m_before - m[turn][i]);
        l[turn][i] *= fade;
#pragma unroll
        for (int t = 0; t < M; ++t) {
          const float prob = exp(score[t][i] - m[turn][i]);
          l[turn][i] += prob;
          probs[head * Sizes::Stride + 8 * t + row] = prob;
        }
        if (row == 0) {
          rescale[head] = fade;
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------ phase 3: accumulate
// Rescales acc and acc_bias to the raised m, and loads a block's probabilities as left factors
// [head, position].
template <typename Sizes>
METAL_FUNC void rescale_and_load(
    const threadgroup float2* probs,
    const threadgroup float* rescale,
    int lane,
    thread Fragment<float> (*prob)[Sizes::HeadTiles],
    thread Fragment<float> (*acc)[Sizes::HeadTiles],
    thread float* acc_bias) {
  const int row = tile_row(lane), column = tile_column(lane);
#pragma unroll
  for (int n = 0; n < Sizes::HeadTiles; ++n) {
    const float fade = rescale[8 * n + row];
#pragma unroll
    for (int m = 0; m < Sizes::PositionTiles; ++m) {
      prob[m][n] = probs[((8 * n + row) * Sizes::Stride + 8 * m + column) / 2];
    }
#pragma unroll
    for (int i = 0; i < Sizes::Tiles; ++i) {
      acc[i][n] *= fade;
    }
    acc_bias[n] *= fade;
  }
}

// Packed rows: adds prob times the biases of the latents' lines to acc_bias, and multiplies prob by their
// scales. `line` holds a lane's rows; a left factor needs those of its two columns.
template <int M, int N>
METAL_FUNC void apply_lines(
    const thread float2* line,
    int lane,
    thread Fragment<float> (*prob)[N],
    thread float* acc_bias) {
  const int column = tile_column(lane);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int first = tile_lane(column, 0), second = tile_lane(column + 1, 0);
    const float2 own = line[m];
    const float2 scales = float2(simd_shuffle(own.x, first), simd_shuffle(own.x, second));
    const float2 biases = float2(simd_shuffle(own.y, first), simd_shuffle(own.y, second));
#pragma unroll
    for (int n = 0; n < N; ++n) {
      acc_bias[n] += dot(prob[m][n], biases);
      prob[m][n] *= scales;
    }
  }
}

// acc += prob key, over I tiles of channels, for M tiles of positions and N of heads.
template <int I, int M, int N, typename K>
METAL_FUNC void add_values(
    const thread Fragment<K> (*key)[M],
    const thread Fragment<float> (*prob)[N],
    thread Fragment<float> (*acc)[N]) {
#pragma unroll
  for (int i = 0; i < I; ++i) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      multiply_add<N, float, K>(prob[m], as_right<K>(key[i][m]), acc[i]);
    }
  }
}

// ----------------------------------------------------------------------------------- phase 4: write
// Writes this slice's channels of acc, [H, Lora] of which the first head of `to` is first_head.
template <typename Sizes, bool Packed, int H>
METAL_FUNC void write_acc(
    const thread Fragment<float> (*acc)[Sizes::HeadTiles],
    const thread float* acc_bias,
    int slice,
    int first_head,
    int lane,
    device float* to) {
  const int channel = Sizes::Tiles * 8 * slice + 4 * tile_column(lane);
#pragma unroll
  for (int n = 0; n < Sizes::HeadTiles; ++n) {
    const int head = 8 * n + tile_row(lane);
    const float bias = Packed ? sum_over_columns(acc_bias[n]) : 0;
    if (first_head + head < H) {
#pragma unroll
      for (int i = 0; i < Sizes::Tiles; i += 2) {
        const float2 low = acc[i][n], high = acc[i + 1][n];
        const float4 four = float4(low.x, low.y, high.x, high.y);
        store<4>(to + head * Sizes::Lora + channel + i / 4 * 32 + i % 4 * 2, Packed ? four + bias : four);
      }
    }
  }
}

// Writes m and l of the heads whose softmax this simdgroup took, [H, 2] from first_head on.
template <typename Sizes, int H>
METAL_FUNC void write_m_and_l(
    const thread float2* m,
    const thread float2* l,
    int slice,
    int first_head,
    int lane,
    device float* to) {
#pragma unroll
  for (int turn = 0; turn < Sizes::Turns; ++turn) {
    const int n = slice + turn * Sizes::Simdgroups;
    if (n < Sizes::HeadTiles) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = 8 * n + tile_column(lane) + i;
        const float whole = sum_over_rows(l[turn][i]);
        if (tile_row(lane) == 0 && first_head + head < H) {
          to[2 * head] = m[turn][i];
          to[2 * head + 1] = whole;
        }
      }
    }
  }
}
