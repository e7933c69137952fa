// What the backward kernels know of a query row before they start.
#pragma once

#include "../core/params.h"

namespace fastattn::cuda {

// For every row (b, h, i), both arrays [B, Hq, L] of float32:
//   shift = lse * log2(e), so that the probability of a score s is 2^(s * scale * log2(e) - shift)
//   delta = rowsum(grad_out * out) - grad_lse
// A row that attends to nothing (lse = -inf) has shift +inf and delta 0: its probabilities are 0, and what lies in its
// rows of out, grad_out and grad_lse, which may be NaN, is not read. Every dtype but float64; any strides.
void attention_backward_delta(const AttentionBackwardParams& params, float* shift, float* delta);

}  // namespace fastattn::cuda
