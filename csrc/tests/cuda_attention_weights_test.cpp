// The attention weights and their gradients of the CUDA kernels, in the emulator, against the definition in double.
#include <vector>

#include "../core/mask.h"
#include "../cuda/kernels.h"
#include "../cuda/platform.h"
#include "problem.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

double probability(const AttentionParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const double lse = get(p.lse, b, h, i, 0);
  return may_attend(p.mask, b, h, i, j) && lse > -kInf ? std::exp(score(p, b, h, i, j) - lse) : 0.0;
}

// The lse of the definition, rounded to its type; and NaN into the queries that may attend to nothing.
Tensor define_lse(AttentionParams& p) {
  Tensor lse = make_tensor(DType::kFloat32, p.batch, p.heads_q, p.len_q, 1, false, 0);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads_q; ++h)
      for (int64_t i = 0; i < p.len_q; ++i) {
        double top = -kInf, sum = 0.0;
        bool live = false;
        for (int64_t j = 0; j < p.len_k; ++j) {
          if (!may_attend(p.mask, b, h, i, j)) continue;
          live = true;
          top = std::fmax(top, score(p, b, h, i, j));
        }
        for (int64_t j = 0; j < p.len_k; ++j)
          if (top > -kInf && may_attend(p.mask, b, h, i, j)) sum += std::exp(score(p, b, h, i, j) - top);
        put(lse.ref, b, h, i, 0, sum > 0.0 ? top + std::log(sum) : -kInf);
        if (!live) put(p.query, b, h, i, p.dim_qk / 2, kNan);
      }
  return lse;
}

// [B, L, S] as [B, 1, L, S] with stride 0 for the head, or [B, Hq, L, S].
Tensor make_weights(const AttentionParams& p, DType dtype, bool average, int64_t pad) {
  Tensor t = make_tensor(dtype, p.batch, average ? 1 : p.heads_q, p.len_q, p.len_k, false, pad);
  if (average) t.ref.stride[1] = 0;
  return t;
}

template <typename Params>
void run(Params& p, uint64_t seed, int64_t (*workspace_bytes)(const Params&), void (*kernel)(const Params&)) {
  cuda::emulator::set_seed(seed);
  p.workspace_bytes = workspace_bytes(p);
  std::vector<char> workspace(p.workspace_bytes, '\xff');
  p.workspace = workspace.data();
  kernel(p);
}

void check_weights(const AttentionParams& problem, bool average, double tolerance) {
  AttentionWeightsParams p;
  static_cast<AttentionParams&>(p) = problem;
  p.average_heads = average;
  Tensor want = make_weights(p, DType::kFloat64, average, 0);
  want.bytes.assign(want.bytes.size(), '\0');
  want.ref.ptr = want.bytes.data();
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads_q; ++h)
      for (int64_t i = 0; i < p.len_q; ++i)
        for (int64_t j = 0; j < p.len_k; ++j) {
          const double keeps = kept(p, b, h, i, j);
          const double share = average ? 1.0 / static_cast<double>(p.heads_q) : 1.0;
          if (keeps > 0.0) add(want.ref, b, h, i, j, probability(p, b, h, i, j) * keeps * share);
        }
  const int64_t size[] = {p.batch, average ? 1 : p.heads_q, p.len_q, p.len_k};
  std::vector<char> first;
  for (const uint64_t seed : {1, 2}) {
    Tensor found = make_weights(p, p.query.dtype, average, 0);
    p.weights = found.ref;
    run(p, seed, cuda::attention_weights_workspace, cuda::attention_weights);
    compare(found.ref, want.ref, size, tolerance);
    if (seed == 1) first = found.bytes;
    CHECK(found.bytes == first);
  }
}

struct Gradients {
  Tensor query, key, lse, bias;
};

// Gradients of the bias's own shape.
Tensor make_bias_gradient(const AttentionParams& p, DType dtype) {
  const int64_t whole[] = {p.batch, p.heads_q, p.len_q, p.len_k};
  int64_t size[4];
  for (int n = 0; n < 4; ++n) size[n] = p.bias.stride[n] ? whole[n] : 1;
  Tensor t = make_tensor(dtype, size[0], size[1], size[2], size[3], false, 0);
  for (int n = 0; n < 4; ++n)
    if (!p.bias.stride[n]) t.ref.stride[n] = 0;
  return t;
}

Gradients run_backward(AttentionWeightsBackwardParams p, uint64_t seed, bool rows_first) {
  Gradients g;
  const DType dtype = p.query.dtype;
  g.query = make_tensor(dtype, p.batch, p.heads_q, p.len_q, p.dim_qk, rows_first, 0);
  g.key = make_tensor(dtype, p.batch, p.heads_kv, p.len_k, p.dim_qk, rows_first, 1);
  g.lse = make_tensor(DType::kFloat32, p.batch, p.heads_q, p.len_q, 1, false, 0);
  p.grad_query = g.query.ref;
  p.grad_key = g.key.ref;
  p.grad_lse = g.lse.ref;
  if (p.bias) {
    g.bias = make_bias_gradient(p, DType::kFloat32);
    p.grad_bias = g.bias.ref;
  }
  run(p, seed, cuda::attention_weights_backward_workspace, cuda::attention_weights_backward);
  return g;
}

Gradients define_backward(const AttentionWeightsBackwardParams& p) {
  Gradients g;
  g.query = make_tensor(DType::kFloat64, p.batch, p.heads_q, p.len_q, p.dim_qk, false, 0);
  g.key = make_tensor(DType::kFloat64, p.batch, p.heads_kv, p.len_k, p.dim_qk, false, 0);
  g.lse = make_tensor(DType::kFloat64, p.batch, p.heads_q, p.len_q, 1, false, 0);
  g.bias = make_bias_gradient(p, DType::kFloat64);
  for (Tensor* t : {&g.query, &g.key, &g.lse, &g.bias}) {
    t->bytes.assign(t->bytes.size(), '\0');
    t->ref.ptr = t->bytes.data();
  }
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads_q; ++h)
      for (int64_t i = 0; i < p.len_q; ++i)
        for (int64_t j = 0; j < p.len_k; ++j) {
          const double keeps = kept(p, b, h, i, j), share = p.average_heads ? 1.0 / static_cast<double>(p.heads_q) : 1.0;
          if (!may_attend(p.mask, b, h, i, j) || keeps == 0.0) continue;
          const double ds = probability(p, b, h, i, j) * get(p.grad_weights, b, h, i, j) * keeps * share;
          const int64_t h_kv = h / (p.heads_q / p.heads_kv);
          for (int64_t d = 0; d < p.dim_qk; ++d) {
            add(g.query.ref, b, h, i, d, p.scale * ds * get(p.key, b, h_kv, j, d));
            add(g.key.ref, b, h_kv, j, d, p.scale * ds * get(p.query, b, h, i, d));
          }
          add(g.lse.ref, b, h, i, 0, -ds);
          add(g.bias.ref, b, h, i, j, ds);
        }
  return g;
}

void check_backward(const AttentionParams& problem, bool average, bool rows_first, double rounded, Random& random) {
  AttentionWeightsBackwardParams p;
  static_cast<AttentionParams&>(p) = problem;
  p.average_heads = average;
  Tensor grad_weights = make_weights(p, p.query.dtype, average, 3);
  randomize(grad_weights, p.batch, average ? 1 : p.heads_q, p.len_q, p.len_k, random);
  p.grad_weights = grad_weights.ref;
  // Where no head attends, the gradient may be anything: these masks are the same for every head.
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < (average ? 1 : p.heads_q); ++h)
      for (int64_t i = 0; i < p.len_q; ++i)
        for (int64_t j = 0; j < p.len_k; ++j)
          if (!may_attend(p.mask, b, h, i, j)) put(p.grad_weights, b, h, i, j, kNan);
  const int64_t query[] = {p.batch, p.heads_q, p.len_q, p.dim_qk}, key[] = {p.batch, p.heads_kv, p.len_k, p.dim_qk},
                lse[] = {p.batch, p.heads_q, p.len_q, 1}, bias[] = {p.batch, p.heads_q, p.len_q, p.len_k};
  const Gradients want = define_backward(p);
  const Gradients found = run_backward(p, 1, rows_first), again = run_backward(p, 2, rows_first);
  compare(found.query.ref, want.query.ref, query, rounded);
  compare(found.key.ref, want.key.ref, key, rounded);
  compare(found.lse.ref, want.lse.ref, lse, 1e-4);
  if (p.bias) compare(found.bias.ref, want.bias.ref, bias, 1e-4);
  CHECK(found.query.bytes == again.query.bytes && found.key.bytes == again.key.bytes);
  CHECK(found.lse.bytes == again.lse.bytes && found.bias.bytes == again.bias.bytes);
}

void test_random_problems() {
  Random random(27);
  for (int round = 0; round < 60; ++round) {
    RandomProblem problem(random);
    if (problem.dtype == DType::kFloat64) continue;
    AttentionParams& p = problem.p;
    p.value = TensorRef{};
    p.dim_v = 0;
    const Tensor lse = define_lse(p);
    p.lse = lse.ref;
    const double tolerance = problem.dtype == DType::kBFloat16  ? 5e-3
                             : problem.dtype == DType::kFloat16  ? 8e-4
                                                                 : 1e-4;
    check_weights(p, random.chance(0.5), tolerance);
    check_backward(p, random.chance(0.5), problem.rows_first, tolerance, random);
  }
}

void test_empty_problems() {
  Random random(28);
  for (const int empty : {0, 1, 2}) {
    AttentionParams p;
    p.batch = empty == 0 ? 0 : 2;
    p.heads_q = p.heads_kv = 2;
    p.len_q = empty == 1 ? 0 : 50;
    p.len_k = empty == 2 ? 0 : 70;
    p.dim_qk = 8;
    Tensor query = make_tensor(DType::kFloat32, p.batch, 2, p.len_q, 8, false, 0),
           key = make_tensor(DType::kFloat32, p.batch, 2, p.len_k, 8, false, 0);
    randomize(query, p.batch, 2, p.len_q, 8, random);
    randomize(key, p.batch, 2, p.len_k, 8, random);
    p.query = query.ref;
    p.key = key.ref;
    const Tensor lse = define_lse(p);
    p.lse = lse.ref;
    for (const bool average : {false, true}) {
      check_weights(p, average, 1e-4);
      check_backward(p, average, false, 1e-4, random);
    }
  }
}

}  // namespace

int main() {
  test_random_problems();
  test_empty_problems();
  return result("cuda attention weights");
}
