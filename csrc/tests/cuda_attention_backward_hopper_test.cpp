// The Hopper attention backward in the emulator, against the definition in double.
// Kernels: attention_backward_delta attention_backward_hopper attention_backward_hopper_dkv attention_backward_hopper_dq attention_backward_hopper_short
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../core/mask.h"
#include "../cuda/kernels.h"
#include "../cuda/platform.h"
#include "problem.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

int64_t round_up_to_8(int64_t n) { return (n + 7) / 8 * 8; }

struct Shape {
  int64_t batch, heads_kv, group, len_q, len_k, dim_qk, dim_v;
};

// [B, H, rows, dim] in double: the definition reads every element many times.
std::vector<double> doubles(const TensorRef& t, int64_t b, int64_t h, int64_t rows, int64_t dim) {
  std::vector<double> x;
  x.reserve(b * h * rows * dim);
  for (int64_t n = 0; n < b * h * rows; ++n)
    for (int64_t d = 0; d < dim; ++d) x.push_back(get(t, n / (h * rows), n / rows % h, n % rows, d));
  return x;
}

double inner(const double* x, const double* y, int64_t n) {
  double sum = 0.0;
  for (int64_t d = 0; d < n; ++d) sum += x[d] * y[d];
  return sum;
}

struct Gradients {
  Tensor query, key, value;
};

// A problem that TMA can read, and the memory it points to.
class Problem {
 public:
  AttentionBackwardParams p;
  Random random;

  Problem(const Problem&) = delete;

  Problem(DType dtype, Shape shape, uint64_t seed) : random(seed), dtype_(dtype), rows_first_(random.chance(0.5)) {
    p.batch = shape.batch;
    p.heads_kv = shape.heads_kv;
    p.heads_q = shape.heads_kv * shape.group;
    p.len_q = shape.len_q;
    p.len_k = shape.len_k;
    p.dim_qk = shape.dim_qk;
    p.dim_v = shape.dim_v;
    p.scale = 1.0 / std::sqrt(static_cast<double>(p.dim_qk));
    pad_ = random.chance(0.3) ? 16 : 0;
    query_ = input(p.heads_q, p.len_q, p.dim_qk);
    key_ = input(p.heads_kv, p.len_k, p.dim_qk);
    value_ = input(p.heads_kv, p.len_k, p.dim_v);
    grad_out_ = input(p.heads_q, p.len_q, p.dim_v);
    p.query = query_.ref;
    p.key = key_.ref;
    p.value = value_.ref;
    p.grad_out = grad_out_.ref;
  }

  void set_prefix() {
    for (int64_t b = 0; b < p.batch; ++b) prefix_.push_back(random.integer(-1, p.len_k + 1));
    p.mask.prefix_lengths = prefix_.data();
    p.mask.stride_prefix_b = 1;
  }

  void set_key_lengths() {
    for (int64_t b = 0; b < p.batch; ++b) key_lengths_.push_back(random.integer(-1, p.len_k + 1));
    p.mask.key_lengths = key_lengths_.data();
    p.mask.stride_key_lengths_b = 1;
  }

  void set_keep() {
    for (int64_t n = 0; n < p.batch * p.len_k; ++n) keep_.push_back(n / 32 % 5 != 1 && random.chance(0.9));
    p.mask.key_keep = keep_.data();
    p.mask.stride_keep_b = p.len_k;
    p.mask.stride_keep_j = 1;
  }

  void set_segments(int64_t length) {
    for (int64_t n = 0; n < p.batch * p.len_q; ++n) query_ids_.push_back(n % p.len_q / length);
    for (int64_t n = 0; n < p.batch * p.len_k; ++n) key_ids_.push_back(n % p.len_k / length);
    p.mask.query_segments = query_ids_.data();
    p.mask.key_segments = key_ids_.data();
    p.mask.stride_qseg_b = p.len_q;
    p.mask.stride_kseg_b = p.len_k;
    p.mask.stride_qseg_i = p.mask.stride_kseg_j = 1;
  }

  // One mask for each query head. Tiles of 64 x 64 that are empty, full or in between; with their maps or without.
  void set_dense(bool with_map) {
    const int64_t words = ceil_div(p.len_k, 64), rows = ceil_div(p.len_q, 64), map_words = ceil_div(words, 64);
    bits_.assign(p.heads_q * p.len_q * words, 0);
    live_.assign(p.heads_q * rows * map_words, 0);
    full_ = live_;
    for (int64_t n = 0; n < p.heads_q * rows * words; ++n) {
      const int64_t h = n / (rows * words), t = n / words % rows, w = n % words;
      const double kind = random.uniform(), density = kind < 0.3 ? 0.0 : kind < 0.6 ? 1.0 : random.uniform();
      const uint64_t exist = bits_before(p.len_k, w * 64);
      uint64_t any = 0, all = ~uint64_t{0};
      for (int64_t i = t * 64; i < min64(p.len_q, t * 64 + 64); ++i) {
        uint64_t word = 0;
        for (int64_t j = 0; j < 64; ++j) word |= uint64_t{random.chance(density)} << j;
        word &= exist;
        bits_[(h * p.len_q + i) * words + w] = word;
        any |= word;
        all &= word;
      }
      live_[(h * rows + t) * map_words + w / 64] |= uint64_t{any != 0} << (w % 64);
      full_[(h * rows + t) * map_words + w / 64] |= uint64_t{all == exist} << (w % 64);
    }
    p.mask.bits = bits_.data();
    p.mask.stride_bits_h = p.len_q * words;
    p.mask.words_per_row = words;
    if (!with_map) return;
    p.mask.live = live_.data();
    p.mask.full = full_.data();
    p.mask.stride_map_h = rows * map_words;
    p.mask.map_words_per_row = map_words;
    p.mask.block_m = p.mask.block_n = 64;
  }

  // The backward twice, under schedules that differ, against the definition.
  void check(bool with_grad_lse = false) {
    poison_keys();
    forward(with_grad_lse);
    const Gradients one = run(2 * p.len_q), two = run(2 * p.len_k + 1);
    CHECK(one.query.bytes == two.query.bytes);
    CHECK(one.key.bytes == two.key.bytes);
    CHECK(one.value.bytes == two.value.bytes);
    compare_with_definition(one);
  }

 private:
  DType dtype_;
  bool rows_first_;
  int64_t pad_;
  Tensor query_, key_, value_, out_, grad_out_, lse_, grad_lse_;
  std::vector<int64_t> key_lengths_, prefix_, query_ids_, key_ids_;
  std::vector<uint8_t> keep_;
  std::vector<uint64_t> bits_, live_, full_;
  std::vector<double> probabilities_;  // [B, Hq, L, S]

  Tensor input(int64_t heads, int64_t rows, int64_t dim) {
    Tensor t = make_tensor(dtype_, p.batch, heads, rows, dim, rows_first_, round_up_to_8(dim) - dim + pad_);
    randomize(t, p.batch, heads, rows, dim, random);
    return t;
  }

  // Keys and values that no query may attend to are NaN or Inf.
  void poison_keys() {
    const int64_t group = p.heads_q / p.heads_kv;
    for (int64_t n = 0; n < p.batch * p.heads_kv * p.len_k; ++n) {
      const int64_t b = n / (p.heads_kv * p.len_k), h = n / p.len_k % p.heads_kv, j = n % p.len_k;
      bool attended = false;
      for (int64_t x = 0; x < group * p.len_q && !attended; ++x)
        attended = may_attend(p.mask, b, h * group + x / p.len_q, x % p.len_q, j);
      if (attended) continue;
      for (int64_t d = 0; d < p.dim_qk; ++d) put(p.key, b, h, j, d, random.chance(0.5) ? kNan : kInf);
      for (int64_t d = 0; d < p.dim_v; ++d) put(p.value, b, h, j, d, random.chance(0.5) ? kNan : -kInf);
    }
  }

  // out, lse and the probabilities of the definition; a row without keys is NaN wherever it is read.
  void forward(bool with_grad_lse) {
    out_ = make_tensor(dtype_, p.batch, p.heads_q, p.len_q, p.dim_v, !rows_first_, random.chance(0.5) ? 3 : 0);
    lse_ = make_tensor(DType::kFloat32, p.batch, p.heads_q, p.len_q, 1, false, 0);
    grad_lse_ = make_tensor(DType::kFloat32, p.batch, p.heads_q, p.len_q, 1, true, 0);
    p.out = out_.ref;
    p.lse = lse_.ref;
    if (with_grad_lse) p.grad_lse = grad_lse_.ref;
    const std::vector<double> query = doubles(p.query, p.batch, p.heads_q, p.len_q, p.dim_qk),
                              key = doubles(p.key, p.batch, p.heads_kv, p.len_k, p.dim_qk),
                              value = doubles(p.value, p.batch, p.heads_kv, p.len_k, p.dim_v);
    probabilities_.assign(p.batch * p.heads_q * p.len_q * p.len_k, 0.0);
    std::vector<double> out(p.dim_v);
    for (int64_t n = 0; n < p.batch * p.heads_q * p.len_q; ++n) {
      const int64_t b = n / (p.heads_q * p.len_q), h = n / p.len_q % p.heads_q, i = n % p.len_q;
      const int64_t keys = (b * p.heads_kv + h / (p.heads_q / p.heads_kv)) * p.len_k;
      double* const x = &probabilities_[n * p.len_k];
      double top = -kInf, sum = 0.0;
      for (int64_t j = 0; j < p.len_k; ++j) {
        x[j] = may_attend(p.mask, b, h, i, j)
                   ? p.scale * inner(&query[n * p.dim_qk], &key[(keys + j) * p.dim_qk], p.dim_qk)
                   : -kInf;
        top = std::fmax(top, x[j]);
      }
      out.assign(p.dim_v, 0.0);
      for (int64_t j = 0; j < p.len_k; ++j) {
        x[j] = x[j] == -kInf ? 0.0 : std::exp(x[j] - top);
        sum += x[j];
      }
      for (int64_t j = 0; j < p.len_k; ++j) {
        if (x[j] == 0.0) continue;
        x[j] /= sum;
        for (int64_t d = 0; d < p.dim_v; ++d) out[d] += x[j] * value[(keys + j) * p.dim_v + d];
      }
      const bool live = sum > 0.0;
      put(p.lse, b, h, i, 0, live ? top + std::log(sum) : -kInf);
      put(grad_lse_.ref, b, h, i, 0, live ? small_number(random) : kNan);
      for (int64_t d = 0; d < p.dim_v; ++d) put(p.out, b, h, i, d, live ? out[d] : kNan);
      if (live) continue;
      put(p.query, b, h, i, p.dim_qk / 2, kNan);
      put(p.grad_out, b, h, i, p.dim_v / 2, kNan);
    }
  }

  Gradients run(uint64_t seed) {
    Gradients g;
    g.query = make_tensor(dtype_, p.batch, p.heads_q, p.len_q, p.dim_qk, rows_first_, p.dim_qk % 2);
    g.key = make_tensor(dtype_, p.batch, p.heads_kv, p.len_k, p.dim_qk, !rows_first_, p.dim_qk % 2 + 2);
    g.value = make_tensor(dtype_, p.batch, p.heads_kv, p.len_k, p.dim_v, rows_first_, p.dim_v % 2);
    p.grad_query = g.query.ref;
    p.grad_key = g.key.ref;
    p.grad_value = g.value.ref;
    if (!CHECK(cuda::attention_backward_hopper_able(p))) return g;
    p.workspace_bytes = cuda::attention_backward_hopper_workspace(p);
    std::vector<char> workspace(p.workspace_bytes, '\xff');
    p.workspace = workspace.data();
    cuda::emulator::set_seed(seed);
    try {
      cuda::attention_backward_hopper(p);
    } catch (const cuda::LaunchError& error) {
      std::fprintf(stderr, "%s\n", error.what());
      CHECK(!"launched");
    }
    return g;
  }

  void compare_with_definition(const Gradients& found) {
    const std::vector<double> query = doubles(p.query, p.batch, p.heads_q, p.len_q, p.dim_qk),
                              key = doubles(p.key, p.batch, p.heads_kv, p.len_k, p.dim_qk),
                              value = doubles(p.value, p.batch, p.heads_kv, p.len_k, p.dim_v),
                              out = doubles(p.out, p.batch, p.heads_q, p.len_q, p.dim_v),
                              grad_out = doubles(p.grad_out, p.batch, p.heads_q, p.len_q, p.dim_v);
    std::vector<double> dq(query.size()), dk(key.size()), dv(value.size());
    for (int64_t n = 0; n < p.batch * p.heads_q * p.len_q; ++n) {
      const int64_t b = n / (p.heads_q * p.len_q), h = n / p.len_q % p.heads_q, i = n % p.len_q;
      const int64_t keys = (b * p.heads_kv + h / (p.heads_q / p.heads_kv)) * p.len_k;
      if (get(p.lse, b, h, i, 0) == -kInf) continue;
      const double delta =
          inner(&out[n * p.dim_v], &grad_out[n * p.dim_v], p.dim_v) - (p.grad_lse ? get(p.grad_lse, b, h, i, 0) : 0.0);
      for (int64_t j = 0; j < p.len_k; ++j) {
        const double probability = probabilities_[n * p.len_k + j];
        if (probability == 0.0) continue;
        const int64_t at = keys + j;
        const double ds =
            p.scale * probability * (inner(&grad_out[n * p.dim_v], &value[at * p.dim_v], p.dim_v) - delta);
        for (int64_t d = 0; d < p.dim_v; ++d) dv[at * p.dim_v + d] += probability * grad_out[n * p.dim_v + d];
        for (int64_t d = 0; d < p.dim_qk; ++d) {
          dq[n * p.dim_qk + d] += ds * key[at * p.dim_qk + d];
          dk[at * p.dim_qk + d] += ds * query[n * p.dim_qk + d];
        }
      }
    }
    compare(found.query.ref, dq, p.heads_q, p.len_q, p.dim_qk);
    compare(found.key.ref, dk, p.heads_kv, p.len_k, p.dim_qk);
    compare(found.value.ref, dv, p.heads_kv, p.len_k, p.dim_v);
  }

  // Probabilities, their gradients and the results are rounded to 16 bits: in units of the largest element.
  void compare(const TensorRef& found, const std::vector<double>& wanted, int64_t heads, int64_t rows, int64_t dim) {
    const double tolerance = dtype_ == DType::kBFloat16 ? 1e-2 : 1.5e-3;
    double largest = 0.0, difference = 0.0;
    for (int64_t n = 0; n < p.batch * heads * rows; ++n)
      for (int64_t d = 0; d < dim; ++d) {
        const double want = wanted[n * dim + d];
        const double error = std::fabs(get(found, n / (heads * rows), n / rows % heads, n % rows, d) - want);
        largest = std::fmax(largest, std::fabs(want));
        difference = error > difference || std::isnan(error) ? error : difference;
      }
    if (!CHECK(difference <= tolerance * largest))
      std::fprintf(stderr, "    off by %g, largest %g\n", difference, largest);
  }
};

void test_dense() {
  const Shape shapes[] = {{1, 1, 1, 128, 128, 64, 64}, {2, 1, 2, 130, 197, 64, 64},  {1, 2, 2, 65, 129, 128, 128},
                          {4, 1, 1, 1, 1, 8, 8},       {1, 1, 3, 63, 300, 128, 128}, {1, 2, 1, 259, 64, 40, 40},
                          {1, 1, 2, 17, 130, 96, 59},  {1, 1, 1, 70, 70, 3, 80},     {2, 2, 1, 256, 256, 64, 64},
                          {2, 2, 1, 190, 70, 40, 59}};
  uint64_t seed = 100;
  for (const Shape& shape : shapes)
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      Problem problem(dtype, shape, seed++);
      problem.check(seed % 2);
    }
}

void test_masks() {
  uint64_t seed = 200;
  // The last one has a kernel of its own, a block for a whole head, as there are as many heads as multiprocessors.
  const Shape shapes[] = {{1, 1, 2, 150, 261, 64, 64}, {1, 1, 1, 150, 261, 128, 128}, {2, 2, 1, 197, 230, 64, 64}};
  for (const Shape& given : shapes)
    for (int kind = 0; kind < 10; ++kind) {
      Shape shape = given;
      if (kind >= 3 && kind <= 6) shape.batch = 2;
      const DType dtype = (kind + shape.dim_v / 64) % 2 ? DType::kBFloat16 : DType::kFloat16;
      Problem problem(dtype, shape, seed++);
      MaskParams& mask = problem.p.mask;
      if (kind == 0) mask.band_high = 0;
      if (kind == 1) mask.band_high = problem.p.len_k - problem.p.len_q;
      if (kind == 2) mask.band_low = 140, mask.band_high = 160;  // the last queries attend to nothing
      if (kind == 3) problem.set_prefix();
      if (kind == 4) problem.set_key_lengths();
      if (kind == 5) problem.set_keep();
      if (kind == 6) problem.set_segments(50);
      if (kind == 7) problem.set_segments(7);
      if (kind == 8) problem.set_dense(true);
      if (kind == 9) problem.set_dense(false);
      problem.check(kind % 3 == 0);
    }
}

// More tiles than twice the stages of the rings, and one candidate list of 32 tiles is not enough.
void test_long() {
  for (const int64_t dim : {64, 128}) {
    Problem keys(DType::kBFloat16, {1, 1, 1, 66, 1190, dim, dim}, 250 + dim),
        queries(DType::kFloat16, {1, 1, 1, 1190, 66, dim, dim}, dim);
    queries.set_keep();
    keys.check();
    queries.check();
  }
  Problem segments(DType::kBFloat16, {1, 1, 2, 2100, 40, 16, 16}, 251);
  segments.set_segments(1);
  segments.check();
}

// Every part of a mask with every other, by chance.
void test_random_problems(int rounds) {
  Random random(300);
  const int64_t lengths[] = {1, 3, 17, 63, 64, 65, 113, 128, 130, 197, 257};
  const int64_t dims[] = {1, 8, 40, 59, 64, 80, 128};
  for (int round = 0; round < rounds; ++round) {
    const DType dtype = random.chance(0.5) ? DType::kBFloat16 : DType::kFloat16;
    const Shape shape{random.integer(1, 2),           random.integer(1, 2),           random.integer(1, 3),
                      lengths[random.integer(0, 10)], lengths[random.integer(0, 10)], dims[random.integer(0, 6)],
                      dims[random.integer(0, 6)]};
    Problem problem(dtype, shape, random.bits());
    const double scales[] = {problem.p.scale, 1.0, 0.0, -0.25};
    problem.p.scale = scales[random.integer(0, 3)];
    if (random.chance(0.3)) problem.p.mask.band_high = random.chance(0.5) ? 0 : shape.len_k - shape.len_q;
    if (random.chance(0.2)) problem.p.mask.band_low = random.integer(-70, 10);
    if (random.chance(0.2)) problem.set_prefix();
    if (random.chance(0.3)) problem.set_key_lengths();
    if (random.chance(0.2)) problem.set_keep();
    if (random.chance(0.2)) problem.set_segments(random.integer(1, 60));
    if (random.chance(0.3)) problem.set_dense(random.chance(0.5));
    problem.check(random.chance(0.5));
  }
}

void test_able() {
  Problem problem(DType::kFloat16, {1, 1, 1, 8, 8, 64, 64}, 1);
  problem.check();
  const AttentionBackwardParams able = problem.p;
  CHECK(cuda::attention_backward_hopper_able(able));
  const auto unable = [&](auto change) {
    AttentionBackwardParams p = able;
    change(p);
    CHECK(!cuda::attention_backward_hopper_able(p));
  };
  unable([](auto& p) { p.query.dtype = DType::kBFloat16; });  // unlike the others
  unable([](auto& p) { p.dropout.p = 0.1; });
  unable([](auto& p) { p.bias = p.query; });
  unable([](auto& p) { p.dim_v = 136; });
  unable([](auto& p) { p.len_k = 0; });
  unable([](auto& p) { p.batch = 0; });
  unable([](auto& p) { p.key.stride[2] += 1; });
  unable([](auto& p) { p.value.ptr = static_cast<char*>(p.value.ptr) + 2; });
  unable([](auto& p) { p.grad_key.stride[2] += 1; });
}

}  // namespace

int main(int argc, char** argv) {
  test_able();
  test_dense();
  test_masks();
  test_long();
  test_random_problems(argc > 1 ? std::stoi(argv[1]) : 10);
  return result("cuda attention backward hopper");
}
