// Parts of the forward that its tiles and its decoding share: the scale, the scores and the softmax of a few query rows, and the
// end of a row.
//
// With few rows the lanes of the tiles' S^T would be mostly empty. Then S is [rows, keys], and a key is a lane: that takes K^T. Each
// score is one chain of multiply-adds along D, in the order in which the tiles of the forward and of the backward sum it: the
// scores that the backward recomputes are those of the forward, bit by bit. Where a score is so large that its rounding changes
// the exponential, anything else would give other probabilities there.
#pragma once

#include "../core/softmax.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// ---- scale ----

// What is done to a score: x = scale (q . k) + bias, and the probability is 2^((x - maximum) to_log2). Without a bias the scale is
// put into `to_log2` instead.
template <typename T>
struct ScoreScale {
  T scale, to_log2;
  T sign;  // of the scale, put into Q: the largest score must stay the largest after the product with to_log2

  explicit ScoreScale(const AttentionForwardParams& p)
      : scale(static_cast<T>(std::fabs(p.scale))),
        to_log2(static_cast<T>(std::fabs(p.scale) * kLog2E)),
        sign(p.scale < 0 ? T(-1) : T(1)) {
    // So is a zero scale, or one that T cannot hold: masked scores are -inf, and 0 * -inf is NaN.
    if (to_log2 < std::numeric_limits<T>::min()) scale = to_log2 = T(1), sign = T(0);
    if (p.bias) to_log2 = static_cast<T>(kLog2E);
  }
};

// ---- few rows ----

// Up to so many rows of a sub-tile take this way.
constexpr int kFewRows = 8;

// Rows of Q as `few_scores` reads them: dst [rows][ld], times factor. `row_of(r)` is the memory of row r.
template <typename T, typename RowOf>
static void load_few_rows(T* dst, int64_t ld, const RowOf& row_of, DType dtype, int rows, int dim, T factor) {
  for (int r = 0; r < rows; ++r, dst += ld) {
    convert_row(dst, row_of(r), dtype, dim, static_cast<int>(ld));
    for (int64_t d = 0; d < ld; ++d) dst[d] *= factor;
  }
}

// scores [rows][kTileN] = Q K^T. The keys are rows in memory of any dtype, `stride` elements apart; they are transposed into
// key_t [dim][kTileN].
template <typename T>
static void few_scores(T* scores, const void* key, DType dtype, int64_t stride, int keys, const T* query, int64_t ld_query, int rows,
                       int dim, T* key_t, T* staging) {
  transpose_rows<T>(key_t, kTileN, key, dtype, stride, keys, dim, T(1), staging);
  gemm<Layout::kRows>(rows, keys, dim, query, ld_query, key_t, kTileN, scores, kTileN, false);
}

// softmax_lanes of the forward for one row, in place: bit j of the words is key j; bias may be null. What lies past the keys, up
// to a whole vector, may be anything: it is not allowed.
template <typename T>
static void softmax_row(T* scores, int keys, T* row_max, T* row_sum, T* rescale, T scale, T to_log2, const T* bias,
                        uint64_t allowed, uint64_t kept) {
  constexpr int W = kWidth<T>;
  Vec<T> top = broadcast(-kInfinity<T>), total = zero<T>();
  for (int j = 0; j < keys; j += W) {
    Vec<T> x = load<T>(scores + j);
    if (bias) x = fma(x, broadcast(scale), load(bias + j));
    x = lanes_of<T>(allowed >> j) ? x : broadcast(-kInfinity<T>);
    store(scores + j, x);
    top = max(x, top);
  }
  const T old_max = *row_max, tile_max = horizontal_max(top), new_max = tile_max > old_max ? tile_max : old_max;
  const T shift = softmax_shift(new_max);
  for (int j = 0; j < keys; j += W) {
    const Vec<T> x = exp2((load<T>(scores + j) - shift) * to_log2);
    total += x;
    store(scores + j, lanes_of<T>(kept >> j) ? x : zero<T>());
  }
  *row_max = new_max;
  *rescale = exp2(broadcast((old_max - shift) * to_log2))[0];
  *row_sum = *row_sum * *rescale + sum(total);
}

// Rows of O [rows][ld] whose maximum grew.
template <typename T>
static void rescale_rows(T* out, int64_t ld, int rows, const T* factor) {
  for (int r = 0; r < rows; ++r) {
    if (factor[r] == T(1)) continue;
    const Vec<T> f = broadcast(factor[r]);
    for (int64_t d = 0; d < ld; d += kWidth<T>) store(out + r * ld + d, load<T>(out + r * ld + d) * f);
  }
}

// ---- the end of a row ----

// out [dim_v in scratch]: the sum of 2^((x - maximum) to_log2) v.
template <typename T>
static void store_row_result(const AttentionForwardParams& p, const ScoreScale<T>& to, int64_t b, int64_t h, int64_t i,
                             const T* out, T row_max, T row_sum) {
  void* const row = element(p.out.ptr, p.out.dtype, b * p.out.stride[0] + h * p.out.stride[1] + i * p.out.stride[2]);
  store_row(row, p.out.dtype, out, static_cast<int>(p.dim_v),
            static_cast<T>(softmax_normalizer(row_sum) * (1.0 / (1.0 - p.dropout.p))));
  // Rounded as the backward will round it.
  const T largest = p.bias ? softmax_shift(row_max) : softmax_shift(row_max) * to.scale;
  const double lse = softmax_lse(largest, row_sum);
  void* const row_lse = element(p.lse.ptr, p.lse.dtype, (b * p.heads_q + h) * p.len_q + i);
  if (p.lse.dtype == DType::kFloat64) *static_cast<double*>(row_lse) = lse;
  else *static_cast<float*>(row_lse) = static_cast<float>(lse);
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
