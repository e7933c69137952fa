// The only file of the CUDA kernels that knows which compiler reads it. A kernel source is compiled by nvcc for a GPU
// and, unchanged, by a C++17 compiler with -DFASTATTN_EMULATE for the emulator (emulator/emulator.h), which needs no
// CUDA toolkit. A plain C++ file without either may use the first part, the host interface.
//
// Rules for a kernel source:
//   * shared memory only through FASTATTN_SHARED: a static __shared__ array does not compile under the emulator;
//   * a TensorMap, or a struct that contains one, is a kernel parameter `const FASTATTN_GRID_CONSTANT T name`;
//   * inline PTX only in ptx.h and hopper.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastattn::cuda {

// ---- host interface ----

// A kernel could not be launched, or a call of the CUDA runtime failed.
class LaunchError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct DeviceInfo {
  int capability = 0;  // major * 10 + minor
  int multiprocessors = 0;
  size_t shared_bytes_per_block_optin = 0;  // most dynamic shared memory that a block can ask for
};

// Of the current device; asked once per device. The emulator is a device of capability 90, or of the value of
// FASTATTN_EMULATE_CAPABILITY (80, 90 or 100). Throws LaunchError.
DeviceInfo device_info();

// Writes zeros in the order of the stream. Throws LaunchError.
void zero_async(void* ptr, size_t bytes, void* stream);

}  // namespace fastattn::cuda

#if defined(FASTATTN_EMULATE)
#include "emulator/emulator.h"
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

#if defined(FASTATTN_EMULATE) || defined(__CUDACC__)

// ---- words that the two compilers spell differently ----

#if defined(FASTATTN_EMULATE)
#define FASTATTN_DEVICE static inline
#define FASTATTN_KERNEL(...) void
#define FASTATTN_GRID_CONSTANT
#define FASTATTN_SHARED(name) unsigned char* const name = ::fastattn::cuda::emulator::shared_memory()
#define FASTATTN_UNROLL
#else
// Device functions; as members of a class use FASTATTN_DEVICE_MEMBER.
#define FASTATTN_DEVICE static __device__ __forceinline__
// FASTATTN_KERNEL(threads) or FASTATTN_KERNEL(threads, min_blocks), in the place of the return type.
#define FASTATTN_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define FASTATTN_GRID_CONSTANT __grid_constant__
// Declares `name`, the dynamic shared memory of the block: bytes, aligned to 1024 (what TMA and wgmma want at most).
#define FASTATTN_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define FASTATTN_UNROLL _Pragma("unroll")
#endif

#if defined(FASTATTN_EMULATE)
#define FASTATTN_DEVICE_MEMBER inline
#else
#define FASTATTN_DEVICE_MEMBER __device__ __forceinline__
#endif

namespace fastattn::cuda {

// ---- 16-bit floating point: storage only, arithmetic is in float ----

struct alignas(2) bfloat16 {
  uint16_t bits;
};

struct alignas(2) half {
  uint16_t bits;
};

FASTATTN_DEVICE float to_float(float x) { return x; }

FASTATTN_DEVICE float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

FASTATTN_DEVICE float to_float(half x) {
#if defined(FASTATTN_EMULATE)
  return emulator::float_from_half_bits(x.bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// Rounds to the nearest value, ties to even; every NaN becomes 0x7fff in 16 bits, as the hardware does.
template <typename T>
FASTATTN_DEVICE T from_float(float x) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, bfloat16> || std::is_same_v<T, half>);
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T y;
#if defined(FASTATTN_EMULATE)
    y.bits = std::is_same_v<T, bfloat16> ? emulator::bfloat16_bits(x) : emulator::half_bits(x);
#else
    if constexpr (std::is_same_v<T, bfloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    }
#endif
    return y;
  }
}

// Two values in one register, lo in the lower half: the element order of memory and of the matrix fragments.
template <typename T>
FASTATTN_DEVICE uint32_t pack2(float lo, float hi) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>);
#if defined(FASTATTN_EMULATE)
  return static_cast<uint32_t>(from_float<T>(lo).bits) | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
#else
  uint32_t packed;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  }
  return packed;
#endif
}

template <typename T>
FASTATTN_DEVICE float2 unpack2(uint32_t packed) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>);
  const T lo{static_cast<uint16_t>(packed & 0xffffu)}, hi{static_cast<uint16_t>(packed >> 16)};
  return make_float2(to_float(lo), to_float(hi));
}

// ---- launching ----

#if !defined(FASTATTN_EMULATE)
// Throws LaunchError with the kernel, its configuration and CUDA's message, unless `error` is cudaSuccess.
void check_launch(cudaError_t error, const char* name, dim3 grid, dim3 block, size_t shared_bytes);
#endif

// Runs `kernel` with `arguments` on the stream (a cudaStream_t; the emulator runs it at once). No dimension of the grid
// may be 0. Throws LaunchError, or EmulationError where the emulated kernel did something wrong.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
#if defined(FASTATTN_EMULATE)
  static_cast<void>(stream);
  auto thread = [&] { kernel(static_cast<std::decay_t<Parameters>>(arguments)...); };
  emulator::run(
      name, grid, block, shared_bytes, [](void* body) { (*static_cast<decltype(thread)*>(body))(); }, &thread);
#else
  // Up to 48 KiB a kernel may use without asking.
  if (shared_bytes > 48 * 1024) {
    check_launch(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), name,
        grid, block, shared_bytes);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<std::decay_t<Parameters>>(arguments)...);
  check_launch(cudaGetLastError(), name, grid, block, shared_bytes);
#endif
}

}  // namespace fastattn::cuda

#endif
