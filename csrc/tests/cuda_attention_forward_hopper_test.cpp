// The Hopper attention forward in the emulator, against the definition in double.
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../core/mask.h"
#include "../cuda/kernels.h"
#include "../cuda/platform.h"
#include "problem.h"

using namespace fastattn;
using namespace fastattn::test;

namespace {

struct Result {
  Tensor out;
  std::vector<float> lse;
};

int64_t round_up_to_8(int64_t n) { return (n + 7) / 8 * 8; }

Result run(AttentionForwardParams p, uint64_t seed, bool rows_first, int64_t out_pad) {
  Result r;
  r.out = make_tensor(p.query.dtype, p.batch, p.heads_q, p.len_q, p.dim_v, rows_first, out_pad);
  p.out = r.out.ref;
  r.lse.assign(p.batch * p.heads_q * p.len_q, std::numeric_limits<float>::quiet_NaN());
  p.lse.ptr = r.lse.data();
  CHECK(cuda::attention_forward_hopper_able(p));
  p.workspace_bytes = cuda::attention_forward_hopper_workspace(p);
  std::vector<char> workspace(p.workspace_bytes, '\xff');
  p.workspace = workspace.data();
  cuda::emulator::set_seed(seed);
  cuda::attention_forward_hopper(p);
  return r;
}

// What the definition gives, a float instead of 16 bits where the result would be rounded.
void compare_with_definition(const AttentionForwardParams& p, const Result& found) {
  const double tolerance = p.query.dtype == DType::kBFloat16 ? 1.5e-2 : 2e-3;
  const int64_t group = p.heads_q / p.heads_kv;
  std::vector<double> scores(p.len_k), expected(p.dim_v), query(p.dim_qk);
  for (int64_t n = 0; n < p.batch * p.heads_q * p.len_q; ++n) {
    const int64_t b = n / (p.heads_q * p.len_q), h = n / p.len_q % p.heads_q, i = n % p.len_q;
    for (int64_t d = 0; d < p.dim_qk; ++d) query[d] = get(p.query, b, h, i, d);
    double top = -kInf, sum = 0.0;
    for (int64_t j = 0; j < p.len_k; ++j) {
      scores[j] = -kInf;
      if (!may_attend(p.mask, b, h, i, j)) continue;
      double dot = 0.0;
      for (int64_t d = 0; d < p.dim_qk; ++d) dot += query[d] * get(p.key, b, h / group, j, d);
      scores[j] = dot * p.scale;
      top = std::fmax(top, scores[j]);
    }
    expected.assign(p.dim_v, 0.0);
    double largest = 1.0;
    for (int64_t j = 0; j < p.len_k; ++j) {
      if (scores[j] == -kInf) continue;
      const double e = std::exp(scores[j] - top);
      sum += e;
      for (int64_t d = 0; d < p.dim_v; ++d) expected[d] += e * get(p.value, b, h / group, j, d);
    }
    for (int64_t d = 0; d < p.dim_v; ++d) largest = std::fmax(largest, sum > 0.0 ? std::fabs(expected[d]) / sum : 0.0);
    for (int64_t d = 0; d < p.dim_v; ++d) {
      const double want = sum > 0.0 ? expected[d] / sum : 0.0;
      CHECK(std::fabs(get(found.out.ref, b, h, i, d) - want) <= tolerance * largest);
    }
    if (sum > 0.0) {
      const double want = top + std::log(sum);
      CHECK(std::fabs(found.lse[n] - want) <= 3e-6 * std::fmax(1.0, std::fabs(want)));
    } else {
      CHECK(found.lse[n] == -kInf);
    }
  }
}

// A problem that TMA can read, and the memory it points to.
struct Problem {
  AttentionForwardParams p;
  bool rows_first;
  Tensor query, key, value;
  std::vector<int64_t> key_lengths, prefix, query_ids, key_ids;
  std::vector<uint8_t> keep;
  std::vector<uint64_t> bits, live, full;

  Problem(const Problem&) = delete;

  Problem(DType dtype, int64_t batch, int64_t heads_kv, int64_t group, int64_t len_q, int64_t len_k, int64_t dim_qk,
          int64_t dim_v, Random& random)
      : rows_first(random.chance(0.5)) {
    p.batch = batch;
    p.heads_kv = heads_kv;
    p.heads_q = heads_kv * group;
    p.len_q = len_q;
    p.len_k = len_k;
    p.dim_qk = dim_qk;
    p.dim_v = dim_v;
    p.scale = 1.0 / std::sqrt(static_cast<double>(dim_qk));
    const int64_t pad = round_up_to_8(dim_qk) - dim_qk + (random.chance(0.3) ? 16 : 0);
    query = make_tensor(dtype, batch, p.heads_q, len_q, dim_qk, rows_first, pad);
    key = make_tensor(dtype, batch, heads_kv, len_k, dim_qk, rows_first, pad);
    value = make_tensor(dtype, batch, heads_kv, len_k, dim_v, rows_first, round_up_to_8(dim_v) - dim_v);
    randomize(query, batch, p.heads_q, len_q, dim_qk, random);
    randomize(key, batch, heads_kv, len_k, dim_qk, random);
    randomize(value, batch, heads_kv, len_k, dim_v, random);
    p.query = query.ref;
    p.key = key.ref;
    p.value = value.ref;
  }

  void set_prefix(Random& random) {
    for (int64_t b = 0; b < p.batch; ++b) prefix.push_back(random.integer(-1, p.len_k + 1));
    p.mask.prefix_lengths = prefix.data();
    p.mask.stride_prefix_b = 1;
  }

  void set_key_lengths(Random& random) {
    for (int64_t b = 0; b < p.batch; ++b) key_lengths.push_back(random.integer(-1, p.len_k + 1));
    p.mask.key_lengths = key_lengths.data();
    p.mask.stride_key_lengths_b = 1;
  }

  void set_keep(Random& random) {
    for (int64_t n = 0; n < p.batch * p.len_k; ++n) keep.push_back(n / 32 % 5 != 1 && random.chance(0.9));
    p.mask.key_keep = keep.data();
    p.mask.stride_keep_b = p.len_k;
    p.mask.stride_keep_j = 1;
  }

  void set_segments(int64_t length) {
    for (int64_t n = 0; n < p.batch * p.len_q; ++n) query_ids.push_back(n % p.len_q / length);
    for (int64_t n = 0; n < p.batch * p.len_k; ++n) key_ids.push_back(n % p.len_k / length);
    p.mask.query_segments = query_ids.data();
    p.mask.key_segments = key_ids.data();
    p.mask.stride_qseg_b = p.len_q;
    p.mask.stride_kseg_b = p.len_k;
    p.mask.stride_qseg_i = p.mask.stride_kseg_j = 1;
  }

  // One mask for each query head. Tiles of 64 x 64 that are empty, full or in between; with their map or without.
  void set_dense(bool with_map, Random& random) {
    const int64_t words = ceil_div(p.len_k, 64), rows = ceil_div(p.len_q, 64), map_words = ceil_div(words, 64);
    std::vector<double> density(p.heads_q * rows * words);
    for (double& x : density) {
      const double kind = random.uniform();
      x = kind < 0.3 ? 0.0 : kind < 0.6 ? 1.0 : random.uniform();
    }
    bits.assign(p.heads_q * p.len_q * words, 0);
    live.assign(p.heads_q * rows * map_words, 0);
    full = live;
    for (int64_t h = 0; h < p.heads_q; ++h)
      for (int64_t w = 0; w < words; ++w)
        for (int64_t t = 0; t < rows; ++t) {
          uint64_t any = 0, all = ~uint64_t{0};
          const uint64_t exist = bits_before(p.len_k, w * 64);
          for (int64_t i = t * 64; i < min64(p.len_q, t * 64 + 64); ++i) {
            uint64_t word = 0;
            for (int64_t j = 0; j < 64; ++j) word |= uint64_t{random.chance(density[(h * rows + t) * words + w])} << j;
            word &= exist;
            bits[(h * p.len_q + i) * words + w] = word;
            any |= word;
            all &= word;
          }
          const int64_t at = (h * rows + t) * map_words + w / 64;
          live[at] |= uint64_t{any != 0} << (w % 64);
          full[at] |= uint64_t{all == exist} << (w % 64);
        }
    p.mask.bits = bits.data();
    p.mask.stride_bits_h = p.len_q * words;
    p.mask.words_per_row = words;
    if (!with_map) return;
    p.mask.live = live.data();
    p.mask.full = full.data();
    p.mask.stride_map_h = rows * map_words;
    p.mask.map_words_per_row = map_words;
    p.mask.block_m = p.mask.block_n = 64;
  }

  // Keys and values that no query may attend to are NaN or Inf.
  void poison(Random& random) {
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

  // Twice, under schedules that differ.
  Result check(uint64_t seed = 0, int64_t out_pad = 0) {
    const Result one = run(p, seed, rows_first, out_pad), two = run(p, seed + 1, rows_first, out_pad);
    compare_with_definition(p, one);
    CHECK(one.out.bytes == two.out.bytes);
    CHECK(std::memcmp(one.lse.data(), two.lse.data(), one.lse.size() * sizeof(float)) == 0);
    return one;
  }
};

void test_head_dims() {
  Random random(11);
  // Every shape of the kernel, ragged in both lengths, several tiles; then dims that are padded, also Dv != D.
  Problem(DType::kBFloat16, 1, 1, 1, 200, 300, 64, 64, random).check();
  Problem(DType::kFloat16, 1, 1, 1, 130, 390, 128, 128, random).check();
  Problem(DType::kBFloat16, 1, 1, 1, 129, 150, 256, 256, random).check();
  Problem(DType::kFloat16, 1, 1, 1, 130, 260, 96, 96, random).check();
  Problem(DType::kBFloat16, 1, 1, 1, 100, 200, 192, 192, random).check();
  Problem(DType::kFloat16, 1, 2, 1, 33, 70, 40, 59, random).check(2, 3);
  Problem(DType::kBFloat16, 2, 1, 1, 65, 140, 80, 24, random).check(4);
  Problem(DType::kFloat16, 1, 1, 1, 20, 66, 130, 8, random).check(6, 8);
}

void test_masks() {
  Random random(12);
  {
    Problem causal(DType::kFloat16, 1, 1, 2, 400, 400, 64, 64, random);
    causal.p.mask.band_high = 0;
    causal.check();
  }
  {
    Problem window(DType::kBFloat16, 1, 1, 1, 270, 530, 128, 128, random);
    window.p.mask.band_low = -40;
    window.p.mask.band_high = 60;
    window.poison(random);
    window.check(2);
  }
  for (const bool with_map : {true, false}) {
    Problem dense(DType::kFloat16, 1, 1, 2, 210, 330, 16, 16, random);
    dense.set_dense(with_map, random);
    dense.poison(random);
    dense.check(4);
  }
  {
    Problem padded(DType::kBFloat16, 3, 1, 1, 100, 300, 64, 64, random);
    padded.set_keep(random);
    padded.set_key_lengths(random);
    padded.poison(random);
    padded.check(6);
  }
  {
    Problem documents(DType::kFloat16, 1, 1, 1, 300, 300, 72, 128, random);
    documents.set_segments(90);
    documents.p.mask.band_high = 0;
    documents.check(8);
  }
}

void test_random_problems(int rounds) {
  Random random(13);
  for (int round = 0; round < rounds; ++round) {
    const int64_t lengths[] = {1, 17, 63, 64, 65, 100, 129, 197, 260};
    const int64_t dims[] = {1, 8, 40, 64, 64, 96, 128, 192};
    const int64_t dim = dims[random.integer(0, 7)];
    Problem problem(random.chance(0.5) ? DType::kBFloat16 : DType::kFloat16, random.integer(1, 2), random.integer(1, 2),
                    random.integer(1, 2), lengths[random.integer(0, 8)], lengths[random.integer(0, 8)], dim,
                    random.chance(0.7) ? dim : dims[random.integer(0, 4)], random);
    MaskParams& mask = problem.p.mask;
    if (random.chance(0.3)) mask.band_high = random.chance(0.5) ? 0 : problem.p.len_k - problem.p.len_q;
    if (random.chance(0.2)) mask.band_low = random.integer(-150, 10);
    if (random.chance(0.2)) problem.set_prefix(random);
    if (random.chance(0.3)) problem.set_key_lengths(random);
    if (random.chance(0.2)) problem.set_keep(random);
    if (random.chance(0.2)) problem.set_segments(random.integer(5, 90));
    if (random.chance(0.3)) problem.set_dense(random.chance(0.7), random);
    problem.poison(random);
    problem.check(2 * round, random.integer(0, 1) * 3);
  }
}

// Every row empty, and rows that are empty beside rows that are not.
void test_empty_rows() {
  Random random(14);
  Problem none(DType::kBFloat16, 1, 1, 1, 70, 70, 64, 64, random);
  none.p.mask.band_high = -100;
  none.poison(random);
  none.check();
  Problem some(DType::kFloat16, 1, 1, 1, 140, 140, 64, 64, random);
  some.p.mask.band_high = -50;
  some.poison(random);
  some.check();
  // An infinity that the other rows attend to does not reach the empty one.
  Problem infinite(DType::kFloat16, 1, 1, 1, 10, 10, 64, 64, random);
  infinite.p.mask.band_high = -1;
  put(infinite.value.ref, 0, 0, 0, 7, kInf);
  const Result r = run(infinite.p, 0, infinite.rows_first, 0);
  CHECK(r.lse[0] == -kInf);
  for (int64_t d = 0; d < 64; ++d) CHECK(get(r.out.ref, 0, 0, 0, d) == 0.0);
  CHECK(get(r.out.ref, 0, 0, 5, 7) == kInf);
}

// Keys so many that the heads are taken in sections, of 2 heads and of 1.
void test_sections() {
  Random random(18);
  Problem problem(DType::kFloat16, 1, 3, 1, 200, 49000, 8, 8, random);
  problem.p.mask.band_low = 0;
  problem.p.mask.band_high = 30;
  compare_with_definition(problem.p, run(problem.p, 0, problem.rows_first, 0));
}

// NaN that a query does attend to is not hidden, and stays in its row.
void test_attended_nan() {
  Random random(15);
  Problem problem(DType::kFloat16, 1, 1, 1, 150, 150, 64, 64, random);
  problem.p.mask.band_low = problem.p.mask.band_high = 0;
  put(problem.key.ref, 0, 0, 33, 5, kNan);
  const Result r = run(problem.p, 0, problem.rows_first, 0);
  for (int64_t i = 0; i < 150; ++i) {
    CHECK(std::isnan(r.lse[i]) == (i == 33));
    for (int64_t d = 0; d < 64; ++d) {
      const double found = get(r.out.ref, 0, 0, i, d);
      if (i == 33) CHECK(std::isnan(found));
      else CHECK(found == get(problem.value.ref, 0, 0, i, d));
    }
  }
}

// Scores in the thousands, rising with the keys so that every tile rescales: the rows must still sum to 1.
void test_large_scores() {
  Random random(16);
  Problem problem(DType::kBFloat16, 1, 1, 1, 64, 400, 64, 64, random);
  for (int64_t j = 0; j < 400; ++j)
    for (int64_t d = 0; d < 64; ++d) {
      put(problem.key.ref, 0, 0, j, d, get(problem.key.ref, 0, 0, j, d) * (1.0 + j / 16));
      put(problem.value.ref, 0, 0, j, d, 1.0);
    }
  problem.p.scale = 8.0;
  const Result r = run(problem.p, 0, problem.rows_first, 0);
  for (int64_t i = 0; i < 64; ++i)
    for (int64_t d = 0; d < 64; ++d) CHECK(get(r.out.ref, 0, 0, i, d) == 1.0);
}

void test_able() {
  Random random(17);
  Problem problem(DType::kBFloat16, 2, 1, 2, 10, 10, 64, 64, random);
  const AttentionForwardParams able = problem.p;
  CHECK(cuda::attention_forward_hopper_able(able));
  AttentionForwardParams p = able;
  p.query.dtype = DType::kFloat32;
  CHECK(!cuda::attention_forward_hopper_able(p));
  p = able;
  p.key.stride[2] += 4;
  CHECK(!cuda::attention_forward_hopper_able(p));
  p = able;
  p.value.stride[0] = 0;
  CHECK(!cuda::attention_forward_hopper_able(p));
  p = able;
  p.query.ptr = static_cast<char*>(p.query.ptr) + 2;
  CHECK(!cuda::attention_forward_hopper_able(p));
  p = able;
  p.bias = p.query;
  CHECK(!cuda::attention_forward_hopper_able(p));
  p = able;
  p.dropout.p = 0.5;
  CHECK(!cuda::attention_forward_hopper_able(p));
  for (const double scale : {0.0, -1.0, 1e-60, static_cast<double>(kNan)}) {
    p = able;
    p.scale = scale;
    CHECK(!cuda::attention_forward_hopper_able(p));
  }
}

}  // namespace

int main(int argc, char**) {
  test_able();
  test_head_dims();
  test_masks();
  test_empty_rows();
  test_sections();
  test_attended_nan();
  test_large_scores();
  test_random_problems(argc > 1 ? 200 : 20);
  return result("cuda attention forward, Hopper path");
}
