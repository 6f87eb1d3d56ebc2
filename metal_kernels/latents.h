// Latents as a cache stores them: plain rows of any float type, or rows packed to 8 bits. A packed row
// is groups of 64 channels, each 16 words of 4 codes, the first in the lowest bits, then a float scale
// and a float bias: a channel is code * scale + bias. The last group may end with channels of nothing.
//
// `Fetched` is what a lane holds of one row, untouched until it is wanted as numbers, so that the lane may
// ask for the next row and go on with the last: `Eights` times 8 neighbouring channels, the first a
// multiple of 8, and `Pairs` times 2.
constant constexpr int GroupWords = 18;

template <typename T>
inline int row_size(const device T*, int width) {
  return width;
}
inline int row_size(const device uint*, int width) {
  return (width + 63) / 64 * GroupWords;
}

// The tail by the type of the segments: where that is another, segments, which nothing reads then.
template <typename T>
inline const device T* as_stored(const device T* tail, const device T*) {
  return tail;
}
template <typename T>
inline const device uint* as_stored(const device T*, const device uint* segments) {
  return segments;
}

// What a channel is once it is fetched: a float only where it must be computed.
template <typename T>
struct Channel {
  typedef T type;
};
template <>
struct Channel<uint> {
  typedef float type;
};

template <typename T, int Eights, int Pairs>
struct Fetched {
  vec<T, 4> low[Eights], high[Eights];
  vec<T, 2> pairs[Pairs];
};

template <int Eights, int Pairs>
struct Fetched<uint, Eights, Pairs> {
  vec<ushort, 4> codes[Eights];
  float2 lines[Eights];  // scale and bias
  ushort pair_codes[Pairs];
  float2 pair_lines[Pairs];
};

template <typename T, int E, int P>
inline void fetch_eight(thread Fetched<T, E, P>& to, int i, const device T* row, int channel) {
  to.low[i] = *(const device vec<T, 4>*)(row + channel);
  to.high[i] = *(const device vec<T, 4>*)(row + channel + 4);
}
template <int E, int P>
inline void fetch_eight(thread Fetched<uint, E, P>& to, int i, const device uint* row, int channel) {
  const device uint* group = row + channel / 64 * GroupWords;
  to.codes[i] = *(const device vec<ushort, 4>*)(group + channel % 64 / 4);
  to.lines[i] = *(const device float2*)(group + 16);
}

template <typename T, int E, int P>
inline void fetch_pair(thread Fetched<T, E, P>& to, int i, const device T* row, int channel) {
  to.pairs[i] = *(const device vec<T, 2>*)(row + channel);
}
template <int E, int P>
inline void fetch_pair(thread Fetched<uint, E, P>& to, int i, const device uint* row, int channel) {
  const device uint* group = row + channel / 64 * GroupWords;
  to.pair_codes[i] = ((const device ushort*)group)[channel % 64 / 2];
  to.pair_lines[i] = *(const device float2*)(group + 16);
}

inline float2 decoded(ushort codes, float2 line) {
  return float2(codes & 255, codes >> 8) * line.x + line.y;
}

// Channels 2 i and 2 i + 1 of all the eights.
template <typename T, int E, int P>
inline vec<T, 2> of_eights(thread const Fetched<T, E, P>& fetched, int i) {
  const vec<T, 4> four = i % 4 < 2 ? fetched.low[i / 4] : fetched.high[i / 4];
  return vec<T, 2>(four[i % 2 * 2], four[i % 2 * 2 + 1]);
}
template <int E, int P>
inline float2 of_eights(thread const Fetched<uint, E, P>& fetched, int i) {
  return decoded(fetched.codes[i / 4][i % 4], fetched.lines[i / 4]);
}

template <typename T, int E, int P>
inline vec<T, 2> of_pairs(thread const Fetched<T, E, P>& fetched, int i) {
  return fetched.pairs[i];
}
template <int E, int P>
inline float2 of_pairs(thread const Fetched<uint, E, P>& fetched, int i) {
  return decoded(fetched.pair_codes[i], fetched.pair_lines[i]);
}

// A pair of another type: the same, or float.
template <typename To, typename From>
inline vec<To, 2> converted(vec<From, 2> x) {
  return vec<To, 2>(To(x[0]), To(x[1]));
}
