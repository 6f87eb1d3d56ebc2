"""What runs on the GPU at hand, found out there: each kernel compared, timed, and remembered."""
