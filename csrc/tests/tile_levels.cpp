// simd.h, gemm.h, tile.h and pairs.h at the instruction level this file is compiled for; CMake builds it once per level.
#include <vector>

#include "../cpu/pairs.h"
#include "../cpu/tile.h"
#include "check.h"

using namespace fastattn;
using namespace fastattn::cpu;
using namespace fastattn::cpu::FASTATTN_ISA;
using fastattn::test::Random;

namespace {

bool runs_here() {
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

// lda, ldb and ldc are wider than the tile, the buffers end with it, and what lies beside C must stay as it is.
template <typename T>
void test_gemm() {
  Random random(2);
  const int W = kWidth<T>;
  for (int round = 0; round < 400; ++round) {
    const int m = static_cast<int>(random.integer(0, 53)), n = static_cast<int>(random.integer(1, 130));
    const int k = static_cast<int>(random.chance(0.1) ? random.integer(129, 300) : random.integer(0, 70));
    const int padded = (n + W - 1) / W * W;
    const int64_t lda = k + random.integer(0, 3), lda_t = m + random.integer(0, 3), ldb = padded + random.integer(0, 5),
                  ldc = padded + random.integer(0, 5);
    std::vector<T> a(m * lda + 1), a_t(k * lda_t + 1), b(k * ldb + 1), c(m * ldc + 1);
    for (T& x : b) x = static_cast<T>(random.normal());
    for (T& x : c) x = static_cast<T>(random.normal());
    for (int i = 0; i < m; ++i)
      for (int p = 0; p < k; ++p) a[i * lda + p] = a_t[p * lda_t + i] = static_cast<T>(random.normal());
    for (const bool accumulate : {false, true}) {
      std::vector<T> by_rows = c, transposed = c;
      gemm<Layout::kRows, T>(m, n, k, a.data(), lda, b.data(), ldb, by_rows.data(), ldc, accumulate);
      gemm<Layout::kTransposed, T>(m, n, k, a_t.data(), lda_t, b.data(), ldb, transposed.data(), ldc, accumulate);
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < ldc; ++j) {
          const int64_t at = i * ldc + j;
          CHECK(by_rows[at] == transposed[at]);
          if (j >= padded) CHECK(by_rows[at] == c[at]);
          if (j >= n) continue;
          double sum = accumulate ? static_cast<double>(c[at]) : 0.0, size = std::fabs(sum);
          for (int p = 0; p < k; ++p) {
            const double term = static_cast<double>(a[i * lda + p]) * static_cast<double>(b[p * ldb + j]);
            sum += term;
            size += std::fabs(term);
          }
          CHECK(std::fabs(static_cast<double>(by_rows[at]) - sum) <= 8.0 * std::numeric_limits<T>::epsilon() * size);
        }
    }
  }
}

template <typename T>
void test_exp2(double from, double step, double tolerance) {
  double worst = 0.0;
  for (double x = from; x < 1.0; x += step) {
    const T rounded = static_cast<T>(x);
    const double expected = std::exp2(static_cast<double>(rounded));
    worst = std::fmax(worst, std::fabs(static_cast<double>(exp2(broadcast(rounded))[0]) / expected - 1.0));
  }
  CHECK(worst < tolerance);
  CHECK(exp2(zero<T>())[0] == T(1));
  CHECK(exp2(broadcast(-kInfinity<T>))[0] == T(0));
  CHECK(exp2(broadcast(T(-1e30)))[0] == T(0));
  CHECK(exp2(broadcast(T(-1100)))[0] == T(0));
  CHECK(std::isnan(exp2(broadcast(std::numeric_limits<T>::quiet_NaN()))[0]));
  T every_bit_set;  // a NaN too
  std::memset(&every_bit_set, 0xff, sizeof every_bit_set);
  CHECK(std::isnan(exp2(broadcast(every_bit_set))[0]));
  CHECK(std::isnan(exp2(broadcast(-every_bit_set))[0]));
}

template <typename T>
void test_lanes() {
  Random random(3);
  for (int round = 0; round < 200; ++round) {
    Vec<T> v;
    double total = 0.0;
    T largest = -kInfinity<T>;
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      v[lane] = static_cast<T>(random.normal());
      total += static_cast<double>(v[lane]);
      largest = v[lane] > largest ? v[lane] : largest;
    }
    CHECK(std::fabs(static_cast<double>(sum(v)) - total) < 1e-5);
    CHECK(horizontal_max(v) == largest);
    const uint64_t word = random.bits();
    const VecBits<T> lanes = lanes_of<T>(word);
    for (int lane = 0; lane < kWidth<T>; ++lane) CHECK((lanes[lane] != 0) == (word >> lane & 1));
  }
}

double float16_value(int bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? std::nan("") : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
double bfloat16_value(int bits) {
  const int exponent = bits >> 7 & 255, fraction = bits & 127;
  const double magnitude = exponent == 255 ? (fraction ? std::nan("") : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -133)
                                           : std::ldexp(128 + fraction, exponent - 134);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Every 16-bit number comes back as it was; a number in between goes to the nearer one, ties to the even one.
void test_halves(DType dtype, double (*value)(int), int infinity) {
  auto to_bits = [&](float x) { return static_cast<int>(to_halves(broadcast(x), dtype)[0]); };
  for (int bits = 0; bits < 65536; ++bits) {
    const VecHalves v = VecHalves{} + static_cast<uint16_t>(bits);
    const float x = from_halves(v, dtype)[0];
    const double expected = value(bits);
    if (std::isnan(expected)) {
      CHECK(std::isnan(x));
      CHECK(std::isnan(value(to_bits(x))));
    } else {
      CHECK(static_cast<double>(x) == expected);
      CHECK(to_bits(x) == bits);
    }
  }
  for (int bits = 0; bits + 1 < infinity; ++bits) {
    const double low = value(bits), high = value(bits + 1), middle = (low + high) / 2;
    const float exact = static_cast<float>(middle);  // one bit more than the type has: exact in float but at the very bottom
    if (static_cast<double>(exact) != middle) continue;
    CHECK(to_bits(exact) == (bits & 1 ? bits + 1 : bits));
    CHECK(to_bits(std::nextafterf(exact, INFINITY)) == bits + 1);
    CHECK(to_bits(std::nextafterf(exact, 0.0f)) == bits);
    CHECK(to_bits(-exact) == (0x8000 | (bits & 1 ? bits + 1 : bits)));
  }
  CHECK(to_bits(INFINITY) == infinity);
  CHECK(to_bits(3.4e38f) == infinity);
}

template <typename T>
void test_transpose() {
  Random random(4);
  const int W = kWidth<T>;
  const DType dtypes[] = {kComputeDType<T>, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (int round = 0; round < 200; ++round) {
    const int rows = static_cast<int>(random.integer(1, 70)), dim = static_cast<int>(random.integer(1, 90));
    const int64_t stride = dim + random.integer(0, 4), ld = (rows + W - 1) / W * W + random.integer(0, 3);
    const DType dtype = dtypes[random.integer(0, 3)];
    std::vector<char> source((rows * stride) * element_size(dtype));
    std::vector<T> values(rows * dim), out(dim * ld, T(7)), staging(W * ((dim + W - 1) / W * W));
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < dim; ++d) {
        values[r * dim + d] = static_cast<T>(random.integer(-128, 128));  // exact in every dtype
        store_row<T>(element(source.data(), dtype, r * stride + d), dtype, &values[r * dim + d], 1, T(1));
      }
    transpose_rows<T>(out.data(), ld, source.data(), dtype, stride, rows, dim, T(-2), staging.data());
    for (int d = 0; d < dim; ++d)
      for (int r = 0; r < ld; ++r) {
        const T expected = r < rows ? T(-2) * values[r * dim + d] : r < (rows + W - 1) / W * W ? T(0) : T(7);
        CHECK(out[d * ld + r] == expected);
      }
    std::vector<T> copied(rows * (dim + 3), T(7));
    const uint64_t zero_rows = rows <= 64 ? random.bits() : 0;
    convert_rows<T>(copied.data(), dim + 3, source.data(), dtype, stride, rows, dim, zero_rows);
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < dim + 3; ++d)
        CHECK(copied[r * (dim + 3) + d] == (d < dim && !(zero_rows >> (r & 63) & 1) ? values[r * dim + d] : T(0)));
  }
}

#if defined(__AVX512BF16__)
uint16_t bfloat16_bits(float x) { return to_bfloat16(broadcast(x))[0]; }
float low_number(uint32_t pair) { return from_bfloat16(VecHalves{} + static_cast<uint16_t>(pair))[0]; }
float high_number(uint32_t pair) { return from_bfloat16(VecHalves{} + static_cast<uint16_t>(pair >> 16))[0]; }

// A product of every layout from operands of every kind, and what is rounded. Rows that count as zero hold NaN; sources end with the
// last number.
void test_pairs() {
  Random random(7);
  for (int round = 0; round < 300; ++round) {
    const int m = static_cast<int>(random.integer(1, kTileM)), n = static_cast<int>(random.integer(1, kTileN));
    const int k = static_cast<int>(random.chance(0.1) ? random.integer(129, 300) : random.integer(1, 90));
    const int64_t stride = k + random.integer(0, 3);
    const float sign = random.chance(0.5) ? 1.0f : -1.0f;
    std::vector<float> a(m * k), b(n * k);
    const auto numbers = [&](std::vector<float>& x, int rows) {
      std::vector<uint16_t> bits((rows - 1) * stride + k, 0xffff);
      for (int r = 0; r < rows; ++r)
        for (int d = 0; d < k; ++d) {
          bits[r * stride + d] = bfloat16_bits(static_cast<float>(random.normal()));
          x[r * k + d] = from_bfloat16(VecHalves{} + bits[r * stride + d])[0];
        }
      return bits;
    };
    const std::vector<uint16_t> a_bits = numbers(a, m), b_bits = numbers(b, n);

    // C = A B^T along the columns.
    const int64_t ld = round_up(pairs(k), 16);
    std::vector<uint32_t> a_scratch(m * ld), b_t(pairs(k) * kTileN, 0x7fc07fc0u);
    const Rows<uint32_t> rows = pair_rows(a_scratch.data(), ld, a_bits.data(), stride, nullptr, m, k);
    transpose_pairs(b_t.data(), kTileN, b_bits.data(), stride, n, k, sign);
    std::vector<float> c(m * kTileN);
    gemm<Layout::kRows>(m, n, pairs(k), rows.ptr, rows.ld, b_t.data(), kTileN, c.data(), kTileN, false);
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) {
        double sum = 0.0, size = 0.0;
        for (int d = 0; d < k; ++d) {
          const double term = static_cast<double>(sign * a[i * k + d]) * static_cast<double>(b[j * k + d]);
          sum += term;
          size += std::fabs(term);
        }
        CHECK(std::fabs(static_cast<double>(c[i * kTileN + j]) - sum) <= 8.0 * 1.2e-7 * size);
      }

    // Rows in pairs, some of them by position, some of them dead.
    std::vector<int32_t> position(n);
    for (int32_t& at : position) at = static_cast<int32_t>(random.integer(0, n - 1));
    const bool gathers = random.chance(0.5);
    std::vector<uint32_t> gathered(n * pairs(k));
    PairRows source{b_bits.data(), stride};
    if (gathers) source = gather_pairs(gathered.data(), source, position.data(), n, k);
    const int first = static_cast<int>(random.integer(0, n - 1)), count = n - first;
    const uint64_t dead = random.bits();
    const int64_t ld_zip = round_up(k, 16);
    std::vector<uint32_t> zipped(pairs(count) * ld_zip, 0x7fc07fc0u);
    zip_rows(zipped.data(), ld_zip, source, first, count, k, dead);
    const auto live = [&](int r, int d) {
      if (r >= count || d >= k || (dead >> r & 1)) return 0.0f;
      return b[(gathers ? position[first + r] : first + r) * k + d];
    };
    for (int r = 0; r < pairs(count); ++r)
      for (int d = 0; d < ld_zip; ++d) {
        CHECK(low_number(zipped[r * ld_zip + d]) == live(2 * r, d));
        CHECK(high_number(zipped[r * ld_zip + d]) == live(2 * r + 1, d));
      }

    // Scores rounded, both ways; what lies past the last column must not reach the pairs along the columns.
    std::vector<float> scores(kTileM * kTileN, std::numeric_limits<float>::quiet_NaN());
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) scores[i * kTileN + j] = static_cast<float>(random.normal());
    const auto rounded = [&](int i, int j) {
      return i < m && j < n ? from_bfloat16(to_bfloat16(broadcast(scores[i * kTileN + j])))[0] : 0.0f;
    };
    std::vector<float> by_pairs = scores, both = scores, in_rows = scores;
    std::vector<uint32_t> by_row(kTileM * kTileN / 2);
    round_row_pairs(by_pairs.data(), kTileN, m, n);
    round_both_pairs(both.data(), by_row.data(), kTileN, m, n);
    round_rows(in_rows.data(), kTileN, m, n);
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) {
        const uint32_t pair = as_operand(by_pairs.data())[i / 2 * kTileN + j];
        CHECK(low_number(pair) == rounded(i / 2 * 2, j) && high_number(pair) == rounded(i / 2 * 2 + 1, j));
        CHECK(pair == as_operand(both.data())[i / 2 * kTileN + j]);
        const uint32_t along = by_row[i * kTileN / 2 + j / 2], in_row = as_operand(in_rows.data())[i * kTileN + j / 2];
        CHECK(low_number(along) == rounded(i, j / 2 * 2) && high_number(along) == rounded(i, j / 2 * 2 + 1));
        CHECK(low_number(in_row) == rounded(i, j / 2 * 2));
      }
  }
}
#endif

void test_tile_bits() {
  Random random(5);
  for (int round = 0; round < 200; ++round) {
    uint64_t rows[kTileM], columns[kTileN];
    for (uint64_t& word : rows) word = random.bits();
    transpose_bits(columns, rows);
    for (int j = 0; j < kTileN; ++j)
      for (int i = 0; i < 64; ++i) CHECK((columns[j] >> i & 1) == (i < kTileM ? rows[i] >> j & 1 : 0));

    const int64_t b = random.integer(0, 9), h = random.integer(0, 9), i = random.integer(0, 1 << 20),
                  j0 = random.integer(0, 1000) * 64;
    const DropoutParams dropout{random.uniform(), random.bits()};
    make_dropout_tile(rows, dropout, b, h, i, 3, j0);
    for (int r = 0; r < 3; ++r)
      for (int j = 0; j < 64; ++j) CHECK((rows[r] >> j & 1) == dropout_keeps(dropout, b, h, i + r, j0 + j));
    CHECK(rows[3] == 0);
  }
}

// The class is exact, also where two parts exclude each other.
void test_tile_mask() {
  Random random(6);
  for (int round = 0; round < 2000; ++round) {
    const int64_t len_k = random.integer(1, 200), length = random.integer(-2, 210);
    std::vector<int64_t> query_ids(100), key_ids(len_k);
    for (int64_t& id : query_ids) id = random.integer(0, 1);
    for (int64_t& id : key_ids) id = random.integer(0, 1);
    MaskParams mask;
    if (random.chance(0.7)) mask.band_low = random.integer(-90, 90);
    if (random.chance(0.7)) mask.band_high = random.integer(-90, 90);
    if (random.chance(0.5)) mask.key_lengths = &length;
    if (random.chance(0.3)) {
      mask.query_segments = query_ids.data();
      mask.key_segments = key_ids.data();
      mask.stride_qseg_i = mask.stride_kseg_j = 1;
    }
    const int64_t i0 = random.integer(0, 1) * kTileM, j0 = random.integer(0, (len_k - 1) / kTileN) * kTileN;
    const int rows = static_cast<int>(random.integer(1, kTileM)), count = static_cast<int>(min64(kTileN, len_k - j0));
    TileMask tile;
    make_tile_mask(tile, mask, 0, 0, i0, rows, j0, count);
    uint64_t any = 0;
    int allowed = 0;
    for (int r = 0; r < rows; ++r) {
      const uint64_t word = row_word(mask, 0, 0, i0 + r, j0, count);
      any |= word;
      allowed += __builtin_popcountll(word);
      if (tile.tile_class == TileClass::kPartial) CHECK(tile.rows[r] == word);
    }
    if (tile.tile_class == TileClass::kPartial)
      for (int r = rows; r < kTileM; ++r) CHECK(tile.rows[r] == 0);
    CHECK(tile.columns == any);
    CHECK(tile.tile_class == (allowed == 0               ? TileClass::kEmpty
                              : allowed == rows * count ? TileClass::kFull
                                                         : TileClass::kPartial));
  }
}

}  // namespace

int main() {
  if (!runs_here()) {
    std::printf("this CPU lacks the instructions of this level\n");
    return 77;
  }
  test_gemm<float>();
  test_gemm<double>();
  test_exp2<float>(-125.9, 3e-5, 2e-7);
  test_exp2<double>(-1021.9, 3e-4, 4.5e-16);
  test_lanes<float>();
  test_lanes<double>();
  test_halves(DType::kFloat16, float16_value, 0x7c00);
  test_halves(DType::kBFloat16, bfloat16_value, 0x7f80);
  test_transpose<float>();
  test_transpose<double>();
#if defined(__AVX512BF16__)
  test_pairs();
#endif
  test_tile_bits();
  test_tile_mask();
  return fastattn::test::result("tiles");
}
