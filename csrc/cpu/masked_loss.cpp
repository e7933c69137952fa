// Masked reconstruction loss and its gradient in one pass over the counted elements.
//
// Both layouts are lines of `width` elements along the last dimension, each with a row of mask cells: a cell is p elements
// wide on a patch grid, one element for a mask of elements, the whole line when the mask does not vary along it. Cells that
// do not count are not read (a mask of elements: runs of kChunk elements); their gradient is filled with zeros.
//
// Work unit: about kUnit elements. Each unit sums into its own slot and the slots are added in their order, so the result
// does not depend on the threads. Inside a unit: kChunk elements (2 KB of float, in L1) are read, converted if need be,
// summed in kVectorBytes lanes and carried over to double; then their gradient is written from the same 2 KB.
// Bound by memory: bytes of input + target of the counted elements, + the gradient of all.
#include <cmath>

#include "bytes.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kChunk = 512;         // elements; at most 32 additions in a lane of 16 floats before double takes over
constexpr int64_t kUnit = 1 << 14;  // elements
constexpr int kWords = kChunk / 64;

enum TensorIndex { kInput, kTarget, kLoss, kGradInput, kGradLoss, kTensors };

// The problem as lines.
struct Lines {
  int64_t outer[3], width;      // of the lines; of a line
  TensorRef tensor[kTensors];   // strides of the three outer dimensions, then that of the line
  const uint8_t* mask;
  int64_t mask_stride[3], cell_stride;
  int64_t rows_per_cell;        // lines of the last outer dimension that share a row of cells
  int64_t cell_width;           // elements
  int64_t lines_per_unit, columns_per_unit, units;
};

FASTATTN_INLINE bool any_empty(const MaskedLossParams& p) {
  return p.size[0] == 0 || p.size[1] == 0 || p.size[2] == 0 || p.size[3] == 0;
}

// Merges dimensions that every tensor and the mask run through at one stride: long lines, and few of them. The dimension to
// normalise over stays by itself.
static void merge_dimensions(Lines& lines, int64_t size[4], int64_t mask_stride[4], bool keep_last) {
  const auto copy = [&](int to, int from) {
    size[to] = size[from];
    mask_stride[to] = mask_stride[from];
    for (TensorRef& t : lines.tensor) t.stride[to] = t.stride[from];
  };
  int inner = 3;
  for (int d = 2; d >= 0; --d) {
    if (size[d] == 1) continue;
    const bool fixed = inner == 3 && keep_last;
    bool runs_on = mask_stride[d] == mask_stride[inner] * size[inner];
    for (const TensorRef& t : lines.tensor) runs_on = runs_on && (!t || t.stride[d] == t.stride[inner] * size[inner]);
    if (size[inner] == 1 && !fixed) copy(inner, d);
    else if (runs_on && !fixed) size[inner] *= size[d];
    else copy(--inner, d);
  }
  while (--inner >= 0) {
    size[inner] = 1;
    mask_stride[inner] = 0;
    for (TensorRef& t : lines.tensor) t.stride[inner] = 0;
  }
}

static Lines make_lines(const MaskedLossParams& p) {
  Lines lines{};
  lines.tensor[kInput] = p.input;
  lines.tensor[kTarget] = p.target;
  if (p.reduction == Reduction::kNone) lines.tensor[kLoss] = p.loss;
  lines.tensor[kGradInput] = p.grad_input;
  lines.tensor[kGradLoss] = p.grad_loss;
  lines.mask = p.mask;
  int64_t size[4], mask_stride[4];
  std::memcpy(size, p.size, sizeof size);
  std::memcpy(mask_stride, p.mask_stride, sizeof mask_stride);
  if (p.patch_size > 0) {
    // [B, C, H] lines of W pixels under the mask [B, H/p, W/p]
    lines.mask_stride[0] = mask_stride[0];
    lines.mask_stride[2] = mask_stride[1];
    lines.cell_stride = mask_stride[2];
    lines.rows_per_cell = lines.cell_width = p.patch_size;
  } else {
    merge_dimensions(lines, size, mask_stride, p.normalize_target);
    std::memcpy(lines.mask_stride, mask_stride, sizeof lines.mask_stride);
    lines.cell_stride = mask_stride[3];
    lines.rows_per_cell = 1;
    lines.cell_width = mask_stride[3] == 0 ? size[3] : 1;
  }
  std::memcpy(lines.outer, size, sizeof lines.outer);
  lines.width = size[3];
  if (p.normalize_target && p.patch_size > 0) {
    // A row of patches: their elements lie in C * p lines.
    lines.units = p.size[0] * (p.size[2] / p.patch_size);
    return lines;
  }
  // What is normalised together stays together.
  lines.columns_per_unit = p.normalize_target ? lines.width : min64(lines.width, kUnit);
  lines.lines_per_unit = max64(1, kUnit / lines.width);
  lines.units = ceil_div(lines.outer[0] * lines.outer[1] * lines.outer[2], lines.lines_per_unit) *
                ceil_div(lines.width, lines.columns_per_unit);
  return lines;
}

// How many elements count. Broadcast dimensions of the mask are not walked.
static int64_t count_elements(const Lines& lines, int num_threads) {
  int64_t size[3], repeat = lines.cell_width * lines.rows_per_cell;
  for (int d = 0; d < 3; ++d) size[d] = lines.outer[d];
  size[2] /= lines.rows_per_cell;
  for (int d = 0; d < 3; ++d)
    if (lines.mask_stride[d] == 0) repeat *= size[d], size[d] = 1;
  const int64_t cells = lines.width / lines.cell_width, blocks = ceil_div(cells, kUnit);
  const int64_t items = size[0] * size[1] * size[2] * blocks;
  int64_t count = 0;
#pragma omp parallel for num_threads(num_threads) reduction(+ : count) if (items * min64(cells, kUnit) > kUnit)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t row = item / blocks, first = item % blocks * kUnit, last = min64(first + kUnit, cells);
    const uint8_t* const mask = lines.mask + row / (size[1] * size[2]) * lines.mask_stride[0] +
                                row / size[2] % size[1] * lines.mask_stride[1] + row % size[2] * lines.mask_stride[2];
    for (int64_t c = first; c < last; c += 64)
      count += __builtin_popcountll(bool_word(mask + c * lines.cell_stride, lines.cell_stride, min64(last - c, 64)));
  }
  return count * repeat;
}

// ---- the loss of one difference d = input - target ----

template <typename T>
struct Constants {
  T beta, inverse_beta;
  T scale;  // of the gradient
};

// Lanes of a comparison are -1 or 0. sign(NaN) = 0, as in torch.
template <typename T>
FASTATTN_INLINE Vec<T> sign(Vec<T> d) {
  return (d > zero<T>() ? broadcast(T(1)) : zero<T>()) - (d < zero<T>() ? broadcast(T(1)) : zero<T>());
}
template <typename T>
FASTATTN_INLINE Vec<T> absolute(Vec<T> d) {
  return d < zero<T>() ? -d : d;
}

template <LossKind kKind, typename T>
FASTATTN_INLINE Vec<T> value(Vec<T> d, const Constants<T>& c) {
  if constexpr (kKind == LossKind::kL2) return d * d;
  const Vec<T> size = absolute<T>(d);
  if constexpr (kKind == LossKind::kL1) return size;
  return size < c.beta ? d * d * (T(0.5) * c.inverse_beta) : size - T(0.5) * c.beta;
}

template <LossKind kKind, typename T>
FASTATTN_INLINE Vec<T> slope(Vec<T> d, const Constants<T>& c) {
  if constexpr (kKind == LossKind::kL2) return d + d;
  if constexpr (kKind == LossKind::kL1) return sign<T>(d);
  return absolute<T>(d) < c.beta ? d * c.inverse_beta : sign<T>(d);
}

// ---- chunks: up to kChunk elements in L1 ----

template <typename T>
FASTATTN_INLINE Vec<T> load_up_to(const T* p, int n) {
  if (n >= kWidth<T>) return load(p);
  Vec<T> v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}
template <typename T>
FASTATTN_INLINE void store_up_to(T* p, Vec<T> v, int n) {
  if (n >= kWidth<T>) store(p, v);
  else std::memcpy(p, &v, n * sizeof(T));
}

// input - target from element k on, 0 where not counted: a select, since 0 * NaN is NaN. `words` null: all count.
template <typename T>
FASTATTN_INLINE Vec<T> difference(const T* input, const T* target, const uint64_t* words, int k, int n) {
  const Vec<T> d = load_up_to(input + k, n - k) - load_up_to(target + k, n - k);
  return words ? (lanes_of<T>(words[k >> 6] >> (k & 63)) ? d : zero<T>()) : d;
}

template <LossKind kKind, typename T>
static double sum_values(const T* input, const T* target, const uint64_t* words, int n, const Constants<T>& c) {
  constexpr int W = kWidth<T>;
  Vec<T> even = zero<T>(), odd = zero<T>();
  int k = 0;
  for (; k + 2 * W <= n; k += 2 * W) {
    even += value<kKind, T>(difference(input, target, words, k, n), c);
    odd += value<kKind, T>(difference(input, target, words, k + W, n), c);
  }
  for (; k < n; k += W) even += value<kKind, T>(difference(input, target, words, k, n), c);
  return sum(even + odd);
}

template <LossKind kKind, typename T>
static void write_values(T* out, const T* input, const T* target, const uint64_t* words, int n, const Constants<T>& c) {
  for (int k = 0; k < n; k += kWidth<T>)
    store_up_to(out + k, value<kKind, T>(difference(input, target, words, k, n), c), n - k);
}

template <LossKind kKind, typename T>
static void write_slopes(T* out, const T* input, const T* target, const uint64_t* words, int n, const Constants<T>& c) {
  for (int k = 0; k < n; k += kWidth<T>)
    store_up_to(out + k, slope<kKind, T>(difference(input, target, words, k, n), c) * c.scale, n - k);
}

// slopes *= upstream where counted; what does not count stays 0 whatever its upstream gradient is.
template <typename T>
static void multiply_upstream(T* slopes, const T* upstream, const uint64_t* words, int n) {
  for (int k = 0; k < n; k += kWidth<T>) {
    const Vec<T> product = load_up_to(slopes + k, n - k) * load_up_to(upstream + k, n - k);
    store_up_to(slopes + k, words ? (lanes_of<T>(words[k >> 6] >> (k & 63)) ? product : zero<T>()) : product, n - k);
  }
}

template <typename Storage>
FASTATTN_INLINE void gather(Storage* to, const void* from, int64_t stride, int n) {
  for (int k = 0; k < n; ++k) to[k] = static_cast<const Storage*>(from)[k * stride];
}
template <typename Storage>
FASTATTN_INLINE void scatter(void* to, int64_t stride, const Storage* from, int n) {
  for (int k = 0; k < n; ++k) static_cast<Storage*>(to)[k * stride] = from[k];
}

// Elements `offset` .. of a line as T: where they lie, if they can be read there, else in the buffer.
template <typename T>
static const T* read(const TensorRef& tensor, int64_t offset, int n, T* buffer) {
  const void* from = element(tensor.ptr, tensor.dtype, offset);
  const int64_t stride = tensor.stride[3];
  if (stride == 1 && tensor.dtype == kComputeDType<T>) return static_cast<const T*>(from);
  alignas(64) double packed[kChunk];
  if (stride != 1) {
    switch (element_size(tensor.dtype)) {
      case 8: gather(packed, from, stride, n); break;
      case 4: gather(reinterpret_cast<float*>(packed), from, stride, n); break;
      default: gather(reinterpret_cast<uint16_t*>(packed), from, stride, n);
    }
    from = packed;
  }
  convert_row(buffer, from, tensor.dtype, n, n);
  return buffer;
}

template <typename T>
static void write(const TensorRef& tensor, int64_t offset, const T* values, int n) {
  void* const to = element(tensor.ptr, tensor.dtype, offset);
  const int64_t stride = tensor.stride[3];
  alignas(64) double packed[kChunk];
  store_row(stride == 1 ? to : packed, tensor.dtype, values, n, T(1));
  if (stride == 1) return;
  switch (element_size(tensor.dtype)) {
    case 8: scatter(to, stride, packed, n); break;
    case 4: scatter(to, stride, reinterpret_cast<const float*>(packed), n); break;
    default: scatter(to, stride, reinterpret_cast<const uint16_t*>(packed), n);
  }
}

static void fill_zero(const TensorRef& tensor, int64_t offset, int64_t n) {
  const int64_t size = element_size(tensor.dtype), stride = tensor.stride[3];
  char* const to = static_cast<char*>(element(tensor.ptr, tensor.dtype, offset));
  if (stride == 1) std::memset(to, 0, n * size);
  else for (int64_t k = 0; k < n; ++k) std::memset(to + k * stride * size, 0, size);
}

// ---- lines ----

// (target - mean) * factor
struct Normalization {
  double mean, factor;
};

struct Offsets {
  int64_t of[kTensors];
};

template <LossKind kKind, typename T>
struct Worker {
  const Lines& lines;
  Constants<T> constants;
  double eps;
  bool sums;  // the loss is a sum

  Offsets offsets(int64_t i0, int64_t i1, int64_t i2) const {
    Offsets at;
    for (int t = 0; t < kTensors; ++t) {
      const int64_t* stride = lines.tensor[t].stride;
      at.of[t] = i0 * stride[0] + i1 * stride[1] + i2 * stride[2];
    }
    return at;
  }

  // n counted elements, or with `words` (n <= kChunk) those whose bit is set, from column c of the line at `at`. Returns the sum.
  double add_run(const Offsets& at, int64_t c, int64_t n, const uint64_t* words, const Normalization* normalization) const {
    const TensorRef* const tensor = lines.tensor;
    alignas(64) T input_buffer[kChunk], target_buffer[kChunk], out_buffer[kChunk];
    double total = 0;
    for (const int64_t end = c + n; c < end; c += kChunk) {
      const int count = static_cast<int>(min64(end - c, kChunk));
      const auto offset = [&](int t) { return at.of[t] + c * tensor[t].stride[3]; };
      const T* const input = read(tensor[kInput], offset(kInput), count, input_buffer);
      const T* target = read(tensor[kTarget], offset(kTarget), count, target_buffer);
      if (normalization) {
        for (int k = 0; k < count; ++k)
          target_buffer[k] = static_cast<T>((target[k] - normalization->mean) * normalization->factor);
        target = target_buffer;
      }
      if (sums) total += sum_values<kKind>(input, target, words, count, constants);
      if (tensor[kLoss]) {
        write_values<kKind>(out_buffer, input, target, words, count, constants);
        write(tensor[kLoss], offset(kLoss), out_buffer, count);
      }
      if (!tensor[kGradInput]) continue;
      if (tensor[kGradInput].dtype == kComputeDType<T> && tensor[kGradInput].stride[3] == 1 && !tensor[kGradLoss]) {
        write_slopes<kKind>(static_cast<T*>(tensor[kGradInput].ptr) + offset(kGradInput), input, target, words, count,
                            constants);
        continue;
      }
      write_slopes<kKind>(out_buffer, input, target, words, count, constants);
      if (tensor[kGradLoss])  // input_buffer has done its work
        multiply_upstream(out_buffer, read(tensor[kGradLoss], offset(kGradLoss), count, input_buffer), words, count);
      write(tensor[kGradInput], offset(kGradInput), out_buffer, count);
    }
    return total;
  }

  void skip_run(const Offsets& at, int64_t c, int64_t n) const {
    for (int t = 0; t < kTensors; ++t) {
      const TensorRef& tensor = lines.tensor[t];
      if ((t == kLoss || t == kGradInput) && tensor) fill_zero(tensor, at.of[t] + c * tensor.stride[3], n);
    }
  }

  // Columns [c, end) of a line under a mask of elements.
  double add_elements(const Offsets& at, const uint8_t* mask, int64_t c, int64_t end) const {
    double total = 0;
    for (; c < end; c += kChunk) {
      const int count = static_cast<int>(min64(end - c, kChunk));
      uint64_t words[kWords], any = 0, missing = 0;
      for (int w = 0; w * 64 < count; ++w) {
        words[w] = bool_word(mask + (c + w * 64) * lines.cell_stride, lines.cell_stride, min64(count - w * 64, 64));
        any |= words[w];
        missing |= words[w] ^ bits_before(count, w * 64);
      }
      if (any) total += add_run(at, c, count, missing ? words : nullptr, nullptr);
      else skip_run(at, c, count);
    }
    return total;
  }

  // Columns [c, end) of a line under cells: one run for neighbours that agree.
  double add_cells(const Offsets& at, const uint8_t* mask, int64_t c, int64_t end) const {
    double total = 0;
    while (c < end) {
      int64_t cell = c / lines.cell_width;
      const bool counted = mask[cell * lines.cell_stride];
      int64_t stop = (cell + 1) * lines.cell_width;
      while (stop < end && static_cast<bool>(mask[++cell * lines.cell_stride]) == counted) stop += lines.cell_width;
      stop = min64(stop, end);
      if (counted) total += add_run(at, c, stop - c, nullptr, nullptr);
      else skip_run(at, c, stop - c);
      c = stop;
    }
    return total;
  }

  // Mean and factor over `channels` x `rows` pieces of n elements each.
  Normalization normalization(const Offsets& first, int64_t c, int64_t channels, int64_t rows, int64_t n) const {
    const TensorRef& target = lines.tensor[kTarget];
    alignas(64) T buffer[kChunk];
    const int64_t elements = channels * rows * n;
    double mean = 0, squares = 0;
    for (int pass = 0; pass < 2; ++pass) {
      double total = 0;
      for (int64_t piece = 0; piece < channels * rows; ++piece) {
        const int64_t at = first.of[kTarget] + piece / rows * target.stride[1] + piece % rows * target.stride[2];
        for (int64_t k0 = 0; k0 < n; k0 += kChunk) {
          const int count = static_cast<int>(min64(n - k0, kChunk));
          const T* const x = read(target, at + (c + k0) * target.stride[3], count, buffer);
          double part = 0;
          if (pass == 1) {
#pragma omp simd reduction(+ : part)
            for (int k = 0; k < count; ++k) part += (x[k] - mean) * (x[k] - mean);
          } else {
#pragma omp simd reduction(+ : part)
            for (int k = 0; k < count; ++k) part += x[k];
          }
          total += part;
        }
      }
      if (pass == 1) squares = total;
      else mean = total / elements;
    }
    return {mean, 1 / std::sqrt(squares / (elements - 1) + eps)};
  }

  // Row `y` of the patches of picture b.
  double add_normalized_patches(int64_t b, int64_t y) const {
    const int64_t p = lines.cell_width, channels = lines.outer[1];
    double total = 0;
    for (int64_t x = 0; x * p < lines.width; ++x) {
      const Offsets first = offsets(b, 0, y * p);
      const bool counted = lines.mask[b * lines.mask_stride[0] + y * lines.mask_stride[2] + x * lines.cell_stride];
      Normalization norm{};
      if (counted) norm = normalization(first, x * p, channels, p, p);
      for (int64_t channel = 0; channel < channels; ++channel) {
        for (int64_t row = 0; row < p; ++row) {
          const Offsets at = offsets(b, channel, y * p + row);
          if (counted) total += add_run(at, x * p, p, nullptr, &norm);
          else skip_run(at, x * p, p);
        }
      }
    }
    return total;
  }

  double add_unit(int64_t unit, bool normalize) const {
    if (normalize && lines.columns_per_unit == 0) {
      const int64_t grid_rows = lines.outer[2] / lines.rows_per_cell;
      return add_normalized_patches(unit / grid_rows, unit % grid_rows);
    }
    const int64_t blocks = ceil_div(lines.width, lines.columns_per_unit);
    const int64_t c = unit % blocks * lines.columns_per_unit, end = min64(c + lines.columns_per_unit, lines.width);
    const int64_t first = unit / blocks * lines.lines_per_unit;
    const int64_t last = min64(first + lines.lines_per_unit, lines.outer[0] * lines.outer[1] * lines.outer[2]);
    double total = 0;
    for (int64_t line = first; line < last; ++line) {
      const int64_t i0 = line / (lines.outer[1] * lines.outer[2]), i1 = line / lines.outer[2] % lines.outer[1];
      const int64_t i2 = line % lines.outer[2];
      const Offsets at = offsets(i0, i1, i2);
      const uint8_t* const mask = lines.mask + i0 * lines.mask_stride[0] + i1 * lines.mask_stride[1] +
                                  i2 / lines.rows_per_cell * lines.mask_stride[2];
      if (normalize && !*mask) {
        skip_run(at, c, end - c);
      } else if (normalize) {
        const Normalization norm = normalization(at, 0, 1, 1, lines.width);
        total += add_run(at, c, end - c, nullptr, &norm);
      } else if (lines.cell_width == 1) {
        total += add_elements(at, mask, c, end);
      } else {
        total += add_cells(at, mask, c, end);
      }
    }
    return total;
  }
};

template <LossKind kKind, typename T>
static double run(const MaskedLossParams& p, const Lines& lines, double scale) {
  const T beta = static_cast<T>(p.beta);
  const Worker<kKind, T> worker{lines, {beta, 1 / beta, static_cast<T>(scale)}, p.normalize_eps,
                                p.reduction != Reduction::kNone};
  double* const slots = static_cast<double*>(align_pointer(p.workspace));
#pragma omp parallel for num_threads(p.num_threads) schedule(dynamic)
  for (int64_t unit = 0; unit < lines.units; ++unit) slots[unit] = worker.add_unit(unit, p.normalize_target);
  double total = 0;
  for (int64_t unit = 0; unit < lines.units; ++unit) total += slots[unit];
  return total;
}

template <typename T>
static double run(const MaskedLossParams& p, const Lines& lines, double scale) {
  switch (p.kind) {
    case LossKind::kL1: return run<LossKind::kL1, T>(p, lines, scale);
    case LossKind::kSmoothL1: return run<LossKind::kSmoothL1, T>(p, lines, scale);
    default: return run<LossKind::kL2, T>(p, lines, scale);
  }
}

// What the sum over the counted elements is multiplied by. Nothing counted: the sum is 0, and so is the mean.
static double reduction_scale(const MaskedLossParams& p, const Lines& lines) {
  if (p.reduction == Reduction::kMaskedMean)
    return 1.0 / static_cast<double>(max64(1, count_elements(lines, p.num_threads)));
  if (p.reduction == Reduction::kMean) return 1.0 / static_cast<double>(p.size[0] * p.size[1] * p.size[2] * p.size[3]);
  return 1.0;
}

}  // namespace

int64_t masked_loss_workspace(const MaskedLossParams& p) {
  return any_empty(p) ? 0 : align_up(make_lines(p).units * static_cast<int64_t>(sizeof(double))) + kAlignment;
}

void masked_loss(const MaskedLossParams& p) {
  double loss = 0;
  if (!any_empty(p)) {
    const Lines lines = make_lines(p);
    const double scale = reduction_scale(p, lines);
    loss = scale * (p.input.dtype == DType::kFloat64 ? run<double>(p, lines, scale) : run<float>(p, lines, scale));
  }
  if (p.reduction != Reduction::kNone && p.loss) store_row(p.loss.ptr, p.loss.dtype, &loss, 1, 1.0);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
