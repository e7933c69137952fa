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

// Natural log of a sum that is at least 1, to 1e-12: what a float of lse needs, in a loop over rows without calls. m is in
// [1 / sqrt 2, sqrt 2), x = m 2^k, and log m = 2 artanh((m - 1) / (m + 1)).
FASTATTN_INLINE double log_of_sum(double x) {
  const int64_t bits = bit_cast<int64_t>(x), offset = bits - 0x3fe6a09e00000000;
  const double m = bit_cast<double>(bits - (offset & ~int64_t{0xfffffffffffff})), k = static_cast<int32_t>(offset >> 52);
  const double f = (m - 1.0) / (m + 1.0), g = f * f;
  const double series = 1.0 + g * (1.0 / 3 + g * (1.0 / 5 + g * (1.0 / 7 + g * (1.0 / 9 + g * (1.0 / 11 + g * (1.0 / 13))))));
  return x - x == 0.0 ? k * 0.69314718055994530942 + 2.0 * f * series : x;
}

// Rows [i0, i0 + rows) of the output and of lse, rows <= kTileM. out [rows][ld]: the sum of 2^((x - maximum) to_log2) v.
template <typename T>
static void store_results(const AttentionForwardParams& p, const ScoreScale<T>& to, int64_t b, int64_t h, int64_t i0, int rows,
                          const T* out, int64_t ld, const T* row_max, const T* row_sum) {
  const double kept_scale = 1.0 / (1.0 - p.dropout.p);
  const T scale = p.bias ? T(1) : to.scale;
  T factor[kTileM];
  double lse[kTileM];
  for (int r = 0; r < rows; ++r) {
    factor[r] = static_cast<T>(softmax_normalizer(row_sum[r]) * kept_scale);
    const T largest = softmax_shift(row_max[r]) * scale;  // rounded as the backward will round it
    const double sum = row_sum[r];
    if constexpr (sizeof(T) == sizeof(float)) lse[r] = sum == 0.0 ? -kInfinity<double> : largest + log_of_sum(sum);
    else lse[r] = softmax_lse(largest, sum);
  }
  void* const lse_rows = element(p.lse.ptr, p.lse.dtype, (b * p.heads_q + h) * p.len_q + i0);
  for (int r = 0; r < rows; ++r) {
    void* const row = element(p.out.ptr, p.out.dtype, b * p.out.stride[0] + h * p.out.stride[1] + (i0 + r) * p.out.stride[2]);
    store_row(row, p.out.dtype, out + r * ld, static_cast<int>(p.dim_v), factor[r]);
    if (p.lse.dtype == DType::kFloat64) static_cast<double*>(lse_rows)[r] = lse[r];
    else static_cast<float*>(lse_rows)[r] = static_cast<float>(lse[r]);
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
