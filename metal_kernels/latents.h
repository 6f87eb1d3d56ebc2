#include "dequantize.h"
#include "eights.h"
#include "tiles.h"
#include "vectors.h"

// Latents as a cache stores them: plain rows of any float type, or rows packed to 8 bits. A packed row
// is groups of 64 channels, each 16 words of 4 codes, the first in the lowest bits, then a float scale
// and a float bias: a channel is code * scale + bias. The last group may be used in part.
//
// `Fetched` is what a lane holds of one row, as it is stored: `Eights` times 8 neighbouring channels, 32
// apart, the first a multiple of 8 and all in one group, and `Pairs` times 2. It is unpacked where it is
// used, so that the lane can load the next row while it works on this one.
//
// Keys are what products multiply: plain channels, or code - 128. half holds code - 128 exactly, and its
// product cancels less against the bias than the code's would. A channel is key * line.x + line.y. The eights
// of a row share a line, each pair has its own; the line of plain channels is (1, 0).
constant constexpr int GroupWords = 18;

template <typename T>
METAL_FUNC int row_size(const device T*, int width) {
  return width;
}
METAL_FUNC int row_size(const device uint*, int width) {
  return (width + 63) / 64 * GroupWords;
}

// The tail as a pointer to the type of the segments. Packed segments have another type: then the result is
// `segments`, which is not read, since such a tail is read through its own pointer.
template <typename T>
METAL_FUNC const device T* as_stored(const device T* tail, const device T*) {
  return tail;
}
template <typename T>
METAL_FUNC const device uint* as_stored(const device T*, const device uint* segments) {
  return segments;
}

// The type of a key.
template <typename T>
struct Key {
  typedef T type;
};
template <>
struct Key<uint> {
  typedef half type;
};

template <typename T, int Eights, int Pairs>
struct Fetched {
  Eight<T> eights[Eights];
  vec<T, 2> pairs[Pairs];
};

template <int Eights, int Pairs>
struct Fetched<uint, Eights, Pairs> {
  uint2 codes[Eights];
  ushort pair_codes[Pairs];
  float2 lines[1 + Pairs];  // scale and bias, of the eights and of each pair
};

template <typename T, int E, int P>
METAL_FUNC void fetch_eights(thread Fetched<T, E, P>& to, const device T* row, int channel) {
#pragma unroll
  for (int i = 0; i < E; ++i) {
    fetch_eight(to.eights[i], row + channel + 32 * i);
  }
}
template <int E, int P>
METAL_FUNC void fetch_eights(thread Fetched<uint, E, P>& to, const device uint* row, int channel) {
  const device uint* group = row + channel / 64 * GroupWords;
#pragma unroll
  for (int i = 0; i < E; ++i) {
    to.codes[i] = *(const device uint2*)(group + channel % 64 / 4 + 8 * i);
  }
  to.lines[0] = *(const device float2*)(group + 16);
}

template <typename T, int E, int P>
METAL_FUNC void fetch_pair(thread Fetched<T, E, P>& to, int i, const device T* row, int channel) {
  to.pairs[i] = fetch<2>(row + channel);
}
template <int E, int P>
METAL_FUNC void fetch_pair(thread Fetched<uint, E, P>& to, int i, const device uint* row, int channel) {
  const device uint* group = row + channel / 64 * GroupWords;
  to.pair_codes[i] = ((const device ushort*)group)[channel % 64 / 2];
  to.lines[1 + i] = *(const device float2*)(group + 16);
}

// Loads the eights from `channel` on, and the pairs from `pair` on, `step` apart, that lie within the row.
template <typename T, int E, int P>
METAL_FUNC void fetch_row(
    thread Fetched<T, E, P>& to, const device T* row, int channel, int pair, int step, int width) {
  fetch_eights(to, row, channel);
#pragma unroll
  for (int i = 0; i < P; ++i) {
    if (pair + step * i < width) {
      fetch_pair(to, i, row, pair + step * i);
    }
  }
}

// Keys 2 i and 2 i + 1, counted through all eights of a row.
template <typename T, int E, int P>
METAL_FUNC vec<T, 2> key_of_eights(thread const Fetched<T, E, P>& fetched, int i) {
  return pair_of(fetched.eights[i / 4], i % 4);
}
template <int E, int P>
METAL_FUNC half2 key_of_eights(thread const Fetched<uint, E, P>& fetched, int i) {
  const uint word = fetched.codes[i / 4][i % 4 / 2];
  const half2 even = halves_of<128>(word & 0x00ff00ffu), odd = halves_of<128>((word >> 8) & 0x00ff00ffu);
  return half2(even[i % 2], odd[i % 2]);
}

template <typename T, int E, int P>
METAL_FUNC vec<T, 2> key_of_pair(thread const Fetched<T, E, P>& fetched, int i) {
  return fetched.pairs[i];
}
template <int E, int P>
METAL_FUNC half2 key_of_pair(thread const Fetched<uint, E, P>& fetched, int i) {
  const uint codes = fetched.pair_codes[i];
  return halves_of<128>((codes | codes << 8) & 0x00ff00ffu);
}

template <typename T, int E, int P>
METAL_FUNC float2 line_of(thread const Fetched<T, E, P>&, int) {
  return float2(1, 0);
}
template <int E, int P>
METAL_FUNC float2 line_of(thread const Fetched<uint, E, P>& fetched, int i) {
  const float2 line = fetched.lines[i];
  return float2(line.x, line.y + 128 * line.x);
}

// Unpacks a row for each of M tiles: the keys of 4 E tiles of channels and of P pairs, and the lines of the
// eights and of each pair.
template <int M, typename T, int E, int P>
METAL_FUNC void as_keys(
    thread const Fetched<T, E, P>* fetched,
    thread Fragment<typename Key<T>::type> (*key)[M],
    thread Fragment<float> (*line)[M]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < 4 * E; ++i) {
      key[i][m] = key_of_eights(fetched[m], i);
    }
#pragma unroll
    for (int i = 0; i < P; ++i) {
      key[4 * E + i][m] = key_of_pair(fetched[m], i);
    }
#pragma unroll
    for (int i = 0; i < 1 + P; ++i) {
      line[i][m] = line_of(fetched[m], i);
    }
  }
}
