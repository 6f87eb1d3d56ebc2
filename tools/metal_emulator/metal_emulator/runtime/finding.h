// What stops a launch. The numbers are those of findings.KINDS.
#pragma once
#include <stdint.h>

enum Kind : uint32_t {
  OUT_OF_BOUNDS_DEVICE,
  OUT_OF_BOUNDS_THREADGROUP,
  WRITE_TO_INPUT,
  UNINITIALISED_READ,
  UNWRITTEN_OUTPUT,
  RACE,
  BARRIER_DIVERGENCE,
  SIMD_DIVERGENCE,
  INACTIVE_LANE,
  THREADGROUP_MEMORY,
  MISALIGNED,
  ENDLESS,
  OUT_OF_BOUNDS_THREAD,
};

// Who else took part: how far apart the two sides of a race are.
enum Between : uint32_t { NOBODY, SIMDGROUP_MATES, THREADGROUP_MATES, THREADGROUPS };

struct Finding {
  uint32_t found;
  Kind kind;
  uint32_t region;
  Between between;
  int64_t offset;  // bytes from the start of the region
  uint32_t size;
  uint32_t line;
  uint32_t other_line;  // of the other access of a race, or the other place of a divergence
  uint32_t thread;  // index in its threadgroup
  uint32_t group[3];
};

[[noreturn]] void report(Kind, uint32_t line, uint32_t other_line = 0, uint32_t region = 0,
                         int64_t offset = 0, uint32_t size = 0, Between = NOBODY);
