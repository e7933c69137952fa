// The masked loss by its definition in double, and the comparison of a kernel with it.
#pragma once

#include <algorithm>
#include <vector>

#include "problem.h"

namespace fastattn::test {

// A tensor [size] whose memory runs through the dimensions in the order given, from the outermost, `step` elements apart.
inline Tensor make_strided(DType dtype, const int64_t size[4], const int order[4], int64_t step) {
  Tensor t;
  t.ref.dtype = dtype;
  int64_t elements = 1;
  for (int n = 3; n >= 0; --n) {
    t.ref.stride[order[n]] = elements * step;
    elements *= size[order[n]];
  }
  t.bytes.assign(elements ? ((elements - 1) * step + 1) * size_of(dtype) : 0, '\xff');
  t.ref.ptr = t.bytes.data();
  return t;
}

struct Definition {
  const MaskedLossParams& p;

  bool counts(const int64_t at[4]) const {
    if (p.patch_size) {
      const int64_t* stride = p.mask_stride;
      return p.mask[at[0] * stride[0] + at[2] / p.patch_size * stride[1] + at[3] / p.patch_size * stride[2]];
    }
    int64_t offset = 0;
    for (int d = 0; d < 4; ++d) offset += at[d] * p.mask_stride[d];
    return p.mask[offset];
  }

  double target(const int64_t at[4]) const {
    const double x = get(p.target, at[0], at[1], at[2], at[3]);
    if (!p.normalize_target) return x;
    std::vector<double> group;
    const int64_t edge = p.patch_size, y0 = edge ? at[2] / edge * edge : 0, x0 = edge ? at[3] / edge * edge : 0;
    if (edge) {
      for (int64_t c = 0; c < p.size[1]; ++c)
        for (int64_t y = y0; y < y0 + edge; ++y)
          for (int64_t column = x0; column < x0 + edge; ++column) group.push_back(get(p.target, at[0], c, y, column));
    } else {
      for (int64_t d = 0; d < p.size[3]; ++d) group.push_back(get(p.target, at[0], at[1], at[2], d));
    }
    double mean = 0.0, squares = 0.0;
    for (const double g : group) mean += g / static_cast<double>(group.size());
    for (const double g : group) squares += (g - mean) * (g - mean);
    return (x - mean) / std::sqrt(squares / static_cast<double>(group.size() - 1) + p.normalize_eps);
  }

  double value(double d) const {
    if (p.kind == LossKind::kL2) return d * d;
    const double size = std::fabs(d);
    if (p.kind == LossKind::kL1) return size;
    return size < p.beta ? 0.5 * d * d / p.beta : size - 0.5 * p.beta;
  }
  double slope(double d) const {
    const double sign = d > 0 ? 1.0 : d < 0 ? -1.0 : 0.0;
    if (p.kind == LossKind::kL2) return 2 * d;
    return p.kind == LossKind::kSmoothL1 && std::fabs(d) < p.beta ? d / p.beta : sign;
  }
};

// Loss and gradient of one problem; `order` and `step` as in make_strided, for what is written. run(p, threads) computes it,
// with as many threads as that where the kernel has threads.
template <typename Run>
void check_loss(MaskedLossParams p, const int order[4], int64_t step, Random& random, const Run& run) {
  const DType dtype = p.input.dtype;
  const double tolerance = dtype == DType::kFloat64    ? 1e-12
                           : dtype == DType::kFloat32  ? 3e-6
                           : dtype == DType::kBFloat16 ? 5e-3
                                                       : 1e-3;
  const Definition definition{p};
  const int64_t ones[] = {1, 1, 1, 1}, elements = p.size[0] * p.size[1] * p.size[2] * p.size[3];
  const int in_order[] = {0, 1, 2, 3};
  Tensor values = make_strided(DType::kFloat64, p.size, in_order, 1), slopes = make_strided(DType::kFloat64, p.size, in_order, 1);
  Tensor upstream = make_strided(dtype, p.size, order, step);
  double sum = 0.0, count = 0.0;
  std::vector<uint8_t> counted(elements);
  for (int64_t n = 0; n < elements; ++n) {
    const int64_t at[] = {n / (p.size[3] * p.size[2] * p.size[1]), n / (p.size[3] * p.size[2]) % p.size[1],
                          n / p.size[3] % p.size[2], n % p.size[3]};
    counted[n] = definition.counts(at);
    const double d = counted[n] ? get(p.input, at[0], at[1], at[2], at[3]) - definition.target(at) : 0.0;
    put(values.ref, at[0], at[1], at[2], at[3], counted[n] ? definition.value(d) : 0.0);
    put(slopes.ref, at[0], at[1], at[2], at[3], counted[n] ? definition.slope(d) : 0.0);
    put(upstream.ref, at[0], at[1], at[2], at[3], counted[n] ? small_number(random) : kNan);
    sum += counted[n] ? definition.value(d) : 0.0;
    count += counted[n];
  }

  if (p.reduction == Reduction::kNone) {
    Tensor loss = make_strided(dtype, p.size, order, step);
    p.loss = loss.ref;
    run(p, 2);
    compare(loss.ref, values.ref, p.size, tolerance);
    Tensor gradient = make_strided(dtype, p.size, order, step);
    p.loss = TensorRef{};
    p.grad_input = gradient.ref;
    p.grad_loss = upstream.ref;
    run(p, 2);
    Tensor want = make_strided(DType::kFloat64, p.size, in_order, 1);
    for (int64_t n = 0; n < elements; ++n) {
      const int64_t i = n / p.size[3] % p.size[2], h = n / (p.size[3] * p.size[2]) % p.size[1],
                    b = n / (p.size[3] * p.size[2] * p.size[1]), d = n % p.size[3];
      put(want.ref, b, h, i, d, counted[n] ? get(slopes.ref, b, h, i, d) * get(upstream.ref, b, h, i, d) : 0.0);
    }
    compare(gradient.ref, want.ref, p.size, tolerance);
    return;
  }

  const double scale = p.reduction == Reduction::kMaskedMean ? 1.0 / std::fmax(1.0, count)
                       : p.reduction == Reduction::kMean     ? 1.0 / std::fmax(1.0, static_cast<double>(elements))
                                                             : 1.0;
  std::vector<char> first_loss, first_gradient;
  for (const bool with_gradient : {true, true, false}) {
    const int threads = first_loss.empty() ? 1 : 3;
    Tensor loss = make_strided(dtype, ones, order, 1), gradient = make_strided(dtype, p.size, order, step);
    p.loss = loss.ref;
    p.grad_input = with_gradient ? gradient.ref : TensorRef{};
    run(p, threads);
    // float16 may overflow: infinity, as torch has it
    const double want = dtype == DType::kFloat16 && sum * scale > 65504.0 ? kInf : sum * scale;
    CHECK(get(loss.ref, 0, 0, 0, 0) == want || std::fabs(get(loss.ref, 0, 0, 0, 0) - want) <= tolerance * std::fmax(want, 1e-3));
    if (first_loss.empty()) first_loss = loss.bytes, first_gradient = gradient.bytes;
    CHECK(loss.bytes == first_loss);  // in whatever order the work is done, with and without a gradient
    if (!with_gradient) continue;
    CHECK(gradient.bytes == first_gradient);
    for (int64_t n = 0; n < elements; ++n) {
      const int64_t i = n / p.size[3] % p.size[2], h = n / (p.size[3] * p.size[2]) % p.size[1],
                    b = n / (p.size[3] * p.size[2] * p.size[1]), d = n % p.size[3];
      const double wanted = get(slopes.ref, b, h, i, d) * scale, smallest = dtype == DType::kFloat16 ? 6e-8 : 1e-30;
      CHECK(std::fabs(get(gradient.ref, b, h, i, d) - wanted) <= tolerance * std::fabs(wanted) + tolerance * scale + smallest);
    }
  }
}

}  // namespace fastattn::test
