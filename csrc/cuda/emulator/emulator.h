// Executes CUDA kernels on the CPU, to test them where there is no GPU: every CUDA thread is a fiber, the blocks of a
// grid run one after another, barriers and warp collectives are meeting points of fibers.
//
// It is a tester, not a simulator of speed. What the hardware leaves open is decided against the kernel:
//   * one warp runs as far ahead as it can, the lanes of a warp run in a random order between two collectives, and odd
//   seeds
//     run the blocks of the grid in reverse; FASTATTN_EMULATE_SEED chooses the seed (default 0);
//   * dynamic shared memory is exactly as large as asked for and starts as NaN in every float type;
//   * the destination of an asynchronous copy (cp.async, TMA) is NaN from the issue until the copy lands, which happens
//   as
//     late as the waits of the kernel allow, or for TMA at a random time, in a random order;
//   * wgmma reads shared memory only when its warp waits for it, and its accumulators are NaN until then.
// Misuse (a deadlock, diverged lanes in a collective, a misaligned or foreign address, too much shared memory, a copy
// nobody waited for, a barrier with too many arrivals, ...) throws EmulationError out of launch(), which names the
// kernel, the block and the thread.
//
// Not seen without the race check (race_check.cpp): missing synchronisation that every schedule tried survives, a
// missing proxy fence. Not seen at all: bank conflicts, register pressure, the memory model of several blocks (they run
// one after another), a thread that spins on plain memory (it hangs). exp2 is as exact as the C library where the
// hardware approximates, and tensor cores add in another order.
//
// How to build:
//   * every csrc/cuda/*.cu as C++17 with -DFASTATTN_EMULATE -fno-strict-aliasing (kernels read shared memory as several
//   types)
//     -Wno-unknown-pragmas, and the sources of this folder with the same definition. Never -ffast-math.
//   * race check: the kernels with -fsanitize=thread -fno-builtin-memset (a loop of stores turned into a call is not
//   seen) at
//     compile time, this folder without it, and no sanitizer at link time.
//   * address and undefined-behaviour sanitizers: everything with the same flags.
// Included by platform.h only.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace fastattn::cuda {

// An emulated kernel did something that is wrong on a GPU. what() names the kernel, the block and the thread.
class EmulationError : public LaunchError {
 public:
  using LaunchError::LaunchError;
};

// ---- the types of the CUDA headers that kernels use ----

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace emulator {

// ---- launching ----

// Runs body(context) once for every thread of the grid.
void run(const char* kernel_name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);

// The seed of the schedule for the launches of this OS thread from now on, in the place of FASTATTN_EMULATE_SEED.
void set_seed(uint64_t seed);

// ---- what a running thread may ask ----

struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
};

// Plain thread-local pointers: a fiber never moves to another OS thread.
extern __thread const Position* position;

unsigned char* shared_memory();

// Ends the launch with an EmulationError. Called on a fiber it does not return and does not unwind the fiber's stack:
// kernels may be compiled without exceptions, and their frames own nothing.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- meeting points ----

// A warp collective: `run` computes it for all lanes of the mask at once, when the last of them has arrived. `operands`
// holds what each lane of the mask passed.
struct Collective {
  const char* name;
  void (*run)(uint32_t mask, void* const (&operands)[32]);
};

void warp_collective(const Collective& collective, uint32_t mask, void* operands);

void block_barrier();                            // __syncthreads
void named_barrier(int id, int threads);         // bar.sync
void named_barrier_arrive(int id, int threads);  // bar.arrive

enum class Shuffle { kIndex, kXor, kUp, kDown };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument);
uint32_t ballot(uint32_t mask, bool predicate);
uint32_t reduce_or(uint32_t mask, uint32_t value);
void sync_warp(uint32_t mask);

// For the race check: an atomic operation touches this address; __threadfence.
void note_atomic(const void* address, size_t bytes);
void note_device_fence();

// ---- 16-bit conversions ----

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_half_bits(uint16_t half_bits) {
  // The exponent and the mantissa in the place that float has for them mean 2^-112 of the value; the multiplication is
  // exact and normalises subnormals. Infinity and NaN keep their all-ones exponent by hand.
  const uint32_t magnitude = static_cast<uint32_t>(half_bits & 0x7fffu) << 13;
  uint32_t bits = bits_of_float(float_from_bits(magnitude) * 0x1p112f);
  if (magnitude >= (0x7c00u << 13)) bits |= 0x7f800000u;
  return float_from_bits(bits | static_cast<uint32_t>(half_bits & 0x8000u) << 16);
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  // Adding just under half of the last place kept, plus its parity, carries exactly when the value rounds up.
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t half_bits(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 2^16 and more
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the low mantissa bits, rounded by the adder.
    const uint32_t rounded = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);  // may carry up to infinity, as it must
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

}  // namespace emulator

// ---- CUDA's names ----

#define threadIdx (::fastattn::cuda::emulator::position->thread)
#define blockIdx (::fastattn::cuda::emulator::position->block)
#define blockDim (::fastattn::cuda::emulator::position->block_size)
#define gridDim (::fastattn::cuda::emulator::position->grid_size)

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulator::sync_warp(mask); }
inline void __threadfence() { emulator::note_device_fence(); }
[[noreturn]] inline void __trap() { emulator::fail("__trap"); }

namespace emulator {
template <typename T>
inline T shuffle_value(Shuffle kind, uint32_t mask, T value, int argument) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, argument);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emulator

template <typename T>
inline T __shfl_sync(uint32_t mask, T value, int source) {
  return emulator::shuffle_value(emulator::Shuffle::kIndex, mask, value, source);
}
template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  return emulator::shuffle_value(emulator::Shuffle::kXor, mask, value, lane_mask);
}
template <typename T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta) {
  return emulator::shuffle_value(emulator::Shuffle::kUp, mask, value, static_cast<int>(delta));
}
template <typename T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta) {
  return emulator::shuffle_value(emulator::Shuffle::kDown, mask, value, static_cast<int>(delta));
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) { return emulator::ballot(mask, predicate != 0); }
inline int __any_sync(uint32_t mask, int predicate) { return emulator::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return emulator::ballot(mask, predicate != 0) == mask; }
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value) { return emulator::reduce_or(mask, value); }

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }

inline uint32_t __float_as_uint(float x) { return emulator::bits_of_float(x); }
inline float __uint_as_float(uint32_t x) { return emulator::float_from_bits(x); }
inline int __float_as_int(float x) { return static_cast<int>(emulator::bits_of_float(x)); }
inline float __int_as_float(int x) { return emulator::float_from_bits(static_cast<uint32_t>(x)); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
// The product is exact in double. The C library's fmaf is a function call where the compiler may not assume an FMA
// unit.
inline float fmaf(float x, float y, float z) { return static_cast<float>(static_cast<double>(x) * y + z); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}

// CUDA's min and max: both arguments of one type.
template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

// Only the integer atomics, whose result does not depend on the order: a float atomic would make a sum depend on it.
namespace emulator {
template <typename T, typename Operation>
__attribute__((no_sanitize("thread"))) inline T atomic(T* address, Operation operation) {
  static_assert(std::is_integral_v<T>, "a float atomic is not deterministic");
  note_atomic(address, sizeof(T));
  const T old = *address;
  *address = operation(old);
  return old;
}
}  // namespace emulator

template <typename T>
inline T atomicAdd(T* address, T value) {
  return emulator::atomic(address, [value](T old) { return static_cast<T>(old + value); });
}
template <typename T>
inline T atomicOr(T* address, T value) {
  return emulator::atomic(address, [value](T old) { return static_cast<T>(old | value); });
}
template <typename T>
inline T atomicAnd(T* address, T value) {
  return emulator::atomic(address, [value](T old) { return static_cast<T>(old & value); });
}
template <typename T>
inline T atomicMax(T* address, T value) {
  return emulator::atomic(address, [value](T old) { return old < value ? value : old; });
}
template <typename T>
inline T atomicMin(T* address, T value) {
  return emulator::atomic(address, [value](T old) { return value < old ? value : old; });
}

}  // namespace fastattn::cuda
