// The attention backward of every instruction level this CPU has, against the definition in double.
#include <vector>

#include "../cpu/kernels.h"
#include "backward_problem.h"
#include "levels.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

Gradients run(AttentionBackwardParams p, int threads, bool rows_first, bool with_grad_bias = true) {
  Gradients g = allocate_gradients(p, rows_first);
  if (!with_grad_bias) p.grad_bias = TensorRef();
  p.num_threads = threads;
  p.workspace_bytes = cpu::attention_backward_workspace(p);
  std::vector<char> workspace(p.workspace_bytes, '\xff');
  p.workspace = workspace.data();
  cpu::attention_backward(p);
  return g;
}

void check(const AttentionBackwardParams& p, bool rows_first) {
  const Gradients want = define(p);
  for (const int threads : {1, 3}) {
    const Gradients found = run(p, threads, rows_first);
    compare_gradients(p, found, want, 1);
    compare_bits(found, run(p, threads, rows_first));
    if (!p.bias) continue;
    // Without its gradient, which decides how keys padded at random are brought in.
    const Gradients others = run(p, threads, rows_first, false);
    AttentionBackwardParams without_bias = p;
    without_bias.bias = TensorRef();
    compare_gradients(without_bias, others, want, 1);
  }
}

void test_random_problems(int rounds, bool padded) {
  Random random(17);
  for (int round = 0; round < rounds; ++round) {
    RandomProblem problem(random, false, padded);
    const bool with_grad_lse = random.chance(0.5);
    const Saved saved = forward(problem.p, problem.rows_first, with_grad_lse, random);
    AttentionBackwardParams p;
    static_cast<AttentionParams&>(p) = problem.p;
    p.out = saved.out.ref;
    p.grad_out = saved.grad_out.ref;
    if (with_grad_lse) p.grad_lse = saved.grad_lse.ref;
    check(p, problem.rows_first);
  }
}

void test_empty_problems() {
  Random random(18);
  for (const int empty : {0, 1, 2}) {
    AttentionBackwardParams p;
    p.batch = empty == 0 ? 0 : 2;
    p.heads_q = p.heads_kv = 2;
    p.len_q = empty == 1 ? 0 : 50;
    p.len_k = empty == 2 ? 0 : 70;
    p.dim_qk = p.dim_v = 8;
    Tensor query = make_tensor(DType::kFloat32, p.batch, 2, p.len_q, 8, false, 0), key = make_tensor(DType::kFloat32, p.batch, 2, p.len_k, 8, false, 0);
    p.query = query.ref;
    p.key = p.value = key.ref;
    const Saved saved = forward(p, false, false, random);
    p.out = saved.out.ref;
    p.grad_out = saved.grad_out.ref;
    check(p, false);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_every_level(argc, argv, "attention backward", [] {
    test_random_problems(80, false);
    test_random_problems(40, true);
    test_empty_problems();
  });
}
