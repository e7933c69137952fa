// The PTX instructions of sm_80 that the kernels use: inline assembly for the GPU, the emulator's function elsewhere.
#pragma once

#include "platform.h"

#if defined(FASTATTN_EMULATE)
#include "emulator/instructions.h"
#endif

namespace fastattn::cuda::ptx {

// Address of a shared-memory pointer in the shared window, as PTX wants it.
FASTATTN_DEVICE uint32_t shared_address(const void* pointer) {
#if defined(FASTATTN_EMULATE)
  return emulator::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// 2^x, approximate; subnormals count as 0. ex2(-inf) is 0.
FASTATTN_DEVICE float ex2(float x) {
#if defined(FASTATTN_EMULATE)
  return emulator::exp2_flushed(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// x, of which the compiler knows nothing: what is computed from it inside a loop is not moved out of the loop, where it
// would wait in registers.
FASTATTN_DEVICE int opaque(int x) {
#if !defined(FASTATTN_EMULATE)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// ---- asynchronous copies ----

// Copies 16 bytes from global to shared memory, both aligned to 16: the first `bytes` are read, the rest is
// zero-filled. With bytes = 0 nothing is read, but `global` should still be an address of the tensor.
FASTATTN_DEVICE void cp_async16(void* shared, const void* global, int bytes) {
#if defined(FASTATTN_EMULATE)
  emulator::copy16(shared, global, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
#endif
}

FASTATTN_DEVICE void cp_async_commit() {
#if defined(FASTATTN_EMULATE)
  emulator::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of this thread's groups are in flight. The other threads still need a barrier.
template <int kPending>
FASTATTN_DEVICE void cp_async_wait() {
#if defined(FASTATTN_EMULATE)
  emulator::copy_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- matrices ----

// Loads 8x8 matrices of 16-bit elements: lane 8 * m + i passes the address of row i (16 bytes) of matrix m, and r[m] of
// lane l gets the elements (l / 4, 2 * (l % 4)) and (l / 4, 2 * (l % 4) + 1), lower half first; `_trans` of the
// transposed matrix. The x2 forms read the addresses of lanes 0..15 only; the others still have to be valid pointers.
FASTATTN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
#if defined(FASTATTN_EMULATE)
  emulator::load_matrix(r, 4, false, shared_row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

FASTATTN_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
#if defined(FASTATTN_EMULATE)
  emulator::load_matrix(r, 4, true, shared_row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

FASTATTN_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
#if defined(FASTATTN_EMULATE)
  emulator::load_matrix(r, 2, false, shared_row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

FASTATTN_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
#if defined(FASTATTN_EMULATE)
  emulator::load_matrix(r, 2, true, shared_row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

// c += a * b for A 16x16 (rows), B 16x8 (columns), float32 sums. Elements, with g = lane / 4 and t = 2 * (lane % 4):
//   a[0] (g, t)(g, t+1)   a[1] (g+8, t)(g+8, t+1)   a[2] (g, t+8)(g, t+9)   a[3] (g+8, t+8)(g+8, t+9)
//   b0 (t, g)(t+1, g)     b1 (t+8, g)(t+9, g)
//   c[0] (g, t)   c[1] (g, t+1)   c[2] (g+8, t)   c[3] (g+8, t+1)
template <typename T>
FASTATTN_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>);
#if defined(FASTATTN_EMULATE)
  emulator::multiply_m16n8k16(std::is_same_v<T, bfloat16>, c, a, b0, b1);
#else
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// ---- caches ----

// A hint: this line of global memory will be read soon. The address is not read now, but has to be one that may be.
FASTATTN_DEVICE void prefetch_l1(const void* global) {
#if defined(FASTATTN_EMULATE)
  static_cast<void>(global);
#else
  asm volatile("prefetch.global.L1 [%0];" ::"l"(global));
#endif
}

// ---- barriers between some of the warps of a block ----

// Waits until `threads` threads (whole warps) have come to barrier `id`, 1..15 (0 is __syncthreads).
FASTATTN_DEVICE void named_barrier(int id, int threads) {
#if defined(FASTATTN_EMULATE)
  emulator::named_barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts as having come, and goes on.
FASTATTN_DEVICE void named_barrier_arrive(int id, int threads) {
#if defined(FASTATTN_EMULATE)
  emulator::named_barrier_arrive(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace fastattn::cuda::ptx
