// The backward of short sequences on Hopper: up to 256 queries and 256 keys, head dims up to 64, as many key heads as
// query heads. One block has a whole head: every operand is read once, delta is formed on the way, S and dP are
// computed once, and nothing goes through global memory between the products. 5 products for the 7 of the two kernels,
// one launch for three.
//
// Two warpgroups; no producer, as all copies are issued at the start, in the order of use. For each 128 keys, 64 of
// them a warpgroup, and each pair of query tiles of 64 rows:
//   S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q    64 keys x 64 queries a warpgroup, for both tiles
//   dS^T goes to shared memory                                128 keys x 64 queries, two tiles
//   dQ += dS K                                                one tile a warpgroup, over the 128 keys in order
// The dS tiles are double-buffered, so one barrier for a pair is enough: who writes a buffer again has passed the
// barrier of the pair between, which both warpgroups reach only after the products that read the buffer.
#include "../core/softmax.h"
#include "attention_backward_hopper.h"

namespace fastattn::cuda::hopper_backward {
namespace {

constexpr int kHeadDim = 64, kBlock = 64, kRows = 256, kBlocks = kRows / kBlock;
constexpr int kShortThreads = 256;
constexpr int kOperandBytes = kRows * kRowBytes, kBlockBytes = kBlock * kRowBytes;
constexpr int kDsBytes = 2 * kBlockBytes;  // of one query tile
// After the operands and two pairs of dS tiles: shift, delta, 32 mask bits a row in each of 8 arrays; for each warp the
// OR and the AND of its rows' words; barriers.
constexpr int kRowsOffset = 4 * kOperandBytes + 4 * kDsBytes;
constexpr int kWordsOffset = kRowsOffset + kRows * 4 * (2 + kRows / 32);
constexpr int kBarriersOffset = kWordsOffset + 2 * kBlocks * (kShortThreads / 32) * 8;
constexpr int kSharedBytes = kBarriersOffset + (2 + kBlocks) * 8;

struct ShortProblem {
  Problem common;
  TensorRef out, grad_out, grad_lse;
  const float* lse;
  bool vector;  // rows of out and grad_out are aligned to 16 bytes
};

#if FASTATTN_HOPPER

// rowsum(grad_out * out)
template <typename T>
FASTATTN_DEVICE float row_product(const T* x, const T* y, int dim, bool vector) {
  float sum = 0.0f;
  for (int d = 0; d < dim; d += 8) {
    if (vector && d + 8 <= dim) {
      const uint4 a = *reinterpret_cast<const uint4*>(x + d), b = *reinterpret_cast<const uint4*>(y + d);
      const uint32_t words[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 s = unpack2<T>(words[0][n]), t = unpack2<T>(words[1][n]);
        sum += s.x * t.x;
        sum += s.y * t.y;
      }
    } else {
      for (int n = d; n < dim && n < d + 8; ++n) sum += to_float(x[n]) * to_float(y[n]);
    }
  }
  return sum;
}

FASTATTN_DEVICE uint64_t warp_or(uint64_t word) {
  return __reduce_or_sync(~0u, static_cast<uint32_t>(word)) |
         uint64_t{__reduce_or_sync(~0u, static_cast<uint32_t>(word >> 32))} << 32;
}

FASTATTN_DEVICE void zero_row(unsigned char* operand, int row) {
#pragma unroll
  for (int chunk = 0; chunk < kRowBytes / 16; ++chunk)
    *reinterpret_cast<uint4*>(operand + row * kRowBytes + chunk * 16) = make_uint4(0, 0, 0, 0);
}

#endif

template <typename T>
FASTATTN_KERNEL(kShortThreads, 1)
attention_backward_short_hopper_kernel(const FASTATTN_GRID_CONSTANT Maps maps,
                                       const FASTATTN_GRID_CONSTANT ShortProblem short_problem) {
#if FASTATTN_HOPPER
  const Problem& problem = short_problem.common;
  FASTATTN_SHARED(shared);
  unsigned char* const query = shared;
  unsigned char* const grad_out = query + kOperandBytes;
  unsigned char* const key = grad_out + kOperandBytes;
  unsigned char* const value = key + kOperandBytes;
  unsigned char* const ds_tiles = value + kOperandBytes;
  float* const shift = reinterpret_cast<float*>(shared + kRowsOffset);
  float* const delta = shift + kRows;
  uint32_t* const bits = reinterpret_cast<uint32_t*>(delta + kRows);          // [8][kRows]
  uint64_t* const some = reinterpret_cast<uint64_t*>(shared + kWordsOffset);  // [warp][kBlocks]
  uint64_t* const every = some + kBlocks * (kShortThreads / 32);
  uint64_t* const keys_landed = reinterpret_cast<uint64_t*>(shared + kBarriersOffset);  // of 128 keys
  uint64_t* const queries_landed = keys_landed + 2;                                     // of 64 queries

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
  const int h = static_cast<int>(blockIdx.x % problem.heads_q), b = static_cast<int>(blockIdx.x / problem.heads_q);
  const int query_tiles = (problem.len_q + kBlock - 1) / kBlock,
            key_tiles = (problem.len_k + 2 * kBlock - 1) / (2 * kBlock);

  if (thread == 0) {
    for (int n = 0; n < 2 + kBlocks; ++n) ptx::mbarrier_init(keys_landed + n, 1);
    ptx::fence_mbarrier_init();
    const auto load_keys = [&](int tile) {
      ptx::mbarrier_arrive_expect_tx(keys_landed + tile, 4 * kBlockBytes);
      for (int j = tile * 2 * kBlock; j < (tile + 1) * 2 * kBlock; j += kBlock) {
        ptx::tma_load_4d(key + j * kRowBytes, &maps.key, keys_landed + tile, 0, j, h, b);
        ptx::tma_load_4d(value + j * kRowBytes, &maps.value, keys_landed + tile, 0, j, h, b);
      }
    };
    load_keys(0);
    for (int n = 0; n < query_tiles; ++n) {
      ptx::mbarrier_arrive_expect_tx(queries_landed + n, 2 * kBlockBytes);
      ptx::tma_load_4d(query + n * kBlockBytes, &maps.query, queries_landed + n, 0, n * kBlock, h, b);
      ptx::tma_load_4d(grad_out + n * kBlockBytes, &maps.grad_out, queries_landed + n, 0, n * kBlock, h, b);
    }
    if (key_tiles > 1) load_keys(1);
  }

  // One query row a thread. A row without keys may be NaN wherever it is read; one that does not exist has no
  // probabilities.
  uint64_t row_any = 0;
  {
    const bool exists = thread < problem.len_q;
    const int64_t at = (static_cast<int64_t>(b) * problem.heads_q + h) * problem.len_q + thread;
    const float lse = exists ? short_problem.lse[at] : -INFINITY;
    float sum = 0.0f;
    if (lse != -INFINITY) {
      const TensorRef &out = short_problem.out, &gradient = short_problem.grad_out, &grad_lse = short_problem.grad_lse;
      sum = row_product(static_cast<const T*>(out.ptr) + b * out.stride[0] + h * out.stride[1] + thread * out.stride[2],
                        static_cast<const T*>(gradient.ptr) + b * gradient.stride[0] + h * gradient.stride[1] +
                            thread * gradient.stride[2],
                        problem.grad_value.dim, short_problem.vector);
      if (grad_lse.ptr)
        sum -= *(static_cast<const float*>(grad_lse.ptr) + b * grad_lse.stride[0] + h * grad_lse.stride[1] +
                 thread * grad_lse.stride[2]);
    }
    shift[thread] = lse == -INFINITY ? INFINITY : lse * static_cast<float>(kLog2E);
    delta[thread] = sum;
#pragma unroll 1
    for (int c = 0; c < kBlocks; ++c) {
      const uint64_t word = row_word(problem.mask, problem.summary, b, h, thread, c * kBlock, problem.len_k);
      bits[2 * c * kRows + thread] = static_cast<uint32_t>(word);
      bits[(2 * c + 1) * kRows + thread] = static_cast<uint32_t>(word >> 32);
      row_any |= word;
      const uint64_t any = warp_or(word), all = ~warp_or(exists ? ~word : 0);
      if (lane == 0) {
        some[warp * kBlocks + c] = any;
        every[warp * kBlocks + c] = all;
      }
    }
  }
  __syncthreads();

  // What no pair needs may be NaN: zero it in the operands whose rows are summed over.
  if (thread < problem.len_q && row_any == 0) {
    ptx::mbarrier_wait(queries_landed + thread / kBlock, 0);
    zero_row(query, thread);
    zero_row(grad_out, thread);
  }
  uint64_t column_any = 0;
#pragma unroll
  for (int w = 0; w < kShortThreads / 32; ++w) column_any |= some[w * kBlocks + thread / kBlock];
  if (thread < problem.len_k && !(column_any >> thread % kBlock & 1)) {
    ptx::mbarrier_wait(keys_landed + thread / (2 * kBlock), 0);
    zero_row(key, thread);
  }
  ptx::fence_proxy_async();
  __syncthreads();

  const int part = warp / 4, warp_row = warp % 4 * 16;
  const uint64_t query_operand = ptx::smem_descriptor(query, kBlockBytes, 8 * kRowBytes);
  const uint64_t grad_out_operand = query_operand + (kOperandBytes >> 4);
  const uint64_t ds_operand = ptx::smem_descriptor(ds_tiles, kBlockBytes, 8 * kRowBytes);
  // Its place in the rows of dS^T, whose 16-byte chunks are swizzled as TMA would.
  unsigned char* const ds_row = ds_tiles + (part * kBlock + warp_row + lane / 4) * kRowBytes + lane % 4 * 4;
  const int swizzle = lane / 4;
  const auto kind_of = [&](int query_tile, int block) {
    const int at = 2 * query_tile * kBlocks + block;
    const uint64_t any = some[at] | some[at + kBlocks], all = every[at] & every[at + kBlocks];
    return __shfl_sync(~0u, any == 0 ? 0 : all == ~uint64_t{0} ? 2 : 1, 0);
  };

  float dq[2][kHeadDim / 2];  // of the query tiles `part` and 2 + `part`
#pragma unroll
  for (int n = 0; n < kHeadDim; ++n) dq[n / (kHeadDim / 2)][n % (kHeadDim / 2)] = 0.0f;
  int buffer = 0;
#pragma unroll 1
  for (int key_tile = 0; key_tile < key_tiles; ++key_tile) {
    float dk[kHeadDim / 2], dv[kHeadDim / 2];
#pragma unroll
    for (int n = 0; n < kHeadDim / 2; ++n) dk[n] = dv[n] = 0.0f;
    ptx::mbarrier_wait(keys_landed + key_tile, 0);
    const int block = 2 * key_tile + part;
    const uint64_t key_tile_operand =
        query_operand + static_cast<uint64_t>((2 * kOperandBytes + key_tile * 2 * kBlockBytes) >> 4);
    const uint64_t key_operand = key_tile_operand + static_cast<uint64_t>(part * (kBlockBytes >> 4));
    const uint64_t value_operand = key_operand + (kOperandBytes >> 4);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      if (2 * pair >= query_tiles) continue;
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        const int tile = 2 * pair + n;
        if (tile >= query_tiles) break;
        ptx::mbarrier_wait(queries_landed + tile, 0);
        const int kind = kind_of(tile, block);
        if (kind == 0) continue;
        Columns columns;
        columns.shift = shift + tile * kBlock + 2 * (lane % 4);
        columns.delta = columns.shift + kRows;
        columns.bits = bits + (2 * block + warp_row / 32) * kRows + tile * kBlock + 2 * (lane % 4);
        columns.low = 1u << (warp_row % 32 + lane / 4);
        columns.high = columns.low << 8;
        unsigned char* const ds = ds_row + (2 * buffer + n) * kDsBytes;
        const auto keep_ds = [&](const uint32_t (&operand)[kBlock / 16][4]) {
#pragma unroll
          for (int m = 0; m < kBlock / 8; ++m) {
            *reinterpret_cast<uint32_t*>(ds + ((m ^ swizzle) << 4)) = operand[m / 2][m % 2 * 2];
            *reinterpret_cast<uint32_t*>(ds + ((m ^ swizzle) << 4) + 8 * kRowBytes) = operand[m / 2][m % 2 * 2 + 1];
          }
        };
        const uint64_t step = static_cast<uint64_t>(tile * (kBlockBytes >> 4));
        if (kind == 2)
          dkv_tile<T, kHeadDim, kBlock, false>(dk, dv, key_operand, value_operand, query_operand + step,
                                               grad_out_operand + step, columns, problem.scale_log2, keep_ds);
        else
          dkv_tile<T, kHeadDim, kBlock, true>(dk, dv, key_operand, value_operand, query_operand + step,
                                              grad_out_operand + step, columns, problem.scale_log2, keep_ds);
      }
      ptx::fence_proxy_async();
      ptx::named_barrier(1, kShortThreads);
      const int tile = 2 * pair + part;
      if (tile < query_tiles) {
        const uint64_t ds = ds_operand + static_cast<uint64_t>((2 * buffer + part) * (kDsBytes >> 4));
#pragma unroll
        for (int half_tile = 0; half_tile < 2; ++half_tile) {
          // 64 keys without a live pair: there is no dS.
          if (kind_of(tile, 2 * key_tile + half_tile) == 0) continue;
          ptx::wgmma_fence();
#pragma unroll
          for (int k = half_tile * kBlock / 16; k < (half_tile + 1) * kBlock / 16; ++k)
            ptx::wgmma<T, kHeadDim, true, true>(dq[pair], ds + row_step(k), key_tile_operand + row_step(k), true);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
        }
      }
      buffer ^= 1;
    }
    const int row0 = block * kBlock + warp_row;
    store_rows<T, kHeadDim>(problem.grad_key, b, h, row0, problem.len_k, dk, problem.scale, lane);
    store_rows<T, kHeadDim>(problem.grad_value, b, h, row0, problem.len_k, dv, 1.0f, lane);
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair)
    store_rows<T, kHeadDim>(problem.grad_query, b, h, (2 * pair + part) * kBlock + warp_row, problem.len_q, dq[pair],
                            problem.scale, lane);
#endif
}

bool aligned(const TensorRef& x) {
  bool able = reinterpret_cast<uintptr_t>(x.ptr) % 16 == 0;
  for (int n = 0; n < 3; ++n) able = able && x.stride[n] % 8 == 0;
  return able;
}

template <typename T>
void run(const AttentionBackwardParams& p, const Problem& problem) {
  ShortProblem short_problem;
  short_problem.common = problem;
  short_problem.out = p.out;
  short_problem.grad_out = p.grad_out;
  short_problem.grad_lse = p.grad_lse;
  short_problem.lse = static_cast<const float*>(p.lse.ptr);
  short_problem.vector = aligned(p.out) && aligned(p.grad_out);
  const Maps maps{panel_map(p.query, p.batch, p.heads_q, p.len_q, p.dim_qk, kBlock),
                  panel_map(p.key, p.batch, p.heads_kv, p.len_k, p.dim_qk, kBlock),
                  panel_map(p.value, p.batch, p.heads_kv, p.len_k, p.dim_v, kBlock),
                  panel_map(p.grad_out, p.batch, p.heads_q, p.len_q, p.dim_v, kBlock)};
  launch("attention_backward_short_hopper_kernel", attention_backward_short_hopper_kernel<T>,
         dim3(static_cast<unsigned>(p.batch * p.heads_q)), dim3(kShortThreads), kSharedBytes, p.stream, maps,
         short_problem);
}

}  // namespace

// With few heads the tiles of the other kernels fill the GPU better.
bool is_short(const AttentionBackwardParams& p) {
  return max64(p.len_q, p.len_k) <= kRows && max64(p.dim_qk, p.dim_v) <= kHeadDim && p.heads_q == p.heads_kv &&
         p.batch * p.heads_q >= device_info().multiprocessors;
}

void run_short(const AttentionBackwardParams& p, const Problem& problem) {
  p.query.dtype == DType::kBFloat16 ? run<bfloat16>(p, problem) : run<half>(p, problem);
}

}  // namespace fastattn::cuda::hopper_backward
