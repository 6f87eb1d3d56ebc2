// Pairs (token, slot) in the order of their experts, those of one expert in the order they come: what a stable sort
// would answer.
//
//   experts      [Pairs] int: the expert of each pair, token after token
//   pairs        int, how many
//   order        [Pairs] int: the pair that stands at each place of the order
//   places       [Pairs] int: where each pair stands in the order
//   starts       [E + 1] int: the place of the first pair of each expert; then Pairs
// Template: E int.
// Grid (512, E, 1), threadgroup (512, 1, 1): a threadgroup finds the pairs of one expert. Each of its simdgroups looks
// through its share of all pairs, twice.
constexpr int Simdgroups = 16;

threadgroup int earlier_pairs[Simdgroups];  // of earlier experts
threadgroup int own_pairs[Simdgroups];

const int lane = thread_position_in_grid.x % 32;
const int simdgroup = thread_position_in_grid.x / 32;
const int expert = thread_position_in_grid.y;
const int share = (pairs + 32 * Simdgroups - 1) / (32 * Simdgroups) * 32;
const int first = simdgroup * share;
const int end = metal::min(first + share, pairs);

int earlier = 0;
int own = 0;
#pragma unroll 4
for (int at = first + lane; at < end; at += 32) {
  const int its = experts[at];
  earlier += its < expert ? 1 : 0;
  own += its == expert ? 1 : 0;
}
earlier = simd_sum(earlier);
own = simd_sum(own);
if (lane == 0) {
  earlier_pairs[simdgroup] = earlier;
  own_pairs[simdgroup] = own;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

int place = 0;
int total = 0;
#pragma unroll
for (int i = 0; i < Simdgroups; ++i) {
  total += earlier_pairs[i];
  place += earlier_pairs[i] + (i < simdgroup ? own_pairs[i] : 0);
}
if (lane == 0 && simdgroup == 0) {
  starts[expert] = total;
  if (expert == E - 1) {
    starts[E] = pairs;
  }
}
for (int at = first; at < end; at += 32) {
  const int pair = at + lane;
  const bool is_own = pair < end && experts[metal::min(pair, pairs - 1)] == expert;
  const int before = simd_prefix_exclusive_sum(is_own ? 1 : 0);
  if (is_own) {
    order[place + before] = pair;
    places[pair] = place + before;
  }
  place += simd_broadcast(before + (is_own ? 1 : 0), 31);
}
