// Indices of arrays whose length clang knows: its bounds sanitizer calls here before the access.
#include <string.h>

#include "export.h"
#include "finding.h"

// What the sanitizer lays out in the kernel's library.
struct Place {
  const char* file;
  uint32_t line, column;
};

struct Type {
  uint16_t kind, info;
  char name[1];
};

struct OutOfBounds {
  Place place;
  const Type* array;
  const Type* index;
};

// Device and threadgroup arrays have a check of their own, which knows their names.
EXPORT void __ubsan_handle_out_of_bounds(const OutOfBounds* what, uint64_t index) {
  const char* name = what->array->name;
  if (strstr(name, "__local") || strstr(name, "__global") || strstr(name, "__constant")) return;
  report(OUT_OF_BOUNDS_THREAD, what->place.line, 0, 0, int64_t(index));
}
