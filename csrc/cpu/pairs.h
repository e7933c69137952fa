// Operands of the products where the CPU multiplies pairs of bfloat16 numbers (AVX512-BF16): an element of an operand is two
// numbers, neighbours along the depth of the product, in one 32-bit word, the first in the low half. A depth that is odd ends with
// a zero. What is summed, and everything between the products, is float.
//
// The depth lies along D in S = Q K^T and dP = dO V^T, and along keys or queries in the other products:
//     rows as they lie       pair_rows         operand A along D
//     transposed             transpose_pairs   operand B along D
//     rows two by two        zip_rows          operand B along the rows: K, V, Q, dO
//     rounded scores         round_*           operand A along keys or queries: P, dS
//
// Both numbers of a pair are multiplied: a dead row must be zero where a live one shares its words.
#pragma once

#include <cmath>

#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// The element of an operand of products whose sums are T. A level that multiplies pairs computes nothing but bfloat16.
template <typename T>
struct OperandOf {
  using type = T;
};
template <>
struct OperandOf<float> {
#if defined(__AVX512BF16__)
  using type = uint32_t;
#else
  using type = float;
#endif
};
template <typename T>
using Operand = typename OperandOf<T>::type;
template <typename T>
constexpr bool kPairs = kTerms<Operand<T>> == 2;

// Scores that have been made an operand where they lie.
template <typename T>
FASTATTN_INLINE const Operand<T>* as_operand(const T* scores) {
  return reinterpret_cast<const Operand<T>*>(scores);
}

// Elements of an operand along a depth of n numbers.
template <typename T>
FASTATTN_INLINE int depth(int n) {
  return (n + kTerms<Operand<T>> - 1) / kTerms<Operand<T>>;
}

// Whether the forward and the backward of a problem multiply pairs: both or none, because the scores that the backward recomputes
// are to be those of the forward bit by bit. Decoding is bound by memory, and a scale of next to nothing has a path of its own.
static inline bool multiplies_pairs(const AttentionParams& p) {
  return p.query.dtype == DType::kBFloat16 && p.len_q > kMaxDecodeQueries && std::fabs(p.scale) >= 1e-30;
}

// Rows of bfloat16 numbers in memory, `stride` numbers apart.
struct PairRows {
  const void* ptr;
  int64_t stride;
};

// Whether keys [begin, end) of a tile begin or end within a pair. After the tile's last key comes a zero.
FASTATTN_INLINE bool splits_pairs(int begin, int end, int tile_keys) { return begin % 2 || (end % 2 && end < tile_keys); }

#if defined(__AVX512BF16__)

FASTATTN_INLINE int pairs(int n) { return depth<float>(n); }

// n <= 32 numbers, and zeros after them.
FASTATTN_INLINE __m512i load_numbers(const uint16_t* p, int n) {
  return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p);
}

// The numbers of x and y in turn: of the first 16 lanes of each, and of the last 16.
FASTATTN_INLINE __m512i zip_numbers_low(__m512i x, __m512i y) {
  const __m512i at = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
                                      3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(x, at, y);
}
FASTATTN_INLINE __m512i zip_numbers_high(__m512i x, __m512i y) {
  const __m512i at = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22, 53, 21, 52,
                                      20, 51, 19, 50, 18, 49, 17, 48, 16);
  return _mm512_permutex2var_epi16(x, at, y);
}

// x rounded in the low half, y in the high half.
FASTATTN_INLINE __m512i round_both(Vec<float> x, Vec<float> y) {
  return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
}
// Lane i: x[i] and y[i] as a pair; `both` is round_both of them.
FASTATTN_INLINE __m512i pair_lanes(__m512i both) {
  const __m512i at = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                      3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(at, both);
}

// dst[c][r] = columns 2 c and 2 c + 1 of row r, the signs times that of `factor` (1 or -1), for r < rows, zero for
// rows <= r < round_up(rows, 16).
static void transpose_pairs(uint32_t* dst, int64_t ld, const void* src, int64_t stride, int rows, int dim, float factor) {
  const __m512i sign = _mm512_set1_epi32(factor < 0.0f ? static_cast<int>(0x80008000u) : 0);
  for (int r0 = 0; r0 < rows; r0 += 16) {
    const uint16_t* const from = static_cast<const uint16_t*>(src) + r0 * stride;
    for (int d = 0; d < dim; d += 32) {
      Vec<float> x[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const __m512i row = r0 + r < rows ? load_numbers(from + r * stride + d, dim - d) : _mm512_setzero_si512();
        x[r] = bit_cast<Vec<float>>(_mm512_xor_si512(row, sign));
      }
      transpose_vectors<float>(x);
      const int columns = pairs(dim - d) < 16 ? pairs(dim - d) : 16;
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c)
        if (c < columns) std::memcpy(dst + (d / 2 + c) * ld + r0, &x[c], sizeof x[c]);
    }
  }
}

// dst [rows][ld] = rows x dim as pairs along the columns, the signs times that of `factor`; the rows at `position`, unless null.
static void copy_pair_rows(uint32_t* dst, int64_t ld, const void* src, int64_t stride, const int32_t* position, int rows, int dim,
                           float factor) {
  const __m512i sign = _mm512_set1_epi32(factor < 0.0f ? static_cast<int>(0x80008000u) : 0);
  for (int r = 0; r < rows; ++r) {
    const uint16_t* const from = static_cast<const uint16_t*>(src) + (position ? position[r] : r) * stride;
    for (int d = 0; d < dim; d += 32) {
      const int left = pairs(dim - d);
      const __m512i row = _mm512_xor_si512(load_numbers(from + d, dim - d), sign);
      _mm512_mask_storeu_epi32(dst + r * ld + d / 2, left >= 16 ? 0xffff : (1u << left) - 1, row);
    }
  }
}

// rows x dim as pairs along the columns: where they lie, or in scratch [rows][ld]. Rows far apart are copied, as in rows_in_place.
static Rows<uint32_t> pair_rows(uint32_t* scratch, int64_t ld, const void* src, int64_t stride, const int32_t* position, int rows,
                                int dim) {
  const bool whole = reinterpret_cast<uintptr_t>(src) % 4 == 0 && stride % 2 == 0 && dim % 2 == 0;
  if (!position && whole && stride <= 2 * dim) return {static_cast<const uint32_t*>(src), stride / 2};
  copy_pair_rows(scratch, ld, src, stride, position, rows, dim, 1.0f);
  return {scratch, ld};
}

// The rows at `position` side by side in scratch.
static PairRows gather_pairs(uint32_t* scratch, PairRows src, const int32_t* position, int rows, int dim) {
  copy_pair_rows(scratch, pairs(dim), src.ptr, src.stride, position, rows, dim, 1.0f);
  return {scratch, 2 * pairs(dim)};
}

// dst[r][d] = column d of rows first_row + 2 r and the next, [pairs(rows)][ld], ld a multiple of 16, zero from dim on. Bits of
// `zero_rows` name rows that count as zeros, whatever they hold; where there are any, there are at most 64 rows.
static void zip_rows(uint32_t* dst, int64_t ld, PairRows src, int first_row, int rows, int dim, uint64_t zero_rows) {
  const int64_t stride = src.stride;
  const uint16_t* from = static_cast<const uint16_t*>(src.ptr) + first_row * stride;
  for (int r = 0; r < rows; r += 2, from += 2 * stride, dst += ld) {
    const bool first = !zero_rows || !(zero_rows >> r & 1);
    const bool second = r + 1 < rows && (!zero_rows || !(zero_rows >> (r + 1) & 1));
    for (int d = 0; d < dim; d += 32) {
      const __m512i x = first ? load_numbers(from + d, dim - d) : _mm512_setzero_si512();
      const __m512i y = second ? load_numbers(from + stride + d, dim - d) : _mm512_setzero_si512();
      _mm512_storeu_si512(dst + d, zip_numbers_low(x, y));
      if (d + 16 < ld) _mm512_storeu_si512(dst + d + 16, zip_numbers_high(x, y));
    }
  }
}

// Scores [rows][ld] in place as pairs along the rows, [pairs(rows)][ld] words, columns up to a whole vector.
static void round_row_pairs(float* scores, int64_t ld, int rows, int columns) {
  float* dst = scores;
  for (int r = 0; r < rows; r += 2, scores += 2 * ld, dst += ld)
    for (int j = 0; j < columns; j += 16) {
      const Vec<float> x = load(scores + j), y = r + 1 < rows ? load(scores + ld + j) : zero<float>();
      _mm512_storeu_si512(dst + j, pair_lanes(round_both(x, y)));
    }
}

// The same, and in `by_row` [rows][ld / 2] the pairs along the columns, with zeros after the last column.
static void round_both_pairs(float* scores, uint32_t* by_row, int64_t ld, int rows, int columns) {
  float* dst = scores;
  for (int r = 0; r < rows; r += 2, scores += 2 * ld, dst += ld, by_row += ld)
    for (int j = 0; j < columns; j += 16) {
      const __mmask16 live = columns - j >= 16 ? 0xffff : (1u << (columns - j)) - 1;
      const Vec<float> x = _mm512_maskz_loadu_ps(live, scores + j);
      const Vec<float> y = r + 1 < rows ? Vec<float>(_mm512_maskz_loadu_ps(live, scores + ld + j)) : zero<float>();
      const __m512i both = round_both(x, y);
      _mm512_storeu_si512(dst + j, pair_lanes(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_row + j / 2), _mm512_castsi512_si256(both));
      if (r + 1 < rows)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_row + (ld + j) / 2), _mm512_extracti64x4_epi64(both, 1));
    }
}

// Scores [rows][ld] in place as pairs along the columns, [rows][ld] words, columns up to a whole vector.
static void round_rows(float* scores, int64_t ld, int rows, int columns) {
  for (int r = 0; r < rows; ++r, scores += ld)
    for (int j = 0; j < columns; j += 16) {
      const __m256i rounded = bit_cast<__m256i>(_mm512_cvtneps_pbh(load(scores + j)));
      std::memcpy(reinterpret_cast<char*>(scores) + 2 * j, &rounded, sizeof rounded);
    }
}

#endif

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
