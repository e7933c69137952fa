// Register-blocked product of tiles that lie in L1: C[m, n] (+)= A[m, k] B[k, n].
//
// B and C are row-major. A is row-major, or stored transposed (element (i, p) at a[p * lda + i]): the kernel broadcasts single
// elements of A, so both walk memory forwards and neither is packed. That covers every product of attention, with X^T
// for a tile stored transposed:
//     S^T = K Q^T     gemm<kRows>        (K as it lies, Q^T by transpose_rows)          S = Q K^T likewise, from K^T
//     O  += P V       gemm<kRows> from P [rows, keys], gemm<kTransposed> from P^T [keys, rows]
//     dV += P^T dO    gemm<kTransposed> from P, gemm<kRows> from P^T; dK += dS^T Q likewise
// m and k are arbitrary. n is arbitrary too, but B and C are touched up to n rounded up to the vector width: the caller pads
// (ldb, ldc >= round_up(n, kWidth<T>), and B's last row is readable that far).
//
// T uint32_t: an element is a pair of bfloat16 numbers, neighbours along k, the sum float; k counts pairs.
//
// Register blocks, rows x vectors: with 32 registers 8x3 and 6x4 (24 accumulators), with 16 registers 4x3 and 6x2
// (12 accumulators, 3 or 2 for B, 1 for the broadcast element).
#pragma once

#include "simd.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

enum class Layout { kRows, kTransposed };

FASTATTN_INLINE int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Most rows of a block that is `vectors` wide.
constexpr int block_rows(int vectors) {
  return kVectorRegisters == 32 ? (vectors == 4 ? 6 : 8) : (vectors == 3 ? 4 : vectors == 2 ? 6 : 8);
}

// Width of the next block of columns when `vectors` are left: no narrow block is left over where an even split exists.
FASTATTN_INLINE int next_block_vectors(int vectors) {
  if (vectors <= 2) return vectors;
  if (kVectorRegisters == 32) return vectors % 3 == 0 ? 3 : vectors % 4 == 0 || vectors > 6 ? 4 : 3;
  return vectors % 3 == 0 ? 3 : vectors % 2 == 0 ? 2 : 3;
}

template <typename T, Layout kLayout, int kRows, int kVectors>
FASTATTN_NOINLINE void gemm_block(int k, const T* __restrict a, int64_t lda, const T* __restrict b, int64_t ldb, Sum<T>* __restrict c,
                       int64_t ldc, bool accumulate) {
  constexpr int W = kWidth<T>;
  Vec<Sum<T>> acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[i][v] = zero<Sum<T>>();
  }
  for (int p = 0; p < k; ++p) {
    Vec<T> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> x = broadcast(kLayout == Layout::kRows ? a[i * lda] : a[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(x, row[v], acc[i][v]);
    }
    a += kLayout == Layout::kRows ? 1 : lda;
    b += ldb;
  }
  // C is added last: the sum over k of one call does not depend on what was there before.
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Sum<T>* const out = c + i * ldc + v * W;
      store(out, accumulate ? acc[i][v] + load<Sum<T>>(out) : acc[i][v]);
    }
  }
}

// All rows of one block of columns, split into blocks of nearly equal height: a short last block would not hide the latency
// of the multiply-add.
template <typename T, Layout kLayout, int kVectors>
static void gemm_columns(int m, int k, const T* a, int64_t lda, const T* b, int64_t ldb, Sum<T>* c, int64_t ldc,
                         bool accumulate) {
  constexpr int kMax = block_rows(kVectors);
  while (m > 0) {
    const int blocks = (m + kMax - 1) / kMax, rows = (m + blocks - 1) / blocks;
    switch (rows) {
#define FASTATTN_GEMM_CASE(R)                                                                                    \
  case R:                                                                                                        \
    if constexpr (R <= kMax) gemm_block<T, kLayout, R, kVectors>(k, a, lda, b, ldb, c, ldc, accumulate);         \
    break;
      FASTATTN_GEMM_CASE(1)
      FASTATTN_GEMM_CASE(2)
      FASTATTN_GEMM_CASE(3)
      FASTATTN_GEMM_CASE(4)
      FASTATTN_GEMM_CASE(5)
      FASTATTN_GEMM_CASE(6)
      FASTATTN_GEMM_CASE(7)
      FASTATTN_GEMM_CASE(8)
#undef FASTATTN_GEMM_CASE
    }
    a += kLayout == Layout::kRows ? rows * lda : rows;
    c += rows * ldc;
    m -= rows;
  }
}

// Deep products are summed in parts of at most this depth: the block of B stays in L1, and the rounding error grows with the
// square root of the depth.
constexpr int kMaxDepth = 128;

template <Layout kLayout, typename T>
static void gemm(int m, int n, int k, const T* a, int64_t lda, const T* b, int64_t ldb, Sum<T>* c, int64_t ldc,
                 bool accumulate) {
  constexpr int W = kWidth<T>, kDepth = kMaxDepth / kTerms<T>;
  if (k > kDepth) {
    const int parts = (k + kDepth - 1) / kDepth, depth = (k + parts - 1) / parts;
    for (int p = 0; p < k; p += depth)
      gemm<kLayout>(m, n, p + depth < k ? depth : k - p, a + (kLayout == Layout::kRows ? p : p * lda), lda, b + p * ldb, ldb,
                    c, ldc, accumulate || p > 0);
    return;
  }
  for (int vectors = (n + W - 1) / W; vectors > 0;) {
    const int block = next_block_vectors(vectors);
    switch (block) {
      case 1: gemm_columns<T, kLayout, 1>(m, k, a, lda, b, ldb, c, ldc, accumulate); break;
      case 2: gemm_columns<T, kLayout, 2>(m, k, a, lda, b, ldb, c, ldc, accumulate); break;
      case 3: gemm_columns<T, kLayout, 3>(m, k, a, lda, b, ldb, c, ldc, accumulate); break;
      case 4:
        if constexpr (kVectorRegisters == 32) gemm_columns<T, kLayout, 4>(m, k, a, lda, b, ldb, c, ldc, accumulate);
        break;
    }
    b += block * W;
    c += block * W;
    vectors -= block;
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
