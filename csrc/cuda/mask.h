// The mask rule of csrc/core/mask.h as the kernels use it: which tiles of a query tile or of a key tile are live, which of
// those need no mask, and the bits of the others.
//
// Everything is built from pieces of 64 x 64 pairs. The parts that are arithmetic (band, prefix, lengths) are evaluated where
// they are needed. Padding and segments would cost a walk over 64 keys each time: `prepare_mask` walks them once, in one
// small kernel, and leaves a word and a few ids for each 64 keys. A dense mask has its bits and bitmaps from mask_tiles.
//
// Full tiles run without mask code: `full` promises that every pair may attend AND that every key of the tile exists. It
// promises nothing about query rows beyond len_q; their results are not stored, and where rows are summed over (dK, dV,
// dbias) the kernel selects 0 for them.
//
// No leak: in a partial tile a key whose bit in `any` is 0 is attended to by no query of the tile. Its rows of K and V must be
// zeroed in shared memory before they are multiplied by probabilities, for 0 * NaN is NaN. Scores are selected by the words.
#pragma once

#include "../core/mask.h"
#include "platform.h"
#include "ptx.h"

namespace fastattn::cuda {

inline constexpr int kWordKeys = 64;     // keys of a word, and queries of a block of segments
inline constexpr int kSegmentRuns = 4;   // ids of one word that are looked up without reading the ids of its keys

// Keys of one word that share a segment id.
struct alignas(16) SegmentRun {
  int64_t id;
  uint64_t keys;
};

// What prepare_mask knows about the mask, in the workspace. A null pointer: the mask has no such part.
struct MaskSummary {
  const uint64_t* key_words = nullptr;            // [B, blocks_k]: lengths AND key_keep; bits beyond len_k are 0
  const SegmentRange* query_segments = nullptr;   // [B, blocks_q]
  const SegmentRange* key_segments = nullptr;     // [B, blocks_k]
  // [B, blocks_k, kSegmentRuns]: the first ids of the block and their keys; the rest of its keys is in no run
  const SegmentRun* segment_runs = nullptr;
  int64_t blocks_q = 0, blocks_k = 0;
  int64_t len_q = 0;
};

namespace mask_detail {

// The summary's arrays laid out from `base`; returns the bytes they take. With a null base it only counts.
static inline int64_t lay_out(const AttentionParams& p, char* base, MaskSummary& summary) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* const piece = base ? base + used : nullptr;
    used += ceil_div(bytes, 256) * 256;
    return static_cast<void*>(piece);
  };
  const int64_t words = p.batch * ceil_div(p.len_k, kWordKeys), blocks = p.batch * ceil_div(p.len_q, kWordKeys);
  summary = MaskSummary{};
  summary.blocks_q = ceil_div(p.len_q, kWordKeys);
  summary.blocks_k = ceil_div(p.len_k, kWordKeys);
  summary.len_q = p.len_q;
  if (p.mask.key_keep) summary.key_words = static_cast<uint64_t*>(take(words * sizeof(uint64_t)));
  if (p.mask.query_segments) {
    summary.query_segments = static_cast<SegmentRange*>(take(blocks * sizeof(SegmentRange)));
    summary.key_segments = static_cast<SegmentRange*>(take(words * sizeof(SegmentRange)));
    summary.segment_runs = static_cast<SegmentRun*>(take(words * kSegmentRuns * sizeof(SegmentRun)));
  }
  return used;
}

FASTATTN_DEVICE SegmentRange warp_range(int64_t low, int64_t high) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    low = min64(low, __shfl_xor_sync(~0u, low, step));
    high = max64(high, __shfl_xor_sync(~0u, high, step));
  }
  return {low, high};
}

FASTATTN_DEVICE uint64_t warp_word(bool low, bool high) {
  const uint64_t first = __ballot_sync(~0u, low);
  return first | uint64_t{__ballot_sync(~0u, high)} << 32;
}

// One word of keys.
FASTATTN_DEVICE void summarize_keys(const MaskParams& mask, const MaskSummary& summary, int64_t b, int64_t block,
                                           int64_t len_k, int lane) {
  const int64_t j0 = block * kWordKeys, j_low = j0 + lane, j_high = j_low + 32, at = b * summary.blocks_k + block;
  if (summary.key_words) {
    const uint8_t* const keep = mask.key_keep + b * mask.stride_keep_b;
    const bool low = j_low < len_k && keep[j_low * mask.stride_keep_j];
    const bool high = j_high < len_k && keep[j_high * mask.stride_keep_j];
    uint64_t word = warp_word(low, high);
    if (mask.key_lengths) word &= bits_before(mask.key_lengths[b * mask.stride_key_lengths_b], j0);
    if (lane == 0) const_cast<uint64_t*>(summary.key_words)[at] = word;
  }
  if (summary.key_segments) {
    // A key that does not exist repeats the last one: the range stays as it is.
    const int64_t* const ids = mask.key_segments + b * mask.stride_kseg_b;
    const int64_t low = ids[min64(j_low, len_k - 1) * mask.stride_kseg_j];
    const int64_t high = ids[min64(j_high, len_k - 1) * mask.stride_kseg_j];
    const SegmentRange range = warp_range(min64(low, high), max64(low, high));
    if (lane == 0) const_cast<SegmentRange*>(summary.key_segments)[at] = range;
    uint64_t rest = bits_before(len_k, j0);
    for (int run = 0; run < kSegmentRuns; ++run) {
      SegmentRun found{0, 0};
      if (rest) {  // the same in every lane
        const bool in_low = static_cast<uint32_t>(rest) != 0;
        const int first = __ffs(static_cast<int>(in_low ? static_cast<uint32_t>(rest) : static_cast<uint32_t>(rest >> 32))) - 1;
        found.id = __shfl_sync(~0u, in_low ? low : high, first);
        found.keys = warp_word(low == found.id, high == found.id) & rest;
        rest &= ~found.keys;
      }
      if (lane == 0) const_cast<SegmentRun*>(summary.segment_runs)[at * kSegmentRuns + run] = found;
    }
  }
}

inline constexpr int kSummaryThreads = 128;

// A warp takes one word of keys or one block of queries. 9 to 25 bytes read for each key and written for each 64.
static FASTATTN_KERNEL(kSummaryThreads, 1) mask_summary_kernel(MaskParams mask, MaskSummary summary, int64_t len_k,
                                                               int64_t batch) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kSummaryThreads / 32) + threadIdx.x / 32;
  const int64_t blocks = summary.blocks_k + (summary.query_segments ? summary.blocks_q : 0);
  if (warp >= batch * blocks) return;
  const int64_t b = warp / blocks, block = warp % blocks;
  if (block < summary.blocks_k) {
    summarize_keys(mask, summary, b, block, len_k, lane);
    return;
  }
  const int64_t i0 = (block - summary.blocks_k) * kWordKeys, last = summary.len_q - 1;
  const int64_t* const ids = mask.query_segments + b * mask.stride_qseg_b;
  const int64_t low = ids[min64(i0 + lane, last) * mask.stride_qseg_i];
  const int64_t high = ids[min64(i0 + lane + 32, last) * mask.stride_qseg_i];
  const SegmentRange range = warp_range(min64(low, high), max64(low, high));
  if (lane == 0) const_cast<SegmentRange*>(summary.query_segments)[b * summary.blocks_q + i0 / kWordKeys] = range;
}

// Bits first .. first + count - 1 of a row of a bitmap, count <= 32.
FASTATTN_DEVICE uint64_t map_bits(const uint64_t* row, int64_t first, int count) {
  const int shift = static_cast<int>(first & 63);
  uint64_t bits = row[first >> 6] >> shift;
  if (shift + count > 64) bits |= row[(first >> 6) + 1] << (64 - shift);
  return bits & ((uint64_t{1} << count) - 1);
}

FASTATTN_DEVICE uint64_t segment_word(const MaskParams& mask, const MaskSummary& summary, int64_t b, int64_t i,
                                             int64_t j0, uint64_t wanted) {
  const int64_t id = mask.query_segments[b * mask.stride_qseg_b + i * mask.stride_qseg_i];
  const SegmentRun* const runs = summary.segment_runs + (b * summary.blocks_k + j0 / kWordKeys) * kSegmentRuns;
  uint64_t word = 0;
  // Rolled: the runs of a whole loop over rows would otherwise be kept in 16 registers.
#pragma unroll 1
  for (int run = 0; run < kSegmentRuns; ++run) {
    const SegmentRun keys = runs[run];
    if (keys.id == id) word |= keys.keys;
    wanted &= ~keys.keys;
  }
  const int64_t* const ids = mask.key_segments + b * mask.stride_kseg_b;
  // Only where 64 keys have more than kSegmentRuns ids.
  for (int j = 0; wanted; ++j, wanted >>= 1)
    if (wanted & 1) word |= uint64_t{ids[(j0 + j) * mask.stride_kseg_j] == id} << j;
  return word;
}

}  // namespace mask_detail

// ---- host ----

// Bytes that prepare_mask takes of the workspace.
static inline int64_t mask_summary_bytes(const AttentionParams& p) {
  MaskSummary summary;
  return mask_detail::lay_out(p, nullptr, summary);
}

// Walks padding and segments, if the mask has any, and returns what the functions below want. `workspace` is aligned to
// 16 bytes at least.
static inline MaskSummary prepare_mask(const AttentionParams& p, void* workspace, void* stream) {
  MaskSummary summary;
  const int64_t bytes = mask_detail::lay_out(p, static_cast<char*>(workspace), summary);
  const int64_t blocks = summary.blocks_k + (p.mask.query_segments ? summary.blocks_q : 0);
  if (bytes == 0 || p.len_q == 0 || p.len_k == 0) return summary;
  constexpr int kWarps = mask_detail::kSummaryThreads / 32;
  launch("mask_summary_kernel", mask_detail::mask_summary_kernel, dim3(static_cast<unsigned>(ceil_div(p.batch * blocks, kWarps))),
         dim3(mask_detail::kSummaryThreads), 0, stream, p.mask, summary, p.len_k, p.batch);
  return summary;
}

// ---- device ----

// Loops over words are kept rolled: unrolled, their loads take a hundred registers from the accumulators that live across a
// step of the cursors below.
//
// Class of the pairs [i0, i1) x [j0, j1): i0 and j0 are multiples of 64, i1 and j1 are clipped to the ends; at most 32 words
// wide. The AND over the parts of the part's class: kEmpty and kFull are certain, kPartial may turn out empty. A bitmap of
// other tiles than 64 x 64 is not used.
FASTATTN_DEVICE TileClass classify(const MaskParams& mask, const MaskSummary& summary, int64_t b, int64_t h, int64_t i0,
                                          int64_t i1, int64_t j0, int64_t j1) {
  const KeyInterval top = row_interval(mask, b, i0), bottom = row_interval(mask, b, i1 - 1);
  if (j1 <= top.first || j0 >= bottom.last) return TileClass::kEmpty;
  bool full = j0 >= bottom.first && j1 <= top.last;
  const int64_t word0 = j0 / kWordKeys, word1 = ceil_div(j1, kWordKeys);
  const int64_t block0 = i0 / kWordKeys, block1 = ceil_div(i1, kWordKeys);
  if (summary.key_words) {
    bool any = false;
#pragma unroll 1
    for (int64_t w = word0; w < word1; ++w) {
      const uint64_t keys = summary.key_words[b * summary.blocks_k + w];
      any = any || keys;
      full = full && keys == bits_before(j1, w * kWordKeys);
    }
    if (!any) return TileClass::kEmpty;
  } else if (mask.key_lengths) {
    const int64_t length = mask.key_lengths[b * mask.stride_key_lengths_b];
    if (j0 >= length) return TileClass::kEmpty;
    full = full && j1 <= length;
  }
  if (summary.query_segments) {
    const SegmentRange* const queries = summary.query_segments + b * summary.blocks_q;
    const SegmentRange* const keys = summary.key_segments + b * summary.blocks_k;
    SegmentRange q = queries[block0], k = keys[word0];
#pragma unroll 1
    for (int64_t n = block0 + 1; n < block1; ++n) q = {min64(q.low, queries[n].low), max64(q.high, queries[n].high)};
#pragma unroll 1
    for (int64_t n = word0 + 1; n < word1; ++n) k = {min64(k.low, keys[n].low), max64(k.high, keys[n].high)};
    if (q.low > k.high || k.low > q.high) return TileClass::kEmpty;
    full = full && q.low == q.high && k.low == k.high;
  }
  if (mask.bits) {
    if (!mask.live || mask.block_m != kWordKeys || mask.block_n != kWordKeys) return TileClass::kPartial;
    const int count = static_cast<int>(word1 - word0);
    const uint64_t every = (uint64_t{1} << count) - 1;
    uint64_t live = 0;
#pragma unroll 1
    for (int64_t n = block0; n < block1; ++n) {
      const int64_t row = b * mask.stride_map_b + h * mask.stride_map_h + n * mask.map_words_per_row;
      live |= mask_detail::map_bits(mask.live + row, word0, count);
      full = full && mask_detail::map_bits(mask.full + row, word0, count) == every;
    }
    if (!live) return TileClass::kEmpty;
  }
  return full ? TileClass::kFull : TileClass::kPartial;
}

namespace mask_detail {

// Walks the live tiles of [first, last): every lane classifies one of 32 candidates, and the ballots are the list. Whole
// warps call next, each on its own: there is no barrier, and every warp of a block sees the same tiles.
template <typename Classify>
FASTATTN_DEVICE bool next_tile(uint32_t& live, uint32_t& full, int& first, int last, int& tile, bool& is_full,
                                      const Classify& classify_tile) {
  while (live == 0) {
    if (first >= last) return false;
    const int candidate = first + static_cast<int>(threadIdx.x % 32);
    TileClass found = TileClass::kEmpty;
    bool whole = false;
    if (candidate < last) found = classify_tile(candidate, whole);
    live = __ballot_sync(~0u, found != TileClass::kEmpty);
    full = __ballot_sync(~0u, found == TileClass::kFull && whole);
    first += 32;
  }
  const int bit = __ffs(static_cast<int>(live)) - 1;
  tile = first - 32 + bit;
  is_full = full >> bit & 1;
  live &= live - 1;
  return true;
}

}  // namespace mask_detail

// The live key tiles of the query tile [i0, i0 + BM), in ascending order. Key tile t is [t * BN, (t + 1) * BN).
// i0 < len_q. BM and BN are multiples of 64, or BM divides 64 and i0 lies in one block of 64.
template <int BM, int BN>
class KeyTiles {
 public:
  FASTATTN_DEVICE_MEMBER KeyTiles(const MaskParams& mask, const MaskSummary& summary, int64_t b, int64_t h, int64_t i0,
                                  int64_t len_q, int64_t len_k)
      : mask_(mask), summary_(summary), b_(static_cast<int>(b)), h_(static_cast<int>(h)), i0_(static_cast<int>(i0)),
        i1_(static_cast<int>(min64(i0 + BM, len_q))), len_k_(len_k) {
    const KeyInterval keys = key_range(mask, b, i0_, i1_, len_k);
    first_ = static_cast<int>(keys.first / BN);
    last_ = keys.first < keys.last ? static_cast<int>(ceil_div(keys.last, BN)) : first_;
  }

  // Only the tiles [begin, end); before the first call of next.
  FASTATTN_DEVICE_MEMBER void clip(int begin, int end) {
    first_ = first_ > begin ? first_ : begin;
    last_ = last_ < end ? last_ : end;
  }

  // By whole warps. False: no tile is left. `full`: the tile needs no mask, and all of its keys exist.
  FASTATTN_DEVICE_MEMBER bool next(int& tile, bool& full) {
    return mask_detail::next_tile(live_, full_, first_, last_, tile, full, [&](int candidate, bool& whole) {
      const int64_t j0 = static_cast<int64_t>(candidate) * BN;
      whole = j0 + BN <= len_k_;
      // opaque: what follows from these for every tile would wait in the registers of the caller's loop
      return classify(mask_, summary_, ptx::opaque(b_), ptx::opaque(h_), ptx::opaque(i0_), ptx::opaque(i1_), j0,
                      min64(j0 + BN, len_k_));
    });
  }

 private:
  const MaskParams& mask_;
  const MaskSummary& summary_;
  const int b_, h_, i0_, i1_;  // int: they wait in registers for the next 32 tiles
  const int64_t len_k_;
  int first_, last_;
  uint32_t live_ = 0, full_ = 0;
};

// The live query tiles of the key tile [j0, j0 + BN), in ascending order. Query tile t is [t * BM, (t + 1) * BM). j0 < len_k.
template <int BM, int BN>
class QueryTiles {
 public:
  FASTATTN_DEVICE_MEMBER QueryTiles(const MaskParams& mask, const MaskSummary& summary, int64_t b, int64_t h, int64_t j0,
                                    int64_t len_q, int64_t len_k)
      : mask_(mask), summary_(summary), b_(b), h_(h), j0_(j0), j1_(min64(j0 + BN, len_k)), len_q_(len_q) {
    const KeyInterval rows = query_range(mask, b, j0_, j1_, len_q);
    first_ = static_cast<int>(rows.first / BM);
    last_ = rows.first < rows.last ? static_cast<int>(ceil_div(rows.last, BM)) : first_;
    whole_ = j0 + BN <= len_k;
  }

  // As KeyTiles::next.
  FASTATTN_DEVICE_MEMBER bool next(int& tile, bool& full) {
    return mask_detail::next_tile(live_, full_, first_, last_, tile, full, [&](int candidate, bool& whole) {
      const int64_t i0 = static_cast<int64_t>(candidate) * BM;
      whole = whole_;
      return classify(mask_, summary_, b_, h_, i0, min64(i0 + BM, len_q_), j0_, j1_);
    });
  }

 private:
  const MaskParams& mask_;
  const MaskSummary& summary_;
  const int64_t b_, h_, j0_, j1_, len_q_;
  bool whole_;
  int first_, last_;
  uint32_t live_ = 0, full_ = 0;
};

// Bit j: query i may attend to key j0 + j. j0 is a multiple of 64. Keys beyond len_k and rows beyond len_q give 0.
FASTATTN_DEVICE uint64_t row_word(const MaskParams& mask, const MaskSummary& summary, int64_t b, int64_t h, int64_t i,
                                         int64_t j0, int64_t len_k) {
  if (i >= summary.len_q) return 0;
  uint64_t word = bits_before(len_k, j0) & interval_word(mask, b, i, j0);
  if (!word) return 0;  // also where no word exists to be read
  if (summary.key_words) word &= summary.key_words[b * summary.blocks_k + j0 / kWordKeys];
  else if (mask.key_lengths) word &= bits_before(mask.key_lengths[b * mask.stride_key_lengths_b], j0);
  if (mask.bits) word &= dense_word(mask, b, h, i, j0);
  if (mask.query_segments && word) word &= mask_detail::segment_word(mask, summary, b, i, j0, word);
  return word;
}

// The words of the rows i0 .. i0 + BM - 1 of a partial tile, words[r][c] for the keys j0 + 64 c, and their OR over the rows.
// By `THREADS` threads, whole warps; `thread` counts them from 0. Each word is owned by one thread and each word of `any` by
// one warp, so nothing needs to be cleared before; the caller puts a barrier in front of it and behind it.
template <int BM, int BN, int THREADS>
FASTATTN_DEVICE void stage_mask_words(uint64_t* words /* [BM][BN / 64] */, uint64_t* any /* [BN / 64] */,
                                             const MaskParams& mask, const MaskSummary& summary, int64_t b, int64_t h,
                                             int64_t i0, int64_t j0, int64_t len_k, int thread) {
  static_assert(BN % kWordKeys == 0 && THREADS % 32 == 0, "whole words and whole warps");
  constexpr int kColumns = BN / kWordKeys;
  for (int c = thread / 32; c < kColumns; c += THREADS / 32) {
    uint64_t found = 0;
#pragma unroll 2
    for (int r = thread % 32; r < BM; r += 32) {
      const uint64_t word = row_word(mask, summary, b, h, i0 + r, j0 + c * kWordKeys, len_k);
      words[r * kColumns + c] = word;
      found |= word;
    }
    const uint64_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(found));
    const uint64_t high = __reduce_or_sync(~0u, static_cast<uint32_t>(found >> 32));
    if (thread % 32 == 0) any[c] = low | high << 32;
  }
}

}  // namespace fastattn::cuda
