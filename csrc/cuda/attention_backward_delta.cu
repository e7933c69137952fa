// delta = rowsum(grad_out * out) - grad_lse, and lse in the unit of exp2, for every query row.
#include "attention_backward_delta.h"

#include "../core/mask.h"
#include "../core/softmax.h"
#include "platform.h"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 256;

struct DeltaParams {
  TensorRef out, grad_out, grad_lse;
  const float* lse;
  int64_t rows, heads, len_q;
  int dim;
  int lanes;    // of a row: a power of two up to 32
  bool vector;  // rows are aligned to 16 bytes
  float *shift, *delta;
};

template <typename T>
FASTATTN_KERNEL(kThreads, 1) attention_backward_delta_kernel(DeltaParams p) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = thread / p.lanes;
  const int lane = static_cast<int>(thread % p.lanes);
  const int64_t i = row % p.len_q, h = row / p.len_q % p.heads, b = row / p.len_q / p.heads;
  const bool exists = row < p.rows;
  const float lse = exists ? p.lse[row] : 0.0f;
  const bool live = exists && lse != -INFINITY;

  float sum = 0.0f;
  if (live) {
    const T* const out =
        static_cast<const T*>(p.out.ptr) + b * p.out.stride[0] + h * p.out.stride[1] + i * p.out.stride[2];
    const T* const grad_out = static_cast<const T*>(p.grad_out.ptr) + b * p.grad_out.stride[0] +
                              h * p.grad_out.stride[1] + i * p.grad_out.stride[2];
    for (int d = lane * kVector; d < p.dim; d += p.lanes * kVector) {
      if (p.vector && d + kVector <= p.dim) {
        union {
          uint4 words;
          T elements[kVector];
        } x, y;
        x.words = *reinterpret_cast<const uint4*>(out + d);
        y.words = *reinterpret_cast<const uint4*>(grad_out + d);
#pragma unroll
        for (int n = 0; n < kVector; ++n) sum += to_float(x.elements[n]) * to_float(y.elements[n]);
      } else {
        for (int n = d; n < p.dim && n < d + kVector; ++n) sum += to_float(out[n]) * to_float(grad_out[n]);
      }
    }
  }
  for (int step = p.lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (!exists || lane != 0) return;
  if (live && p.grad_lse.ptr)
    sum -= *(static_cast<const float*>(p.grad_lse.ptr) + b * p.grad_lse.stride[0] + h * p.grad_lse.stride[1] +
             i * p.grad_lse.stride[2]);
  p.shift[row] = live ? lse * static_cast<float>(kLog2E) : INFINITY;
  p.delta[row] = sum;
}

bool rows_aligned(const TensorRef& x, int64_t element_bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(x.ptr) % 16 == 0;
  for (int n = 0; n < 3; ++n) aligned = aligned && x.stride[n] * element_bytes % 16 == 0;
  return aligned;
}

template <typename T>
void run(const AttentionBackwardParams& params, float* shift, float* delta) {
  DeltaParams p;
  p.out = params.out;
  p.grad_out = params.grad_out;
  p.grad_lse = params.grad_lse;
  p.lse = static_cast<const float*>(params.lse.ptr);
  p.rows = params.batch * params.heads_q * params.len_q;
  p.heads = params.heads_q;
  p.len_q = params.len_q;
  p.dim = static_cast<int>(params.dim_v);
  p.lanes = 1;
  while (p.lanes < 32 && p.lanes * static_cast<int>(16 / sizeof(T)) < p.dim) p.lanes *= 2;
  p.vector = rows_aligned(params.out, sizeof(T)) && rows_aligned(params.grad_out, sizeof(T));
  p.shift = shift;
  p.delta = delta;
  if (p.rows == 0) return;
  launch("attention_backward_delta_kernel", attention_backward_delta_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div(p.rows * p.lanes, kThreads))), dim3(kThreads), 0, params.stream, p);
}

}  // namespace

void attention_backward_delta(const AttentionBackwardParams& params, float* shift, float* delta) {
  switch (params.query.dtype) {
    case DType::kBFloat16: return run<bfloat16>(params, shift, delta);
    case DType::kFloat16: return run<half>(params, shift, delta);
    default: return run<float>(params, shift, delta);
  }
}

}  // namespace fastattn::cuda
