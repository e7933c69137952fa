// csrc/core: the mask rule against its definition, Philox against published vectors, the empty-row rule.
#include <limits>
#include <vector>

#include "../core/mask.h"
#include "../core/philox.h"
#include "../core/softmax.h"
#include "check.h"

using namespace fastattn;
using fastattn::test::Random;

namespace {

// A random mask over B = 2, H = 2 and the arrays behind it.
struct Problem {
  int64_t len_q, len_k;
  MaskParams mask;
  std::vector<int64_t> prefix, lengths, query_segments, key_segments;
  std::vector<uint8_t> keep;
  std::vector<uint64_t> bits, live, full;
};

bool dense_bit(const Problem& problem, int64_t b, int64_t h, int64_t i, int64_t j) {
  const int64_t words = (problem.len_k + 63) / 64;
  return problem.bits[((b * 2 + h) * problem.len_q + i) * words + j / 64] >> (j % 64) & 1;
}

// The definitions of params.h, word for word.
bool by_definition(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (j - i < p.mask.band_low || j - i > p.mask.band_high) return false;
  if (!p.prefix.empty() && !(j <= i || j < p.prefix[b])) return false;
  if (!p.lengths.empty() && !(j < p.lengths[b])) return false;
  if (!p.keep.empty() && !p.keep[b * p.len_k + j]) return false;
  if (!p.query_segments.empty() && p.query_segments[b * p.len_q + i] != p.key_segments[b * p.len_k + j]) return false;
  return p.bits.empty() || dense_bit(p, b, h, i, j);
}

void fill(Problem& p, Random& random) {
  p.len_q = random.integer(1, 150);
  p.len_k = random.integer(1, 200);
  if (random.chance(0.5)) p.mask.band_low = random.integer(-100, 60);
  if (random.chance(0.5)) p.mask.band_high = random.integer(-60, 100);
  const int64_t extremes[] = {std::numeric_limits<int64_t>::min(), -1, 0, std::numeric_limits<int64_t>::max()};
  auto length = [&] { return random.chance(0.3) ? extremes[random.integer(0, 3)] : random.integer(0, p.len_k + 5); };
  if (random.chance(0.3)) {
    p.prefix = {length(), length()};
    p.mask.prefix_lengths = p.prefix.data();
    p.mask.stride_prefix_b = 1;
  }
  if (random.chance(0.4)) {
    p.lengths = {length(), length()};
    p.mask.key_lengths = p.lengths.data();
    p.mask.stride_key_lengths_b = 1;
  }
  if (random.chance(0.3)) {
    const double density = random.uniform();
    for (int64_t n = 0; n < 2 * p.len_k; ++n) p.keep.push_back(random.chance(density) ? 1 : 0);
    p.mask.key_keep = p.keep.data();
    p.mask.stride_keep_b = p.len_k;
    p.mask.stride_keep_j = 1;
  }
  if (random.chance(0.3)) {
    auto ids = [&](int64_t n) {
      std::vector<int64_t> out;
      for (int64_t b = 0; b < 2; ++b) {
        int64_t id = random.integer(-1, 1);
        for (int64_t i = 0; i < n; ++i) out.push_back(id += random.chance(0.02));
      }
      return out;
    };
    p.query_segments = ids(p.len_q);
    p.key_segments = ids(p.len_k);
    p.mask.query_segments = p.query_segments.data();
    p.mask.key_segments = p.key_segments.data();
    p.mask.stride_qseg_b = p.len_q;
    p.mask.stride_kseg_b = p.len_k;
    p.mask.stride_qseg_i = p.mask.stride_kseg_j = 1;
  }
  if (random.chance(0.3)) {
    const int64_t words = (p.len_k + 63) / 64, rows = (p.len_q + 47) / 48;
    p.mask.block_m = 48;
    p.mask.block_n = 64;
    p.mask.words_per_row = words;
    p.mask.stride_bits_h = p.len_q * words;
    p.mask.stride_bits_b = 2 * p.mask.stride_bits_h;
    p.mask.map_words_per_row = (words + 63) / 64;
    p.mask.stride_map_h = rows * p.mask.map_words_per_row;
    p.mask.stride_map_b = 2 * p.mask.stride_map_h;
    p.bits.assign(4 * p.len_q * words, 0);
    p.live.assign(4 * p.mask.stride_map_h, 0);
    p.full.assign(4 * p.mask.stride_map_h, 0);
    for (int64_t bh = 0; bh < 4; ++bh)
      for (int64_t tile = 0; tile < rows * words; ++tile) {
        const int64_t qt = tile / words, kt = tile % words;
        const double density = random.chance(0.3) ? 0.0 : random.chance(0.4) ? 1.0 : 0.1;
        bool any = false, all = true;
        for (int64_t i = qt * 48; i < qt * 48 + 48 && i < p.len_q; ++i)
          for (int64_t j = kt * 64; j < kt * 64 + 64 && j < p.len_k; ++j) {
            const bool bit = random.chance(density);
            p.bits[(bh * p.len_q + i) * words + kt] |= uint64_t{bit} << (j % 64);
            any = any || bit;
            all = all && bit;
          }
        p.live[bh * p.mask.stride_map_h + qt * p.mask.map_words_per_row + kt / 64] |= uint64_t{any} << (kt % 64);
        p.full[bh * p.mask.stride_map_h + qt * p.mask.map_words_per_row + kt / 64] |= uint64_t{all} << (kt % 64);
      }
    p.mask.bits = p.bits.data();
    p.mask.live = p.live.data();
    p.mask.full = p.full.data();
  }
}

void test_mask_rule() {
  Random random(1);
  for (int round = 0; round < 300; ++round) {
    Problem p;
    fill(p, random);
    for (int64_t bh = 0; bh < 4; ++bh) {
      const int64_t b = bh / 2, h = bh % 2;
      for (int64_t i = 0; i < p.len_q; ++i)
        for (int64_t j0 = 0; j0 < p.len_k; j0 += 64) {
          const int64_t count = min64(64, p.len_k - j0);
          uint64_t expected = 0;
          for (int64_t j = j0; j < j0 + count; ++j) {
            const bool may = by_definition(p, b, h, i, j);
            expected |= uint64_t{may} << (j - j0);
            CHECK(may_attend(p.mask, b, h, i, j) == may);
          }
          CHECK(row_word(p.mask, b, h, i, j0, count) == expected);
        }
      for (int64_t i0 = 0; i0 < p.len_q; i0 += 48) {
        const int64_t i1 = min64(p.len_q, i0 + 48);
        const KeyInterval keys = key_range(p.mask, b, i0, i1, p.len_k);
        for (int64_t j0 = 0; j0 < p.len_k; j0 += 64) {
          const int64_t j1 = min64(p.len_k, j0 + 64);
          const KeyInterval rows = query_range(p.mask, b, j0, j1, p.len_q);
          int64_t allowed = 0;
          for (int64_t i = i0; i < i1; ++i)
            for (int64_t j = j0; j < j1; ++j) {
              if (!by_definition(p, b, h, i, j)) continue;
              ++allowed;
              CHECK(j >= keys.first && j < keys.last);
              CHECK(i >= rows.first && i < rows.last);
            }
          const TileClass found = tile_class(p.mask, b, h, i0, i1, j0, j1);
          if (allowed == (i1 - i0) * (j1 - j0)) CHECK(found == TileClass::kFull);
          else CHECK(found != TileClass::kFull);
          if (allowed) CHECK(found != TileClass::kEmpty);
        }
      }
    }
  }
}

// With one part at a time the class is exact: an empty tile is found empty.
void test_empty_tiles() {
  MaskParams causal;
  causal.band_high = 0;
  CHECK(tile_class(causal, 0, 0, 0, 48, 64, 128) == TileClass::kEmpty);
  CHECK(tile_class(causal, 0, 0, 0, 48, 0, 64) == TileClass::kPartial);
  CHECK(tile_class(causal, 0, 0, 96, 144, 0, 64) == TileClass::kFull);
  CHECK(key_range(causal, 0, 48, 96, 1000).last == 96);
  CHECK(query_range(causal, 0, 64, 128, 1000).first == 64);

  // The extremes stay within the keys and queries that exist: their difference must not overflow.
  const int64_t smallest = std::numeric_limits<int64_t>::min();
  MaskParams none;
  none.key_lengths = &smallest;
  none.band_low = kUnlimited;
  none.band_high = -kUnlimited;
  CHECK(key_range(none, 0, 48, 96, 1000).first == 1000 && key_range(none, 0, 48, 96, 1000).last == 0);
  CHECK(query_range(none, 0, 64, 128, 1000).first == 1000 && query_range(none, 0, 64, 128, 1000).last == 0);

  const int64_t length = 70;
  MaskParams padded;
  padded.key_lengths = &length;
  CHECK(tile_class(padded, 0, 0, 0, 48, 128, 192) == TileClass::kEmpty);
  CHECK(tile_class(padded, 0, 0, 0, 48, 64, 128) == TileClass::kPartial);
  CHECK(tile_class(padded, 0, 0, 0, 48, 0, 64) == TileClass::kFull);

  MaskParams prefix;
  prefix.prefix_lengths = &length;
  CHECK(tile_class(prefix, 0, 0, 0, 48, 0, 64) == TileClass::kFull);
  CHECK(tile_class(prefix, 0, 0, 0, 48, 128, 192) == TileClass::kEmpty);

  CHECK(!has_mask(MaskParams{}));
  CHECK(has_mask(causal) && has_mask(padded) && has_mask(prefix));
  CHECK(tile_class(MaskParams{}, 0, 0, 0, 48, 0, 64) == TileClass::kFull);
}

// Known answers of Random123 (kat_vectors, philox4x32 10).
void test_philox() {
  const struct {
    uint32_t counter[4], key[2], expected[4];
  } cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& c : cases) {
    const uint64_t key = uint64_t{c.key[1]} << 32 | c.key[0];
    const PhiloxBlock block = philox4x32(key, c.counter[0], c.counter[1], c.counter[2], c.counter[3]);
    for (int n = 0; n < 4; ++n) CHECK(block.word[n] == c.expected[n]);
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < 200; ++i)
    for (int64_t j = 0; j < 500; ++j) kept += dropout_keeps({0.3, 99}, 1, 2, i, j);
  CHECK(std::fabs(static_cast<double>(kept) / 1e5 - 0.7) < 0.01);
  for (int64_t j = 0; j < 64; ++j) CHECK(dropout_keeps({0.0, 5}, 0, 0, 0, j));
}

void test_softmax() {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(softmax_shift(-inf) == 0.0);
  CHECK(softmax_shift(3.5f) == 3.5f);
  CHECK(softmax_normalizer(0.0) == 0.0);
  CHECK(softmax_normalizer(4.0) == 0.25);
  CHECK(std::isnan(softmax_normalizer(nan)));
  CHECK(softmax_lse(0.0, 0.0) == -inf);
  CHECK(std::fabs(softmax_lse(10.0, 3.0) - (10.0 + std::log(3.0))) < 1e-14);
  CHECK(lse_to_shift(-inf) == inf);
}

}  // namespace

int main() {
  test_mask_rule();
  test_empty_tiles();
  test_philox();
  test_softmax();
  return fastattn::test::result("core");
}
