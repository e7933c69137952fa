// Attention forward, the portable path (sm_80 and later): O = softmax(scale Q K^T + bias) V, one pass over the keys with an
// online softmax (Dao 2023, "FlashAttention-2", algorithm 1).
//
// 16-bit types, on tensor cores (mma m16n8k16). A block owns BM query rows and walks the live key tiles, 64 keys each:
//     S [BM, 64]  = Q K^T          Q and K from shared memory by ldmatrix
//     P           = 2^(c S - shift), in registers: C fragments of S are A fragments of P
//     O [BM, Dv] += P V            V from shared memory, transposed by ldmatrix
// Shared memory holds Q, one tile of K and one of V. They take turns: V arrives while S is computed, the next K while P V is;
// two barriers a tile. A short sequence costs nothing extra: with one tile there is nothing to prefetch.
//
//     head dim         rows a warp   warps   BM    Q + K + V       registers a thread, sm_80 / 90 / 100: none spilled
//     32 .. 128        32            4       128   16 .. 64 KiB    152 .. 255: O takes D, S 64 of them
//     192, 256         16            4       64    72, 96 KiB      200 .. 241: O takes D / 2
//     the same, with bias, dropout, an unusual scale or L <= 64:
//     32 .. 256        16            4       64    12 .. 96 KiB    120 .. 255
//     with L <= 16     16 for all    4       16    9 .. 72 KiB     78 .. 223; each warp takes 16 keys of a tile
// The sums of the four warps of the last kind are merged at the end. Few rows of few heads (decoding) share out the keys of a
// row over blocks as well, and a second kernel adds up the parts.
//
// A warp with 32 rows uses each fragment of K and V twice, which halves what the tensor cores want from shared memory: at
// D = 128 a tile of a block costs 2048 cycles of mma on an A100, about 1250 of issued instructions and 1280 of ldmatrix. Two
// blocks share an SM, and one computes while the other is at its softmax. Global memory: Q, O and lse once, K and V
// ceil(L / BM) times, from L2. These are the tile and the traffic of FlashAttention-2 at D = 128, and its speed is what is
// to be expected of full tiles (the aim is 1.0 times it or better); no GPU has timed it yet.
//
// Masks: a tile is empty (not visited), full (no mask code) or partial. In a partial tile each warp fetches the words of its
// own rows, one row a lane, before it waits for K; scores are selected by the bits, a warp whose rows see nothing skips the
// tile, 16 keys that none of its rows may attend to are left out of both products, and values that none of them may attend to
// count as zeros, for 0 * NaN is NaN. Under a causal mask the last rows have the longest way to go: within a head they start
// first.
//
// float32, in full precision on the ordinary cores: a block of 256 threads owns 64 rows; a thread computes 4 x 4 scores and
// 4 x 4 outputs of each 64 columns; K and V stream through two buffers of 64 keys x 64 columns. 128 registers and two blocks an
// SM at D = 64, up to 212 and one block above.
//
// The shift is subtracted from a score before the product with c: the difference is exactly 0 at the maximum however large
// the scores are, and lse is exactly the score of a row's only key. Any number near the maximum serves as shift as long as P,
// the sum and lse use the same one, so that scores of ordinary size move it, and rescale what was accumulated, only when a
// row's maximum has grown by more than 2^8; P stays below 256. Larger scores, and float32, move it with the maximum.
//
// A row's result depends on its own sequence of key tiles only, and in decoding on the number of parts.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "../core/softmax.h"
#include "kernels.h"
#include "mask.h"
#include "platform.h"
#include "ptx.h"
#include "tile.h"

namespace fastattn::cuda {
namespace {

constexpr int kKeys = 64;             // of a tile; one mask word
constexpr float kLazyGrowth = 8.0f;   // log2
constexpr float kOrdinary = 1024.0f;  // log2
constexpr float kMinusInf = -INFINITY;
constexpr float kLog2 = static_cast<float>(kLog2E);

// Where blocks that share rows leave what they have found; rows count through [B, Hq, L].
struct Parts {
  int count;             // blocks that share the keys of a row, 1: none of what follows is there
  int tiles;             // key tiles of each
  int64_t rows;
  float *shifts, *sums;  // [count][rows]
  float* outs;           // [count][rows][Dv], to be divided by the sum
};

// How scores become probabilities.
struct Exponent {
  float to_log2;    // c of the head of this file, positive: turns scores into units of log 2
  float headroom;   // log2 of a factor that P and its sum carry
  float growth;     // the maximum may exceed the shift by this much, in units of the scores,
  float ordinary;   // where it is smaller than this
};

// What the host works out once.
struct Plan {
  MaskSummary summary;
  Parts parts;
  Exponent exponent;
  float scale;       // of the scores before the bias; not used by the plain kernels
  float lse_scale;   // of the scores in lse
  float sum_scale;   // 2^-headroom
  float kept_scale;  // 1 / (1 - dropout), but for what the headroom has brought in already
  bool has_dropout;
  uint64_t threshold;
  bool bias_pairs;   // two neighbouring keys of the bias can be read at once
  bool last_rows_first;
  uint32_t row_tiles;
};

FASTATTN_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

FASTATTN_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

FASTATTN_DEVICE uint64_t warp_or(uint64_t word) {
  const uint32_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(word));
  return uint64_t{__reduce_or_sync(~0u, static_cast<uint32_t>(word >> 32))} << 32 | low;
}

// Bit n: any of the bits 16 n .. 16 n + 15.
FASTATTN_DEVICE uint32_t live_groups(uint64_t word) {
  const uint32_t low = static_cast<uint32_t>(word), high = static_cast<uint32_t>(word >> 32);
  return uint32_t{(low & 0xffffu) != 0} | uint32_t{low >> 16 != 0} << 1 | uint32_t{(high & 0xffffu) != 0} << 2 |
         uint32_t{high >> 16 != 0} << 3;
}

FASTATTN_DEVICE uint64_t shuffle_word(uint64_t word, int lane) {
  const uint32_t low = __shfl_sync(~0u, static_cast<uint32_t>(word), lane);
  return uint64_t{__shfl_sync(~0u, static_cast<uint32_t>(word >> 32), lane)} << 32 | low;
}

FASTATTN_DEVICE float row_lse(float row_max, float row_sum) {
  return row_sum == 0.0f ? kMinusInf : softmax_shift(row_max) + logf(row_sum);
}

// Which rows and which head a block works on.
struct BlockPosition {
  int b, h, h_kv, row0;
};

template <int BM>
FASTATTN_DEVICE BlockPosition block_position(const AttentionForwardParams& p, const Plan& plan) {
  const uint32_t bh = blockIdx.x / plan.row_tiles, tile = blockIdx.x % plan.row_tiles;
  const uint32_t heads = static_cast<uint32_t>(p.heads_q), h = bh % heads;
  return {static_cast<int>(bh / heads), static_cast<int>(h), static_cast<int>(h / (heads / static_cast<uint32_t>(p.heads_kv))),
          static_cast<int>((plan.last_rows_first ? plan.row_tiles - 1 - tile : tile) * BM)};
}

// ---- the softmax of a warp's fragments ----

// What a warp's rows have accumulated. Rows of fragment m: m * 16 + g (half 0) and m * 16 + g + 8 (half 1).
template <int M, int HEAD_DIM>
struct Accumulator {
  float out[M][HEAD_DIM / 8][4];
  float shift[M][2];  // the score whose probability is 1; -inf: nothing seen
  float sum[M][2];    // this lane's part

  FASTATTN_DEVICE_MEMBER void clear() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      cuda::clear(out[m]);
      shift[m][0] = shift[m][1] = kMinusInf;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }
};

// Scores to probabilities, in place.
template <int M, int HEAD_DIM, int N>
FASTATTN_DEVICE void softmax(float (&s)[M][N][4], Accumulator<M, HEAD_DIM>& acc, const Exponent& exponent) {
  float top[M][2];
  bool grew = false;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < N; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      x = quad_max(x);
      const float margin = fabsf(x) < exponent.ordinary ? exponent.growth : 0.0f;
      top[m][half] = x > acc.shift[m][half] + margin ? x : acc.shift[m][half];
      grew = grew || top[m][half] != acc.shift[m][half];
    }
  if (__any_sync(~0u, grew)) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& shift = acc.shift[m][half];
        // A row that has not grown is multiplied by 1: it does not depend on the other rows of the warp.
        const float factor = top[m][half] == shift ? 1.0f : ptx::ex2((shift - top[m][half]) * exponent.to_log2);
        shift = top[m][half];
        acc.sum[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) {
          acc.out[m][n][2 * half] *= factor;
          acc.out[m][n][2 * half + 1] *= factor;
        }
      }
  }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shift = softmax_shift(acc.shift[m][half]);
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[m][n][e] = ptx::ex2(fmaf(s[m][n][e] - shift, exponent.to_log2, exponent.headroom));
          total += s[m][n][e];
        }
      acc.sum[m][half] += total;
    }
}

// Scores of dead pairs become -inf. `word`: the lane's own row, of the warp's rows row `lane`; bit 0 is the first column.
template <int M, int N>
FASTATTN_DEVICE void select_scores(float (&s)[M][N][4], uint64_t word, int lane) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const FragmentWord allowed(shuffle_word(word, m * 16 + half * 8 + lane / 4), lane);
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) s[m][n][2 * half + e] = allowed(n, e) ? s[m][n][2 * half + e] : kMinusInf;
    }
}

// How the elements of a bias are read.
enum class BiasAccess { kFloatPairs, k16BitPairs, kSingle };

// S = scale S + bias for the fragments at (row0, key0). Pairs that do not exist get the bias of a neighbour: they are selected
// away or not stored.
template <BiasAccess ACCESS, int M, int N>
FASTATTN_DEVICE void add_bias(float (&s)[M][N][4], const AttentionForwardParams& p, float scale, int b, int h, int row0, int key0,
                              int lane) {
  const int last_row = static_cast<int>(p.len_q) - 1, last_key = static_cast<int>(p.len_k) - 1;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row0 + m * 16 + half * 8 + lane / 4, column = ptx::opaque(key0 + lane % 4 * 2);
      const int64_t row = b * p.bias.stride[0] + h * p.bias.stride[1] + (i < last_row ? i : last_row) * p.bias.stride[2];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int j = column + n * 8, pair = j < last_key ? j : last_key - 1;
        float2 bias;
        if constexpr (ACCESS == BiasAccess::kFloatPairs) {
          bias = *reinterpret_cast<const float2*>(static_cast<const float*>(p.bias.ptr) + row + pair);
        } else if constexpr (ACCESS == BiasAccess::k16BitPairs) {
          const uint32_t bits = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p.bias.ptr) + row + pair);
          bias = p.bias.dtype == DType::kBFloat16 ? unpack2<bfloat16>(bits) : unpack2<cuda::half>(bits);
        } else {
          bias.x = load_scalar(p.bias, row + (j < last_key ? j : last_key) * p.bias.stride[3]);
          bias.y = load_scalar(p.bias, row + (j + 1 < last_key ? j + 1 : last_key) * p.bias.stride[3]);
        }
        s[m][n][2 * half] = fmaf(s[m][n][2 * half], scale, bias.x);
        s[m][n][2 * half + 1] = fmaf(s[m][n][2 * half + 1], scale, bias.y);
      }
    }
}

template <int M, int N>
FASTATTN_DEVICE void scale_and_bias(float (&s)[M][N][4], const AttentionForwardParams& p, const Plan& plan, int b, int h,
                                    int row0, int key0, int lane) {
  if (!p.bias.ptr) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = __fmul_rn(s[m][n][e], plan.scale);
  } else if (!plan.bias_pairs) {
    add_bias<BiasAccess::kSingle>(s, p, plan.scale, b, h, row0, key0, lane);
  } else if (p.bias.dtype == DType::kFloat32) {
    add_bias<BiasAccess::kFloatPairs>(s, p, plan.scale, b, h, row0, key0, lane);
  } else {
    add_bias<BiasAccess::k16BitPairs>(s, p, plan.scale, b, h, row0, key0, lane);
  }
}

// Packed probabilities that dropout removes become 0. What it keeps is scaled at the end.
template <int M, int K>
FASTATTN_DEVICE void drop(uint32_t (&p)[K][M][4], uint64_t seed, uint64_t threshold, int64_t b, int64_t h, int row0, int key0,
                          int lane) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const FragmentDropout<2 * K> keeps(seed, threshold, b, h, row0 + m * 16, key0, lane);
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        p[k][m][q] &= (keeps(2 * k + q / 2, q % 2, 0) ? 0xffffu : 0u) | (keeps(2 * k + q / 2, q % 2, 1) ? 0xffff0000u : 0u);
  }
}

// ---- 16-bit types ----

// M: fragments of 16 rows that a warp owns. SPLIT: every warp has the same rows, and its share of the keys of each tile.
template <typename T_, int HEAD_DIM_, int M_, bool SPLIT_, bool GENERAL_>
struct Shape {
  using T = T_;
  static constexpr int kHeadDim = HEAD_DIM_, kM = M_;
  static constexpr bool kSplit = SPLIT_;
  static constexpr bool kGeneral = GENERAL_;  // bias, dropout or an unusual scale
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  // Blocks that share an SM. With three, head dim 96, whose addresses are awkward, would spill a register.
  static constexpr int kBlocks = HEAD_DIM_ <= (kGeneral ? 128 : 32) && HEAD_DIM_ != 96 ? 3 : 2;
  static constexpr int kWarpRows = 16 * kM;
  static constexpr int kRows = kSplit ? kWarpRows : kWarpRows * kWarps;
  static constexpr int kWarpKeys = kSplit ? kKeys / kWarps : kKeys;
  static constexpr int kMergeBytes = kSplit ? kWarps * kRows * (kHeadDim + 2) * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kTileBytes = (kRows + 2 * kKeys) * kHeadDim * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes = kMergeBytes > kTileBytes ? kMergeBytes : kTileBytes;
};

// What turns sums relative to one shift into sums relative to a larger one. A part that has seen NaN alone has the shift -inf
// and the sum NaN: the product stays NaN.
FASTATTN_DEVICE float part_factor(float part_shift, float shift, const Plan& plan) {
  return ptx::ex2((part_shift - softmax_shift(shift)) * plan.exponent.to_log2);
}

// Row i of the output and its lse, by a warp, from sums that carry the headroom. total(d): column d, to be divided by the sum.
template <typename T, typename Total>
FASTATTN_DEVICE void store_row(const Plane<T>& out, int64_t i, float* lse, float shift, float sum, const Plan& plan, int lane,
                               const Total& total) {
  sum *= plan.sum_scale;
  if (lane == 0) *lse = row_lse(shift * plan.lse_scale, sum);
  const float normalizer = softmax_normalizer(sum) * plan.kept_scale;
  for (int d = lane; d < out.columns; d += 32) out.ptr[i * out.row_stride + d] = from_float<T>(total(d) * normalizer);
}

// Where a warp stands.
template <typename S>
struct WarpPosition {
  int lane;
  int row, key;  // its first row of the block's, and its first key of a tile's
  int row0;      // its first query

  FASTATTN_DEVICE_MEMBER explicit WarpPosition(int block_row0) {
    const int thread = ptx::opaque(threadIdx.x), warp = thread / 32;
    lane = thread % 32;
    row = S::kSplit ? 0 : warp * S::kWarpRows;
    key = S::kSplit ? warp * S::kWarpKeys : 0;
    row0 = block_row0 + row;
  }
};

// The warps' shares of the same rows, added up in the order of the warps: to the output, or to this block's part of it. Every
// copy has landed and every warp is done with the tiles when this is called by all threads.
template <typename S>
FASTATTN_DEVICE void merge_and_store(Accumulator<S::kM, S::kHeadDim>& acc, unsigned char* shared, const AttentionForwardParams& p,
                                     const Plan& plan, const BlockPosition& at) {
  static_assert(S::kM == 1, "one fragment of rows");
  constexpr int kRows = S::kRows;
  float* const shifts = reinterpret_cast<float*>(shared);  // [warps][rows]
  float* const sums = shifts + S::kWarps * kRows;          // [warps][rows]
  float* const outs = sums + S::kWarps * kRows;            // [warps][rows][HEAD_DIM]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    const float sum = quad_sum(acc.sum[0][half]);
    if (lane % 4 == 0) {
      shifts[warp * kRows + row] = acc.shift[0][half];
      sums[warp * kRows + row] = sum;
    }
#pragma unroll
    for (int n = 0; n < S::kHeadDim / 8; ++n)
      *reinterpret_cast<float2*>(outs + (warp * kRows + row) * S::kHeadDim + n * 8 + lane % 4 * 2) =
          make_float2(acc.out[0][n][2 * half], acc.out[0][n][2 * half + 1]);
  }
  __syncthreads();
  const Plane<typename S::T> out = plane_of<typename S::T>(p.out, at.b, at.h, p.len_q, p.dim_v);
  for (int row = warp; row < kRows && at.row0 + row < out.rows; row += S::kWarps) {
    float shift = kMinusInf, sum = 0.0f, factor[S::kWarps];
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) shift = fmaxf(shift, shifts[w * kRows + row]);
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) {
      factor[w] = part_factor(shifts[w * kRows + row], shift, plan);
      sum += sums[w * kRows + row] * factor[w];
    }
    const auto total = [&](int d) {
      float x = 0.0f;
#pragma unroll
      for (int w = 0; w < S::kWarps; ++w) x += outs[(w * kRows + row) * S::kHeadDim + d] * factor[w];
      return x;
    };
    const int64_t i = at.row0 + row, row_of_all = (at.b * p.heads_q + at.h) * p.len_q + i;
    if (plan.parts.count == 1) {
      store_row(out, i, static_cast<float*>(p.lse.ptr) + row_of_all, shift, sum, plan, lane, total);
    } else {
      const int64_t part = blockIdx.y * plan.parts.rows + row_of_all;
      if (lane == 0) plan.parts.shifts[part] = shift, plan.parts.sums[part] = sum;
      for (int d = lane; d < out.columns; d += 32) plan.parts.outs[part * out.columns + d] = total(d);
    }
  }
}

constexpr int kCombineThreads = 128;

// The parts of a row added up in their order, by one warp.
template <typename T>
FASTATTN_KERNEL(kCombineThreads)
attention_forward_combine_kernel(const FASTATTN_GRID_CONSTANT AttentionForwardParams p, const FASTATTN_GRID_CONSTANT Plan plan) {
  const Parts& parts = plan.parts;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kCombineThreads / 32) + threadIdx.x / 32;
  if (row >= parts.rows) return;
  const int64_t bh = row / p.len_q;
  const Plane<T> out = plane_of<T>(p.out, bh / p.heads_q, bh % p.heads_q, p.len_q, p.dim_v);
  float shift = kMinusInf, sum = 0.0f;
  for (int n = 0; n < parts.count; ++n) shift = fmaxf(shift, parts.shifts[n * parts.rows + row]);
  for (int n = 0; n < parts.count; ++n)
    sum += parts.sums[n * parts.rows + row] * part_factor(parts.shifts[n * parts.rows + row], shift, plan);
  store_row(out, row % p.len_q, static_cast<float*>(p.lse.ptr) + row, shift, sum, plan, lane, [&](int d) {
    float x = 0.0f;
    for (int n = 0; n < parts.count; ++n)
      x += parts.outs[(n * parts.rows + row) * out.columns + d] * part_factor(parts.shifts[n * parts.rows + row], shift, plan);
    return x;
  });
}

template <typename S>
FASTATTN_KERNEL(S::kThreads, S::kBlocks)
attention_forward_kernel(const FASTATTN_GRID_CONSTANT AttentionForwardParams p, const FASTATTN_GRID_CONSTANT Plan plan) {
  using T = typename S::T;
  constexpr int D = S::kHeadDim, M = S::kM, N = S::kWarpKeys / 8;
  FASTATTN_SHARED(shared);
  T* const q_tile = reinterpret_cast<T*>(shared);  // [kRows][D]
  T* const k_tile = q_tile + S::kRows * D;         // [64][D]
  T* const v_tile = k_tile + kKeys * D;            // [64][D]

  const BlockPosition at = block_position<S::kRows>(p, plan);
  // What is cheap to work out again does not wait in registers while O and S need them: hence `opaque`, here and below.
  const auto load_keys = [&](int tile) {
    const Plane<T> key = plane_of<T>(p.key, ptx::opaque(at.b), ptx::opaque(at.h_kv), p.len_k, p.dim_qk);
    load_tile<T, D, kKeys, S::kThreads>(k_tile, key, tile * kKeys, ptx::opaque(threadIdx.x));
    ptx::cp_async_commit();
  };
  const auto load_values = [&](int tile) {
    const Plane<T> value = plane_of<T>(p.value, ptx::opaque(at.b), ptx::opaque(at.h_kv), p.len_k, p.dim_v);
    load_tile<T, D, kKeys, S::kThreads>(v_tile, value, tile * kKeys, ptx::opaque(threadIdx.x));
    ptx::cp_async_commit();
  };

  KeyTiles<S::kRows, kKeys> tiles(p.mask, plan.summary, at.b, at.h, at.row0, p.len_q, p.len_k);
  if constexpr (S::kSplit) tiles.clip(blockIdx.y * plan.parts.tiles, (blockIdx.y + 1) * plan.parts.tiles);
  int tile = 0;
  bool full = false, more = tiles.next(tile, full);
  if (more) {
    load_tile<T, D, S::kRows, S::kThreads>(q_tile, plane_of<T>(p.query, at.b, at.h, p.len_q, p.dim_qk), at.row0, threadIdx.x);
    load_keys(tile);
  }

  Accumulator<M, D> acc;
  acc.clear();
  while (more) {
    const WarpPosition<S> warp(at.row0);
    const int j0 = tile * kKeys;
    const bool partial = !full;
    bool active = warp.row0 < p.len_q, holes = false;  // holes: keys that no row of the warp may attend to
    uint64_t word = 0;                                 // of this lane's row
    uint32_t groups = ~0u;                             // of 16 keys that some row of the warp may attend to
    if (partial) {
      word = row_word(p.mask, plan.summary, ptx::opaque(at.b), ptx::opaque(at.h), warp.row0 + warp.lane % S::kWarpRows, j0,
                      p.len_k) >> warp.key;
      if constexpr (S::kSplit) word &= (uint64_t{1} << (S::kWarpKeys % 64)) - 1;
      const uint64_t any = warp_or(word);
      active = any != 0;
      holes = any != ~uint64_t{0} >> (64 - S::kWarpKeys);
      groups = live_groups(any);
    }

    ptx::cp_async_wait<0>();
    __syncthreads();  // K has arrived, and nobody reads V any more
    load_values(tile);

    uint32_t probabilities[N / 2][M][4];
    if (active) {
      float s[M][N][4];
#pragma unroll
      for (int m = 0; m < M; ++m) clear(s[m]);
      if (partial) multiply_transposed<T, D, true>(s, q_tile, warp.row, k_tile, warp.key, warp.lane, groups);
      else multiply_transposed<T, D>(s, q_tile, warp.row, k_tile, warp.key, warp.lane);
      if constexpr (S::kGeneral) scale_and_bias(s, p, plan, at.b, at.h, warp.row0, j0 + warp.key, warp.lane);
      if (partial) select_scores(s, word, warp.lane);
      softmax(s, acc, plan.exponent);
#pragma unroll
      for (int n = 0; n < N; n += 2)
#pragma unroll
        for (int m = 0; m < M; ++m) pack_a<T>(probabilities[n / 2][m], s[m][n], s[m][n + 1]);
      if constexpr (S::kGeneral)
        if (plan.has_dropout)
          drop(probabilities, dropout_seed(p.dropout), plan.threshold, at.b, at.h, warp.row0, j0 + warp.key, warp.lane);
    }

    ptx::cp_async_wait<0>();
    __syncthreads();  // V has arrived, and nobody reads K any more
    more = tiles.next(tile, full);
    if (more) load_keys(tile);

    if (active) {
      if (holes)
        multiply_packed<T, D, true>(acc.out, probabilities, v_tile, warp.key, warp.lane, warp_or(word));
      else
        multiply_packed<T, D>(acc.out, probabilities, v_tile, warp.key, warp.lane);
    }
  }

  const WarpPosition<S> warp(at.row0);
  if constexpr (S::kSplit) {
    __syncthreads();
    merge_and_store<S>(acc, shared, p, plan, at);
  } else if (warp.row0 < p.len_q) {
    const Plane<T> out = plane_of<T>(p.out, at.b, at.h, p.len_q, p.dim_v);
    float* const lse = static_cast<float*>(p.lse.ptr) + (at.b * p.heads_q + at.h) * p.len_q;
    // Through the rows of Q that this warp alone has read, before the last barrier.
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float normalizer[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(acc.sum[m][half]) * plan.sum_scale;
        const int i = warp.row0 + m * 16 + half * 8 + warp.lane / 4;
        normalizer[half] = softmax_normalizer(sum) * plan.kept_scale;
        if (warp.lane % 4 == 0 && i < p.len_q) lse[i] = row_lse(acc.shift[m][half] * plan.lse_scale, sum);
      }
      put_fragments<T, D>(q_tile, warp.row + m * 16, acc.out[m], normalizer, warp.lane);
    }
    __syncwarp();
    store_tile<T, D, S::kWarpRows, 32>(out, q_tile + warp.row * D, warp.row0, warp.lane);
  }
}

// ---- float32 ----

constexpr int kColumns = 64;            // of a buffer of K or V
constexpr int kFloatRows = 64;          // of a block
constexpr int kFloatThreads = 256;
constexpr int kProbabilityPitch = kKeys + 4;  // rows of two half warps in different banks

template <int HEAD_DIM>
constexpr int kFloatSharedBytes =
    (kFloatRows * HEAD_DIM + 2 * kKeys * kColumns + kFloatRows * kProbabilityPitch) * static_cast<int>(sizeof(float));

FASTATTN_DEVICE float4 load_vector(const float* at) { return *reinterpret_cast<const float4*>(at); }

// Thread (ty, tx) of 16 x 16 owns rows 4 ty .. +4 and, of the keys, tx + 16 n, of the columns, 4 tx .. +4 of every 64.
template <int HEAD_DIM>
FASTATTN_KERNEL(kFloatThreads, HEAD_DIM <= 64 ? 2 : 1)
attention_forward_float_kernel(const FASTATTN_GRID_CONSTANT AttentionForwardParams p, const FASTATTN_GRID_CONSTANT Plan plan) {
  constexpr int kParts = HEAD_DIM / kColumns;
  FASTATTN_SHARED(shared);
  float* const q_tile = reinterpret_cast<float*>(shared);  // [64][HEAD_DIM]
  float* const buffers = q_tile + kFloatRows * HEAD_DIM;   // 2 x [64][64]
  float* const probabilities = buffers + 2 * kKeys * kColumns;  // [64][kProbabilityPitch]

  const BlockPosition at = block_position<kFloatRows>(p, plan);

  // Columns part * 64 .. +64 of a tile of K or V.
  int buffer = 0;  // that the next copy goes to
  const auto load_part = [&](const TensorRef& x, int64_t dim, int j0, int part) {
    Plane<float> columns = plane_of<float>(x, ptx::opaque(at.b), ptx::opaque(at.h_kv), p.len_k, dim);
    columns.ptr += part * kColumns;
    columns.columns -= part * kColumns;
    load_tile<float, kColumns, kKeys, kFloatThreads>(buffers + buffer * kKeys * kColumns, columns, j0, ptx::opaque(threadIdx.x));
    ptx::cp_async_commit();
    buffer ^= 1;
  };

  KeyTiles<kFloatRows, kKeys> tiles(p.mask, plan.summary, at.b, at.h, at.row0, p.len_q, p.len_k);
  int tile = 0;
  bool full = false, more = tiles.next(tile, full);
  if (more) {
    load_tile<float, HEAD_DIM, kFloatRows, kFloatThreads>(q_tile, plane_of<float>(p.query, at.b, at.h, p.len_q, p.dim_qk),
                                                          at.row0, threadIdx.x);
    load_part(p.key, p.dim_qk, tile * kKeys, 0);
  }

  float out[kParts][4][4] = {}, row_max[4], row_sum[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) row_max[r] = kMinusInf, row_sum[r] = 0.0f;

  while (more) {
    const int thread = ptx::opaque(threadIdx.x), lane = thread % 32, tx = thread % 16, ty = thread / 16;
    const int row0 = at.row0 + ty * 4, j0 = tile * kKeys;
    const bool partial = !full;
    uint64_t word = 0, any = ~uint64_t{0};
    if (partial) {
      word = row_word(p.mask, plan.summary, ptx::opaque(at.b), ptx::opaque(at.h), at.row0 + thread / 32 * 8 + lane % 8, j0,
                      p.len_k);
      any = warp_or(word);
    }

    float s[4][4] = {};  // [row][key]
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this part has arrived, and nobody reads the other buffer any more
      const float* const k = buffers + (buffer ^ 1) * kKeys * kColumns;
      if (part + 1 < kParts) load_part(p.key, p.dim_qk, j0, part + 1);
      else load_part(p.value, p.dim_v, j0, 0);
#pragma unroll 4
      for (int chunk = 0; chunk < kColumns / 4; ++chunk) {
        float4 x[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
          x[r] = load_vector(q_tile + swizzle<float, HEAD_DIM>(ty * 4 + r, part * (kColumns / 4) + chunk));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float4 y = load_vector(k + swizzle<float, kColumns>(tx + n * 16, chunk));
#pragma unroll
          for (int r = 0; r < 4; ++r)
            s[r][n] = fmaf(x[r].w, y.w, fmaf(x[r].z, y.z, fmaf(x[r].y, y.y, fmaf(x[r].x, y.x, s[r][n]))));
        }
      }
    }

#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t i = row0 + r;
      if (p.bias.ptr) {
        const int64_t bias = at.b * p.bias.stride[0] + at.h * p.bias.stride[1] + i * p.bias.stride[2];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int64_t j = j0 + tx + n * 16;
          s[r][n] = fmaf(s[r][n], plan.scale,
                         i < p.len_q && j < p.len_k ? load_scalar(p.bias, bias + j * p.bias.stride[3]) : 0.0f);
        }
      } else {
#pragma unroll
        for (int n = 0; n < 4; ++n) s[r][n] = __fmul_rn(s[r][n], plan.scale);
      }
      if (partial) {
        const uint64_t allowed = shuffle_word(word, lane / 16 * 4 + r) >> tx;
#pragma unroll
        for (int n = 0; n < 4; ++n) s[r][n] = allowed >> (n * 16) & 1 ? s[r][n] : kMinusInf;
      }
      float top = fmaxf(fmaxf(s[r][0], s[r][1]), fmaxf(s[r][2], s[r][3]));
#pragma unroll
      for (int step = 1; step < 16; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      const float old_max = row_max[r], new_max = fmaxf(old_max, top), shift = softmax_shift(new_max);
      const float factor = new_max == old_max ? 1.0f : ptx::ex2((old_max - shift) * kLog2);
      row_max[r] = new_max;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        s[r][n] = ptx::ex2((s[r][n] - shift) * kLog2);
        total += s[r][n];
      }
      row_sum[r] = fmaf(row_sum[r], factor, total);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int d = 0; d < 4; ++d) out[part][r][d] *= factor;
      if (plan.has_dropout) {
        // Lane tx draws for the keys 4 tx .. +4 of this row; ballot w holds the bits of the keys 4 tx + w.
        const PhiloxBlock block = philox4x32(dropout_seed(p.dropout), static_cast<uint32_t>(j0 / 4 + tx), static_cast<uint32_t>(i),
                                             static_cast<uint32_t>(at.h), static_cast<uint32_t>(at.b));
        uint32_t kept = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const uint32_t bits = __ballot_sync(~0u, block.word[w] >= plan.threshold);
          kept = tx % 4 == w ? bits : kept;
        }
        kept >>= lane / 16 * 16 + tx / 4;
#pragma unroll
        for (int n = 0; n < 4; ++n) s[r][n] = kept >> (n * 4) & 1 ? s[r][n] : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) probabilities[(ty * 4 + r) * kProbabilityPitch + tx + n * 16] = s[r][n];
    }
    __syncwarp();  // a warp reads only its own rows of P

    more = tiles.next(tile, full);
    const bool holes = partial && any != bits_before(p.len_k, j0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const float* const v = buffers + (buffer ^ 1) * kKeys * kColumns;
      if (part + 1 < kParts) load_part(p.value, p.dim_v, j0, part + 1);
      else if (more) load_part(p.key, p.dim_qk, tile * kKeys, 0);
#pragma unroll 2
      for (int j = 0; j < kKeys; j += 4) {
        float4 x[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) x[r] = load_vector(probabilities + (ty * 4 + r) * kProbabilityPitch + j);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float4 y = load_vector(v + swizzle<float, kColumns>(j + n, tx));
          if (holes && !(any >> (j + n) & 1)) y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float weight = n == 0 ? x[r].x : n == 1 ? x[r].y : n == 2 ? x[r].z : x[r].w;
            out[part][r][0] = fmaf(weight, y.x, out[part][r][0]);
            out[part][r][1] = fmaf(weight, y.y, out[part][r][1]);
            out[part][r][2] = fmaf(weight, y.z, out[part][r][2]);
            out[part][r][3] = fmaf(weight, y.w, out[part][r][3]);
          }
        }
      }
    }
    __syncwarp();  // P is overwritten by the next tile
  }

  const int tx = threadIdx.x % 16, row0 = at.row0 + threadIdx.x / 16 * 4;
  const Plane<float> result = plane_of<float>(p.out, at.b, at.h, p.len_q, p.dim_v);
  float* const lse = static_cast<float*>(p.lse.ptr) + (at.b * p.heads_q + at.h) * p.len_q;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int i = row0 + r;
    float sum = row_sum[r];
#pragma unroll
    for (int step = 1; step < 16; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (i >= result.rows) continue;
    if (tx == 0) lse[i] = row_lse(row_max[r], sum);
    const float normalizer = softmax_normalizer(sum) * plan.kept_scale;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const int column = part * kColumns + tx * 4 + d;
        if (column < result.columns) result.ptr[i * result.row_stride + column] = out[part][r][d] * normalizer;
      }
  }
}

// ---- host ----

constexpr int64_t kPartTiles = 4;  // key tiles that are worth a block of their own
constexpr int64_t kMaxParts = 64;

// With few rows and few heads the keys are shared out over blocks, so that the device is full. Sets the pointers only where there
// is a workspace; `bytes` of it are taken.
Parts make_parts(const AttentionForwardParams& p, int64_t& bytes) {
  Parts parts{};
  const int64_t heads = p.batch * p.heads_q, tiles = ceil_div(p.len_k, kKeys);
  parts.rows = heads * p.len_q;
  int64_t count = 1;
  if (p.query.dtype != DType::kFloat32 && p.len_q <= kFewQueries && parts.rows > 0)
    count = min64(min64(2 * device_info().multiprocessors / heads, tiles / kPartTiles), kMaxParts);
  count = max64(count, 1);
  parts.tiles = static_cast<int>(max64(1, ceil_div(tiles, count)));
  parts.count = static_cast<int>(max64(1, ceil_div(tiles, parts.tiles)));
  const int64_t summary = mask_summary_bytes(p);
  bytes = summary + (parts.count > 1 ? parts.count * parts.rows * (p.dim_v + 2) * static_cast<int64_t>(sizeof(float)) : 0);
  if (p.workspace && parts.count > 1) {
    parts.shifts = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + summary);
    parts.sums = parts.shifts + parts.count * parts.rows;
    parts.outs = parts.sums + parts.count * parts.rows;
  }
  return parts;
}

// FOLD: the exponential takes the scale in.
Plan make_plan(const AttentionForwardParams& p, int rows, bool fold) {
  Plan plan;
  plan.summary = prepare_mask(p, p.workspace, p.stream);
  int64_t bytes = 0;
  plan.parts = make_parts(p, bytes);
  plan.scale = static_cast<float>(p.scale);
  plan.lse_scale = fold ? plan.scale : 1.0f;
  plan.has_dropout = p.dropout.p > 0.0;
  plan.threshold = dropout_threshold(p.dropout.p);
  const double kept_scale = 1.0 / (1.0 - p.dropout.p);
  // What dropout keeps is scaled before float16 rounds it, as far as float16 can hold the product, and the rest at the end.
  const bool headroom = plan.has_dropout && p.query.dtype == DType::kFloat16;
  const int bits = headroom ? std::min(std::ilogb(kept_scale), 15) : 0;
  const double to_log2 = fold ? p.scale * kLog2E : kLog2E;
  plan.exponent.to_log2 = static_cast<float>(to_log2);
  plan.exponent.headroom = static_cast<float>(bits);
  const auto in_scores = [&](double log2) {
    return static_cast<float>(std::min<double>(log2 / to_log2, std::numeric_limits<float>::max()));
  };
  plan.exponent.growth = headroom ? 0.0f : in_scores(kLazyGrowth);
  plan.exponent.ordinary = in_scores(kOrdinary);
  plan.sum_scale = std::ldexp(1.0f, -bits);
  plan.kept_scale = static_cast<float>(std::ldexp(kept_scale, -bits));
  const auto even = [](int64_t n) { return n % 2 == 0; };
  const uintptr_t pair = p.bias.dtype == DType::kFloat32 ? 8 : 4;
  plan.bias_pairs = p.bias && p.bias.stride[3] == 1 && even(p.bias.stride[0]) && even(p.bias.stride[1]) &&
                    even(p.bias.stride[2]) && even(p.len_k) && reinterpret_cast<uintptr_t>(p.bias.ptr) % pair == 0;
  plan.last_rows_first = p.mask.band_high < kUnlimited;
  plan.row_tiles = static_cast<uint32_t>(ceil_div(p.len_q, rows));
  return plan;
}

dim3 blocks_of(const AttentionForwardParams& p, const Plan& plan) {
  const int64_t blocks = p.batch * p.heads_q * plan.row_tiles;
  if (blocks > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("attention_forward: more than 2^31 query tiles");
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(plan.parts.count));
}

template <typename S>
void run(const AttentionForwardParams& p, bool fold) {
  const Plan plan = make_plan(p, S::kRows, fold);
  launch("attention_forward_kernel", attention_forward_kernel<S>, blocks_of(p, plan), dim3(S::kThreads), S::kSharedBytes,
         p.stream, p, plan);
  if (plan.parts.count == 1) return;
  const dim3 blocks(static_cast<unsigned>(ceil_div(plan.parts.rows, kCombineThreads / 32)));
  launch("attention_forward_combine_kernel", attention_forward_combine_kernel<typename S::T>, blocks, dim3(kCombineThreads), 0,
         p.stream, p, plan);
}

template <typename T, int HEAD_DIM>
void run_16_bit(const AttentionForwardParams& p) {
  constexpr int M = HEAD_DIM <= 128 ? 2 : 1;
  // The exponential takes the scale in when it keeps the order of the scores, and can be held.
  const bool fold = !p.bias && p.scale * kLog2E >= std::numeric_limits<float>::min();
  if (p.len_q <= kFewQueries) run<Shape<T, HEAD_DIM, 1, true, true>>(p, false);
  else if (fold && p.dropout.p == 0.0 && p.len_q > 64) run<Shape<T, HEAD_DIM, M, false, false>>(p, true);
  else run<Shape<T, HEAD_DIM, 1, false, true>>(p, false);
}

template <typename T>
void run_16_bit(const AttentionForwardParams& p, int64_t dim) {
  if (dim <= 32) run_16_bit<T, 32>(p);
  else if (dim <= 64) run_16_bit<T, 64>(p);
  else if (dim <= 96) run_16_bit<T, 96>(p);
  else if (dim <= 128) run_16_bit<T, 128>(p);
  else if (dim <= 192) run_16_bit<T, 192>(p);
  else run_16_bit<T, 256>(p);
}

template <int HEAD_DIM>
void run_float(const AttentionForwardParams& p) {
  const Plan plan = make_plan(p, kFloatRows, false);
  launch("attention_forward_float_kernel", attention_forward_float_kernel<HEAD_DIM>, blocks_of(p, plan), dim3(kFloatThreads),
         kFloatSharedBytes<HEAD_DIM>, p.stream, p, plan);
}

}  // namespace

int64_t attention_forward_portable_workspace(const AttentionForwardParams& p) {
  int64_t bytes = 0;
  make_parts(p, bytes);
  return bytes;
}

void attention_forward_portable(const AttentionForwardParams& p) {
  if (p.batch == 0 || p.heads_q == 0 || p.len_q == 0) return;
  const int64_t dim = max64(p.dim_qk, p.dim_v);
  if (dim > kMaxHeadDim) throw std::invalid_argument("attention_forward: head dim " + std::to_string(dim) + " is over 256");
  switch (p.query.dtype) {
    case DType::kBFloat16: return run_16_bit<bfloat16>(p, dim);
    case DType::kFloat16: return run_16_bit<half>(p, dim);
    case DType::kFloat32:
      if (dim <= 64) return run_float<64>(p);
      if (dim <= 128) return run_float<128>(p);
      if (dim <= 192) return run_float<192>(p);
      return run_float<256>(p);
    case DType::kFloat64: throw std::invalid_argument("attention_forward: the CUDA kernels have no float64");
  }
}

}  // namespace fastattn::cuda
