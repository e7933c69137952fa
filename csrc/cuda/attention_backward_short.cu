// dQ, dK and dV of 16-bit problems with at most 256 keys and head dims up to 64: a block owns a key head with all of
// its keys, so S and dP are computed once, five products in the place of seven, and K, V, Q and dO are read once.
//
// A warp of 8 owns 16 or 32 keys: S^T, dP^T, dV and dK as in attention_backward_dkv.cu, in steps of 16 queries. dS^T
// then goes through shared memory, and dQ [64, 64] = dS K is divided over the warps by 16 queries and by columns; it
// leaves through the rows of Q, which nobody reads any more. Q and dO (64 queries) have two stages.
//   KEYS   keys of a warp   shared KiB   registers of fragments (dK + dV + S + dP)
//    128         16              82        32 + 32 +  8 +  8
//    256         32             132        64 + 64 + 16 + 16
#include "attention_backward.h"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDim = 64, kRows = 64, kStep = 16, kStages = 2;
constexpr int kTile = kRows * kDim;

template <int KEYS>
struct Shape {
  static constexpr int kFragments = KEYS / 128;  // M: rows of fragments of a warp
  static constexpr int kWords = KEYS / 64;
  // K, V; stages of Q, dO; dS^T; shift and delta; mask words
  static constexpr int kSharedBytes =
      2 * (2 * KEYS * kDim + kStages * 2 * kTile + KEYS * kRows) + kRows * static_cast<int>(sizeof(float2)) + kRows * kWords * 8;
};

template <typename T, int KEYS, bool GENERAL>
FASTATTN_KERNEL(kThreads, 1)
attention_backward_short_kernel(const FASTATTN_GRID_CONSTANT BackwardArguments a) {
  using S = Shape<KEYS>;
  constexpr int M = S::kFragments, N = kStep / 8;
  FASTATTN_SHARED(shared);
  T* const key = reinterpret_cast<T*>(shared);  // [KEYS][64]
  T* const value = key + KEYS * kDim;           // [KEYS][64]
  T* const query = value + KEYS * kDim;         // [stages][64][64]
  T* const grad_out = query + kStages * kTile;  // [stages][64][64]
  T* const gradient = grad_out + kStages * kTile;  // dS^T [KEYS][64 queries]
  float2* const states = reinterpret_cast<float2*>(gradient + KEYS * kRows);  // [64], shift and delta
  uint64_t* const words = reinterpret_cast<uint64_t*>(states + kRows);        // [64][KEYS / 64]

  const AttentionBackwardParams& p = a.p;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warp_key = warp * 16 * M;
  const unsigned heads = static_cast<unsigned>(p.heads_kv);
  const int b = blockIdx.x / heads, h_kv = blockIdx.x % heads, group = static_cast<unsigned>(p.heads_q) / heads;
  const int len_k = static_cast<int>(p.len_k), tiles = static_cast<int>((p.len_q + kRows - 1) / kRows);
  load_tile<T, kDim, KEYS, kThreads>(key, plane_of<T>(p.key, b, h_kv, p.len_k, p.dim_qk), 0, thread);
  load_tile<T, kDim, KEYS, kThreads>(value, plane_of<T>(p.value, b, h_kv, p.len_k, p.dim_v), 0, thread);

  const float scale_log2 = static_cast<float>(p.scale * kLog2E);
  float grad_key[M][kDim / 8][4], grad_value[M][kDim / 8][4];
#pragma unroll
  for (int m = 0; m < M; ++m) clear(grad_key[m]), clear(grad_value[m]);

  // Query tiles of all the query heads, in order.
  const auto load_rows = [&](int item, int stage) {
    const int h = h_kv * group + item / tiles, i0 = item % tiles * kRows;
    load_tile<T, kDim, kRows, kThreads>(query + stage * kTile, plane_of<T>(p.query, b, h, p.len_q, p.dim_qk), i0, thread);
    load_tile<T, kDim, kRows, kThreads>(grad_out + stage * kTile, plane_of<T>(p.grad_out, b, h, p.len_q, p.dim_v), i0, thread);
  };
  const int items = group * tiles;
  if (items) load_rows(0, 0);
  ptx::cp_async_commit();
  for (int item = 0, stage = 0; item < items; ++item, stage ^= 1) {
    const int h = h_kv * group + item / tiles, i0 = item % tiles * kRows, rows = static_cast<int>(min64(kRows, p.len_q - i0));
    const TileClass found = classify(p.mask, a.summary, b, h, i0, i0 + rows, 0, len_k);
    const bool full = found == TileClass::kFull;
    T *const q = query + stage * kTile, *const d_out = grad_out + stage * kTile;
    if (thread < kRows) {
      const int64_t at = (static_cast<int64_t>(b) * p.heads_q + h) * p.len_q + i0 + thread;
      states[thread] = thread < rows ? make_float2(a.shift[at], a.delta[at]) : make_float2(INFINITY, 0.0f);
    }
    for (int n = thread; n < kRows * S::kWords; n += kThreads)
      words[n] = row_word(p.mask, a.summary, b, h, i0 + n / S::kWords, n % S::kWords * 64, p.len_k);
    ptx::cp_async_wait<0>();
    __syncthreads();
    // The other stage has been stored by everybody.
    if (item + 1 < items) load_rows(item + 1, stage ^ 1);
    ptx::cp_async_commit();

    const ScoreTerms terms(p, b, h);
    const auto multiply = [&](auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      // The bits of this warp's keys, in the half words of their 64.
      const uint32_t* const bits = reinterpret_cast<const uint32_t*>(words) + warp_key / 32;
      uint64_t live_rows = 0;
      if constexpr (kMasked) {
        const uint32_t own = M == 2 ? ~0u : 0xffffu << warp_key % 32;
        const uint64_t low = __ballot_sync(~0u, (bits[lane * S::kWords * 2] & own) != 0);
        live_rows = low | uint64_t{__ballot_sync(~0u, (bits[(lane + 32) * S::kWords * 2] & own) != 0)} << 32;
      }
#pragma unroll 1
      for (int step = 0; step < rows; step += kStep) {
        float s[M][N][4], ds[M][N][4];
#pragma unroll
        for (int m = 0; m < M; ++m) clear(s[m]), clear(ds[m]);
        if (!kMasked || (live_rows >> step & ((1 << kStep) - 1))) {
          multiply_transposed<T, kDim>(s, key, warp_key, q, step, lane);
          multiply_transposed<T, kDim>(ds, value, warp_key, d_out, step, lane);
#pragma unroll
          for (int m = 0; m < M; ++m)
            transposed_gradients<kMasked, GENERAL, S::kWords>(s[m], ds[m], states + step, bits + step * S::kWords * 2,
                                                              warp_key % 32 + m * 16, terms, scale_log2, i0 + step,
                                                              warp_key + m * 16, lane);
          multiply_registers<T, kDim, kMasked>(grad_value, s, d_out, step, lane, live_rows >> step);
          multiply_registers<T, kDim, kMasked>(grad_key, ds, q, step, lane, live_rows >> step);
        }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < N; ++n) {
            const int row = warp_key + m * 16 + lane / 4, chunk = step / 8 + n;
            T* const at = gradient + lane % 4 * 2;
            *reinterpret_cast<uint32_t*>(at + swizzle<T, kRows>(row, chunk)) = pack2<T>(ds[m][n][0], ds[m][n][1]);
            *reinterpret_cast<uint32_t*>(at + swizzle<T, kRows>(row + 8, chunk)) = pack2<T>(ds[m][n][2], ds[m][n][3]);
          }
      }
    };
    // Only the warp of the last keys needs a mask in a full tile; the warps behind it have nothing that is used.
    if (full && warp_key + 16 * M <= len_k) multiply(std::false_type{});
    else if (warp_key < len_k) multiply(std::true_type{});
    __syncthreads();

    // dQ: the warps divide 4 row groups of 16 queries, and two halves of the columns.
    constexpr int kParts = kThreads / 32 / (kRows / 16), kColumns = kDim / 8 / kParts;  // fragments of a part
    const int row0 = warp % (kRows / 16) * 16, part = warp / (kRows / 16) * kColumns;
    if (row0 < rows) {
      float grad_query[kColumns][4];
      clear(grad_query);
#pragma unroll 1
      for (int c = 0; c < S::kWords && c * 64 < len_k; ++c) {
        uint64_t any = ~uint64_t{0};
        if (!full) {
          const uint64_t word = words[(row0 + lane % 16) * S::kWords + c];
          const uint64_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(word));
          any = low | uint64_t{__reduce_or_sync(~0u, static_cast<uint32_t>(word >> 32))} << 32;
        }
#pragma unroll
        for (int k = 0; k < 64; k += 16) {
          if (c * 64 + k >= len_k || !(any >> k & 0xffff)) continue;
          const uint32_t own = static_cast<uint32_t>(any >> k) >> (lane % 4 * 2);
          const uint32_t keep0 = (own & 1 ? 0xffffu : 0u) | (own & 2 ? 0xffff0000u : 0u);
          const uint32_t keep1 = (own & 0x100 ? 0xffffu : 0u) | (own & 0x200 ? 0xffff0000u : 0u);
          uint32_t x[4];
          load_a_transposed<T, kRows>(x, gradient, c * 64 + k, row0 / 8, lane);
#pragma unroll
          for (int n = 0; n < kColumns; n += 2) {
            uint32_t y[4];
            load_b<T, kDim>(y, key, c * 64 + k, part + n, lane);
            ptx::mma_m16n8k16<T>(grad_query[n], x, y[0] & keep0, y[1] & keep1);
            ptx::mma_m16n8k16<T>(grad_query[n + 1], x, y[2] & keep0, y[3] & keep1);
          }
        }
      }
      const float scale = static_cast<float>(p.scale);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int row = row0 + lane / 4, column = lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(q + swizzle<T, kDim>(row, part + n) + column) =
            pack2<T>(grad_query[n][0] * scale, grad_query[n][1] * scale);
        *reinterpret_cast<uint32_t*>(q + swizzle<T, kDim>(row + 8, part + n) + column) =
            pack2<T>(grad_query[n][2] * scale, grad_query[n][3] * scale);
      }
    }
    __syncthreads();
    store_tile<T, kDim, kRows, kThreads>(plane_of<T>(p.grad_query, b, h, p.len_q, p.dim_qk), q, i0, thread);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // K has been read, and where there are no queries has arrived

  const auto store = [&](const TensorRef& to, int64_t dim, T* tile, const auto& sums, float factor) {
    const float factors[2] = {factor, factor};
#pragma unroll
    for (int m = 0; m < M; ++m) put_fragments<T, kDim>(tile, warp_key + m * 16, sums[m], factors, lane);
    __syncwarp();
    store_tile<T, kDim, 16 * M, 32>(plane_of<T>(to, b, h_kv, p.len_k, dim), tile + warp_key * kDim, warp_key, lane);
  };
  store(p.grad_key, p.dim_qk, key, grad_key, static_cast<float>(p.scale));
  store(p.grad_value, p.dim_v, value, grad_value, GENERAL ? static_cast<float>(1.0 / (1.0 - p.dropout.p)) : 1.0f);
}

template <typename T, int KEYS, bool GENERAL>
void start(const BackwardArguments& a) {
  launch("attention_backward_short_kernel", attention_backward_short_kernel<T, KEYS, GENERAL>,
         dim3(static_cast<unsigned>(a.p.batch * a.p.heads_kv)), dim3(kThreads), Shape<KEYS>::kSharedBytes, a.p.stream, a);
}

template <typename T, bool GENERAL>
void run(const BackwardArguments& a) {
  if (a.p.len_k <= 128) start<T, 128, GENERAL>(a);
  else start<T, 256, GENERAL>(a);
}

}  // namespace

// With few heads the tiles of the other kernels fill the GPU better; with long queries there is nothing to gain.
bool is_short(const AttentionParams& p) {
  return p.query.dtype != DType::kFloat32 && p.len_k > 0 && p.len_k <= 256 && p.len_q > 0 && p.len_q <= 256 &&
         max64(p.dim_qk, p.dim_v) <= kDim && p.batch * p.heads_kv >= device_info().multiprocessors;
}

void attention_backward_short(const BackwardArguments& arguments) {
  const bool general = is_general(arguments.p);
  if (arguments.p.query.dtype == DType::kBFloat16) general ? run<bfloat16, true>(arguments) : run<bfloat16, false>(arguments);
  else general ? run<half, true>(arguments) : run<half, false>(arguments);
}

}  // namespace fastattn::cuda
