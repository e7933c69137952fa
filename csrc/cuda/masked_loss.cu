// Masked reconstruction loss and its gradient in one pass over the counted elements.
//
// Both layouts are lines of `width` elements along the dimension that runs fastest, each with a row of mask cells: a cell is p
// elements wide on a patch grid (p * C where the channels run fastest), one element for a mask of elements, the whole line
// when the mask does not vary along it. A thread takes vectors of 16 bytes that lie in one cell, one mask byte for each, and
// reads a vector only if its cell counts; the gradient of the others is 0.
//
// Launches: mean over the counted with a gradient needs their number first: masked_loss_count_kernel reads the mask alone,
// and leaves at most kMaxCounts numbers, which every warp of the next kernel adds up. masked_loss_kernel (or
// masked_loss_normalized_kernel) writes the gradient and one sum a block; the block that finishes last adds the sums in
// their order. So the result depends on the problem alone, bit by bit.
//
// masked_loss_kernel: 256 threads of 108 registers, 2 blocks an SM; each thread has 4 vectors of input and of target in flight,
// 64 KB an SM where all count. Bytes for an element of size e of which a share f counts: 2 f e, and e for the gradient; the
// mask's are few beside them. 60 % counted, float32: 4.8 + 4. About 150 instructions a vector, of 236 that the memory leaves
// time for: bound by the memory, expected at 80 % of copy bandwidth.
// masked_loss_normalized_kernel: a warp for each patch or token, which is read three times, twice of them from L1.
#include <algorithm>
#include <stdexcept>

#include "../core/mask.h"
#include "kernels.h"
#include "platform.h"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kInFlight = 4;         // vectors of a thread
constexpr int kGroupsPerWarp = 2;    // of the normalised kernel
constexpr int64_t kMaxCounts = 128;  // numbers that the count kernel leaves
constexpr int kMaskBytes = 64;       // of a thread of the count kernel, at least
constexpr int64_t kMaxSize = (int64_t{1} << 31) - 1;  // of a dimension: positions are 32 bits wide, offsets 64
constexpr int64_t kAlignment = 256;

// Division by a number that is known at the launch: a product and a shift below 2^31.
struct Divisor {
  int64_t size = 1;
  uint32_t factor = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t n) : size(n) {
    if (n >= int64_t{1} << 31) return;
    while ((int64_t{1} << shift) < n) ++shift;
    factor = static_cast<uint32_t>((((int64_t{1} << shift) - n) << 32) / n + 1);
  }
};

// n / d, n >= 0.
FASTATTN_DEVICE int64_t divide(int64_t n, const Divisor& d) {
  if ((n | d.size) >> 31) return n / d.size;
  const uint32_t low = static_cast<uint32_t>(n);
  return (__umulhi(low, d.factor) + low) >> d.shift;
}

// The problem as lines, in the units of the kernel: vectors.
struct Lines {
  TensorRef input, target, loss, grad_input, grad_loss;  // strides of the three outer dimensions, then that of a vector
  const uint8_t* mask = nullptr;
  int64_t mask_stride[3] = {0, 0, 0}, cell_stride = 0;
  int64_t lines = 0, channels = 1;     // channels: lines of the second outer dimension that are normalised together
  Divisor outer1, outer2, line_vectors;
  Divisor rows_per_cell, cell_vectors;
  bool element_mask = false;           // each element of a vector has a mask byte, cell_stride apart
  bool upstream_vectors = false;       // grad_loss can be read as vectors; else by elements, upstream_stride apart
  int64_t upstream_stride = 0;
};

struct LossConstants {
  LossKind kind = LossKind::kL2;
  float beta = 1.0f, inverse_beta = 1.0f;
  double eps = 0.0;
};

// Where the sums go. Null slots: reduction "none".
struct Sums {
  double* slots = nullptr;           // of each block
  int64_t* block_counts = nullptr;   // of each block, where the number of counted elements is not known before
  const int64_t* counts = nullptr;   // of the count kernel, in cells
  int64_t num_counts = 0, elements_per_count = 1;
  uint32_t* blocks_done = nullptr;
  double scale = 1.0;                // unless counted
  TensorRef loss;
};

// ---- elements ----

// Stands for elements of any type with any stride, one at a time.
struct Any {};

template <typename T>
constexpr int kVector = 16 / sizeof(T);
template <>
constexpr int kVector<Any> = 1;

FASTATTN_DEVICE float load_element(const TensorRef& t, int64_t offset) {
  switch (t.dtype) {
    case DType::kBFloat16: return to_float(static_cast<const bfloat16*>(t.ptr)[offset]);
    case DType::kFloat16: return to_float(static_cast<const half*>(t.ptr)[offset]);
    default: return static_cast<const float*>(t.ptr)[offset];
  }
}

FASTATTN_DEVICE void store_element(const TensorRef& t, int64_t offset, float x) {
  switch (t.dtype) {
    case DType::kBFloat16: static_cast<bfloat16*>(t.ptr)[offset] = from_float<bfloat16>(x); break;
    case DType::kFloat16: static_cast<half*>(t.ptr)[offset] = from_float<half>(x); break;
    default: static_cast<float*>(t.ptr)[offset] = x;
  }
}

// The bits of a vector, as they lie in memory.
template <typename T>
struct Packed {
  uint4 bits;
};
template <>
struct Packed<Any> {
  float bits;
};

template <typename T>
FASTATTN_DEVICE Packed<T> load_vector(const TensorRef& t, int64_t offset) {
  if constexpr (std::is_same_v<T, Any>) return {load_element(t, offset)};
  else return {*reinterpret_cast<const uint4*>(static_cast<const T*>(t.ptr) + offset)};
}

template <typename T>
FASTATTN_DEVICE void unpack(const Packed<T>& v, float (&x)[kVector<T>]) {
  if constexpr (std::is_same_v<T, Any>) {
    x[0] = v.bits;
  } else {
    const uint32_t words[4] = {v.bits.x, v.bits.y, v.bits.z, v.bits.w};
FASTATTN_UNROLL
    for (int n = 0; n < 4; ++n) {
      if constexpr (std::is_same_v<T, float>) {
        x[n] = __uint_as_float(words[n]);
      } else {
        const float2 pair = unpack2<T>(words[n]);
        x[2 * n] = pair.x;
        x[2 * n + 1] = pair.y;
      }
    }
  }
}

template <typename T>
FASTATTN_DEVICE void store_vector(const TensorRef& t, int64_t offset, const float (&x)[kVector<T>]) {
  if constexpr (std::is_same_v<T, Any>) {
    store_element(t, offset, x[0]);
  } else {
    uint32_t words[4];
FASTATTN_UNROLL
    for (int n = 0; n < 4; ++n) {
      if constexpr (std::is_same_v<T, float>) words[n] = __float_as_uint(x[n]);
      else words[n] = pack2<T>(x[2 * n], x[2 * n + 1]);
    }
    *reinterpret_cast<uint4*>(static_cast<T*>(t.ptr) + offset) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// ---- one vector ----

struct Place {
  int i0, i1, i2, column;  // column: vectors
};

FASTATTN_DEVICE int64_t offset_of(const TensorRef& t, const Place& at) {
  return at.i0 * t.stride[0] + at.i1 * t.stride[1] + at.i2 * t.stride[2] + at.column * t.stride[3];
}

FASTATTN_DEVICE Place place_of(const Lines& lines, int64_t vector) {
  const int64_t line = divide(vector, lines.line_vectors), i01 = divide(line, lines.outer2), i0 = divide(i01, lines.outer1);
  return {static_cast<int>(i0), static_cast<int>(i01 - i0 * lines.outer1.size), static_cast<int>(line - i01 * lines.outer2.size),
          static_cast<int>(vector - line * lines.line_vectors.size)};
}

// Bit e: element e of the vector counts.
template <int VECTOR>
FASTATTN_DEVICE uint32_t counted_bits(const Lines& lines, const Place& at) {
  const uint8_t* const row = lines.mask + at.i0 * lines.mask_stride[0] + at.i1 * lines.mask_stride[1] +
                             divide(at.i2, lines.rows_per_cell) * lines.mask_stride[2];
  if (!lines.element_mask) return row[divide(at.column, lines.cell_vectors) * lines.cell_stride] ? (1u << VECTOR) - 1 : 0;
  const uint8_t* const cells = row + static_cast<int64_t>(at.column) * VECTOR * lines.cell_stride;
  uint32_t bits = 0;
FASTATTN_UNROLL
  for (int e = 0; e < VECTOR; ++e) bits |= static_cast<uint32_t>(cells[e * lines.cell_stride] != 0) << e;
  return bits;
}

FASTATTN_DEVICE float loss_value(float d, const LossConstants& c) {
  if (c.kind == LossKind::kL2) return d * d;
  const float size = fabsf(d);
  if (c.kind == LossKind::kSmoothL1 && size < c.beta) return 0.5f * c.inverse_beta * (d * d);
  return c.kind == LossKind::kSmoothL1 ? size - 0.5f * c.beta : size;
}

FASTATTN_DEVICE float loss_slope(float d, const LossConstants& c) {
  if (c.kind == LossKind::kL2) return d + d;
  if (c.kind == LossKind::kSmoothL1 && fabsf(d) < c.beta) return d * c.inverse_beta;
  return d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : 0.0f;  // NaN: 0, as torch has it
}

// Loss and gradient of one vector, where they are wanted. Returns the sum of the losses of its counted elements.
template <typename T>
FASTATTN_DEVICE float finish_vector(const Lines& lines, const LossConstants& c, float scale, const Place& at, uint32_t counted,
                                    const float (&difference)[kVector<T>]) {
  constexpr int VECTOR = kVector<T>;
  float values[VECTOR], slopes[VECTOR], total = 0.0f;
FASTATTN_UNROLL
  for (int e = 0; e < VECTOR; ++e) {
    // A select: what does not count may be anything, and 0 * NaN is NaN.
    const float d = counted >> e & 1 ? difference[e] : 0.0f;
    values[e] = loss_value(d, c);
    slopes[e] = loss_slope(d, c) * scale;
    total += values[e];
  }
  if (lines.loss.ptr) store_vector<T>(lines.loss, offset_of(lines.loss, at), values);
  if (!lines.grad_input.ptr) return total;
  if (lines.grad_loss.ptr && counted) {
    float upstream[VECTOR];
    const int64_t offset = offset_of(lines.grad_loss, at);
    if (lines.upstream_vectors) {
      unpack<T>(load_vector<T>(lines.grad_loss, offset), upstream);
    } else {
FASTATTN_UNROLL
      for (int e = 0; e < VECTOR; ++e) upstream[e] = load_element(lines.grad_loss, offset + e * lines.upstream_stride);
    }
FASTATTN_UNROLL
    for (int e = 0; e < VECTOR; ++e) slopes[e] = counted >> e & 1 ? slopes[e] * upstream[e] : 0.0f;
  }
  store_vector<T>(lines.grad_input, offset_of(lines.grad_input, at), slopes);
  return total;
}

// ---- sums ----

template <typename T>
FASTATTN_DEVICE T warp_sum(T x) {
FASTATTN_UNROLL
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Of the whole block, in a fixed order; in thread 0. `shared`: one number for each warp.
template <typename T>
FASTATTN_DEVICE T block_sum(T x, T* shared) {
  x = warp_sum(x);
  __syncthreads();  // the numbers of the sum before
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int n = 1; n < kWarps; ++n) x += shared[n];
  return x;
}

// One over the number of counted elements. Nothing counted: the sum is 0, and so is the mean.
FASTATTN_DEVICE double mean_scale(int64_t count) { return 1.0 / static_cast<double>(max64(1, count)); }

// The factor of the loss and of the gradient, where the kernel starts.
FASTATTN_DEVICE double known_scale(const Sums& sums) {
  if (!sums.counts) return sums.scale;
  int64_t count = 0;
  for (int64_t n = threadIdx.x % 32; n < sums.num_counts; n += 32) count += sums.counts[n];
  return mean_scale(warp_sum(count) * sums.elements_per_count);
}

// The end of a block: its sum goes to its slot; the last block of all adds the slots in their order.
FASTATTN_DEVICE void finish_block(const Sums& sums, double scale, double sum, int64_t count, unsigned char* shared) {
  if (!sums.slots) return;
  double* const of_warp = reinterpret_cast<double*>(shared);
  int64_t* const counts_of_warp = reinterpret_cast<int64_t*>(of_warp + kWarps);
  uint32_t* const is_last = reinterpret_cast<uint32_t*>(counts_of_warp + kWarps);
  sum = block_sum(sum, of_warp);
  if (sums.block_counts) count = block_sum(count, counts_of_warp);
  if (threadIdx.x == 0) {
    sums.slots[blockIdx.x] = sum;
    if (sums.block_counts) sums.block_counts[blockIdx.x] = count;
    __threadfence();  // the slot is there before the block counts as done
    *is_last = atomicAdd(sums.blocks_done, 1u) + 1 == gridDim.x;
  }
  __syncthreads();
  if (!*is_last) return;
  __threadfence();
  sum = 0.0;
  count = 0;
  for (unsigned n = threadIdx.x; n < gridDim.x; n += kThreads) {
    sum += sums.slots[n];
    if (sums.block_counts) count += sums.block_counts[n];
  }
  sum = block_sum(sum, of_warp);
  if (sums.block_counts) {
    count = block_sum(count, counts_of_warp);
    scale = mean_scale(count);
  }
  if (threadIdx.x == 0) store_element(sums.loss, 0, static_cast<float>(sum * scale));
}

constexpr size_t kSharedBytes = kWarps * (sizeof(double) + sizeof(int64_t)) + sizeof(uint32_t);

// ---- kernels ----

// The cells of a mask, four dimensions.
struct MaskCells {
  const uint8_t* mask;
  int64_t cells, stride[4];
  Divisor size[4];  // the first is not used
  bool vectors;     // cells lie side by side, 16 bytes can be loaded
};

FASTATTN_DEVICE int count_bytes(uint32_t x) {
  return __popc((((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) & 0x80808080u);
}

// Cells that count, one number a block. Also clears the counter of finished blocks.
FASTATTN_KERNEL(kThreads) masked_loss_count_kernel(const FASTATTN_GRID_CONSTANT MaskCells mask, int64_t* counts,
                                                   uint32_t* blocks_done) {
  FASTATTN_SHARED(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t count = 0;
  if (mask.vectors) {
    const uint4* const vectors = reinterpret_cast<const uint4*>(mask.mask);
    for (int64_t n = first; n < mask.cells / 16; n += step) {
      const uint4 v = vectors[n];
      count += count_bytes(v.x) + count_bytes(v.y) + count_bytes(v.z) + count_bytes(v.w);
    }
    const int64_t rest = mask.cells / 16 * 16 + first;
    if (rest < mask.cells) count += mask.mask[rest] != 0;
  } else {
    for (int64_t n = first; n < mask.cells; n += step) {
      int64_t index = n, offset = 0;
FASTATTN_UNROLL
      for (int d = 3; d > 0; --d) {
        const int64_t outer = divide(index, mask.size[d]);
        offset += (index - outer * mask.size[d].size) * mask.stride[d];
        index = outer;
      }
      count += mask.mask[offset + index * mask.stride[0]] != 0;
    }
  }
  count = block_sum(count, reinterpret_cast<int64_t*>(shared));
  if (threadIdx.x != 0) return;
  counts[blockIdx.x] = count;
  if (blockIdx.x == 0) *blocks_done = 0;
}

template <typename T>
FASTATTN_KERNEL(kThreads, 2) masked_loss_kernel(const FASTATTN_GRID_CONSTANT Lines lines, LossConstants c,
                                                const FASTATTN_GRID_CONSTANT Sums sums) {
  FASTATTN_SHARED(shared);
  constexpr int VECTOR = kVector<T>;
  const int64_t vectors = lines.lines * lines.line_vectors.size;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kInFlight) + threadIdx.x;
  Place at[kInFlight];
  uint32_t counted[kInFlight];
  Packed<T> input[kInFlight], target[kInFlight];
FASTATTN_UNROLL
  for (int n = 0; n < kInFlight; ++n) {
    const int64_t vector = first + n * kThreads;
    at[n] = place_of(lines, min64(vector, vectors - 1));
    counted[n] = vector < vectors ? counted_bits<VECTOR>(lines, at[n]) : 0;
  }
FASTATTN_UNROLL
  for (int n = 0; n < kInFlight; ++n) {
    input[n] = target[n] = Packed<T>{};
    if (!counted[n]) continue;
    input[n] = load_vector<T>(lines.input, offset_of(lines.input, at[n]));
    target[n] = load_vector<T>(lines.target, offset_of(lines.target, at[n]));
  }
  const double scale = known_scale(sums);
  float sum = 0.0f;
  int64_t count = 0;
FASTATTN_UNROLL
  for (int n = 0; n < kInFlight; ++n) {
    if (first + n * kThreads >= vectors) continue;
    float x[VECTOR], y[VECTOR];
    unpack<T>(input[n], x);
    unpack<T>(target[n], y);
FASTATTN_UNROLL
    for (int e = 0; e < VECTOR; ++e) x[e] -= y[e];
    sum += finish_vector<T>(lines, c, static_cast<float>(scale), at[n], counted[n], x);
    count += __popc(counted[n]);
  }
  finish_block(sums, scale, sum, count, shared);
}

// A group: what is normalised together, `channels` x rows_per_cell lines of one cell. By a warp.
template <typename T>
FASTATTN_KERNEL(kThreads, 2) masked_loss_normalized_kernel(const FASTATTN_GRID_CONSTANT Lines lines, LossConstants c,
                                                           const FASTATTN_GRID_CONSTANT Sums sums, int64_t groups) {
  FASTATTN_SHARED(shared);
  constexpr int VECTOR = kVector<T>;
  const int lane = threadIdx.x % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t cells = lines.line_vectors.size / lines.cell_vectors.size;
  const int64_t cell_rows = lines.outer2.size / lines.rows_per_cell.size;
  const int64_t columns = lines.cell_vectors.size, vectors = lines.channels * lines.rows_per_cell.size * columns;
  const double elements = static_cast<double>(vectors * VECTOR), scale = known_scale(sums);
  double total = 0.0;
  int64_t count = 0;
  for (int64_t group = warp * kGroupsPerWarp; group < min64(groups, (warp + 1) * kGroupsPerWarp); ++group) {
    const int64_t row = group / cells, of_channels = row / cell_rows, blocks = lines.outer1.size / lines.channels;
    const Place corner{static_cast<int>(of_channels / blocks), static_cast<int>(of_channels % blocks * lines.channels),
                       static_cast<int>(row % cell_rows * lines.rows_per_cell.size), static_cast<int>(group % cells * columns)};
    const auto place = [&](int64_t vector) {
      const int64_t line = divide(vector, lines.cell_vectors), channel = divide(line, lines.rows_per_cell);
      return Place{corner.i0, corner.i1 + static_cast<int>(channel),
                   corner.i2 + static_cast<int>(line - channel * lines.rows_per_cell.size),
                   corner.column + static_cast<int>(vector - line * columns)};
    };
    const uint32_t counted = counted_bits<VECTOR>(lines, corner);
    float high = 0.0f, low = 0.0f, factor = 0.0f;
    if (counted) {
      // Deviations from the first element, then from the mean as the sum of two numbers: a spread that is small beside the
      // mean keeps its digits.
      const float start = load_element(lines.target, offset_of(lines.target, corner));
      float sum = 0.0f, y[VECTOR];
      for (int64_t v = lane; v < vectors; v += 32) {
        unpack<T>(load_vector<T>(lines.target, offset_of(lines.target, place(v))), y);
FASTATTN_UNROLL
        for (int e = 0; e < VECTOR; ++e) sum += y[e] - start;
      }
      const double mean = start + warp_sum(static_cast<double>(sum)) / elements;
      high = static_cast<float>(mean);
      low = static_cast<float>(mean - high);
      sum = 0.0f;
      for (int64_t v = lane; v < vectors; v += 32) {
        unpack<T>(load_vector<T>(lines.target, offset_of(lines.target, place(v))), y);
FASTATTN_UNROLL
        for (int e = 0; e < VECTOR; ++e) sum += (y[e] - high - low) * (y[e] - high - low);
      }
      factor = static_cast<float>(1.0 / sqrt(warp_sum(static_cast<double>(sum)) / (elements - 1.0) + c.eps));
    }
    float sum = 0.0f;
    for (int64_t v = lane; v < vectors; v += 32) {
      const Place at = place(v);
      float x[VECTOR] = {}, y[VECTOR];
      if (counted) {
        unpack<T>(load_vector<T>(lines.input, offset_of(lines.input, at)), x);
        unpack<T>(load_vector<T>(lines.target, offset_of(lines.target, at)), y);
FASTATTN_UNROLL
        for (int e = 0; e < VECTOR; ++e) x[e] -= (y[e] - high - low) * factor;
      }
      sum += finish_vector<T>(lines, c, static_cast<float>(scale), at, counted, x);
      count += __popc(counted);
    }
    total += sum;
  }
  finish_block(sums, scale, total, count, shared);
}

// ---- host ----

bool any_empty(const MaskedLossParams& p) {
  return p.size[0] == 0 || p.size[1] == 0 || p.size[2] == 0 || p.size[3] == 0;
}

// The problem in elements.
struct Shape {
  int64_t size[4], mask_stride[4];  // of the lines' dimensions; mask_stride[3] is that of a cell
  int64_t rows_per_cell = 1, cell_width = 1, channels = 1;
  TensorRef tensor[5];
};

// Dimension `to` takes the place of nothing: `from` moves there.
void move_dimension(Shape& s, int to, int from) {
  s.size[to] = s.size[from];
  s.mask_stride[to] = s.mask_stride[from];
  for (TensorRef& t : s.tensor) t.stride[to] = t.stride[from];
}

void clear_dimension(Shape& s, int d) {
  s.size[d] = 1;
  s.mask_stride[d] = 0;
  for (TensorRef& t : s.tensor) t.stride[d] = 0;
}

// Merges dimensions that every tensor and the mask run through at one stride: long lines, and few of them. The dimension to
// normalise over stays by itself.
void merge_dimensions(Shape& s, bool keep_last) {
  int inner = 3;
  for (int d = 2; d >= 0; --d) {
    if (s.size[d] == 1) continue;
    const bool fixed = inner == 3 && keep_last;
    bool runs_on = s.mask_stride[d] == s.mask_stride[inner] * s.size[inner];
    for (const TensorRef& t : s.tensor) runs_on = runs_on && (!t || t.stride[d] == t.stride[inner] * s.size[inner]);
    if (s.size[inner] == 1 && !fixed) move_dimension(s, inner, d);
    else if (runs_on && !fixed && s.size[d] * s.size[inner] <= kMaxSize) s.size[inner] *= s.size[d];
    else move_dimension(s, --inner, d);
  }
  while (--inner >= 0) clear_dimension(s, inner);
}

Shape make_shape(const MaskedLossParams& p) {
  Shape s{};
  std::copy(p.size, p.size + 4, s.size);
  s.tensor[0] = p.input;
  s.tensor[1] = p.target;
  if (p.reduction == Reduction::kNone) s.tensor[2] = p.loss;
  s.tensor[3] = p.grad_input;
  s.tensor[4] = p.grad_loss;
  if (p.patch_size == 0) {
    std::copy(p.mask_stride, p.mask_stride + 4, s.mask_stride);
    merge_dimensions(s, p.normalize_target);
    s.rows_per_cell = s.channels = 1;
    s.cell_width = s.mask_stride[3] == 0 ? s.size[3] : 1;
    return s;
  }
  // [B, C, H] lines of W pixels under the mask [B, H/p, W/p]
  s.mask_stride[0] = p.mask_stride[0];
  s.mask_stride[1] = 0;
  s.mask_stride[2] = p.mask_stride[1];
  s.mask_stride[3] = p.mask_stride[2];
  s.rows_per_cell = s.cell_width = p.patch_size;
  s.channels = p.size[1];
  // Channels that run fastest become part of the line.
  bool channels_last = true;
  for (const TensorRef& t : s.tensor) channels_last = channels_last && (!t || t.stride[3] == p.size[1] * t.stride[1]);
  if (channels_last && s.size[3] * s.size[1] <= kMaxSize) {
    for (TensorRef& t : s.tensor) t.stride[3] = t.stride[1];
    s.size[3] *= s.size[1];
    s.cell_width *= s.size[1];
    clear_dimension(s, 1);
    s.channels = 1;
  }
  return s;
}

bool vectors_fit(const TensorRef& t, DType dtype, int64_t vector) {
  return t.dtype == dtype && t.stride[3] == 1 && reinterpret_cast<uintptr_t>(t.ptr) % 16 == 0 && t.stride[0] % vector == 0 &&
         t.stride[1] % vector == 0 && t.stride[2] % vector == 0;
}

// Elements that a thread reads at once: 16 bytes, or 1.
int64_t vector_size(const MaskedLossParams& p, const Shape& s) {
  const int64_t vector = p.input.dtype == DType::kFloat32 ? 4 : 8;
  const bool by_element = s.cell_width == 1 && !p.normalize_target;
  bool fits = s.size[3] % vector == 0 && (by_element || s.cell_width % vector == 0);
  for (int n = 0; n < 4; ++n) fits = fits && (!s.tensor[n] || vectors_fit(s.tensor[n], p.input.dtype, vector));
  return fits ? vector : 1;
}

Lines make_lines(const MaskedLossParams& p, const Shape& s, int64_t vector) {
  Lines lines;
  TensorRef* const tensors[] = {&lines.input, &lines.target, &lines.loss, &lines.grad_input, &lines.grad_loss};
  for (int n = 0; n < 5; ++n) {
    *tensors[n] = s.tensor[n];
    tensors[n]->stride[3] *= vector;
  }
  lines.mask = p.mask;
  std::copy(s.mask_stride, s.mask_stride + 3, lines.mask_stride);
  lines.cell_stride = s.mask_stride[3];
  lines.lines = s.size[0] * s.size[1] * s.size[2];
  lines.channels = s.channels;
  lines.outer1 = Divisor(s.size[1]);
  lines.outer2 = Divisor(s.size[2]);
  lines.line_vectors = Divisor(s.size[3] / vector);
  lines.rows_per_cell = Divisor(s.rows_per_cell);
  lines.element_mask = s.cell_width == 1 && vector > 1;
  lines.cell_vectors = Divisor(lines.element_mask ? 1 : s.cell_width / vector);
  lines.upstream_vectors = p.grad_loss && vector > 1 && vectors_fit(s.tensor[4], p.input.dtype, vector);
  lines.upstream_stride = s.tensor[4].stride[3];
  return lines;
}

// The cells of the mask, without the dimensions that it repeats along; `repeat`: elements for each cell.
MaskCells make_cells(const MaskedLossParams& p, const Shape& s, int64_t& repeat) {
  int64_t size[4] = {s.size[0], s.size[1], s.size[2] / s.rows_per_cell, s.size[3] / s.cell_width}, stride[4];
  repeat = s.rows_per_cell * s.cell_width;
  // Kept dimensions move to the end; neighbours that run on are one.
  int inner = 4;
  for (int d = 3; d >= 0; --d) {
    if (s.mask_stride[d] == 0 || size[d] == 1) {
      repeat *= size[d];
    } else if (inner < 4 && s.mask_stride[d] == stride[inner] * size[inner]) {
      size[inner] *= size[d];
    } else {
      size[--inner] = size[d];
      stride[inner] = s.mask_stride[d];
    }
  }
  while (--inner >= 0) size[inner] = stride[inner] = 1;
  MaskCells cells{};
  cells.mask = p.mask;
  cells.cells = size[0] * size[1] * size[2] * size[3];
  for (int d = 0; d < 4; ++d) cells.stride[d] = stride[d], cells.size[d] = Divisor(size[d]);
  cells.vectors = stride[3] == 1 && cells.cells == size[3] && reinterpret_cast<uintptr_t>(p.mask) % 16 == 0;
  return cells;
}

struct Plan {
  Shape shape;
  int64_t vector, groups, blocks;
};

Plan make_plan(const MaskedLossParams& p) {
  Plan plan;
  plan.shape = make_shape(p);
  plan.vector = vector_size(p, plan.shape);
  const Shape& s = plan.shape;
  plan.groups = s.size[0] * (s.size[1] / s.channels) * (s.size[2] / s.rows_per_cell) * (s.size[3] / s.cell_width);
  plan.blocks = p.normalize_target ? ceil_div(plan.groups, kWarps * kGroupsPerWarp)
                                   : ceil_div(s.size[0] * s.size[1] * s.size[2] * s.size[3] / plan.vector, kThreads * kInFlight);
  return plan;
}

int64_t align_up(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

template <typename T>
void run(const MaskedLossParams& p, const Plan& plan, const Sums& sums) {
  const Lines lines = make_lines(p, plan.shape, plan.vector);
  const float beta = static_cast<float>(p.beta);
  const LossConstants constants{p.kind, beta, 1.0f / beta, p.normalize_eps};
  const dim3 grid(static_cast<unsigned>(plan.blocks)), block(kThreads);
  if (p.normalize_target)
    launch("masked_loss_normalized_kernel", masked_loss_normalized_kernel<T>, grid, block, kSharedBytes, p.stream, lines,
           constants, sums, plan.groups);
  else
    launch("masked_loss_kernel", masked_loss_kernel<T>, grid, block, kSharedBytes, p.stream, lines, constants, sums);
}

}  // namespace

int64_t masked_loss_workspace(const MaskedLossParams& p) {
  if (any_empty(p) || p.reduction == Reduction::kNone) return 0;
  return 2 * align_up(make_plan(p).blocks * 8) + align_up(kMaxCounts * 8) + kAlignment;
}

void masked_loss(const MaskedLossParams& p) {
  const bool is_sum = p.reduction != Reduction::kNone;
  if (any_empty(p)) {
    if (is_sum && p.loss) zero_async(p.loss.ptr, p.loss.dtype == DType::kFloat32 ? 4 : 2, p.stream);
    return;
  }
  for (const int64_t size : p.size)
    if (size > kMaxSize)
      throw std::invalid_argument("masked_loss: a dimension of " + std::to_string(size) + " elements is over 2^31");
  const Plan plan = make_plan(p);
  Sums sums;
  if (is_sum) {
    char* const slots = static_cast<char*>(p.workspace);
    char* const block_counts = slots + align_up(plan.blocks * 8);
    char* const counts = block_counts + align_up(plan.blocks * 8);
    sums.slots = reinterpret_cast<double*>(slots);
    sums.blocks_done = reinterpret_cast<uint32_t*>(counts + align_up(kMaxCounts * 8));
    sums.loss = p.loss;
    if (p.reduction == Reduction::kMean)
      sums.scale = 1.0 / static_cast<double>(p.size[0] * p.size[1] * p.size[2] * p.size[3]);
    if (p.reduction == Reduction::kMaskedMean && p.grad_input) {
      const MaskCells cells = make_cells(p, plan.shape, sums.elements_per_count);
      sums.counts = reinterpret_cast<int64_t*>(counts);
      sums.num_counts = std::min(kMaxCounts, ceil_div(cells.cells, kThreads * kMaskBytes));
      launch("masked_loss_count_kernel", masked_loss_count_kernel, dim3(static_cast<unsigned>(sums.num_counts)), dim3(kThreads),
             kSharedBytes, p.stream, cells, reinterpret_cast<int64_t*>(counts), sums.blocks_done);
    } else {
      if (p.reduction == Reduction::kMaskedMean) sums.block_counts = reinterpret_cast<int64_t*>(block_counts);
      zero_async(sums.blocks_done, sizeof(uint32_t), p.stream);
    }
  }
  if (plan.vector == 1) run<Any>(p, plan, sums);
  else if (p.input.dtype == DType::kBFloat16) run<bfloat16>(p, plan, sums);
  else if (p.input.dtype == DType::kFloat16) run<half>(p, plan, sums);
  else run<float>(p, plan, sums);
}

}  // namespace fastattn::cuda
