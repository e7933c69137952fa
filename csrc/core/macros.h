// Functions of csrc/core run on the host and, compiled by nvcc, on the device. They are static: a CPU kernel is compiled
// once per instruction level, and a function with external linkage could be taken from a wider level by the linker.
#pragma once

#if defined(__CUDACC__)
#define FASTATTN_HD __host__ __device__
#else
#define FASTATTN_HD
#endif
