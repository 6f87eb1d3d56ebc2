// Threadgroup arrays: opened by the first thread that comes to their declaration.
#pragma once

void forget_storage();  // before the next threadgroup, to which they are uninitialised again
void close_storage();
