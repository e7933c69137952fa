// The attention backward by its definition, in double, and what a test of a kernel needs around it.
#pragma once

#include <algorithm>
#include <vector>

#include "problem.h"

namespace fastattn::test {

// Inputs of the backward beside those of the forward. lse and out are those of the definition, rounded to their types.
struct Saved {
  Tensor out, grad_out, lse, grad_lse;
};

inline Saved forward(AttentionParams& p, bool rows_first, bool with_grad_lse, Random& random) {
  Saved s;
  const DType wide = p.query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  s.out = make_tensor(p.query.dtype, p.batch, p.heads_q, p.len_q, p.dim_v, rows_first, 0);
  s.grad_out = make_tensor(p.query.dtype, p.batch, p.heads_q, p.len_q, p.dim_v, !rows_first, 2);
  randomize(s.grad_out, p.batch, p.heads_q, p.len_q, p.dim_v, random);
  s.lse = make_tensor(wide, p.batch, p.heads_q, p.len_q, 1, false, 0);
  s.grad_lse = make_tensor(wide, p.batch, p.heads_q, p.len_q, 1, true, 0);
  p.lse = s.lse.ref;
  std::vector<double> x(p.len_k), out(p.dim_v);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads_q; ++h)
      for (int64_t i = 0; i < p.len_q; ++i) {
        const int64_t h_kv = h / (p.heads_q / p.heads_kv);
        double top = -kInf, sum = 0.0;
        bool live = false;
        for (int64_t j = 0; j < p.len_k; ++j) {
          const bool allowed = may_attend(p.mask, b, h, i, j);
          live = live || allowed;
          x[j] = allowed ? score(p, b, h, i, j) : -kInf;
          top = std::fmax(top, x[j]);
        }
        out.assign(p.dim_v, 0.0);
        for (int64_t j = 0; j < p.len_k; ++j) {
          if (x[j] == -kInf) continue;
          sum += std::exp(x[j] - top);
          for (int64_t d = 0; d < p.dim_v; ++d)
            out[d] += std::exp(x[j] - top) * kept(p, b, h, i, j) * get(p.value, b, h_kv, j, d);
        }
        for (int64_t d = 0; d < p.dim_v; ++d) put(s.out.ref, b, h, i, d, sum > 0.0 ? out[d] / sum : 0.0);
        put(s.lse.ref, b, h, i, 0, sum > 0.0 ? top + std::log(sum) : -kInf);
        // What reaches a row without keys and the -inf of its lse may be NaN, and so may its query.
        put(s.grad_lse.ref, b, h, i, 0, with_grad_lse ? (sum > 0.0 ? small_number(random) : kNan) : 0.0);
        if (live) continue;
        put(p.query, b, h, i, p.dim_qk / 2, kNan);
        put(s.grad_out.ref, b, h, i, p.dim_v / 2, kNan);
      }
  return s;
}

struct Gradients {
  Tensor query, key, value, bias;
};

// Gradients of p's shapes, NaN, and p's references to them; the bias's own where there is a bias.
inline Gradients allocate_gradients(AttentionBackwardParams& p, bool rows_first) {
  Gradients g;
  const DType dtype = p.query.dtype;
  g.query = make_tensor(dtype, p.batch, p.heads_q, p.len_q, p.dim_qk, rows_first, 0);
  g.key = make_tensor(dtype, p.batch, p.heads_kv, p.len_k, p.dim_qk, rows_first, 1);
  g.value = make_tensor(dtype, p.batch, p.heads_kv, p.len_k, p.dim_v, rows_first, 0);
  p.grad_query = g.query.ref;
  p.grad_key = g.key.ref;
  p.grad_value = g.value.ref;
  if (p.bias) {
    const int64_t whole[] = {p.batch, p.heads_q, p.len_q, p.len_k};
    int64_t size[4];
    for (int n = 0; n < 4; ++n) size[n] = p.bias.stride[n] ? whole[n] : 1;
    g.bias = make_tensor(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32, size[0], size[1], size[2], size[3], false, 0);
    for (int n = 0; n < 4; ++n)
      if (!p.bias.stride[n]) g.bias.ref.stride[n] = 0;
    p.grad_bias = g.bias.ref;
  }
  return g;
}

inline Gradients define(const AttentionBackwardParams& p) {
  Gradients g;
  g.query = make_tensor(DType::kFloat64, p.batch, p.heads_q, p.len_q, p.dim_qk, false, 0);
  g.key = make_tensor(DType::kFloat64, p.batch, p.heads_kv, p.len_k, p.dim_qk, false, 0);
  g.value = make_tensor(DType::kFloat64, p.batch, p.heads_kv, p.len_k, p.dim_v, false, 0);
  g.bias = make_tensor(DType::kFloat64, p.batch, p.heads_q, p.len_q, p.len_k, false, 0);
  for (int n = 0; n < 4; ++n)
    if (!p.bias.stride[n]) g.bias.ref.stride[n] = 0;
  for (Tensor* t : {&g.query, &g.key, &g.value, &g.bias}) std::fill(t->bytes.begin(), t->bytes.end(), '\0');
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads_q; ++h)
      for (int64_t i = 0; i < p.len_q; ++i) {
        const int64_t h_kv = h / (p.heads_q / p.heads_kv);
        const double lse = get(p.lse, b, h, i, 0);
        if (lse == -kInf) continue;
        const double delta = dot(p.grad_out, h, i, p.out, h, i, b, p.dim_v) - (p.grad_lse ? get(p.grad_lse, b, h, i, 0) : 0.0);
        for (int64_t j = 0; j < p.len_k; ++j) {
          if (!may_attend(p.mask, b, h, i, j)) continue;
          const double probability = std::exp(score(p, b, h, i, j) - lse), keeps = kept(p, b, h, i, j);
          const double ds = probability * (dot(p.grad_out, h, i, p.value, h_kv, j, b, p.dim_v) * keeps - delta);
          for (int64_t d = 0; d < p.dim_v; ++d) add(g.value.ref, b, h_kv, j, d, probability * keeps * get(p.grad_out, b, h, i, d));
          for (int64_t d = 0; d < p.dim_qk; ++d) {
            add(g.query.ref, b, h, i, d, p.scale * ds * get(p.key, b, h_kv, j, d));
            add(g.key.ref, b, h_kv, j, d, p.scale * ds * get(p.query, b, h, i, d));
          }
          add(g.bias.ref, b, h, i, j, ds);
        }
      }
  return g;
}

// `roundings` to the dtype on the way of a number: one of the result, and one more where the probabilities and the
// gradients of the scores are rounded before they are multiplied.
inline void compare_gradients(const AttentionBackwardParams& p, const Gradients& found, const Gradients& want, int roundings) {
  const DType dtype = p.query.dtype;
  const double accumulated = dtype == DType::kFloat64 ? 1e-12 : 1e-4;
  const double rounded = dtype == DType::kBFloat16 ? roundings * 5e-3 : dtype == DType::kFloat16 ? roundings * 8e-4 : accumulated;
  const int64_t query[] = {p.batch, p.heads_q, p.len_q, p.dim_qk}, key[] = {p.batch, p.heads_kv, p.len_k, p.dim_qk},
                value[] = {p.batch, p.heads_kv, p.len_k, p.dim_v}, bias[] = {p.batch, p.heads_q, p.len_q, p.len_k};
  compare(found.query.ref, want.query.ref, query, rounded);
  compare(found.key.ref, want.key.ref, key, rounded);
  compare(found.value.ref, want.value.ref, value, rounded);
  if (p.bias) compare(found.bias.ref, want.bias.ref, bias, accumulated);
}

inline void compare_bits(const Gradients& one, const Gradients& two) {
  CHECK(one.query.bytes == two.query.bytes);
  CHECK(one.key.bytes == two.key.bytes);
  CHECK(one.value.bytes == two.value.bytes);
  CHECK(one.bias.bytes == two.bias.bytes);
}

}  // namespace fastattn::test
