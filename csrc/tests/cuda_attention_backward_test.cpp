// The portable CUDA attention backward in the emulator, against the definition in double.
#include <cmath>
#include <cstdlib>
#include <vector>

#include "../cuda/kernels.h"
#include "../cuda/platform.h"
#include "backward_problem.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

Gradients run(AttentionBackwardParams p, bool rows_first, uint64_t schedule) {
  Gradients g = allocate_gradients(p, rows_first);
  p.workspace_bytes = cuda::attention_backward_portable_workspace(p);
  std::vector<char> workspace(p.workspace_bytes, '\xff');
  p.workspace = workspace.data();
  const uint64_t seed = p.dropout.seed;
  if (schedule % 2) {  // the kernels read the key of the dropout from memory
    p.dropout.seed = ~seed;
    p.dropout.seed_ptr = &seed;
  }
  cuda::emulator::set_seed(schedule);
  cuda::attention_backward_portable(p);
  return g;
}

// Twice, under schedules that differ.
Gradients check(const AttentionBackwardParams& p, bool rows_first, uint64_t schedule) {
  Gradients found = run(p, rows_first, schedule);
  compare_gradients(p, found, define(p), 2);
  compare_bits(found, run(p, rows_first, schedule + 1));
  return found;
}

// The inputs of the backward from those of the forward, and the check.
Gradients check_problem(const AttentionParams& problem, bool rows_first, bool with_grad_lse, uint64_t schedule, Random& random) {
  AttentionBackwardParams p;
  static_cast<AttentionParams&>(p) = problem;
  const Saved saved = forward(p, rows_first, with_grad_lse, random);
  p.out = saved.out.ref;
  p.grad_out = saved.grad_out.ref;
  if (with_grad_lse) p.grad_lse = saved.grad_lse.ref;
  const int before = failures;
  Gradients found = check(p, rows_first, schedule);
  if (failures != before)
    std::fprintf(stderr, "    dtype %d, B %d, heads %d / %d, L %d, S %d, D %d, Dv %d, bias %d, dropout %g, mask %d\n",
                 static_cast<int>(p.query.dtype), static_cast<int>(p.batch), static_cast<int>(p.heads_q),
                 static_cast<int>(p.heads_kv), static_cast<int>(p.len_q), static_cast<int>(p.len_k), static_cast<int>(p.dim_qk),
                 static_cast<int>(p.dim_v), p.bias ? 1 : 0, p.dropout.p, has_mask(p.mask));
  return found;
}

void test_random_problems(int rounds) {
  Random random(23);
  for (int round = 0; round < rounds; ++round) {
    const RandomProblem problem(random);
    const bool with_grad_lse = random.chance(0.5);
    if (problem.dtype != DType::kFloat64) check_problem(problem.p, problem.rows_first, with_grad_lse, 2 * round, random);
  }
}

// One problem of chosen sizes, without a mask, and a bias by head where wanted.
struct SizedProblem {
  AttentionParams p;
  Tensor query, key, value, bias;

  SizedProblem(DType dtype, int64_t batch, int64_t heads_kv, int64_t group, int64_t len_q, int64_t len_k, int64_t dim_qk, int64_t dim_v,
               bool with_bias, Random& random)
      : query(make_tensor(dtype, batch, heads_kv * group, len_q, dim_qk, true, 0)),
        key(make_tensor(dtype, batch, heads_kv, len_k, dim_qk, true, 0)),
        value(make_tensor(dtype, batch, heads_kv, len_k, dim_v, true, 0)) {
    p.batch = batch;
    p.heads_q = heads_kv * group;
    p.heads_kv = heads_kv;
    p.len_q = len_q;
    p.len_k = len_k;
    p.dim_qk = dim_qk;
    p.dim_v = dim_v;
    p.scale = 1.0 / std::sqrt(static_cast<double>(dim_qk));
    randomize(query, batch, p.heads_q, len_q, dim_qk, random);
    randomize(key, batch, heads_kv, len_k, dim_qk, random);
    randomize(value, batch, heads_kv, len_k, dim_v, random);
    p.query = query.ref;
    p.key = key.ref;
    p.value = value.ref;
    if (!with_bias) return;
    bias = make_tensor(DType::kFloat32, 1, p.heads_q, len_q, len_k, false, 0);
    randomize(bias, 1, p.heads_q, len_q, len_k, random);
    p.bias = bias.ref;
    p.bias.stride[0] = 0;
  }
  SizedProblem(const SizedProblem&) = delete;
};

// Scores around -108: a key that does not exist, with score 0, would have an infinite probability.
void lower_scores(SizedProblem& problem) {
  AttentionParams& p = problem.p;
  p.scale = 1.0;
  for (int64_t d = 0; d < 3; ++d) {
    for (int64_t n = 0; n < p.batch * p.heads_q * p.len_q; ++n)
      put(p.query, n / (p.heads_q * p.len_q), n / p.len_q % p.heads_q, n % p.len_q, d, 6.0);
    for (int64_t n = 0; n < p.batch * p.heads_kv * p.len_k; ++n)
      put(p.key, n / (p.heads_kv * p.len_k), n / p.len_k % p.heads_kv, n % p.len_k, d, -6.0);
  }
}

// Every head dim that has kernels of its own, in rows of whole vectors and in others; plain, causal, with a bias and dropout.
void test_head_dims() {
  Random random(24);
  int form = 0;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32})
    for (const int64_t dim : {32, 64, 96, 128, 192, 256}) {
      form = (form + 1) % 3;
      SizedProblem problem(dtype, 1, 1, 1, dim < 128 ? 140 : 75, dim < 128 ? 150 : 135, dim, form ? dim - 8 : dim - 3, form == 2, random);
      if (form == 1) problem.p.mask.band_high = problem.p.len_k - problem.p.len_q;
      if (form == 2) problem.p.dropout = {0.3, random.bits()};
      if (dim == 64) lower_scores(problem);
      check_problem(problem.p, true, form == 0, 100 + dim, random);
    }
}

// Long enough for full, partial and empty tiles in a row, and for more query heads than keys.
void test_long_problems() {
  Random random(25);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32})
    for (const bool with_bias : {false, true}) {
      SizedProblem problem(dtype, 1, 1, with_bias ? 1 : 3, 330, 345, 16, 8, with_bias, random);
      problem.p.mask.band_high = 20;
      problem.p.mask.band_low = -170;
      check_problem(problem.p, true, false, 200, random);
    }
}

// Few keys and enough heads for a block of each: one kernel for all three gradients.
void test_short_sequences() {
  Random random(26);
  int form = 0;
  for (const int64_t len_k : {37, 128, 197, 256})
    for (const bool general : {false, true}) {
      const int64_t len_q = form % 2 ? 197 : 70;
      SizedProblem problem(form % 3 ? DType::kBFloat16 : DType::kFloat16, 2, 2, 1 + form % 2, len_q, len_k, 16, form % 3 ? 64 : 40,
                           general, random);
      if (general) problem.p.dropout = {0.1, random.bits()};
      if (form % 2) problem.p.mask.band_high = form < 4 ? -20 : 100;  // the first 20 rows have no key
      if (form == 4) lower_scores(problem);
      check_problem(problem.p, true, general, 300 + form++, random);
    }
  for (int round = 0; round < 40; ++round) {  // every mask, with NaN where nobody attends
    const RandomProblem problem(random);
    if (problem.p.batch * problem.p.heads_kv >= cuda::device_info().multiprocessors && problem.dtype != DType::kFloat64 &&
        problem.dtype != DType::kFloat32)
      check_problem(problem.p, problem.rows_first, false, 400 + round, random);
  }
}

// No batches, no queries, or no keys: what gradients are left are zeros.
void test_empty_problems() {
  Random random(27);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (const int empty : {0, 1, 2}) {
      SizedProblem problem(dtype, empty == 0 ? 0 : 2, 2, 1, empty == 1 ? 0 : 50, empty == 2 ? 0 : 70, 8, 8, false, random);
      Tensor bias = make_tensor(dtype, 1, 1, 1, 1, false, 0);  // broadcast to everything, also to nothing
      randomize(bias, 1, 1, 1, 1, random);
      problem.p.bias = bias.ref;
      for (int64_t& stride : problem.p.bias.stride) stride = 0;
      const Gradients found = check_problem(problem.p, true, false, 400 + empty, random);
      CHECK(get(found.bias.ref, 0, 0, 0, 0) == 0.0);
    }
}

}  // namespace

int main(int argc, char** argv) {
  test_random_problems(argc > 1 ? std::atoi(argv[1]) : 30);
  test_head_dims();
  test_long_problems();
  test_short_sequences();
  test_empty_problems();
  return result("cuda attention backward");
}
