// The packed mask and its bitmaps of the CUDA kernels, in the emulator, against the definition.
#include <algorithm>
#include <vector>

#include "../core/mask.h"
#include "../cuda/kernels.h"
#include "../cuda/platform.h"
#include "check.h"

using namespace fastattn;
using fastattn::test::Random;

namespace {

struct Maps {
  std::vector<uint64_t> bits, live, full, live_t, full_t;

  bool operator==(const Maps& other) const {
    return bits == other.bits && live == other.live && full == other.full && live_t == other.live_t && full_t == other.full_t;
  }
};

Maps run(MaskTilesParams p, uint64_t seed) {
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
  cuda::emulator::set_seed(seed);
  cuda::mask_tiles(p);
  return maps;
}

Maps define(const MaskTilesParams& p) {
  const int64_t bh = p.batch * p.heads, nq = ceil_div(p.len_q, p.block_m), nk = ceil_div(p.len_k, p.block_n);
  const int64_t words = ceil_div(p.len_k, 64), map_words = ceil_div(nk, 64), map_t_words = ceil_div(nq, 64);
  Maps maps;
  maps.bits.assign(bh * p.len_q * words, 0);
  maps.live.assign(bh * nq * map_words, 0);
  maps.full = maps.live;
  maps.live_t.assign(bh * nk * map_t_words, 0);
  maps.full_t = maps.live_t;
  for (int64_t n = 0; n < bh; ++n) {
    std::vector<int64_t> pairs(nq * nk, 0);
    for (int64_t i = 0; i < p.len_q; ++i)
      for (int64_t j = 0; j < p.len_k; ++j) {
        bool attends = true;
        for (int m = 0; m < p.num_masks; ++m) {
          const int64_t* stride = p.mask_stride[m];
          attends = attends && p.mask[m][n / p.heads * stride[0] + n % p.heads * stride[1] + i * stride[2] + j * stride[3]];
        }
        if (!attends) continue;
        maps.bits[(n * p.len_q + i) * words + (j >> 6)] |= uint64_t{1} << (j & 63);
        ++pairs[i / p.block_m * nk + j / p.block_n];
      }
    for (int64_t qt = 0; qt < nq; ++qt)
      for (int64_t kt = 0; kt < nk; ++kt) {
        const int64_t height = std::min(p.block_m, p.len_q - qt * p.block_m), width = std::min(p.block_n, p.len_k - kt * p.block_n);
        const uint64_t k_bit = uint64_t{1} << (kt & 63), q_bit = uint64_t{1} << (qt & 63);
        const int64_t found = pairs[qt * nk + kt], at = (n * nq + qt) * map_words + (kt >> 6),
                      at_t = (n * nk + kt) * map_t_words + (qt >> 6);
        if (found) maps.live[at] |= k_bit, maps.live_t[at_t] |= q_bit;
        if (found == height * width) maps.full[at] |= k_bit, maps.full_t[at_t] |= q_bit;
      }
  }
  return maps;
}

void check(const MaskTilesParams& p) {
  const Maps wanted = define(p), found = run(p, 1);
  CHECK(found.bits == wanted.bits);
  CHECK(found.live == wanted.live);
  CHECK(found.full == wanted.full);
  CHECK(found.live_t == wanted.live_t);
  CHECK(found.full_t == wanted.full_t);
  CHECK(run(p, 2) == found);
}

void test_random_masks() {
  Random random(31);
  const int64_t lengths[] = {1, 17, 63, 64, 65, 113, 128, 197, 304};
  const int64_t blocks_m[] = {64, 64, 128, 192, 48}, blocks_n[] = {64, 64, 128, 192, 512};
  for (int round = 0; round < 60; ++round) {
    MaskTilesParams p;
    p.batch = random.integer(1, 2);
    p.heads = random.integer(1, 2);
    p.len_q = lengths[random.integer(0, 8)];
    p.len_k = lengths[random.integer(0, 8)];
    p.block_m = blocks_m[random.integer(0, 4)];
    p.block_n = blocks_n[random.integer(0, 4)];
    if (round % 20 == 0) p.len_k = 4096 + (round % 40 == 0 ? 128 : 130), p.len_q = 70;  // more than one word of a bitmap
    if (round % 20 == 10) p.len_q = 4096 + 130, p.len_k = 70;                           // the same of a transposed one
    const bool plain = random.chance(0.4);  // one mask that 16-byte loads can read
    p.num_masks = plain ? 1 : static_cast<int>(random.integer(1, MaskTilesParams::kMaxMasks));
    const int64_t whole[] = {p.batch, p.heads, p.len_q, p.len_k};
    std::vector<std::vector<uint8_t>> masks(p.num_masks);
    for (int m = 0; m < p.num_masks; ++m) {
      int64_t size[4], elements = 1;
      const int64_t step = !plain && random.chance(0.3) ? 2 : 1;  // between keys
      const int64_t row = plain ? 16 : 1;                         // what a row is padded to
      for (int d = 3; d >= 0; --d) {
        size[d] = (plain && d == 3) || random.chance(0.6) ? whole[d] : 1;
        p.mask_stride[m][d] = size[d] > 1 ? elements * step : 0;
        elements *= d == 3 ? ceil_div(size[d], row) * row : size[d];
      }
      if (plain) p.mask_stride[m][3] = 1;
      // As long as what may be read: the address sanitizer sees a step beyond.
      masks[m].resize((elements - 1) * step + 1);
      const double densities[] = {0.5, 0.98, 1.0, 1.0};
      const double density = densities[random.integer(0, 3)];
      for (uint8_t& x : masks[m]) x = random.chance(density) ? static_cast<uint8_t>(random.chance(0.5) ? 1 : 0x80) : 0;
      if (random.chance(0.5)) {  // whole regions without, for tiles that are empty
        const int64_t cut = random.integer(0, elements - 1);
        for (int64_t n = cut; n < std::min(elements, cut + 20000); ++n) masks[m][n * step] = 0;
      }
      p.mask[m] = masks[m].data();
    }
    check(p);
  }
}

void test_empty_masks() {
  for (const int empty : {0, 1, 2}) {
    MaskTilesParams p;
    p.batch = empty == 0 ? 0 : 2;
    p.heads = 2;
    p.len_q = empty == 1 ? 0 : 50;
    p.len_k = empty == 2 ? 0 : 70;
    p.block_m = p.block_n = 64;
    const uint8_t yes = 1;
    p.num_masks = 1;
    p.mask[0] = &yes;
    check(p);
  }
}

}  // namespace

int main() {
  test_random_masks();
  test_empty_masks();
  return fastattn::test::result("cuda mask tiles");
}
