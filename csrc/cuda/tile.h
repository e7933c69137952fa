// Tiles in shared memory and their tensor-core fragments, for the kernels that run from sm_80 on.
//
// A tile is [rows][COLUMNS] elements of 2 or 4 bytes, in chunks of 16 bytes. The chunks of a row are permuted so that the 8
// rows that one ldmatrix (or a quarter warp of 16-byte loads) reads at the same column lie in 8 different groups of banks.
//
// Fragments of mma m16n8k16; g = lane / 4, t = lane % 4, columns in pairs:
//     A [16, 16]  a[0]: (g, 2t)   a[1]: (g + 8, 2t)   a[2]: (g, 2t + 8)   a[3]: (g + 8, 2t + 8)
//     B [16, 8]   b0: (2t, g)     b1: (2t + 8, g)
//     C [16, 8]   c[0], c[1]: (g, 2t)     c[2], c[3]: (g + 8, 2t)
// Two neighbouring C fragments are one A fragment: P never leaves the registers.
#pragma once

#include "../core/params.h"
#include "../core/philox.h"
#include "platform.h"
#include "ptx.h"

namespace fastattn::cuda {

template <typename T>
inline constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements of a chunk

// ---- layout ----

// Offset in elements of chunk `chunk` of row `row`. With an odd multiple of 4 chunks a row, two rows share 8 groups of banks.
template <typename T, int COLUMNS>
FASTATTN_DEVICE int swizzle(int row, int chunk) {
  constexpr int kChunks = COLUMNS / kChunk<T>;
  static_assert(COLUMNS % kChunk<T> == 0 && kChunks % 4 == 0, "a row is a multiple of 64 bytes");
  const int permute = kChunks % 8 == 0 ? row & 7 : row >> 1 & 3;
  return row * COLUMNS + ((chunk ^ permute) * kChunk<T>);
}

// Offset of one element.
template <typename T, int COLUMNS>
FASTATTN_DEVICE int swizzle_element(int row, int column) {
  return swizzle<T, COLUMNS>(row, column / kChunk<T>) + column % kChunk<T>;
}

// ---- global memory ----

// The rows of one (batch, head) of a tensor whose last stride is 1.
template <typename T>
struct Plane {
  T* ptr;
  int64_t row_stride;
  int rows, columns;
  bool vectors;  // every chunk of 16 bytes lies on 16 bytes
};

template <typename T>
FASTATTN_DEVICE Plane<T> plane_of(const TensorRef& x, int64_t b, int64_t h, int64_t rows, int64_t columns) {
  Plane<T> plane;
  plane.ptr = static_cast<T*>(x.ptr) + b * x.stride[0] + h * x.stride[1];
  plane.row_stride = x.stride[2];
  plane.rows = static_cast<int>(rows);
  plane.columns = static_cast<int>(columns);
  plane.vectors = reinterpret_cast<uintptr_t>(plane.ptr) % 16 == 0 && x.stride[2] % kChunk<T> == 0;
  return plane;
}

// An element of any floating dtype but float64, `offset` elements from the start.
FASTATTN_DEVICE float load_scalar(const TensorRef& x, int64_t offset) {
  if (x.dtype == DType::kFloat32) return static_cast<const float*>(x.ptr)[offset];
  if (x.dtype == DType::kBFloat16) return to_float(static_cast<const bfloat16*>(x.ptr)[offset]);
  return to_float(static_cast<const half*>(x.ptr)[offset]);
}

namespace tile_detail {

// How THREADS threads share the chunks of a tile: `kLanes` neighbours take neighbouring chunks of one row.
template <typename T, int COLUMNS, int THREADS>
struct Sharing {
  static constexpr int kChunks = COLUMNS / kChunk<T>;
  static constexpr int kPower = kChunks & -kChunks;  // the largest power of two in it
  static constexpr int kLanes = kPower < 32 ? kPower : 32;
  static constexpr int kRows = THREADS / kLanes;
  static_assert(THREADS % kLanes == 0, "whole rows of lanes");
};

}  // namespace tile_detail

// tile [ROWS][COLUMNS] = rows row0 .. row0 + ROWS - 1 of x, by THREADS threads; `thread` counts them from 0. What lies beyond
// the rows or the columns of x is zero; row0 < x.rows. Vectors arrive with cp.async: the caller commits, waits and then meets
// at a barrier.
template <typename T, int COLUMNS, int ROWS, int THREADS>
FASTATTN_DEVICE void load_tile(T* tile, const Plane<T>& x, int row0, int thread) {
  using Sharing = tile_detail::Sharing<T, COLUMNS, THREADS>;
  constexpr int kLanes = Sharing::kLanes, kStep = Sharing::kRows;
  const int lane = thread % kLanes, first = thread / kLanes;
  const int rows = x.rows - row0;  // that exist
  if (x.vectors) {
    const int64_t step = kStep * x.row_stride;
#pragma unroll
    for (int c = 0; c < Sharing::kChunks; c += kLanes) {
      const int column0 = (c + lane) * kChunk<T>, left = x.columns - column0;
      const int bytes = (left <= 0 ? 0 : left < kChunk<T> ? left : kChunk<T>) * static_cast<int>(sizeof(T));
      const T* const column = x.ptr + (bytes ? column0 : 0);
      T* const to = tile + swizzle<T, COLUMNS>(first, c + lane);
      if (ROWS % kStep == 0 && kStep % 8 == 0 && rows >= ROWS) {
        const T* from = column + (row0 + first) * x.row_stride;
#pragma unroll
        for (int r = 0; r < ROWS; r += kStep, from += step) ptx::cp_async16(to + r * COLUMNS, from, bytes);
      } else {
#pragma unroll 2
        for (int r = first; r < ROWS; r += kStep)
          ptx::cp_async16(tile + swizzle<T, COLUMNS>(r, c + lane), column + (row0 + (r < rows ? r : 0)) * x.row_stride,
                          r < rows ? bytes : 0);
      }
    }
    return;
  }
#pragma unroll 1
  for (int at = thread; at < ROWS * Sharing::kChunks; at += THREADS) {
    const int r = at / Sharing::kChunks, chunk = at % Sharing::kChunks, left = r < rows ? x.columns - chunk * kChunk<T> : 0;
    const T* const from = x.ptr + (row0 + r) * x.row_stride + chunk * kChunk<T>;
    T* const to = tile + swizzle<T, COLUMNS>(r, chunk);
#pragma unroll 1
    for (int n = 0; n < kChunk<T>; ++n) to[n] = n < left ? from[n] : from_float<T>(0.0f);
  }
}

// Rows row0 .. row0 + ROWS - 1 of x = tile [ROWS][COLUMNS], by THREADS threads; what x does not have is not written.
template <typename T, int COLUMNS, int ROWS, int THREADS>
FASTATTN_DEVICE void store_tile(const Plane<T>& x, const T* tile, int row0, int thread) {
  using Sharing = tile_detail::Sharing<T, COLUMNS, THREADS>;
  const int lane = thread % Sharing::kLanes, first = thread / Sharing::kLanes;
  for (int c = 0; c < Sharing::kChunks; c += Sharing::kLanes) {
    const int chunk = c + lane, column0 = chunk * kChunk<T>;
    if (column0 >= x.columns) continue;
    for (int r = first; r < ROWS && row0 + r < x.rows; r += Sharing::kRows) {
      T* const to = x.ptr + (row0 + r) * x.row_stride + column0;
      const uint4 vector = *reinterpret_cast<const uint4*>(tile + swizzle<T, COLUMNS>(r, chunk));
      if (x.vectors && column0 + kChunk<T> <= x.columns) {
        *reinterpret_cast<uint4*>(to) = vector;
        continue;
      }
#pragma unroll
      for (int n = 0; n < kChunk<T>; ++n)
        if (column0 + n < x.columns) to[n] = tile[swizzle<T, COLUMNS>(r, chunk) + n];
    }
  }
}

// ---- fragments; whole warps call these, with row0 a multiple of 8 and chunk0 even ----

namespace tile_detail {

// Offset of (row0 + row, chunk0 + chunk), where row and chunk (0 or 1) are the lane's and chunk0 is a constant: the lane's
// part is computed once, and each chunk0 costs one XOR.
template <typename T, int COLUMNS>
FASTATTN_DEVICE int lane_offset(int row0, int row, int chunk0, int chunk) {
  constexpr int kPermuted = COLUMNS / kChunk<T> % 8 == 0 ? 7 : 3;
  const int own = swizzle<T, COLUMNS>(row, chunk);
  return row0 * COLUMNS + (own ^ ((chunk0 & kPermuted) * kChunk<T>)) + (chunk0 & ~kPermuted) * kChunk<T>;
}

}  // namespace tile_detail

// A = tile[row0 .. +16][chunk0 * 8 .. +16].
template <typename T, int COLUMNS>
FASTATTN_DEVICE void load_a(uint32_t (&a)[4], const T* tile, int row0, int chunk0, int lane) {
  ptx::ldmatrix_x4(a, tile + tile_detail::lane_offset<T, COLUMNS>(row0, lane % 16, chunk0, lane / 16));
}

// A = transpose of tile[row0 .. +16][chunk0 * 8 .. +16].
template <typename T, int COLUMNS>
FASTATTN_DEVICE void load_a_transposed(uint32_t (&a)[4], const T* tile, int row0, int chunk0, int lane) {
  ptx::ldmatrix_x4_trans(a, tile + tile_detail::lane_offset<T, COLUMNS>(row0, lane / 16 * 8 + lane % 8, chunk0, lane / 8 % 2));
}

// Two B fragments, {b[0], b[1]} and {b[2], b[3]}, of X Y^T with Y = tile: n = rows row0 .. +8 and row0 + 8 .. +8,
// k = columns chunk0 * 8 .. +16.
template <typename T, int COLUMNS>
FASTATTN_DEVICE void load_b_transposed(uint32_t (&b)[4], const T* tile, int row0, int chunk0, int lane) {
  uint32_t r[4];  // read as an A fragment is: one lane offset for all three kinds
  ptx::ldmatrix_x4(r, tile + tile_detail::lane_offset<T, COLUMNS>(row0, lane % 16, chunk0, lane / 16));
  b[0] = r[0], b[1] = r[2], b[2] = r[1], b[3] = r[3];
}

// Two B fragments, {b[0], b[1]} and {b[2], b[3]}, of X Y with Y = tile: k = rows row0 .. +16, n = columns chunk0 * 8 .. +8
// and chunk0 * 8 + 8 .. +8.
template <typename T, int COLUMNS>
FASTATTN_DEVICE void load_b(uint32_t (&b)[4], const T* tile, int row0, int chunk0, int lane) {
  ptx::ldmatrix_x4_trans(b, tile + tile_detail::lane_offset<T, COLUMNS>(row0, lane % 16, chunk0, lane / 16));
}

// Two C fragments, side by side, as the A fragment of the next product, rounded to T.
template <typename T>
FASTATTN_DEVICE void pack_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack2<T>(left[0], left[1]);
  a[1] = pack2<T>(left[2], left[3]);
  a[2] = pack2<T>(right[0], right[1]);
  a[3] = pack2<T>(right[2], right[3]);
}

template <int N>
FASTATTN_DEVICE void clear(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
}

// c [M x 16, N x 8] += x[row_x .. ][K] y[row_y .. ][K]^T, K columns of both tiles: scores, dP. A fragment of y serves M
// fragments of x. SKIP: the 16 rows of y whose bit in `groups` is 0 are left out, and their columns of c as they are.
template <typename T, int COLUMNS, bool SKIP = false, int M, int N>
FASTATTN_DEVICE void multiply_transposed(float (&c)[M][N][4], const T* x, int row_x, const T* y, int row_y, int lane,
                                         uint32_t groups = ~0u) {
  static_assert(COLUMNS % 16 == 0 && N % 2 == 0, "whole fragments");
#pragma unroll
  for (int k = 0; k < COLUMNS / 16; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_a<T, COLUMNS>(a[m], x, row_x + m * 16, k * 2, lane);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      if (SKIP && !(groups >> (n / 2) & 1)) continue;
      uint32_t b[4];
      load_b_transposed<T, COLUMNS>(b, y, row_y + n * 8, k * 2, lane);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16<T>(c[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// The same with the fragments of x in registers.
template <typename T, int COLUMNS, int M, int N, int K>
FASTATTN_DEVICE void multiply_transposed(float (&c)[M][N][4], const uint32_t (&a)[M][K][4], const T* y, int row_y, int lane) {
  static_assert(K * 16 <= COLUMNS && N % 2 == 0, "whole fragments");
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_b_transposed<T, COLUMNS>(b, y, row_y + n * 8, k * 2, lane);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16<T>(c[m][n], a[m][k], b[0], b[1]);
        ptx::mma_m16n8k16<T>(c[m][n + 1], a[m][k], b[2], b[3]);
      }
    }
  }
}

// c [M x 16, COLUMNS] += a y, k = 16 rows of a tile from row_y. ZERO: rows of y whose bit in `rows` is 0 count as zeros,
// whatever they hold; bit 0 is row_y.
template <typename T, int COLUMNS, bool ZERO, int M>
FASTATTN_DEVICE void multiply_step(float (&c)[M][COLUMNS / 8][4], const uint32_t (&a)[M][4], const T* y, int row_y, int lane,
                                   uint32_t rows) {
  uint32_t keep0 = ~0u, keep1 = ~0u;
  if constexpr (ZERO) {
    const uint32_t bits = rows >> (lane % 4 * 2);
    keep0 = (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u);
    keep1 = (bits & 0x100 ? 0xffffu : 0u) | (bits & 0x200 ? 0xffff0000u : 0u);
  }
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; n += 2) {
    uint32_t b[4];
    load_b<T, COLUMNS>(b, y, row_y, n, lane);
    if constexpr (ZERO) b[0] &= keep0, b[1] &= keep1, b[2] &= keep0, b[3] &= keep1;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      ptx::mma_m16n8k16<T>(c[m][n], a[m], b[0], b[1]);
      ptx::mma_m16n8k16<T>(c[m][n + 1], a[m], b[2], b[3]);
    }
  }
}

// c [M x 16, COLUMNS] += P y, P [M x 16, N x 8] in registers and rounded to T, y = N x 8 rows of a tile from row_y: O, dQ.
// ZERO: as above; N <= 8.
template <typename T, int COLUMNS, bool ZERO = false, int M, int N>
FASTATTN_DEVICE void multiply_registers(float (&c)[M][COLUMNS / 8][4], const float (&p)[M][N][4], const T* y, int row_y,
                                        int lane, uint64_t rows = 0) {
  static_assert(N % 2 == 0 && (!ZERO || N <= 8), "whole fragments");
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) pack_a<T>(a[m], p[m][2 * k], p[m][2 * k + 1]);
    multiply_step<T, COLUMNS, ZERO>(c, a, y, row_y + k * 16, lane, static_cast<uint32_t>(rows >> (k * 16)));
  }
}

// The same with P rounded before: half the registers while it waits. ZERO leaves out 16 rows of y that are all zeros.
template <typename T, int COLUMNS, bool ZERO = false, int M, int K>
FASTATTN_DEVICE void multiply_packed(float (&c)[M][COLUMNS / 8][4], const uint32_t (&p)[K][M][4], const T* y, int row_y, int lane,
                                     uint64_t rows = 0) {
  static_assert(!ZERO || K <= 4, "64 rows");
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const uint32_t live = static_cast<uint32_t>(rows >> (k * 16)) & 0xffffu;
    if (!ZERO || live) multiply_step<T, COLUMNS, ZERO>(c, p[k], y, row_y + k * 16, lane, live);
  }
}

// Fragments to rows row0 .. of a tile, rounded to T, row g times factor[0] and row g + 8 times factor[1]; each warp writes rows
// of its own, and store_tile (by the 32 threads of that warp) may follow after __syncwarp.
template <typename T, int COLUMNS, int N>
FASTATTN_DEVICE void put_fragments(T* tile, int row0, const float (&c)[N][4], const float (&factor)[2], int lane) {
  static_assert(N * 8 <= COLUMNS, "the fragments fit");
  const int row = row0 + lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    *reinterpret_cast<uint32_t*>(tile + swizzle<T, COLUMNS>(row, n) + column) = pack2<T>(c[n][0] * factor[0], c[n][1] * factor[0]);
    *reinterpret_cast<uint32_t*>(tile + swizzle<T, COLUMNS>(row + 8, n) + column) =
        pack2<T>(c[n][2] * factor[1], c[n][3] * factor[1]);
  }
}

// ---- what belongs to the elements of a C fragment ----

// Bits of a row of 64 columns for one lane's elements: column n * 8 + 2t + e is (n, e).
struct FragmentWord {
  uint32_t low, high;

  FASTATTN_DEVICE_MEMBER FragmentWord(uint64_t word, int lane)
      : low(static_cast<uint32_t>(word) >> (lane % 4 * 2)), high(static_cast<uint32_t>(word >> 32) >> (lane % 4 * 2)) {}
  FASTATTN_DEVICE_MEMBER bool operator()(int n, int e) const { return (n < 4 ? low : high) >> (n % 4 * 8 + e) & 1; }
};

// The Philox key of the dropout.
FASTATTN_DEVICE uint64_t dropout_seed(const DropoutParams& dropout) {
  return dropout.seed_ptr ? *dropout.seed_ptr : dropout.seed;
}

// Which probabilities dropout keeps, for one C row of fragments [16, N x 8] at (i0, j0); j0 is a multiple of 4. A Philox
// block covers four columns, the elements of two neighbouring lanes: the even lane draws for row g, the odd one for row g + 8.
template <int N>
struct FragmentDropout {
  static_assert(N <= 8, "four bits for each fragment");
  uint32_t row[2];

  FASTATTN_DEVICE_MEMBER FragmentDropout(uint64_t seed, uint64_t threshold, int64_t b, int64_t h, int64_t i0, int64_t j0,
                                         int lane) {
    const uint32_t i = static_cast<uint32_t>(i0) + lane / 4 + (lane & 1) * 8;
    const uint32_t block0 = static_cast<uint32_t>(j0 / 4) + (lane >> 1 & 1);
    uint32_t own = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const PhiloxBlock block = philox4x32(seed, block0 + n * 2, i, static_cast<uint32_t>(h), static_cast<uint32_t>(b));
#pragma unroll
      for (int w = 0; w < 4; ++w) own |= uint32_t{block.word[w] >= threshold} << (n * 4 + w);
    }
    const uint32_t other = __shfl_xor_sync(~0u, own, 1);
    row[0] = (lane & 1 ? other : own) >> (lane % 2 * 2);
    row[1] = (lane & 1 ? own : other) >> (lane % 2 * 2);
  }
  // Element (n, e) of row g (half 0) or g + 8 (half 1).
  FASTATTN_DEVICE_MEMBER bool operator()(int n, int half, int e) const { return row[half] >> (n * 4 + e) & 1; }
};

}  // namespace fastattn::cuda
