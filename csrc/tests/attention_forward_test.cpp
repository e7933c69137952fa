// The attention forward of every instruction level this CPU has, against the definition in double.
#include <limits>
#include <vector>

#include "../core/mask.h"
#include "../core/philox.h"
#include "../cpu/kernels.h"
#include "levels.h"
#include "problem.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

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

void test_random_problems(bool decoding, bool padded) {
  Random random(7);
  for (int round = 0; round < (decoding || padded ? 60 : 120); ++round) {
    const RandomProblem problem(random, decoding, padded);
    AttentionForwardParams p;
    static_cast<AttentionParams&>(p) = problem.p;
    const bool rows_first = problem.rows_first;
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

int main(int argc, char** argv) {
  return run_every_level(argc, argv, "attention forward", [] {
    test_random_problems(false, false);
    test_random_problems(true, false);
    test_random_problems(false, true);
    test_empty_problems();
    test_attended_nan();
    test_large_scores();
  });
}
