// dK and dV of 16-bit problems: a block owns BN keys and walks their live query tiles, of all the query heads that
// share them in order, so nobody else adds to its sums.
//
// Per warp of 16 keys and STEP queries of a tile: S^T = K Q^T and dP^T = V dO^T [16, STEP], P^T, dS^T = P^T (dP^T -
// delta), dV += P^T dO, dK += dS^T Q. K, V, Q and dO lie in shared memory, Q and dO (64 queries) in two stages: the
// next tile arrives by cp.async while this one is multiplied. dK and dV stay in registers and leave through the rows of
// K and V, which no other warp reads. Above head dim 128 the sums of one warp would fill its registers: dK and dV are
// then two launches.
//   HEAD_DIM    BN  STEP  stages  shared KiB   fragment registers (dK + dV + S + dP)
//      32      128   64     2        34           16 +  16 + 32 + 32
//      64      128   64     2        66           32 +  32 + 32 + 32
//      96      128   64     2        98           48 +  48 + 32 + 32
//     128      128   64     2       130           64 +  64 + 32 + 32
//     192       64   32     2       146           96            + 16 + 16
//     256       64   64     1       130          128            + 32 + 32
// With a bias or dropout STEP is 32 from head dim 96 on. Two rows of fragments a warp would halve the reads of Q and
// dO, but from head dim 64 on only steps of 16 queries fit the registers beside their sums, which takes the gain away
// again.
#include "attention_backward.h"

namespace fastattn::cuda {
namespace {

enum class Part { kBoth, kKey, kValue };

template <int HEAD_DIM, bool GENERAL>
struct Shape {
  static constexpr int kKeys = HEAD_DIM <= 128 ? 128 : 64;  // BN
  static constexpr int kThreads = kKeys / 16 * 32;
  static constexpr int kRows = 64;
  static constexpr int kStep = HEAD_DIM == 192 || (GENERAL && HEAD_DIM >= 96) ? 32 : 64;  // queries multiplied at once
  static constexpr int kStages = HEAD_DIM <= 192 ? 2 : 1;
  static constexpr bool kSplit = HEAD_DIM > 128;
  static constexpr int kWords = kKeys / 64;
  // K, V; stages of Q, dO; stages of (shift, delta); mask words
  static constexpr int kSharedBytes =
      2 * HEAD_DIM * 2 * (kKeys + kStages * kRows) + kStages * kRows * static_cast<int>(sizeof(float2)) + kRows * kWords * 8;
};

template <typename T, int HEAD_DIM, bool GENERAL, Part PART>
FASTATTN_KERNEL(Shape<HEAD_DIM, GENERAL>::kThreads, 1)
attention_backward_dkv_kernel(const FASTATTN_GRID_CONSTANT BackwardArguments a) {
  using S = Shape<HEAD_DIM, GENERAL>;
  constexpr int N = S::kStep / 8, kTile = S::kRows * HEAD_DIM;
  constexpr bool kWantsKey = PART != Part::kValue, kWantsValue = PART != Part::kKey;
  static_assert(S::kThreads >= S::kRows, "a thread for every row");
  FASTATTN_SHARED(shared);
  T* const key = reinterpret_cast<T*>(shared);
  T* const value = key + S::kKeys * HEAD_DIM;
  T* const query = value + S::kKeys * HEAD_DIM;      // [stages][64][HEAD_DIM]
  T* const grad_out = query + S::kStages * kTile;
  float2* const states = reinterpret_cast<float2*>(grad_out + S::kStages * kTile);  // [stages][64], shift and delta
  uint64_t* const words = reinterpret_cast<uint64_t*>(states + S::kStages * S::kRows);  // [64][BN / 64]

  const AttentionBackwardParams& p = a.p;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  // 32-bit division: there are fewer than 2^31 blocks. The longest columns of a causal mask come first.
  const unsigned tiles = static_cast<unsigned>((p.len_k + S::kKeys - 1) / S::kKeys), heads = static_cast<unsigned>(p.heads_kv);
  const int b = blockIdx.x / tiles / heads, h_kv = blockIdx.x / tiles % heads, j0 = blockIdx.x % tiles * S::kKeys;
  const int group = static_cast<unsigned>(p.heads_q) / heads;
  const int warp_key = warp * 16;
  load_tile<T, HEAD_DIM, S::kKeys, S::kThreads>(key, plane_of<T>(p.key, b, h_kv, p.len_k, p.dim_qk), j0, thread);
  if (kWantsKey)
    load_tile<T, HEAD_DIM, S::kKeys, S::kThreads>(value, plane_of<T>(p.value, b, h_kv, p.len_k, p.dim_v), j0, thread);
  ptx::cp_async_commit();

  const float scale_log2 = static_cast<float>(p.scale * kLog2E);
  float grad_key[1][kWantsKey ? HEAD_DIM / 8 : 1][4], grad_value[1][kWantsValue ? HEAD_DIM / 8 : 1][4];
  clear(grad_key[0]);
  clear(grad_value[0]);

  for (int h = h_kv * group; h < (h_kv + 1) * group; ++h) {
    const Plane<T> query_plane = plane_of<T>(p.query, b, h, p.len_q, p.dim_qk);
    const Plane<T> grad_out_plane = plane_of<T>(p.grad_out, b, h, p.len_q, p.dim_v);
    const ScoreTerms terms(p, b, h);
    const auto load_rows = [&](int tile, int stage) {
      load_tile<T, HEAD_DIM, S::kRows, S::kThreads>(query + stage * kTile, query_plane, tile * S::kRows, thread);
      load_tile<T, HEAD_DIM, S::kRows, S::kThreads>(grad_out + stage * kTile, grad_out_plane, tile * S::kRows, thread);
    };
    // A row that does not exist has probability 0.
    const auto state_of = [&](int tile) {
      const int64_t i = static_cast<int64_t>(tile) * S::kRows + thread, at = (b * p.heads_q + h) * p.len_q + i;
      return thread < S::kRows && i < p.len_q ? make_float2(a.shift[at], a.delta[at]) : make_float2(INFINITY, 0.0f);
    };
    // One tile pair; without a mask no pair meets mask code.
    const auto multiply = [&](auto masked, int tile, int stage) {
      constexpr bool kMasked = decltype(masked)::value;
      const T *const q = query + stage * kTile, *const d_out = grad_out + stage * kTile;
      // The bits of this warp's keys, in the half words of their 64.
      const uint32_t* const bits = reinterpret_cast<const uint32_t*>(words) + warp_key / 32;
      uint64_t live_rows = 0;  // queries that attend to a key of this warp
      if constexpr (kMasked) {
        const uint32_t own = 0xffffu << warp_key % 32;
        const uint64_t low = __ballot_sync(~0u, (bits[lane * S::kWords * 2] & own) != 0);
        live_rows = low | uint64_t{__ballot_sync(~0u, (bits[(lane + 32) * S::kWords * 2] & own) != 0)} << 32;
        if (!live_rows) return;
      }
#pragma unroll 1
      for (int step = 0; step < S::kRows; step += S::kStep) {
        float s[1][N][4], ds[1][N][4];
        clear(s[0]);
        clear(ds[0]);
        multiply_transposed<T, HEAD_DIM>(s, key, warp_key, q, step, lane);
        if constexpr (kWantsKey) multiply_transposed<T, HEAD_DIM>(ds, value, warp_key, d_out, step, lane);
        transposed_gradients<kMasked, GENERAL, S::kWords>(s[0], ds[0], states + stage * S::kRows + step, bits + step * S::kWords * 2,
                                                          warp_key % 32, terms, scale_log2, tile * S::kRows + step, j0 + warp_key,
                                                          lane);
        if constexpr (kWantsValue) multiply_registers<T, HEAD_DIM, kMasked>(grad_value, s, d_out, step, lane, live_rows >> step);
        if constexpr (kWantsKey) multiply_registers<T, HEAD_DIM, kMasked>(grad_key, ds, q, step, lane, live_rows >> step);
      }
    };

    QueryTiles<S::kRows, S::kKeys> cursor(p.mask, a.summary, b, h, j0, p.len_q, p.len_k);
    int tile = 0;
    bool full = false, more = cursor.next(tile, full);
    if (more) {
      load_rows(tile, 0);
      if (thread < S::kRows) states[thread] = state_of(tile);
    }
    ptx::cp_async_commit();
    for (int stage = 0; more;) {
      int next_tile = 0;
      bool next_full = false;
      const bool next_more = cursor.next(next_tile, next_full);
      float2 next_state = make_float2(0.0f, 0.0f);
      if (next_more) next_state = state_of(next_tile);
      if (S::kStages > 1) {
        if (next_more) load_rows(next_tile, stage ^ 1);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
      } else {
        ptx::cp_async_wait<0>();
      }
      if (!full) {
        for (int n = thread; n < S::kRows * S::kWords; n += S::kThreads)
          words[n] = row_word(p.mask, a.summary, b, h, static_cast<int64_t>(tile) * S::kRows + n / S::kWords,
                              j0 + n % S::kWords * 64, p.len_k);
      }
      __syncthreads();
      if (full) multiply(std::false_type{}, tile, stage);
      else multiply(std::true_type{}, tile, stage);
      if (S::kStages > 1) {
        stage ^= 1;
        if (next_more && thread < S::kRows) states[stage * S::kRows + thread] = next_state;
        __syncthreads();
      } else {
        __syncthreads();
        if (next_more && thread < S::kRows) states[thread] = next_state;
        if (next_more) load_rows(next_tile, 0);
        ptx::cp_async_commit();
      }
      tile = next_tile, full = next_full, more = next_more;
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // a block without live tiles: K and V have arrived before their rows are overwritten

  const auto store = [&](const TensorRef& to, int64_t dim, T* tile, const auto& sums, float factor) {
    const float factors[2] = {factor, factor};
    put_fragments<T, HEAD_DIM>(tile, warp_key, sums[0], factors, lane);
    __syncwarp();
    store_tile<T, HEAD_DIM, 16, 32>(plane_of<T>(to, b, h_kv, p.len_k, dim), tile + warp_key * HEAD_DIM, j0 + warp_key, lane);
  };
  if constexpr (kWantsKey) store(p.grad_key, p.dim_qk, key, grad_key, static_cast<float>(p.scale));
  if constexpr (kWantsValue)
    store(p.grad_value, p.dim_v, value, grad_value, GENERAL ? static_cast<float>(1.0 / (1.0 - p.dropout.p)) : 1.0f);
}

template <typename T, int HEAD_DIM, bool GENERAL, Part PART>
void start(const BackwardArguments& a) {
  using S = Shape<HEAD_DIM, GENERAL>;
  const int64_t blocks = a.p.batch * a.p.heads_kv * ceil_div(a.p.len_k, S::kKeys);
  if (blocks == 0) return;
  launch("attention_backward_dkv_kernel", attention_backward_dkv_kernel<T, HEAD_DIM, GENERAL, PART>,
         dim3(static_cast<unsigned>(blocks)), dim3(S::kThreads), S::kSharedBytes, a.p.stream, a);
}

template <typename T, bool GENERAL>
void run(const BackwardArguments& a) {
  for_head_dim(a.p, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if constexpr (Shape<kDim, GENERAL>::kSplit) {
      start<T, kDim, GENERAL, Part::kValue>(a);
      start<T, kDim, GENERAL, Part::kKey>(a);
    } else {
      start<T, kDim, GENERAL, Part::kBoth>(a);
    }
  });
}

}  // namespace

void attention_backward_dkv(const BackwardArguments& arguments) {
  const bool general = is_general(arguments.p);
  if (arguments.p.query.dtype == DType::kBFloat16) general ? run<bfloat16, true>(arguments) : run<bfloat16, false>(arguments);
  else general ? run<half, true>(arguments) : run<half, false>(arguments);
}

}  // namespace fastattn::cuda
