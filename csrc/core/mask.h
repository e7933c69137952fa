// The mask rule, in one place: may query i of (batch b, head h) attend to key j, and what is a whole tile of pairs.
//
// Every part of MaskParams is an interval of keys per row (band, prefix, lengths), a set of keys (key_keep), an equality
// (segments) or a packed bitmap (dense). The rule is their AND. `row_word` gives 64 keys of one row at once; everything
// else follows from the same parts.
#pragma once

#include <cstdint>

#include "macros.h"
#include "params.h"

namespace fastattn {

enum class TileClass : int32_t { kEmpty = 0, kPartial = 1, kFull = 2 };

FASTATTN_HD static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_HD static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FASTATTN_HD static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bits of the keys in front of `end`, for a word whose bit 0 is key j0 >= 0. Any `end` is allowed: lengths come from the user.
FASTATTN_HD static inline uint64_t bits_before(int64_t end, int64_t j0) {
  if (end <= j0) return 0;
  return end - j0 >= 64 ? ~uint64_t{0} : (uint64_t{1} << (end - j0)) - 1;
}

// Keys of row i by arithmetic: first <= j < last, from the band and the prefix. Not clipped to the keys that exist.
struct KeyInterval {
  int64_t first, last;
};

FASTATTN_HD static inline KeyInterval row_interval(const MaskParams& mask, int64_t b, int64_t i) {
  KeyInterval keys{i + mask.band_low, i + mask.band_high + 1};
  // j <= i or j < length is j < max(i + 1, length)
  if (mask.prefix_lengths) keys.last = min64(keys.last, max64(i + 1, mask.prefix_lengths[b * mask.stride_prefix_b]));
  return keys;
}

// The parts that do not depend on the query, for keys j0 .. j0 + count - 1; count <= 64.
FASTATTN_HD static inline uint64_t key_word(const MaskParams& mask, int64_t b, int64_t j0, int64_t count) {
  uint64_t word = bits_before(j0 + count, j0);
  if (mask.key_lengths) word &= bits_before(mask.key_lengths[b * mask.stride_key_lengths_b], j0);
  if (mask.key_keep) {
    const uint8_t* keep = mask.key_keep + b * mask.stride_keep_b + j0 * mask.stride_keep_j;
    uint64_t kept = 0;
    for (int64_t j = 0; j < count; ++j) kept |= uint64_t{keep[j * mask.stride_keep_j] != 0} << j;
    word &= kept;
  }
  return word;
}

FASTATTN_HD static inline uint64_t interval_word(const MaskParams& mask, int64_t b, int64_t i, int64_t j0) {
  const KeyInterval keys = row_interval(mask, b, i);
  return bits_before(keys.last, j0) & ~bits_before(keys.first, j0);
}

FASTATTN_HD static inline uint64_t segment_word(const MaskParams& mask, int64_t b, int64_t i, int64_t j0, int64_t count) {
  const int64_t id = mask.query_segments[b * mask.stride_qseg_b + i * mask.stride_qseg_i];
  const int64_t* keys = mask.key_segments + b * mask.stride_kseg_b + j0 * mask.stride_kseg_j;
  uint64_t word = 0;
  for (int64_t j = 0; j < count; ++j) word |= uint64_t{keys[j * mask.stride_kseg_j] == id} << j;
  return word;
}

// j0 is a multiple of 64.
FASTATTN_HD static inline uint64_t dense_word(const MaskParams& mask, int64_t b, int64_t h, int64_t i, int64_t j0) {
  return mask.bits[b * mask.stride_bits_b + h * mask.stride_bits_h + i * mask.words_per_row + (j0 >> 6)];
}

// Bit j: query i may attend to key j0 + j. j0 is a multiple of 64, count <= 64; bits at or beyond count are 0.
FASTATTN_HD static inline uint64_t row_word(const MaskParams& mask, int64_t b, int64_t h, int64_t i, int64_t j0,
                                            int64_t count) {
  uint64_t word = key_word(mask, b, j0, count) & interval_word(mask, b, i, j0);
  if (mask.query_segments) word &= segment_word(mask, b, i, j0, count);
  if (mask.bits) word &= dense_word(mask, b, h, i, j0);
  return word;
}

FASTATTN_HD static inline bool may_attend(const MaskParams& mask, int64_t b, int64_t h, int64_t i, int64_t j) {
  const KeyInterval keys = row_interval(mask, b, i);
  if (j < keys.first || j >= keys.last) return false;
  if (mask.key_lengths && j >= mask.key_lengths[b * mask.stride_key_lengths_b]) return false;
  if (mask.key_keep && !mask.key_keep[b * mask.stride_keep_b + j * mask.stride_keep_j]) return false;
  if (mask.query_segments && mask.query_segments[b * mask.stride_qseg_b + i * mask.stride_qseg_i] !=
                                 mask.key_segments[b * mask.stride_kseg_b + j * mask.stride_kseg_j])
    return false;
  return !mask.bits || (dense_word(mask, b, h, i, j & ~int64_t{63}) >> (j & 63) & 1);
}

FASTATTN_HD static inline bool has_mask(const MaskParams& mask) {
  return mask.band_low > -kUnlimited || mask.band_high < kUnlimited || mask.prefix_lengths || mask.key_lengths ||
         mask.key_keep || mask.query_segments || mask.bits;
}

// Keys outside [first, last) attend to no query of [i0, i1), by arithmetic; clipped to 0 .. len_k, empty when first >= last.
FASTATTN_HD static inline KeyInterval key_range(const MaskParams& mask, int64_t b, int64_t i0, int64_t i1, int64_t len_k) {
  KeyInterval keys{row_interval(mask, b, i0).first, min64(len_k, row_interval(mask, b, i1 - 1).last)};
  if (mask.key_lengths) keys.last = min64(keys.last, mask.key_lengths[b * mask.stride_key_lengths_b]);
  // Both sides on both ends: the caller subtracts, and a length of the user's may be the smallest number there is.
  return {min64(max64(0, keys.first), len_k), max64(0, keys.last)};
}

// Queries outside [first, last) attend to no key of [j0, j1), by arithmetic; clipped to 0 .. len_q, empty when first >= last.
FASTATTN_HD static inline KeyInterval query_range(const MaskParams& mask, int64_t b, int64_t j0, int64_t j1, int64_t len_q) {
  KeyInterval rows{max64(0, j0 - mask.band_high), min64(len_q, j1 - mask.band_low)};
  if (mask.prefix_lengths && j0 >= mask.prefix_lengths[b * mask.stride_prefix_b]) rows.first = max64(rows.first, j0);
  if (mask.key_lengths && j0 >= mask.key_lengths[b * mask.stride_key_lengths_b]) rows.last = 0;
  return {min64(rows.first, len_q), max64(0, rows.last)};
}

// Smallest and largest segment id of positions [begin, end).
struct SegmentRange {
  int64_t low, high;
};

FASTATTN_HD static inline SegmentRange segment_range(const int64_t* ids, int64_t stride, int64_t begin, int64_t end) {
  SegmentRange range{ids[begin * stride], ids[begin * stride]};
  for (int64_t i = begin + 1; i < end; ++i) {
    range.low = min64(range.low, ids[i * stride]);
    range.high = max64(range.high, ids[i * stride]);
  }
  return range;
}

// Class of the pairs [i0, i1) x [j0, j1), neither side empty, j1 - j0 <= 64: the AND over the parts of the part's class.
// kEmpty and kFull are certain; kPartial may still turn out empty when parts exclude each other. The bitmap of a dense
// part is used only where the tile is one of its own; elsewhere the dense part counts as partial.
FASTATTN_HD static inline TileClass tile_class(const MaskParams& mask, int64_t b, int64_t h, int64_t i0, int64_t i1,
                                               int64_t j0, int64_t j1) {
  bool full = true;
  const KeyInterval top = row_interval(mask, b, i0), bottom = row_interval(mask, b, i1 - 1);
  if (j1 <= top.first || j0 >= bottom.last) return TileClass::kEmpty;
  full = full && j0 >= bottom.first && j1 <= top.last;
  if (mask.key_lengths || mask.key_keep) {
    const uint64_t keys = key_word(mask, b, j0, j1 - j0);
    if (!keys) return TileClass::kEmpty;
    full = full && keys == bits_before(j1, j0);
  }
  if (mask.query_segments) {
    const SegmentRange q = segment_range(mask.query_segments + b * mask.stride_qseg_b, mask.stride_qseg_i, i0, i1);
    const SegmentRange k = segment_range(mask.key_segments + b * mask.stride_kseg_b, mask.stride_kseg_j, j0, j1);
    if (q.low > k.high || k.low > q.high) return TileClass::kEmpty;
    full = full && q.low == q.high && k.low == k.high;
  }
  if (mask.bits) {
    const bool aligned = mask.live && mask.block_m > 0 && mask.block_n > 0 && i0 % mask.block_m == 0 &&
                         j0 % mask.block_n == 0 && i1 - i0 <= mask.block_m && j1 - j0 <= mask.block_n;
    if (!aligned) return TileClass::kPartial;
    const int64_t kt = j0 / mask.block_n;
    const int64_t word = b * mask.stride_map_b + h * mask.stride_map_h + i0 / mask.block_m * mask.map_words_per_row + (kt >> 6);
    if (!(mask.live[word] >> (kt & 63) & 1)) return TileClass::kEmpty;
    full = full && (mask.full[word] >> (kt & 63) & 1);
  }
  return full ? TileClass::kFull : TileClass::kPartial;
}

}  // namespace fastattn
