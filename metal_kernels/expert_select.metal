#include "activations.h"

// Which experts answer a token, and with what weight: sigmoid, bias, grouped top-k, renormalised.
//
//   logits       [B, E] float
//   bias         [E] float: it decides who is chosen, not how much they count
//   scale        float, of the weights
//   experts      [B, TopK] int, best first
//   weights      [B, TopK] float
// Template: E, TopK, Groups, BestGroups int; Renormalize bool. Groups divides E.
// Grid (32, B, 1), threadgroup (32, 1, 1): a simdgroup owns a token, a lane every 32nd expert.
constexpr int Owned = (E + 31) / 32;
constexpr int Members = E / Groups;  // of a group

threadgroup float group_scores[Groups];
threadgroup float biased[E];

const int lane = thread_position_in_grid.x;
const int token = thread_position_in_grid.y;

// A score for every expert. Experts beyond the last have the merit -infinity: they are never chosen.
float scores[Owned];
float merits[Owned];
#pragma unroll
for (int i = 0; i < Owned; ++i) {
  const int expert = lane + 32 * i;
  scores[i] = 0;
  merits[i] = -INFINITY;
  if (expert < E) {
    scores[i] = sigmoid_as_written(logits[token * E + expert]);
    merits[i] = scores[i] + bias[expert];
    biased[expert] = merits[i];
  }
}

// Drop the experts outside the best groups; a group is as good as its best two.
if (Groups > 1) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int group = lane; group < Groups; group += 32) {
    float best = -INFINITY;
    float second = -INFINITY;
    for (int i = 0; i < Members; ++i) {
      const float merit = biased[group * Members + i];
      second = metal::max(second, metal::min(best, merit));
      best = metal::max(best, merit);
    }
    group_scores[group] = best + second;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int i = 0; i < Owned; ++i) {
    const int group = metal::min(lane + 32 * i, E - 1) / Members;
    int better = 0;
    for (int other = 0; other < Groups; ++other) {
      const float score = group_scores[other];
      const float own = group_scores[group];
      better += score > own || (score == own && other < group) ? 1 : 0;
    }
    merits[i] = better < BestGroups ? merits[i] : -INFINITY;
  }
}

// TopK times the best that is left; of equals the first.
float total = 0;
float chosen[TopK];
#pragma unroll
for (int choice = 0; choice < TopK; ++choice) {
  float best = merits[0];
#pragma unroll
  for (int i = 1; i < Owned; ++i) {
    best = metal::max(best, merits[i]);
  }
  best = simd_max(best);
  int expert = E;
  float score = 0;
#pragma unroll
  for (int i = Owned - 1; i >= 0; --i) {
    expert = merits[i] == best ? lane + 32 * i : expert;
  }
  expert = metal::min(simd_min(expert), E - 1);  // (of NaN none is the best)
#pragma unroll
  for (int i = 0; i < Owned; ++i) {
    const bool taken = expert == lane + 32 * i;
    score = taken ? scores[i] : score;
    merits[i] = taken ? -INFINITY : merits[i];
  }
  chosen[choice] = simd_sum(score);  // of one lane, and zeros
  total += chosen[choice];
  if (lane == 0) {
    experts[token * TopK + choice] = expert;
  }
}

if (lane == 0) {
  const float factor = Renormalize ? scale / (total + 1e-20f) : scale;
#pragma unroll
  for (int choice = 0; choice < TopK; ++choice) {
    weights[token * TopK + choice] = chosen[choice] * factor;
  }
}
