// The gradient of the bias, of 16-bit problems: a block owns a tile [64 queries, 64 keys] of the bias in its own shape,
// and adds dS of everything that the tile is broadcast to, in float32 registers and in the order of BiasPlan. Tiles
// that the mask leaves empty are passed over.
//
// Per tile and warp of 16 rows: S = Q K^T, dP = dO V^T [16, 64], sum += P (dP - delta). The four operands arrive by
// cp.async, in two stages up to head dim 128: 64 KiB of shared memory at 64, 128 KiB at 128; one stage of 128 KiB at
// 256. Registers of fragments: 32 + 32 + 32.
#include "attention_backward.h"
#include "attention_backward_dbias.h"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = kBiasTile;

template <int HEAD_DIM>
struct Shape {
  static constexpr int kStages = HEAD_DIM <= 128 ? 2 : 1;
  static constexpr int kOperand = kTile * HEAD_DIM;
  static constexpr int kSharedBytes = 2 * 4 * kStages * kOperand > kBiasSumBytes ? 2 * 4 * kStages * kOperand : kBiasSumBytes;
};

template <typename T, int HEAD_DIM>
FASTATTN_KERNEL(kThreads, 1)
attention_backward_dbias_kernel(const FASTATTN_GRID_CONSTANT BackwardArguments a, const FASTATTN_GRID_CONSTANT BiasPlan plan) {
  using S = Shape<HEAD_DIM>;
  FASTATTN_SHARED(shared);
  T* const operands = reinterpret_cast<T*>(shared);  // [stages][Q, dO, K, V][64][HEAD_DIM]
  const AttentionBackwardParams& p = a.p;
  const int thread = threadIdx.x, lane = thread % 32, warp_row = thread / 32 * 16;
  const float scale_log2 = static_cast<float>(p.scale * kLog2E);

  const auto load = [&](const BiasTerm& t, int stage) {
    T* const to = operands + stage * 4 * S::kOperand;
    const int64_t h_kv = t.h / (p.heads_q / p.heads_kv);
    load_tile<T, HEAD_DIM, kTile, kThreads>(to, plane_of<T>(p.query, t.b, t.h, p.len_q, p.dim_qk), t.i0, thread);
    load_tile<T, HEAD_DIM, kTile, kThreads>(to + S::kOperand, plane_of<T>(p.grad_out, t.b, t.h, p.len_q, p.dim_v), t.i0, thread);
    load_tile<T, HEAD_DIM, kTile, kThreads>(to + 2 * S::kOperand, plane_of<T>(p.key, t.b, h_kv, p.len_k, p.dim_qk), t.j0, thread);
    load_tile<T, HEAD_DIM, kTile, kThreads>(to + 3 * S::kOperand, plane_of<T>(p.value, t.b, h_kv, p.len_k, p.dim_v), t.j0, thread);
  };
  float sum[8][4];
  clear(sum);
  BiasTerms terms(a, plan);
  BiasTerm term;
  bool more = terms.next(term);
  if (more) load(term, 0);
  ptx::cp_async_commit();
  for (int stage = 0; more;) {
    BiasTerm next_term;
    const bool next_more = terms.next(next_term);
    if (S::kStages > 1) {
      if (next_more) load(next_term, stage ^ 1);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    {
      const T* const from = operands + stage * 4 * S::kOperand;
      const int64_t i0 = term.i0 + warp_row;
      uint64_t word[1][2] = {{~uint64_t{0}, ~uint64_t{0}}};
      if (!term.full) fragment_mask<1>(word, a, term.b, term.h, i0, term.j0, lane);
      float s[1][8][4], ds[1][8][4];
      clear(s[0]);
      clear(ds[0]);
      multiply_transposed<T, HEAD_DIM>(s, from, warp_row, from + 2 * S::kOperand, 0, lane);
      multiply_transposed<T, HEAD_DIM>(ds, from + S::kOperand, warp_row, from + 3 * S::kOperand, 0, lane);
      score_gradients<true, true>(s[0], ds[0], fragment_rows(a, term.b, term.h, i0, lane), word[0], 0,
                                  ScoreTerms(p, static_cast<int>(term.b), static_cast<int>(term.h)), scale_log2, i0, term.j0, lane);
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[n][e] += ds[0][n][e];
    }
    __syncthreads();
    if (S::kStages > 1) {
      stage ^= 1;
    } else {
      if (next_more) load(next_term, 0);
      ptx::cp_async_commit();
    }
    term = next_term, more = next_more;
  }

  ptx::cp_async_wait<0>();
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sums[(warp_row + lane / 4 + e / 2 * 8) * kBiasSumStride + n * 8 + lane % 4 * 2 + e % 2] = sum[n][e];
  __syncthreads();
  store_bias_tile<kThreads>(a, plan, sums, thread);
}

template <typename T>
void run(const BackwardArguments& a, const BiasPlan& plan) {
  for_head_dim(a.p, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    launch("attention_backward_dbias_kernel", attention_backward_dbias_kernel<T, kDim>,
           dim3(static_cast<unsigned>(plan.own_tiles * plan.splits)), dim3(kThreads), Shape<kDim>::kSharedBytes, a.p.stream, a, plan);
  });
}

}  // namespace

void attention_backward_dbias(const BackwardArguments& arguments, const BiasPlan& plan) {
  if (plan.own_tiles == 0) return;
  if (arguments.p.query.dtype == DType::kBFloat16) run<bfloat16>(arguments, plan);
  else run<half>(arguments, plan);
}

}  // namespace fastattn::cuda
