// Keys padded at random: the positions of the keys that are left, listed once per batch entry, so that a tile is 64 keys to attend to
// instead of 64 neighbours of which half are dead. Rows of K and V are copied to scratch by position, the rest of the mask, the bias
// and the dropout are looked up by position. A problem then costs in proportion to its live keys.
//
// Whether a batch entry is gathered depends on its keys alone: results do not depend on the rest of the batch nor on the threads.
#pragma once

#include "bytes.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Live keys of a batch entry in ascending order. Null: its tiles are neighbours in memory, and `count` is every key.
struct LiveKeys {
  const int32_t* position;
  int64_t count;

  // Live keys in front of key j.
  int64_t before(int64_t j) const {
    if (!position) return j;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (position[middle] < j) low = middle + 1;
      else high = middle;
    }
    return low;
  }
  KeyInterval among(KeyInterval keys) const { return {before(keys.first), before(keys.last)}; }
};

// The lists of a problem, in the shared part of its workspace.
struct LiveKeyLists {
  int32_t* position;  // [lists][len_k]; null when no batch entry can be gathered
  int64_t* count;     // [lists]; len_k + 1 where gathering would not save a tile
  int64_t lists;      // one for all batch entries, or one for each
  int64_t len_k;

  LiveKeys of(int64_t b) const {
    const int64_t n = lists > 1 ? b : 0;
    return position && count[n] <= len_k ? LiveKeys{position + n * len_k, count[n]} : LiveKeys{nullptr, len_k};
  }
};

// A dense mask is packed in words of neighbouring keys.
static bool can_gather(const AttentionParams& p) { return p.mask.key_keep && !p.mask.bits && p.len_k <= INT32_MAX; }

static LiveKeyLists carve_live_keys(Arena& arena, const AttentionParams& p, bool wanted) {
  const MaskParams& mask = p.mask;
  const bool differ = mask.stride_keep_b || (mask.key_lengths && mask.stride_key_lengths_b);
  LiveKeyLists keys{nullptr, nullptr, wanted ? (differ ? p.batch : min64(p.batch, 1)) : 0, p.len_k};
  keys.count = arena.take<int64_t>(keys.lists);
  keys.position = arena.take<int32_t>(keys.lists * p.len_k);
  if (!keys.lists) keys.position = nullptr;
  return keys;
}

static void fill_live_keys(const LiveKeyLists& keys, const MaskParams& mask) {
  for (int64_t b = 0; b < keys.lists; ++b) {
    const uint8_t* const keep = mask.key_keep + b * mask.stride_keep_b;
    int64_t len = keys.len_k, tiles = 0, count = 0;
    if (mask.key_lengths) len = max64(0, min64(len, mask.key_lengths[b * mask.stride_key_lengths_b]));
    int32_t* const position = keys.position + b * keys.len_k;
    for (int64_t j0 = 0; j0 < len; j0 += kTileN) {
      uint64_t word = bool_word(keep + j0 * mask.stride_keep_j, mask.stride_keep_j, min64(kTileN, len - j0));
      tiles += word != 0;
      for (; word; word &= word - 1) position[count++] = static_cast<int32_t>(j0 + __builtin_ctzll(word));
    }
    keys.count[b] = ceil_div(count, kTileN) < tiles ? count : keys.len_k + 1;
  }
}

// convert_rows of the keys at `position`; `head` is row 0.
template <typename T>
static void gather_rows(T* dst, int64_t ld, const void* head, DType dtype, int64_t stride, const int32_t* position, int rows,
                        int dim) {
  for (int r = 0; r < rows; ++r)
    convert_row(dst + r * ld, element(head, dtype, position[r] * stride), dtype, dim, static_cast<int>(ld));
}

// make_tile_mask for the `count` keys at `position`, all of them live; bit j is key position[j].
static void make_gathered_mask(TileMask& tile, const MaskParams& mask, int64_t b, int64_t i0, int rows, const int32_t* position,
                               int count) {
  const uint64_t all = bits_before(count, 0);
  tile.columns = all;
  tile.tile_class = TileClass::kFull;
  const KeyInterval top = row_interval(mask, b, i0), bottom = row_interval(mask, b, i0 + rows - 1);
  const int64_t low = position[0], high = position[count - 1];
  bool full = low >= bottom.first && high < top.last, empty = high < top.first || low >= bottom.last;
  if (mask.query_segments && !empty) {
    const int64_t* const ids = mask.key_segments + b * mask.stride_kseg_b;
    const SegmentRange q = segment_range(mask.query_segments + b * mask.stride_qseg_b, mask.stride_qseg_i, i0, i0 + rows);
    SegmentRange k{ids[low * mask.stride_kseg_j], ids[low * mask.stride_kseg_j]};
    for (int j = 1; j < count; ++j) {
      k.low = min64(k.low, ids[position[j] * mask.stride_kseg_j]);
      k.high = max64(k.high, ids[position[j] * mask.stride_kseg_j]);
    }
    empty = q.low > k.high || k.low > q.high;
    full = full && q.low == q.high && k.low == k.high;
  }
  if (empty) {
    tile.columns = 0;
    tile.tile_class = TileClass::kEmpty;
  }
  if (empty || full) return;

  uint64_t any = 0, every = all;
  int first = 0, last = 0;  // keys of the tile in front of the row's interval and of its end: neither falls from row to row
  for (int r = 0; r < rows; ++r) {
    const KeyInterval keys = row_interval(mask, b, i0 + r);
    while (first < count && position[first] < keys.first) ++first;
    while (last < count && position[last] < keys.last) ++last;
    uint64_t word = bits_before(last, 0) & ~bits_before(first, 0);
    if (mask.query_segments && word) {
      const int64_t* const ids = mask.key_segments + b * mask.stride_kseg_b;
      const int64_t id = mask.query_segments[b * mask.stride_qseg_b + (i0 + r) * mask.stride_qseg_i];
      for (int j = 0; j < count; ++j) word &= ~(uint64_t{ids[position[j] * mask.stride_kseg_j] != id} << j);
    }
    tile.rows[r] = word;
    any |= word;
    every &= word;
  }
  for (int r = rows; r < kTileM; ++r) tile.rows[r] = 0;
  tile.columns = any;
  tile.tile_class = any == 0 ? TileClass::kEmpty : every == all ? TileClass::kFull : TileClass::kPartial;
}

// make_dropout_tile for the keys at `position`.
static void make_gathered_dropout(uint64_t words[kTileM], const DropoutParams& dropout, int64_t b, int64_t h, int64_t i0, int rows,
                                  const int32_t* position, int count) {
  const uint64_t threshold = dropout_threshold(dropout.p);
  for (int r = 0; r < rows; ++r) {
    uint64_t kept = 0;
    for (int j = 0; j < count;) {
      const int64_t j0 = position[j] / kTileN * kTileN;
      const uint64_t word = dropout_word(dropout.seed, threshold, b, h, i0 + r, j0);
      for (; j < count && position[j] < j0 + kTileN; ++j) kept |= (word >> (position[j] - j0) & 1) << j;
    }
    words[r] = kept;
  }
  for (int r = rows; r < kTileM; ++r) words[r] = 0;
}

// Bias of the keys at `position` as rows of T, dst [rows][kTileN], up to whole vectors.
template <typename T>
static void gather_bias(T* dst, const TensorRef& bias, int64_t b, int64_t h, int64_t i0, int rows, const int32_t* position,
                        int count) {
  const int padded = round_up(count, kWidth<T>);
  for (int r = 0; r < rows; ++r, dst += kTileN) {
    const void* const row = element(bias.ptr, bias.dtype, b * bias.stride[0] + h * bias.stride[1] + (i0 + r) * bias.stride[2]);
    if (bias.dtype == kComputeDType<T>)
      for (int j = 0; j < count; ++j) dst[j] = static_cast<const T*>(row)[position[j] * bias.stride[3]];
    else
      for (int j = 0; j < count; ++j)
        dst[j] = static_cast<T>(load_scalar(element(row, bias.dtype, position[j] * bias.stride[3]), bias.dtype));
    for (int j = count; j < padded; ++j) dst[j] = T(0);
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
