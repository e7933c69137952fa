// The linear head with its masked loss and every gradient, at every instruction level this CPU has, against the definition in
// double.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../cpu/kernels.h"
#include "levels.h"
#include "problem.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

// Numbers of a dtype, read and written through their own type.
struct Numbers {
  DType dtype;
  std::vector<char> bytes;

  Numbers(DType type, int64_t count) : dtype(type), bytes(count * size_of(type), '\xff') {}
  TensorRef ref(int64_t s0, int64_t s1, int64_t s2, int64_t s3 = 0) {
    TensorRef r;
    r.ptr = bytes.data();
    r.dtype = dtype;
    const int64_t strides[] = {s0, s1, s2, s3};
    std::copy(strides, strides + 4, r.stride);
    return r;
  }
  void fill(Random& random, double scale) {
    for (size_t n = 0; n < bytes.size() / size_of(dtype); ++n) put(ref(0, 0, 1), 0, 0, static_cast<int64_t>(n), 0, scale * random.normal());
  }
};

void check(const char* what, const TensorRef& seen, const std::vector<double>& expected, const std::vector<double>& size,
           double unit) {
  for (size_t n = 0; n < expected.size(); ++n) {
    const double error = std::fabs(get(seen, 0, 0, static_cast<int64_t>(n), 0) - expected[n]);
    if (!CHECK(error <= unit * (std::fabs(expected[n]) + size[n]) + 1e-300)) {
      std::fprintf(stderr, "%s[%zu]: error %g of %g\n", what, n, error, expected[n]);
      return;
    }
  }
}

void test_problem(Random& random, DType dtype, int64_t B, int64_t rows, int64_t columns, int64_t E, int64_t channels,
                  int64_t side, bool with_bias, LossKind kind, Reduction reduction, bool normalize) {
  const int64_t N = rows * columns, P = side ? channels * side * side : channels;
  Numbers hidden(dtype, B * N * E), weight(dtype, P * E), bias(dtype, P), target(dtype, B * N * P);
  hidden.fill(random, 1.0);
  weight.fill(random, 0.3);
  bias.fill(random, 1.0);
  target.fill(random, 2.0);
  std::vector<uint8_t> mask(B * N);
  for (uint8_t& m : mask) m = random.chance(0.6);
  const DType accumulation = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Numbers loss(accumulation, 1), grad_hidden(dtype, B * N * E), grad_weight(accumulation, P * E), grad_bias(accumulation, P),
      grad_target(dtype, B * N * P);
  LinearMaskedLossParams p;
  p.kind = kind;
  p.reduction = reduction;
  p.batch = B;
  p.grid_height = rows;
  p.grid_width = columns;
  p.dim_in = E;
  p.dim_out = P;
  p.patch_size = side;
  p.hidden = hidden.ref(N * E, E, 1);
  p.weight = weight.ref(E, 1, 0);
  if (with_bias) p.bias = bias.ref(1, 0, 0);
  const int64_t height = rows * side, width = columns * side;
  const auto layout = [&](Numbers& x) {
    return side ? x.ref(channels * height * width, height * width, width, 1) : x.ref(N * P, P, 1);
  };
  p.target = layout(target);
  p.mask = mask.data();
  p.mask_stride[0] = N;
  p.mask_stride[1] = columns;
  p.mask_stride[2] = 1;
  p.normalize_target = normalize;
  p.loss = loss.ref(0, 0, 1);
  p.grad_hidden = grad_hidden.ref(N * E, E, 1);
  p.grad_weight = grad_weight.ref(E, 1, 0);
  p.grad_bias = grad_bias.ref(1, 0, 0);
  p.grad_target = layout(grad_target);

  const auto pixel = [&](int64_t b, int64_t n, int64_t f) {  // where a feature lies in the target
    if (!side) return (b * N + n) * P + f;
    const int64_t c = f / (side * side), y = n / columns * side + f / side % side, x = n % columns * side + f % side;
    return ((b * channels + c) * height + y) * width + x;
  };
  const auto at = [](Numbers& x, int64_t n) { return get(x.ref(0, 0, 1), 0, 0, n, 0); };
  std::vector<double> gh(B * N * E), gw(P * E), gb(P), gt(B * N * P), sh(gh), sw(gw), sb(gb), st(gt);
  double total = 0, counted = 0;
  for (const uint8_t m : mask) counted += m;
  const double scale = reduction == Reduction::kSum    ? 1.0
                       : reduction == Reduction::kMean ? 1.0 / static_cast<double>(B * N * P)
                                                       : 1.0 / std::max(1.0, counted * static_cast<double>(P));
  for (int64_t t = 0; t < B * N; ++t) {
    if (!mask[t]) continue;
    const int64_t b = t / N, n = t % N;
    double mean = 0, squares = 0;
    for (int64_t f = 0; f < P; ++f) mean += at(target, pixel(b, n, f)) / static_cast<double>(P);
    for (int64_t f = 0; f < P; ++f) squares += std::pow(at(target, pixel(b, n, f)) - mean, 2);
    const double deviation = std::sqrt(squares / static_cast<double>(P - 1) + p.normalize_eps);
    for (int64_t f = 0; f < P; ++f) {
      double d = with_bias ? at(bias, f) : 0.0, added = 1.0;
      for (int64_t e = 0; e < E; ++e) {
        const double product = at(hidden, t * E + e) * at(weight, f * E + e);
        d += product;
        added += std::fabs(product);
      }
      const double goal = at(target, pixel(b, n, f));
      d -= normalize ? (goal - mean) / deviation : goal;
      added += std::fabs(goal) * (normalize ? 3 / deviation : 1);
      const double size = std::fabs(d), sign = d > 0 ? 1.0 : d < 0 ? -1.0 : 0.0;
      total += kind == LossKind::kL2 ? d * d : kind == LossKind::kL1 ? size : size < p.beta ? d * d / 2 : size - 0.5;
      const double slope = scale * (kind == LossKind::kL2 ? 2 * d : kind == LossKind::kL1 || size >= p.beta ? sign : d);
      // How far rounding may move the slope, in units of the last place: the sign of what is nearly 0 is anybody's guess.
      const double off = kind != LossKind::kL1 ? 2 * scale * added : size < 1e-4 ? 1e9 * scale : 0.0;
      gt[pixel(b, n, f)] = -slope;
      st[pixel(b, n, f)] = off;
      gb[f] += slope;
      sb[f] += std::fabs(slope) + off;
      for (int64_t e = 0; e < E; ++e) {
        const double x = at(hidden, t * E + e), w = at(weight, f * E + e);
        gw[f * E + e] += slope * x;
        sw[f * E + e] += (std::fabs(slope) + off) * std::fabs(x);
        gh[t * E + e] += slope * w;
        sh[t * E + e] += (std::fabs(slope) + off) * std::fabs(w);
      }
    }
  }
  const double unit = dtype == DType::kFloat64 ? 4e-16 : 4e-7;
  // Where pairs of bfloat16 numbers are multiplied, the slopes are rounded for it.
  const bool pairs = dtype == DType::kBFloat16 && std::string(cpu::level_name()) == "avx512bf16";
  const double stored = dtype == DType::kBFloat16 ? 4e-3 : dtype == DType::kFloat16 ? 1e-3 : unit;
  std::vector<char> first;
  for (const int threads : {1, 3}) {
    for (Numbers* x : {&loss, &grad_hidden, &grad_weight, &grad_bias, &grad_target})
      std::fill(x->bytes.begin(), x->bytes.end(), '\xff');
    p.num_threads = threads;
    p.workspace_bytes = cpu::linear_masked_loss_workspace(p);
    std::vector<char> workspace(p.workspace_bytes, '\xff');
    p.workspace = workspace.data();
    cpu::linear_masked_loss(p);
    std::vector<char> all;
    for (Numbers* x : {&loss, &grad_hidden, &grad_weight, &grad_bias, &grad_target})
      all.insert(all.end(), x->bytes.begin(), x->bytes.end());
    if (first.empty()) first = all;
    CHECK(all == first);  // bitwise, whatever the number of threads
  }
  check("loss", loss.ref(0, 0, 1), {total * scale}, {total * scale * static_cast<double>(E + 8)}, unit);
  check("grad_hidden", grad_hidden.ref(0, 0, 1), gh, sh, stored);
  check("grad_weight", grad_weight.ref(0, 0, 1), gw, sw, pairs ? stored : unit);
  check("grad_bias", grad_bias.ref(0, 0, 1), gb, sb, unit);
  check("grad_target", grad_target.ref(0, 0, 1), gt, st, stored);
}

void tests() {
  Random random(17);
  const int64_t sizes[] = {1, 3, 16, 17, 49, 97, 130};
  const DType dtypes[] = {DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  for (int round = 0; round < 60; ++round) {
    const bool images = random.chance(0.4);
    const int64_t side = images ? random.integer(1, 7) : 0, channels = images ? random.integer(1, 3) : sizes[random.integer(0, 6)];
    const int64_t P = images ? channels * side * side : channels;
    test_problem(random, dtypes[random.integer(0, 4)], random.integer(1, 3), images ? random.integer(1, 4) : 1,
                 random.integer(1, 40), sizes[random.integer(0, 6)], channels, side, random.chance(0.7),
                 static_cast<LossKind>(random.integer(0, 2)), static_cast<Reduction>(random.integer(0, 2)),
                 P > 1 && random.chance(0.3));
  }
  // Two blocks of tokens, three chunks of features, several blocks of columns
  test_problem(random, DType::kFloat32, 2, 1, 300, 100, 200, 0, true, LossKind::kL2, Reduction::kMaskedMean, false);
}

}  // namespace

int main(int argc, char** argv) { return run_every_level(argc, argv, "linear_masked_loss_test", tests); }
