// In which order threads and threadgroups run: 0 natural, 1 reversed, any other number shuffled.
#pragma once
#include <stdint.h>

inline void arrange(uint32_t* order, uint32_t count, uint64_t schedule) {
  for (uint32_t i = 0; i < count; i++) order[i] = schedule == 1 ? count - 1 - i : i;
  if (schedule < 2) return;
  uint64_t state = schedule * 0x9E3779B97F4A7C15ull;
  for (uint32_t i = count; i > 1; i--) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    uint32_t j = uint32_t((state >> 33) % i), kept = order[i - 1];
    order[i - 1] = order[j];
    order[j] = kept;
  }
}
