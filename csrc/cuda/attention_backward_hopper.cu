// The attention backward on Hopper (sm_90a): TMA, mbarriers and wgmma, bfloat16 and float16, head dims up to 128.
//
// Two kernels, each with one side stationary and every sum in one fixed order, so that two runs agree bitwise:
//   dkv  a block has 128 keys of one key head and streams the live query tiles of its query heads
//          S^T = K Q^T, dP^T = V dO^T                  operands in shared memory
//          P^T = 2^(S^T scale log2(e) - shift), dS^T = P^T (dP^T - delta)
//          dV += P^T dO, dK += dS^T Q                  P^T and dS^T stay in registers
//   dq   a block has 128 queries and streams the live key tiles: S = Q K^T, dP = dO V^T, dQ += dS K
// S and dP are computed twice: 7 products for 5, and in exchange no dQ in global memory that blocks add to, which would
// need either an order among the blocks or atomics.
//
// A block is three warpgroups. Two compute, 64 stationary rows each; their products and the exponentials between them
// overlap because the two warpgroups are at different points of it. The third feeds them through a ring of stages:
//   copy warp    walks the live tiles (mask.h), names each in the slot of its stage (`listed`) and starts its copies,
//                which end the phase of `landed`
//   mask warps   add what is not copied (`prepared`): shift and delta of the rows (dkv), and the bits of partial tiles.
//                Where an operand's rows are summed over, they zero those that no pair of the tile needs: they may be
//                NaN, and 0 * NaN is NaN
//   consumers    wait for both, compute, and free the stage (`consumed`)
// Full tiles run a body without mask code. The copy warp lists no tile beyond the last, so a block without live tiles
// stores zeros. Rows and columns beyond the ends are zero by TMA; a query row beyond the end has shift +inf and so
// probability 0.
//
// Short sequences have a kernel of their own, attention_backward_hopper_short.cu.
// Head dims up to 64 use the instance of 64, others up to 128 that of 128.
#include "attention_backward_hopper.h"

#include "../core/softmax.h"
#include "attention_backward_delta.h"
#include "kernels.h"

namespace fastattn::cuda {
namespace {

using namespace hopper_backward;

int64_t row_bytes(const AttentionBackwardParams& p) {
  return ceil_div(p.batch * p.heads_q * p.len_q * static_cast<int64_t>(sizeof(float)), 256) * 256;
}

bool copied(const TensorRef& x, DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t dim) {
  const int64_t dims[4] = {batch, heads, rows, dim};
  return x.dtype == dtype && tensor_map_able(x, dims);
}

// Gradients are written two elements at a time where they cannot be written eight at a time.
bool written(const TensorRef& x, DType dtype) {
  bool able = x.dtype == dtype && reinterpret_cast<uintptr_t>(x.ptr) % 4 == 0;
  for (int n = 0; n < 3; ++n) able = able && x.stride[n] % 2 == 0;
  return able;
}

Gradient gradient(const TensorRef& x, int64_t dim) {
  bool vector = dim % 8 == 0 && reinterpret_cast<uintptr_t>(x.ptr) % 16 == 0;
  for (int n = 0; n < 3; ++n) vector = vector && x.stride[n] % 8 == 0;
  return {x, static_cast<int>(dim), vector};
}

}  // namespace

bool attention_backward_hopper_able(const AttentionBackwardParams& p) {
  constexpr int64_t kMaxIndex = int64_t{1} << 30;
  const DType dtype = p.query.dtype;
  if (device_info().capability != 90) return false;
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) return false;
  if (p.bias || p.grad_bias || p.dropout.p > 0) return false;
  if (p.dim_qk < 1 || p.dim_v < 1 || max64(p.dim_qk, p.dim_v) > 128) return false;
  if (p.batch < 1 || p.len_q < 1 || p.len_k < 1 || max64(p.len_q, p.len_k) > kMaxIndex) return false;
  if (max64(dkv_blocks(p), dq_blocks(p)) > kMaxIndex) return false;
  return copied(p.query, dtype, p.batch, p.heads_q, p.len_q, p.dim_qk) &&
         copied(p.key, dtype, p.batch, p.heads_kv, p.len_k, p.dim_qk) &&
         copied(p.value, dtype, p.batch, p.heads_kv, p.len_k, p.dim_v) &&
         copied(p.grad_out, dtype, p.batch, p.heads_q, p.len_q, p.dim_v) && p.out.dtype == dtype &&
         written(p.grad_query, dtype) && written(p.grad_key, dtype) && written(p.grad_value, dtype);
}

int64_t attention_backward_hopper_workspace(const AttentionBackwardParams& p) {
  return 256 + 2 * row_bytes(p) + mask_summary_bytes(p);
}

void attention_backward_hopper(const AttentionBackwardParams& p) {
  char* const workspace =
      reinterpret_cast<char*>(ceil_div(static_cast<int64_t>(reinterpret_cast<intptr_t>(p.workspace)), 256) * 256);
  float* const shift = reinterpret_cast<float*>(workspace);
  float* const delta = reinterpret_cast<float*>(workspace + row_bytes(p));

  Problem problem;
  problem.mask = p.mask;
  problem.summary = prepare_mask(p, workspace + 2 * row_bytes(p), p.stream);
  problem.shift = shift;
  problem.delta = delta;
  problem.grad_query = gradient(p.grad_query, p.dim_qk);
  problem.grad_key = gradient(p.grad_key, p.dim_qk);
  problem.grad_value = gradient(p.grad_value, p.dim_v);
  problem.heads_q = static_cast<int>(p.heads_q);
  problem.heads_kv = static_cast<int>(p.heads_kv);
  problem.len_q = static_cast<int>(p.len_q);
  problem.len_k = static_cast<int>(p.len_k);
  problem.tiles = 0;
  problem.scale = static_cast<float>(p.scale);
  problem.scale_log2 = static_cast<float>(p.scale * kLog2E);
  if (is_short(p)) return run_short(p, problem);
  attention_backward_delta(p, shift, delta);
  run_dkv(p, problem);
  run_dq(p, problem);
}

}  // namespace fastattn::cuda
