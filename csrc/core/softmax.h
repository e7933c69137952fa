// The online softmax, and its empty-row rule.
//
// A row keeps its running maximum m of the scores and l = sum of 2^((score - shift(m)) log2 e). The difference is taken before
// the product: it is exactly 0 at the maximum however large the scores are, and l is never below 1.
// A masked score is -inf. A row that has seen nothing has m = -inf, and -inf - -inf is NaN: hence `shift`. A row that may
// attend to nothing ends with l = 0, and gives output 0 and lse -inf. A NaN score makes l NaN, so it is never taken for an
// empty row.
#pragma once

#include <cmath>

#include "macros.h"

namespace fastattn {

inline constexpr double kLog2E = 1.4426950408889634073599246810019;

template <typename T>
FASTATTN_HD static inline T softmax_shift(T row_max) {
  return row_max == -T(INFINITY) ? T(0) : row_max;
}

// Factor that turns the accumulated sum of 2^(x - shift) * value into the output.
template <typename T>
FASTATTN_HD static inline T softmax_normalizer(T row_sum) {
  return row_sum == T(0) ? T(0) : T(1) / row_sum;
}

// Natural log of the sum of e^score. In double: log(row_sum) must not cost the digits of lse.
FASTATTN_HD static inline double softmax_lse(double shift, double row_sum) {
  return row_sum == 0.0 ? -double(INFINITY) : shift + std::log(row_sum);
}

// The shift for e^(score - shift) = probability when lse is known (backward, weights). An empty row has no probability.
FASTATTN_HD static inline double lse_to_shift(double lse) {
  return lse == -double(INFINITY) ? double(INFINITY) : lse;
}

}  // namespace fastattn
