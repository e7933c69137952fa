// The calls of the CUDA runtime behind platform.h. Nothing here links to the driver library.
#include "platform.h"

#if !defined(FASTATTN_EMULATE)

#include <mutex>
#include <vector>

namespace fastattn::cuda {
namespace {

std::string describe(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw LaunchError(std::string(call) + " failed: " + cudaGetErrorString(error));
}

}  // namespace

void check_launch(cudaError_t error, const char* name, dim3 grid, dim3 block, size_t shared_bytes) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forget the error, or the next launch would report it as its own
  throw LaunchError(std::string("launch of ") + name + " with grid " + describe(grid) + ", block " + describe(block) + " and " +
                    std::to_string(shared_bytes) + " bytes of shared memory failed: " + cudaGetErrorString(error));
}

DeviceInfo device_info() {
  static std::mutex mutex;
  static std::vector<DeviceInfo> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(device) >= known.size()) known.resize(static_cast<size_t>(device) + 1);
  DeviceInfo& info = known[static_cast<size_t>(device)];
  if (info.capability == 0) {
    const auto attribute = [device](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return value;
    };
    DeviceInfo fresh;
    fresh.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    fresh.shared_bytes_per_block_optin = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    fresh.capability = attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor);
    info = fresh;
  }
  return info;
}

void zero_async(void* ptr, size_t bytes, void* stream) {
  check(cudaMemsetAsync(ptr, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

}  // namespace fastattn::cuda

#endif
