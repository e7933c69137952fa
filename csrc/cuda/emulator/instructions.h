// What ptx.h and hopper.h call under the emulator: one function for each PTX instruction they wrap.
#pragma once

#include <cstdint>

#include "../../core/params.h"
#include "../platform.h"

namespace fastattn::cuda {

// Four-dimensional tensor [batch, head, row, column] as TMA sees it; the emulator's CUtensorMap.
struct EmulatedTensorMap {
  unsigned char* base;
  int64_t size[4];  // columns, rows, heads, batch
  int64_t stride_bytes[4];
  int box_rows, box_columns;
  int element_bytes;
};

namespace emulator {

// ---- sm_80 ----

uint32_t shared_address(const void* pointer);  // offset in the dynamic shared memory
float exp2_flushed(float x);                   // ex2.approx.ftz
void copy16(void* destination, const void* source, int bytes);
void copy_commit();
void copy_wait(int pending_groups);
// `count` 8x8 matrices (2 or 4); lane 8 * m + i holds the address of row i of matrix m.
void load_matrix(uint32_t* registers, int count, bool transposed, const void* row);
// c[4] += a[4] * b[2]; the fragments of mma.m16n8k16.
void multiply_m16n8k16(bool is_bfloat16, float* c, const uint32_t* a, uint32_t b0, uint32_t b1);

// ---- sm_90 ----

void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_expect(uint64_t* barrier, uint32_t bytes, bool arrive);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void proxy_fence();

void tensor_load(void* destination, const EmulatedTensorMap& map, uint64_t* barrier, int column, int row, int head,
                 int batch);
void tensor_store(const EmulatedTensorMap& map, const void* source, int column, int row, int head, int batch);
void linear_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier);
void store_commit();
void store_wait(int pending_groups);

struct WgmmaShape {
  bool is_bfloat16;
  int n;
  bool a_in_registers, transposed_a, transposed_b;
  bool accumulate;
};
// d: n / 2 accumulators. a: 4 registers, or null when A comes from shared memory.
void wgmma(const WgmmaShape& shape, float* d, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending_groups);
void set_max_registers(int count);

}  // namespace emulator
}  // namespace fastattn::cuda
