// Attention forward on Hopper (sm_90a), bfloat16 and float16: O = softmax(scale Q K^T) V by TMA and wgmma. No bias and no
// dropout: those problems, and the ones whose strides TMA cannot take, are the portable kernel's.
//
// A block is one load and mask warpgroup and two or three consumer warpgroups of 64 query rows, and stays on its
// multiprocessor: it takes query tiles off a counter in the workspace until none is left. The order is by sections of heads
// whose K and V fit into L2 together, and in a section the last query tiles first, which under a causal mask are the longest.
//
//     warp 0          walks the live key tiles; TMA of Q once per item, of K and V into a ring of stages
//     warps 1, 2      64 keys of a tile each; in a partial tile: the mask words of every row into shared memory, and zeros
//                     over the rows of V that no query of the tile attends to, because 0 * NaN is NaN
//     consumers       S [64, kBlockN] = Q K^T        both from shared memory
//                     P = 2^(c (S - m))              in registers: the fragment of S is the fragment of the A operand of
//                     O [64, kHeadDim] += P V        V from shared memory as it lies, by the transposing descriptor
//
// Q K^T of the next tile and P V of this one are in flight together while the softmax of the next waits only for the first;
// and the warpgroups take turns in issuing, so that one's softmax runs beside another's products. K is free as soon as
// its scores are there, V a tile later, so the two have their own barriers and are loaded in the order K0 Q K1 V0 K2 V1 ...
//
// A full tile runs no mask code: the consumers look at one flag, and do not wait for the mask warps. In a partial tile a
// thread reads the words of its two rows and shifts them once; the bits it needs are then at constant positions.
//
//     head dim   rows x keys   stages   registers (load, consumer)   shared memory   limits of the scores and products
//     <=  64     192 x 128     4         32, 160                     165 KB          exponentials and products alike
//     <=  96     128 x 128     2        104, 200                     165 KB          products 1.5 x exponentials
//     <= 128     128 x 128     2        104, 200                     165 KB          products 2 x
//     <= 192     128 x  64     2         88, 208                     147 KB          products 3 x
//     <= 256     128 x  64     2         88, 208                     195 KB          products 4 x
//
// The last column: a pair of query and key takes head dim / 1024 cycles of the tensor cores (4 head dim operations at 4096 a
// cycle) and 1 / 16 cycle of the unit that does exp2. A key tile is read once for all rows of a block, so a byte of K and V
// serves as many operations as there are rows: from L2, 128 rows want 32 bytes a cycle at the peak of the products and 192
// rows 21. The targets are those of cuDNN, 0.6 of the peak at 64 and 0.85 at 128 and 256, which is 13 and 27 bytes a cycle.
//
// 24 registers of a consumer are beside the matrices (at 64: S 64, P 32, O 32), which is why three consumers leave 32 to the
// load warpgroup: a few bytes of its cursor over the tiles are spilled there, and nothing in the consumers.
#include "hopper.h"
#include "kernels.h"
#include "mask.h"
#include "platform.h"
#include "ptx.h"

#include "../core/softmax.h"

namespace fastattn::cuda {
namespace {

constexpr int kWarpgroup = 128;  // threads
constexpr int kAtom = 64;        // elements of a 128-byte row, the width of a swizzled box
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

template <int kHeadDim>
struct Shape {
  static constexpr int kWidth = (kHeadDim + kAtom - 1) / kAtom * kAtom;  // of a row in shared memory
  static constexpr int kConsumers = kHeadDim <= 64 ? 3 : 2;
  static constexpr int kBlockM = kConsumers * 64;
  static constexpr int kBlockN = kHeadDim <= 128 ? 128 : 64;
  static constexpr int kStages = kHeadDim <= 64 ? 4 : 2;
  static constexpr int kColumns = kBlockN / kWordKeys;  // mask words of a row, and mask warps
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  // Registers of a thread; the sum over the warpgroups is what the block was given at its launch.
  static constexpr int kLoadRegisters = kHeadDim <= 64 ? 32 : kHeadDim <= 128 ? 104 : 88;
  static constexpr int kConsumerRegisters = kHeadDim <= 64 ? 160 : kHeadDim <= 128 ? 200 : 208;
  // Beyond, the products are long enough beside the softmax.
  static constexpr bool kTurns = kHeadDim <= 128;
};

struct Item {
  int b, h, h_kv;
  int64_t i0;
};

// Boxes of kAtom columns, one after the other: [kWidth / kAtom][rows][kAtom], rows of 128 bytes swizzled by TMA.
template <typename T, int kHeadDim>
struct alignas(1024) Shared {
  using S = Shape<kHeadDim>;
  T query[S::kBlockM * S::kWidth];
  T key[S::kStages][S::kBlockN * S::kWidth];
  T value[S::kStages][S::kBlockN * S::kWidth];
  uint64_t words[S::kStages][S::kBlockM][S::kColumns];  // of a partial tile
  uint64_t query_full, query_empty;
  uint64_t key_full[S::kStages], key_empty[S::kStages];
  uint64_t value_full[S::kStages], value_empty[S::kStages];
  uint64_t words_ready[S::kStages], value_ready[S::kStages];
  // Written by the load warp before it arms query_full / key_full, free with query_empty / key_empty.
  int32_t item;       // -1: no more
  Item place;         // of the item
  int32_t item_live;  // it has a live key tile
  int32_t tile[S::kStages];  // key tile * 4 + kLast + kFull
};

constexpr int kFull = 1, kLast = 2;

struct Arguments {
  MaskParams mask;
  MaskSummary summary;
  void* out;
  int64_t stride_ob, stride_oh, stride_om;
  float* lse;
  int32_t* counter;
  int64_t len_q, len_k;
  int32_t dim_v;
  int32_t heads_q, group;  // group: query heads of a key head
  int32_t items, tiles_m, heads, section_heads;  // heads: of all batches
  float scale, scale_log2;
  bool vector_store;
};

template <int kBlockM>
FASTATTN_DEVICE Item item_at(const Arguments& a, int n) {
  const int section = n / (a.section_heads * a.tiles_m), in_section = n % (a.section_heads * a.tiles_m);
  const int first_head = section * a.section_heads, heads = min(a.section_heads, a.heads - first_head);
  const int head = first_head + in_section % heads, tile = a.tiles_m - 1 - in_section / heads;
  Item item;
  item.b = head / a.heads_q;
  item.h = head % a.heads_q;
  item.h_kv = item.h / a.group;
  item.i0 = static_cast<int64_t>(tile) * kBlockM;
  return item;
}

// The number of a tile, counted over all items of the block: its stage in the ring, and the parity of the phase in which the
// stage holds it. A consumer waits for that parity on the full barrier, a producer for the opposite on the empty one, which a
// fresh barrier grants at once.
template <int kStages>
struct Ring {
  static_assert((kStages & (kStages - 1)) == 0, "the division is a shift");
  uint32_t number = 0;

  FASTATTN_DEVICE_MEMBER int stage() const { return static_cast<int>(number % kStages); }
  FASTATTN_DEVICE_MEMBER uint32_t parity() const { return number / kStages % 2; }
};

#if FASTATTN_HOPPER

// One arrival for a warp, after everything that its lanes did before.
FASTATTN_DEVICE void warp_arrive(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

// One thread. The transfer counts kRows x kWidth elements: those beyond the ends of the tensor arrive as zeros.
template <typename T, int kHeadDim, int kRows>
FASTATTN_DEVICE void load(T* to, uint64_t* full, const TensorMap& map, int row, int h, int b) {
  ptx::mbarrier_arrive_expect_tx(full, kRows * Shape<kHeadDim>::kWidth * sizeof(T));
#pragma unroll
  for (int d = 0; d < Shape<kHeadDim>::kWidth; d += kAtom) ptx::tma_load_4d(to + d * kRows, &map, full, d, row, h, b);
}

template <typename T, int kHeadDim>
FASTATTN_DEVICE void run_load_warp(Shared<T, kHeadDim>& shared, const Arguments& a, const TensorMap& query_map,
                                   const TensorMap& key_map, const TensorMap& value_map) {
  using S = Shape<kHeadDim>;
  const bool leader = threadIdx.x % 32 == 0;
  Ring<S::kStages> ring;
  for (uint32_t query_parity = 1;; query_parity ^= 1) {
    int n = 0;
    if (leader) n = atomicAdd(a.counter, 1);
    n = __shfl_sync(~0u, n, 0);
    if (n >= a.items) {
      ptx::mbarrier_wait(&shared.query_empty, query_parity);
      if (leader) {
        shared.item = -1;
        ptx::mbarrier_arrive(&shared.query_full);
      }
      return;
    }
    const Item item = item_at<S::kBlockM>(a, n);
    KeyTiles<S::kBlockM, S::kBlockN> cursor(a.mask, a.summary, item.b, item.h, item.i0, a.len_q, a.len_k);
    // One call of the cursor for all steps of the loop: it is most of the code. A tile is its number * 4 + flags, or -1.
    int tile = -1, before = -1;
    do {
      int after = 0;
      bool full = false;
      after = cursor.next(after, full) ? after * 4 + (full ? kFull : 0) : -1;
      // K of a tile, then V of the tile before: the order in which the consumers want them.
      const Ring<S::kStages> at{ring.number - 1};  // of `before`
      if (tile >= 0) {
        ptx::mbarrier_wait(&shared.key_empty[ring.stage()], ring.parity() ^ 1);
        if (leader) {
          shared.tile[ring.stage()] = tile + (after < 0 ? kLast : 0);
          load<T, kHeadDim, S::kBlockN>(shared.key[ring.stage()], &shared.key_full[ring.stage()], key_map,
                                        (tile >> 2) * S::kBlockN, item.h_kv, item.b);
        }
        ++ring.number;
      }
      // Q behind the first K, which need not wait for the end of the item before.
      if (before < 0 && (tile >= 0 || after < 0)) {
        ptx::mbarrier_wait(&shared.query_empty, query_parity);
        if (leader) {
          shared.item = n;
          shared.item_live = tile >= 0;
          shared.place = item;
          if (tile >= 0)
            load<T, kHeadDim, S::kBlockM>(shared.query, &shared.query_full, query_map, static_cast<int>(item.i0), item.h,
                                          item.b);
          else
            ptx::mbarrier_arrive(&shared.query_full);
        }
      }
      if (before >= 0) {
        ptx::mbarrier_wait(&shared.value_empty[at.stage()], at.parity() ^ 1);
        if (leader)
          load<T, kHeadDim, S::kBlockN>(shared.value[at.stage()], &shared.value_full[at.stage()], value_map,
                                        (before >> 2) * S::kBlockN, shared.place.h_kv, shared.place.b);
      }
      before = tile;
      tile = after;
    } while (tile >= 0 || before >= 0);
  }
}

// Zeros over the rows of 64 keys of V whose bit is set.
template <typename T, int kHeadDim>
FASTATTN_DEVICE void zero_rows(T* value, uint64_t dead) {
  using S = Shape<kHeadDim>;
  constexpr int kChunks = kAtom * sizeof(T) / sizeof(uint4);  // of a row; the swizzle permutes them within it
  constexpr int kRows = 32 / kChunks;                         // rows that a warp writes at once
  const int row = threadIdx.x % 32 / kChunks, chunk = threadIdx.x % kChunks;
#pragma unroll 1
  for (int first = 0; first < kWordKeys; first += kRows) {
    if ((dead >> (first + row) & 1) == 0) continue;
    for (int d = 0; d < S::kWidth; d += kAtom) {
      T* const at = value + d * S::kBlockN + (first + row) * kAtom;
      reinterpret_cast<uint4*>(at)[chunk] = uint4{0, 0, 0, 0};
    }
  }
}

// The words of 64 keys of the stage's tile, for every row; by one warp. Returns the keys that exist and that no row attends
// to. In the load warpgroup registers are few: what a row needs is read again for each.
template <typename T, int kHeadDim>
FASTATTN_DEVICE uint64_t fill_words(Shared<T, kHeadDim>& shared, const Arguments& a, int stage, int column) {
  using S = Shape<kHeadDim>;
  const auto first_key = [&] { return static_cast<int64_t>(shared.tile[stage] >> 2) * S::kBlockN + column * kWordKeys; };
  if (a.mask.bits && first_key() < a.len_k) {
    // The rows lie far apart: all of their misses at once, rather than one after the other.
#pragma unroll 1
    for (int r = threadIdx.x % 32; r < S::kBlockM; r += 32) {
      __syncwarp();
      const Item& item = shared.place;
      ptx::prefetch_l1(a.mask.bits + item.b * a.mask.stride_bits_b + item.h * a.mask.stride_bits_h +
                       min64(item.i0 + r, a.len_q - 1) * a.mask.words_per_row + first_key() / kWordKeys);
    }
  }
  uint32_t low = 0, high = 0;
#pragma unroll 1
  for (int r = threadIdx.x % 32; r < S::kBlockM; r += 32) {
    __syncwarp();
    const Item& item = shared.place;
    const uint64_t word = row_word(a.mask, a.summary, item.b, item.h, item.i0 + r, first_key(), a.len_k);
    shared.words[stage][r][column] = word;
    low |= static_cast<uint32_t>(word);
    high |= static_cast<uint32_t>(word >> 32);
  }
  low = __reduce_or_sync(~0u, low);
  high = __reduce_or_sync(~0u, high);
  return ~(low | uint64_t{high} << 32) & bits_before(a.len_k, first_key());
}

template <typename T, int kHeadDim>
FASTATTN_DEVICE void run_mask_warp(Shared<T, kHeadDim>& shared, const Arguments& a, int column) {
  using S = Shape<kHeadDim>;
  Ring<S::kStages> ring;
  for (uint32_t query_parity = 0;; query_parity ^= 1) {
    ptx::mbarrier_wait(&shared.query_full, query_parity);
    if (shared.item < 0) return;
    for (bool more = shared.item_live; more;) {
      const int stage = ring.stage();
      ptx::mbarrier_wait(&shared.key_full[stage], ring.parity());
      uint64_t dead = 0;
      if (!(shared.tile[stage] & kFull)) dead = fill_words(shared, a, stage, column);
      warp_arrive(&shared.words_ready[stage]);
      // Also for a full tile: value_ready must not pass by a consumer that still waits for it in the stage's tile before.
      ptx::mbarrier_wait(&shared.value_full[stage], ring.parity());
      if (dead) {
        zero_rows<T, kHeadDim>(shared.value[stage] + column * kWordKeys * kAtom, dead);
        ptx::fence_proxy_async();  // wgmma reads what was written here
      }
      warp_arrive(&shared.value_ready[stage]);
      more = !(shared.tile[stage] & kLast);
      warp_arrive(&shared.key_empty[stage]);  // last, so that the mask warps are never a round of the ring behind
      ++ring.number;
    }
    warp_arrive(&shared.query_empty);
  }
}

// S = Q K^T of one warpgroup, queued.
template <typename T, int kHeadDim>
FASTATTN_DEVICE void queue_scores(float (&s)[Shape<kHeadDim>::kBlockN / 2], uint64_t query, uint64_t key) {
  using S = Shape<kHeadDim>;
  ptx::wgmma_fence();
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    // Bytes over 16, as the address field of a descriptor counts. Inside a row of 128 bytes the swizzle is in the address bits.
    const int in_row = d % kAtom * sizeof(T) / 16;
    ptx::wgmma<T, S::kBlockN, false>(s, query + d / kAtom * (S::kBlockM * 128 / 16) + in_row,
                                     key + d / kAtom * (S::kBlockN * 128 / 16) + in_row, d > 0);
  }
  ptx::wgmma_commit();
}

// O += P V of one warpgroup, queued. P must stay as it is until the product is waited for.
template <typename T, int kHeadDim>
FASTATTN_DEVICE void queue_output(float (&o)[kHeadDim / 2], const uint32_t (&p)[Shape<kHeadDim>::kBlockN / 16][4],
                                  uint64_t value) {
  ptx::wgmma_fence();
#pragma unroll
  for (int j = 0; j < Shape<kHeadDim>::kBlockN / 16; ++j)
    ptx::wgmma_rs<T, kHeadDim, true>(o, p[j], value + j * (16 * 128 / 16), true);
  ptx::wgmma_commit();
}

// A fragment: row lane / 4 + 8 r of the warp's 16 rows, columns 8 n + 2 (lane % 4) + {0, 1} at [4 n + 2 r + {0, 1}].

// Dead scores become -inf. Selected, not added: a dead key may hold NaN. `words` are those of the upper row.
template <int kScores, int kColumns>
FASTATTN_DEVICE void mask_scores(float (&s)[kScores], const uint64_t (*words)[kColumns]) {
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const uint64_t word = words[8 * r][c] >> (2 * (threadIdx.x % 4));
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const uint32_t bits = static_cast<uint32_t>(word >> (n / 4 * 32)) >> (n % 4 * 8);
        float* const pair = s + 4 * (8 * c + n) + 2 * r;
        pair[0] = bits & 1 ? pair[0] : kMinusInfinity;
        pair[1] = bits & 2 ? pair[1] : kMinusInfinity;
      }
    }
}

// Scores to probabilities, in place; m and l move on, and `rescale` is the factor of what was accumulated before. l is the
// thread's own part of the row.
template <int kScores>
FASTATTN_DEVICE void softmax(float (&s)[kScores], float (&m)[2], float (&l)[2], float (&rescale)[2], float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = fmaxf(m[r], s[2 * r]);
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n) top = fmaxf(top, fmaxf(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float shift = top == kMinusInfinity ? 0.f : top;
    rescale[r] = ptx::ex2((m[r] - shift) * scale_log2);
    m[r] = top;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        // The difference first: it is exactly 0 at the maximum, however large the scores are.
        float& x = s[4 * n + 2 * r + c];
        x = ptx::ex2((x - shift) * scale_log2);
        sum += x;
      }
    l[r] = l[r] * rescale[r] + sum;
  }
}

template <typename T, int kScores>
FASTATTN_DEVICE void pack_probabilities(uint32_t (&p)[kScores / 8][4], const float (&s)[kScores]) {
#pragma unroll
  for (int n = 0; n < kScores / 4; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) p[n / 2][n % 2 * 2 + r] = pack2<T>(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]);
}

// One row of O, spread over the 4 lanes of a quad. They exchange 4 x 4 words so that each holds 8 columns side by side.
template <typename T, int kHeadDim>
FASTATTN_DEVICE void store_row(T* to, bool exists, const float (&o)[kHeadDim / 2], int r, float factor, int dim_v,
                               bool vector_store) {
  const int lane = threadIdx.x % 4;
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 32) {
    uint32_t w[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float* const pair = o + d / 2 + 4 * n + 2 * r;
      // An empty row is 0 by selection: another row of its tile may have brought an infinity into the products.
      w[n] = factor == 0.f ? 0 : pack2<T>(pair[0] * factor, pair[1] * factor);
    }
    // A 4 x 4 transposition: across neighbours, then across pairs.
    const uint32_t a = __shfl_xor_sync(~0u, odd ? w[0] : w[1], 1), b = __shfl_xor_sync(~0u, odd ? w[2] : w[3], 1);
    if (odd) w[0] = a, w[2] = b;
    else w[1] = a, w[3] = b;
    const uint32_t c = __shfl_xor_sync(~0u, upper ? w[0] : w[2], 2), e = __shfl_xor_sync(~0u, upper ? w[1] : w[3], 2);
    if (upper) w[0] = c, w[1] = e;
    else w[2] = c, w[3] = e;
    const int column = d + 8 * lane;
    if (!exists || column >= dim_v) continue;
    if (vector_store && column + 8 <= dim_v) {
      *reinterpret_cast<uint4*>(to + column) = uint4{w[0], w[1], w[2], w[3]};
    } else {
#pragma unroll
      for (int n = 0; n < 8; ++n)
        if (column + n < dim_v) to[column + n].bits = static_cast<uint16_t>(w[n / 2] >> (n % 2 * 16));
    }
  }
}

// A warpgroup without rows takes part in the barriers of the item, and leaves the units to the others.
template <typename T, int kHeadDim>
FASTATTN_DEVICE void pass_item(Shared<T, kHeadDim>& shared, Ring<Shape<kHeadDim>::kStages>& ring, int turn, int next_turn) {
  int tile = 0;
  for (bool first = true; !(tile & kLast); first = false) {
    const int stage = ring.stage();
    ptx::mbarrier_wait(&shared.key_full[stage], ring.parity());
    tile = shared.tile[stage];
    if (Shape<kHeadDim>::kTurns && !first) {
      ptx::named_barrier(turn, 2 * kWarpgroup);
      ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);
    }
    warp_arrive(&shared.key_empty[stage]);
    if (tile & kLast) warp_arrive(&shared.query_empty);
    // Not before the tile is there: the phase of the tile before may still be open.
    ptx::mbarrier_wait(&shared.value_full[stage], ring.parity());
    warp_arrive(&shared.value_empty[stage]);
    ++ring.number;
  }
}

template <typename T, int kHeadDim>
FASTATTN_DEVICE void run_consumer(Shared<T, kHeadDim>& shared, const Arguments& a, int warpgroup) {
  using S = Shape<kHeadDim>;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int row = warpgroup * 64 + warp * 16 + lane / 4;  // in the tile; the other row of the thread is 8 below
  const uint64_t query = ptx::smem_descriptor(shared.query + warpgroup * 64 * kAtom, 16, 1024);
  // Named barrier 1 + w: warpgroup w may issue its products. Its predecessor arrives there.
  const int turn = 1 + warpgroup, next_turn = 1 + (warpgroup + 1) % S::kConsumers;
  if (S::kTurns && warpgroup == S::kConsumers - 1) ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);

  Ring<S::kStages> ring;
  for (uint32_t query_parity = 0;; query_parity ^= 1) {
    ptx::mbarrier_wait(&shared.query_full, query_parity);
    const int n = shared.item;
    if (n < 0) return;
    const bool live = shared.item_live;
    float o[kHeadDim / 2], m[2] = {kMinusInfinity, kMinusInfinity}, l[2] = {0.f, 0.f};
#pragma unroll
    for (float& x : o) x = 0.f;

    if (!live) {
      warp_arrive(&shared.query_empty);
    } else if (shared.place.i0 + warpgroup * 64 >= a.len_q) {
      pass_item<T, kHeadDim>(shared, ring, turn, next_turn);
    } else {
      float s[S::kBlockN / 2], rescale[2];
      uint32_t p[S::kBlockN / 16][4];

      // Queues the scores of the tile in the ring's stage; returns its flags.
      const auto queue_tile = [&] {
        ptx::mbarrier_wait(&shared.key_full[ring.stage()], ring.parity());
        queue_scores<T, kHeadDim>(s, query, ptx::smem_descriptor(shared.key[ring.stage()], 16, 1024));
      };
      const auto queue_values = [&](const Ring<S::kStages>& at, bool full) {
        ptx::mbarrier_wait(&shared.value_full[at.stage()], at.parity());
        if (!full) ptx::mbarrier_wait(&shared.value_ready[at.stage()], at.parity());
        queue_output<T, kHeadDim>(o, p, ptx::smem_descriptor(shared.value[at.stage()], S::kBlockN * 128, 1024));
      };
      // The scores are there: mask them, free the stage of K and of its words, take the exponentials.
      const auto scores_done = [&](int tile) {
        if (!(tile & kFull)) {
          ptx::mbarrier_wait(&shared.words_ready[ring.stage()], ring.parity());
          mask_scores(s, &shared.words[ring.stage()][row]);
        }
        warp_arrive(&shared.key_empty[ring.stage()]);
        if (tile & kLast) warp_arrive(&shared.query_empty);
        softmax(s, m, l, rescale, a.scale_log2);
      };

      queue_tile();
      int tile = shared.tile[ring.stage()];
      ptx::wgmma_wait<0>();
      scores_done(tile);
      pack_probabilities<T>(p, s);

      while (!(tile & kLast)) {
        const Ring<S::kStages> before = ring;
        const int tile_before = tile;
        ++ring.number;
        if (S::kTurns) ptx::named_barrier(turn, 2 * kWarpgroup);
        queue_tile();
        queue_values(before, tile_before & kFull);
        if (S::kTurns) ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);
        tile = shared.tile[ring.stage()];
        ptx::wgmma_wait<1>();
        scores_done(tile);
        // Most tiles raise no maximum of the 16 rows, and a product with 1 changes nothing. The wait is in both branches
        // because ptxas moves it up to the last branch, and the softmax, which is to overlap with the product, would come
        // behind it.
        if (__any_sync(~0u, rescale[0] != 1.f || rescale[1] != 1.f)) {
          ptx::wgmma_wait<0>();
#pragma unroll
          for (int x = 0; x < kHeadDim / 2; ++x) o[x] *= rescale[x / 2 % 2];
        } else {
          ptx::wgmma_wait<0>();
        }
        warp_arrive(&shared.value_empty[before.stage()]);
        pack_probabilities<T>(p, s);
      }

      queue_values(ring, tile & kFull);
      ptx::wgmma_wait<0>();
      warp_arrive(&shared.value_empty[ring.stage()]);
      ++ring.number;
    }

    const Item item = item_at<S::kBlockM>(a, n);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] += __shfl_xor_sync(~0u, l[r], 1);
      l[r] += __shfl_xor_sync(~0u, l[r], 2);
      const int64_t i = int64_t{item.i0} + row + 8 * r;
      const bool exists = i < a.len_q;
      T* const to = static_cast<T*>(a.out) + item.b * a.stride_ob + item.h * a.stride_oh + i * a.stride_om;
      store_row<T, kHeadDim>(to, exists, o, r, softmax_normalizer(l[r]), a.dim_v, a.vector_store);
      if (exists && lane % 4 == 0) {
        const float lse = l[r] == 0.f ? kMinusInfinity : fmaf(m[r], a.scale, logf(l[r]));
        a.lse[(static_cast<int64_t>(item.b) * a.heads_q + item.h) * a.len_q + i] = lse;
      }
    }
  }
}

#endif  // FASTATTN_HOPPER

template <typename T, int kHeadDim>
FASTATTN_KERNEL(Shape<kHeadDim>::kThreads, 1)
attention_forward_hopper_kernel(const FASTATTN_GRID_CONSTANT TensorMap query_map,
                                const FASTATTN_GRID_CONSTANT TensorMap key_map,
                                const FASTATTN_GRID_CONSTANT TensorMap value_map,
                                const FASTATTN_GRID_CONSTANT Arguments a) {
#if FASTATTN_HOPPER
  using S = Shape<kHeadDim>;
  FASTATTN_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<T, kHeadDim>*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = S::kConsumers * 4;
    ptx::mbarrier_init(&shared.query_full, 1);
    ptx::mbarrier_init(&shared.query_empty, kConsumerWarps + S::kColumns);
    for (int n = 0; n < S::kStages; ++n) {
      ptx::mbarrier_init(&shared.key_full[n], 1);
      ptx::mbarrier_init(&shared.key_empty[n], kConsumerWarps + S::kColumns);
      ptx::mbarrier_init(&shared.value_full[n], 1);
      ptx::mbarrier_init(&shared.value_empty[n], kConsumerWarps);
      ptx::mbarrier_init(&shared.words_ready[n], S::kColumns);
      ptx::mbarrier_init(&shared.value_ready[n], S::kColumns);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  // The same in every lane: the compiler is told so.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (warp < 4) {
    ptx::setmaxnreg_dec<S::kLoadRegisters>();
    if (warp == 0) run_load_warp<T, kHeadDim>(shared, a, query_map, key_map, value_map);
    else if (warp <= S::kColumns) run_mask_warp<T, kHeadDim>(shared, a, warp - 1);
  } else {
    ptx::setmaxnreg_inc<S::kConsumerRegisters>();
    run_consumer<T, kHeadDim>(shared, a, warp / 4 - 1);
  }
#endif
}

// Sizes in the order of the strides.
struct Sizes {
  int64_t query[4], key[4], value[4];

  explicit Sizes(const AttentionForwardParams& p)
      : query{p.batch, p.heads_q, p.len_q, p.dim_qk},
        key{p.batch, p.heads_kv, p.len_k, p.dim_qk},
        value{p.batch, p.heads_kv, p.len_k, p.dim_v} {}
};

int64_t round_to_256(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

template <typename T, int kHeadDim>
void run(const AttentionForwardParams& p) {
  using S = Shape<kHeadDim>;
  Arguments a{};
  a.counter = static_cast<int32_t*>(p.workspace);
  zero_async(a.counter, sizeof(int32_t), p.stream);
  a.mask = p.mask;
  a.summary = prepare_mask(p, static_cast<char*>(p.workspace) + round_to_256(sizeof(int32_t)), p.stream);
  a.out = p.out.ptr;
  a.stride_ob = p.out.stride[0];
  a.stride_oh = p.out.stride[1];
  a.stride_om = p.out.stride[2];
  a.lse = static_cast<float*>(p.lse.ptr);
  a.len_q = p.len_q;
  a.len_k = p.len_k;
  a.dim_v = static_cast<int32_t>(p.dim_v);
  a.heads_q = static_cast<int32_t>(p.heads_q);
  a.group = static_cast<int32_t>(p.heads_q / p.heads_kv);
  a.heads = static_cast<int32_t>(p.batch * p.heads_q);
  a.tiles_m = static_cast<int32_t>(ceil_div(p.len_q, S::kBlockM));
  a.items = a.heads * a.tiles_m;
  // Sections whose K and V stay in L2 (50 MB, of which the outputs and the next section want some).
  constexpr int64_t kSectionBytes = int64_t{24} << 20;
  const int64_t head_bytes = p.len_k * 2 * S::kWidth * static_cast<int64_t>(sizeof(T));
  a.section_heads = static_cast<int32_t>(min64(a.heads, max64(1, kSectionBytes / head_bytes) * a.group));
  a.scale = static_cast<float>(p.scale);
  a.scale_log2 = static_cast<float>(p.scale * kLog2E);
  bool aligned = reinterpret_cast<uintptr_t>(p.out.ptr) % 16 == 0;
  for (int n = 0; n < 3; ++n) aligned = aligned && p.out.stride[n] % 8 == 0;
  a.vector_store = aligned;

  const Sizes sizes(p);
  const TensorMap query = make_tensor_map(p.query, sizes.query, S::kBlockM);
  const TensorMap key = make_tensor_map(p.key, sizes.key, S::kBlockN);
  const TensorMap value = make_tensor_map(p.value, sizes.value, S::kBlockN);
  const int blocks = static_cast<int>(min64(a.items, device_info().multiprocessors));
  launch("attention_forward_hopper_kernel", attention_forward_hopper_kernel<T, kHeadDim>, dim3(blocks), dim3(S::kThreads),
         sizeof(Shared<T, kHeadDim>), p.stream, query, key, value, a);
}

template <typename T>
void run_head_dim(const AttentionForwardParams& p) {
  const int64_t dim = max64(p.dim_qk, p.dim_v);
  if (dim <= 64) run<T, 64>(p);
  else if (dim <= 96) run<T, 96>(p);
  else if (dim <= 128) run<T, 128>(p);
  else if (dim <= 192) run<T, 192>(p);
  else run<T, 256>(p);
}

}  // namespace

bool attention_forward_hopper_able(const AttentionForwardParams& p) {
  if (device_info().capability != 90) return false;
  if (p.bias || p.dropout.p > 0.0) return false;
  if (max64(p.dim_qk, p.dim_v) > kMaxHeadDim) return false;
  // The maximum is taken of the products themselves, so the scale must keep their order, in float too.
  if (!(static_cast<float>(p.scale) >= std::numeric_limits<float>::min())) return false;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;  // tiles and items are counted in 32 bits
  if (p.len_q > kMost || p.len_k > kMost || p.batch * p.heads_q * (ceil_div(p.len_q, 128) + 1) > kMost) return false;
  const Sizes sizes(p);  // an empty tensor is not possible either
  return tensor_map_able(p.query, sizes.query) && tensor_map_able(p.key, sizes.key) && tensor_map_able(p.value, sizes.value);
}

int64_t attention_forward_hopper_workspace(const AttentionForwardParams& p) {
  return round_to_256(sizeof(int32_t)) + mask_summary_bytes(p);
}

void attention_forward_hopper(const AttentionForwardParams& p) {
  if (p.query.dtype == DType::kBFloat16) run_head_dim<bfloat16>(p);
  else run_head_dim<half>(p);
}

}  // namespace fastattn::cuda
