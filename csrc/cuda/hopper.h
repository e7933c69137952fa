// The PTX instructions of sm_90a that the Hopper kernels use: barriers in shared memory, TMA, warpgroup matrix
// products. Inline assembly for the GPU, the emulator's function elsewhere.
//
// A file that includes this compiles for every architecture; the body of a kernel that uses it belongs under
// `#if FASTATTN_HOPPER`, so that it is empty where the instructions do not exist:
//
//   FASTATTN_KERNEL(384, 1) kernel(const FASTATTN_GRID_CONSTANT Parameters p) {
//   #if FASTATTN_HOPPER
//     ...
//   #endif
//   }
#pragma once

#include "../core/params.h"
#include "ptx.h"

#if defined(FASTATTN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTATTN_HOPPER 1
#else
#define FASTATTN_HOPPER 0
#endif

#if !defined(FASTATTN_EMULATE)
#include <cuda.h>  // CUtensorMap; nothing links to the driver library
#endif

namespace fastattn::cuda {

// ---- tensor maps (host) ----

#if defined(FASTATTN_EMULATE)
using TensorMap = EmulatedTensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// Most columns of 2 bytes in a box: the 128 bytes of a swizzled row.
constexpr int kTensorMapColumns = 64;
constexpr int kTensorMapRows = 256;  // most rows in a box

// Whether TMA can read and write this [batch, head, row, column] tensor of 16-bit elements in place: address and
// strides multiples of 16 bytes, contiguous columns, no broadcast or reversed dimension, sizes that fit. A dimension of
// size 1 may have any stride. An empty tensor is not possible.
inline bool tensor_map_able(const TensorRef& tensor, const int64_t (&dims)[4]) {
  constexpr int64_t kMaxSize = int64_t{1} << 31, kMaxStrideBytes = int64_t{1} << 40;
  if (tensor.dtype != DType::kBFloat16 && tensor.dtype != DType::kFloat16) return false;
  if (reinterpret_cast<uintptr_t>(tensor.ptr) % 16 != 0 || tensor.ptr == nullptr) return false;
  if (tensor.stride[3] != 1 && dims[3] != 1) return false;
  for (int n = 0; n < 4; ++n) {
    if (dims[n] < 1 || dims[n] > kMaxSize) return false;
    if (n == 3 || dims[n] == 1) continue;
    const int64_t bytes = tensor.stride[n] * 2;
    if (bytes <= 0 || bytes % 16 != 0 || bytes >= kMaxStrideBytes) return false;
  }
  return true;
}

// The map of boxes of box_rows x box_columns elements (one head, one batch item), 128-byte swizzled in shared memory:
// row r of a box lies at byte r * 128, with 16-byte chunk c of it at chunk c ^ (r & 7); box_columns is
// kTensorMapColumns. A wider tile is several boxes. Elements beyond the ends of the tensor are read as 0 and not
// written. dims and tensor.stride are in the order batch, head, row, column. Throws LaunchError unless
// tensor_map_able().
TensorMap make_tensor_map(const TensorRef& tensor, const int64_t (&dims)[4], int box_rows,
                          int box_columns = kTensorMapColumns);

namespace ptx {

// ---- barriers in shared memory ----
//
// A barrier counts the arrivals of its phase and the bytes that TMA still owes. When both are done the phase ends and
// the next begins with the same count. Waiting takes the parity of the phase waited for: 0 for the first, then 1, 0,
// ... A wait for parity 1 on a fresh barrier returns at once, which is how a ring of free stages starts.

FASTATTN_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
#if defined(FASTATTN_EMULATE)
  emulator::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Makes initialised barriers known to TMA; the other threads still need __syncthreads.
FASTATTN_DEVICE void fence_mbarrier_init() {
#if defined(FASTATTN_EMULATE)
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

FASTATTN_DEVICE void mbarrier_arrive(uint64_t* barrier) {
#if defined(FASTATTN_EMULATE)
  emulator::mbarrier_arrive(barrier);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives, and makes the phase wait for `bytes` more bytes of TMA.
FASTATTN_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
#if defined(FASTATTN_EMULATE)
  emulator::mbarrier_expect(barrier, bytes, true);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Makes the phase wait for `bytes` more bytes; does not arrive.
FASTATTN_DEVICE void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
#if defined(FASTATTN_EMULATE)
  emulator::mbarrier_expect(barrier, bytes, false);
#else
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Returns when the phase of this parity has ended.
FASTATTN_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#if defined(FASTATTN_EMULATE)
  emulator::mbarrier_wait(barrier, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// Orders what this thread wrote to (or learned of by a barrier in) shared memory before later asynchronous accesses:
// wgmma operands and TMA stores. The writers call it between their writes and the barrier.
FASTATTN_DEVICE void fence_proxy_async() {
#if defined(FASTATTN_EMULATE)
  emulator::proxy_fence();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- TMA: one thread issues for all ----

FASTATTN_DEVICE void prefetch_tensor_map(const TensorMap* map) {
#if defined(FASTATTN_EMULATE)
  static_cast<void>(map);
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// Loads the box that starts at (batch, head, row, column), which may lie beyond any end of the tensor. `shared` is
// aligned to 1024 bytes. The barrier is owed the bytes of a whole box, also of the part beyond the ends.
FASTATTN_DEVICE void tma_load_4d(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row, int head,
                              int batch) {
#if defined(FASTATTN_EMULATE)
  emulator::tensor_load(shared, *map, barrier, column, row, head, batch);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
#endif
}

// Loads a run of bytes; everything a multiple of 16.
FASTATTN_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
#if defined(FASTATTN_EMULATE)
  emulator::linear_load(shared, global, bytes, barrier);
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// Stores a box; the part beyond the ends of the tensor is not written. Needs fence_proxy_async and a barrier between
// the writes to `shared` and this.
FASTATTN_DEVICE void tma_store_4d(const TensorMap* map, const void* shared, int column, int row, int head, int batch) {
#if defined(FASTATTN_EMULATE)
  emulator::tensor_store(*map, shared, column, row, head, batch);
#else
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
#endif
}

FASTATTN_DEVICE void tma_store_commit() {
#if defined(FASTATTN_EMULATE)
  emulator::store_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until at most kPending of this thread's store groups still read shared memory. To be called before the memory is
// reused and before the thread returns.
template <int kPending>
FASTATTN_DEVICE void tma_store_wait() {
#if defined(FASTATTN_EMULATE)
  emulator::store_wait(kPending);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- registers ----

// Gives registers of the warpgroup back, down to kRegisters a thread, or takes some that others gave back. All warps of
// the warpgroup call it.
template <int kRegisters>
FASTATTN_DEVICE void setmaxnreg_dec() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
#if defined(FASTATTN_EMULATE)
  emulator::set_max_registers(kRegisters);
#elif FASTATTN_HOPPER
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
FASTATTN_DEVICE void setmaxnreg_inc() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
#if defined(FASTATTN_EMULATE)
  emulator::set_max_registers(kRegisters);
#elif FASTATTN_HOPPER
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// ---- warpgroup matrix products: D[64, N] (+)= A[64, 16] * B[16, N] ----
//
// Asynchronous: wgmma_fence, one or more wgmma, wgmma_commit, and wgmma_wait before D, or shared memory it reads, is
// touched. All 128 threads of the warpgroup do the same. The accumulators of a thread, w being its warp in the group,
// g = lane / 4 and t = 2 * (lane % 4):
//   d[4 * m + 0] (16w + g, 8m + t)       d[4 * m + 1] (16w + g, 8m + t + 1)
//   d[4 * m + 2] (16w + g + 8, 8m + t)   d[4 * m + 3] (16w + g + 8, 8m + t + 1)
// An A in registers has the layout of mma_m16n8k16 for the 16 rows of each warp.

// Before the first wgmma, and whenever other code has written the accumulators or the A registers since.
FASTATTN_DEVICE void wgmma_fence() {
#if defined(FASTATTN_EMULATE)
  emulator::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

FASTATTN_DEVICE void wgmma_commit() {
#if defined(FASTATTN_EMULATE)
  emulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most kPending groups are in flight.
template <int kPending>
FASTATTN_DEVICE void wgmma_wait() {
#if defined(FASTATTN_EMULATE)
  emulator::wgmma_wait(kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Descriptor of an operand in shared memory under the 128-byte swizzle, as TMA writes it (rows of 128 bytes, 8 rows to
// an atom of 1024 bytes). Both operands come in two forms:
//   plain: rows of A, or columns of B, are rows of 128 bytes along k (64 elements).
//     stride_bytes: from 8 of them to the next 8, 1024 in a tile of one box. leading_bytes is not used.
//     The next 16 elements of k are 32 bytes further, smem_descriptor(tile + 32 * k, ...); the next 64 in the next box.
//   transposed: a row of 128 bytes holds one k and 64 rows of A, or columns of B.
//     stride_bytes: from 8 k to the next 8, 1024 in a tile of one box.
//     leading_bytes: from 64 rows or columns to the next 64, the bytes of a box.
//     The next 16 k are 2048 bytes further.
FASTATTN_DEVICE uint64_t smem_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const uint64_t address = (shared_address(shared) & 0x3ffffu) >> 4;
  return address | static_cast<uint64_t>(leading_bytes >> 4) << 16 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
         kSwizzle128;
}

template <int N>
constexpr bool kWgmmaColumnsAble = N >= 16 && N <= 256 && N % 16 == 0;

#if !defined(FASTATTN_EMULATE)

// The accumulators as operands, eight at a time, and their numbers in the text of the instruction.
#define FASTATTN_D8(i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FASTATTN_D16 FASTATTN_D8(0)
#define FASTATTN_D32 FASTATTN_D16, FASTATTN_D8(8)
#define FASTATTN_D48 FASTATTN_D32, FASTATTN_D8(16)
#define FASTATTN_D64 FASTATTN_D48, FASTATTN_D8(24)
#define FASTATTN_D80 FASTATTN_D64, FASTATTN_D8(32)
#define FASTATTN_D96 FASTATTN_D80, FASTATTN_D8(40)
#define FASTATTN_D112 FASTATTN_D96, FASTATTN_D8(48)
#define FASTATTN_D128 FASTATTN_D112, FASTATTN_D8(56)
#define FASTATTN_D144 FASTATTN_D128, FASTATTN_D8(64)
#define FASTATTN_D160 FASTATTN_D144, FASTATTN_D8(72)
#define FASTATTN_D176 FASTATTN_D160, FASTATTN_D8(80)
#define FASTATTN_D192 FASTATTN_D176, FASTATTN_D8(88)
#define FASTATTN_D208 FASTATTN_D192, FASTATTN_D8(96)
#define FASTATTN_D224 FASTATTN_D208, FASTATTN_D8(104)
#define FASTATTN_D240 FASTATTN_D224, FASTATTN_D8(112)
#define FASTATTN_D256 FASTATTN_D240, FASTATTN_D8(120)
#define FASTATTN_TEXT16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTATTN_TEXT32 FASTATTN_TEXT16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTATTN_TEXT48 FASTATTN_TEXT32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FASTATTN_TEXT64 FASTATTN_TEXT48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_TEXT80 FASTATTN_TEXT64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FASTATTN_TEXT96 FASTATTN_TEXT80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTATTN_TEXT112 FASTATTN_TEXT96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FASTATTN_TEXT128 FASTATTN_TEXT112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_TEXT144 FASTATTN_TEXT128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FASTATTN_TEXT160 FASTATTN_TEXT144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FASTATTN_TEXT176 FASTATTN_TEXT160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FASTATTN_TEXT192 FASTATTN_TEXT176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTATTN_TEXT208 FASTATTN_TEXT192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FASTATTN_TEXT224 FASTATTN_TEXT208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FASTATTN_TEXT240 FASTATTN_TEXT224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define FASTATTN_TEXT256 FASTATTN_TEXT240 ", %120, %121, %122, %123, %124, %125, %126, %127"

// p0, p1, ...: the numbers of the operands behind the N / 2 accumulators. The last immediates are the signs of A and B,
// and which of them is transposed.
#define FASTATTN_WGMMA_SS(N, type, p0, p1, p2, p3, p4)                                               \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #p2                            \
               ", 0;\n"                                                                              \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" FASTATTN_TEXT##N \
               "}, %" #p0 ", %" #p1 ", accumulate, 1, 1, %" #p3 ", %" #p4 ";\n}"                     \
               : FASTATTN_D##N                                                                       \
               : "l"(descriptor_a), "l"(descriptor_b), "r"(static_cast<int>(accumulate)), "n"(TransA), "n"(TransB))
#define FASTATTN_WGMMA_RS(N, type, p0, p1, p2, p3, p4, p5, p6)                                                     \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #p5                                          \
               ", 0;\n"                                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" FASTATTN_TEXT##N               \
               "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", accumulate, 1, 1, %" #p6 ";\n}"             \
               : FASTATTN_D##N                                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor_b), "r"(static_cast<int>(accumulate)), \
                 "n"(TransB))
#define FASTATTN_WGMMA_SS_CASE(columns, ...)                      \
  if constexpr (N == columns && std::is_same_v<T, bfloat16>) {    \
    FASTATTN_WGMMA_SS(columns, "bf16", __VA_ARGS__);              \
  } else if constexpr (N == columns && std::is_same_v<T, half>) { \
    FASTATTN_WGMMA_SS(columns, "f16", __VA_ARGS__);               \
  }
#define FASTATTN_WGMMA_RS_CASE(columns, ...)                      \
  if constexpr (N == columns && std::is_same_v<T, bfloat16>) {    \
    FASTATTN_WGMMA_RS(columns, "bf16", __VA_ARGS__);              \
  } else if constexpr (N == columns && std::is_same_v<T, half>) { \
    FASTATTN_WGMMA_RS(columns, "f16", __VA_ARGS__);               \
  }

#endif

// Both operands in shared memory. `accumulate` false: D starts from zero.
template <typename T, int N, bool TransB, bool TransA = false>
FASTATTN_DEVICE void wgmma(float (&d)[N / 2], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) {
  static_assert(kWgmmaColumnsAble<N>);
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>);
#if defined(FASTATTN_EMULATE)
  emulator::wgmma({std::is_same_v<T, bfloat16>, N, false, TransA, TransB, accumulate}, d, nullptr, descriptor_a,
                  descriptor_b);
#else
  FASTATTN_WGMMA_SS_CASE(16, 8, 9, 10, 11, 12)
  FASTATTN_WGMMA_SS_CASE(32, 16, 17, 18, 19, 20)
  FASTATTN_WGMMA_SS_CASE(48, 24, 25, 26, 27, 28)
  FASTATTN_WGMMA_SS_CASE(64, 32, 33, 34, 35, 36)
  FASTATTN_WGMMA_SS_CASE(80, 40, 41, 42, 43, 44)
  FASTATTN_WGMMA_SS_CASE(96, 48, 49, 50, 51, 52)
  FASTATTN_WGMMA_SS_CASE(112, 56, 57, 58, 59, 60)
  FASTATTN_WGMMA_SS_CASE(128, 64, 65, 66, 67, 68)
  FASTATTN_WGMMA_SS_CASE(144, 72, 73, 74, 75, 76)
  FASTATTN_WGMMA_SS_CASE(160, 80, 81, 82, 83, 84)
  FASTATTN_WGMMA_SS_CASE(176, 88, 89, 90, 91, 92)
  FASTATTN_WGMMA_SS_CASE(192, 96, 97, 98, 99, 100)
  FASTATTN_WGMMA_SS_CASE(208, 104, 105, 106, 107, 108)
  FASTATTN_WGMMA_SS_CASE(224, 112, 113, 114, 115, 116)
  FASTATTN_WGMMA_SS_CASE(240, 120, 121, 122, 123, 124)
  FASTATTN_WGMMA_SS_CASE(256, 128, 129, 130, 131, 132)
#endif
}

// A in registers.
template <typename T, int N, bool TransB>
FASTATTN_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t descriptor_b, bool accumulate) {
  static_assert(kWgmmaColumnsAble<N>);
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>);
#if defined(FASTATTN_EMULATE)
  emulator::wgmma({std::is_same_v<T, bfloat16>, N, true, false, TransB, accumulate}, d, a, 0, descriptor_b);
#else
  FASTATTN_WGMMA_RS_CASE(16, 8, 9, 10, 11, 12, 13, 14)
  FASTATTN_WGMMA_RS_CASE(32, 16, 17, 18, 19, 20, 21, 22)
  FASTATTN_WGMMA_RS_CASE(48, 24, 25, 26, 27, 28, 29, 30)
  FASTATTN_WGMMA_RS_CASE(64, 32, 33, 34, 35, 36, 37, 38)
  FASTATTN_WGMMA_RS_CASE(80, 40, 41, 42, 43, 44, 45, 46)
  FASTATTN_WGMMA_RS_CASE(96, 48, 49, 50, 51, 52, 53, 54)
  FASTATTN_WGMMA_RS_CASE(112, 56, 57, 58, 59, 60, 61, 62)
  FASTATTN_WGMMA_RS_CASE(128, 64, 65, 66, 67, 68, 69, 70)
  FASTATTN_WGMMA_RS_CASE(144, 72, 73, 74, 75, 76, 77, 78)
  FASTATTN_WGMMA_RS_CASE(160, 80, 81, 82, 83, 84, 85, 86)
  FASTATTN_WGMMA_RS_CASE(176, 88, 89, 90, 91, 92, 93, 94)
  FASTATTN_WGMMA_RS_CASE(192, 96, 97, 98, 99, 100, 101, 102)
  FASTATTN_WGMMA_RS_CASE(208, 104, 105, 106, 107, 108, 109, 110)
  FASTATTN_WGMMA_RS_CASE(224, 112, 113, 114, 115, 116, 117, 118)
  FASTATTN_WGMMA_RS_CASE(240, 120, 121, 122, 123, 124, 125, 126)
  FASTATTN_WGMMA_RS_CASE(256, 128, 129, 130, 131, 132, 133, 134)
#endif
}

#if !defined(FASTATTN_EMULATE)
#undef FASTATTN_D8
#undef FASTATTN_WGMMA_SS
#undef FASTATTN_WGMMA_RS
#undef FASTATTN_WGMMA_SS_CASE
#undef FASTATTN_WGMMA_RS_CASE
#endif

}  // namespace ptx
}  // namespace fastattn::cuda
