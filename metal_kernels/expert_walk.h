// Which tokens of which expert are a threadgroup's: of those that expert_order has sorted, up to `Most` at a time.
struct ExpertTokens {
  int expert;  // below 0: none; E: the shared one
  int first;   // place in the order of the first; the shared expert's stand behind all others
  int count;   // 1 to Most
};

// Number `turn` of those of all experts, which begin with the shared one's, if it is Shared, of all `tokens`. A lane
// looks through a share of the experts. Starts is a pointer: those of few experts are in another address space.
template <int E, int Most, bool Shared, typename Starts>
METAL_FUNC ExpertTokens tokens_of_turn(Starts starts, int tokens, int turn, int lane) {
  const int shared_turns = Shared ? (tokens + Most - 1) / Most : 0;
  if (turn < shared_turns) {
    return {E, starts[E] + turn * Most, min(tokens - turn * Most, Most)};
  }
  turn -= shared_turns;
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

// The token that stands at a place, and behind all pairs.
template <int TopK, typename Order>
METAL_FUNC int token_at(Order order, int pairs, int place) {
  return place < pairs ? order[place] / TopK : place - pairs;
}
