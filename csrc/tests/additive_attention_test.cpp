// Additive attention, forward and backward, at every instruction level this CPU has, against the definition in double: random
// sizes, dtypes, memory orders and masks, numbers on all three paths of the exponentials, NaN and Inf in dead keys.
#include <vector>

#include "../core/mask.h"
#include "../cpu/kernels.h"
#include "levels.h"
#include "problem.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

// Head 0 of a tensor [B, H, rows, dim] as [B, rows, dim].
TensorRef without_heads(const TensorRef& x) { return {x.ptr, {x.stride[0], x.stride[2], x.stride[3], 0}, x.dtype}; }

double at(const TensorRef& x, int64_t b, int64_t i, int64_t d) {
  return get({x.ptr, {x.stride[0], 0, x.stride[1], x.stride[2]}, x.dtype}, b, 0, i, d);
}
void set(const TensorRef& x, int64_t b, int64_t i, int64_t d, double value) {
  put({x.ptr, {x.stride[0], 0, x.stride[1], x.stride[2]}, x.dtype}, b, 0, i, d, value);
}

struct Matrix {
  int64_t rows, dim;
  std::vector<double> x;

  Matrix(int64_t b, int64_t rows, int64_t dim) : rows(rows), dim(dim), x(b * rows * dim) {}
  double& operator()(int64_t b, int64_t i, int64_t d) { return x[(b * rows + i) * dim + d]; }
};

void compare(const TensorRef& found, Matrix& wanted, double tolerance) {
  double largest = 1.0, difference = 0.0;
  for (size_t n = 0; n < wanted.x.size(); ++n) {
    const int64_t d = n % wanted.dim, i = n / wanted.dim % wanted.rows, b = n / (wanted.dim * wanted.rows);
    const double want = wanted.x[n], seen = at(found, b, i, d);
    if (want == -kInf) {
      CHECK(seen == -kInf);
      continue;
    }
    largest = std::fmax(largest, std::fabs(want));
    if (!(std::fabs(seen - want) <= difference)) difference = std::fabs(seen - want);
  }
  if (!CHECK(difference <= tolerance * largest)) std::fprintf(stderr, "    off by %g, largest %g\n", difference, largest);
}

template <typename Params>
void run(Params& p, int threads, int64_t (*workspace_bytes)(const Params&), void (*kernel)(const Params&)) {
  p.num_threads = threads;
  p.workspace_bytes = workspace_bytes(p);
  std::vector<char> workspace(p.workspace_bytes, '\xff');
  p.workspace = workspace.data();
  kernel(p);
}

void check(const AdditiveAttentionParams& problem, bool with_grad_lse, Random& random) {
  const int64_t B = problem.batch, L = problem.len_q, S = problem.len_k, A = problem.features, Dv = problem.dim_v;
  const DType dtype = problem.query.dtype, wide = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  const double tolerance = dtype == DType::kFloat64    ? 1e-10
                           : dtype == DType::kFloat32  ? 3e-5
                           : dtype == DType::kBFloat16 ? 2e-2
                                                       : 4e-3;
  // The definition.
  Matrix out(B, L, Dv), lse(B, L, 1), p(B, L, S), grad_query(B, L, A), grad_key(B, S, A), grad_value(B, S, Dv), grad_weight(1, 1, A);
  Tensor grad_out = make_tensor(dtype, B, 1, L, Dv, false, 1), grad_lse = make_tensor(wide, B, 1, L, 1, false, 0);
  randomize(grad_out, B, 1, L, Dv, random);
  randomize(grad_lse, B, 1, L, 1, random);
  const auto weight = [&](int64_t d) { return at(problem.score_weight, 0, 0, d); };
  const auto feature = [&](int64_t b, int64_t i, int64_t j, int64_t d) {
    return std::tanh(at(problem.query, b, i, d) + at(problem.key, b, j, d));
  };
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0; i < L; ++i) {
      double top = -kInf, sum = 0.0;
      for (int64_t j = 0; j < S; ++j) {
        if (!may_attend(problem.mask, b, 0, i, j)) continue;
        for (int64_t d = 0; d < A; ++d) p(b, i, j) += weight(d) * feature(b, i, j, d);
        top = std::fmax(top, p(b, i, j));
      }
      for (int64_t j = 0; j < S; ++j) {
        p(b, i, j) = may_attend(problem.mask, b, 0, i, j) ? std::exp(p(b, i, j) - top) : 0.0;
        sum += p(b, i, j);
      }
      lse(b, i, 0) = sum > 0.0 ? top + std::log(sum) : -kInf;
      if (sum == 0.0) {
        // What reaches a row without keys may be NaN.
        put(grad_lse.ref, b, 0, i, 0, kNan);
        for (int64_t d = 0; d < Dv; ++d) put(grad_out.ref, b, 0, i, d, kNan);
        for (int64_t d = 0; d < A; ++d) set(problem.query, b, i, d, kNan);
        continue;
      }
      double delta = with_grad_lse ? -get(grad_lse.ref, b, 0, i, 0) : 0.0;
      std::vector<double> dp(S);
      for (int64_t j = 0; j < S; ++j) {
        p(b, i, j) /= sum;
        if (!may_attend(problem.mask, b, 0, i, j)) continue;
        for (int64_t d = 0; d < Dv; ++d) {
          out(b, i, d) += p(b, i, j) * at(problem.value, b, j, d);
          dp[j] += get(grad_out.ref, b, 0, i, d) * at(problem.value, b, j, d);
          grad_value(b, j, d) += p(b, i, j) * get(grad_out.ref, b, 0, i, d);
        }
        delta += p(b, i, j) * dp[j];
      }
      for (int64_t j = 0; j < S; ++j) {
        if (!may_attend(problem.mask, b, 0, i, j)) continue;
        const double ds = p(b, i, j) * (dp[j] - delta);
        for (int64_t d = 0; d < A; ++d) {
          const double t = feature(b, i, j, d);
          grad_query(b, i, d) += ds * weight(d) * (1 - t * t);
          grad_key(b, j, d) += ds * weight(d) * (1 - t * t);
          grad_weight(0, 0, d) += ds * t;
        }
      }
    }

  for (const int threads : {1, 3}) {
    std::vector<char> first;
    for (int repeat = 0; repeat < 2; ++repeat) {
      Tensor found_out = make_tensor(dtype, B, 1, L, Dv, false, 0), found_lse = make_tensor(wide, B, 1, L, 1, false, 0);
      AdditiveAttentionForwardParams forward;
      static_cast<AdditiveAttentionParams&>(forward) = problem;
      forward.out = without_heads(found_out.ref);
      forward.lse = without_heads(found_lse.ref);
      run(forward, threads, cpu::additive_attention_forward_workspace, cpu::additive_attention_forward);
      compare(forward.out, out, tolerance);
      compare(forward.lse, lse, dtype == DType::kFloat64 ? 1e-10 : 3e-6);

      Tensor dq = make_tensor(dtype, B, 1, L, A, false, 0), dk = make_tensor(dtype, B, 1, S, A, false, 0);
      Tensor dv = make_tensor(dtype, B, 1, S, Dv, false, 0), dw = make_tensor(problem.score_weight.dtype, 1, 1, 1, A, false, 0);
      AdditiveAttentionBackwardParams backward;
      static_cast<AdditiveAttentionParams&>(backward) = problem;
      backward.lse = forward.lse;
      backward.out = forward.out;
      backward.grad_out = without_heads(grad_out.ref);
      if (with_grad_lse) backward.grad_lse = without_heads(grad_lse.ref);
      backward.grad_query = without_heads(dq.ref);
      backward.grad_key = without_heads(dk.ref);
      backward.grad_value = without_heads(dv.ref);
      backward.grad_score_weight = dw.ref;
      run(backward, threads, cpu::additive_attention_backward_workspace, cpu::additive_attention_backward);
      compare(backward.grad_query, grad_query, tolerance);
      compare(backward.grad_key, grad_key, tolerance);
      compare(backward.grad_value, grad_value, tolerance);
      compare(without_heads(dw.ref), grad_weight, tolerance);

      std::vector<char> all;
      for (const Tensor* x : {&found_out, &found_lse, &dq, &dk, &dv, &dw}) all.insert(all.end(), x->bytes.begin(), x->bytes.end());
      if (repeat == 0) first = all;
      CHECK(all == first);
    }
  }
}

void test_random_problems() {
  Random random(19);
  for (int round = 0; round < 30; ++round) {
    RandomProblem source(random);
    AdditiveAttentionParams p;
    p.batch = source.p.batch;
    p.len_q = source.p.len_q;
    p.len_k = source.p.len_k;
    p.features = source.p.dim_qk;
    p.dim_v = source.p.dim_v;
    p.query = without_heads(source.p.query);
    p.key = without_heads(source.p.key);
    p.value = without_heads(source.p.value);
    p.mask = source.p.mask;
    // 8: some products of exponentials are cut off; 64: exponentials that float does not hold.
    const double spreads[] = {1.0, 1.0, 1.0, 8.0, 64.0};
    const double spread = spreads[random.integer(0, 4)];
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t d = 0; d < p.features; ++d) {
        for (int64_t i = 0; i < p.len_q; ++i) set(p.query, b, i, d, at(p.query, b, i, d) * spread);
        for (int64_t j = 0; j < p.len_k; ++j) set(p.key, b, j, d, at(p.key, b, j, d) * spread);
      }
    const bool float_weight = random.chance(0.5) && source.dtype != DType::kFloat64;
    Tensor weight = make_tensor(float_weight ? DType::kFloat32 : source.dtype, 1, 1, 1, p.features, false, 0);
    randomize(weight, 1, 1, 1, p.features, random);
    p.score_weight = without_heads(weight.ref);
    check(p, random.chance(0.3), random);
  }
}

void test_empty_problems() {
  Random random(20);
  for (const int empty : {0, 1, 2, 3}) {
    AdditiveAttentionParams p;
    p.batch = empty == 0 ? 0 : 2;
    p.len_q = empty == 1 ? 0 : 50;
    p.len_k = empty == 2 ? 0 : 70;
    p.features = empty == 3 ? 0 : 8;
    p.dim_v = 8;
    Tensor query = make_tensor(DType::kFloat32, p.batch, 1, p.len_q, p.features, false, 0);
    Tensor key = make_tensor(DType::kFloat32, p.batch, 1, p.len_k, p.features, false, 0);
    Tensor value = make_tensor(DType::kFloat32, p.batch, 1, p.len_k, p.dim_v, false, 0);
    Tensor weight = make_tensor(DType::kFloat32, 1, 1, 1, p.features, false, 0);
    randomize(query, p.batch, 1, p.len_q, p.features, random);
    randomize(key, p.batch, 1, p.len_k, p.features, random);
    randomize(value, p.batch, 1, p.len_k, p.dim_v, random);
    randomize(weight, 1, 1, 1, p.features, random);
    p.query = without_heads(query.ref);
    p.key = without_heads(key.ref);
    p.value = without_heads(value.ref);
    p.score_weight = without_heads(weight.ref);
    check(p, true, random);
  }
}

void tests() {
  test_random_problems();
  test_empty_problems();
}

}  // namespace

int main(int argc, char** argv) { return run_every_level(argc, argv, "additive attention", tests); }
