// Attention backward for every GPU from sm_80 on (Dao 2023, "FlashAttention-2", algorithm 2), deterministic: no two
// blocks add to the same number, and every sum has a fixed order.
//     delta   = rowsum(dO O) - dlse                     attention_backward_delta.cu
//     dQ      one block a query tile                    attention_backward_dq.cu
//     dK, dV  one block a key tile                      attention_backward_dkv.cu
//     dQ, dK, dV of up to 256 keys, one block a head    attention_backward_short.cu
//     dbias   one block a tile of the bias              attention_backward_dbias.cu
// P = e^(scale Q K^T + bias - lse) is computed anew by each, so dQ, dK and dV together take seven products of a tile
// pair in the place of five; a single walk would add dQ with atomics, in no fixed order. float32 problems:
// attention_backward_float32.cu.
//
// A pair that is not attended gets P = 0 and dS = 0 by selection. What is summed over and is dead for a whole tile
// (keys in dQ, queries in dK and dV) counts as zeros in the product, because 0 * NaN is NaN.
#include "attention_backward.h"

#include "attention_backward_delta.h"
#include "kernels.h"

namespace fastattn::cuda {
namespace {

struct Workspace {
  int64_t delta, summary, partial, bytes;  // offsets; shift lies at 0
};

Workspace lay_out(const AttentionBackwardParams& p, const BiasPlan& plan) {
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
  const int64_t rows = aligned(p.batch * p.heads_q * p.len_q * static_cast<int64_t>(sizeof(float)));
  Workspace w;
  w.delta = rows;
  w.summary = 2 * rows;
  w.partial = w.summary + aligned(mask_summary_bytes(p));
  w.bytes = w.partial + (plan.splits > 1 ? aligned(plan.splits * plan.elements() * static_cast<int64_t>(sizeof(float))) : 0);
  return w;
}

constexpr int kThreads = 256;

// Adds the sums of the splits in their order.
FASTATTN_KERNEL(kThreads, 1) attention_backward_dbias_sum_kernel(const float* partial, float* sum, int64_t elements, int64_t splits) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= elements) return;
  float total = 0.0f;
  for (int64_t split = 0; split < splits; ++split) total += partial[split * elements + n];
  sum[n] = total;
}

}  // namespace

BiasPlan make_bias_plan(const AttentionBackwardParams& p) {
  BiasPlan plan{};
  plan.splits = 1;
  if (!p.grad_bias) return plan;
  const int64_t whole[4] = {p.batch, p.heads_q, p.len_q, p.len_k};
  for (int n = 0; n < 4; ++n) {
    plan.shared[n] = p.grad_bias.stride[n] == 0;
    plan.size[n] = plan.shared[n] ? 1 : whole[n];
  }
  const int64_t tiles_q = ceil_div(p.len_q, kBiasTile), tiles_k = ceil_div(p.len_k, kBiasTile);
  plan.own_tiles_q = plan.shared[2] ? 1 : tiles_q;
  plan.own_tiles_k = plan.shared[3] ? 1 : tiles_k;
  plan.own_tiles = plan.size[0] * plan.size[1] * plan.own_tiles_q * plan.own_tiles_k;
  plan.sum_heads = plan.shared[1] ? p.heads_q : 1;
  plan.sum_tiles_q = plan.shared[2] ? tiles_q : 1;
  plan.sum_tiles_k = plan.shared[3] ? tiles_k : 1;
  plan.sum_tiles = (plan.shared[0] ? p.batch : 1) * plan.sum_heads * plan.sum_tiles_q * plan.sum_tiles_k;
  if (plan.own_tiles > 0 && plan.sum_tiles > 0) {
    const int64_t wanted = 2 * device_info().multiprocessors / plan.own_tiles;
    plan.splits = max64(1, min64(plan.sum_tiles, wanted));
    plan.tiles_per_split = ceil_div(plan.sum_tiles, plan.splits);
    plan.splits = ceil_div(plan.sum_tiles, plan.tiles_per_split);
  }
  return plan;
}

int64_t attention_backward_portable_workspace(const AttentionBackwardParams& params) {
  return lay_out(params, make_bias_plan(params)).bytes;
}

void attention_backward_portable(const AttentionBackwardParams& params) {
  const BiasPlan plan = make_bias_plan(params);
  const Workspace w = lay_out(params, plan);
  char* const base = static_cast<char*>(params.workspace);
  float *const shift = reinterpret_cast<float*>(base), *const delta = reinterpret_cast<float*>(base + w.delta);
  float* const partial = plan.splits > 1 ? reinterpret_cast<float*>(base + w.partial) : nullptr;
  attention_backward_delta(params, shift, delta);
  const BackwardArguments arguments{params, prepare_mask(params, base + w.summary, params.stream), shift, delta, partial};
  if (params.query.dtype == DType::kFloat32) {
    attention_backward_float32(arguments, plan);
  } else {
    if (is_short(params)) {
      attention_backward_short(arguments);
    } else {
      attention_backward_dq(arguments);
      attention_backward_dkv(arguments);
    }
    attention_backward_dbias(arguments, plan);
  }
  if (partial)
    launch("attention_backward_dbias_sum_kernel", attention_backward_dbias_sum_kernel,
           dim3(static_cast<unsigned>(ceil_div(plan.elements(), kThreads))), dim3(kThreads), 0, params.stream, partial,
           static_cast<float*>(params.grad_bias.ptr), plan.elements(), plan.splits);
}

}  // namespace fastattn::cuda
