// The masked loss and its gradient of the CUDA kernels, in the emulator, against the definition in double.
#include <algorithm>
#include <vector>

#include "../cuda/kernels.h"
#include "../cuda/platform.h"
#include "loss_problem.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

void run(MaskedLossParams& p, uint64_t seed) {
  cuda::emulator::set_seed(seed);
  p.workspace_bytes = cuda::masked_loss_workspace(p);
  std::vector<char> workspace(p.workspace_bytes, '\xff');
  p.workspace = workspace.data();
  cuda::masked_loss(p);
}

void check(const MaskedLossParams& p, const int order[4], int64_t step, Random& random) {
  check_loss(p, order, step, random, [&](MaskedLossParams& problem, int) { run(problem, random.bits()); });
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
