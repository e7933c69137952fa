// dQ on Hopper; the design is at the head of attention_backward_hopper.cu.
#include "attention_backward_hopper.h"

namespace fastattn::cuda::hopper_backward {
namespace {

template <int HEAD_DIM>
struct DqTile {
  static constexpr int BM = kStationary, BN = 128;
  static constexpr int kStages = HEAD_DIM == 64 ? 4 : 2;
  static constexpr int kQueryBytes = BM * HEAD_DIM * 2, kKeyBytes = BN * HEAD_DIM * 2;
  // A stage: keys, values, and the mask words of the queries.
  static constexpr int kWordsOffset = 2 * kKeyBytes;
  static constexpr int kStageBytes = kWordsOffset + aligned_bytes(BM * BN / 8);
  static constexpr int kSlotsOffset = 2 * kQueryBytes + kStages * kStageBytes;
  static constexpr int kBarriersOffset = kSlotsOffset + kStages * static_cast<int>(sizeof(Slot));
  static constexpr int kSharedBytes = kBarriersOffset + (1 + 5 * kStages) * 8;
  static_assert(BN == kMaskWarps * 64, "a mask warp owns 64 keys");
};

#if FASTATTN_HOPPER

// One tile of 64 queries x BN keys. words: of the thread's two rows, those of row 8 behind kStep words.
template <typename T, int HEAD_DIM, bool MASKED>
FASTATTN_DEVICE void dq_tile(float (&dq)[HEAD_DIM / 2], uint64_t query, uint64_t grad_out, uint64_t key, uint64_t value,
                             uint64_t* value_consumed, const uint32_t* words, const float (&shift)[2],
                             const float (&delta)[2], float scale_log2, int lane) {
  constexpr int BN = DqTile<HEAD_DIM>::BN;
  float p[BN / 2], ds[BN / 2];  // [64 queries, BN keys]: scores, then probabilities; dP, then dS
  ptx::wgmma_fence();
  scores<T, HEAD_DIM, BN>(p, query, key);
  ptx::wgmma_commit();
  scores<T, HEAD_DIM, BN>(ds, grad_out, value);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
#pragma unroll
  for (int n = 0; n < BN / 2; ++n) p[n] = ptx::ex2(p[n] * scale_log2 - shift[n / 2 % 2]);
  ptx::wgmma_wait<0>();
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(value_consumed);
  uint32_t bits[2] = {~0u, ~0u};
#pragma unroll
  for (int n = 0; n < BN / 8; ++n) {
    if constexpr (MASKED) {
      if (n % 4 == 0) {
        bits[0] = words[n / 4] >> 2 * (lane % 4);
        bits[1] = words[8 * (BN / 32) + n / 4] >> 2 * (lane % 4);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float gradient = p[4 * n + e] * (ds[4 * n + e] - delta[e / 2]);
      // Selected: key and value of a key that is not attended to may be NaN.
      ds[4 * n + e] = !MASKED || (bits[e / 2] >> (n % 4 * 8 + e % 2) & 1) ? gradient : 0.0f;
    }
  }
  uint32_t operand[BN / 16][4];
  pack<T, BN>(operand, ds);
  ptx::wgmma_fence();
  accumulate<T, HEAD_DIM, BN>(dq, operand, key);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

#endif

template <typename T, int HEAD_DIM>
FASTATTN_KERNEL(kThreads, 1)
attention_backward_dq_hopper_kernel(const FASTATTN_GRID_CONSTANT Maps maps,
                                    const FASTATTN_GRID_CONSTANT Problem problem) {
#if FASTATTN_HOPPER
  using Tile = DqTile<HEAD_DIM>;
  constexpr int BM = Tile::BM, BN = Tile::BN, kStages = Tile::kStages;
  FASTATTN_SHARED(shared);
  unsigned char* const query = shared;
  unsigned char* const grad_out = shared + Tile::kQueryBytes;
  unsigned char* const stages = shared + 2 * Tile::kQueryBytes;
  Slot* const slots = reinterpret_cast<Slot*>(shared + Tile::kSlotsOffset);
  uint64_t* const stationary = reinterpret_cast<uint64_t*>(shared + Tile::kBarriersOffset);
  uint64_t* const listed = stationary + 1;              // the slot of a stage tells what is coming
  uint64_t* const landed = listed + kStages;            // its copies are there
  uint64_t* const prepared = landed + kStages;          // what the mask warps add is there
  uint64_t* const value_consumed = prepared + kStages;  // earlier than the rest: the next values can come
  uint64_t* const consumed = value_consumed + kStages;

  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0), lane = static_cast<int>(threadIdx.x % 32);
  // The last queries first: under a causal mask they have the most keys.
  const int i0 = (problem.tiles - 1 - static_cast<int>(blockIdx.x % problem.tiles)) * BM;
  const int h = static_cast<int>(blockIdx.x / problem.tiles % problem.heads_q);
  const int b = static_cast<int>(blockIdx.x / problem.tiles / problem.heads_q);

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(stationary, 1);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(listed + s, 1);
      ptx::mbarrier_init(landed + s, 1);
      ptx::mbarrier_init(prepared + s, kMaskWarps);
      ptx::mbarrier_init(value_consumed + s, kConsumerThreads / 32);
      ptx::mbarrier_init(consumed + s, kConsumerThreads / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    int stage = 0;
    uint32_t phase = 0;
    if (warp == kCopyWarp) {
      const int h_kv = h / (problem.heads_q / problem.heads_kv);
      if (lane == 0) {
        ptx::mbarrier_arrive_expect_tx(stationary, 2 * Tile::kQueryBytes);
        load_panels<HEAD_DIM, BM>(query, maps.query, stationary, i0, h, b);
        load_panels<HEAD_DIM, BM>(grad_out, maps.grad_out, stationary, i0, h, b);
      }
      KeyTiles<BM, BN> tiles(problem.mask, problem.summary, b, h, i0, problem.len_q, problem.len_k);
      int tile;
      bool full;
      while (tiles.next(tile, full)) {
        if (lane == 0) {
          unsigned char* const key = stages + stage * Tile::kStageBytes;
          ptx::mbarrier_wait(value_consumed + stage, phase ^ 1);
          ptx::mbarrier_expect_tx(landed + stage, Tile::kKeyBytes);
          load_panels<HEAD_DIM, BN>(key + Tile::kKeyBytes, maps.value, landed + stage, tile * BN, h_kv, b);
          ptx::mbarrier_wait(consumed + stage, phase ^ 1);
          slots[stage] = {full ? kFull : kPartial, tile, h};
          ptx::mbarrier_arrive(listed + stage);
          ptx::mbarrier_arrive_expect_tx(landed + stage, Tile::kKeyBytes);
          load_panels<HEAD_DIM, BN>(key, maps.key, landed + stage, tile * BN, h_kv, b);
        }
        __syncwarp();
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      if (lane == 0) {
        ptx::mbarrier_wait(consumed + stage, phase ^ 1);
        slots[stage] = {kEnd, 0, 0};
        ptx::mbarrier_arrive(listed + stage);
      }
    } else if (warp >= kMaskWarp) {
      while (true) {
        ptx::mbarrier_wait(listed + stage, phase);
        const Slot slot = slots[stage];
        if (slot.kind == kPartial) {
          // Each warp has 64 keys.
          const int part = warp - kMaskWarp;
          unsigned char* const key = stages + stage * Tile::kStageBytes;
          uint64_t* const words = reinterpret_cast<uint64_t*>(key + Tile::kWordsOffset);
          uint64_t any = 0;
#pragma unroll 1
          for (int row = lane; row < BM; row += 32) {
            const uint64_t word =
                row_word(problem.mask, problem.summary, b, h, i0 + row, slot.tile * BN + part * 64, problem.len_k);
            words[row * (BN / 64) + part] = word;
            any |= word;
          }
          // A key that no query of the tile attends to may be NaN, and 0 * NaN would reach the sums over keys. Keys
          // beyond the last are zero already.
          const uint64_t all = __reduce_or_sync(~0u, static_cast<uint32_t>(any)) |
                               uint64_t{__reduce_or_sync(~0u, static_cast<uint32_t>(any >> 32))} << 32;
          const uint64_t dead = ~all & bits_before(problem.len_k, slot.tile * BN + part * 64);
          if (dead) {
            ptx::mbarrier_wait(landed + stage, phase);
            zero_rows<HEAD_DIM, BN>(key, part * 64, static_cast<uint32_t>(dead), lane);
            zero_rows<HEAD_DIM, BN>(key, part * 64 + 32, static_cast<uint32_t>(dead >> 32), lane);
            ptx::fence_proxy_async();
          }
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(prepared + stage);
        if (slot.kind == kEnd) break;
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const int part = warp / 4 - 1, row0 = part * 64 + warp % 4 * 16, row = row0 + lane / 4;
    float dq[HEAD_DIM / 2], shift[2], delta[2];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 2; ++n) dq[n] = 0.0f;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      // A row that does not exist has no probabilities.
      const int i = i0 + row + 8 * n;
      const int64_t at = (static_cast<int64_t>(b) * problem.heads_q + h) * problem.len_q + i;
      shift[n] = i < problem.len_q ? problem.shift[at] : INFINITY;
      delta[n] = i < problem.len_q ? problem.delta[at] : 0.0f;
    }
    const uint64_t query_operand = ptx::smem_descriptor(query + part * 64 * kRowBytes, BN * kRowBytes, 8 * kRowBytes);
    const uint64_t grad_out_operand = query_operand + (Tile::kQueryBytes >> 4);
    const uint64_t first_key = ptx::smem_descriptor(stages, BN * kRowBytes, 8 * kRowBytes);
    ptx::mbarrier_wait(stationary, 0);
    int stage = 0;
    uint32_t phase = 0;
    while (true) {
      ptx::mbarrier_wait(prepared + stage, phase);
      const uint32_t kind = __shfl_sync(~0u, slots[stage].kind, 0);
      if (kind == kEnd) break;
      ptx::mbarrier_wait(landed + stage, phase);
      const uint64_t key = first_key + static_cast<uint64_t>(stage * (Tile::kStageBytes >> 4));
      const uint64_t value = key + (Tile::kKeyBytes >> 4);
      const uint32_t* const words =
          reinterpret_cast<const uint32_t*>(stages + stage * Tile::kStageBytes + Tile::kWordsOffset) + row * (BN / 32);
      if (kind == kFull)
        dq_tile<T, HEAD_DIM, false>(dq, query_operand, grad_out_operand, key, value, value_consumed + stage, words,
                                    shift, delta, problem.scale_log2, lane);
      else
        dq_tile<T, HEAD_DIM, true>(dq, query_operand, grad_out_operand, key, value, value_consumed + stage, words,
                                   shift, delta, problem.scale_log2, lane);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(consumed + stage);
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
    store_rows<T, HEAD_DIM>(problem.grad_query, b, h, i0 + row0, problem.len_q, dq, problem.scale, lane);
  }
#endif
}

template <typename T, int HEAD_DIM>
void run(const AttentionBackwardParams& p, Problem problem) {
  using Tile = DqTile<HEAD_DIM>;
  problem.tiles = static_cast<int>(ceil_div(p.len_q, Tile::BM));
  const Maps maps{panel_map(p.query, p.batch, p.heads_q, p.len_q, p.dim_qk, Tile::BM),
                  panel_map(p.key, p.batch, p.heads_kv, p.len_k, p.dim_qk, Tile::BN),
                  panel_map(p.value, p.batch, p.heads_kv, p.len_k, p.dim_v, Tile::BN),
                  panel_map(p.grad_out, p.batch, p.heads_q, p.len_q, p.dim_v, Tile::BM)};
  launch("attention_backward_dq_hopper_kernel", attention_backward_dq_hopper_kernel<T, HEAD_DIM>,
         dim3(static_cast<unsigned>(dq_blocks(p))), dim3(kThreads), Tile::kSharedBytes, p.stream, maps, problem);
}

}  // namespace

int64_t dq_blocks(const AttentionBackwardParams& p) { return ceil_div(p.len_q, kStationary) * p.heads_q * p.batch; }

void run_dq(const AttentionBackwardParams& p, Problem problem) {
  const bool small = padded_head_dim(p) == 64;
  if (p.query.dtype == DType::kBFloat16)
    small ? run<bfloat16, 64>(p, problem) : run<bfloat16, 128>(p, problem);
  else
    small ? run<half, 64>(p, problem) : run<half, 128>(p, problem);
}

}  // namespace fastattn::cuda::hopper_backward
