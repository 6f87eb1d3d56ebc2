// What kernels and the launching program call; everything else is internal, hence fast.
#pragma once
#define EXPORT extern "C" __attribute__((visibility("default")))
