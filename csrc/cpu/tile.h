// Tiles of a problem brought into scratch: rows converted to the compute type, transposed rows, the mask of a tile as
// words of bits, the dropout of a tile as words of bits.
#pragma once

#include "../core/mask.h"
#include "../core/philox.h"
#include "gemm.h"
#include "simd.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// ---- scratch ----

constexpr int64_t kAlignment = 64;

FASTATTN_INLINE int64_t align_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Hands out aligned pieces of one block. With a null base it only counts, so a workspace function and its kernel share the
// code that lays the block out.
struct Arena {
  char* base;
  int64_t used;

  explicit Arena(void* p) : base(static_cast<char*>(p)), used(0) {}

  template <typename T>
  __attribute__((always_inline)) T* take(int64_t count) {
    char* const piece = base ? base + used : nullptr;
    used += align_up(count * static_cast<int64_t>(sizeof(T)));
    return reinterpret_cast<T*>(piece);
  }
};

FASTATTN_INLINE void* align_pointer(void* p) {
  return reinterpret_cast<void*>(align_up(reinterpret_cast<intptr_t>(p)));
}

// ---- elements of any dtype ----

FASTATTN_INLINE int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Element `offset` elements behind ptr.
FASTATTN_INLINE const void* element(const void* ptr, DType dtype, int64_t offset) {
  return static_cast<const char*>(ptr) + offset * element_size(dtype);
}
FASTATTN_INLINE void* element(void* ptr, DType dtype, int64_t offset) {
  return static_cast<char*>(ptr) + offset * element_size(dtype);
}

FASTATTN_INLINE Vec<float> from_halves(VecHalves v, DType dtype) {
  return dtype == DType::kBFloat16 ? from_bfloat16(v) : from_float16(v);
}
FASTATTN_INLINE VecHalves to_halves(Vec<float> v, DType dtype) {
  return dtype == DType::kBFloat16 ? to_bfloat16(v) : to_float16(v);
}

// One number through the vector conversions: there is one rounding rule.
static inline double load_scalar(const void* p, DType dtype) {
  if (dtype == DType::kFloat32) return *static_cast<const float*>(p);
  if (dtype == DType::kFloat64) return *static_cast<const double*>(p);
  VecHalves v{};
  v[0] = *static_cast<const uint16_t*>(p);
  return from_halves(v, dtype)[0];
}

// dst[0 .. n) = src[0 .. n) as T; dst[n .. padded) = 0.
template <typename T>
static void convert_row(T* dst, const void* src, DType dtype, int n, int padded) {
  int d = 0;
  if (dtype == DType::kFloat32) {
    for (const float* s = static_cast<const float*>(src); d < n; ++d) dst[d] = static_cast<T>(s[d]);
  } else if (dtype == DType::kFloat64) {
    for (const double* s = static_cast<const double*>(src); d < n; ++d) dst[d] = static_cast<T>(s[d]);
  } else {
    const uint16_t* s = static_cast<const uint16_t*>(src);
    constexpr int W = kWidth<float>;
    if constexpr (sizeof(T) == sizeof(float)) {  // whole vectors: a loop without a branch
      if (dtype == DType::kBFloat16)
        for (; d + W <= n; d += W) store(dst + d, from_bfloat16(load_halves(s + d)));
      else
        for (; d + W <= n; d += W) store(dst + d, from_float16(load_halves(s + d)));
    }
    for (; d < n; d += W) {
      const int left = n - d < W ? n - d : W;
      VecHalves v{};
      for (int lane = 0; lane < left; ++lane) v[lane] = s[d + lane];
      const Vec<float> f = from_halves(v, dtype);
      for (int lane = 0; lane < left; ++lane) dst[d + lane] = static_cast<T>(f[lane]);
    }
    d = n;
  }
  for (; d < padded; ++d) dst[d] = T(0);
}

// dst[0 .. n) = scale * src[0 .. n), rounded to the dtype of dst.
template <typename T>
static void store_row(void* dst, DType dtype, const T* src, int n, T scale) {
  if (dtype == DType::kFloat32) {
    for (int d = 0; d < n; ++d) static_cast<float*>(dst)[d] = static_cast<float>(src[d] * scale);
  } else if (dtype == DType::kFloat64) {
    for (int d = 0; d < n; ++d) static_cast<double*>(dst)[d] = src[d] * scale;
  } else {
    constexpr int W = kWidth<float>;
    uint16_t* out = static_cast<uint16_t*>(dst);
    for (int d = 0; d < n; d += W) {
      const int left = n - d < W ? n - d : W;
      Vec<float> f{};
      for (int lane = 0; lane < left; ++lane) f[lane] = static_cast<float>(src[d + lane] * scale);
      const VecHalves h = to_halves(f, dtype);
      if (left == W) store_halves(out + d, h);
      else for (int lane = 0; lane < left; ++lane) out[d + lane] = h[lane];
    }
  }
}

// Rows of a tile as T, row-major; `ld` elements apart.
template <typename T>
struct Rows {
  const T* ptr;
  int64_t ld;
};

template <typename T>
constexpr DType kComputeDType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// rows x dim of whole vectors, side by side in dst.
template <bool kBFloat16>
static void convert_half_rows(float* dst, const uint16_t* src, int64_t stride, int rows, int dim) {
  for (int r = 0; r < rows; ++r, src += stride, dst += dim)
    for (int d = 0; d < dim; d += kWidth<float>) {
      const VecHalves v = load_halves(src + d);
      store(dst + d, kBFloat16 ? from_bfloat16(v) : from_float16(v));
    }
}

// rows x dim, `stride` elements apart, as T in scratch [rows][ld], ld >= dim, zero from dim on. Bits of `zero_rows` (rows <= 64) name
// rows that are filled with zeros unread: keys nobody attends to, which may hold NaN.
template <typename T>
static void convert_rows(T* dst, int64_t ld, const void* src, DType dtype, int64_t stride, int rows, int dim,
                         uint64_t zero_rows = 0) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (dtype != DType::kFloat32 && dtype != DType::kFloat64 && ld == dim && dim % kWidth<float> == 0 && !zero_rows) {  // short rows are worth a plain loop
      if (dtype == DType::kBFloat16) convert_half_rows<true>(dst, static_cast<const uint16_t*>(src), stride, rows, dim);
      else convert_half_rows<false>(dst, static_cast<const uint16_t*>(src), stride, rows, dim);
      return;
    }
  }
  for (int r = 0; r < rows; ++r) {
    if (zero_rows >> (r & 63) & 1) std::memset(dst + r * ld, 0, ld * sizeof(T));
    else convert_row(dst + r * ld, element(src, dtype, r * stride), dtype, dim, static_cast<int>(ld));
  }
}

// True when the rows of a tile can be read where they lie, in whole vectors: compute type, and no column past dim is touched.
// Rows far apart share few cache sets and many pages, so those are copied as well.
template <typename T>
FASTATTN_INLINE bool rows_in_place(DType dtype, int64_t stride, int dim) {
  return dtype == kComputeDType<T> && dim % kWidth<T> == 0 && stride <= 2 * dim;
}

// ---- transposing ----

#if defined(__clang__)
#define FASTATTN_ZIP(lo, hi, ...) __builtin_shufflevector(lo, hi, __VA_ARGS__)
#else
#define FASTATTN_ZIP(lo, hi, ...) __builtin_shuffle(lo, hi, VecBits<T>{__VA_ARGS__})
#endif

template <typename T>
FASTATTN_INLINE Vec<T> zip_low(Vec<T> a, Vec<T> b) {
  if constexpr (kWidth<T> == 16) return FASTATTN_ZIP(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  else if constexpr (kWidth<T> == 8) return FASTATTN_ZIP(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  else if constexpr (kWidth<T> == 4) return FASTATTN_ZIP(a, b, 0, 4, 1, 5);
  else return FASTATTN_ZIP(a, b, 0, 2);
}
template <typename T>
FASTATTN_INLINE Vec<T> zip_high(Vec<T> a, Vec<T> b) {
  if constexpr (kWidth<T> == 16)
    return FASTATTN_ZIP(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  else if constexpr (kWidth<T> == 8) return FASTATTN_ZIP(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  else if constexpr (kWidth<T> == 4) return FASTATTN_ZIP(a, b, 2, 6, 3, 7);
  else return FASTATTN_ZIP(a, b, 1, 3);
}
#undef FASTATTN_ZIP

// x[c] lane r = x[r] lane c: log2(W) rounds of perfect shuffles. Moves bits: any bits.
template <typename T>
FASTATTN_INLINE void transpose_vectors(Vec<T>* x) {
  constexpr int W = kWidth<T>;
  Vec<T> y[W];
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
#pragma GCC unroll 8
    for (int r = 0; r < W / 2; ++r) {
      y[2 * r] = zip_low<T>(x[r], x[r + W / 2]);
      y[2 * r + 1] = zip_high<T>(x[r], x[r + W / 2]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) x[r] = y[r];
  }
}

// W x W block: dst[c][r] = factor * src[r][c].
template <typename T>
static void transpose_block(T* dst, int64_t dst_ld, const T* src, int64_t src_ld, T factor) {
  constexpr int W = kWidth<T>;
  Vec<T> x[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) x[r] = load(src + r * src_ld) * factor;
  transpose_vectors<T>(x);
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) store(dst + r * dst_ld, x[r]);
}

// W x 2 W block of a 16-bit type, the same: pairs of columns are moved as one lane, and converted where they end.
template <bool kBFloat16>
static void transpose_half_block(float* dst, int64_t dst_ld, const uint16_t* src, int64_t src_ld, float factor) {
  constexpr int W = kWidth<float>;
  Vec<float> x[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) std::memcpy(&x[r], src + r * src_ld, sizeof x[r]);
  transpose_vectors<float>(x);
#pragma GCC unroll 16
  for (int c = 0; c < W; ++c) {
    const VecWords pair = bit_cast<VecWords>(x[c]);  // column 2 c in the low half
    const Vec<float> low = kBFloat16 ? bit_cast<Vec<float>>(pair << 16) : from_float16(narrow(pair));
    const Vec<float> high = kBFloat16 ? bit_cast<Vec<float>>(pair & 0xffff0000u) : from_float16(narrow(pair >> 16));
    store(dst + 2 * c * dst_ld, low * factor);
    store(dst + (2 * c + 1) * dst_ld, high * factor);
  }
}

// dst[d][r] = factor * src[r][d] for r < rows, d < dim, converted to T; zero for rows <= r < round_up(rows, W); `ld` elements
// between the rows of dst, ld >= round_up(rows, W). `staging` holds W rows of round_up(dim, W).
template <typename T>
static void transpose_rows(T* dst, int64_t ld, const void* src, DType dtype, int64_t stride, int rows, int dim, T factor,
                           T* staging) {
  constexpr int W = kWidth<T>;
  const int padded = round_up(dim, W);
  for (int r0 = 0; r0 < rows; r0 += W) {
    const int count = rows - r0 < W ? rows - r0 : W;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (count == W && (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && dim % (2 * W) == 0) {
        const uint16_t* const halves = static_cast<const uint16_t*>(src) + r0 * stride;
        for (int d = 0; d < dim; d += 2 * W) {
          if (dtype == DType::kBFloat16) transpose_half_block<true>(dst + d * ld + r0, ld, halves + d, stride, factor);
          else transpose_half_block<false>(dst + d * ld + r0, ld, halves + d, stride, factor);
        }
        continue;
      }
    }
    const T* from = staging;
    int64_t from_ld = padded;
    if (count == W && dtype == kComputeDType<T> && dim % W == 0) {
      from = static_cast<const T*>(src) + r0 * stride;
      from_ld = stride;
    } else {
      convert_rows(staging, padded, element(src, dtype, r0 * stride), dtype, stride, count, dim);
      std::memset(staging + count * padded, 0, (W - count) * padded * sizeof(T));
    }
    int d = 0;
    for (; d + W <= dim; d += W) transpose_block(dst + d * ld + r0, ld, from + d, from_ld, factor);
    // The last columns one by one: a block would write past the last row of dst.
    for (; d < dim; ++d)
      for (int lane = 0; lane < W; ++lane) dst[d * ld + r0 + lane] = from[lane * from_ld + d] * factor;
  }
}

// ---- mask of a tile ----

// The pairs of a tile of up to kTileM x kTileN as bits. `rows` is written only for a partial tile.
struct TileMask {
  TileClass tile_class;
  uint64_t columns;        // keys that some row attends to
  uint64_t rows[kTileM];   // bit j of rows[i]: query i0 + i may attend to key j0 + j; 0 beyond the tile
};

// j0 is a multiple of kTileN, rows <= kTileM, count <= kTileN. The class is exact.
static void make_tile_mask(TileMask& tile, const MaskParams& mask, int64_t b, int64_t h, int64_t i0, int rows, int64_t j0,
                           int count) {
  const uint64_t all = bits_before(j0 + count, j0);
  tile.columns = all;
  tile.tile_class = tile_class(mask, b, h, i0, i0 + rows, j0, j0 + count);
  if (tile.tile_class == TileClass::kFull) return;
  if (tile.tile_class == TileClass::kEmpty) {
    tile.columns = 0;
    return;
  }
  const uint64_t keys = key_word(mask, b, j0, count);
  uint64_t any = 0, every = all;
  for (int r = 0; r < rows; ++r) {
    uint64_t word = keys & interval_word(mask, b, i0 + r, j0);
    if (mask.bits) word &= dense_word(mask, b, h, i0 + r, j0);
    if (mask.query_segments && word) word &= segment_word(mask, b, i0 + r, j0, count);
    tile.rows[r] = word;
    any |= word;
    every &= word;
  }
  for (int r = rows; r < kTileM; ++r) tile.rows[r] = 0;
  tile.columns = any;
  tile.tile_class = any == 0 ? TileClass::kEmpty : every == all ? TileClass::kFull : TileClass::kPartial;
}

// columns[j] bit i = rows[i] bit j, for a tile stored transposed. Rows beyond kTileM count as zero.
static void transpose_bits(uint64_t columns[kTileN], const uint64_t rows[kTileM]) {
  uint64_t x[64];
  for (int r = 0; r < 64; ++r) x[r] = r < kTileM ? rows[r] : 0;
  uint64_t low = 0x00000000ffffffffull;
  for (int step = 32; step; step >>= 1, low ^= low << step) {
    for (int r = 0; r < 64; r = (r + step + 1) & ~step) {
      const uint64_t swap = ((x[r] >> step) ^ x[r + step]) & low;
      x[r] ^= swap << step;
      x[r + step] ^= swap;
    }
  }
  for (int j = 0; j < kTileN; ++j) columns[j] = x[j];
}

// First set bit and one past the last set bit; bits != 0.
FASTATTN_INLINE int first_bit(uint64_t bits) { return __builtin_ctzll(bits); }
FASTATTN_INLINE int end_bit(uint64_t bits) { return 64 - __builtin_clzll(bits); }

// ---- dropout of a tile ----

// Bit j: probability (b, h, i, j0 + j) is kept; j0 is a multiple of 4. A lane runs one of the 16 Philox blocks of the word, in the
// low half of 64 bits: the widening product is one instruction, and what is left in the high halves is ignored.
static inline uint64_t dropout_word(uint64_t seed, uint64_t threshold, int64_t b, int64_t h, int64_t i, int64_t j0) {
  constexpr int kLanes = kVectorBytes / 8, kVectors = kTileN / 4 / kLanes;
  const VecWide m0 = VecWide{} + kPhiloxM0, m1 = VecWide{} + kPhiloxM1, low = VecWide{} + 0xffffffffu;
  VecWide c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors], bit;
  for (int lane = 0; lane < kLanes; ++lane) bit[lane] = uint64_t{1} << (4 * lane);
  for (int v = 0; v < kVectors; ++v) {
    for (int lane = 0; lane < kLanes; ++lane) c0[v][lane] = static_cast<uint64_t>((j0 >> 2) + v * kLanes + lane);
    c1[v] = VecWide{} + static_cast<uint64_t>(i);
    c2[v] = VecWide{} + static_cast<uint64_t>(h);
    c3[v] = VecWide{} + static_cast<uint64_t>(b);
  }
  VecWide k0 = VecWide{} + (seed & 0xffffffffu), k1 = VecWide{} + (seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const VecWide p0 = multiply_low_words(c0[v], m0), p1 = multiply_low_words(c2[v], m1);
      c0[v] = (p1 >> 32) ^ c1[v] ^ k0;
      c2[v] = (p0 >> 32) ^ c3[v] ^ k1;
      c1[v] = p1;
      c3[v] = p0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  VecWide words{};
  for (int v = 0; v < kVectors; ++v) {
    auto kept = [&](VecWide c) { return bit_cast<VecWide>((c & low) >= threshold); };
    const VecWide four = (kept(c0[v]) & bit) | (kept(c1[v]) & bit << 1) | (kept(c2[v]) & bit << 2) | (kept(c3[v]) & bit << 3);
    words |= four << (4 * kLanes * v);
  }
  uint64_t word = 0;
  for (int lane = 0; lane < kLanes; ++lane) word |= words[lane];
  return word;
}

// rows[i] = dropout_word of query i0 + i; 0 beyond.
static void make_dropout_tile(uint64_t words[kTileM], const DropoutParams& dropout, int64_t b, int64_t h, int64_t i0, int rows,
                              int64_t j0) {
  const uint64_t threshold = dropout_threshold(dropout.p);
  for (int r = 0; r < kTileM; ++r) words[r] = r < rows ? dropout_word(dropout.seed, threshold, b, h, i0 + r, j0) : 0;
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
