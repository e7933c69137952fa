// The packed mask and its bitmaps at every instruction level this CPU has, against the definition.
#include <algorithm>
#include <vector>

#include "../cpu/kernels.h"
#include "levels.h"

using namespace fastattn;
using fastattn::test::Random;

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool bit(const std::vector<uint64_t>& words, int64_t row, int64_t words_per_row, int64_t n) {
  return words[row * words_per_row + (n >> 6)] >> (n & 63) & 1;
}

struct Maps {
  std::vector<uint64_t> bits, live, full, live_t, full_t;

  bool operator==(const Maps& other) const {
    return bits == other.bits && live == other.live && full == other.full && live_t == other.live_t && full_t == other.full_t;
  }
};

Maps run(MaskTilesParams p, int threads) {
  const int64_t bh = p.batch * p.heads, nq = ceil_div(p.len_q, p.block_m), nk = ceil_div(p.len_k, p.block_n);
  const uint64_t poison = 0xaaaaaaaaaaaaaaaaull;
  Maps maps;
  maps.bits.assign(bh * p.len_q * ceil_div(p.len_k, 64), poison);
  maps.live.assign(bh * nq * ceil_div(nk, 64), poison);
  maps.full = maps.live;
  maps.live_t.assign(bh * nk * ceil_div(nq, 64), poison);
  maps.full_t = maps.live_t;
  p.bits = maps.bits.data();
  p.live = maps.live.data();
  p.full = maps.full.data();
  p.live_t = maps.live_t.data();
  p.full_t = maps.full_t.data();
  p.num_threads = threads;
  cpu::mask_tiles(p);
  return maps;
}

void compare(const MaskTilesParams& p, const Maps& maps) {
  const int64_t words = ceil_div(p.len_k, 64), nq = ceil_div(p.len_q, p.block_m), nk = ceil_div(p.len_k, p.block_n);
  const auto attends = [&](int64_t b, int64_t h, int64_t i, int64_t j) {
    for (int m = 0; m < p.num_masks; ++m) {
      const int64_t* stride = p.mask_stride[m];
      if (!p.mask[m][b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]]) return false;
    }
    return true;
  };
  for (int64_t bh = 0; bh < p.batch * p.heads; ++bh) {
    const int64_t b = bh / p.heads, h = bh % p.heads;
    std::vector<int64_t> count(nq * nk, 0);
    for (int64_t i = 0; i < p.len_q; ++i)
      for (int64_t j = 0; j < words * 64; ++j) {
        const bool expected = j < p.len_k && attends(b, h, i, j);
        CHECK(bit(maps.bits, bh * p.len_q + i, words, j) == expected);
        if (expected) ++count[i / p.block_m * nk + j / p.block_n];
      }
    const auto height = [&](int64_t qt) { return std::min(p.block_m, p.len_q - qt * p.block_m); };
    const auto width = [&](int64_t kt) { return std::min(p.block_n, p.len_k - kt * p.block_n); };
    // Bits of tiles that do not exist are 0 too.
    for (int64_t qt = 0; qt < nq; ++qt)
      for (int64_t kt = 0; kt < ceil_div(nk, 64) * 64; ++kt) {
        const int64_t pairs = kt < nk ? count[qt * nk + kt] : 0;
        CHECK(bit(maps.live, bh * nq + qt, ceil_div(nk, 64), kt) == (pairs > 0));
        CHECK(bit(maps.full, bh * nq + qt, ceil_div(nk, 64), kt) == (kt < nk && pairs == height(qt) * width(kt)));
      }
    for (int64_t kt = 0; kt < nk; ++kt)
      for (int64_t qt = 0; qt < ceil_div(nq, 64) * 64; ++qt) {
        const int64_t pairs = qt < nq ? count[qt * nk + kt] : 0;
        CHECK(bit(maps.live_t, bh * nk + kt, ceil_div(nq, 64), qt) == (pairs > 0));
        CHECK(bit(maps.full_t, bh * nk + kt, ceil_div(nq, 64), qt) == (qt < nq && pairs == height(qt) * width(kt)));
      }
  }
}

void test_random_masks() {
  Random random(31);
  const int64_t lengths[] = {1, 17, 47, 48, 63, 64, 65, 113, 197, 300};
  const int64_t blocks_m[] = {1, 48, 50, 128}, blocks_n[] = {64, 128, 192};
  for (int round = 0; round < 80; ++round) {
    MaskTilesParams p;
    p.batch = random.integer(1, 2);
    p.heads = random.integer(1, 2);
    p.len_q = lengths[random.integer(0, 9)];
    // More than 4096 keys: more than one panel, and more than one word of the bitmap.
    p.len_k = round % 20 == 0 ? 4096 + 130 : lengths[random.integer(0, 9)];
    p.block_m = blocks_m[random.integer(0, 3)];
    p.block_n = blocks_n[random.integer(0, 2)];
    p.num_masks = static_cast<int>(random.integer(1, MaskTilesParams::kMaxMasks));
    const int64_t whole[] = {p.batch, p.heads, p.len_q, p.len_k};
    std::vector<std::vector<uint8_t>> masks(p.num_masks);
    for (int m = 0; m < p.num_masks; ++m) {
      int64_t size[4], elements = 1;
      const int64_t step = random.chance(0.3) ? 2 : 1;  // between keys
      for (int d = 3; d >= 0; --d) {
        size[d] = random.chance(0.6) ? whole[d] : 1;
        p.mask_stride[m][d] = size[d] > 1 ? elements * step : 0;
        elements *= size[d];
      }
      // As long as what may be read: the address sanitizer sees a step beyond.
      masks[m].resize((elements - 1) * step + 1);
      const double densities[] = {0.5, 0.98, 1.0, 1.0};
      const double density = densities[random.integer(0, 3)];
      for (uint8_t& x : masks[m]) x = random.chance(density);
      p.mask[m] = masks[m].data();
    }
    const Maps one = run(p, 1);
    compare(p, one);
    CHECK(run(p, 3) == one);
  }
}

void test_empty_masks() {
  for (const int empty : {0, 1, 2}) {
    MaskTilesParams p;
    p.batch = empty == 0 ? 0 : 2;
    p.heads = 2;
    p.len_q = empty == 1 ? 0 : 50;
    p.len_k = empty == 2 ? 0 : 70;
    p.block_m = 48;
    p.block_n = 64;
    const uint8_t yes = 1;
    p.num_masks = 1;
    p.mask[0] = &yes;
    compare(p, run(p, 2));
  }
}

}  // namespace

int main(int argc, char** argv) {
  return fastattn::test::run_every_level(argc, argv, "mask tiles", [] {
    test_random_masks();
    test_empty_masks();
  });
}
