// How many threads are worth waking, which thread this is, and the order of the work items: long ones first, so that no thread
// is left with a long one at the end.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

static inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// How many threads share the work here.
static inline int thread_count() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Threads for a problem that forms `products` times K Q^T and P V without a mask: each is given 2^19 multiply-adds, 10 us, or
// elements of K and V that take as long to read. By the problem and the number of threads alone: plans may depend on it.
static int useful_threads(const AttentionParams& p, double products) {
  const double group = p.heads_kv ? static_cast<double>(p.heads_q / p.heads_kv) : 0.0, rows = group * static_cast<double>(p.len_q);
  const double elements = static_cast<double>(p.batch * p.heads_kv) * static_cast<double>(p.len_k) * static_cast<double>(p.dim_qk + p.dim_v);
  const double shares = products * elements * (rows > 16.0 ? rows : 16.0) / (1 << 19);
  return p.num_threads <= 1 || shares < 2.0 ? 1 : shares >= p.num_threads ? p.num_threads : static_cast<int>(shares);
}

// order = the items 0 .. count - 1 by falling cost (>= 0), equal ones in their own order: a counting sort in 64 classes.
// Overwrites cost.
static void order_by_cost(int64_t* order, int64_t* cost, int64_t count) {
  constexpr int kClasses = 64;
  int64_t largest = 1, start[kClasses + 1] = {};
  for (int64_t n = 0; n < count; ++n) largest = cost[n] > largest ? cost[n] : largest;
  for (int64_t n = 0; n < count; ++n) {
    const double share = static_cast<double>(cost[n]) / static_cast<double>(largest);
    cost[n] = kClasses - 1 - static_cast<int64_t>(share * (kClasses - 1));
    ++start[cost[n] + 1];
  }
  for (int n = 0; n < kClasses; ++n) start[n + 1] += start[n];
  for (int64_t n = 0; n < count; ++n) order[start[cost[n]]++] = n;
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
