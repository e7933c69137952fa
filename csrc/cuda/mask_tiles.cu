// Packs the AND of bool masks into bits and marks empty and full tiles.
//
// mask_tiles_kernel: a block of 4 warps takes one query tile and 8 key tiles, so that it owns one byte of each bitmap and
// nothing needs to be cleared or added atomically. A warp reads 512 keys of a row, 16 bytes a lane, and turns them into 16
// bits a lane; each warp takes every fourth row, 8 rows of loads in flight. Where 16 bytes cannot be loaded (strides, a base
// that is not aligned, the end of the row) 32 lanes read 32 neighbouring keys and a ballot packs them.
// Bytes: 1 read a pair and mask, 1/8 written a pair. Tile 64 x 512 keys is 32 KB; 4 warps x 8 rows x 512 bytes = 16 KB in
// flight a block, 8 blocks an SM. About 40 instructions a lane for 16 bytes, a third of what the memory leaves time for:
// bound by the memory, expected at 80 % of copy bandwidth from 2048 x 2048 on.
//
// mask_bitmaps_kernel: the transposed bitmaps from the finished ones, a warp for 64 x 64 tiles, by ballots. 2 bits a tile.
#include "mask.h"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kStripTiles = 8;    // key tiles of a block: one byte of a bitmap
constexpr int kLaneKeys = 16;     // keys of a lane
constexpr int kPassKeys = 32 * kLaneKeys;
constexpr int kPassWords = kPassKeys / kWordKeys;
constexpr int kRowsInFlight = 8;  // of a warp

// Bit k: byte k is not 0.
FASTATTN_DEVICE uint32_t byte_bits(uint32_t x) {
  // The top bit of each byte that is not 0; the product brings the four together.
  const uint32_t tops = (((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) >> 7 & 0x01010101u;
  return tops * 0x01020408u >> 24 & 15u;
}

FASTATTN_DEVICE uint32_t vector_bits(const uint4& v) {
  return byte_bits(v.x) | byte_bits(v.y) << 4 | byte_bits(v.z) << 8 | byte_bits(v.w) << 12;
}

// The 16 keys of this lane from key j0 of a row on, one mask. Keys beyond len_k give 0. By whole warps.
FASTATTN_DEVICE uint32_t lane_bits(const uint8_t* row, int64_t stride, bool vectors, int64_t j0, int64_t len_k, int lane) {
  if (vectors && j0 + kPassKeys <= len_k)
    return vector_bits(*reinterpret_cast<const uint4*>(row + j0 + lane * kLaneKeys));
  uint32_t bits = 0;
  for (int n = 0; n < kPassKeys / 32 && j0 + n * 32 < len_k; ++n) {
    const int64_t j = j0 + n * 32 + lane;
    const uint32_t keys = __ballot_sync(~0u, j < len_k && row[j * stride]);
    if (lane / 2 == n) bits = keys >> (lane % 2 * kLaneKeys) & 0xffffu;
  }
  return bits;
}

// What a warp has seen of its 16 keys a lane.
struct Seen {
  uint32_t any, every;
};

// Bits of one row: two lanes make 32 of them. `half_words` of a row are left from key j0 on.
FASTATTN_DEVICE void add_row(Seen& seen, uint32_t bits, uint32_t* row, int half_words, int lane) {
  seen.any |= bits;
  seen.every &= bits;
  const uint32_t other = __shfl_xor_sync(~0u, bits, 1);
  if (lane % 2 == 0 && lane / 2 < half_words) row[lane / 2] = bits | other << kLaneKeys;
}

// ONE_VECTOR: one mask, all of it by 16-byte loads.
template <bool ONE_VECTOR>
FASTATTN_KERNEL(kThreads, 8) mask_tiles_kernel(const FASTATTN_GRID_CONSTANT MaskTilesParams p, uint32_t vectors, int64_t tiles_q,
                                            int64_t tiles_k, int64_t strips) {
  FASTATTN_SHARED(shared);  // [kWarps][2]: tiles seen live, tiles seen not full
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strip = blockIdx.x % strips, item = blockIdx.x / strips, qt = item % tiles_q, bh = item / tiles_q;
  const int64_t b = bh / p.heads, h = bh % p.heads;
  const int64_t words_per_row = ceil_div(p.len_k, kWordKeys), words_per_tile = p.block_n / kWordKeys;
  const int64_t i0 = qt * p.block_m, i1 = min64(i0 + p.block_m, p.len_q), first_word = strip * kStripTiles * words_per_tile;
  // Tiles that do not exist are neither live nor full.
  const int64_t tiles = max64(0, min64(kStripTiles, tiles_k - strip * kStripTiles));
  uint32_t live = 0, not_full = ~((1u << tiles) - 1);
  uint32_t tile = 1, words_of_tile = 0;  // the bit of the tile that the next word belongs to, and its words so far
  for (int64_t pass = 0; pass < words_per_tile; ++pass) {
    const int64_t word0 = first_word + pass * kPassWords, j0 = word0 * kWordKeys;
    if (j0 >= p.len_k) break;
    const int half_words = static_cast<int>(min64(kPassWords, words_per_row - word0)) * 2;
    uint32_t* const bits = reinterpret_cast<uint32_t*>(p.bits + bh * p.len_q * words_per_row + word0);
    Seen seen{0, 0xffffu};
    if constexpr (ONE_VECTOR) {
      const uint8_t* const mask = p.mask[0] + b * p.mask_stride[0][0] + h * p.mask_stride[0][1] + j0 + lane * kLaneKeys;
      const bool inside = j0 + lane * kLaneKeys < p.len_k;
      const int64_t step = kWarps * p.mask_stride[0][2];
      const uint8_t* from = mask + (i0 + warp) * p.mask_stride[0][2];
      uint32_t* to = bits + (i0 + warp) * words_per_row * 2;
      for (int rows = static_cast<int>(i1 - i0) - warp; rows > 0; rows -= kWarps * kRowsInFlight) {
        uint4 keys[kRowsInFlight];
FASTATTN_UNROLL
        for (int n = 0; n < kRowsInFlight; ++n, from += step) {
          keys[n] = make_uint4(0, 0, 0, 0);
          if (inside && n * kWarps < rows) keys[n] = *reinterpret_cast<const uint4*>(from);
        }
FASTATTN_UNROLL
        for (int n = 0; n < kRowsInFlight; ++n, to += kWarps * words_per_row * 2)
          if (n * kWarps < rows) add_row(seen, vector_bits(keys[n]), to, half_words, lane);
      }
    } else {
      for (int64_t i = i0 + warp; i < i1; i += kWarps) {
        uint32_t keys = 0xffffu;
        for (int m = 0; m < p.num_masks; ++m) {
          const int64_t* const stride = p.mask_stride[m];
          const uint8_t* const row = p.mask[m] + b * stride[0] + h * stride[1] + i * stride[2];
          keys &= lane_bits(row, stride[3], vectors >> m & 1, j0, p.len_k, lane);
        }
        add_row(seen, keys, bits + i * words_per_row * 2, half_words, lane);
      }
    }
    const uint32_t wanted = static_cast<uint32_t>(bits_before(p.len_k, j0 + lane * kLaneKeys)) & 0xffffu;
    const uint32_t live_lanes = __ballot_sync(~0u, seen.any != 0);
    const uint32_t short_lanes = __ballot_sync(~0u, (seen.every & wanted) != wanted);
FASTATTN_UNROLL
    for (int w = 0; w < kPassWords; ++w) {
      if (live_lanes >> (4 * w) & 15u) live |= tile;
      if (short_lanes >> (4 * w) & 15u) not_full |= tile;
      if (++words_of_tile == words_per_tile) {
        words_of_tile = 0;
        tile <<= 1;
      }
    }
  }
  uint32_t* const of_warp = reinterpret_cast<uint32_t*>(shared);
  if (lane == 0) {
    of_warp[warp * 2] = live;
    of_warp[warp * 2 + 1] = not_full;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int n = 1; n < kWarps; ++n) {
    live |= of_warp[n * 2];
    not_full |= of_warp[n * 2 + 1];
  }
  // Byte `strip` of the row's words: both the GPU and the hosts that emulate it are little endian.
  reinterpret_cast<uint8_t*>(p.live)[item * strips + strip] = static_cast<uint8_t>(live);
  reinterpret_cast<uint8_t*>(p.full)[item * strips + strip] = static_cast<uint8_t>(~not_full);
}

// A warp: 64 query tiles x 64 key tiles of one (b, h).
FASTATTN_KERNEL(kThreads) mask_bitmaps_kernel(const FASTATTN_GRID_CONSTANT MaskTilesParams p, int64_t tiles_q, int64_t tiles_k,
                                              int64_t items) {
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (item >= items) return;
  const int64_t words = ceil_div(tiles_k, 64), words_t = ceil_div(tiles_q, 64);
  const int64_t kw = item % words, qw = item / words % words_t, bh = item / words / words_t;
  const int64_t qt = qw * 64 + lane;
  for (int map = 0; map < 2; ++map) {
    const uint64_t* const from = (map ? p.full : p.live) + bh * tiles_q * words + kw;
    uint64_t* const to = (map ? p.full_t : p.live_t) + (bh * tiles_k + kw * 64) * words_t + qw;
    const uint64_t low = qt < tiles_q ? from[qt * words] : 0, high = qt + 32 < tiles_q ? from[(qt + 32) * words] : 0;
    for (int64_t t = 0; t < 64 && kw * 64 + t < tiles_k; ++t) {
      const uint64_t word = mask_detail::warp_word(low >> t & 1, high >> t & 1);
      if (lane == t % 32) to[t * words_t] = word;
    }
  }
}

// Rows of mask m start at multiples of 16 bytes, and their keys lie side by side.
bool rows_aligned(const MaskTilesParams& p, int m) {
  const int64_t* const stride = p.mask_stride[m];
  return stride[3] == 1 && reinterpret_cast<uintptr_t>(p.mask[m]) % 16 == 0 && stride[0] % 16 == 0 && stride[1] % 16 == 0 &&
         stride[2] % 16 == 0;
}

}  // namespace

void mask_tiles(const MaskTilesParams& p) {
  const int64_t tiles_q = ceil_div(p.len_q, p.block_m), tiles_k = ceil_div(p.len_k, p.block_n);
  const int64_t bh = p.batch * p.heads, strips = ceil_div(tiles_k, 64) * 8;
  if (bh == 0 || tiles_q == 0 || tiles_k == 0) return;
  uint32_t vectors = 0;
  for (int m = 0; m < p.num_masks; ++m) vectors |= static_cast<uint32_t>(rows_aligned(p, m)) << m;
  const bool one_vector = p.num_masks == 1 && vectors && p.len_k % kLaneKeys == 0;
  launch("mask_tiles_kernel", one_vector ? mask_tiles_kernel<true> : mask_tiles_kernel<false>,
         dim3(static_cast<unsigned>(bh * tiles_q * strips)), dim3(kThreads), kWarps * 2 * sizeof(uint32_t), p.stream, p, vectors,
         tiles_q, tiles_k, strips);
  const int64_t items = bh * ceil_div(tiles_q, 64) * ceil_div(tiles_k, 64);
  launch("mask_bitmaps_kernel", mask_bitmaps_kernel, dim3(static_cast<unsigned>(ceil_div(items, kWarps))), dim3(kThreads), 0,
         p.stream, p, tiles_q, tiles_k, items);
}

}  // namespace fastattn::cuda
