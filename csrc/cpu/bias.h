// The bias of a tile, and its gradient in the bias's own shape; and other tensors that lie along the scores.
#pragma once

#include "../core/softmax.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// dst [keys][ld] = factor * x of the tile, transposed; 0 for rows <= r < ld, where ld is `rows` in whole vectors. x is
// [B, H, L, S] by strides.
template <typename T>
static void load_transposed(T* dst, int64_t ld, const TensorRef& x, int64_t b, int64_t h, int64_t i0, int rows, int64_t j0,
                            int keys, T factor, T* staging) {
  const void* const tile =
      element(x.ptr, x.dtype, b * x.stride[0] + h * x.stride[1] + i0 * x.stride[2] + j0 * x.stride[3]);
  if (x.stride[3] == 1) {
    transpose_rows<T>(dst, ld, tile, x.dtype, x.stride[2], rows, keys, factor, staging);
    return;
  }
  for (int j = 0; j < keys; ++j)
    for (int r = 0; r < ld; ++r)
      dst[j * ld + r] =
          r < rows ? static_cast<T>(load_scalar(element(tile, x.dtype, r * x.stride[2] + j * x.stride[3]), x.dtype)) * factor
                   : T(0);
}

// The bias of a tile as rows of T: where it lies, or in scratch [rows][kTileN]. Read in whole vectors.
template <typename T>
static Rows<T> bias_rows(const TensorRef& bias, int64_t b, int64_t h, int64_t i0, int rows, int64_t j0, int keys, T* scratch) {
  constexpr int W = kWidth<T>;
  const void* const tile = element(bias.ptr, bias.dtype, b * bias.stride[0] + h * bias.stride[1] + i0 * bias.stride[2] +
                                                             j0 * bias.stride[3]);
  const bool contiguous = bias.stride[3] == 1;
  if (contiguous && bias.dtype == kComputeDType<T> && keys % W == 0) return {static_cast<const T*>(tile), bias.stride[2]};
  T* dst = scratch;
  for (int r = 0; r < rows; ++r, dst += kTileN) {
    const void* const row = element(tile, bias.dtype, r * bias.stride[2]);
    if (contiguous)
      convert_row(dst, row, bias.dtype, keys, round_up(keys, W));
    else
      for (int j = 0; j < keys; ++j) dst[j] = static_cast<T>(load_scalar(element(row, bias.dtype, j * bias.stride[3]), bias.dtype));
  }
  return {scratch, kTileN};
}

// C [m, n] = A [m, k] B [k, n], both by rows; in eight parts, before each of which an eighth of the bias of the tile is asked for. The
// rows of a bias lie apart, a few cache lines each, so that the hardware does not see them coming, and all at once they would wait
// for each other.
template <typename T>
static void gemm_before_bias(int m, int n, int k, const T* a, int64_t lda, const T* b, int64_t ldb, Sum<T>* c, int64_t ldc,
                             const TensorRef& bias, int64_t batch, int64_t h, int64_t i0, int rows, int64_t j0, int keys) {
  constexpr int kParts = 8;
  constexpr int64_t kFarApart = 256;  // elements; nearer rows the hardware does see
  if (!bias || bias.stride[3] != 1 || bias.stride[2] < kFarApart) return gemm<Layout::kRows>(m, n, k, a, lda, b, ldb, c, ldc, false);
  const int64_t tile = batch * bias.stride[0] + h * bias.stride[1] + i0 * bias.stride[2] + j0;
  const int64_t row_bytes = keys * element_size(bias.dtype);
  const int step = (m + kParts - 1) / kParts;
  for (int done = 0; done < m; done += step) {
    const int count = m - done < step ? m - done : step;
    for (int r = done * rows / m; r < (done + count) * rows / m; ++r) {
      const char* const row = static_cast<const char*>(element(bias.ptr, bias.dtype, tile + r * bias.stride[2]));
      for (int64_t offset = 0; offset < row_bytes; offset += kAlignment) __builtin_prefetch(row + offset, 0, 2);
    }
    gemm<Layout::kRows>(count, n, k, a + done * lda, lda, b, ldb, c + done * ldc, ldc, false);
  }
}

// ---- gradient ----

template <typename T>
static T* bias_gradient_at(const TensorRef& grad, int64_t b, int64_t h, int64_t i, int64_t j) {
  return static_cast<T*>(grad.ptr) + b * grad.stride[0] + h * grad.stride[1] + i * grad.stride[2] + j * grad.stride[3];
}

// Before the first of the tiles that add to it: zeros for the tile's part of the gradient.
template <typename T>
static void clear_bias_gradient(const TensorRef& grad, int64_t b, int64_t h, int64_t i0, int rows, int64_t j0, int keys) {
  if ((grad.stride[2] == 0 && i0 > 0) || (grad.stride[3] == 0 && j0 > 0)) return;  // belongs to the first tile
  const int count = grad.stride[3] ? keys : 1;
  for (int r = 0; r < (grad.stride[2] ? rows : 1); ++r)
    std::memset(bias_gradient_at<T>(grad, b, h, i0 + r, j0), 0, count * sizeof(T));
}

// The same for a tile that writes all of its part: dS [rows][kTileN]. For a gradient that has rows and keys of its own. Whole cache
// lines go past the cache where the tile is `alone`, so that no other batch or head adds to them: they need not be fetched to be
// overwritten. finish_streams() after the last.
template <typename T>
static void store_bias_gradient(const TensorRef& grad, int64_t b, int64_t h, int64_t i0, int rows, int64_t j0, int keys,
                                const T* ds, bool alone) {
  T* const dst = bias_gradient_at<T>(grad, b, h, i0, j0);
  const bool whole_lines = keys == kTileN && reinterpret_cast<uintptr_t>(dst) % kAlignment == 0 &&
                           grad.stride[2] * sizeof(T) % kAlignment == 0;
  if (alone && whole_lines) {
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < kTileN; j += kWidth<T>) stream(dst + r * grad.stride[2] + j, load(ds + r * kTileN + j));
    return;
  }
  for (int r = 0; r < rows; ++r) std::memcpy(dst + r * grad.stride[2], ds + r * kTileN, keys * sizeof(T));
}

// Adds dS [rows][kTileN]. What broadcasts over the rows or keys is summed within the tile first: fewer roundings in a row.
template <typename T>
static void add_bias_gradient(const TensorRef& grad, int64_t b, int64_t h, int64_t i0, int rows, int64_t j0, int keys,
                              const T* ds) {
  T* const dst = bias_gradient_at<T>(grad, b, h, i0, j0);
  if (grad.stride[2] && grad.stride[3]) {
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < keys; ++j) dst[r * grad.stride[2] + j] += ds[r * kTileN + j];
  } else if (grad.stride[2]) {
    for (int r = 0; r < rows; ++r) {
      T total = T(0);
      for (int j = 0; j < keys; ++j) total += ds[r * kTileN + j];
      dst[r * grad.stride[2]] += total;
    }
  } else {
    T columns[kTileN] = {}, total = T(0);
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < keys; ++j) columns[j] += ds[r * kTileN + j];
    for (int j = 0; j < keys; ++j) {
      total += columns[j];
      if (grad.stride[3]) dst[j] += columns[j];
    }
    if (!grad.stride[3]) dst[0] += total;
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
