#include "vectors.h"

// Matrices as MLX stores them: plain; in affine groups, an element being scale * code + bias, of 2, 3, 4, 5, 6 or
// 8 bits; or as small floats in groups of one scale, of 4 bits (e2m1) or 8 (e4m3). Codes are a stream of bits,
// the first in the lowest bits of the first byte. Eight neighbouring codes fill `Bits` bytes.
//
// Codes become numbers two at a time, without a conversion for each: the bits 0x6400 + n are the half 1024 + n,
// n < 1024, and less 1024 that is n exactly. Codes that stand some bits too high in such a half stay as many times
// as large: what they are multiplied by is divided instead (`unit_of`), which changes no digit.

// Whether a matrix with scales of this type is affine. Scales of small floats are bytes.
template <typename S>
struct IsAffine {
  static constexpr constant bool value = true;
};
template <>
struct IsAffine<uint8_t> {
  static constexpr constant bool value = false;
};

// The lower and the upper 16 of these bits as numbers, each below 1024, less `Offset`.
template <int Offset>
METAL_FUNC half2 halves_of(uint bits) {
  constexpr uint origin = 0x6400 + Offset;
  return as_type<half2>(bits | 0x64006400u) - as_type<half2>(origin << 16 | origin);
}

// Eight codes in one or two words: codes 0 to 3 in lower halves and 4 to 7 in the same places of upper halves, four
// in each up to 4 bits, else two.
template <int Bits>
METAL_FUNC void load_codes(const device uint8_t* from, thread uint* words) {
  if (Bits == 8) {
    const ushort4 pairs = *(const device ushort4*)from;
    words[0] = as_type<uint>(ushort2(pairs.x, pairs.z));
    words[1] = as_type<uint>(ushort2(pairs.y, pairs.w));
  } else if (Bits == 4) {
    words[0] = *(const device uint*)from;
  } else if (Bits == 2) {
    words[0] = from[0] | uint(from[1]) << 16;
  } else if (Bits == 3) {
    words[0] = from[0] | uint(from[1] & 15) << 8 | uint(from[1] >> 4) << 16 | uint(from[2]) << 20;
  } else if (Bits == 5) {
    words[0] = from[0] | uint(from[1] & 3) << 8 | uint(from[2] >> 4) << 16 | uint(from[3] & 63) << 20;
    words[1] = from[1] >> 2 | uint(from[2] & 15) << 6 | uint(from[3] >> 6) << 16 | uint(from[4]) << 18;
  } else if (Bits == 6) {
    words[0] = from[0] | uint(from[1] & 15) << 8 | uint(from[3]) << 16 | uint(from[4] & 15) << 24;
    words[1] = from[1] >> 4 | uint(from[2]) << 4 | uint(from[4] >> 4) << 16 | uint(from[5]) << 20;
  }
}

// A run of 16 codes as they are stored, from the lowest bit of the first word on. Of more than 4 bits only one eight of
// them is there at a time: where it begins in the words says `first_bit`. Runs begin at even bytes, those of 2, 4 and
// 8 bits at multiples of their size.
template <int Bits>
METAL_FUNC void load_run(const device uint8_t* from, int eight, thread uint* stored) {
  if (Bits == 8 || (eight == 0 && Bits == 4)) {
    const uint2 two = *(const device uint2*)(from + 8 * eight);
    stored[0] = two.x;
    stored[1] = two.y;
  } else if (eight == 0 && Bits == 2) {
    stored[0] = *(const device uint*)from;
  } else if (Bits > 4 || (eight == 0 && Bits == 3)) {
    const device ushort* three = (const device ushort*)from + (Bits == 5 ? 2 : 3) * eight;
    stored[0] = three[0] | uint(three[1]) << 16;
    stored[1] = three[2];
  }
}
template <int Bits>
METAL_FUNC int first_bit(int eight) {
  return Bits < 5 ? 8 * Bits * eight : Bits == 5 ? 8 * eight : 0;
}
// The bits of two words from bit `at` on, 32 of them or as many as there are.
METAL_FUNC uint bits_from(const thread uint* words, int at) {
  if (at >= 32) {
    return words[1] >> (at - 32);
  }
  return at == 0 ? words[0] : words[0] >> at | words[1] << (32 - at);
}
// An eight of a run in the order of `load_codes`. What stands above the codes in each half is of others.
template <int Bits>
METAL_FUNC void words_of_run(const thread uint* stored, int eight, thread uint* words) {
  const int at = first_bit<Bits>(eight);
  if (Bits == 4) {
    words[0] = stored[eight];
  } else if (Bits == 2) {
    words[0] = (stored[0] >> at & 0xffffu) | stored[0] >> at >> 8 << 16;
  } else {
    words[0] = (bits_from(stored, at) & 0xffffu) | bits_from(stored, at + 4 * Bits) << 16;
  }
  if (Bits > 4) {
    words[1] = (bits_from(stored, at + 2 * Bits) & 0xffffu) | bits_from(stored, at + 6 * Bits) << 16;
  }
}

// Where code i of 0 to 3 stands in a half of `words`: which word, how far that is shifted, how much higher the code
// still stands then. 10 bits are read at a time.
template <int Bits>
struct Place {
  static constexpr constant int PerHalf = Bits <= 4 ? 4 : 2;
  static constexpr constant int AtATime = 10 / (Bits == 0 ? 1 : Bits);
  static METAL_FUNC int word(int i) { return i / PerHalf; }
  static METAL_FUNC int shift(int i) { return Bits * (i % PerHalf / AtATime * AtATime); }
  static METAL_FUNC int height(int i) { return Bits * (i % PerHalf % AtATime); }
};

// Codes i and i + 4 of 8, i < 4, divided by unit_of(i); small floats, divided by `SmallUnit`.
template <int Bits, bool Affine>
METAL_FUNC half2 codes_of(const thread uint* words, int i) {
  const uint word = words[Place<Bits>::word(i)];
  if (Affine) {
    const uint mask = ((1u << Bits) - 1) << Place<Bits>::height(i);
    return halves_of<0>((word >> Place<Bits>::shift(i)) & (mask << 16 | mask));
  }
  if (Bits == 8) {
    const uint bits = i % 2 == 0 ? (word & 0x007f007fu) << 7 | (word & 0x00800080u) << 8
                                 : (word & 0x7f007f00u) >> 1 | (word & 0x80008000u);
    return as_type<half2>(bits);
  }
  const uint low = word >> (4 * i);
  return as_type<half2>((low & 0x00070007u) << 9 | (low & 0x00080008u) << 12);
}
// One of them.
template <int Bits, bool Affine>
METAL_FUNC float code_of(const thread uint* words, int i) {
  return float(codes_of<Bits, Affine>(words, i % 4)[i / 4]);
}
template <int Bits, bool Affine>
METAL_FUNC float unit_of(int i) {
  return Affine ? 1.0f / (1 << Place<Bits>::height(i % 4)) : 1.0f;
}

// A small float as a half has its exponent 14 too small, of 8 bits 8.
template <int Bits>
struct SmallUnit {
  static constexpr constant float value = Bits == 4 ? 16384.0f : 256.0f;
};

// A scale as a number; of small floats times `SmallUnit`. Bytes are powers of two (e8m0), in groups of 16 e4m3.
template <int Bits, int Group, typename S>
METAL_FUNC float scale_of(S scale) {
  return float(scale);
}
template <int Bits, int Group>
METAL_FUNC float scale_of(uint8_t scale) {
  const uint bits = scale;
  const float power = as_type<float>(bits << 23);
  const float small = float(as_type<half2>((bits & 127u) << 7 | (bits & 128u) << 8)[0]) * 256.0f;
  return (Group == 16 ? small : power) * SmallUnit<Bits>::value;
}

// 4 neighbouring elements of a matrix, the first of which is number `at`, a multiple of 4. Bits is 0 where
// the matrix is plain.
template <int Bits, int Group, typename W, typename S, typename B>
METAL_FUNC float4 weights_at(const device W* w, const device S* scales, const device B* biases, int at) {
  if (Bits == 0) {
    return load<4>(w + at);
  }
  constexpr int Packed = Bits == 0 ? 4 : Bits;  // (the branch above is compiled, too)
  constexpr bool Affine = IsAffine<S>::value;
  uint words[2] = {0, 0};
  if (Bits == 8) {
    const ushort2 pairs = ((const device ushort2*)w)[at / 4];
    words[0] = pairs.x;
    words[1] = pairs.y;
  } else if (Bits == 4) {
    words[0] = ((const device ushort*)w)[at / 4];
  } else {
    load_codes<Packed>((const device uint8_t*)w + at / 8 * Bits, words);
    words[0] >>= at % 8 * 4;  // the half that these are in
    words[1] >>= at % 8 * 4;
  }
  const float scale = scale_of<Packed, Group>(scales[at / Group]);
  const float bias = Affine ? float(biases[at / Group]) : 0.0f;
  float4 x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = code_of<Packed, Affine>(words, i) * (scale * unit_of<Packed, Affine>(i)) + bias;
  }
  return x;
}
