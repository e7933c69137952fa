// Tensors of every dtype, and random attention problems with every kind of mask, for the tests of the attention kernels.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../core/mask.h"
#include "../core/params.h"
#include "../core/philox.h"
#include "check.h"

namespace fastattn::test {

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

inline double get(const TensorRef& t, int64_t b, int64_t h, int64_t i, int64_t d) {
  const int64_t at = b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + d * t.stride[3];
  const char* p = static_cast<const char*>(t.ptr) + at * size_of(t.dtype);
  if (t.dtype == DType::kFloat64) return *reinterpret_cast<const double*>(p);
  if (t.dtype == DType::kFloat32) return *reinterpret_cast<const float*>(p);
  const int bits = *reinterpret_cast<const uint16_t*>(p);
  if (t.dtype == DType::kBFloat16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? kNan : kInf)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Rounds to float, towards zero to the types of 16 bits: exact for the numbers of the problems, which are few bits wide.
inline void put(const TensorRef& t, int64_t b, int64_t h, int64_t i, int64_t d, double x) {
  const int64_t at = b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + d * t.stride[3];
  char* p = static_cast<char*>(t.ptr) + at * size_of(t.dtype);
  if (t.dtype == DType::kFloat64) {
    *reinterpret_cast<double*>(p) = x;
  } else if (t.dtype == DType::kFloat32) {
    *reinterpret_cast<float*>(p) = static_cast<float>(x);
  } else if (t.dtype == DType::kBFloat16) {
    const float f = static_cast<float>(x);
    uint32_t word;
    std::memcpy(&word, &f, sizeof word);
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(word >> 16);
  } else {
    int bits = x < 0 ? 0x8000 : 0;
    const double a = std::fabs(x);
    if (std::isnan(x)) bits = 0x7e00;
    else if (std::isinf(x)) bits |= 0x7c00;
    else if (a > 0) {
      int exponent;
      const double m = std::frexp(a, &exponent);  // a = m 2^exponent, 1/2 <= m < 1
      // Below 2^-14 a number is a multiple of 2^-24, without the leading 1.
      bits |= exponent < -13 ? static_cast<int>(a * 16777216.0) : (exponent + 14) << 10 | (static_cast<int>(m * 2048) & 1023);
    }
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(bits);
  }
}

struct Tensor {
  std::vector<char> bytes;  // exactly as long as the tensor: the address sanitizer sees any step beyond
  TensorRef ref;
};

// Memory order (batch, head, row) or (batch, row, head).
inline Tensor make_tensor(DType dtype, int64_t b, int64_t h, int64_t rows, int64_t dim, bool rows_first, int64_t pad) {
  Tensor t;
  t.ref.dtype = dtype;
  const int64_t row = dim + pad;
  t.ref.stride[3] = 1;
  t.ref.stride[2] = rows_first ? h * row : row;
  t.ref.stride[1] = rows_first ? row : rows * row;
  t.ref.stride[0] = h * rows * row;
  const int64_t elements = b * h * rows > 0 ? b * h * rows * row - pad : 0;
  t.bytes.assign(elements * size_of(dtype), '\xff');  // all ones is NaN in every dtype
  t.ref.ptr = t.bytes.data();
  return t;
}

inline double small_number(Random& random) { return std::round(random.normal() * 32.0) / 32.0; }

inline void randomize(Tensor& t, int64_t b, int64_t h, int64_t rows, int64_t dim, Random& random) {
  for (int64_t n = 0; n < b * h * rows; ++n)
    for (int64_t d = 0; d < dim; ++d) put(t.ref, n / (h * rows), n / rows % h, n % rows, d, small_number(random));
}

// Everything is drawn from `random`. What no query may attend to is NaN or Inf. Holds the memory that `p` points to.
struct RandomProblem {
  AttentionParams p;
  DType dtype;
  bool rows_first;  // memory order of the tensors
  Tensor query, key, value, bias;
  std::vector<int64_t> key_lengths, prefix, query_ids, key_ids;
  std::vector<uint8_t> keep;
  std::vector<uint64_t> bits;

  RandomProblem(const RandomProblem&) = delete;

  // `decoding`: few queries, keys in several parts, larger groups of heads. `padded`: keys padded at random, no dense mask.
  explicit RandomProblem(Random& random, bool decoding = false, bool padded = false) {
    const int64_t lengths[] = {1, 2, 3, 17, 48, 63, 64, 65, 113, 130, 197};
    const int64_t caches[] = {0, 1, 64, 511, 512, 513, 600, 1025, 1100, 1536, 1700};
    const int64_t dims[] = {1, 3, 8, 16, 40, 59, 64, 80, 130};
    const DType dtypes[] = {DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
    p.batch = random.integer(1, 2);
    p.heads_kv = random.integer(1, 2);
    p.heads_q = p.heads_kv * (decoding ? random.integer(1, 9) : random.integer(1, 2));
    p.len_q = decoding ? random.integer(1, 8) : lengths[random.integer(0, 10)];
    p.len_k = decoding ? caches[random.integer(0, 10)] : lengths[random.integer(0, 10)];
    p.dim_qk = dims[random.integer(0, 8)];
    p.dim_v = dims[random.integer(0, 8)];
    const double scales[] = {1.0 / std::sqrt(static_cast<double>(p.dim_qk)), 1.0, 0.0, -0.25, 1e-60};
    p.scale = scales[random.integer(0, 4)];
    dtype = dtypes[random.integer(0, 4)];
    rows_first = random.chance(0.5);
    const int64_t pad = random.chance(0.3) ? 3 : 0;
    query = make_tensor(dtype, p.batch, p.heads_q, p.len_q, p.dim_qk, rows_first, pad);
    key = make_tensor(dtype, p.batch, p.heads_kv, p.len_k, p.dim_qk, rows_first, pad);
    value = make_tensor(dtype, p.batch, p.heads_kv, p.len_k, p.dim_v, rows_first, 0);
    randomize(query, p.batch, p.heads_q, p.len_q, p.dim_qk, random);
    randomize(key, p.batch, p.heads_kv, p.len_k, p.dim_qk, random);
    randomize(value, p.batch, p.heads_kv, p.len_k, p.dim_v, random);
    p.query = query.ref;
    p.key = key.ref;
    p.value = value.ref;

    // mask
    query_ids.resize(p.batch * p.len_q);
    key_ids.resize(p.batch * p.len_k);
    keep.resize(p.batch * p.len_k);
    if (random.chance(0.3)) p.mask.band_high = random.chance(0.5) ? 0 : p.len_k - p.len_q;
    if (random.chance(0.2)) p.mask.band_low = random.integer(-70, 10);
    if (random.chance(0.2)) {
      for (int64_t b = 0; b < p.batch; ++b) prefix.push_back(random.integer(-1, p.len_k + 1));
      p.mask.prefix_lengths = prefix.data();
      p.mask.stride_prefix_b = 1;
    }
    if (random.chance(0.3)) {
      for (int64_t b = 0; b < p.batch; ++b) key_lengths.push_back(random.integer(-1, p.len_k + 1));
      p.mask.key_lengths = key_lengths.data();
      p.mask.stride_key_lengths_b = 1;
    }
    if (random.chance(0.2) || padded) {
      for (uint8_t& k : keep) k = random.chance(0.5);
      p.mask.key_keep = keep.data();
      p.mask.stride_keep_b = p.len_k;
      p.mask.stride_keep_j = 1;
    }
    if (random.chance(0.2)) {
      for (int64_t n = 0; n < p.batch * p.len_q; ++n) query_ids[n] = (n % p.len_q) / 40;
      for (int64_t n = 0; n < p.batch * p.len_k; ++n) key_ids[n] = (n % p.len_k) / 50;
      p.mask.query_segments = query_ids.data();
      p.mask.key_segments = key_ids.data();
      p.mask.stride_qseg_b = p.len_q;
      p.mask.stride_kseg_b = p.len_k;
      p.mask.stride_qseg_i = p.mask.stride_kseg_j = 1;
    }
    if (random.chance(0.3) && !padded) {  // one dense mask for every batch and head, without the bitmaps of its tiles
      p.mask.words_per_row = (p.len_k + 63) / 64;
      const double density = random.uniform();
      for (int64_t n = 0; n < p.len_q * p.mask.words_per_row; ++n) {
        uint64_t word = 0;
        for (int64_t j = 0; j < 64; ++j) word |= uint64_t{random.chance(density)} << j;
        bits.push_back(word & bits_before(p.len_k, n % p.mask.words_per_row * 64));
      }
      p.mask.bits = bits.data();
    }

    // bias, broadcast in any dimension
    if (random.chance(0.4)) {
      const bool whole[] = {random.chance(0.5), random.chance(0.5), random.chance(0.5), random.chance(0.5)};
      bias = make_tensor(random.chance(0.5) ? dtype : DType::kFloat32, whole[0] ? p.batch : 1, whole[1] ? p.heads_q : 1,
                         whole[2] ? p.len_q : 1, whole[3] ? p.len_k : 1, false, 0);
      randomize(bias, whole[0] ? p.batch : 1, whole[1] ? p.heads_q : 1, whole[2] ? p.len_q : 1, whole[3] ? p.len_k : 1, random);
      for (int n = 0; n < 4; ++n)
        if (!whole[n]) bias.ref.stride[n] = 0;
      if (whole[3] && random.chance(0.3)) put(bias.ref, 0, 0, 0, p.len_k / 2, -kInf);
      p.bias = bias.ref;
    }
    if (random.chance(0.3)) p.dropout = {0.25, random.bits()};

    // what no query may attend to is NaN or Inf
    for (int64_t n = 0; n < p.batch * p.heads_kv * p.len_k; ++n) {
      const int64_t b = n / (p.heads_kv * p.len_k), h = n / p.len_k % p.heads_kv, j = n % p.len_k, group = p.heads_q / p.heads_kv;
      bool live = false;
      for (int64_t g = 0; g < group; ++g)
        for (int64_t i = 0; i < p.len_q; ++i) live = live || may_attend(p.mask, b, h * group + g, i, j);
      if (live) continue;
      for (int64_t d = 0; d < p.dim_qk; ++d) put(p.key, b, h, j, d, random.chance(0.5) ? kNan : kInf);
      for (int64_t d = 0; d < p.dim_v; ++d) put(p.value, b, h, j, d, random.chance(0.5) ? kNan : -kInf);
    }
  }
};

// ---- the definition ----

inline double dot(const TensorRef& x, int64_t hx, int64_t i, const TensorRef& y, int64_t hy, int64_t j, int64_t b, int64_t dim) {
  double sum = 0.0;
  for (int64_t d = 0; d < dim; ++d) sum += get(x, b, hx, i, d) * get(y, b, hy, j, d);
  return sum;
}

inline double score(const AttentionParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  return dot(p.query, h, i, p.key, h / (p.heads_q / p.heads_kv), j, b, p.dim_qk) * p.scale +
         (p.bias ? get(p.bias, b, h, i, j) : 0.0);
}

inline double kept(const AttentionParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  return dropout_keeps(p.dropout, b, h, i, j) ? 1.0 / (1.0 - p.dropout.p) : 0.0;
}

// The largest difference in units of the largest element (at least 1).
inline void compare(const TensorRef& found, const TensorRef& wanted, const int64_t size[4], double tolerance) {
  double largest = 1.0, difference = 0.0;
  for (int64_t n = 0; n < size[0] * size[1] * size[2] * size[3]; ++n) {
    const int64_t d = n % size[3], i = n / size[3] % size[2], h = n / (size[3] * size[2]) % size[1], b = n / (size[3] * size[2] * size[1]);
    const double want = get(wanted, b, h, i, d), error = std::fabs(get(found, b, h, i, d) - want);
    largest = std::fmax(largest, std::fabs(want));
    difference = error > difference || std::isnan(error) ? error : difference;
  }
  if (!CHECK(difference <= tolerance * largest)) std::fprintf(stderr, "    off by %g, largest %g\n", difference, largest);
}

inline void add(const TensorRef& t, int64_t b, int64_t h, int64_t i, int64_t d, double x) { put(t, b, h, i, d, get(t, b, h, i, d) + x); }

}  // namespace fastattn::test
