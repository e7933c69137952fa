// Packs the AND of bool masks into bits and marks empty and full tiles. Every mask byte is read once, in memory order.
//
// Work item: the rows of one query tile, taken in panels of 64 words = 4096 keys, so that a panel of the AND and of the OR
// over the rows (1 KB) stays in L1 while each row is read as one stream. Bound by reading the mask: 1 byte a pair, written
// 1/8 byte a pair. The transposed bitmaps are made from the finished ones: 2 bits for each tile.
#include "bytes.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int64_t kPanelWords = 64;

// words[w] &= keys of one row of one mask; `row` points at key 0 of word 0, `count` keys are left from there.
static void and_row(uint64_t* words, const uint8_t* row, int64_t stride, int64_t count) {
  if (stride == 0) {
    if (!*row) std::memset(words, 0, ceil_div(count, 64) * sizeof(uint64_t));
    return;
  }
  for (int64_t w = 0; w * 64 < count; ++w)
    words[w] &= bool_word(row + w * 64 * stride, stride, min64(count - w * 64, 64));
}

// Keys [w0 * 64, w0 * 64 + keys) of the rows [i0, i1): their bits, and the OR and the AND over the rows.
static void pack_panel(const MaskTilesParams& p, int64_t b, int64_t h, int64_t i0, int64_t i1, int64_t w0, int64_t keys,
                       uint64_t* bits, int64_t words_per_row, uint64_t any[kPanelWords], uint64_t every[kPanelWords]) {
  const int64_t words = ceil_div(keys, 64);
  for (int64_t w = 0; w < words; ++w) any[w] = 0, every[w] = ~uint64_t{0};
  for (int64_t i = i0; i < i1; ++i) {
    uint64_t row[kPanelWords];
    for (int64_t w = 0; w < words; ++w) row[w] = bits_before(keys, w * 64);
    for (int m = 0; m < p.num_masks; ++m) {
      const int64_t* stride = p.mask_stride[m];
      and_row(row, p.mask[m] + b * stride[0] + h * stride[1] + i * stride[2] + w0 * 64 * stride[3], stride[3], keys);
    }
    std::memcpy(bits + i * words_per_row + w0, row, words * sizeof(uint64_t));
    for (int64_t w = 0; w < words; ++w) any[w] |= row[w], every[w] &= row[w];
  }
}

static void set_bit(uint64_t* map, int64_t index) { map[index >> 6] |= uint64_t{1} << (index & 63); }
static void clear_bit(uint64_t* map, int64_t index) { map[index >> 6] &= ~(uint64_t{1} << (index & 63)); }

// Query tile qt of one (b, h): bits of its rows and its row of both bitmaps.
static void pack_query_tile(const MaskTilesParams& p, int64_t b, int64_t h, int64_t qt, uint64_t* bits, uint64_t* live,
                            uint64_t* full) {
  const int64_t words_per_row = ceil_div(p.len_k, 64), words_per_tile = p.block_n / 64;
  const int64_t tiles = ceil_div(p.len_k, p.block_n);
  const int64_t i0 = qt * p.block_m, i1 = min64(i0 + p.block_m, p.len_q);
  for (int64_t w = 0; w * 64 < tiles; ++w) live[w] = 0, full[w] = bits_before(tiles, w * 64);
  for (int64_t w0 = 0; w0 < words_per_row; w0 += kPanelWords) {
    const int64_t keys = min64(p.len_k - w0 * 64, kPanelWords * 64);
    uint64_t any[kPanelWords], every[kPanelWords];
    pack_panel(p, b, h, i0, i1, w0, keys, bits, words_per_row, any, every);
    for (int64_t w = 0; w * 64 < keys; ++w) {
      const int64_t kt = (w0 + w) / words_per_tile;
      if (any[w]) set_bit(live, kt);
      if (every[w] != bits_before(keys, w * 64)) clear_bit(full, kt);
    }
  }
}

// Word `qw` of row kt of a transposed bitmap.
static uint64_t transposed_word(const uint64_t* map, int64_t map_words, int64_t tiles_q, int64_t kt, int64_t qw) {
  const int64_t count = min64(tiles_q - qw * 64, 64);
  uint64_t word = 0;
  for (int64_t k = 0; k < count; ++k) word |= (map[(qw * 64 + k) * map_words + (kt >> 6)] >> (kt & 63) & 1) << k;
  return word;
}

}  // namespace

void mask_tiles(const MaskTilesParams& p) {
  const int64_t tiles_q = ceil_div(p.len_q, p.block_m), tiles_k = ceil_div(p.len_k, p.block_n);
  const int64_t words_per_row = ceil_div(p.len_k, 64), map_words = ceil_div(tiles_k, 64), map_t_words = ceil_div(tiles_q, 64);
  const int64_t items = p.batch * p.heads * tiles_q, items_t = p.batch * p.heads * tiles_k;
  const int threads = static_cast<int>(max64(1, min64(max64(items, items_t), p.num_threads)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t bh = item / tiles_q, qt = item % tiles_q;
      pack_query_tile(p, bh / p.heads, bh % p.heads, qt, p.bits + bh * p.len_q * words_per_row, p.live + item * map_words,
                      p.full + item * map_words);
    }
    // A word of a transposed bitmap has bits of 64 query tiles, hence of several threads: only after the barrier above.
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items_t; ++item) {
      const int64_t first = item / tiles_k * tiles_q * map_words, kt = item % tiles_k;
      for (int64_t qw = 0; qw < map_t_words; ++qw) {
        p.live_t[item * map_t_words + qw] = transposed_word(p.live + first, map_words, tiles_q, kt, qw);
        p.full_t[item * map_t_words + qw] = transposed_word(p.full + first, map_words, tiles_q, kt, qw);
      }
    }
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
