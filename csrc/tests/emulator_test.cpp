// The emulator against plain C++: every wrapper of ptx.h and hopper.h, and planted faults, each of which has to end in
// an EmulationError or in a wrong result.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "../cuda/hopper.h"
#include "check.h"

// The address sanitizer ends the program at an access beyond shared memory, before the emulator can report it.
#if defined(__SANITIZE_ADDRESS__)
#define FASTATTN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTATTN_ASAN 1
#endif
#endif

using fastattn::DType;
using fastattn::TensorRef;
using fastattn::test::Random;

namespace fastattn::cuda {
namespace {

constexpr uint64_t kSeeds = 6;
constexpr uint32_t kAll = 0xffffffffu;

// The message of the EmulationError that `action` ends with; empty when it ends without one.
std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const EmulationError& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, bfloat16> ? DType::kBFloat16 : DType::kFloat16;
}

// Small integers: every product and sum in the tests below is exact in float, so the order of additions does not
// matter.
template <typename T>
std::vector<T> small_integers(Random& random, size_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = from_float<T>(static_cast<float>(random.integer(-4, 4)));
  return values;
}

// ---- 16-bit conversions ----

// The value of a 16-bit pattern by the definition of the format; infinities and NaN by the caller.
double value_of(uint32_t bits, int mantissa_bits, int bias) {
  const int exponent = static_cast<int>(bits >> mantissa_bits),
            mantissa = static_cast<int>(bits & ((1u << mantissa_bits) - 1));
  const double fraction = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
  return std::ldexp(fraction, (exponent == 0 ? 1 : exponent) - bias - mantissa_bits);
}

template <typename T>
void test_conversion(int mantissa_bits, int bias) {
  const uint32_t infinity = (0x7fffu >> mantissa_bits) << mantissa_bits;
  for (uint32_t magnitude = 0; magnitude < 0x8000; ++magnitude) {
    for (int negative = 0; negative < 2; ++negative) {
      const uint16_t bits = static_cast<uint16_t>(magnitude | (negative ? 0x8000u : 0u));
      const float value = to_float(T{bits});
      if (magnitude > infinity) {
        CHECK(std::isnan(value));
        CHECK(from_float<T>(value).bits == 0x7fff);
        continue;
      }
      const double sign = negative ? -1.0 : 1.0;
      const double expected = magnitude == infinity ? INFINITY : value_of(magnitude, mantissa_bits, bias);
      CHECK(value == static_cast<float>(sign * expected) && std::signbit(value) == (negative != 0));
      CHECK(from_float<T>(value).bits == bits);
      if (magnitude == infinity) continue;
      // Half-way to the next value: to the even one; just below and above: to the nearer one. Behind the greatest
      // finite value comes what would be the next power of two, where infinity begins.
      const double next = value_of(magnitude + 1, mantissa_bits, bias);
      const float middle = static_cast<float>(sign * (expected + next) / 2);
      const uint16_t up = static_cast<uint16_t>(bits + 1), even = magnitude % 2 == 0 ? bits : up;
      CHECK(from_float<T>(middle).bits == even);
      CHECK(from_float<T>(std::nextafterf(middle, 0.0f)).bits == bits);
      CHECK(from_float<T>(std::nextafterf(middle, negative ? -INFINITY : INFINITY)).bits == up);
    }
  }
  CHECK(from_float<T>(std::numeric_limits<float>::max()).bits == infinity);
  const float2 pair = unpack2<T>(pack2<T>(1.5f, -2.0f));
  CHECK(pair.x == 1.5f && pair.y == -2.0f);
  CHECK((pack2<T>(1.5f, -2.0f) & 0xffff) == from_float<T>(1.5f).bits);
}

// ---- indices, barriers and warp collectives ----

FASTATTN_KERNEL(96) index_kernel(int* out) {
  const int x = static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  out[block * 96 + x] += block * 96 + x;
}

void test_indices() {
  std::vector<int> out(2 * 3 * 2 * 96, 0);
  launch("index", index_kernel, dim3(2, 3, 2), dim3(8, 4, 3), 0, nullptr, out.data());
  for (size_t n = 0; n < out.size(); ++n) CHECK(out[n] == static_cast<int>(n));
}

struct CollectiveResult {
  int by_index, by_xor, up, down, ballot, any, all, reduced, part;
  double wide;
};

FASTATTN_KERNEL(64) collective_kernel(CollectiveResult* out) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  CollectiveResult r;
  r.by_index = __shfl_sync(kAll, thread, lane / 2);
  r.by_xor = __shfl_xor_sync(kAll, thread, 5);
  r.up = __shfl_up_sync(kAll, thread, 3u);
  r.down = __shfl_down_sync(kAll, thread, 3u);
  r.wide = __shfl_xor_sync(kAll, thread + 0.5, 1);
  r.ballot = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  r.any = __any_sync(kAll, lane == 7);
  r.all = __all_sync(kAll, lane != 7);
  r.reduced = static_cast<int>(__reduce_or_sync(kAll, 1u << (thread / 2 % 32)));
  // The two halves of the warp work apart, in different numbers of steps.
  r.part = 0;
  if (lane < 16) {
    for (int n = 0; n < 3; ++n) r.part += __shfl_xor_sync(0x0000ffffu, lane, 1 << n);
  } else {
    r.part = __shfl_xor_sync(0xffff0000u, lane, 8);
  }
  __syncwarp();
  out[thread] = r;
}

void test_collectives() {
  std::vector<CollectiveResult> out(64);
  launch("collectives", collective_kernel, dim3(1), dim3(64), 0, nullptr, out.data());
  for (int thread = 0; thread < 64; ++thread) {
    const CollectiveResult& r = out[static_cast<size_t>(thread)];
    const int lane = thread % 32, first = thread - lane;
    CHECK(r.by_index == first + lane / 2);
    CHECK(r.by_xor == first + (lane ^ 5));
    CHECK(r.up == (lane < 3 ? thread : thread - 3));
    CHECK(r.down == (lane > 28 ? thread : thread + 3));
    CHECK(r.wide == first + (lane ^ 1) + 0.5);
    CHECK(r.ballot == 0x49249249);
    CHECK(r.any == 1 && r.all == 0);
    CHECK(static_cast<unsigned>(r.reduced) == (first == 0 ? 0x0000ffffu : 0xffff0000u));
    CHECK(r.part == (lane < 16 ? (lane ^ 1) + (lane ^ 2) + (lane ^ 4) : (lane ^ 8)));
  }
}

// Two pairs of warps meet at their own barriers, then the block; `arrive_only` lets the second pair go on without
// waiting.
FASTATTN_KERNEL(128) named_barrier_kernel(int* out, bool arrive_only) {
  FASTATTN_SHARED(shared);
  int* const values = reinterpret_cast<int*>(shared);
  const int thread = static_cast<int>(threadIdx.x), pair = thread / 64;
  values[thread] = thread;
  if (arrive_only) {
    // Warps 2 and 3 hand over to warps 0 and 1.
    if (pair == 1) {
      ptx::named_barrier_arrive(1, 128);
    } else {
      ptx::named_barrier(1, 128);
      out[thread] = values[thread + 64];
    }
  } else {
    ptx::named_barrier(1 + pair, 64);
    out[thread] = values[thread ^ 63];
  }
}

void test_named_barriers() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulator::set_seed(seed);
    std::vector<int> out(128, -1);
    launch("named_barrier", named_barrier_kernel, dim3(1), dim3(128), 512, nullptr, out.data(), false);
    for (int n = 0; n < 128; ++n) CHECK(out[static_cast<size_t>(n)] == (n ^ 63));
    launch("named_barrier", named_barrier_kernel, dim3(1), dim3(128), 512, nullptr, out.data(), true);
    for (int n = 0; n < 64; ++n) CHECK(out[static_cast<size_t>(n)] == n + 64);
  }
  emulator::set_seed(0);
}

FASTATTN_KERNEL(32) atomic_kernel(int* counter, unsigned* bits) {
  atomicAdd(counter, 2);
  atomicOr(bits, 1u << threadIdx.x);
}

void test_atomics() {
  int counter = 1;
  unsigned bits = 0;
  launch("atomic", atomic_kernel, dim3(3), dim3(32), 0, nullptr, &counter, &bits);
  CHECK(counter == 1 + 2 * 96);
  CHECK(bits == kAll);
}

// ---- cp.async, ldmatrix, mma ----

FASTATTN_KERNEL(32) copy_kernel(const uint8_t* from, uint8_t* to) {
  FASTATTN_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x);
  ptx::cp_async16(shared + 16 * lane, from + 16 * lane, lane % 17);  // 0..16 bytes, the rest is zero
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int n = 0; n < 16; ++n) to[16 * lane + n] = shared[16 * (31 - lane) + n];
}

void test_copy() {
  alignas(16) uint8_t from[512];
  for (int n = 0; n < 512; ++n) from[n] = static_cast<uint8_t>(n % 251 + 1);
  std::vector<uint8_t> to(512, 0xaa);
  launch("copy", copy_kernel, dim3(1), dim3(32), 512, nullptr, from, to.data());
  for (int lane = 0; lane < 32; ++lane) {
    const int source = 31 - lane;
    for (int n = 0; n < 16; ++n) {
      const int expected = n < source % 17 ? from[16 * source + n] : 0;
      CHECK(to[static_cast<size_t>(16 * lane + n)] == expected);
    }
  }
}

// Registers of the four loads, per lane: x4, x4 transposed, x2, x2 transposed.
struct LoadedMatrices {
  uint32_t plain[4], transposed[4], plain2[2], transposed2[2];
};

FASTATTN_KERNEL(32) load_matrix_kernel(LoadedMatrices* out) {
  FASTATTN_SHARED(shared);
  uint16_t* const elements = reinterpret_cast<uint16_t*>(shared);  // [32][8]
  const int lane = static_cast<int>(threadIdx.x);
  for (int n = 0; n < 8; ++n) elements[8 * lane + n] = static_cast<uint16_t>(8 * lane + n);
  __syncwarp();
  // Matrix m is made of the rows 8 * m .. 8 * m + 7, in reverse order.
  const uint16_t* const row = elements + 8 * (lane / 8 * 8 + 7 - lane % 8);
  LoadedMatrices r;
  ptx::ldmatrix_x4(r.plain, row);
  ptx::ldmatrix_x4_trans(r.transposed, row);
  ptx::ldmatrix_x2(r.plain2, row);
  ptx::ldmatrix_x2_trans(r.transposed2, row);
  out[lane] = r;
}

void test_load_matrix() {
  std::vector<LoadedMatrices> out(32);
  launch("load_matrix", load_matrix_kernel, dim3(1), dim3(32), 512, nullptr, out.data());
  const auto element = [](int m, int i, int j) { return static_cast<uint32_t>(8 * (8 * m + 7 - i) + j); };
  for (int lane = 0; lane < 32; ++lane) {
    const LoadedMatrices& r = out[static_cast<size_t>(lane)];
    const int i = lane / 4, j = 2 * (lane % 4);
    for (int m = 0; m < 4; ++m) {
      const uint32_t plain = element(m, i, j) | element(m, i, j + 1) << 16;
      const uint32_t transposed = element(m, j, i) | element(m, j + 1, i) << 16;
      CHECK(r.plain[m] == plain && r.transposed[m] == transposed);
      if (m < 2) CHECK(r.plain2[m] == plain && r.transposed2[m] == transposed);
    }
  }
}

// One m16n8k16 product with the fragments made by index from row-major A [16][16], B [16][8] and C [16][8].
template <typename T>
FASTATTN_KERNEL(32) multiply_kernel(const T* a, const T* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = 2 * (lane % 4);
  const auto pair = [](T lo, T hi) { return static_cast<uint32_t>(lo.bits) | static_cast<uint32_t>(hi.bits) << 16; };
  const auto a_pair = [&](int row, int k) { return pair(a[16 * row + k], a[16 * row + k + 1]); };
  const uint32_t fragment[4] = {a_pair(g, t), a_pair(g + 8, t), a_pair(g, t + 8), a_pair(g + 8, t + 8)};
  float sums[4] = {c[8 * g + t], c[8 * g + t + 1], c[8 * (g + 8) + t], c[8 * (g + 8) + t + 1]};
  ptx::mma_m16n8k16<T>(sums, fragment, pair(b[8 * t + g], b[8 * (t + 1) + g]),
                       pair(b[8 * (t + 8) + g], b[8 * (t + 9) + g]));
  c[8 * g + t] = sums[0];
  c[8 * g + t + 1] = sums[1];
  c[8 * (g + 8) + t] = sums[2];
  c[8 * (g + 8) + t + 1] = sums[3];
}

template <typename T>
void test_multiply() {
  Random random(3);
  const std::vector<T> a = small_integers<T>(random, 256), b = small_integers<T>(random, 128);
  std::vector<float> c(128), expected(128);
  for (size_t n = 0; n < 128; ++n) c[n] = expected[n] = static_cast<float>(n);
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 8; ++j) {
      for (size_t k = 0; k < 16; ++k) expected[8 * i + j] += to_float(a[16 * i + k]) * to_float(b[8 * k + j]);
    }
  }
  launch("multiply", multiply_kernel<T>, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), c.data());
  CHECK(c == expected);
}

FASTATTN_KERNEL(32) exp2_kernel(const float* x, float* y) { y[threadIdx.x] = ptx::ex2(x[threadIdx.x]); }

void test_exp2() {
  std::vector<float> x(32, 0.0f), y(32);
  x[1] = 1.0f;
  x[2] = -INFINITY;
  x[3] = INFINITY;
  x[4] = -127.0f;  // subnormal: counts as 0
  x[5] = -126.0f;
  x[6] = NAN;
  x[7] = 1e-40f;
  launch("exp2", exp2_kernel, dim3(1), dim3(32), 0, nullptr, x.data(), y.data());
  CHECK(y[0] == 1.0f && y[1] == 2.0f && y[2] == 0.0f && y[3] == INFINITY);
  CHECK(y[4] == 0.0f && y[5] == 0x1p-126f && std::isnan(y[6]) && y[7] == 1.0f);
}

// ---- TMA ----

struct TensorParameters {
  TensorMap from, to;
  int row, column, head, batch;
  uint16_t* box;  // [64][64], out: what lies in shared memory
};

// Loads a box of 64 x 64, writes out what it finds, stores the box at the same place of another tensor.
FASTATTN_KERNEL(64) tensor_kernel(const FASTATTN_GRID_CONSTANT TensorParameters p) {
  FASTATTN_SHARED(shared);
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared + 64 * 128);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&p.from);
    ptx::mbarrier_arrive_expect_tx(barrier, 64 * 128);
    ptx::tma_load_4d(shared, &p.from, barrier, p.column, p.row, p.head, p.batch);
  }
  ptx::mbarrier_wait(barrier, 0);
  for (int n = static_cast<int>(threadIdx.x); n < 64 * 64; n += 64) p.box[n] = reinterpret_cast<uint16_t*>(shared)[n];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store_4d(&p.to, shared, p.column, p.row, p.head, p.batch);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
}

void test_tensor_copies() {
  // [batch, head, row, column] over memory [batch, row, head, column]; neither rows nor columns fill the boxes.
  const int64_t dims[4] = {2, 3, 70, 72};
  const int64_t size = dims[0] * dims[1] * dims[2] * dims[3];
  const auto strided = [&](uint16_t* memory) {
    TensorRef tensor;
    tensor.ptr = memory;
    tensor.dtype = DType::kBFloat16;
    const int64_t strides[4] = {dims[2] * dims[1] * dims[3], dims[3], dims[1] * dims[3], 1};
    std::copy(strides, strides + 4, tensor.stride);
    return tensor;
  };
  std::vector<uint16_t> memory(static_cast<size_t>(size) + 8), copy(memory.size());
  const auto aligned = [](std::vector<uint16_t>& v) {
    return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(v.data()) + 15) / 16 * 16);
  };
  uint16_t *const from = aligned(memory), *const to = aligned(copy);
  for (int64_t n = 0; n < size; ++n) from[n] = static_cast<uint16_t>(n * 7 + 1);
  CHECK(tensor_map_able(strided(from), dims));

  for (const int row : {-10, 0, 40}) {
    for (const int column : {-8, 0, 32}) {
      for (const int head : {0, 2}) {
        emulator::set_seed(static_cast<uint64_t>(row + column + head + 100));
        constexpr uint16_t kUntouched = 0xabcd;
        std::fill(copy.begin(), copy.end(), kUntouched);
        std::vector<uint16_t> box(64 * 64, kUntouched);
        const TensorParameters p = {make_tensor_map(strided(from), dims, 64),
                                    make_tensor_map(strided(to), dims, 64),
                                    row,
                                    column,
                                    head,
                                    1,
                                    box.data()};
        launch("tensor", tensor_kernel, dim3(1), dim3(64), 64 * 128 + 8, nullptr, p);
        const TensorRef source = strided(from);
        std::vector<uint16_t> expected_copy(copy.size(), kUntouched);
        uint16_t* const expected_to = expected_copy.data() + (to - copy.data());
        for (int r = 0; r < 64; ++r) {
          for (int c = 0; c < 64; ++c) {
            const int64_t at_row = row + r, at_column = column + c;
            const bool inside = at_row >= 0 && at_row < dims[2] && at_column >= 0 && at_column < dims[3];
            const int64_t offset = source.stride[0] + head * source.stride[1] + at_row * source.stride[2] + at_column;
            const int chunk = c / 8 ^ r % 8;
            CHECK(box[static_cast<size_t>(64 * r + 8 * chunk + c % 8)] == (inside ? from[offset] : 0));
            if (inside) expected_to[offset] = from[offset];
          }
        }
        CHECK(copy == expected_copy);
      }
    }
  }
  emulator::set_seed(0);

  TensorRef broken = strided(from);
  broken.ptr = from + 1;
  CHECK(!tensor_map_able(broken, dims));
  broken = strided(from);
  broken.stride[1] = 0;
  CHECK(!tensor_map_able(broken, dims));
  broken.stride[1] = 4;
  CHECK(!tensor_map_able(broken, dims));
  const int64_t one_head[4] = {2, 1, 70, 72};
  CHECK(tensor_map_able(broken, one_head));
}

FASTATTN_KERNEL(32) bulk_kernel(const float* from, float* to) {
  FASTATTN_SHARED(shared);
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared + 256);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    // Expected in two parts, before the arrival.
    ptx::mbarrier_expect_tx(barrier, 128);
    ptx::mbarrier_arrive_expect_tx(barrier, 128);
    ptx::bulk_load(shared, from, 256, barrier);
  }
  __syncwarp();
  ptx::mbarrier_wait(barrier, 0);
  for (int n = static_cast<int>(threadIdx.x); n < 64; n += 32) to[n] = reinterpret_cast<const float*>(shared)[n];
}

void test_bulk_load() {
  alignas(16) float from[64];
  for (int n = 0; n < 64; ++n) from[n] = static_cast<float>(n);
  std::vector<float> to(64, -1.0f);
  launch("bulk", bulk_kernel, dim3(1), dim3(32), 264, nullptr, from, to.data());
  CHECK(std::equal(to.begin(), to.end(), from));
}

// ---- wgmma ----

// D [64][N] = A [64][64] * B [64][N] by four wgmma of depth 16. In shared memory, as TMA would write them: A as 64 rows
// of 128 bytes along k, or transposed as 64 rows k of 128 bytes along the rows of A; B as N rows along k, or transposed
// as boxes of 64 columns, each 64 rows k.
template <typename T>
FASTATTN_DEVICE void store_swizzled(unsigned char* tile, int row, int column, T value) {
  const int chunk = column / 8 ^ row % 8;
  std::memcpy(tile + 128 * row + 16 * chunk + 2 * (column % 8), &value, sizeof value);
}

template <typename T, int N, bool TransB, bool TransA, bool InRegisters>
FASTATTN_KERNEL(128) wgmma_kernel(const T* a, const T* b, float* out) {
  FASTATTN_SHARED(shared);
  unsigned char *const tile_a = shared, *const tile_b = shared + 8192;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = 2 * (thread % 4);
  for (int n = thread; n < 64 * 64; n += 128) {
    if (TransA) {
      store_swizzled(tile_a, n % 64, n / 64, a[n]);
    } else {
      store_swizzled(tile_a, n / 64, n % 64, a[n]);
    }
  }
  for (int n = thread; n < 64 * N; n += 128) {
    const int k = n / N, column = n % N;
    if (TransB) {
      store_swizzled(tile_b + 8192 * (column / 64), k, column % 64, b[n]);
    } else {
      store_swizzled(tile_b, column, k, b[n]);
    }
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[N / 2];
  for (float& value : d) value = 1.0f;  // must not count: the first product starts from zero
  ptx::wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const uint64_t descriptor_b = ptx::smem_descriptor(tile_b + k * (TransB ? 2048 : 32), 8192, 1024);
    if constexpr (InRegisters) {
      const auto pair = [&](int row, int column) {
        const T* const lo = a + 64 * (16 * warp + row) + 16 * k + column;
        return static_cast<uint32_t>(lo[0].bits) | static_cast<uint32_t>(lo[1].bits) << 16;
      };
      const uint32_t fragment[4] = {pair(g, t), pair(g + 8, t), pair(g, t + 8), pair(g + 8, t + 8)};
      ptx::wgmma_rs<T, N, TransB>(d, fragment, descriptor_b, k > 0);
    } else {
      const uint64_t descriptor_a = ptx::smem_descriptor(tile_a + k * (TransA ? 2048 : 32), 8192, 1024);
      ptx::wgmma<T, N, TransB, TransA>(d, descriptor_a, descriptor_b, k > 0);
    }
    if (k == 1) ptx::wgmma_commit();
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  ptx::wgmma_wait<0>();
  for (int m = 0; m < N / 8; ++m) {
    for (int r = 0; r < 4; ++r) out[(16 * warp + g + 8 * (r / 2)) * N + 8 * m + t + r % 2] = d[4 * m + r];
  }
}

template <typename T, int N, bool TransB, bool TransA, bool InRegisters>
void test_wgmma_form() {
  Random random(N);
  const std::vector<T> a = small_integers<T>(random, 64 * 64), b = small_integers<T>(random, 64 * N);
  std::vector<float> out(64 * N, NAN), expected(64 * N, 0.0f);
  for (size_t i = 0; i < 64; ++i) {
    for (size_t k = 0; k < 64; ++k) {
      for (size_t j = 0; j < N; ++j) expected[i * N + j] += to_float(a[64 * i + k]) * to_float(b[N * k + j]);
    }
  }
  const size_t shared_bytes = 8192 + (TransB ? (N + 63) / 64 * 8192 : N * 128);
  launch("wgmma", wgmma_kernel<T, N, TransB, TransA, InRegisters>, dim3(1), dim3(128), shared_bytes, nullptr, a.data(),
         b.data(), out.data());
  CHECK(out == expected);
}

template <typename T, int N>
void test_wgmma() {
  test_wgmma_form<T, N, false, false, false>();
  test_wgmma_form<T, N, true, false, false>();
  test_wgmma_form<T, N, false, true, false>();
  test_wgmma_form<T, N, true, true, false>();
  test_wgmma_form<T, N, false, false, true>();
  test_wgmma_form<T, N, true, false, true>();
}

// ---- planted faults, sm_80 ----

enum class Fault {
  kNone,
  // pipeline_kernel
  kNoBarrierAfterWait,
  kNoBarrierBeforeReuse,
  kNoWait,
  kWaitTooFew,
  kUnwaitedAtEnd,
  kMisalignedCopy,
  kCopyBeyondShared,
  kMisalignedMatrix,
  kMatrixBeyondShared,
  kWrongFragment,
  kSwappedFragment,
  kNoSyncWarp,
  kDivergedWarp,
  kDifferentCollectives,
  kReturnedLanes,
  kSkippedBarrier,
  kPartOfWarpAtBarrier,
  kBarrierCount,
  kStoreBeyondShared,
  // ring_kernel
  kNoFullWait,
  kNoEmptyWait,
  kFullParity,
  kEmptyParity,
  kTooManyBytes,
  kTooFewBytes,
  kTooFewArrivals,
  kTooManyArrivals,
  kUninitialised,
  kNoWgmmaWait,
  kNoWgmmaFence,
  kNoCommit,
  kWrongStride,
  kWrongDepthStep,
  kReleaseBeforeWait,
  kOneWarpReleases,
  kDifferentDescriptors,
  kMissingWarp,
  kMisalignedTile,
  kLoadNobodyWaitsFor,
};

constexpr int kTiles = 5;

// out [16][8] = sum over tiles of A [16][16] * B [8][16] transposed, tiles brought in by cp.async in two stages. Four
// warps load a quarter each; every warp multiplies all of it, and warp 3 writes.
FASTATTN_KERNEL(128) pipeline_kernel(const bfloat16* a, const bfloat16* b, float* out, Fault fault) {
  constexpr int kStage = 24 * 32;  // bytes of 24 rows of 16 elements
  FASTATTN_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4,
            t = 2 * (lane % 4);
  const auto load = [&](int tile) {
    unsigned char* const stage = shared + tile % 2 * kStage;
    // 48 chunks of 16 bytes, 12 to a warp.
    if (lane < 12 && tile < kTiles) {
      const int chunk = 12 * warp + lane;
      const bfloat16* const from = chunk < 32 ? a + tile * 256 + 8 * chunk : b + tile * 128 + 8 * (chunk - 32);
      ptx::cp_async16(stage + 16 * chunk, fault == Fault::kMisalignedCopy ? from + 1 : from, 16);
      if (fault == Fault::kCopyBeyondShared) ptx::cp_async16(shared + 2 * kStage, from, 16);
    }
    ptx::cp_async_commit();
  };
  float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  load(0);
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles || fault == Fault::kUnwaitedAtEnd) load(tile + 1 < kTiles ? tile + 1 : 0);
    if (fault == Fault::kWaitTooFew) {
      ptx::cp_async_wait<2>();
    } else if (fault != Fault::kNoWait) {
      if (tile + 1 < kTiles || fault == Fault::kUnwaitedAtEnd) {
        ptx::cp_async_wait<1>();
      } else {
        ptx::cp_async_wait<0>();
      }
    }
    if (fault != Fault::kNoBarrierAfterWait && !(fault == Fault::kSkippedBarrier && warp == 1 && tile == 2))
      __syncthreads();
    unsigned char* stage = shared + tile % 2 * kStage;
    if (fault == Fault::kMisalignedMatrix) stage += 8;
    if (fault == Fault::kMatrixBeyondShared) stage += kStage;
    uint32_t fragment_a[4], fragment_b[2];
    if (fault == Fault::kDivergedWarp && tile == 1 && lane == 9) __syncwarp();
    if (fault == Fault::kReturnedLanes && tile == 1 && lane == 9) {
      ptx::cp_async_wait<0>();
      return;
    }
    ptx::ldmatrix_x4(fragment_a, stage + 32 * (lane % 16) + 16 * (lane / 16));
    if (fault == Fault::kDifferentCollectives && lane >= 16) {
      ptx::ldmatrix_x2_trans(fragment_b, stage + 512 + 32 * (lane % 8) + 16 * (lane / 8 % 2));
    } else {
      ptx::ldmatrix_x2(fragment_b, stage + 512 + 32 * (lane % 8) + 16 * (lane / 8 % 2));
    }
    if (fault == Fault::kWrongFragment) std::swap(fragment_a[1], fragment_a[2]);
    if (fault == Fault::kSwappedFragment) std::swap(fragment_b[0], fragment_b[1]);
    ptx::mma_m16n8k16<bfloat16>(c, fragment_a, fragment_b[0], fragment_b[1]);
    if (fault != Fault::kNoBarrierBeforeReuse) __syncthreads();
  }
  if (fault == Fault::kNoWait) ptx::cp_async_wait<0>();
  __syncthreads();
  // Through shared memory to coalesced rows; a warp of its own.
  float* const rows = reinterpret_cast<float*>(shared);  // [16][8]
  if (fault == Fault::kPartOfWarpAtBarrier && lane < 16) ptx::named_barrier(2, 64);
  if (fault == Fault::kBarrierCount && warp == 0) ptx::named_barrier(2, 32 + 16);
  if (fault == Fault::kStoreBeyondShared && thread == 0) shared[2 * kStage] = 1;
  if (warp == 3) {
    rows[8 * g + t] = c[0];
    rows[8 * g + t + 1] = c[1];
    rows[8 * (g + 8) + t] = c[2];
    rows[8 * (g + 8) + t + 1] = c[3];
    if (fault != Fault::kNoSyncWarp) __syncwarp();
    for (int n = lane; n < 128; n += 32) out[n] = rows[n];
  }
}

struct PipelineProblem {
  std::vector<bfloat16> memory;
  std::vector<float> expected;
  bfloat16 *a, *b;

  PipelineProblem() : memory(kTiles * (256 + 128) + 8), expected(128, 0.0f) {
    Random random(11);
    memory = small_integers<bfloat16>(random, memory.size());
    a = reinterpret_cast<bfloat16*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
    b = a + kTiles * 256;
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 8; ++j) {
          for (int k = 0; k < 16; ++k) {
            expected[static_cast<size_t>(8 * i + j)] +=
                to_float(a[256 * tile + 16 * i + k]) * to_float(b[128 * tile + 16 * j + k]);
          }
        }
      }
    }
  }

  // Right result and no error.
  bool runs(Fault fault) const {
    std::vector<float> out(128, NAN);
    const std::string error = error_of([&] {
      launch("pipeline", pipeline_kernel, dim3(1), dim3(128), size_t{2} * 24 * 32, nullptr, a, b, out.data(), fault);
    });
    return error.empty() && out == expected;
  }
};

// ---- planted faults, sm_90 ----

struct RingParameters {
  TensorMap a, b;  // [1, 1, 64 * kTiles, 64] both: tile by tile
  float* out;      // [64][64]
  Fault fault;
};

// out = sum over tiles of A [64][64] * B [64][64] transposed. A producer warpgroup loads into a ring of two stages, a
// consumer warpgroup multiplies.
FASTATTN_KERNEL(256, 1) ring_kernel(const FASTATTN_GRID_CONSTANT RingParameters p) {
  constexpr uint32_t kTileBytes = 64 * 128;
  constexpr int kStages = 2;
  FASTATTN_SHARED(shared);
  const Fault fault = p.fault;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + 2 * kStages * kTileBytes);
  uint64_t* const empty = full + kStages;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int n = 0; n < kStages; ++n) {
      if (fault != Fault::kUninitialised) ptx::mbarrier_init(full + n, 1);
      ptx::mbarrier_init(empty + n, fault == Fault::kTooFewArrivals    ? 129
                                    : fault == Fault::kTooManyArrivals ? 64
                                                                       : 128);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (thread < 128) {
    ptx::setmaxnreg_dec<24>();
    if (thread == 0) {
      for (int tile = 0; tile < kTiles; ++tile) {
        const int stage = tile % kStages;
        const uint32_t parity = static_cast<uint32_t>(tile / kStages) & 1;
        if (fault != Fault::kNoEmptyWait)
          ptx::mbarrier_wait(empty + stage, fault == Fault::kEmptyParity ? parity : parity ^ 1);
        const uint32_t wrong = fault == Fault::kTooManyBytes  ? 16u
                               : fault == Fault::kTooFewBytes ? 0u - kTileBytes
                                                              : 0u;
        ptx::mbarrier_arrive_expect_tx(full + stage, 2 * kTileBytes + wrong);
        unsigned char* tile_a = shared + 2 * stage * kTileBytes;
        if (fault == Fault::kMisalignedTile) tile_a += 128;
        ptx::tma_load_4d(tile_a, &p.a, full + stage, 0, 64 * tile, 0, 0);
        ptx::tma_load_4d(shared + (2 * stage + 1) * kTileBytes, &p.b, full + stage, 0, 64 * tile, 0, 0);
      }
      if (fault == Fault::kLoadNobodyWaitsFor) {
        ptx::mbarrier_wait(empty, 1);
        ptx::mbarrier_wait(empty + 1, 1);
        ptx::tma_load_4d(shared, &p.a, full + 1, 0, 0, 0, 0);
      }
    }
    return;
  }
  ptx::setmaxnreg_inc<240>();
  const int warp = thread / 32 % 4, g = thread % 32 / 4, t = 2 * (thread % 4);
  float d[32];
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    const uint32_t parity = static_cast<uint32_t>(tile / kStages) & 1;
    if (fault == Fault::kMissingWarp && warp == 2 && tile == 1) continue;
    if (fault != Fault::kNoFullWait)
      ptx::mbarrier_wait(full + stage, fault == Fault::kFullParity ? parity ^ 1 : parity);
    if (fault != Fault::kNoWgmmaFence) ptx::wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      const int step = k * (fault == Fault::kWrongDepthStep ? 64 : 32);
      const uint32_t stride = fault == Fault::kWrongStride ? 512 : 1024;
      const unsigned char* const tile_a =
          shared + 2 * stage * kTileBytes + (fault == Fault::kDifferentDescriptors ? 32 * warp : 0);
      ptx::wgmma<bfloat16, 64, false>(d, ptx::smem_descriptor(tile_a + step, 16, stride),
                                      ptx::smem_descriptor(shared + (2 * stage + 1) * kTileBytes + step, 16, stride),
                                      tile > 0 || k > 0);
    }
    if (fault != Fault::kNoCommit) ptx::wgmma_commit();
    if (fault == Fault::kReleaseBeforeWait) ptx::mbarrier_arrive(empty + stage);
    if (fault != Fault::kNoWgmmaWait) ptx::wgmma_wait<0>();
    if (fault == Fault::kOneWarpReleases) {
      // The first warp to finish releases the stage for all four.
      if (warp == 0) {
        for (int n = 0; n < 4; ++n) ptx::mbarrier_arrive(empty + stage);
      }
    } else if (fault != Fault::kReleaseBeforeWait) {
      ptx::mbarrier_arrive(empty + stage);
    }
  }
  for (int m = 0; m < 8; ++m) {
    for (int r = 0; r < 4; ++r) p.out[(16 * warp + g + 8 * (r / 2)) * 64 + 8 * m + t + r % 2] = d[4 * m + r];
  }
  if (fault == Fault::kNoWgmmaWait) ptx::wgmma_wait<0>();
}

struct RingProblem {
  std::vector<bfloat16> memory;
  std::vector<float> expected;
  TensorMap a, b;

  RingProblem() : memory(2 * kTiles * 4096 + 8), expected(64 * 64, 0.0f) {
    Random random(12);
    memory = small_integers<bfloat16>(random, memory.size());
    bfloat16* const base = reinterpret_cast<bfloat16*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
    const int64_t dims[4] = {1, 1, 64 * kTiles, 64};
    const auto map = [&](bfloat16* from) {
      TensorRef tensor;
      tensor.ptr = from;
      tensor.dtype = DType::kBFloat16;
      const int64_t strides[4] = {0, 0, 64, 1};
      std::copy(strides, strides + 4, tensor.stride);
      return make_tensor_map(tensor, dims, 64);
    };
    a = map(base);
    b = map(base + kTiles * 4096);
    for (int tile = 0; tile < kTiles; ++tile) {
      const bfloat16 *const tile_a = base + 4096 * tile, *const tile_b = base + 4096 * (kTiles + tile);
      for (int i = 0; i < 64; ++i) {
        for (int j = 0; j < 64; ++j) {
          for (int k = 0; k < 64; ++k) {
            expected[static_cast<size_t>(64 * i + j)] += to_float(tile_a[64 * i + k]) * to_float(tile_b[64 * j + k]);
          }
        }
      }
    }
  }

  bool runs(Fault fault) const {
    std::vector<float> out(64 * 64, NAN);
    const RingParameters p = {a, b, out.data(), fault};
    const std::string error =
        error_of([&] { launch("ring", ring_kernel, dim3(1), dim3(256), 4 * 8192 + 32, nullptr, p); });
    return error.empty() && out == expected;
  }
};

// Without a fault the result is right under every seed. A fault is caught under the default seed, the one of the
// ordinary test run, and under most others.
template <typename Problem>
void test_faults(const Problem& problem, Fault first, Fault last) {
  int missed = 0, tried = 0;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulator::set_seed(seed);
    CHECK(problem.runs(Fault::kNone));
    for (int fault = static_cast<int>(first); fault <= static_cast<int>(last); ++fault, ++tried) {
#if defined(FASTATTN_ASAN)
      if (static_cast<Fault>(fault) == Fault::kStoreBeyondShared) continue;
#endif
      if (!problem.runs(static_cast<Fault>(fault))) continue;
      ++missed;
      if (!CHECK(seed != 0)) std::fprintf(stderr, "fault %d was not caught\n", fault);
    }
  }
  CHECK(missed <= tried / 20);
  emulator::set_seed(0);
}

// ---- errors of the launch ----

FASTATTN_KERNEL(32) trap_kernel(int thread) {
  if (static_cast<int>(threadIdx.x) == thread) __trap();
  __syncthreads();
}

FASTATTN_KERNEL(32) nothing_kernel(int) {}

// One producer and two consumer warpgroups; 64 Ki registers are there.
template <int kConsumer>
FASTATTN_KERNEL(384) register_kernel(bool half_of_them) {
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<24>();
  } else if (!half_of_them || threadIdx.x % 128 < 64) {
    ptx::setmaxnreg_inc<kConsumer>();
  }
}

void test_launch_errors() {
  const std::string trap = error_of([] { launch("the_kernel", trap_kernel, dim3(2, 3), dim3(32), 0, nullptr, 5); });
  CHECK(contains(trap, "the_kernel") && contains(trap, "block (0, 0, 0)") && contains(trap, "lane 5"));
  const auto refused = [](dim3 grid, dim3 block, size_t bytes) {
    return !error_of([&] { launch("nothing", nothing_kernel, grid, block, bytes, nullptr, 0); }).empty();
  };
  CHECK(!refused(dim3(1), dim3(32), 227 * 1024));
  CHECK(refused(dim3(1), dim3(32), 227 * 1024 + 1));
  CHECK(refused(dim3(1), dim3(1056), 0));
  CHECK(refused(dim3(1, 65536), dim3(32), 0));
  CHECK(refused(dim3(0), dim3(32), 0));
  const auto registers = [](auto kernel, bool half_of_them) {
    return error_of([&] { launch("registers", kernel, dim3(1), dim3(384), 0, nullptr, half_of_them); });
  };
  CHECK(registers(register_kernel<240>, false).empty());
  CHECK(contains(registers(register_kernel<256>, false), "setmaxnreg"));
  CHECK(contains(registers(register_kernel<240>, true), "setmaxnreg"));
  setenv("FASTATTN_EMULATE_CAPABILITY", "80", 1);
  CHECK(device_info().capability == 80);
  CHECK(contains(registers(register_kernel<240>, false), "capability 80"));
  CHECK(!refused(dim3(1), dim3(32), 163 * 1024));
  CHECK(refused(dim3(1), dim3(32), 163 * 1024 + 1));
  unsetenv("FASTATTN_EMULATE_CAPABILITY");
  CHECK(device_info().capability == 90);
}

// ---- launches from two OS threads at once ----

void test_two_threads() {
  const RingProblem ring;
  const PipelineProblem pipeline;
  int good[2] = {0, 0};
  constexpr int kRounds = 8;
  std::thread other([&] {
    for (int n = 0; n < kRounds; ++n) good[1] += pipeline.runs(Fault::kNone) && !pipeline.runs(Fault::kSkippedBarrier);
  });
  for (int n = 0; n < kRounds; ++n) good[0] += ring.runs(Fault::kNone) && !ring.runs(Fault::kTooManyBytes);
  other.join();
  CHECK(good[0] == kRounds && good[1] == kRounds);
}

}  // namespace
}  // namespace fastattn::cuda

int main() {
  using namespace fastattn::cuda;
  test_conversion<bfloat16>(7, 127);
  test_conversion<half>(10, 15);
  test_indices();
  test_collectives();
  test_named_barriers();
  test_atomics();
  test_copy();
  test_load_matrix();
  test_multiply<bfloat16>();
  test_multiply<half>();
  test_exp2();
  test_tensor_copies();
  test_bulk_load();
  test_wgmma<bfloat16, 16>();
  test_wgmma<half, 64>();
  test_wgmma<bfloat16, 80>();
  test_wgmma<bfloat16, 128>();
  test_wgmma<half, 192>();
  test_wgmma<bfloat16, 256>();
  test_faults(PipelineProblem(), Fault::kNoBarrierAfterWait, Fault::kStoreBeyondShared);
  test_faults(RingProblem(), Fault::kNoFullWait, Fault::kLoadNobodyWaitsFor);
  test_launch_errors();
  test_two_threads();
  return fastattn::test::result("emulator_test");
}
