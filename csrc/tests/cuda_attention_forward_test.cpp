// The portable CUDA attention forward in the emulator, against the definition in double.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../core/mask.h"
#include "../core/philox.h"
#include "../cuda/kernels.h"
#include "../cuda/platform.h"
#include "problem.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

struct Result {
  Tensor out;
  std::vector<float> lse;
};

Result run(AttentionForwardParams p, uint64_t schedule, bool rows_first, int64_t pad) {
  Result r;
  r.out = make_tensor(p.query.dtype, p.batch, p.heads_q, p.len_q, p.dim_v, rows_first, pad);
  p.out = r.out.ref;
  r.lse.assign(p.batch * p.heads_q * p.len_q, std::numeric_limits<float>::quiet_NaN());
  p.lse.ptr = r.lse.data();
  p.workspace_bytes = cuda::attention_forward_portable_workspace(p);
  std::vector<char> workspace(p.workspace_bytes, '\xff');
  p.workspace = workspace.data();
  const uint64_t seed = p.dropout.seed;
  if (schedule % 2) {  // the kernel reads the key of the dropout from memory
    p.dropout.seed = ~seed;
    p.dropout.seed_ptr = &seed;
  }
  cuda::emulator::set_seed(schedule);
  cuda::attention_forward_portable(p);
  return r;
}

std::vector<double> rows_of(const TensorRef& t, int64_t batch, int64_t heads, int64_t rows, int64_t dim) {
  std::vector<double> x(batch * heads * rows * dim);
  for (int64_t n = 0; n < batch * heads * rows * dim; ++n)
    x[n] = get(t, n / (heads * rows * dim), n / (rows * dim) % heads, n / dim % rows, n % dim);
  return x;
}

// Dead keys and values count as zero.
void compare(const AttentionForwardParams& p, const Result& found) {
  const double tolerance = p.query.dtype == DType::kFloat32 ? 2e-5 : p.query.dtype == DType::kBFloat16 ? 3e-2 : 4e-3;
  const std::vector<double> query = rows_of(p.query, p.batch, p.heads_q, p.len_q, p.dim_qk),
                            key = rows_of(p.key, p.batch, p.heads_kv, p.len_k, p.dim_qk),
                            value = rows_of(p.value, p.batch, p.heads_kv, p.len_k, p.dim_v);
  std::vector<double> scores(p.len_k), expected(p.dim_v);
  for (int64_t n = 0; n < p.batch * p.heads_q * p.len_q; ++n) {
    const int64_t b = n / (p.heads_q * p.len_q), h = n / p.len_q % p.heads_q, i = n % p.len_q;
    const int64_t head_kv = b * p.heads_kv + h / (p.heads_q / p.heads_kv);
    double top = -kInf, sum = 0.0;
    for (int64_t j = 0; j < p.len_k; ++j) {
      scores[j] = -kInf;
      if (!may_attend(p.mask, b, h, i, j)) continue;
      double dot = 0.0;
      for (int64_t d = 0; d < p.dim_qk; ++d) dot += query[n * p.dim_qk + d] * key[(head_kv * p.len_k + j) * p.dim_qk + d];
      scores[j] = dot * p.scale + (p.bias ? get(p.bias, b, h, i, j) : 0.0);
      top = std::fmax(top, scores[j]);
    }
    expected.assign(p.dim_v, 0.0);
    for (int64_t j = 0; j < p.len_k; ++j) {
      if (scores[j] == -kInf) continue;
      const double e = std::exp(scores[j] - top);
      sum += e;
      if (p.dropout.p > 0.0 && !dropout_keeps(p.dropout, b, h, i, j)) continue;
      for (int64_t d = 0; d < p.dim_v; ++d)
        expected[d] += e / (1.0 - p.dropout.p) * value[(head_kv * p.len_k + j) * p.dim_v + d];
    }
    double difference = 0.0, largest = 1.0;
    for (int64_t d = 0; d < p.dim_v; ++d) {
      const double want = sum > 0.0 ? expected[d] / sum : 0.0, error = std::fabs(get(found.out.ref, b, h, i, d) - want);
      difference = error > difference || std::isnan(error) ? error : difference;
      largest = std::fmax(largest, std::fabs(want));
    }
    if (!CHECK(difference <= tolerance * largest)) std::fprintf(stderr, "    row %d off by %g\n", static_cast<int>(n), difference);
    if (sum > 0.0) {
      const double want = top + std::log(sum);
      if (!CHECK(std::fabs(found.lse[n] - want) <= 3e-6 * std::fmax(1.0, std::fabs(want))))
        std::fprintf(stderr, "    lse of row %d is %g, not %g\n", static_cast<int>(n), found.lse[n], want);
    } else {
      CHECK(found.lse[n] == -kInf);
      CHECK(difference == 0.0);
    }
  }
}

// Bytes between the rows of the output are not written.
void check_padding(const AttentionForwardParams& p, const Result& r, int64_t pad) {
  const int64_t size = size_of(p.query.dtype), row = (p.dim_v + pad) * size;
  for (size_t at = 0; at < r.out.bytes.size(); ++at)
    if (static_cast<int64_t>(at) % row >= p.dim_v * size && r.out.bytes[at] != '\xff') {
      CHECK(false && "padding was written");
      return;
    }
}

// The bitmaps of a mask's 64 x 64 tiles.
struct TileMap {
  std::vector<uint64_t> live, full;

  explicit TileMap(AttentionForwardParams& p) {
    const int64_t rows = ceil_div(p.len_q, 64), columns = ceil_div(p.len_k, 64), words = ceil_div(columns, 64);
    live.assign(rows * words, 0);
    full.assign(rows * words, 0);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        uint64_t any = 0, all = ~uint64_t{0};
        for (int64_t i = r * 64; i < min64(p.len_q, r * 64 + 64); ++i) {
          const uint64_t word = p.mask.bits[i * p.mask.words_per_row + c];
          any |= word;
          all &= word;
        }
        live[r * words + c / 64] |= uint64_t{any != 0} << (c % 64);
        full[r * words + c / 64] |= uint64_t{all == bits_before(p.len_k, c * 64)} << (c % 64);
      }
    p.mask.live = live.data();
    p.mask.full = full.data();
    p.mask.map_words_per_row = words;
    p.mask.block_m = p.mask.block_n = 64;
  }
};

void test_random_problems() {
  Random random(11);
  for (int round = 0; round < 60;) {
    const RandomProblem problem(random);
    if (problem.dtype == DType::kFloat64) continue;
    ++round;
    AttentionForwardParams p;
    static_cast<AttentionParams&>(p) = problem.p;
    std::vector<TileMap> map;
    if (p.mask.bits && round % 2) map.emplace_back(p);
    const int64_t pad = round % 3;
    const Result one = run(p, 2 * round, problem.rows_first, pad), two = run(p, 2 * round + 1, problem.rows_first, pad);
    compare(p, one);
    check_padding(p, one, pad);
    CHECK(one.out.bytes == two.out.bytes);
    CHECK(std::memcmp(one.lse.data(), two.lse.data(), one.lse.size() * sizeof(float)) == 0);
    if (failures) {
      std::fprintf(stderr, "    round %d: B %d Hq %d Hkv %d L %d S %d D %d Dv %d scale %g dtype %d dropout %g bias %d mask %d\n", round,
                   int(p.batch), int(p.heads_q), int(p.heads_kv), int(p.len_q), int(p.len_k), int(p.dim_qk), int(p.dim_v), p.scale,
                   int(problem.dtype), p.dropout.p, bool(p.bias), has_mask(p.mask));
      return;
    }
  }
}

// One plain problem, all operands random.
struct PlainProblem {
  AttentionForwardParams p;
  Tensor query, key, value;

  PlainProblem(DType dtype, int64_t heads_q, int64_t heads_kv, int64_t len_q, int64_t len_k, int64_t dim_qk, int64_t dim_v,
               Random& random)
      : query(make_tensor(dtype, 1, heads_q, len_q, dim_qk, false, 0)),
        key(make_tensor(dtype, 1, heads_kv, len_k, dim_qk, false, 0)),
        value(make_tensor(dtype, 1, heads_kv, len_k, dim_v, false, 0)) {
    p.batch = 1;
    p.heads_q = heads_q;
    p.heads_kv = heads_kv;
    p.len_q = len_q;
    p.len_k = len_k;
    p.dim_qk = dim_qk;
    p.dim_v = dim_v;
    p.scale = 1.0 / std::sqrt(static_cast<double>(dim_qk));
    randomize(query, 1, heads_q, len_q, dim_qk, random);
    randomize(key, 1, heads_kv, len_k, dim_qk, random);
    randomize(value, 1, heads_kv, len_k, dim_v, random);
    p.query = query.ref;
    p.key = key.ref;
    p.value = value.ref;
  }
  PlainProblem(const PlainProblem&) = delete;
};

// Every head dim that has kernels of its own, and one below it; plain, causal, with dropout, and with few rows.
void test_head_dims() {
  Random random(12);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32})
    for (const int64_t dim : {32, 64, 96, 128, 192, 256}) {
      PlainProblem plain(dtype, 2, 1, 135, 140, dim, dim - 8, random);
      const int form = static_cast<int>(random.integer(0, 2));
      if (form == 1) plain.p.mask.band_high = 5;
      if (form == 2) plain.p.dropout = {0.3, random.bits()};
      compare(plain.p, run(plain.p, dim, true, 0));
      PlainProblem few(dtype, 4, 2, 3, 197, dim - 7, dim, random);
      few.p.mask.band_high = form == 1 ? 194 : kUnlimited;
      if (form == 2) few.p.dropout = {0.3, random.bits()};
      compare(few.p, run(few.p, dim, true, 0));
    }
}

// Few rows of few heads: the keys are shared out over blocks; some of them have nothing to do.
void test_parts() {
  Random random(15);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16})
    for (const int form : {0, 1, 2}) {
      PlainProblem problem(dtype, 2, 1, form == 2 ? 16 : 1, 1100, 40, 36, random);
      AttentionForwardParams& p = problem.p;
      if (form == 1) p.mask.band_low = 700, p.mask.band_high = 900;
      if (form == 2) p.dropout = {0.3, random.bits()};
      CHECK(cuda::attention_forward_portable_workspace(p) > 0);
      const Result one = run(p, 2, true, 4), two = run(p, 3, true, 4);
      compare(p, one);
      CHECK(one.out.bytes == two.out.bytes);
    }
}

void test_empty_problems() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (const int64_t len_q : {0, 5, 20})
      for (const int64_t batch : {0, 2}) {
        AttentionForwardParams p;
        p.batch = batch;
        p.heads_q = p.heads_kv = 2;
        p.len_q = len_q;
        p.len_k = batch && len_q ? 0 : 7;
        p.dim_qk = p.dim_v = 8;
        Tensor query = make_tensor(dtype, p.batch, 2, p.len_q, 8, false, 0), key = make_tensor(dtype, p.batch, 2, p.len_k, 8, false, 0);
        p.query = query.ref;
        p.key = p.value = key.ref;
        const Result r = run(p, 2, false, 0);
        for (int64_t n = 0; n < p.batch * 2 * p.len_q; ++n) {
          CHECK(r.lse[n] == -kInf);
          for (int64_t d = 0; d < 8; ++d) CHECK(get(r.out.ref, n / (2 * p.len_q), n / p.len_q % 2, n % p.len_q, d) == 0.0);
        }
      }
}

// NaN that a query does attend to is not hidden, and stays in its row.
void test_attended_nan() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (const int64_t len : {16, 70}) {
      Random random(8);
      PlainProblem problem(dtype, 1, 1, len, len, 16, 16, random);
      AttentionForwardParams& p = problem.p;
      p.mask.band_low = p.mask.band_high = 0;  // each query sees its own key
      const int64_t bad = len / 2 - 2;
      put(p.key, 0, 0, bad, 5, kNan);
      const Result r = run(p, 1, false, 0);
      for (int64_t i = 0; i < len; ++i)
        for (int64_t d = 0; d < 16; ++d) {
          if (i == bad) CHECK(std::isnan(get(r.out.ref, 0, 0, i, d)));
          else CHECK(std::fabs(get(r.out.ref, 0, 0, i, d) - get(p.value, 0, 0, i, d)) < 1e-2);
        }
      CHECK(std::isnan(r.lse[bad]));
    }
}

// Scores in the thousands, the largest ones last: the shift must follow them, and the rows must still sum to 1.
void test_large_scores() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (const int64_t len_q : {9, 60}) {
      Random random(9);
      PlainProblem problem(dtype, 1, 1, len_q, 300, 32, 8, random);
      AttentionForwardParams& p = problem.p;
      p.scale = 40.0;
      for (int64_t j = 0; j < 300; ++j) {
        for (int64_t d = 0; d < 32; ++d) put(p.key, 0, 0, j, d, get(p.key, 0, 0, j, d) * (j < 70 ? 0.0 : j < 200 ? 0.25 : 1.0));
        for (int64_t d = 0; d < 8; ++d) put(p.value, 0, 0, j, d, 1.0);
      }
      const Result r = run(p, 1, false, 0);
      const double tolerance = dtype == DType::kFloat32 ? 1e-6 : dtype == DType::kBFloat16 ? 4e-3 : 1e-3;
      for (int64_t i = 0; i < len_q; ++i)
        for (int64_t d = 0; d < 8; ++d) CHECK(std::fabs(get(r.out.ref, 0, 0, i, d) - 1.0) <= tolerance);
      compare(p, r);
    }
}

// Where one key takes all of a row its probability is 1 and lse its score, however large the scores are.
void test_one_key_takes_all() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (const double size : {1e4, 1e9, 1e30})
      for (const int64_t len_q : {5, 70}) {
        if (dtype == DType::kFloat16 && size > 1e4) continue;
        Random random(10);
        PlainProblem problem(dtype, 1, 1, len_q, 150, 24, 24, random);
        AttentionForwardParams& p = problem.p;
        for (int64_t j = 0; j < 150; ++j)
          for (int64_t d = 0; d < 24; ++d) {
            if (j < len_q) put(p.query, 0, 0, j, d, get(p.query, 0, 0, j, d) * std::sqrt(size));
            put(p.key, 0, 0, j, d, get(p.key, 0, 0, j, d) * std::sqrt(size));
          }
        const Result r = run(p, 1, false, 0);
        for (int64_t i = 0; i < len_q; ++i) {
          double top = -kInf, second = -kInf;
          int64_t chosen = 0;
          for (int64_t j = 0; j < 150; ++j) {
            const double x = dot(p.query, 0, i, p.key, 0, j, 0, 24) * p.scale;
            if (x > top) second = top, top = x, chosen = j;
            else if (x > second) second = x;
          }
          if (top - second < 100.0) continue;
          for (int64_t d = 0; d < 24; ++d) CHECK(get(r.out.ref, 0, 0, i, d) == get(p.value, 0, 0, chosen, d));
          CHECK(std::fabs(r.lse[i] - top) <= 1e-6 * std::fabs(top));
        }
      }
}

// A row whose bias is the lowest number everywhere is not empty: its weights are equal.
void test_lowest_bias() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (const int64_t len_q : {2, 70}) {
      Random random(13);
      PlainProblem problem(dtype, 1, 1, len_q, 130, 16, 16, random);
      AttentionForwardParams& p = problem.p;
      Tensor bias = make_tensor(DType::kFloat32, 1, 1, 1, 130, false, 0);
      for (int64_t j = 0; j < 130; ++j) put(bias.ref, 0, 0, 0, j, -std::numeric_limits<float>::max());
      p.bias = bias.ref;
      p.bias.stride[2] = 0;
      const Result r = run(p, 1, false, 0);
      for (int64_t d = 0; d < 16; ++d) {
        double mean = 0.0;
        for (int64_t j = 0; j < 130; ++j) mean += get(p.value, 0, 0, j, d) / 130.0;
        for (int64_t i = 0; i < len_q; ++i) CHECK(std::fabs(get(r.out.ref, 0, 0, i, d) - mean) < 4e-3);
      }
    }
}

// float16 would lose the digits of small probabilities that dropout scales up.
void test_strong_dropout() {
  Random random(14);
  for (const int64_t len_q : {9, 70})
    for (const double drop : {0.9, 0.9999}) {
      PlainProblem problem(DType::kFloat16, 2, 1, len_q, 400, 64, 64, random);
      problem.p.scale = 1.0;
      problem.p.dropout = {drop, random.bits()};
      compare(problem.p, run(problem.p, 1, true, 0));
    }
}

}  // namespace

int main() {
  test_empty_problems();
  test_attended_nan();
  test_large_scores();
  test_one_key_takes_all();
  test_lowest_bias();
  test_strong_dropout();
  test_head_dims();
  test_parts();
  test_random_problems();
  return result("portable CUDA attention forward");
}
