// The conversion that clang calls where the processor has no instruction for it.
#include "bfloat.h"
#include "export.h"

// The 16 bits are returned where a float's low half would be. Were __bf16 the type here, clang could
// see through the arithmetic that it is this very conversion, and call it.
EXPORT float __truncsfbf2(float x) {
  uint32_t bits = Bfloat(x).bits;
  float result;
  memcpy(&result, &bits, sizeof bits);
  return result;
}
