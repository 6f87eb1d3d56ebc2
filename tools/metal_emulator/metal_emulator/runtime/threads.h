// The threads of one threadgroup as fibers, and where they meet.
#pragma once
#include <stdint.h>

#include "memory.h"

constexpr uint32_t SIMD_WIDTH = 32, MAX_THREADS = 1024;

enum class Wait : uint32_t { NONE, SIMD, BARRIER, FINISHED };

// One meeting of the lanes: what each brings and takes. Two of them alternate, since a lane may
// bring its next value before another has taken its last.
struct Meeting {
  uint64_t brought[SIMD_WIDTH];
  float operands[SIMD_WIDTH][6];
  uint64_t taken[SIMD_WIDTH];
};

struct Simdgroup {
  uint32_t lanes, arrived;
  uint32_t barriers[2];  // by Space
  Meeting meeting[2];
};

struct Thread {
  void* stack;
  uint32_t index;
  uint32_t position[3];  // in its threadgroup
  uint32_t meetings;
  Wait wait;
  uint32_t site, operation;
  uint64_t accesses;
};

// The dispatch and the threadgroup that runs at this moment.
struct Place {
  uint32_t grid[3], dispatched[3], size[3], group[3], groups[3];
  uint32_t linear_group, threads;
};

extern Place place;
extern Thread* running;

Event this_moment(Space);
void run_threadgroup(void (*entry)(), uint64_t schedule);
Simdgroup& my_simdgroup();
uint32_t my_lane();

// How lanes meet: each writes what it brings into `next_meeting()`, then arrives. `arrive` waits
// for the others; it is true for the lane that came last, which completes the meeting before they
// go on.
Meeting& next_meeting();
bool arrive(uint32_t operation, uint32_t site);
void meet_threadgroup(uint32_t flags, uint32_t site);

// A barrier orders the memory of its flags: bit 0 device, bit 1 threadgroup.
inline void count_barrier(uint32_t* barriers, uint32_t flags) {
  barriers[DEVICE] += flags & 1;
  barriers[THREADGROUP] += flags >> 1 & 1;
}

// A call site is its line and column in the text.
inline uint32_t line_of(uint32_t site) { return site >> 12; }
