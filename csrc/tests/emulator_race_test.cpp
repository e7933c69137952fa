// The race check of the emulator: kernels with and without races, and what it says about them. Compiled with
// -fsanitize=thread, and linked without it (csrc/cuda/emulator/emulator.h).
#include <functional>
#include <string>
#include <vector>

#include "../cuda/emulator/block.h"
#include "../cuda/hopper.h"
#include "check.h"

namespace fastattn::cuda {
namespace {

constexpr uint64_t kSeeds = 4;

// What the kernel is planted with; kNone has to pass.
enum class Fault {
  kNone,
  kNoBlockBarrier,
  kNoWarpBarrier,
  kNoBarrierBeforeReuse,
  kSameElement,
  kPlainBesideAtomic,
  kNoCopyBarrier,
  kMatrixTooEarly,
  kNoProxyFence,
  kFenceBeforeWrite,
  kNoStoreFence,
  kWrongBarrier,
  kLast = kWrongBarrier,
};

// Does a little of everything that needs an order, and nothing with the values: the check looks at accesses alone, so
// it finds what a lucky schedule hides.
FASTATTN_KERNEL(128)
shared_kernel(const FASTATTN_GRID_CONSTANT TensorMap map, const bfloat16* from, float* sink, Fault fault) {
  FASTATTN_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  unsigned char* const tile = shared;                             // [64] rows of 128 bytes
  float* const values = reinterpret_cast<float*>(shared + 8192);  // [128]
  unsigned char* const bytes = shared + 8192 + 512;               // [128]
  unsigned* const bits = reinterpret_cast<unsigned*>(shared + 8192 + 640);
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared + 8192 + 648);
  uint64_t* const idle = barrier + 1;

  // Stores, then loads of what others stored.
  values[fault == Fault::kSameElement ? thread / 2 : thread] = 1.0f;
  bytes[thread] = 1;  // neighbouring bytes of several threads are no race
  if (thread == 0) {
    *bits = 0;
    ptx::mbarrier_init(barrier, 128);
    ptx::mbarrier_init(idle, 128);
    ptx::fence_mbarrier_init();
  }
  if (fault == Fault::kNoBlockBarrier) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  float sum = values[thread ^ 64] + static_cast<float>(bytes[127 - thread]);
  __syncthreads();
  values[thread] = sum;
  if (fault != Fault::kNoWarpBarrier) __syncwarp();
  sum += values[thread ^ 1];
  if (fault != Fault::kNoBarrierBeforeReuse) __syncthreads();
  values[(thread + 64) % 128] = 0.0f;

  // Atomics do not race with each other.
  atomicOr(bits, 1u << lane);
  if (fault == Fault::kPlainBesideAtomic && thread == 40) *bits = 3;
  __syncthreads();
  sum += static_cast<float>(*bits);

  // A copy is known to its own thread after the wait, to the others after a barrier.
  for (int row = thread / 8; row < 64; row += 16) {
    ptx::cp_async16(tile + 128 * row + 16 * (thread % 8), from + 64 * row + 8 * (thread % 8), 16);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  sum += static_cast<float>(tile[128 * (thread / 8) + 16 * (thread % 8)]);
  if (fault != Fault::kNoCopyBarrier) __syncthreads();
  uint32_t fragment[4];
  ptx::ldmatrix_x4(fragment, tile + 128 * lane);
  sum += static_cast<float>(fragment[0] & 1);

  // Rows that a warp writes and reads itself.
  __syncthreads();
  for (int n = 0; n < 8; ++n) *reinterpret_cast<uint32_t*>(tile + 64 * thread + 4 * n) = 0;
  if (fault != Fault::kMatrixTooEarly) __syncwarp();
  ptx::ldmatrix_x4(fragment, tile + 128 * (thread / 32 * 16 + lane % 16));
  __syncthreads();

  // Stores that wgmma reads; the hand-over is a barrier in shared memory here.
  if (fault == Fault::kFenceBeforeWrite) ptx::fence_proxy_async();
  for (int n = 0; n < 64; n += 8) *reinterpret_cast<uint64_t*>(tile + 64 * thread + n) = 0;
  if (fault != Fault::kNoProxyFence && fault != Fault::kFenceBeforeWrite) ptx::fence_proxy_async();
  ptx::mbarrier_arrive(barrier);
  if (fault == Fault::kWrongBarrier) {
    ptx::mbarrier_wait(idle, 1);
  } else {
    ptx::mbarrier_wait(barrier, 0);
  }
  float d[32];
  ptx::wgmma_fence();
  ptx::wgmma<bfloat16, 64, false>(d, ptx::smem_descriptor(tile, 16, 1024), ptx::smem_descriptor(tile, 16, 1024), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  sum += d[0];
  __syncthreads();

  // Stores that TMA reads.
  for (int n = 0; n < 64; n += 4) *reinterpret_cast<uint32_t*>(tile + 64 * thread + n) = 0;
  if (fault != Fault::kNoStoreFence) ptx::fence_proxy_async();
  __syncthreads();
  if (thread == 0) {
    ptx::tma_store_4d(&map, tile, 0, 0, 0, 0);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
  sink[128 * blockIdx.x + thread] = sum;
}

// Each block adds to elements of its own (0), or all to the same (1), or some read what another writes (2).
FASTATTN_KERNEL(32) global_kernel(float* sums, int* counter, int mode) {
  atomicAdd(counter, 1);
  const unsigned slot = mode == 0 ? blockIdx.x * 32 + threadIdx.x : threadIdx.x;
  if (mode == 2) {
    // One block writes what another reads.
    if (blockIdx.x == 0) {
      sums[threadIdx.x] = 1.0f;
    } else {
      sums[blockIdx.x * 32 + threadIdx.x] = sums[threadIdx.x];
    }
  } else {
    sums[slot] += 1.0f;
  }
}

// The block that is done last adds what all blocks have left, each in its slot. Fences and the counter order that.
FASTATTN_KERNEL(32) last_block_kernel(float* slots, int* counter, float* sum, bool first_fence, bool second_fence) {
  FASTATTN_SHARED(shared);
  int* const is_last = reinterpret_cast<int*>(shared);
  if (threadIdx.x == 3) {
    slots[blockIdx.x] = static_cast<float>(blockIdx.x);
    if (first_fence) __threadfence();
    *is_last = atomicAdd(counter, 1) + 1 == static_cast<int>(gridDim.x);
  }
  __syncthreads();
  if (!*is_last) return;
  if (second_fence) __threadfence();
  if (threadIdx.x == 5) {
    for (unsigned n = 0; n < gridDim.x; ++n) *sum += slots[n];
  }
}

// Thread 0 loads a tile again while others may still read it, unless they released it.
FASTATTN_KERNEL(64) stage_kernel(const FASTATTN_GRID_CONSTANT TensorMap map, float* sink, bool release) {
  FASTATTN_SHARED(shared);
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + 8192);
  uint64_t* const empty = full + 1;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, release ? 64 : 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  float sum = 0.0f;
  for (uint32_t round = 0; round < 2; ++round) {
    if (thread == 0) {
      ptx::mbarrier_wait(empty, round ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, 8192);
      ptx::tma_load_4d(shared, &map, full, 0, 0, 0, 0);
    }
    ptx::mbarrier_wait(full, round);
    sum += static_cast<float>(shared[128 * thread]);
    if (release || thread == 63) ptx::mbarrier_arrive(empty);
  }
  sink[thread] = sum;
}

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const EmulationError& error) {
    return error.what();
  }
  return "";
}

bool is_race(const std::string& message) { return message.compare(0, 4, "race") == 0; }

}  // namespace
}  // namespace fastattn::cuda

int main() {
  using namespace fastattn::cuda;
  using fastattn::TensorRef;
  CHECK(emulator::race_observer != nullptr);

  alignas(16) static bfloat16 memory[64 * 64] = {}, written[64 * 64] = {};
  TensorRef tensor;
  tensor.ptr = written;
  tensor.dtype = fastattn::DType::kBFloat16;
  tensor.stride[2] = 64;
  tensor.stride[3] = 1;
  const int64_t dims[4] = {1, 1, 64, 64};
  const TensorMap map = make_tensor_map(tensor, dims, 64);
  std::vector<float> sink(128);

  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulator::set_seed(seed);
    for (int n = 0; n <= static_cast<int>(Fault::kLast); ++n) {
      const Fault fault = static_cast<Fault>(n);
      const std::string message = error_of([&] {
        launch("shared", shared_kernel, dim3(1), dim3(128), 8192 + 648 + 16, nullptr, map,
               static_cast<const bfloat16*>(memory), sink.data(), fault);
      });
      if (!CHECK(fault == Fault::kNone ? message.empty() : is_race(message))) {
        std::fprintf(stderr, "fault %d, seed %d: %s\n", n, static_cast<int>(seed), message.c_str());
      }
    }
    for (int mode = 0; mode < 3; ++mode) {
      std::vector<float> sums(4 * 32, 0.0f);
      int counter = 0;
      const std::string message = error_of(
          [&] { launch("global", global_kernel, dim3(4), dim3(32), 0, nullptr, sums.data(), &counter, mode); });
      if (!CHECK(mode == 0 ? message.empty() : is_race(message)))
        std::fprintf(stderr, "mode %d: %s\n", mode, message.c_str());
    }
    for (int fences = 0; fences < 4; ++fences) {
      std::vector<float> slots(4, 0.0f);
      int counter = 0;
      float sum = 0.0f;
      const std::string message = error_of([&] {
        launch("last_block", last_block_kernel, dim3(4), dim3(32), 4, nullptr, slots.data(), &counter, &sum,
               (fences & 1) != 0, (fences & 2) != 0);
      });
      if (!CHECK(fences == 3 ? message.empty() && sum == 6.0f : is_race(message))) {
        std::fprintf(stderr, "fences %d: %s\n", fences, message.c_str());
      }
    }
    for (const bool release : {true, false}) {
      const std::string message = error_of(
          [&] { launch("stage", stage_kernel, dim3(1), dim3(64), 8192 + 16, nullptr, map, sink.data(), release); });
      if (!CHECK(release ? message.empty() : !message.empty()))
        std::fprintf(stderr, "release %d: %s\n", release, message.c_str());
    }
  }
  return fastattn::test::result("emulator_race_test");
}
