// How well each expert suits a token, in float whatever the type of x: logits = gate x.
//
//   x             [B, K] of any float type
//   gate          [E, K], plain of any float type or packed to Bits
//   gate_scales, gate_biases   [E, K / Group]; not read where Bits is 0: plain
//   logits        [B, E] float
// Template: E, K, Bits, Group int. K is a multiple of 8 and of Group.
// Grid (32, E, B): a simdgroup owns an expert.
const int lane = thread_position_in_grid.x;
const int expert = thread_position_in_grid.y;
const int token = thread_position_in_grid.z;

float products[1] = {0};
add_products<Bits, Group, 1>(
    x + token * K, gate, gate_scales, gate_biases, expert, K, lane, products);
const float logit = simd_sum(products[0]);
if (lane == 0) {
  logits[token * E + expert] = logit;
}
