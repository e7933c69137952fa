// The attention forward of every instruction level this CPU has, against the definition in double.
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../core/mask.h"
#include "../core/philox.h"
#include "../cpu/dispatch.h"
#include "../cpu/kernels.h"
#include "check.h"

using namespace fastattn;
using fastattn::test::Random;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

double get(const TensorRef& t, int64_t b, int64_t h, int64_t i, int64_t d) {
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

// The numbers written are few bits wide, NaN or infinite: truncation is exact.
void put(const TensorRef& t, int64_t b, int64_t h, int64_t i, int64_t d, double x) {
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
      bits |= (exponent + 14) << 10 | (static_cast<int>(m * 2048) & 1023);
    }
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(bits);
  }
}

struct Tensor {
  std::vector<char> bytes;  // exactly as long as the tensor: the address sanitizer sees any step beyond
  TensorRef ref;
};

// Memory order (batch, head, row) or (batch, row, head).
Tensor make_tensor(DType dtype, int64_t b, int64_t h, int64_t rows, int64_t dim, bool rows_first, int64_t pad) {
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

double small_number(Random& random) { return std::round(random.normal() * 32.0) / 32.0; }

void randomize(Tensor& t, int64_t b, int64_t h, int64_t rows, int64_t dim, Random& random) {
  for (int64_t n = 0; n < b * h * rows; ++n)
    for (int64_t d = 0; d < dim; ++d) put(t.ref, n / (h * rows), n / rows % h, n % rows, d, small_number(random));
}

struct Result {
  Tensor out;
  std::vector<double> lse64;
  std::vector<float> lse32;

  double lse(int64_t n) const { return lse64.empty() ? static_cast<double>(lse32[n]) : lse64[n]; }
};

Result run(AttentionForwardParams p, int threads, bool rows_first) {
  Result r;
  r.out = make_tensor(p.query.dtype, p.batch, p.heads_q, p.len_q, p.dim_v, rows_first, 0);
  p.out = r.out.ref;
  const int64_t rows = p.batch * p.heads_q * p.len_q;
  if (p.query.dtype == DType::kFloat64) {
    r.lse64.assign(rows, kNan);
    p.lse.ptr = r.lse64.data();
    p.lse.dtype = DType::kFloat64;
  } else {
    r.lse32.assign(rows, std::numeric_limits<float>::quiet_NaN());
    p.lse.ptr = r.lse32.data();
  }
  p.num_threads = threads;
  p.workspace_bytes = cpu::attention_forward_workspace(p);
  std::vector<char> workspace(p.workspace_bytes, '\xff');
  p.workspace = workspace.data();
  cpu::attention_forward(p);
  return r;
}

// Compares with the definition. Dead keys and values count as zero.
void compare(const AttentionForwardParams& p, const Result& found) {
  const double tolerance = p.query.dtype == DType::kFloat64    ? 2e-14
                           : p.query.dtype == DType::kFloat32  ? 2e-5
                           : p.query.dtype == DType::kBFloat16 ? 3e-2
                                                               : 4e-3;
  std::vector<double> score(p.len_k), expected(p.dim_v);
  for (int64_t n = 0; n < p.batch * p.heads_q * p.len_q; ++n) {
    const int64_t b = n / (p.heads_q * p.len_q), h = n / p.len_q % p.heads_q, i = n % p.len_q;
    const int64_t h_kv = h / (p.heads_q / p.heads_kv);
    double top = -kInf, sum = 0.0;
    for (int64_t j = 0; j < p.len_k; ++j) {
      score[j] = -kInf;
      if (!may_attend(p.mask, b, h, i, j)) continue;
      double dot = 0.0;
      for (int64_t d = 0; d < p.dim_qk; ++d) dot += get(p.query, b, h, i, d) * get(p.key, b, h_kv, j, d);
      score[j] = dot * p.scale + (p.bias ? get(p.bias, b, h, i, j) : 0.0);
      top = std::fmax(top, score[j]);
    }
    expected.assign(p.dim_v, 0.0);
    for (int64_t j = 0; j < p.len_k; ++j) {
      if (score[j] == -kInf) continue;
      const double e = std::exp(score[j] - top);
      sum += e;
      if (!dropout_keeps(p.dropout, b, h, i, j)) continue;
      for (int64_t d = 0; d < p.dim_v; ++d) expected[d] += e / (1.0 - p.dropout.p) * get(p.value, b, h_kv, j, d);
    }
    for (int64_t d = 0; d < p.dim_v; ++d) {
      const double want = sum > 0.0 ? expected[d] / sum : 0.0;
      CHECK(std::fabs(get(found.out.ref, b, h, i, d) - want) <= tolerance * std::fmax(1.0, std::fabs(want)));
    }
    if (sum > 0.0) {
      const double want = top + std::log(sum);
      CHECK(std::fabs(found.lse(n) - want) <= (p.query.dtype == DType::kFloat64 ? 1e-13 : 3e-6) * std::fmax(1.0, std::fabs(want)));
    } else {
      CHECK(found.lse(n) == -kInf);
    }
  }
}

void test_random_problems() {
  Random random(7);
  const int64_t lengths[] = {1, 2, 3, 17, 48, 63, 64, 65, 113, 130, 197};
  const int64_t dims[] = {1, 3, 8, 16, 40, 59, 64, 80, 130};
  const DType dtypes[] = {DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  for (int round = 0; round < 120; ++round) {
    AttentionForwardParams p;
    p.batch = random.integer(1, 2);
    p.heads_kv = random.integer(1, 2);
    p.heads_q = p.heads_kv * random.integer(1, 2);
    p.len_q = lengths[random.integer(0, 10)];
    p.len_k = lengths[random.integer(0, 10)];
    p.dim_qk = dims[random.integer(0, 8)];
    p.dim_v = dims[random.integer(0, 8)];
    const double scales[] = {1.0 / std::sqrt(static_cast<double>(p.dim_qk)), 1.0, 0.0, -0.25, 1e-60};
    p.scale = scales[random.integer(0, 4)];
    const DType dtype = dtypes[random.integer(0, 4)];
    const bool rows_first = random.chance(0.5);
    const int64_t pad = random.chance(0.3) ? 3 : 0;
    Tensor query = make_tensor(dtype, p.batch, p.heads_q, p.len_q, p.dim_qk, rows_first, pad);
    Tensor key = make_tensor(dtype, p.batch, p.heads_kv, p.len_k, p.dim_qk, rows_first, pad);
    Tensor value = make_tensor(dtype, p.batch, p.heads_kv, p.len_k, p.dim_v, rows_first, 0);
    randomize(query, p.batch, p.heads_q, p.len_q, p.dim_qk, random);
    randomize(key, p.batch, p.heads_kv, p.len_k, p.dim_qk, random);
    randomize(value, p.batch, p.heads_kv, p.len_k, p.dim_v, random);
    p.query = query.ref;
    p.key = key.ref;
    p.value = value.ref;

    // mask
    std::vector<int64_t> key_lengths, prefix, query_ids(p.batch * p.len_q), key_ids(p.batch * p.len_k);
    std::vector<uint8_t> keep(p.batch * p.len_k);
    std::vector<uint64_t> bits;
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
    if (random.chance(0.2)) {
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
    if (random.chance(0.3)) {  // one dense mask for every batch and head, without the bitmaps of its tiles
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
    Tensor bias;
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

    const Result one = run(p, 1, rows_first), three = run(p, 3, rows_first);
    compare(p, one);
    CHECK(one.out.bytes == three.out.bytes);
    for (int64_t n = 0; n < p.batch * p.heads_q * p.len_q; ++n) CHECK(one.lse(n) == three.lse(n));
  }
}

void test_empty_problems() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16})
    for (const int empty : {0, 1, 2}) {
      AttentionForwardParams p;
      p.batch = empty == 0 ? 0 : 2;
      p.heads_q = p.heads_kv = 2;
      p.len_q = empty == 1 ? 0 : 5;
      p.len_k = empty == 2 ? 0 : 7;
      p.dim_qk = p.dim_v = 8;
      Tensor query = make_tensor(dtype, p.batch, 2, p.len_q, 8, false, 0), key = make_tensor(dtype, p.batch, 2, p.len_k, 8, false, 0);
      p.query = query.ref;
      p.key = p.value = key.ref;
      const Result r = run(p, 2, false);
      for (int64_t n = 0; n < p.batch * 2 * p.len_q; ++n) {
        CHECK(r.lse(n) == -kInf);
        for (int64_t d = 0; d < 8; ++d) CHECK(get(r.out.ref, n / (2 * p.len_q), n / p.len_q % 2, n % p.len_q, d) == 0.0);
      }
    }
}

// NaN that a query does attend to is not hidden, and stays in its row.
void test_attended_nan() {
  AttentionForwardParams p;
  p.batch = p.heads_q = p.heads_kv = 1;
  p.len_q = p.len_k = 70;
  p.dim_qk = p.dim_v = 16;
  p.mask.band_low = p.mask.band_high = 0;  // each query sees its own key
  Random random(8);
  Tensor query = make_tensor(DType::kFloat32, 1, 1, 70, 16, false, 0), key = query, value = query;
  for (Tensor* t : {&query, &key, &value}) {
    t->ref.ptr = t->bytes.data();
    randomize(*t, 1, 1, 70, 16, random);
  }
  put(key.ref, 0, 0, 33, 5, kNan);
  p.query = query.ref;
  p.key = key.ref;
  p.value = value.ref;
  const Result r = run(p, 1, false);
  for (int64_t i = 0; i < 70; ++i)
    for (int64_t d = 0; d < 16; ++d) {
      if (i == 33) CHECK(std::isnan(get(r.out.ref, 0, 0, i, d)));
      else CHECK(std::fabs(get(r.out.ref, 0, 0, i, d) - get(value.ref, 0, 0, i, d)) < 1e-6);
    }
  CHECK(std::isnan(r.lse(33)));
}

// Scores in the thousands: the running maximum must keep the exponentials in range, and the rows must still sum to 1.
void test_large_scores() {
  AttentionForwardParams p;
  p.batch = p.heads_q = p.heads_kv = 1;
  p.len_q = 60;
  p.len_k = 300;
  p.dim_qk = 32;
  p.dim_v = 8;
  p.scale = 40.0;
  Random random(9);
  Tensor query = make_tensor(DType::kFloat32, 1, 1, 60, 32, false, 0), key = make_tensor(DType::kFloat32, 1, 1, 300, 32, false, 0),
         value = make_tensor(DType::kFloat32, 1, 1, 300, 8, false, 0);
  randomize(query, 1, 1, 60, 32, random);
  randomize(key, 1, 1, 300, 32, random);
  for (int64_t j = 0; j < 300; ++j)
    for (int64_t d = 0; d < 8; ++d) put(value.ref, 0, 0, j, d, 1.0);
  p.query = query.ref;
  p.key = key.ref;
  p.value = value.ref;
  const Result r = run(p, 1, false);
  for (int64_t i = 0; i < 60; ++i)
    for (int64_t d = 0; d < 8; ++d) CHECK(std::fabs(get(r.out.ref, 0, 0, i, d) - 1.0) < 1e-6);
}

}  // namespace

// Without arguments: runs itself once per level, since a process keeps the level it starts with.
int main(int argc, char** argv) {
  if (argc == 1) {
    const char* names[cpu::kMaxLevels];
    const int levels = cpu::supported_levels(names);
    for (int n = 0; n < levels; ++n) {
      const std::string command = std::string("FASTATTN_CPU_LEVEL=") + names[n] + " '" + argv[0] + "' run";
      CHECK(std::system(command.c_str()) == 0);
    }
    CHECK(levels > 0);
    return fastattn::test::result("attention forward");
  }
  test_random_problems();
  test_empty_problems();
  test_attended_nan();
  test_large_scores();
  return fastattn::test::result(cpu::level_name());
}
