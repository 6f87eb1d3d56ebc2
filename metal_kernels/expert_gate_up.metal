#include "activations.h"
#include "matvec.h"
#include "reduce.h"

// The first half of every expert that a token uses: silu(gate x) * (up x), the routed experts'
// rows first, in router order, then the shared expert's.
//
//   x                              [B, K] of any float type
//   experts                        [B, TopK] int, the routed experts of each token
//   gate, up                       [E, N, K], packed to Bits or of a float type
//   {gate,up}_{scales,biases}      [E, N, K / Group]; not read where Bits is 0: plain
//   shared_gate, shared_up         [SharedN, K] with SharedBits and SharedGroup, and so on
//   h                              [B, TopK * N + SharedN] of x's type
// Template: OutT; TopK, K, N, Bits, Group, SharedN, SharedBits, SharedGroup int. K is a multiple of
// 8 and of the groups, N and SharedN of 4; SharedN may be 0.
// Grid (32, (TopK * N + SharedN) / 4, B): a simdgroup owns 4 rows of h, gate and up alike.
constexpr int Rows = 4;
constexpr int Routed = TopK * N;

const int lane = thread_position_in_grid.x;
const int first = thread_position_in_grid.y * Rows;
const int token = thread_position_in_grid.z;

float gates[Rows] = {0, 0, 0, 0};
float ups[Rows] = {0, 0, 0, 0};
auto input = x + token * K;
if (first < Routed) {
  const int row = experts[token * TopK + first / N] * N + first % N;
  add_products<Rows>(
      input,
      rows_from<GateBits, GateGroup>(gate, gate_scales, gate_biases, row, K),
      rows_from<UpBits, UpGroup>(up, up_scales, up_biases, row, K),
      lane,
      gates,
      ups);
} else {
  const int row = first - Routed;
  add_products<Rows>(
      input,
      rows_from<SharedGateBits, SharedGateGroup>(
          shared_gate, shared_gate_scales, shared_gate_biases, row, K),
      rows_from<SharedUpBits, SharedUpGroup>(
          shared_up, shared_up_scales, shared_up_biases, row, K),
      lane,
      gates,
      ups);
}

const float g = sum_of_rows<Rows>(gates, lane);
const float u = sum_of_rows<Rows>(ups, lane);
if (lane < Rows) {
  h[token * (Routed + SharedN) + first + lane] = OutT(silu(g) * u);
}
