// dK and dV on Hopper; the design is at the head of attention_backward_hopper.cu.
#include "attention_backward_hopper.h"

namespace fastattn::cuda::hopper_backward {
namespace {

template <int HEAD_DIM>
struct DkvTile {
  static constexpr int BN = kStationary;
  // 128 rows at a head dim of 128 would not leave the registers for their scores.
  static constexpr int BM = HEAD_DIM == 64 ? 128 : 64;
  static constexpr int kStages = 4;
  static constexpr int kKeyBytes = BN * HEAD_DIM * 2, kQueryBytes = BM * HEAD_DIM * 2;
  // A stage: queries, gradients of the output, then by rows: shift, delta, and BN / 32 arrays of mask bits.
  static constexpr int kRowsOffset = 2 * kQueryBytes;
  static constexpr int kStageBytes = kRowsOffset + aligned_bytes(BM * 4 * (2 + BN / 32));
  static constexpr int kSlotsOffset = 2 * kKeyBytes + kStages * kStageBytes;
  static constexpr int kBarriersOffset = kSlotsOffset + kStages * static_cast<int>(sizeof(Slot));
  static constexpr int kSharedBytes = kBarriersOffset + (1 + 4 * kStages) * 8;
};

template <typename T, int HEAD_DIM>
FASTATTN_KERNEL(kThreads, 1)
attention_backward_dkv_hopper_kernel(const FASTATTN_GRID_CONSTANT Maps maps,
                                     const FASTATTN_GRID_CONSTANT Problem problem) {
#if FASTATTN_HOPPER
  using Tile = DkvTile<HEAD_DIM>;
  constexpr int BM = Tile::BM, BN = Tile::BN, kStages = Tile::kStages;
  FASTATTN_SHARED(shared);
  unsigned char* const key = shared;
  unsigned char* const value = shared + Tile::kKeyBytes;
  unsigned char* const stages = shared + 2 * Tile::kKeyBytes;
  Slot* const slots = reinterpret_cast<Slot*>(shared + Tile::kSlotsOffset);
  uint64_t* const stationary = reinterpret_cast<uint64_t*>(shared + Tile::kBarriersOffset);
  uint64_t* const listed = stationary + 1;      // the slot of a stage tells what is coming
  uint64_t* const landed = listed + kStages;    // its copies are there
  uint64_t* const prepared = landed + kStages;  // what the mask warps add is there
  uint64_t* const consumed = prepared + kStages;

  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0), lane = static_cast<int>(threadIdx.x % 32);
  const int j0 = static_cast<int>(blockIdx.x % problem.tiles) * BN;
  const int h_kv = static_cast<int>(blockIdx.x / problem.tiles % problem.heads_kv);
  const int b = static_cast<int>(blockIdx.x / problem.tiles / problem.heads_kv);
  const int group = problem.heads_q / problem.heads_kv;

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(stationary, 1);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(listed + s, 1);
      ptx::mbarrier_init(landed + s, 1);
      ptx::mbarrier_init(prepared + s, kMaskWarps);
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
      if (lane == 0) {
        ptx::mbarrier_arrive_expect_tx(stationary, 2 * Tile::kKeyBytes);
        load_panels<HEAD_DIM, BN>(key, maps.key, stationary, j0, h_kv, b);
        load_panels<HEAD_DIM, BN>(value, maps.value, stationary, j0, h_kv, b);
      }
      for (int h = h_kv * group; h < (h_kv + 1) * group; ++h) {
        QueryTiles<BM, BN> tiles(problem.mask, problem.summary, b, h, j0, problem.len_q, problem.len_k);
        int tile;
        bool full;
        while (tiles.next(tile, full)) {
          if (lane == 0) {
            unsigned char* const query = stages + stage * Tile::kStageBytes;
            ptx::mbarrier_wait(consumed + stage, phase ^ 1);
            slots[stage] = {full ? kFull : kPartial, tile, h};
            ptx::mbarrier_arrive(listed + stage);
            ptx::mbarrier_arrive_expect_tx(landed + stage, 2 * Tile::kQueryBytes);
            load_panels<HEAD_DIM, BM>(query, maps.query, landed + stage, tile * BM, h, b);
            load_panels<HEAD_DIM, BM>(query + Tile::kQueryBytes, maps.grad_out, landed + stage, tile * BM, h, b);
          }
          __syncwarp();
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
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
        if (slot.kind == kEnd) {
          if (lane == 0) ptx::mbarrier_arrive(prepared + stage);
          break;
        }
        unsigned char* const query = stages + stage * Tile::kStageBytes;
        float* const shift = reinterpret_cast<float*>(query + Tile::kRowsOffset);
        float* const delta = shift + BM;
        uint32_t* const bits = reinterpret_cast<uint32_t*>(delta + BM);
#pragma unroll 1
        for (int row0 = (warp - kMaskWarp) * 32; row0 < BM; row0 += kMaskThreads) {
          // A row that does not exist is zero in both operands; its probabilities must be zero too.
          const int row = row0 + lane, i = slot.tile * BM + row;
          const int64_t at = (static_cast<int64_t>(b) * problem.heads_q + slot.head) * problem.len_q + i;
          shift[row] = i < problem.len_q ? problem.shift[at] : INFINITY;
          delta[row] = i < problem.len_q ? problem.delta[at] : 0.0f;
          if (slot.kind == kFull) continue;
          uint64_t any = 0;
#pragma unroll 1
          for (int c = 0; c < BN / 64; ++c) {
            const uint64_t word = row_word(problem.mask, problem.summary, b, slot.head, i, j0 + 64 * c, problem.len_k);
            bits[2 * c * BM + row] = static_cast<uint32_t>(word);
            bits[(2 * c + 1) * BM + row] = static_cast<uint32_t>(word >> 32);
            any |= word;
          }
          // A query that attends to none of these keys may be NaN, and 0 * NaN would reach the sums over queries.
          const uint32_t dead = __ballot_sync(~0u, any == 0);
          if (dead) {
            ptx::mbarrier_wait(landed + stage, phase);
            zero_rows<HEAD_DIM, BM>(query, row0, dead, lane);
            zero_rows<HEAD_DIM, BM>(query + Tile::kQueryBytes, row0, dead, lane);
            ptx::fence_proxy_async();
          }
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(prepared + stage);
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const int part = warp / 4 - 1, warp_row = warp % 4 * 16;
    float dk[HEAD_DIM / 2], dv[HEAD_DIM / 2];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 2; ++n) dk[n] = dv[n] = 0.0f;
    const uint64_t key_operand = ptx::smem_descriptor(key + part * 64 * kRowBytes, BM * kRowBytes, 8 * kRowBytes);
    const uint64_t value_operand = key_operand + (Tile::kKeyBytes >> 4);
    const uint64_t first_query = ptx::smem_descriptor(stages, BM * kRowBytes, 8 * kRowBytes);
    ptx::mbarrier_wait(stationary, 0);
    int stage = 0;
    uint32_t phase = 0;
    while (true) {
      ptx::mbarrier_wait(prepared + stage, phase);
      const uint32_t kind = __shfl_sync(~0u, slots[stage].kind, 0);
      if (kind == kEnd) break;
      const uint64_t query = first_query + static_cast<uint64_t>(stage * (Tile::kStageBytes >> 4));
      const float* const rows = reinterpret_cast<const float*>(stages + stage * Tile::kStageBytes + Tile::kRowsOffset);
      Columns columns;
      columns.shift = rows + 2 * (lane % 4);
      columns.delta = columns.shift + BM;
      columns.bits = reinterpret_cast<const uint32_t*>(columns.delta + BM) + (2 * part + warp_row / 32) * BM;
      columns.low = 1u << (warp_row % 32 + lane / 4);
      columns.high = columns.low << 8;
      ptx::mbarrier_wait(landed + stage, phase);
      const uint64_t grad_out = query + (Tile::kQueryBytes >> 4);
      const auto nothing = [](const auto&) {};
      if (kind == kFull)
        dkv_tile<T, HEAD_DIM, BM, false>(dk, dv, key_operand, value_operand, query, grad_out, columns,
                                         problem.scale_log2, nothing);
      else
        dkv_tile<T, HEAD_DIM, BM, true>(dk, dv, key_operand, value_operand, query, grad_out, columns,
                                        problem.scale_log2, nothing);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(consumed + stage);
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
    const int row0 = j0 + part * 64 + warp_row;
    store_rows<T, HEAD_DIM>(problem.grad_key, b, h_kv, row0, problem.len_k, dk, problem.scale, lane);
    store_rows<T, HEAD_DIM>(problem.grad_value, b, h_kv, row0, problem.len_k, dv, 1.0f, lane);
  }
#endif
}

template <typename T, int HEAD_DIM>
void run(const AttentionBackwardParams& p, Problem problem) {
  using Tile = DkvTile<HEAD_DIM>;
  problem.tiles = static_cast<int>(ceil_div(p.len_k, Tile::BN));
  const Maps maps{panel_map(p.query, p.batch, p.heads_q, p.len_q, p.dim_qk, Tile::BM),
                  panel_map(p.key, p.batch, p.heads_kv, p.len_k, p.dim_qk, Tile::BN),
                  panel_map(p.value, p.batch, p.heads_kv, p.len_k, p.dim_v, Tile::BN),
                  panel_map(p.grad_out, p.batch, p.heads_q, p.len_q, p.dim_v, Tile::BM)};
  launch("attention_backward_dkv_hopper_kernel", attention_backward_dkv_hopper_kernel<T, HEAD_DIM>,
         dim3(static_cast<unsigned>(dkv_blocks(p))), dim3(kThreads), Tile::kSharedBytes, p.stream, maps, problem);
}

}  // namespace

int64_t dkv_blocks(const AttentionBackwardParams& p) { return ceil_div(p.len_k, kStationary) * p.heads_kv * p.batch; }

void run_dkv(const AttentionBackwardParams& p, Problem problem) {
  const bool small = padded_head_dim(p) == 64;
  if (p.query.dtype == DType::kBFloat16)
    small ? run<bfloat16, 64>(p, problem) : run<bfloat16, 128>(p, problem);
  else
    small ? run<half, 64>(p, problem) : run<half, 128>(p, problem);
}

}  // namespace fastattn::cuda::hopper_backward
