// The mask on the device (csrc/cuda/mask.h), in the emulator: the cursors over live tiles and the words of partial tiles,
// against the rule of csrc/core for every pair.
#include <vector>

#include "../cuda/kernels.h"
#include "../cuda/mask.h"
#include "check.h"

using namespace fastattn;
using fastattn::test::Random;

namespace {

constexpr int kThreads = 64, kMaxTiles = 80;

struct Tile {
  int32_t number, full;
};

// What one warp of one block saw. [B, H, own tiles, warps]
struct Walk {
  int32_t count;
  Tile tile[kMaxTiles];
};

// One block for each query tile. Words: [B, H, L, words] of the partial tiles, `any`: [B, H, query tiles, words].
template <int BM, int BN>
FASTATTN_KERNEL(kThreads) key_tiles_kernel(const FASTATTN_GRID_CONSTANT AttentionParams p, cuda::MaskSummary summary, Walk* walks,
                                           uint64_t* words, uint64_t* any) {
  FASTATTN_SHARED(shared);
  constexpr int kColumns = BN / 64;
  uint64_t* const row_words = reinterpret_cast<uint64_t*>(shared);
  uint64_t* const any_words = row_words + BM * kColumns;
  const int64_t tiles_q = ceil_div(p.len_q, BM), words_per_row = ceil_div(p.len_k, 64);
  const int64_t qt = blockIdx.x % tiles_q, bh = blockIdx.x / tiles_q, b = bh / p.heads_q, h = bh % p.heads_q;
  Walk& walk = walks[blockIdx.x * (kThreads / 32) + threadIdx.x / 32];
  cuda::KeyTiles<BM, BN> tiles(p.mask, summary, b, h, qt * BM, p.len_q, p.len_k);
  int tile, count = 0;
  bool full;
  while (tiles.next(tile, full)) {
    if (threadIdx.x % 32 == 0) walk.tile[count] = {tile, full};
    ++count;
    if (full) continue;
    const int64_t j0 = int64_t{tile} * BN;
    cuda::stage_mask_words<BM, BN, kThreads>(row_words, any_words, p.mask, summary, b, h, qt * BM, j0, p.len_k,
                                             static_cast<int>(threadIdx.x));
    cuda::__syncthreads();
    for (int n = static_cast<int>(threadIdx.x); n < BM * kColumns; n += kThreads) {
      const int64_t i = qt * BM + n / kColumns, w = j0 / 64 + n % kColumns;
      if (i < p.len_q && w < words_per_row) words[(bh * p.len_q + i) * words_per_row + w] = row_words[n];
      else if (row_words[n]) cuda::emulator::fail("a word beyond the mask is not 0");
    }
    for (int c = 0; c < kColumns; ++c)
      if (threadIdx.x == 0 && j0 / 64 + c < words_per_row) any[blockIdx.x * words_per_row + j0 / 64 + c] = any_words[c];
    cuda::__syncthreads();
  }
  if (threadIdx.x % 32 == 0) walk.count = count;
}

// One block for each key tile.
template <int BM, int BN>
FASTATTN_KERNEL(kThreads) query_tiles_kernel(const FASTATTN_GRID_CONSTANT AttentionParams p, cuda::MaskSummary summary,
                                             Walk* walks) {
  const int64_t tiles_k = ceil_div(p.len_k, BN), kt = blockIdx.x % tiles_k, bh = blockIdx.x / tiles_k;
  Walk& walk = walks[blockIdx.x * (kThreads / 32) + threadIdx.x / 32];
  cuda::QueryTiles<BM, BN> tiles(p.mask, summary, bh / p.heads_q, bh % p.heads_q, kt * BN, p.len_q, p.len_k);
  int tile, count = 0;
  bool full;
  while (tiles.next(tile, full)) {
    if (threadIdx.x % 32 == 0) walk.tile[count] = {tile, full};
    ++count;
  }
  if (threadIdx.x % 32 == 0) walk.count = count;
}

// A mask of random parts, and the memory behind it.
struct RandomMask {
  AttentionParams p;
  int parts = 0;
  std::vector<int64_t> prefix, key_lengths, query_ids, key_ids;
  std::vector<uint8_t> keep, dense;
  std::vector<uint64_t> bits, live, full, live_t, full_t;

  explicit RandomMask(Random& random, bool long_dense = false) {
    const int64_t lengths[] = {1, 17, 64, 65, 130, 197, 260, 333};
    p.batch = random.integer(1, 2);
    p.heads_q = p.heads_kv = random.integer(1, 2);
    p.len_q = lengths[random.integer(0, 7)];
    p.len_k = lengths[random.integer(0, 7)];
    if (long_dense || random.chance(0.1)) p.len_k = 4200;  // more tiles than a warp looks at in one go
    else if (random.chance(0.1)) p.len_q = 4200;
    MaskParams& mask = p.mask;
    if (long_dense) {
      ++parts;
      add_dense(random, true);
      return;
    }
    if (random.chance(0.35)) ++parts, mask.band_high = random.integer(-20, 80);
    if (random.chance(0.25)) ++parts, mask.band_low = random.integer(-150, 10);
    if (random.chance(0.2)) {
      ++parts;
      for (int64_t b = 0; b < p.batch; ++b) prefix.push_back(random.integer(-1, p.len_k + 1));
      mask.prefix_lengths = prefix.data();
      mask.stride_prefix_b = 1;
    }
    if (random.chance(0.3)) {
      ++parts;
      const bool broadcast = random.chance(0.3);
      for (int64_t b = 0; b < p.batch; ++b) key_lengths.push_back(random.integer(-1, p.len_k + 1));
      if (random.chance(0.2)) key_lengths[0] = INT64_MIN;
      mask.key_lengths = key_lengths.data();
      mask.stride_key_lengths_b = broadcast ? 0 : 1;
    }
    if (random.chance(0.3)) {
      ++parts;
      keep.resize(p.batch * p.len_k * 2);
      const double density = random.chance(0.5) ? 0.02 : 0.9;
      for (uint8_t& x : keep) x = random.chance(density);
      if (random.chance(0.5))
        for (size_t n = 0; n < keep.size(); ++n) keep[n] = n / 2 % p.len_k < static_cast<uint64_t>(p.len_k / 2);
      mask.key_keep = keep.data();
      mask.stride_keep_b = p.len_k * 2;
      mask.stride_keep_j = 2;
    }
    if (random.chance(0.35)) {
      ++parts;
      const int64_t run = random.chance(0.5) ? 1 : random.integer(30, 200);
      const int64_t ids = run == 1 ? random.integer(1, 9) : 1000;  // in no order, or in runs
      for (int64_t n = 0; n < p.batch * p.len_q; ++n)
        query_ids.push_back(run == 1 ? random.integer(-4, ids) : n % p.len_q / run);
      for (int64_t n = 0; n < p.batch * p.len_k; ++n) key_ids.push_back(run == 1 ? random.integer(-4, ids) : n % p.len_k / run);
      mask.query_segments = query_ids.data();
      mask.key_segments = key_ids.data();
      mask.stride_qseg_b = p.len_q;
      mask.stride_kseg_b = p.len_k;
      mask.stride_qseg_i = mask.stride_kseg_j = 1;
    }
    if (random.chance(0.4)) ++parts, add_dense(random);
  }

  RandomMask(const RandomMask&) = delete;

 private:
  void add_dense(Random& random, bool late = false) {
    MaskTilesParams t;
    t.batch = random.chance(0.5) ? p.batch : 1;
    t.heads = random.chance(0.5) ? p.heads_q : 1;
    t.len_q = p.len_q;
    t.len_k = p.len_k;
    t.block_m = random.chance(0.7) ? cuda::kTileM : 128;
    t.block_n = cuda::kTileN;
    dense.resize(t.batch * t.heads * p.len_q * p.len_k);
    // Regions that are empty, full or mixed.
    for (size_t n = 0; n < dense.size(); ++n) {
      const uint64_t region = (n / p.len_k / 100 * 31 + n % p.len_k / 90 * 17) % 3;
      dense[n] = late ? n % p.len_k >= 4096 : region == 0 ? 0 : region == 1 ? 1 : random.chance(0.5);
    }
    t.num_masks = 1;
    t.mask[0] = dense.data();
    const int64_t size[] = {t.batch, t.heads, p.len_q, p.len_k};
    int64_t stride = 1;
    for (int d = 3; d >= 0; --d) t.mask_stride[0][d] = stride, stride *= size[d];
    const int64_t nq = ceil_div(p.len_q, t.block_m), nk = ceil_div(p.len_k, t.block_n), bh = t.batch * t.heads;
    MaskParams& mask = p.mask;
    mask.words_per_row = ceil_div(p.len_k, 64);
    mask.map_words_per_row = ceil_div(nk, 64);
    mask.map_t_words_per_row = ceil_div(nq, 64);
    bits.resize(bh * p.len_q * mask.words_per_row);
    live.resize(bh * nq * mask.map_words_per_row);
    full.resize(live.size());
    live_t.resize(bh * nk * mask.map_t_words_per_row);
    full_t.resize(live_t.size());
    mask.bits = t.bits = bits.data();
    mask.live = t.live = live.data();
    mask.full = t.full = full.data();
    mask.live_t = t.live_t = live_t.data();
    mask.full_t = t.full_t = full_t.data();
    mask.block_m = t.block_m;
    mask.block_n = t.block_n;
    mask.stride_bits_h = t.heads > 1 ? p.len_q * mask.words_per_row : 0;
    mask.stride_bits_b = t.batch > 1 ? t.heads * p.len_q * mask.words_per_row : 0;
    mask.stride_map_h = t.heads > 1 ? nq * mask.map_words_per_row : 0;
    mask.stride_map_b = t.batch > 1 ? t.heads * nq * mask.map_words_per_row : 0;
    mask.stride_map_t_h = t.heads > 1 ? nk * mask.map_t_words_per_row : 0;
    mask.stride_map_t_b = t.batch > 1 ? t.heads * nk * mask.map_t_words_per_row : 0;
    cuda::mask_tiles(t);
  }
};

// Pairs that may attend of [i0, i0 + BM) x [j0, j0 + BN), and how many exist.
struct Pairs {
  int64_t attending, existing;
};

Pairs count_pairs(const AttentionParams& p, int64_t b, int64_t h, int64_t i0, int64_t bm, int64_t j0, int64_t bn) {
  Pairs pairs{0, 0};
  for (int64_t i = i0; i < min64(i0 + bm, p.len_q); ++i)
    for (int64_t j = j0; j < min64(j0 + bn, p.len_k); ++j) ++pairs.existing, pairs.attending += may_attend(p.mask, b, h, i, j);
  return pairs;
}

// The list of one block, of both warps: ascending, every live tile, full ones full. `exact`: no other tile.
template <typename Of>
void check_walk(const Walk* walk, int64_t tiles, bool exact, const Of& pairs_of) {
  int at = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    bool whole = false;
    const Pairs pairs = pairs_of(t, whole);
    const bool listed = at < walk->count && walk->tile[at].number == t;
    CHECK(listed || pairs.attending == 0);
    CHECK(!listed || !exact || pairs.attending > 0);
    if (!listed) continue;
    CHECK(!walk->tile[at].full || (pairs.attending == pairs.existing && whole));
    CHECK(walk->tile[at].full || !exact || pairs.attending < pairs.existing || !whole);
    ++at;
  }
  CHECK(at == walk->count);
  for (int n = 0; n < walk->count; ++n)
    CHECK(walk[1].count == walk->count && walk[1].tile[n].number == walk->tile[n].number && walk[1].tile[n].full == walk->tile[n].full);
}

template <int BM, int BN>
void check(const RandomMask& random_mask, uint64_t seed) {
  AttentionParams p = random_mask.p;
  const int64_t bh = p.batch * p.heads_q, tiles_q = ceil_div(p.len_q, BM), tiles_k = ceil_div(p.len_k, BN);
  const int64_t words_per_row = ceil_div(p.len_k, 64);
  const MaskParams& mask = p.mask;
  // One part by itself is classified exactly; ids in no order and a map of other tiles are not.
  const bool exact = random_mask.parts <= 1 && !mask.query_segments && (!mask.bits || mask.block_m == 64);
  std::vector<uint64_t> workspace(cuda::mask_summary_bytes(p) / 8, 0xffffffffffffffffull);
  cuda::emulator::set_seed(seed);
  const cuda::MaskSummary summary = cuda::prepare_mask(p, workspace.data(), nullptr);

  std::vector<Walk> walks(bh * tiles_q * 2);
  const uint64_t poison = 0xaaaaaaaaaaaaaaaaull;
  std::vector<uint64_t> words(bh * p.len_q * words_per_row, poison), any(bh * tiles_q * words_per_row, poison);
  cuda::launch("key_tiles_kernel", key_tiles_kernel<BM, BN>, cuda::dim3(static_cast<unsigned>(bh * tiles_q)), cuda::dim3(kThreads),
               (BM + 1) * (BN / 64) * 8, nullptr, p, summary, walks.data(), words.data(), any.data());
  for (int64_t n = 0; n < bh * tiles_q; ++n) {
    const int64_t b = n / tiles_q / p.heads_q, h = n / tiles_q % p.heads_q, i0 = n % tiles_q * BM;
    const Walk& walk = walks[n * 2];
    check_walk(&walk, tiles_k, exact, [&](int64_t t, bool& whole) {
      whole = (t + 1) * BN <= p.len_k;
      return count_pairs(p, b, h, i0, BM, t * BN, BN);
    });
    for (int k = 0; k < walk.count; ++k) {
      if (walk.tile[k].full) continue;
      for (int64_t w = walk.tile[k].number * (BN / 64); w < min64((walk.tile[k].number + 1) * (BN / 64), words_per_row); ++w) {
        uint64_t seen = 0;
        for (int64_t i = i0; i < min64(i0 + BM, p.len_q); ++i) {
          const uint64_t wanted = row_word(mask, b, h, i, w * 64, min64(64, p.len_k - w * 64));
          CHECK(words[(n / tiles_q * p.len_q + i) * words_per_row + w] == wanted);
          seen |= wanted;
        }
        CHECK(any[n * words_per_row + w] == seen);
      }
    }
  }

  walks.assign(bh * tiles_k * 2, Walk{});
  cuda::launch("query_tiles_kernel", query_tiles_kernel<BM, BN>, cuda::dim3(static_cast<unsigned>(bh * tiles_k)),
               cuda::dim3(kThreads), 0, nullptr, p, summary, walks.data());
  for (int64_t n = 0; n < bh * tiles_k; ++n) {
    const int64_t b = n / tiles_k / p.heads_q, h = n / tiles_k % p.heads_q, j0 = n % tiles_k * BN;
    check_walk(&walks[n * 2], tiles_q, exact, [&](int64_t t, bool& whole) {
      whole = j0 + BN <= p.len_k;
      return count_pairs(p, b, h, t * BM, BM, j0, BN);
    });
  }
}

void test_random_masks() {
  Random random(17);
  for (int round = 0; round < 80; ++round) {
    const RandomMask mask(random);
    const uint64_t seed = random.bits();
    switch (round % 5) {
      case 0: check<64, 64>(mask, seed); break;
      case 1: check<128, 128>(mask, seed); break;
      case 2: check<64, 128>(mask, seed); break;
      case 3: check<192, 128>(mask, seed); break;
      default: check<128, 192>(mask, seed);
    }
  }
  // Tiles 3 bits of the bitmap wide, one of which goes from one of its words to the next, with keys only there.
  for (int round = 0; round < 4; ++round) check<128, 192>(RandomMask(random, true), random.bits());
}

}  // namespace

int main() {
  test_random_masks();
  return fastattn::test::result("cuda mask");
}
