// Metal's bfloat: float's upper half, rounded to nearest even after each operation.
#pragma once
#include <stdint.h>
#include <string.h>

struct Bfloat {
  uint16_t bits;
  Bfloat() : bits(0) {}
  Bfloat(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    bits = x != x ? 0x7FC0 : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};
