// The walk of a bias gradient block over what its tile is broadcast to, and its end; for 16-bit and for float32
// problems.
#pragma once

#include "attention_backward.h"

namespace fastattn::cuda {

// A tile [64, 64] of one (batch, query head).
struct BiasTerm {
  int64_t b, h;
  int i0, j0;
  bool full;  // every pair may attend, and every key exists
};

// The live terms of a block's tile and split, in order. Every warp walks on its own, without a barrier.
class BiasTerms {
 public:
  FASTATTN_DEVICE_MEMBER BiasTerms(const BackwardArguments& a, const BiasPlan& plan) : a_(a), plan_(plan) {
    int64_t own = blockIdx.x % plan.own_tiles;
    const int64_t split = blockIdx.x / plan.own_tiles;
    tile_k_ = own % plan.own_tiles_k;
    own /= plan.own_tiles_k;
    tile_q_ = own % plan.own_tiles_q;
    own /= plan.own_tiles_q;
    h_ = own % plan.size[1];
    b_ = own / plan.size[1];
    begin_ = split * plan.tiles_per_split;
    count_ = static_cast<int>(max64(0, min64(plan.tiles_per_split, plan.sum_tiles - begin_)));
  }

  FASTATTN_DEVICE_MEMBER bool next(BiasTerm& term) {
    int n = 0;
    bool full = false;
    const bool found = mask_detail::next_tile(live_, full_, first_, count_, n, full, [&](int candidate, bool& whole) {
      const BiasTerm t = at(candidate);
      const int64_t j1 = min64(t.j0 + kBiasTile, a_.p.len_k);
      whole = t.j0 + kBiasTile <= a_.p.len_k;
      return classify(a_.p.mask, a_.summary, t.b, t.h, t.i0, min64(t.i0 + kBiasTile, a_.p.len_q), t.j0, j1);
    });
    if (found) term = at(n);
    term.full = full;
    return found;
  }

 private:
  // Of the dimensions that the bias has itself, the number of terms is 1 and the own index is taken.
  FASTATTN_DEVICE_MEMBER BiasTerm at(int n) const {
    int64_t t = begin_ + n;
    BiasTerm term;
    term.j0 = static_cast<int>(tile_k_ + t % plan_.sum_tiles_k) * kBiasTile;
    t /= plan_.sum_tiles_k;
    term.i0 = static_cast<int>(tile_q_ + t % plan_.sum_tiles_q) * kBiasTile;
    t /= plan_.sum_tiles_q;
    term.h = h_ + t % plan_.sum_heads;
    term.b = b_ + t / plan_.sum_heads;
    term.full = false;
    return term;
  }

  const BackwardArguments& a_;
  const BiasPlan& plan_;
  int64_t tile_q_, tile_k_, b_, h_, begin_;
  int first_ = 0, count_;
  uint32_t live_ = 0, full_ = 0;
};

inline constexpr int kBiasSumStride = kBiasTile + 1;
inline constexpr int kBiasSumBytes = kBiasTile * kBiasSumStride * static_cast<int>(sizeof(float));

// Writes the block's sums [64][kBiasSumStride] to its part of the bias gradient; those of a shared dimension are added
// up first, in order. Pairs beyond the ends hold 0. The caller has met at a barrier.
template <int THREADS>
FASTATTN_DEVICE void store_bias_tile(const BackwardArguments& a, const BiasPlan& plan, float* sums, int thread) {
  int64_t own = blockIdx.x % plan.own_tiles;
  const int64_t split = blockIdx.x / plan.own_tiles;
  const int64_t j0 = own % plan.own_tiles_k * kBiasTile;
  own /= plan.own_tiles_k;
  const int64_t i0 = own % plan.own_tiles_q * kBiasTile;
  own /= plan.own_tiles_q;  // own: (batch, head) of the bias
  float* const to = (a.partial ? a.partial + split * plan.elements() : static_cast<float*>(a.p.grad_bias.ptr)) +
                    (own * plan.size[2] + i0) * plan.size[3] + j0;
  if (plan.shared[2]) {
    for (int j = thread; j < kBiasTile; j += THREADS)
      for (int i = 1; i < kBiasTile; ++i) sums[j] += sums[i * kBiasSumStride + j];
    __syncthreads();
  }
  const int rows = plan.shared[2] ? 1 : static_cast<int>(min64(kBiasTile, plan.size[2] - i0));
  if (plan.shared[3]) {
    for (int i = thread; i < rows; i += THREADS) {
      float sum = 0.0f;
      for (int j = 0; j < kBiasTile; ++j) sum += sums[i * kBiasSumStride + j];
      to[i] = sum;  // one column
    }
    return;
  }
  for (int n = thread; n < rows * kBiasTile; n += THREADS) {
    const int i = n / kBiasTile, j = n % kBiasTile;
    if (j0 + j < plan.size[3]) to[i * plan.size[3] + j] = sums[i * kBiasSumStride + j];
  }
}

}  // namespace fastattn::cuda
