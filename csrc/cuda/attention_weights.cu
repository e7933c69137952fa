// Attention weights W = exp(scores - lse), after dropout, per head or averaged over the heads; and their gradients.
//
// Every kernel works on tile pairs of 64 queries x 64 keys, 128 threads: 16-bit types on tensor cores (mma m16n8k16, a warp
// owns 16 rows), float32 in full precision on the ordinary cores (a thread owns 4 rows x 8 columns). Either way a thread
// holds 8 x 4 scores, so that everything between the products is written once:
//     S = Q K^T,  P = e^(scale S + bias - lse), 0 where the mask or dropout says so
// attention_weights_kernel: a block owns 64 x 64 elements of W and adds up P of its heads in their order; no tensor per
//     head exists. Tiles without a live pair are written as zeros.
// Backward, from the gradient dW of W with lse held for an input of its own, dS = P dW:
//     attention_weights_dq_kernel     owns 64 queries of a head, walks live key tiles:   dQ += dS K, dlse -= row sums of dS
//     attention_weights_dk_kernel     owns 64 keys of a key head, walks its query heads and their live query tiles: dK += dS^T Q
//     attention_weights_dbias_kernel  owns 64 x 64 elements of the bias, adds up what it is broadcast to, in order; or a share
//                                     of that, and attention_weights_dbias_sum_kernel adds the shares in order
// The factor 1 / (H (1 - dropout p)) multiplies the sums: dS is rounded to 16 bits without it, far from the small end of float16.
// No two blocks add to the same number, and every sum has its order: two runs are bitwise equal.
//
// What streams past lies in two stages of shared memory (one for float32 of 256 columns): the next tile arrives by cp.async
// while this one is multiplied.
//     shared KiB, 16-bit / float32   head dim 64: 41 / 81   128: 65 / 129   256: 113 / 145   forward 32 / 64, 64 / 128, 128 / 128
//     registers                      155 to 255, of which sums D / 2 and scores 32
// Bytes for a tile pair and head: 2 (64 x D) elements from L2, 32 FLOP a byte of a 16-bit type: bound by L2, about a fifth of
// the tensor cores' rate. W is written once.
//
// No leak: P and dS of dead pairs are selected, whatever NaN they hold; rows of K and Q that are dead for the whole tile count as
// zeros in the second product.
#include <stdexcept>

#include "../core/softmax.h"
#include "kernels.h"
#include "mask.h"
#include "tile.h"

namespace fastattn::cuda {
namespace {

constexpr int kTile = 64;        // queries and keys of a tile
constexpr int kThreads = 128;
constexpr int kGroups = 8;       // columns of a tile in groups of 8; a thread has one (float32) or two columns of each
constexpr int kPartPitch = 65;   // floats of a row of the bias tile: a column's elements in different banks

template <typename T>
inline constexpr bool kTensorCores = sizeof(T) == 2;

// Stages of what streams past.
template <typename T, int HEAD_DIM>
inline constexpr int kStages = kTensorCores<T> || HEAD_DIM <= 128 ? 2 : 1;

template <typename T, int HEAD_DIM>
inline constexpr int kTileElements = kTile * HEAD_DIM;

// ---- which elements of a 64 x 64 tile a thread has: element (n, e), n < 8, e < 4 ----

template <typename T>
FASTATTN_DEVICE int row_of(int thread, int e) {
  if constexpr (kTensorCores<T>) return thread / 32 * 16 + thread % 32 / 4 + e / 2 * 8;
  else return thread / 8 * 4 + e;
}

template <typename T>
FASTATTN_DEVICE int column_of(int thread, int n, int e) {
  if constexpr (kTensorCores<T>) return n * 8 + thread % 4 * 2 + e % 2;
  else return n * 8 + thread % 8;
}

// The sums of whole rows from those of a thread; both elements e of a row get the same number.
template <typename T>
FASTATTN_DEVICE void sum_rows(float (&x)[4]) {
  if constexpr (kTensorCores<T>) {
    x[0] += x[1], x[2] += x[3];
    FASTATTN_UNROLL
    for (int step = 1; step < 4; step *= 2) {
      x[0] += __shfl_xor_sync(~0u, x[0], step);
      x[2] += __shfl_xor_sync(~0u, x[2], step);
    }
    x[1] = x[0], x[3] = x[2];
  } else {
    FASTATTN_UNROLL
    for (int e = 0; e < 4; ++e)
      FASTATTN_UNROLL
      for (int step = 1; step < 8; step *= 2) x[e] += __shfl_xor_sync(~0u, x[e], step);
  }
}

FASTATTN_DEVICE float4 load_float4(const float* at) { return *reinterpret_cast<const float4*>(at); }

// ---- products; a tile lies in shared memory as [64][HEAD_DIM], see tile.h ----

template <int N>
using Sums = float[1][N][4];

// s = x y^T
template <typename T, int HEAD_DIM>
FASTATTN_DEVICE void multiply_scores(Sums<kGroups>& s, const T* x, const T* y, int thread) {
  clear(s[0]);
  if constexpr (kTensorCores<T>) {
    multiply_transposed<T, HEAD_DIM>(s, x, thread / 32 * 16, y, 0, thread % 32);
  } else {
#pragma unroll (HEAD_DIM <= 128 ? 2 : 1)
    for (int chunk = 0; chunk < HEAD_DIM / 4; ++chunk) {
      float4 a[4];
      FASTATTN_UNROLL
      for (int e = 0; e < 4; ++e) a[e] = load_float4(x + swizzle<float, HEAD_DIM>(row_of<T>(thread, e), chunk));
      FASTATTN_UNROLL
      for (int n = 0; n < kGroups; ++n) {
        const float4 b = load_float4(y + swizzle<float, HEAD_DIM>(column_of<T>(thread, n, 0), chunk));
        FASTATTN_UNROLL
        for (int e = 0; e < 4; ++e)
          s[0][n][e] = fmaf(a[e].w, b.w, fmaf(a[e].z, b.z, fmaf(a[e].y, b.y, fmaf(a[e].x, b.x, s[0][n][e]))));
      }
    }
  }
}

// c += ds y, or ds^T y when TRANSPOSED; ds [64][64] in shared memory. Rows of y whose bit in `rows` is 0 count as zeros,
// whatever they hold.
template <typename T, int HEAD_DIM, bool TRANSPOSED>
FASTATTN_DEVICE void multiply_gradients(Sums<HEAD_DIM / 8>& c, const T* ds, const T* y, uint64_t rows, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  if constexpr (kTensorCores<T>) {
#pragma unroll (HEAD_DIM <= 128 ? kTile / 16 : 1)
    for (int k = 0; k < kTile / 16; ++k) {
      uint32_t a[1][4];
      if constexpr (TRANSPOSED) load_a_transposed<T, kTile>(a[0], ds, k * 16, warp * 2, lane);
      else load_a<T, kTile>(a[0], ds, warp * 16, k * 2, lane);
      multiply_step<T, HEAD_DIM, true>(c, a, y, k * 16, lane, static_cast<uint32_t>(rows >> (k * 16)));
    }
  } else {
#pragma unroll (HEAD_DIM <= 128 ? 2 : 1)
    for (int k = 0; k < kTile; ++k) {
      if (!(rows >> k & 1)) continue;
      float a[4];
      if constexpr (TRANSPOSED) {
        const float4 four = load_float4(ds + swizzle<float, kTile>(k, thread / 8));
        a[0] = four.x, a[1] = four.y, a[2] = four.z, a[3] = four.w;
      } else {
        FASTATTN_UNROLL
        for (int e = 0; e < 4; ++e) a[e] = ds[swizzle_element<float, kTile>(row_of<T>(thread, e), k)];
      }
      FASTATTN_UNROLL
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        const float b = y[swizzle_element<float, HEAD_DIM>(k, column_of<T>(thread, n, 0))];
        FASTATTN_UNROLL
        for (int e = 0; e < 4; ++e) c[0][n][e] = fmaf(a[e], b, c[0][n][e]);
      }
    }
  }
}

// Rows row0 .. of `out` = factor c. `tile` [64][HEAD_DIM] is free for this use by the whole block.
template <typename T, int HEAD_DIM>
FASTATTN_DEVICE void store_sums(const Plane<T>& out, T* tile, const Sums<HEAD_DIM / 8>& c, float factor, int row0, int thread) {
  if constexpr (kTensorCores<T>) {
    const int warp_row = thread / 32 * 16, lane = thread % 32;
    const float factors[2] = {factor, factor};
    put_fragments<T, HEAD_DIM>(tile, warp_row, c[0], factors, lane);
    __syncwarp();
    store_tile<T, HEAD_DIM, 16, 32>(out, tile + warp_row * HEAD_DIM, row0 + warp_row, lane);
  } else {
    FASTATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int row = row0 + row_of<T>(thread, e);
      if (row >= out.rows) continue;
      FASTATTN_UNROLL
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        const int column = column_of<T>(thread, n, e);
        if (column < out.columns) out.ptr[row * out.row_stride + column] = c[0][n][e] * factor;
      }
    }
  }
}

// ---- one tile pair ----

// A 64 x 64 tile of one head.
struct TilePair {
  int b, h, i0, j0;
  bool full;  // needs no mask, and every key exists
};

template <typename T>
FASTATTN_DEVICE Plane<T> query_plane(const AttentionParams& p, int64_t b, int64_t h) {
  return plane_of<T>(p.query, b, h, p.len_q, p.dim_qk);
}

template <typename T>
FASTATTN_DEVICE Plane<T> key_plane(const AttentionParams& p, int64_t b, int64_t h) {
  return plane_of<T>(p.key, b, h / (p.heads_q / p.heads_kv), p.len_k, p.dim_qk);
}

// The tile of the gradient of W, [64][64]; zeros beyond the ends.
template <typename T>
FASTATTN_DEVICE void load_gradient(T* tile, const AttentionWeightsBackwardParams& p, const TilePair& at, int thread) {
  const TensorRef& dw = p.grad_weights;
  if (dw.stride[3] == 1) {
    Plane<T> plane = plane_of<T>(dw, at.b, at.h, p.len_q, p.len_k);
    plane.ptr += at.j0;
    plane.columns -= at.j0;
    load_tile<T, kTile, kTile, kThreads>(tile, plane, at.i0, thread);
    return;
  }
  const T* const from = static_cast<const T*>(dw.ptr) + at.b * dw.stride[0] + at.h * dw.stride[1];
#pragma unroll 1
  for (int n = thread; n < kTile * kTile; n += kThreads) {
    const int64_t i = at.i0 + n / kTile, j = at.j0 + n % kTile;
    tile[swizzle_element<T, kTile>(n / kTile, n % kTile)] =
        i < p.len_q && j < p.len_k ? from[i * dw.stride[2] + j * dw.stride[3]] : from_float<T>(0.0f);
  }
}

// words[r]: the pairs of row r that count, by the mask and by dropout. Nobody reads `words` when this is called; a barrier
// follows. Two threads share a row.
FASTATTN_DEVICE void stage_words(uint64_t* words, const AttentionParams& p, const MaskSummary& summary, const TilePair& at,
                                 int thread) {
  const int row = thread / 2, part = thread % 2;
  const int64_t i = at.i0 + row;
  const uint64_t word = at.full ? ~uint64_t{0} : row_word(p.mask, summary, at.b, at.h, i, at.j0, p.len_k);
  uint32_t own = static_cast<uint32_t>(word >> (part * 32));
  if (p.dropout.p > 0.0) {
    const uint64_t seed = dropout_seed(p.dropout), threshold = dropout_threshold(p.dropout.p);
    uint32_t kept = 0;
#pragma unroll 1
    for (int n = 0; n < 8; ++n) {
      const PhiloxBlock block = philox4x32(seed, static_cast<uint32_t>(at.j0 / 4 + part * 8 + n), static_cast<uint32_t>(i),
                                           static_cast<uint32_t>(at.h), static_cast<uint32_t>(at.b));
      FASTATTN_UNROLL
      for (int w = 0; w < 4; ++w) kept |= uint32_t{block.word[w] >= threshold} << (n * 4 + w);
    }
    own &= kept;
  }
  reinterpret_cast<uint32_t*>(words)[thread] = own;  // little endian: the lower half first
}

FASTATTN_DEVICE bool has_words(const AttentionParams& p, const TilePair& at) { return !at.full || p.dropout.p > 0.0; }

// Columns that some row has; and rows that have some column. By whole warps, behind the barrier.
FASTATTN_DEVICE uint64_t live_columns(const uint64_t* words, int lane) {
  const uint64_t both = words[lane] | words[lane + 32];
  const uint64_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(both));
  return low | uint64_t{__reduce_or_sync(~0u, static_cast<uint32_t>(both >> 32))} << 32;
}
FASTATTN_DEVICE uint64_t live_rows(const uint64_t* words, int lane) {
  const uint64_t low = __ballot_sync(~0u, words[lane] != 0);
  return low | uint64_t{__ballot_sync(~0u, words[lane + 32] != 0)} << 32;
}

// lse of the rows that a thread has; +inf, which is no probability, for an empty row and for one that does not exist.
template <typename T>
FASTATTN_DEVICE void load_shift(float (&shift)[4], const AttentionParams& p, int64_t b, int64_t h, int i0, int thread) {
  const float* const lse = static_cast<const float*>(p.lse.ptr) + (b * p.heads_q + h) * p.len_q;
  FASTATTN_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int i = i0 + row_of<T>(thread, e);
    shift[e] = i < p.len_q ? static_cast<float>(lse_to_shift(lse[i])) : INFINITY;
  }
}

// s = P, from s = Q K^T. The difference is taken before the product with log2(e): large scores keep its digits.
template <typename T, bool BIAS>
FASTATTN_DEVICE void probabilities(Sums<kGroups>& s, const AttentionParams& p, const TilePair& at, const float (&shift)[4],
                                   const uint64_t* words, int thread) {
  const float scale = static_cast<float>(p.scale);
  const bool selects = has_words(p, at);
  FASTATTN_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int row = row_of<T>(thread, e), column0 = BIAS ? ptx::opaque(column_of<T>(thread, 0, e)) : column_of<T>(thread, 0, e);
    const uint64_t word = (selects ? words[row] : ~uint64_t{0}) >> column0;
    // Of what does not exist, the bias of the last pair that does: its probability is 0 or it is not stored.
    const int i = min(at.i0 + row, static_cast<int>(p.len_q) - 1);
    const int64_t bias = at.b * p.bias.stride[0] + at.h * p.bias.stride[1] + i * p.bias.stride[2];
    FASTATTN_UNROLL
    for (int n = 0; n < kGroups; ++n) {
      float x = __fmul_rn(s[0][n][e], scale);  // rounded as the forward rounds it, not fused with the subtraction
      if constexpr (BIAS) {
        const int j = min(at.j0 + column0 + n * 8, static_cast<int>(p.len_k) - 1);
        x = fmaf(s[0][n][e], scale, load_scalar(p.bias, bias + j * p.bias.stride[3]));
      }
      x = ptx::ex2((x - shift[e]) * static_cast<float>(kLog2E));
      s[0][n][e] = word >> (n * 8) & 1 ? x : 0.0f;
    }
  }
}

template <typename T>
FASTATTN_DEVICE void probabilities(Sums<kGroups>& s, const AttentionParams& p, const TilePair& at, const float (&shift)[4],
                                   const uint64_t* words, int thread) {
  if (p.bias.ptr) probabilities<T, true>(s, p, at, shift, words, thread);
  else probabilities<T, false>(s, p, at, shift, words, thread);
}

// s = dS = P dW, from s = P and dW in `gradient`. A pair that does not count may have any dW.
template <typename T>
FASTATTN_DEVICE void score_gradients(Sums<kGroups>& s, const AttentionParams& p, const TilePair& at, const T* gradient,
                                     const uint64_t* words, int thread) {
  const bool selects = has_words(p, at);
  FASTATTN_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int row = row_of<T>(thread, e);
    const uint64_t word = (selects ? words[row] : ~uint64_t{0}) >> column_of<T>(thread, 0, e);
    FASTATTN_UNROLL
    for (int n = 0; n < kGroups; ++n) {
      const float ds = s[0][n][e] * to_float(gradient[swizzle_element<T, kTile>(row, column_of<T>(thread, n, e))]);
      s[0][n][e] = word >> (n * 8) & 1 ? ds : 0.0f;
    }
  }
}

template <typename T>
FASTATTN_DEVICE void put_scores(T* tile, const Sums<kGroups>& s, int thread) {
  FASTATTN_UNROLL
  for (int e = 0; e < 4; ++e)
    FASTATTN_UNROLL
    for (int n = 0; n < kGroups; ++n)
      tile[swizzle_element<T, kTile>(row_of<T>(thread, e), column_of<T>(thread, n, e))] = from_float<T>(s[0][n][e]);
}

// The loops below take the thread's number as opaque: addresses that follow from it are cheap to compute, and too many to
// wait in registers.

// ---- forward ----

template <typename T, int HEAD_DIM>
FASTATTN_KERNEL(kThreads, 1)
attention_weights_kernel(const FASTATTN_GRID_CONSTANT AttentionWeightsParams p, const FASTATTN_GRID_CONSTANT MaskSummary summary,
                         unsigned tiles_q, unsigned tiles_k, float factor) {
  FASTATTN_SHARED(shared);
  constexpr int kStage = 2 * kTileElements<T, HEAD_DIM>;
  T* const stages = reinterpret_cast<T*>(shared);  // [stages]{Q, K}
  uint64_t* const words = reinterpret_cast<uint64_t*>(stages + kStages<T, HEAD_DIM> * kStage);
  const int thread = threadIdx.x;
  const unsigned heads_out = p.average_heads ? 1 : static_cast<unsigned>(p.heads_q);
  const unsigned item = blockIdx.x / tiles_k, bh = item / tiles_q;
  const int b = bh / heads_out, first = bh % heads_out, last = p.average_heads ? static_cast<int>(p.heads_q) : first + 1;
  const int i0 = static_cast<int>(item % tiles_q) * kTile, j0 = static_cast<int>(blockIdx.x % tiles_k) * kTile;
  const int64_t i1 = min64(i0 + kTile, p.len_q), j1 = min64(j0 + kTile, p.len_k);

  // The first head from h on that has a live pair here. The same in every thread.
  const auto next_head = [&](int h, bool& full) {
    for (; h < last; ++h) {
      const TileClass found = classify(p.mask, summary, b, h, i0, i1, j0, j1);
      if (found == TileClass::kEmpty) continue;
      full = found == TileClass::kFull && j0 + kTile <= p.len_k;
      break;
    }
    return h;
  };
  const auto load = [&](int h, int stage, int thread) {
    T* const q = stages + stage * kStage;
    load_tile<T, HEAD_DIM, kTile, kThreads>(q, query_plane<T>(p, b, h), i0, thread);
    load_tile<T, HEAD_DIM, kTile, kThreads>(q + kTileElements<T, HEAD_DIM>, key_plane<T>(p, b, h), j0, thread);
  };

  Sums<kGroups> weights;
  clear(weights[0]);
  bool full = false;
  int h = next_head(first, full);
  if (h < last) load(h, 0, thread);
  ptx::cp_async_commit();
  for (int stage = 0; h < last;) {
    const int thread = ptx::opaque(static_cast<int>(threadIdx.x));
    const TilePair at{b, h, i0, j0, full};
    bool next_full = false;
    const int next = next_head(h + 1, next_full);
    if constexpr (kStages<T, HEAD_DIM> == 2) {
      if (next < last) load(next, stage ^ 1, thread);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    if (has_words(p, at)) stage_words(words, p, summary, at, thread);
    __syncthreads();
    const T* const q = stages + stage * kStage;
    Sums<kGroups> s;
    multiply_scores<T, HEAD_DIM>(s, q, q + kTileElements<T, HEAD_DIM>, thread);
    float shift[4];
    load_shift<T>(shift, p, b, h, i0, thread);
    probabilities<T>(s, p, at, shift, words, thread);
    FASTATTN_UNROLL
    for (int n = 0; n < kGroups; ++n)
      FASTATTN_UNROLL
      for (int e = 0; e < 4; ++e) weights[0][n][e] += s[0][n][e];
    __syncthreads();
    if constexpr (kStages<T, HEAD_DIM> == 2) {
      stage ^= 1;
    } else {
      if (next < last) load(next, 0, thread);
      ptx::cp_async_commit();
    }
    h = next, full = next_full;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  Plane<T> out = plane_of<T>(p.weights, b, first, p.len_q, p.len_k);
  out.ptr += j0;
  out.columns -= j0;
  store_sums<T, kTile>(out, stages, weights, factor, i0, thread);
}

// ---- backward ----

struct BackwardArguments {
  AttentionWeightsBackwardParams p;
  MaskSummary summary;
  float factor;  // of every sum
};

// Shared memory of the kernels that keep one tile and stream another beside dW.
template <typename T, int HEAD_DIM>
struct BackwardTiles {
  static constexpr int kStageElements = kTileElements<T, HEAD_DIM> + kTile * kTile;
  static constexpr int kBytes =
      (kTileElements<T, HEAD_DIM> + kStages<T, HEAD_DIM> * kStageElements) * static_cast<int>(sizeof(T)) + kTile * 8;
  T *fixed, *stages;  // [64][HEAD_DIM]; [stages]{[64][HEAD_DIM], [64][64]}
  uint64_t* words;

  FASTATTN_DEVICE_MEMBER explicit BackwardTiles(unsigned char* shared)
      : fixed(reinterpret_cast<T*>(shared)), stages(fixed + kTileElements<T, HEAD_DIM>),
        words(reinterpret_cast<uint64_t*>(stages + kStages<T, HEAD_DIM> * kStageElements)) {}
  FASTATTN_DEVICE_MEMBER T* streamed(int stage) const { return stages + stage * kStageElements; }
  FASTATTN_DEVICE_MEMBER T* gradient(int stage) const { return streamed(stage) + kTileElements<T, HEAD_DIM>; }
};

template <typename T, int HEAD_DIM>
FASTATTN_KERNEL(kThreads, 1) attention_weights_dq_kernel(const FASTATTN_GRID_CONSTANT BackwardArguments a, unsigned tiles_q) {
  FASTATTN_SHARED(shared);
  const BackwardTiles<T, HEAD_DIM> tiles(shared);
  const AttentionWeightsBackwardParams& p = a.p;
  const int thread = threadIdx.x;
  const unsigned bh = blockIdx.x / tiles_q, heads = static_cast<unsigned>(p.heads_q);
  const int b = bh / heads, h = bh % heads;
  const int i0 = static_cast<int>(blockIdx.x % tiles_q) * kTile;
  const auto load = [&](const TilePair& at, int stage, int thread) {
    load_tile<T, HEAD_DIM, kTile, kThreads>(tiles.streamed(stage), key_plane<T>(p, b, h), at.j0, thread);
    load_gradient(tiles.gradient(stage), p, at, thread);
  };
  load_tile<T, HEAD_DIM, kTile, kThreads>(tiles.fixed, query_plane<T>(p, b, h), i0, thread);
  KeyTiles<kTile, kTile> cursor(p.mask, a.summary, b, h, i0, p.len_q, p.len_k);
  const auto next_pair = [&](TilePair& at) {
    int tile = 0;
    bool full = false;
    const bool found = cursor.next(tile, full);
    at = {b, h, i0, tile * kTile, full};
    return found;
  };
  TilePair at;
  bool more = next_pair(at);
  if (more) load(at, 0, thread);
  ptx::cp_async_commit();

  float shift[4], grad_lse[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  load_shift<T>(shift, p, b, h, i0, thread);
  Sums<HEAD_DIM / 8> grad_query;
  clear(grad_query[0]);
  for (int stage = 0; more;) {
    const int thread = ptx::opaque(static_cast<int>(threadIdx.x));
    TilePair next;
    bool next_more = false;
    if constexpr (kStages<T, HEAD_DIM> == 2) {
      next_more = next_pair(next);
      if (next_more) load(next, stage ^ 1, thread);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    if (has_words(p, at)) stage_words(tiles.words, p, a.summary, at, thread);
    __syncthreads();
    const T* const key = tiles.streamed(stage);
    T* const gradient = tiles.gradient(stage);
    Sums<kGroups> s;
    multiply_scores<T, HEAD_DIM>(s, tiles.fixed, key, thread);
    probabilities<T>(s, p, at, shift, tiles.words, thread);
    score_gradients<T>(s, p, at, gradient, tiles.words, thread);
    FASTATTN_UNROLL
    for (int n = 0; n < kGroups; ++n)
      FASTATTN_UNROLL
      for (int e = 0; e < 4; ++e) grad_lse[e] += s[0][n][e];
    put_scores(gradient, s, thread);  // each thread where it has read dW
    __syncwarp();                     // a warp reads the rows it has written
    const uint64_t keys = has_words(p, at) ? live_columns(tiles.words, thread % 32) : ~uint64_t{0};
    multiply_gradients<T, HEAD_DIM, false>(grad_query, gradient, key, keys, thread);
    __syncthreads();
    if constexpr (kStages<T, HEAD_DIM> == 2) {
      stage ^= 1;
    } else {
      next_more = next_pair(next);
      if (next_more) load(next, 0, thread);
      ptx::cp_async_commit();
    }
    at = next, more = next_more;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  store_sums<T, HEAD_DIM>(plane_of<T>(p.grad_query, b, h, p.len_q, p.dim_qk), tiles.fixed, grad_query,
                          static_cast<float>(p.scale) * a.factor, i0, thread);
  sum_rows<T>(grad_lse);
  float* const lse = static_cast<float*>(p.grad_lse.ptr) + bh * p.len_q;
  FASTATTN_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int i = i0 + row_of<T>(thread, e);
    // Threads and elements that hold the same row hold the same sum; one of them writes.
    const bool writes = kTensorCores<T> ? thread % 4 == 0 && e % 2 == 0 : thread % 8 == 0;
    if (writes && i < p.len_q) lse[i] = -grad_lse[e] * a.factor;
  }
}

template <typename T, int HEAD_DIM>
FASTATTN_KERNEL(kThreads, 1) attention_weights_dk_kernel(const FASTATTN_GRID_CONSTANT BackwardArguments a, unsigned tiles_k) {
  FASTATTN_SHARED(shared);
  const BackwardTiles<T, HEAD_DIM> tiles(shared);
  const AttentionWeightsBackwardParams& p = a.p;
  const int thread = threadIdx.x;
  const unsigned bh = blockIdx.x / tiles_k, heads_kv = static_cast<unsigned>(p.heads_kv);
  const int b = bh / heads_kv, h_kv = bh % heads_kv, group = static_cast<int>(p.heads_q / p.heads_kv);
  const int j0 = static_cast<int>(blockIdx.x % tiles_k) * kTile;
  const auto load = [&](const TilePair& at, int stage, int thread) {
    load_tile<T, HEAD_DIM, kTile, kThreads>(tiles.streamed(stage), query_plane<T>(p, b, at.h), at.i0, thread);
    load_gradient(tiles.gradient(stage), p, at, thread);
  };
  load_tile<T, HEAD_DIM, kTile, kThreads>(tiles.fixed, plane_of<T>(p.key, b, h_kv, p.len_k, p.dim_qk), j0, thread);

  Sums<HEAD_DIM / 8> grad_key;
  clear(grad_key[0]);
  for (int h = h_kv * group; h < (h_kv + 1) * group; ++h) {
    QueryTiles<kTile, kTile> cursor(p.mask, a.summary, b, h, j0, p.len_q, p.len_k);
    const auto next_pair = [&](TilePair& at) {
      int tile = 0;
      bool full = false;
      const bool found = cursor.next(tile, full);
      at = {b, h, tile * kTile, j0, full};
      return found;
    };
    TilePair at;
    bool more = next_pair(at);
    if (more) load(at, 0, thread);
    ptx::cp_async_commit();
    for (int stage = 0; more;) {
      const int thread = ptx::opaque(static_cast<int>(threadIdx.x));
      TilePair next;
      bool next_more = false;
      if constexpr (kStages<T, HEAD_DIM> == 2) {
        next_more = next_pair(next);
        if (next_more) load(next, stage ^ 1, thread);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
      } else {
        ptx::cp_async_wait<0>();
      }
      if (has_words(p, at)) stage_words(tiles.words, p, a.summary, at, thread);
      __syncthreads();
      const T* const query = tiles.streamed(stage);
      T* const gradient = tiles.gradient(stage);
      Sums<kGroups> s;
      multiply_scores<T, HEAD_DIM>(s, query, tiles.fixed, thread);
      float shift[4];
      load_shift<T>(shift, p, b, h, at.i0, thread);
      probabilities<T>(s, p, at, shift, tiles.words, thread);
      score_gradients<T>(s, p, at, gradient, tiles.words, thread);
      put_scores(gradient, s, thread);
      __syncthreads();
      const uint64_t rows = has_words(p, at) ? live_rows(tiles.words, thread % 32) : ~uint64_t{0};
      multiply_gradients<T, HEAD_DIM, true>(grad_key, gradient, query, rows, thread);
      __syncthreads();
      if constexpr (kStages<T, HEAD_DIM> == 2) {
        stage ^= 1;
      } else {
        next_more = next_pair(next);
        if (next_more) load(next, 0, thread);
        ptx::cp_async_commit();
      }
      at = next, more = next_more;
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  store_sums<T, HEAD_DIM>(plane_of<T>(p.grad_key, b, h_kv, p.len_k, p.dim_qk), tiles.fixed, grad_key,
                          static_cast<float>(p.scale) * a.factor, j0, thread);
}

// The bias gradient's own shape, and what each of its elements is broadcast to. Where few tiles have much to add up, `splits`
// blocks share a tile, and a second kernel adds their sums in order.
struct BiasPlan {
  bool own[4];            // the bias has this dimension
  int64_t heads, tiles_q, tiles_k, tiles, elements;  // of the bias; tiles: in all
  int64_t sum_heads, sum_k, sum_tiles, pairs;        // added up for each tile: tiles of a head; tile pairs in all
  int64_t splits, pairs_per_split;
};

template <typename T, int HEAD_DIM>
FASTATTN_KERNEL(kThreads, 1) attention_weights_dbias_kernel(const FASTATTN_GRID_CONSTANT BackwardArguments a,
                                                         const FASTATTN_GRID_CONSTANT BiasPlan bias, float* sums) {
  FASTATTN_SHARED(shared);
  const AttentionWeightsBackwardParams& p = a.p;
  T* const query = reinterpret_cast<T*>(shared);
  T* const key = query + kTileElements<T, HEAD_DIM>;
  T* const gradient = key + kTileElements<T, HEAD_DIM>;
  uint64_t* const words = reinterpret_cast<uint64_t*>(gradient + kTile * kTile);
  const int thread = threadIdx.x;
  const int64_t split = blockIdx.x % bias.splits, own = blockIdx.x / bias.splits;
  const int64_t kt = own % bias.tiles_k, qt = own / bias.tiles_k % bias.tiles_q;
  const int64_t h0 = own / bias.tiles_k / bias.tiles_q % bias.heads, b0 = own / bias.tiles_k / bias.tiles_q / bias.heads;
  Sums<kGroups> total;
  clear(total[0]);
  const int64_t last = min64(bias.pairs, (split + 1) * bias.pairs_per_split);
  for (int64_t n = split * bias.pairs_per_split; n < last; ++n) {
    const int thread = ptx::opaque(static_cast<int>(threadIdx.x));
    const int64_t t = n % bias.sum_tiles, bh = n / bias.sum_tiles;
    const int b = static_cast<int>(bias.own[0] ? b0 : bh / bias.sum_heads);
    const int h = static_cast<int>(bias.own[1] ? h0 : bh % bias.sum_heads);
    const int64_t i0 = (bias.own[2] ? qt : t / bias.sum_k) * kTile, j0 = (bias.own[3] ? kt : t % bias.sum_k) * kTile;
    const TileClass found =
        classify(p.mask, a.summary, b, h, i0, min64(i0 + kTile, p.len_q), j0, min64(j0 + kTile, p.len_k));
    if (found == TileClass::kEmpty) continue;  // in every thread
    const TilePair at{b, h, static_cast<int>(i0), static_cast<int>(j0), found == TileClass::kFull && j0 + kTile <= p.len_k};
    load_tile<T, HEAD_DIM, kTile, kThreads>(query, query_plane<T>(p, b, h), at.i0, thread);
    load_tile<T, HEAD_DIM, kTile, kThreads>(key, key_plane<T>(p, b, h), at.j0, thread);
    load_gradient(gradient, p, at, thread);
    ptx::cp_async_commit();
    if (has_words(p, at)) stage_words(words, p, a.summary, at, thread);
    float shift[4];
    load_shift<T>(shift, p, b, h, at.i0, thread);
    ptx::cp_async_wait<0>();
    __syncthreads();
    Sums<kGroups> s;
    multiply_scores<T, HEAD_DIM>(s, query, key, thread);
    probabilities<T>(s, p, at, shift, words, thread);
    score_gradients<T>(s, p, at, gradient, words, thread);
    FASTATTN_UNROLL
    for (int g = 0; g < kGroups; ++g)
      FASTATTN_UNROLL
      for (int e = 0; e < 4; ++e) total[0][g][e] += s[0][g][e];
    __syncthreads();
  }

  // Through shared memory, where a dimension that the bias has not is added up in order.
  float* const part = reinterpret_cast<float*>(shared);  // [64][kPartPitch]
  FASTATTN_UNROLL
  for (int e = 0; e < 4; ++e)
    FASTATTN_UNROLL
    for (int n = 0; n < kGroups; ++n)
      part[row_of<T>(thread, e) * kPartPitch + column_of<T>(thread, n, e)] = total[0][n][e] * a.factor;
  __syncthreads();
  const int rows = bias.own[2] ? kTile : 1, columns = bias.own[3] ? kTile : 1;
  const int64_t* const stride = p.grad_bias.stride;
  float* const out = bias.splits > 1 ? sums + split * bias.elements : static_cast<float*>(p.grad_bias.ptr);
  for (int n = thread; n < rows * columns; n += kThreads) {
    const int row = n / columns, column = n % columns;
    const int64_t i = bias.own[2] ? qt * kTile + row : 0, j = bias.own[3] ? kt * kTile + column : 0;
    if ((bias.own[2] && i >= p.len_q) || (bias.own[3] && j >= p.len_k)) continue;
    float sum = 0.0f;
    for (int r = row; r < (bias.own[2] ? row + 1 : kTile); ++r)
      for (int c = column; c < (bias.own[3] ? column + 1 : kTile); ++c) sum += part[r * kPartPitch + c];
    out[b0 * stride[0] + h0 * stride[1] + i * stride[2] + j * stride[3]] = sum;
  }
}

// grad_bias = the sums of the splits, in order.
FASTATTN_KERNEL(kThreads) attention_weights_dbias_sum_kernel(float* grad_bias, const float* sums, int64_t elements,
                                                             int64_t splits) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= elements) return;
  float sum = 0.0f;
  for (int64_t split = 0; split < splits; ++split) sum += sums[split * elements + n];
  grad_bias[n] = sum;
}

// ---- host ----

// Calls run(T{}, std::integral_constant<int, HEAD_DIM>{}).
template <typename Run>
void dispatch(const AttentionParams& p, const char* operation, const Run& run) {
  const auto of_type = [&](auto type) {
    if (p.dim_qk <= 64) run(type, std::integral_constant<int, 64>{});
    else if (p.dim_qk <= 128) run(type, std::integral_constant<int, 128>{});
    else run(type, std::integral_constant<int, 256>{});
  };
  if (p.dim_qk > kMaxHeadDim)
    throw std::invalid_argument(std::string(operation) + ": head dim " + std::to_string(p.dim_qk) + " is over 256");
  switch (p.query.dtype) {
    case DType::kBFloat16: return of_type(bfloat16{});
    case DType::kFloat16: return of_type(half{});
    case DType::kFloat32: return of_type(float{});
    case DType::kFloat64: throw std::invalid_argument(std::string(operation) + ": the CUDA kernels have no float64");
  }
}

dim3 blocks_of(int64_t blocks, const char* operation) {
  if (blocks > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument(std::string(operation) + ": more than 2^31 tiles");
  return dim3(static_cast<unsigned>(blocks));
}

BiasPlan make_bias_plan(const AttentionWeightsBackwardParams& p) {
  constexpr int64_t kBlocks = 256;  // enough for the multiprocessors; the same everywhere, as the order of the sums depends on it
  BiasPlan plan{};
  if (!p.grad_bias) return plan;
  for (int d = 0; d < 4; ++d) plan.own[d] = p.grad_bias.stride[d] != 0;
  const int64_t tiles_q = ceil_div(p.len_q, kTile), tiles_k = ceil_div(p.len_k, kTile), batch = plan.own[0] ? p.batch : 1;
  plan.heads = plan.own[1] ? p.heads_q : 1;
  plan.tiles_q = plan.own[2] ? tiles_q : 1;
  plan.tiles_k = plan.own[3] ? tiles_k : 1;
  plan.tiles = batch * plan.heads * plan.tiles_q * plan.tiles_k;
  plan.elements = batch * plan.heads * (plan.own[2] ? p.len_q : 1) * (plan.own[3] ? p.len_k : 1);
  plan.sum_heads = plan.own[1] ? 1 : p.heads_q;
  plan.sum_k = plan.own[3] ? 1 : tiles_k;
  plan.sum_tiles = (plan.own[2] ? 1 : tiles_q) * plan.sum_k;
  plan.pairs = (plan.own[0] ? 1 : p.batch) * plan.sum_heads * plan.sum_tiles;
  plan.splits = max64(1, min64(plan.pairs, kBlocks / max64(plan.tiles, 1)));
  plan.pairs_per_split = ceil_div(plan.pairs, plan.splits);
  return plan;
}

}  // namespace

int64_t attention_weights_workspace(const AttentionWeightsParams& p) { return mask_summary_bytes(p); }

void attention_weights(const AttentionWeightsParams& p) {
  const int64_t tiles_q = ceil_div(p.len_q, kTile), tiles_k = ceil_div(p.len_k, kTile);
  const int64_t blocks = p.batch * (p.average_heads ? 1 : p.heads_q) * tiles_q * tiles_k;
  if (blocks == 0) return;
  const double share = p.average_heads ? static_cast<double>(max64(p.heads_q, 1)) : 1.0;
  dispatch(p, "attention_weights", [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int kDim = decltype(dim)::value;
    constexpr size_t kBytes = kStages<T, kDim> * 2 * kTileElements<T, kDim> * sizeof(T) + kTile * sizeof(uint64_t);
    launch("attention_weights_kernel", attention_weights_kernel<T, kDim>, blocks_of(blocks, "attention_weights"), dim3(kThreads),
           kBytes, p.stream, p, prepare_mask(p, p.workspace, p.stream), static_cast<unsigned>(tiles_q),
           static_cast<unsigned>(tiles_k), static_cast<float>(1.0 / (share * (1.0 - p.dropout.p))));
  });
}

int64_t attention_weights_backward_workspace(const AttentionWeightsBackwardParams& p) {
  const BiasPlan bias = make_bias_plan(p);
  return mask_summary_bytes(p) + (bias.splits > 1 ? bias.splits * bias.elements * static_cast<int64_t>(sizeof(float)) : 0);
}

void attention_weights_backward(const AttentionWeightsBackwardParams& p) {
  const char* const name = "attention_weights_backward";
  const int64_t tiles_q = ceil_div(p.len_q, kTile), tiles_k = ceil_div(p.len_k, kTile);
  const double share = p.average_heads ? static_cast<double>(max64(p.heads_q, 1)) : 1.0;
  const BackwardArguments arguments{p, prepare_mask(p, p.workspace, p.stream),
                                    static_cast<float>(1.0 / (share * (1.0 - p.dropout.p)))};
  dispatch(p, name, [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int kDim = decltype(dim)::value, kBytes = BackwardTiles<T, kDim>::kBytes;
    if (const int64_t blocks = p.batch * p.heads_q * tiles_q)
      launch("attention_weights_dq_kernel", attention_weights_dq_kernel<T, kDim>, blocks_of(blocks, name), dim3(kThreads), kBytes,
             p.stream, arguments, static_cast<unsigned>(tiles_q));
    if (const int64_t blocks = p.batch * p.heads_kv * tiles_k)
      launch("attention_weights_dk_kernel", attention_weights_dk_kernel<T, kDim>, blocks_of(blocks, name), dim3(kThreads), kBytes,
             p.stream, arguments, static_cast<unsigned>(tiles_k));
    if (!p.grad_bias) return;
    const BiasPlan bias = make_bias_plan(p);
    if (bias.tiles == 0) return;
    float* const sums = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + mask_summary_bytes(p));
    constexpr int kBiasBytes = (2 * kTileElements<T, kDim> + kTile * kTile) * static_cast<int>(sizeof(T)) + kTile * 8;
    static_assert(kBiasBytes >= kTile * kPartPitch * 4, "the sums fit where the tiles were");
    launch("attention_weights_dbias_kernel", attention_weights_dbias_kernel<T, kDim>, blocks_of(bias.tiles * bias.splits, name),
           dim3(kThreads), kBiasBytes, p.stream, arguments, bias, sums);
    if (bias.splits > 1)
      launch("attention_weights_dbias_sum_kernel", attention_weights_dbias_sum_kernel,
             blocks_of(ceil_div(bias.elements, kThreads), name), dim3(kThreads), 0, p.stream,
             static_cast<float*>(p.grad_bias.ptr), sums, bias.elements, bias.splits);
  });
}

}  // namespace fastattn::cuda
