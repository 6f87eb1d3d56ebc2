#include "matvec.h"
#include "norm.h"
#include "reduce.h"
#include "vectors.h"

// A text's next tokens on their way into the space of latents: their queries, and their own latents
// behind the tail.
//
//     query = scale * (embed q_nope | q_shared)      new_tail = tail, then (norm(latent) | shared key) of each
//
//   x             [B * tokens, H * (Nope + Shared) + Lora + Shared] of any float type: of each head q_nope |
//                 q_shared, then latent | shared key
//   embed         [H, Lora, Nope] plain of any float type, or packed to Bits
//   embed_scales, embed_biases   [H, Lora, Nope / Group]; not read where Bits is 0: plain
//   norm          [Lora] of any float type
//   tail          [B, Room, Lora + Shared] of x's type: latents, and behind them room for more
//   texts         int: tokens, of a text; B; then of each text the latents in its tail, with the first new one
//   scale, eps    float; eps is of the norm
//   queries       [B * tokens, H, Lora + Shared] float
//   new_tail      like tail, with the new latents from the place on of the first
// Template: H, Nope, Lora, Shared, Room, Bits, Group int. Nope and Lora are multiples of 8,
// Nope of Group.
// Grid (32, n, B * tokens), n >= H * (Lora / 4 + 1) + Room: a simdgroup owns 4 channels of a head's query in
// latent space, or a head's shared query, or with a text's first token one row of the tail; simdgroups
// beyond these do nothing.
constexpr int Rows = 4;
constexpr int Width = Lora + Shared;
constexpr int Latent = H * (Nope + Shared);  // where it stands in x
constexpr int Steps = Lora / Rows + 1;       // of a head

const int lane = thread_position_in_grid.x;
const int step = thread_position_in_grid.y;
const int b = thread_position_in_grid.z;  // a token of a text
const auto input = x + b * (Latent + Width);
const int head = step / Steps;
const int first = step % Steps * Rows;
const int place = step - H * Steps;  // in the tail
const int tokens = texts[0];
const int text = b / tokens;
const int number = place - (texts[2 + text] - 1);  // of the new latents

if (head < H && first < Lora) {
  float sums[Rows] = {0, 0, 0, 0};
  add_products<Rows>(
      input + head * (Nope + Shared),
      rows_from<Bits, Group>(embed, embed_scales, embed_biases, head * Lora + first, Nope),
      lane,
      sums);
  const float sum = scale * sum_of_rows<Rows>(sums, lane);
  if (lane < Rows) {
    queries[(b * H + head) * Width + first + lane] = sum;
  }
} else if (head < H) {
  for (int i = lane; i < Shared; i += 32) {
    queries[(b * H + head) * Width + Lora + i] =
        scale * float(input[head * (Nope + Shared) + Nope + i]);
  }
} else if (b % tokens == 0 && number >= 0 && number < tokens) {
  const auto latent = input + number * (Latent + Width) + Latent;
  float square = 0;
  for (int i = lane; i < Lora; i += 32) {
    square += float(latent[i]) * float(latent[i]);
  }
  const float factor = inverse_rms(simd_sum(square), Lora, eps);
  auto to = new_tail + (text * Room + place) * Width;
  for (int i = lane; i < Lora; i += 32) {
    put(to + i, float(latent[i]) * factor * float(norm[i]));
  }
  for (int i = Lora + lane; i < Width; i += 32) {
    to[i] = latent[i];
  }
} else if (b % tokens == 0 && place < Room) {
  for (int i = lane; i < Width; i += 32) {
    const int at = (text * Room + place) * Width + i;
    new_tail[at] = tail[at];
  }
}
