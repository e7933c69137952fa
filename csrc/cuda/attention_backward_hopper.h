// What the two kernels of the Hopper backward share. The design is at the head of attention_backward_hopper.cu.
#pragma once

#include "../core/params.h"
#include "hopper.h"
#include "mask.h"
#include "platform.h"

namespace fastattn::cuda::hopper_backward {

// Threads of a block: a warpgroup that feeds, and two that compute 64 rows of the stationary tile each.
inline constexpr int kConsumers = 2;
inline constexpr int kConsumerThreads = kConsumers * 128;
inline constexpr int kThreads = 128 + kConsumerThreads;
// Warps of the feeding warpgroup: the copies are issued by warp 0; warps 2 and 3 prepare what a tile needs beside its
// copies. A thread starts with 168 registers; 56 + 2 * 224 = 3 * 168.
inline constexpr int kCopyWarp = 0, kMaskWarp = 2, kMaskWarps = 2, kMaskThreads = kMaskWarps * 32;
inline constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

// Rows of the stationary tile, of keys or of queries.
inline constexpr int kStationary = kConsumers * 64;

// Operands lie in panels of 64 columns: rows of 128 bytes, swizzled by the copy engine and read so by wgmma.
inline constexpr int kPanelColumns = 64, kRowBytes = 128;

// Operands start at multiples of 1024 bytes, where the swizzle pattern starts.
constexpr int aligned_bytes(int bytes) { return (bytes + 1023) / 1024 * 1024; }

// What the copy warp says of a stage.
enum SlotKind : uint32_t { kEnd = 0, kPartial = 1, kFull = 2 };
struct alignas(16) Slot {
  uint32_t kind;
  int tile, head;  // the streamed tile; head: of the queries
};

// A gradient to be written.
struct Gradient {
  TensorRef to;
  int dim;
  bool vector;  // 16 bytes at a time
};

struct Problem {
  MaskParams mask;
  MaskSummary summary;
  const float *shift, *delta;  // [B, Hq, L], see attention_backward_delta.h
  Gradient grad_query, grad_key, grad_value;
  int heads_q, heads_kv, len_q, len_k;
  int tiles;                // stationary tiles of one head
  float scale, scale_log2;  // scale_log2 = scale * log2(e)
};

// Query, key, value and grad_out. Boxes have kPanelColumns columns, and the rows that the kernel copies at once.
struct Maps {
  TensorMap query, key, value, grad_out;
};

int64_t dkv_blocks(const AttentionBackwardParams& params);
int64_t dq_blocks(const AttentionBackwardParams& params);
void run_dkv(const AttentionBackwardParams& params, Problem problem);
void run_dq(const AttentionBackwardParams& params, Problem problem);

// Short sequences: one kernel for all three gradients, without shift and delta in global memory.
bool is_short(const AttentionBackwardParams& params);
void run_short(const AttentionBackwardParams& params, const Problem& problem);

// The head dim of the instance that serves the problem.
static inline int padded_head_dim(const AttentionParams& p) { return max64(p.dim_qk, p.dim_v) <= 64 ? 64 : 128; }

static inline TensorMap panel_map(const TensorRef& x, int64_t batch, int64_t heads, int64_t rows, int64_t dim,
                                  int box_rows) {
  const int64_t dims[4] = {batch, heads, rows, dim};
  return make_tensor_map(x, dims, box_rows, kPanelColumns);
}

#if FASTATTN_HOPPER

// The panels of ROWS rows from `row` of head (b, h); one thread. The barrier expects ROWS * HEAD_DIM elements.
template <int HEAD_DIM, int ROWS>
FASTATTN_DEVICE void load_panels(unsigned char* operand, const TensorMap& map, uint64_t* barrier, int row, int h,
                                 int b) {
#pragma unroll
  for (int panel = 0; panel < HEAD_DIM / kPanelColumns; ++panel)
    ptx::tma_load_4d(operand + panel * ROWS * kRowBytes, &map, barrier, panel * kPanelColumns, row, h, b);
}

// Byte offset, in descriptor units, of step `k` (16 columns) of an operand of `rows` rows whose columns are summed
// over.
template <int ROWS>
FASTATTN_DEVICE constexpr uint64_t column_step(int k) {
  return static_cast<uint64_t>((k / 4 * ROWS * kRowBytes + k % 4 * 32) >> 4);
}

// The same where its rows are summed over: 16 rows.
FASTATTN_DEVICE constexpr uint64_t row_step(int k) { return static_cast<uint64_t>((k * 16 * kRowBytes) >> 4); }

// c += A B, or c = A B: one product of a tile. A is stationary and read by columns, B has N rows and HEAD_DIM columns.
template <typename T, int HEAD_DIM, int N>
FASTATTN_DEVICE void scores(float (&c)[N / 2], uint64_t a, uint64_t b) {
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; ++k)
    ptx::wgmma<T, N, false>(c, a + column_step<kStationary>(k), b + column_step<N>(k), k > 0);
}

// c [64, HEAD_DIM] += A [64, ROWS] B [ROWS, HEAD_DIM], A in registers.
template <typename T, int HEAD_DIM, int ROWS>
FASTATTN_DEVICE void accumulate(float (&c)[HEAD_DIM / 2], const uint32_t (&a)[ROWS / 16][4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < ROWS / 16; ++k) ptx::wgmma_rs<T, HEAD_DIM, true>(c, a[k], b + row_step(k), true);
}

// Fragments of a 64 x N result: thread t of a warpgroup has, of the rows 16 (t / 32) + t % 32 / 4 + {0, 8}, the columns
// 8 n + 2 (t % 4) + {0, 1}, as c[4 n + 2 row + column]. Those of an operand A in registers are the same, 16 columns a
// step.
template <typename T, int N>
FASTATTN_DEVICE void pack(uint32_t (&a)[N / 16][4], const float (&c)[N / 2]) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    a[n / 2][n % 2 * 2] = pack2<T>(c[4 * n], c[4 * n + 1]);
    a[n / 2][n % 2 * 2 + 1] = pack2<T>(c[4 * n + 2], c[4 * n + 3]);
  }
}

// In each four neighbouring lanes, word m of lane t and word t of lane m change places.
FASTATTN_DEVICE void transpose_quad(uint32_t (&v)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int m = 0; m < 4; m += 2) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? v[m] : v[m + 1], 1);
    (odd ? v[m] : v[m + 1]) = other;
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const uint32_t other = __shfl_xor_sync(~0u, upper ? v[m] : v[m + 2], 2);
    (upper ? v[m] : v[m + 2]) = other;
  }
}

// factor * c to rows row0 .. of (b, h); rows at or beyond `rows` do not exist.
template <typename T, int HEAD_DIM>
FASTATTN_DEVICE void store_rows(const Gradient& gradient, int b, int h, int row0, int rows,
                                const float (&c)[HEAD_DIM / 2], float factor, int lane) {
  const TensorRef& x = gradient.to;
#pragma unroll
  for (int half_tile = 0; half_tile < 2; ++half_tile) {
    const int row = row0 + lane / 4 + 8 * half_tile;
    T* const out = static_cast<T*>(x.ptr) + b * x.stride[0] + h * x.stride[1] + row * x.stride[2];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        words[m] = pack2<T>(factor * c[4 * (n + m) + 2 * half_tile], factor * c[4 * (n + m) + 2 * half_tile + 1]);
      if (gradient.vector) {
        transpose_quad(words, lane);
        const int d = 8 * (n + lane % 4);
        if (row < rows && d < gradient.dim)
          *reinterpret_cast<uint4*>(out + d) = make_uint4(words[0], words[1], words[2], words[3]);
        continue;
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int d = 8 * (n + m) + 2 * (lane % 4);
        if (row >= rows || d >= gradient.dim) continue;
        if (d + 1 < gradient.dim)
          *reinterpret_cast<uint32_t*>(out + d) = words[m];
        else
          out[d] = T{static_cast<uint16_t>(words[m])};
      }
    }
  }
}

// Zeroes those rows of a [ROWS, HEAD_DIM] operand, of 32 rows from row0, whose bit is set. By one warp.
template <int HEAD_DIM, int ROWS>
FASTATTN_DEVICE void zero_rows(unsigned char* operand, int row0, uint32_t dead, int lane) {
  constexpr int kChunks = HEAD_DIM / 8;  // of 16 bytes, in a row
  for (; dead; dead &= dead - 1) {
    const int row = row0 + __ffs(static_cast<int>(dead)) - 1;
    if (lane < kChunks)
      *reinterpret_cast<uint4*>(operand + lane / 8 * ROWS * kRowBytes + row * kRowBytes + lane % 8 * 16) =
          make_uint4(0, 0, 0, 0);
  }
}

// What a thread reads of a stage beside the operands: its columns, two neighbours in each group of 8.
struct Columns {
  const float *shift, *delta;
  const uint32_t* bits;  // of the keys of its warp's half word
  uint32_t low, high;    // the bits of its two key rows
};

// One tile of 64 keys x BM queries. S^T and dP^T have the keys as rows, so P^T and dS^T leave the first products where
// the second ones want them: in registers, as their left operand. keep_ds gets dS^T, packed.
template <typename T, int HEAD_DIM, int BM, bool MASKED, typename Keep>
FASTATTN_DEVICE void dkv_tile(float (&dk)[HEAD_DIM / 2], float (&dv)[HEAD_DIM / 2], uint64_t key, uint64_t value,
                              uint64_t query, uint64_t grad_out, const Columns& columns, float scale_log2,
                              const Keep& keep_ds) {
  float p[BM / 2], ds[BM / 2];  // [64 keys, BM queries]: scores, then probabilities; dP, then dS
  ptx::wgmma_fence();
  scores<T, HEAD_DIM, BM>(p, key, query);
  ptx::wgmma_commit();
  scores<T, HEAD_DIM, BM>(ds, value, grad_out);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
#pragma unroll
  for (int n = 0; n < BM / 8; ++n) {
    const float2 shift = *reinterpret_cast<const float2*>(columns.shift + 8 * n);
    p[4 * n] = ptx::ex2(p[4 * n] * scale_log2 - shift.x);
    p[4 * n + 1] = ptx::ex2(p[4 * n + 1] * scale_log2 - shift.y);
    p[4 * n + 2] = ptx::ex2(p[4 * n + 2] * scale_log2 - shift.x);
    p[4 * n + 3] = ptx::ex2(p[4 * n + 3] * scale_log2 - shift.y);
  }
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int n = 0; n < BM / 8; ++n) {
    const float2 delta = *reinterpret_cast<const float2*>(columns.delta + 8 * n);
    ds[4 * n] = p[4 * n] * (ds[4 * n] - delta.x);
    ds[4 * n + 1] = p[4 * n + 1] * (ds[4 * n + 1] - delta.y);
    ds[4 * n + 2] = p[4 * n + 2] * (ds[4 * n + 2] - delta.x);
    ds[4 * n + 3] = p[4 * n + 3] * (ds[4 * n + 3] - delta.y);
    if constexpr (MASKED) {
      // Selected, both: key and value of a key that is not attended to may be NaN.
      const uint2 bits = *reinterpret_cast<const uint2*>(columns.bits + 8 * n);
      p[4 * n] = bits.x & columns.low ? p[4 * n] : 0.0f;
      p[4 * n + 1] = bits.y & columns.low ? p[4 * n + 1] : 0.0f;
      p[4 * n + 2] = bits.x & columns.high ? p[4 * n + 2] : 0.0f;
      p[4 * n + 3] = bits.y & columns.high ? p[4 * n + 3] : 0.0f;
      ds[4 * n] = bits.x & columns.low ? ds[4 * n] : 0.0f;
      ds[4 * n + 1] = bits.y & columns.low ? ds[4 * n + 1] : 0.0f;
      ds[4 * n + 2] = bits.x & columns.high ? ds[4 * n + 2] : 0.0f;
      ds[4 * n + 3] = bits.y & columns.high ? ds[4 * n + 3] : 0.0f;
    }
  }
  uint32_t p_operand[BM / 16][4], ds_operand[BM / 16][4];
  pack<T, BM>(p_operand, p);
  pack<T, BM>(ds_operand, ds);
  keep_ds(ds_operand);
  ptx::wgmma_fence();
  accumulate<T, HEAD_DIM, BM>(dv, p_operand, grad_out);
  accumulate<T, HEAD_DIM, BM>(dk, ds_operand, query);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

#endif

}  // namespace fastattn::cuda::hopper_backward
