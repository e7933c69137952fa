// The portable CUDA attention backward in the emulator, against the definition in double.
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
void check(const AttentionBackwardParams& p, bool rows_first, uint64_t schedule) {
  const Gradients found = run(p, rows_first, schedule);
  compare_gradients(p, found, define(p));
  compare_bits(found, run(p, rows_first, schedule + 1));
}

void test_random_problems(int rounds) {
  Random random(23);
  for (int round = 0; round < rounds; ++round) {
    RandomProblem problem(random);
    if (problem.dtype == DType::kFloat64) continue;
    const bool with_grad_lse = random.chance(0.5);
    const Saved saved = forward(problem.p, problem.rows_first, with_grad_lse, random);
    AttentionBackwardParams p;
    static_cast<AttentionParams&>(p) = problem.p;
    p.out = saved.out.ref;
    p.grad_out = saved.grad_out.ref;
    if (with_grad_lse) p.grad_lse = saved.grad_lse.ref;
    const int before = failures;
    check(p, problem.rows_first, 2 * round);
    if (failures != before)
      std::fprintf(stderr, "    round %d: dtype %d, B %d, heads %d / %d, L %d, S %d, D %d, Dv %d, bias %d, dropout %g\n", round,
                   static_cast<int>(problem.dtype), static_cast<int>(p.batch), static_cast<int>(p.heads_q),
                   static_cast<int>(p.heads_kv), static_cast<int>(p.len_q), static_cast<int>(p.len_k), static_cast<int>(p.dim_qk),
                   static_cast<int>(p.dim_v), p.bias ? 1 : 0, p.dropout.p);
  }
}

}  // namespace

int main(int argc, char** argv) {
  test_random_problems(argc > 1 ? std::atoi(argv[1]) : 24);
  return result("cuda attention backward");
}
