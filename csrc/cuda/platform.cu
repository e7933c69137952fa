// The calls of the CUDA runtime behind platform.h. Nothing here links to the driver library.
#include "hopper.h"

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
  throw LaunchError(std::string("launch of ") + name + " with grid " + describe(grid) + ", block " + describe(block) +
                    " and " + std::to_string(shared_bytes) +
                    " bytes of shared memory failed: " + cudaGetErrorString(error));
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

namespace {

// cuTensorMapEncodeTiled of the driver that is running.
decltype(&cuTensorMapEncodeTiled) encode_function() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found),
          "cudaGetDriverEntryPoint");
#endif
    if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
      throw LaunchError("the CUDA driver has no cuTensorMapEncodeTiled; it is older than CUDA 12");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return function;
}

}  // namespace

TensorMap make_tensor_map(const TensorRef& tensor, const int64_t (&dims)[4], int box_rows, int box_columns) {
  if (!tensor_map_able(tensor, dims)) throw LaunchError("make_tensor_map: TMA cannot read this tensor in place");
  constexpr int64_t kElementBytes = 2;
  cuuint64_t size[4], stride_bytes[3];  // from the columns outwards; the stride of the columns is implied
  for (int n = 0; n < 4; ++n) size[n] = static_cast<cuuint64_t>(dims[3 - n]);
  uint64_t inner = static_cast<uint64_t>(dims[3]) * kElementBytes;  // bytes of what lies inside of dimension n
  for (int n = 1; n < 4; ++n) {
    // The stride of a dimension of size 1 is never used, but has to be acceptable: a multiple of 16 that is not smaller than
    // the dimension inside.
    stride_bytes[n - 1] =
        dims[3 - n] == 1 ? (inner + 15) / 16 * 16 : static_cast<cuuint64_t>(tensor.stride[3 - n] * kElementBytes);
    inner = stride_bytes[n - 1] * size[n];
  }
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_stride[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result = encode_function()(
      &map, tensor.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      tensor.ptr, size, stride_bytes, box, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw LaunchError("cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(result)) +
                      " for a tensor of " + std::to_string(dims[0]) + " x " + std::to_string(dims[1]) + " x " +
                      std::to_string(dims[2]) + " x " + std::to_string(dims[3]) + ", box " + std::to_string(box_rows) +
                      " x " + std::to_string(box_columns));
  }
  return map;
}

void zero_async(void* ptr, size_t bytes, void* stream) {
  check(cudaMemsetAsync(ptr, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

}  // namespace fastattn::cuda

#endif
