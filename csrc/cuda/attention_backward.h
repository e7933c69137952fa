// What the kernels of the portable attention backward share (attention_backward.cu tells how they divide the work).
//
// The kernels of 16-bit problems keep the scores of a warp in mma fragments (tile.h). A warp of the dq and the dbias
// kernel owns query rows, [16 M queries, 64 keys] of S = Q K^T; a warp of the dkv kernel owns keys, [16 M keys,
// queries] of S^T = K Q^T. So the second product takes P and dS from registers, and what a warp adds to stays in its
// registers.
#pragma once

#include "../core/softmax.h"
#include "mask.h"
#include "tile.h"

namespace fastattn::cuda {

// Arguments of every kernel.
struct BackwardArguments {
  AttentionBackwardParams p;
  MaskSummary summary;
  const float* shift;  // [B, Hq, L], see attention_backward_delta.h
  const float* delta;
  float* partial;      // sums of the bias gradient, [splits, elements of the bias], or null: one split, written in place
};

// How the bias gradient is divided: a block owns a tile of the bias and adds what it is broadcast to, [batches, heads,
// query tiles, key tiles] in this order; where few tiles have much to add, `splits` blocks share a tile, and a second
// kernel adds their sums in order.
struct BiasPlan {
  bool shared[4];                     // the bias broadcasts this dimension
  int64_t size[4];                    // its own shape
  int64_t own_tiles_q, own_tiles_k, own_tiles;
  int64_t sum_heads, sum_tiles_q, sum_tiles_k, sum_tiles;
  int64_t splits, tiles_per_split;
  FASTATTN_HD int64_t elements() const { return size[0] * size[1] * size[2] * size[3]; }
};

inline constexpr int kBiasTile = 64;  // queries and keys of a tile of the dbias kernels

BiasPlan make_bias_plan(const AttentionBackwardParams& p);

// Each launches one kernel. 16-bit problems:
void attention_backward_dq(const BackwardArguments& arguments);
void attention_backward_dkv(const BackwardArguments& arguments);
// dQ, dK and dV of short sequences at once, in the place of the two above.
bool is_short(const AttentionParams& p);
void attention_backward_short(const BackwardArguments& arguments);
void attention_backward_dbias(const BackwardArguments& arguments, const BiasPlan& plan);
// and float32, all of them:
void attention_backward_float32(const BackwardArguments& arguments, const BiasPlan& plan);

// Calls run(std::integral_constant<int, HEAD_DIM>) with the smallest head dim that holds both.
template <typename Run>
void for_head_dim(const AttentionParams& p, const Run& run) {
  const int64_t dim = max64(p.dim_qk, p.dim_v);
  if (dim <= 32) return run(std::integral_constant<int, 32>{});
  if (dim <= 64) return run(std::integral_constant<int, 64>{});
  if (dim <= 96) return run(std::integral_constant<int, 96>{});
  if (dim <= 128) return run(std::integral_constant<int, 128>{});
  if (dim <= 192) return run(std::integral_constant<int, 192>{});
  return run(std::integral_constant<int, 256>{});
}

// Bias or dropout: decided at run time, in kernels of their own.
static inline bool is_general(const AttentionParams& p) { return p.bias || p.dropout.p > 0; }

// ---- terms of the scores; device ----

// Bias and dropout of one (batch, query head).
struct ScoreTerms {
  const AttentionParams& p;
  int b, h;
  int64_t bias_base;
  bool has_bias, has_dropout;
  uint64_t seed, threshold;
  float kept_scale;  // 1 / (1 - dropout p)

  FASTATTN_DEVICE_MEMBER ScoreTerms(const AttentionParams& params, int batch, int head)
      : p(params), b(batch), h(head), bias_base(batch * params.bias.stride[0] + head * params.bias.stride[1]),
        has_bias(params.bias.ptr != nullptr), has_dropout(params.dropout.p > 0), seed(0), threshold(0), kept_scale(1.0f) {
    if (!has_dropout) return;
    seed = dropout_seed(params.dropout);
    threshold = dropout_threshold(params.dropout.p);
    kept_scale = static_cast<float>(1.0 / (1.0 - params.dropout.p));
  }

  // 0 beyond the ends.
  FASTATTN_DEVICE_MEMBER float bias(int64_t i, int64_t j) const {
    if (i >= p.len_q || j >= p.len_k) return 0.0f;
    return load_scalar(p.bias, bias_base + i * p.bias.stride[2] + j * p.bias.stride[3]);
  }
};

// shift and delta of the rows of a C fragment, g and g + 8; a row that does not exist has probability 0.
struct FragmentRows {
  float shift[2], delta[2];
};

FASTATTN_DEVICE FragmentRows fragment_rows(const BackwardArguments& a, int64_t b, int64_t h, int64_t i0, int lane) {
  FragmentRows rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = i0 + lane / 4 + half * 8, at = (b * a.p.heads_q + h) * a.p.len_q + i;
    rows.shift[half] = i < a.p.len_q ? a.shift[at] : INFINITY;
    rows.delta[half] = i < a.p.len_q ? a.delta[at] : 0.0f;
  }
  return rows;
}

// The mask words of 16 M rows and 64 keys, of rows g and g + 8 of each fragment, made by the warp itself without a
// barrier. Returns the keys that some row of the warp attends to.
template <int M>
FASTATTN_DEVICE uint64_t fragment_mask(uint64_t (&word)[M][2], const BackwardArguments& a, int64_t b, int64_t h, int64_t i0,
                                       int64_t j0, int lane) {
  const uint64_t own = row_word(a.p.mask, a.summary, b, h, i0 + lane % (16 * M), j0, a.p.len_k);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) word[m][half] = __shfl_sync(~0u, own, m * 16 + half * 8 + lane / 4);
  const uint64_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(own));
  return low | uint64_t{__reduce_or_sync(~0u, static_cast<uint32_t>(own >> 32))} << 32;
}

// ds = gradient of the scores of one row of fragments [16, 8 N] at (i0, j0 + step), from s = Q K^T and dp = dO V^T. In
// place, in dp. Selected, never multiplied, by the mask, whose words start at j0: a pair that is not attended may hold
// NaN in both.
template <bool MASKED, bool GENERAL, int N>
FASTATTN_DEVICE void score_gradients(const float (&s)[N][4], float (&dp)[N][4], const FragmentRows& rows, const uint64_t (&word)[2],
                                     int step, const ScoreTerms& terms, float scale_log2, int64_t i0, int64_t j0, int lane) {
  const FragmentWord allowed[2] = {{word[0] >> step, lane}, {word[1] >> step, lane}};
  j0 += step;
  uint32_t kept[2] = {~0u, ~0u};
  if constexpr (GENERAL) {
    if (terms.has_dropout) {
      const FragmentDropout<N> drawn(terms.seed, terms.threshold, terms.b, terms.h, i0, j0, lane);
      kept[0] = drawn.row[0], kept[1] = drawn.row[1];
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2;
      float x = s[n][e] * scale_log2, gradient = dp[n][e];
      if constexpr (GENERAL) {
        if (terms.has_bias)
          x += terms.bias(i0 + lane / 4 + half * 8, j0 + n * 8 + lane % 4 * 2 + e % 2) * static_cast<float>(kLog2E);
        gradient = kept[half] >> (n * 4 + e % 2) & 1 ? gradient * terms.kept_scale : 0.0f;
      }
      gradient = ptx::ex2(x - rows.shift[half]) * (gradient - rows.delta[half]);
      if constexpr (MASKED) gradient = allowed[half](n, e % 2) ? gradient : 0.0f;
      dp[n][e] = gradient;
    }
}

// What dropout keeps of S^T, for one fragment of 16 keys at j0 (a multiple of 4) and 8 queries at i0: bit e + 8 half
// stands for key g + 8 half and query 2t + e. A Philox block covers four keys of one query: the 32 lanes draw the 32
// blocks, and a ballot per word is their bits.
FASTATTN_DEVICE uint32_t transposed_dropout(const ScoreTerms& terms, int64_t i0, int64_t j0, int lane) {
  const PhiloxBlock block = philox4x32(terms.seed, static_cast<uint32_t>(j0 / 4) + lane / 8, static_cast<uint32_t>(i0) + lane % 8,
                                       static_cast<uint32_t>(terms.h), static_cast<uint32_t>(terms.b));
  uint32_t of_word = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t kept = __ballot_sync(~0u, block.word[w] >= terms.threshold);
    if (lane / 4 % 4 == w) of_word = kept;
  }
  // Lane `query + 8 (key / 4)` drew for the pair.
  const uint32_t of_pair = of_word >> (lane / 16 * 8 + lane % 4 * 2);
  return (of_pair & 3) | (of_pair >> 16 & 3) << 8;
}

// One fragment row of S^T, [16 keys at j0, 8 N queries at i0]: s = K Q^T becomes P^T after dropout but for its factor,
// ds = V dO^T the gradient of the scores. `states` holds shift and delta of the queries, `bits` a half word of mask
// bits for each query, WORDS mask words apart, and bit `first_bit` is key j0. Selected, never multiplied, as above.
template <bool MASKED, bool GENERAL, int WORDS, int N>
FASTATTN_DEVICE void transposed_gradients(float (&s)[N][4], float (&ds)[N][4], const float2* states, const uint32_t* bits,
                                          int first_bit, const ScoreTerms& terms, float scale_log2, int i0, int j0, int lane) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int column = n * 8 + lane % 4 * 2;
    const float4 state = *reinterpret_cast<const float4*>(states + column);
    const float shift[2] = {state.x, state.z}, delta[2] = {state.y, state.w};
    uint32_t allowed[2] = {};
    if constexpr (MASKED) {
#pragma unroll
      for (int r = 0; r < 2; ++r) allowed[r] = bits[(column + r) * WORDS * 2] >> (first_bit + lane / 4);
    }
    [[maybe_unused]] uint32_t kept = ~0u;
    if constexpr (GENERAL) {
      if (terms.has_dropout) kept = transposed_dropout(terms, i0 + n * 8, j0, lane);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2, r = e % 2;
      float x = s[n][e] * scale_log2, gradient = ds[n][e];
      if constexpr (GENERAL) {
        if (terms.has_bias) x += terms.bias(i0 + column + r, j0 + half * 8 + lane / 4) * static_cast<float>(kLog2E);
      }
      float probability = ptx::ex2(x - shift[r]);
      if constexpr (MASKED) probability = allowed[r] >> (half * 8) & 1 ? probability : 0.0f;
      float dropped = probability;
      if constexpr (GENERAL) {
        const bool keep = kept >> (half * 8 + r) & 1;
        dropped = keep ? probability : 0.0f;
        gradient = keep ? gradient * terms.kept_scale : 0.0f;
      }
      gradient = probability * (gradient - delta[r]);
      if constexpr (MASKED) gradient = allowed[r] >> (half * 8) & 1 ? gradient : 0.0f;
      s[n][e] = dropped;
      ds[n][e] = gradient;
    }
  }
}

}  // namespace fastattn::cuda
