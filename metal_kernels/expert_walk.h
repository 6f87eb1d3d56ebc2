// Which tokens of which expert are a threadgroup's: of those that expert_order has sorted, up to `Most` at a time.
struct ExpertTokens {
  int expert;  // below 0: none
  int first;   // place in the order of the first
  int count;   // 1 to Most
};

// Number `turn` of those of all experts. A lane looks through a share of the experts. Starts is a pointer: those of
// few experts are in another address space.
template <int E, int Most, typename Starts>
METAL_FUNC ExpertTokens tokens_of_turn(Starts starts, int turn, int lane) {
  constexpr int Share = (E + 31) / 32;
  const int from = min(lane * Share, E), to = min(from + Share, E);
  int own = 0;
  int start = starts[from];
  for (int expert = from; expert < to; ++expert) {
    const int end = starts[expert + 1];
    own += (end - start + Most - 1) / Most;
    start = end;
  }
  int before = simd_prefix_exclusive_sum(own);
  int found = -1, first = 0;
  start = starts[from];
  for (int expert = from; expert < to; ++expert) {
    const int end = starts[expert + 1];
    const int turns = (end - start + Most - 1) / Most;
    if (turn >= before && turn < before + turns) {
      found = expert;
      first = start + (turn - before) * Most;
    }
    before += turns;
    start = end;
  }
  found = simd_max(found);
  first = simd_max(first);
  return {found, first, found < 0 ? 0 : min(starts[found + 1] - first, Most)};
}
