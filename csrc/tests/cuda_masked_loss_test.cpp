// The masked loss and its gradient of the CUDA kernels, in the emulator, against the definition in double.
#include <algorithm>
#include <vector>

#include "../cuda/kernels.h"
#include "../cuda/platform.h"
#include "problem.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

// A tensor [size] whose memory runs through the dimensions in the order given, from the outermost, `step` elements apart.
Tensor make_strided(DType dtype, const int64_t size[4], const int order[4], int64_t step) {
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

void run(MaskedLossParams& p, uint64_t seed) {
  cuda::emulator::set_seed(seed);
  p.workspace_bytes = cuda::masked_loss_workspace(p);
  std::vector<char> workspace(p.workspace_bytes, '\xff');
  p.workspace = workspace.data();
  cuda::masked_loss(p);
}

// Loss and gradient of one problem; `order` and `step` as in make_strided, for what is written.
void check(MaskedLossParams p, const int order[4], int64_t step, Random& random) {
  const DType dtype = p.input.dtype;
  const double tolerance = dtype == DType::kFloat32 ? 3e-6 : dtype == DType::kBFloat16 ? 5e-3 : 1e-3;
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
    run(p, random.bits());
    compare(loss.ref, values.ref, p.size, tolerance);
    Tensor gradient = make_strided(dtype, p.size, order, step);
    p.loss = TensorRef{};
    p.grad_input = gradient.ref;
    p.grad_loss = upstream.ref;
    run(p, random.bits());
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
    Tensor loss = make_strided(dtype, ones, order, 1), gradient = make_strided(dtype, p.size, order, step);
    p.loss = loss.ref;
    p.grad_input = with_gradient ? gradient.ref : TensorRef{};
    run(p, random.bits());
    // float16 may overflow: infinity, as torch has it
    const double want = dtype == DType::kFloat16 && sum * scale > 65504.0 ? kInf : sum * scale;
    CHECK(get(loss.ref, 0, 0, 0, 0) == want || std::fabs(get(loss.ref, 0, 0, 0, 0) - want) <= tolerance * std::fmax(want, 1e-3));
    if (first_loss.empty()) first_loss = loss.bytes, first_gradient = gradient.bytes;
    CHECK(loss.bytes == first_loss);  // in whatever order the blocks run, with and without a gradient
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

void test_random_losses() {
  Random random(41);
  const int64_t sizes[] = {1, 2, 3, 5, 17, 64, 70}, patches[] = {1, 3, 4, 16, 20};
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (int round = 0; round < 200; ++round) {
    MaskedLossParams p;
    p.kind = static_cast<LossKind>(random.integer(0, 2));
    p.reduction = static_cast<Reduction>(random.integer(0, 3));
    p.beta = random.chance(0.5) ? 1.0 : 0.25;
    p.patch_size = random.chance(0.5) ? patches[random.integer(0, 4)] : 0;
    p.normalize_target = random.chance(0.3);
    int64_t mask_size[4];
    if (p.patch_size) {
      p.size[0] = random.integer(1, 3);
      p.size[1] = random.integer(1, 3);
      p.size[2] = p.patch_size * random.integer(1, 4);
      p.size[3] = p.patch_size * (p.patch_size == 1 ? 8 : random.integer(1, 4));
      mask_size[0] = random.chance(0.8) ? p.size[0] : 1;
      mask_size[1] = p.size[2] / p.patch_size;
      mask_size[2] = p.size[3] / p.patch_size;
      mask_size[3] = 1;
      if (p.size[1] * p.patch_size * p.patch_size < 2) p.normalize_target = false;
    } else {
      for (int d = 0; d < 4; ++d) p.size[d] = sizes[random.integer(0, d == 3 ? 6 : 3)];
      if (round % 25 == 0) {  // a line longer than what a block takes
        p.size[3] = 40000;
        p.normalize_target = false;
      }
      if (p.size[3] < 2) p.normalize_target = false;
      for (int d = 0; d < 4; ++d) mask_size[d] = random.chance(0.6) ? p.size[d] : 1;
      if (p.normalize_target) mask_size[3] = 1;
      if (p.size[3] == 40000) p.size[0] = p.size[1] = p.size[2] = mask_size[0] = mask_size[1] = mask_size[2] = 1;
    }
    int64_t cells = 1;
    int mask_order[] = {0, 1, 2, 3};
    if (random.chance(0.3)) std::swap(mask_order[random.integer(0, 3)], mask_order[random.integer(0, 3)]);
    for (int n = 3; n >= 0; --n) {
      const int d = mask_order[n];
      p.mask_stride[d] = mask_size[d] > 1 ? cells : 0;
      cells *= mask_size[d];
    }
    std::vector<uint8_t> mask(cells);
    const double density = random.chance(0.2) ? 1.0 : random.chance(0.1) ? 0.0 : 0.6;
    for (uint8_t& x : mask) x = random.chance(density);
    p.mask = mask.data();

    const DType dtype = dtypes[random.integer(0, 2)];
    int order[] = {0, 1, 2, 3};
    if (random.chance(0.2)) std::swap(order[1], order[3]);
    else if (random.chance(0.3)) order[1] = 2, order[2] = 3, order[3] = 1;  // channels last
    const int64_t step = random.chance(0.2) ? 2 : 1;
    Tensor input = make_strided(dtype, p.size, order, step), target = make_strided(dtype, p.size, order, random.chance(0.8) ? step : 3);
    p.input = input.ref;
    p.target = target.ref;
    const Definition definition{p};
    for (int64_t n = 0; n < p.size[0] * p.size[1] * p.size[2] * p.size[3]; ++n) {
      const int64_t at[] = {n / (p.size[3] * p.size[2] * p.size[1]), n / (p.size[3] * p.size[2]) % p.size[1],
                            n / p.size[3] % p.size[2], n % p.size[3]};
      // What does not count may be anything.
      const bool counts = definition.counts(at);
      put(p.input, at[0], at[1], at[2], at[3], counts ? small_number(random) : kNan);
      put(p.target, at[0], at[1], at[2], at[3], counts ? small_number(random) : random.chance(0.5) ? kNan : kInf);
    }
    check(p, order, step, random);
  }
}

void test_empty_losses() {
  Random random(42);
  for (int empty = 0; empty < 4; ++empty)
    for (const Reduction reduction : {Reduction::kMaskedMean, Reduction::kSum, Reduction::kMean, Reduction::kNone}) {
      MaskedLossParams p;
      p.reduction = reduction;
      for (int d = 0; d < 4; ++d) p.size[d] = d == empty ? 0 : 8;
      const uint8_t yes = 1;
      p.mask = &yes;
      const int order[] = {0, 1, 2, 3};
      Tensor input = make_strided(DType::kFloat32, p.size, order, 1);
      p.input = p.target = input.ref;
      check(p, order, 1, random);
      p.patch_size = 4;
      check(p, order, 1, random);
    }
}

}  // namespace

int main() {
  test_random_losses();
  test_empty_losses();
  return result("cuda masked loss");
}
