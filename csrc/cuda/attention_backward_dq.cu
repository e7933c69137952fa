// dQ of 16-bit problems: a block owns BM query rows and walks their live key tiles.
//
// Per tile, and warp of 16 M rows, and STEP keys: S = Q K^T and dP = dO V^T [16 M, STEP], dS = P (dP - delta), dQ += dS
// K. Q, dO, K and V lie in shared memory, K and V in two stages: the next tile arrives by cp.async while this one is
// multiplied. dQ stays in registers and leaves through the rows of Q, which no other warp reads.
//
// M = 2 halves the reads of K and V from shared memory (256 bytes of B for each m16n8k16, as many cycles as the product
// takes); from head dim 96 on its registers do not suffice.
//   HEAD_DIM    BM  M  STEP  stages  shared KiB   fragment registers (dQ + S + dP)
//      32      128  2   32     2        32          32 + 32 + 32
//      64      128  2   32     2        64          64 + 32 + 32
//      96      128  1   64     2        96          48 + 32 + 32
//     128      128  1   64     2       128          64 + 32 + 32
//     192       64  1   64     2       144          96 + 32 + 32
//     256       64  1   32     1       128         128 + 16 + 16
#include "attention_backward.h"

namespace fastattn::cuda {
namespace {

template <int HEAD_DIM, bool GENERAL>
struct Shape {
  static constexpr int kRows = HEAD_DIM <= 128 ? 128 : 64;  // BM
  static constexpr int kFragments = HEAD_DIM <= 64 ? 2 : 1;  // M: rows of fragments of a warp
  static constexpr int kThreads = kRows / (16 * kFragments) * 32;
  static constexpr int kKeys = 64;
  static constexpr int kStep = kFragments == 2 || HEAD_DIM == 256 ? 32 : 64;  // keys multiplied at once
  static constexpr int kStages = HEAD_DIM <= 192 ? 2 : 1;
  static constexpr int kMinBlocks = kFragments;
  static constexpr int kSharedBytes = 2 * HEAD_DIM * (2 * kRows + kStages * 2 * kKeys);
};

template <typename T, int HEAD_DIM, bool GENERAL>
FASTATTN_KERNEL(Shape<HEAD_DIM, GENERAL>::kThreads, Shape<HEAD_DIM, GENERAL>::kMinBlocks)
attention_backward_dq_kernel(const FASTATTN_GRID_CONSTANT BackwardArguments a) {
  using S = Shape<HEAD_DIM, GENERAL>;
  constexpr int M = S::kFragments, N = S::kStep / 8, kTile = S::kKeys * HEAD_DIM;
  FASTATTN_SHARED(shared);
  T* const query = reinterpret_cast<T*>(shared);
  T* const grad_out = query + S::kRows * HEAD_DIM;
  T* const key = grad_out + S::kRows * HEAD_DIM;   // [stages][64][HEAD_DIM]
  T* const value = key + S::kStages * kTile;

  const AttentionBackwardParams& p = a.p;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  // 32-bit division: there are fewer than 2^31 blocks. The longest rows of a causal mask come first.
  const unsigned tiles = static_cast<unsigned>((p.len_q + S::kRows - 1) / S::kRows), heads = static_cast<unsigned>(p.heads_q);
  const int b = blockIdx.x / tiles / heads, h = blockIdx.x / tiles % heads, h_kv = h / (heads / static_cast<unsigned>(p.heads_kv));
  const int i0 = (tiles - 1 - blockIdx.x % tiles) * S::kRows;
  const int warp_row = warp * 16 * M;
  const Plane<T> key_plane = plane_of<T>(p.key, b, h_kv, p.len_k, p.dim_qk);
  const Plane<T> value_plane = plane_of<T>(p.value, b, h_kv, p.len_k, p.dim_v);

  load_tile<T, HEAD_DIM, S::kRows, S::kThreads>(query, plane_of<T>(p.query, b, h, p.len_q, p.dim_qk), i0, thread);
  load_tile<T, HEAD_DIM, S::kRows, S::kThreads>(grad_out, plane_of<T>(p.grad_out, b, h, p.len_q, p.dim_v), i0, thread);
  const auto load_keys = [&](int tile, int stage) {
    load_tile<T, HEAD_DIM, S::kKeys, S::kThreads>(key + stage * kTile, key_plane, tile * S::kKeys, thread);
    load_tile<T, HEAD_DIM, S::kKeys, S::kThreads>(value + stage * kTile, value_plane, tile * S::kKeys, thread);
  };
  KeyTiles<S::kRows, S::kKeys> cursor(p.mask, a.summary, b, h, i0, p.len_q, p.len_k);
  int tile = 0;
  bool full = false, more = cursor.next(tile, full);
  if (more) load_keys(tile, 0);
  ptx::cp_async_commit();

  const float scale_log2 = static_cast<float>(p.scale * kLog2E);
  const ScoreTerms terms(p, b, h);
  float grad_query[M][HEAD_DIM / 8][4];
  FragmentRows rows[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    clear(grad_query[m]);
    rows[m] = fragment_rows(a, b, h, i0 + warp_row + m * 16, lane);
  }

  // One tile pair. Without a mask no pair meets mask code, and every key of the tile exists.
  const auto multiply = [&](auto masked, int stage) {
    constexpr bool kMasked = decltype(masked)::value;
    const T *const k = key + stage * kTile, *const v = value + stage * kTile;
    const int64_t j0 = static_cast<int64_t>(tile) * S::kKeys;
    uint64_t word[M][2] = {}, any = 0;
    if constexpr (kMasked) {
      any = fragment_mask<M>(word, a, b, h, i0 + warp_row, j0, lane);
      if (!any) return;
    }
#pragma unroll 1
    for (int step = 0; step < S::kKeys; step += S::kStep) {
      float s[M][N][4], ds[M][N][4];
#pragma unroll
      for (int m = 0; m < M; ++m) clear(s[m]), clear(ds[m]);
      multiply_transposed<T, HEAD_DIM>(s, query, warp_row, k, step, lane);
      multiply_transposed<T, HEAD_DIM>(ds, grad_out, warp_row, v, step, lane);
#pragma unroll
      for (int m = 0; m < M; ++m)
        score_gradients<kMasked, GENERAL>(s[m], ds[m], rows[m], word[m], step, terms, scale_log2, i0 + warp_row + m * 16, j0, lane);
      multiply_registers<T, HEAD_DIM, kMasked>(grad_query, ds, k, step, lane, any >> step);
    }
  };
  for (int stage = 0; more;) {
    int next_tile = 0;
    bool next_full = false;
    const bool next_more = cursor.next(next_tile, next_full);
    if (S::kStages > 1) {
      if (next_more) load_keys(next_tile, stage ^ 1);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    if (full) multiply(std::false_type{}, stage);
    else multiply(std::true_type{}, stage);
    __syncthreads();
    if (S::kStages > 1) {
      stage ^= 1;
    } else {
      if (next_more) load_keys(next_tile, 0);
      ptx::cp_async_commit();
    }
    tile = next_tile, full = next_full, more = next_more;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // a block without live tiles: the rows of Q have arrived before they are overwritten

  const float scale = static_cast<float>(p.scale), factor[2] = {scale, scale};
#pragma unroll
  for (int m = 0; m < M; ++m) put_fragments<T, HEAD_DIM>(query, warp_row + m * 16, grad_query[m], factor, lane);
  __syncwarp();
  store_tile<T, HEAD_DIM, 16 * M, 32>(plane_of<T>(p.grad_query, b, h, p.len_q, p.dim_qk), query + warp_row * HEAD_DIM, i0 + warp_row,
                                      lane);
}

template <typename T, int HEAD_DIM, bool GENERAL>
void start(const BackwardArguments& a) {
  using S = Shape<HEAD_DIM, GENERAL>;
  const int64_t blocks = a.p.batch * a.p.heads_q * ceil_div(a.p.len_q, S::kRows);
  if (blocks == 0) return;
  launch("attention_backward_dq_kernel", attention_backward_dq_kernel<T, HEAD_DIM, GENERAL>, dim3(static_cast<unsigned>(blocks)),
         dim3(S::kThreads), S::kSharedBytes, a.p.stream, a);
}

template <typename T>
void run(const BackwardArguments& a) {
  for_head_dim(a.p, [&](auto dim) {
    if (is_general(a.p)) start<T, decltype(dim)::value, true>(a);
    else start<T, decltype(dim)::value, false>(a);
  });
}

}  // namespace

void attention_backward_dq(const BackwardArguments& arguments) {
  if (arguments.p.query.dtype == DType::kBFloat16) run<bfloat16>(arguments);
  else run<half>(arguments);
}

}  // namespace fastattn::cuda
