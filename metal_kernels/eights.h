#include "vectors.h"

// 32 channels of a row are fragments of 4 tiles. A lane takes 8 neighbouring channels, the first of which is
// 4 * tile_column; channels 2 i and 2 i + 1 of them stand in tile i. All factors of a product follow this
// order.
template <typename T>
struct Eight {
  vec<T, 4> low, high;
};
template <typename T>
METAL_FUNC void fetch_eight(thread Eight<T>& to, const device T* from) {
  to.low = fetch<4>(from);
  to.high = fetch<4>(from + 4);
}
template <typename T>
METAL_FUNC vec<T, 2> pair_of(const thread Eight<T>& eight, int i) {
  const vec<T, 4> four = i < 2 ? eight.low : eight.high;
  return vec<T, 2>(four[i % 2 * 2], four[i % 2 * 2 + 1]);
}
