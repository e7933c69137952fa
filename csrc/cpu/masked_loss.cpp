// Masked reconstruction loss and its gradient in one pass over the counted elements.
//
// Both layouts are lines of `width` elements along the last dimension, each with a row of mask cells: a cell is p elements
// wide on a patch grid, one element for a mask of elements, the whole line when the mask does not vary along it. Cells that
// do not count are not read (a mask of elements: runs of kChunk elements); their gradient is filled with zeros.
//
// Work unit: about kUnit elements. Each unit sums into its own slot and the slots are added in their order, so the result
// does not depend on the threads. Elements that lie side by side are read and their gradient is written in place: without a
// gradient down the rows of each patch, the next patches asked for meanwhile, else line by line. Others, and those under a mask of
// elements that is neither 0 nor 1 all along, pass through kChunk elements (2 KB of float) in L1.
// Bound by memory: bytes of input + target of the counted elements, + the gradient of all.
#include "bytes.h"
#include "loss_terms.h"
#include "schedule.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kChunk = 512;         // elements
constexpr int64_t kUnit = 1 << 14;  // elements
constexpr int kWords = kChunk / 64;
constexpr int kRuns = 64;           // runs of one line that are looked up at a time
constexpr int kPieceBlocks = 64;    // blocks, of one cache line each, of a piece of one line
constexpr int kAhead = 4;           // pieces that are asked for before they are read
constexpr int kShares = 8;          // of the units that a thread gets, to read ahead within
constexpr int64_t kStreamBytes = 4 << 20;  // a gradient from this size on is written past the caches

enum TensorIndex { kInput, kTarget, kLoss, kGradInput, kGradLoss, kTensors };

// The problem as lines.
struct Lines {
  int64_t outer[3], width;      // of the lines; of a line
  TensorRef tensor[kTensors];   // strides of the three outer dimensions, then that of the line
  const uint8_t* mask;
  int64_t mask_stride[3], cell_stride;
  int64_t rows_per_cell;        // lines of the last outer dimension that share a row of cells
  int64_t cell_width;           // elements
  int64_t lines_per_unit, columns_per_unit, units;  // columns_per_unit 0: the unit is a row of normalised patches
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
  if (lines.rows_per_cell < lines.lines_per_unit)  // whole rows of cells
    lines.lines_per_unit = lines.lines_per_unit / lines.rows_per_cell * lines.rows_per_cell;
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

// ---- chunks: up to kChunk elements in L1 ----

// Elements in the type they are stored in.
template <DType kType>
struct StoredAs {
  using type = uint16_t;
};
template <>
struct StoredAs<DType::kFloat32> {
  using type = float;
};
template <>
struct StoredAs<DType::kFloat64> {
  using type = double;
};
template <DType kType>
using Stored = typename StoredAs<kType>::type;

template <DType kType, typename T>
FASTATTN_INLINE Vec<T> load_stored(const Stored<kType>* p, int64_t n) {
  if constexpr (kType == kComputeDType<T>) {
    return load_up_to(p, n);
  } else {
    VecHalves v{};
    if (n >= kWidth<T>) v = load_halves(p);
    else std::memcpy(&v, p, n * sizeof *p);
    return from_halves(v, kType);
  }
}
template <DType kType, typename T>
FASTATTN_INLINE void store_stored(Stored<kType>* p, Vec<T> v, int64_t n) {
  if constexpr (kType == kComputeDType<T>) {
    store_up_to(p, v, n);
  } else {
    const VecHalves h = to_halves(v, kType);
    if (n >= kWidth<T>) store_halves(p, h);
    else std::memcpy(p, &h, n * sizeof *p);
  }
}
// The same past the caches; p is aligned to the vector.
template <DType kType, typename T>
FASTATTN_INLINE void stream_stored(Stored<kType>* p, Vec<T> v, int64_t n) {
  if (n < kWidth<T>) store_stored<kType, T>(p, v, n);
  else if constexpr (kType == kComputeDType<T>) stream(p, v);
  else stream(p, to_halves(v, kType));
}

// input - target from element k on, 0 where not counted: a select, since 0 * NaN is NaN. `words` null: all count.
template <typename T>
FASTATTN_INLINE Vec<T> difference(const T* input, const T* target, const uint64_t* words, int64_t k, int64_t n) {
  const Vec<T> d = load_up_to(input + k, n - k) - load_up_to(target + k, n - k);
  return words ? (lanes_of<T>(words[k >> 6] >> (k & 63)) ? d : zero<T>()) : d;
}

// Returns the sum of the losses; writes them to `values` and their slopes, times the scale, to `slopes`, where these are not null.
template <LossKind kKind, typename T>
static double add_chunk(const T* input, const T* target, const uint64_t* words, int n, const Constants<T>& c, T* values,
                        T* slopes) {
  constexpr int W = kWidth<T>, kBlock = 16 * W;
  double total = 0;
  for (int k0 = 0; k0 < n; k0 += kBlock) {
    // At most 16 additions in a lane before double takes over.
    Vec<T> block_sum = zero<T>();
    const int end = n < k0 + kBlock ? n : k0 + kBlock;
    for (int k = k0; k < end; k += W) {
      const Vec<T> d = difference(input, target, words, k, n);
      const Vec<T> v = value<kKind, T>(d, c);
      block_sum += v;
      if (values) store_up_to(values + k, v, n - k);
      if (slopes) store_up_to(slopes + k, slope<kKind, T>(d, c) * c.scale, n - k);
    }
    total += sum(block_sum);
  }
  return total;
}

// Columns [begin, end) that all count, or all do not.
struct Run {
  int64_t begin, end;
  bool counted;
};

// The loss of `rows` lines, each cut into the same runs, of elements that lie side by side; `slopes` may be null. Line by line
// and not run by run, since memory order is what the hardware prefetches; but it does not see past a gap, so what counts is
// asked for into L2 kLinesAhead lines early.
template <LossKind kKind, DType kType, DType kTargetType, typename T>
static double add_lines(const Stored<kType>* input, int64_t input_stride, const Stored<kTargetType>* target,
                        int64_t target_stride, Stored<kType>* slopes, int64_t slopes_stride, int64_t rows, const Run* runs,
                        int num_runs, const Constants<T>& c, bool streaming) {
  constexpr int W = kWidth<T>;
  constexpr int64_t kBlock = 16 * W, kLinesAhead = 2;
  const auto put = [&](Stored<kType>* to, Vec<T> v, int64_t n) __attribute__((always_inline)) {
    if (streaming) stream_stored<kType, T>(to, v, n);
    else store_stored<kType, T>(to, v, n);
  };
  double total = 0;
  Vec<T> block_sum = zero<T>();
  int64_t pending = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t ahead = r + kLinesAhead < rows ? kLinesAhead : 0;
    for (const Run* run = runs; run < runs + num_runs; ++run) {
      if (!run->counted) {
        if (!slopes) continue;
        for (int64_t k = run->begin; k < run->end; k += W) put(slopes + k, zero<T>(), run->end - k);
        continue;
      }
      for (int64_t k0 = run->begin; k0 < run->end; k0 += kBlock) {
        const int64_t end = min64(run->end, k0 + kBlock);
        Vec<T> lanes = zero<T>();  // apart from block_sum, which g++ keeps in memory since sum() takes it to pieces
        for (int64_t k = k0; k < end; k += W) {
          __builtin_prefetch(input + ahead * input_stride + k, 0, 2);
          __builtin_prefetch(target + ahead * target_stride + k, 0, 2);
          const Vec<T> d = load_stored<kType, T>(input + k, end - k) - load_stored<kTargetType, T>(target + k, end - k);
          lanes += value<kKind, T>(d, c);
          if (slopes) put(slopes + k, slope<kKind, T>(d, c) * c.scale, end - k);
        }
        block_sum += lanes;
        pending += (end - k0 + W - 1) / W * W;  // short runs take a whole addition too
        if (pending < kBlock) continue;
        // At most 31 additions in a lane before double takes over.
        total += sum(block_sum);
        block_sum = zero<T>();
        pending = 0;
      }
    }
    input += input_stride;
    target += target_stride;
    if (slopes) slopes += slopes_stride;
  }
  return total + sum(block_sum);
}

// Blocks of one cache line of elements each that all count: `blocks` in each of `rows` rows. Where the first lies, and how far
// apart the rows are, in bytes.
struct Piece {
  const char *input, *target;
  int64_t input_stride, target_stride, rows, blocks;
};

// At most 31 additions in a lane.
template <LossKind kKind, DType kType, typename T>
FASTATTN_INLINE double add_blocks(Piece piece, Piece ahead, const Constants<T>& c) {
  constexpr int64_t kBytes = kWidth<T> * sizeof(Stored<kType>);
  Vec<T> lanes = zero<T>(), others = zero<T>();
  for (int64_t r = 0; r < piece.rows; ++r) {
    for (int64_t n = 0; n < piece.blocks; ++n) {
      const int64_t asked = n < ahead.blocks ? n * kAlignment : 0;
      __builtin_prefetch(ahead.input + asked, 0, 2);
      __builtin_prefetch(ahead.target + asked, 0, 2);
#pragma GCC unroll 16
      for (int64_t k = 0; k < kAlignment; k += kBytes) {
        const int64_t at = n * kAlignment + k;
        const Vec<T> d = load_stored<kType, T>(reinterpret_cast<const Stored<kType>*>(piece.input + at), kWidth<T>) -
                         load_stored<kType, T>(reinterpret_cast<const Stored<kType>*>(piece.target + at), kWidth<T>);
        (k / kBytes % 2 ? others : lanes) += value<kKind, T>(d, c);
      }
    }
    for (int64_t n = piece.blocks; n < ahead.blocks; ++n) {
      __builtin_prefetch(ahead.input + n * kAlignment, 0, 2);
      __builtin_prefetch(ahead.target + n * kAlignment, 0, 2);
    }
    piece.input += piece.input_stride;
    piece.target += piece.target_stride;
    ahead.input += ahead.input_stride;
    ahead.target += ahead.target_stride;
  }
  return sum(lanes + others);  // were `lanes` itself given to sum(), g++ would keep it in memory
}

// The loss of a piece. Between its reads it asks for the piece `ahead`, into L2: demand misses alone, as many as L1 can wait for,
// are half of what the memory gives, and what the hardware fetches by itself lies in the gaps for the greater part where lines are
// read in memory order, and in the patches where these are read down their rows. In step with the reads, since L2 drops what it
// cannot take at once.
template <LossKind kKind, DType kType, typename T>
static double add_piece(const Piece& piece, const Piece& ahead, const Constants<T>& c) {
  constexpr int64_t kAtOnce = 31 * kWidth<T> * static_cast<int64_t>(sizeof(Stored<kType>)) / kAlignment;
  double total = 0;
  for (int64_t first = 0; first < piece.blocks; first += kAtOnce) {
    const int64_t blocks = min64(piece.blocks - first, kAtOnce), group = kAtOnce / blocks;
    for (int64_t r = 0; r < piece.rows; r += group) {
      const auto part = [&](const Piece& of, int64_t width) __attribute__((always_inline)) {
        return Piece{of.input + r * of.input_stride + first * kAlignment, of.target + r * of.target_stride + first * kAlignment,
                     of.input_stride, of.target_stride, min64(group, piece.rows - r), width};
      };
      const Piece next = part(ahead, min64(ahead.blocks - first, blocks + 1));
      if (blocks == 2) total += add_blocks<kKind, kType, T>(part(piece, 2), next, c);
      else if (blocks == 1) total += add_blocks<kKind, kType, T>(part(piece, 1), next, c);
      else total += add_blocks<kKind, kType, T>(part(piece, blocks), next, c);
    }
  }
  return total;
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

template <typename T>
static void normalize(T* x, int64_t stride, int64_t rows, int64_t n, double eps) {
  const Moments<T> of = moments(x, stride, rows, n, eps);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < n; ++k) x[r * stride + k] = of.normalized(x[r * stride + k]);
}

// One line: where its first column lies in each tensor, and its row of mask cells.
struct Line {
  int64_t index, last_index;    // among all lines; along the last outer dimension
  int64_t of[kTensors];
  const uint8_t* mask;
};

static Line line_at(const Lines& lines, int64_t index) {
  Line line;
  const int64_t i0 = index / (lines.outer[1] * lines.outer[2]), i1 = index / lines.outer[2] % lines.outer[1];
  const int64_t i2 = index % lines.outer[2];
  line.index = index;
  line.last_index = i2;
  for (int t = 0; t < kTensors; ++t) {
    const int64_t* const stride = lines.tensor[t].stride;
    line.of[t] = i0 * stride[0] + i1 * stride[1] + i2 * stride[2];
  }
  line.mask = lines.mask + i0 * lines.mask_stride[0] + i1 * lines.mask_stride[1] +
              i2 / lines.rows_per_cell * lines.mask_stride[2];
  return line;
}

// `rows` lines on, which all lie under one row of cells. Without a division as long as the last outer dimension goes on.
FASTATTN_INLINE void advance(const Lines& lines, Line& line, int64_t rows) {
  line.last_index += rows;
  if (line.last_index == lines.outer[2]) {
    line = line_at(lines, line.index + rows);
    return;
  }
  line.index += rows;
  for (int t = 0; t < kTensors; ++t) line.of[t] += rows * lines.tensor[t].stride[2];
  line.mask += lines.mask_stride[2];
}

// Where a unit lies: columns [begin, end) of `count` lines.
struct UnitRange {
  int64_t first_line, count, begin, end;
};

static UnitRange unit_range(const Lines& lines, int64_t unit) {
  const int64_t blocks = ceil_div(lines.width, lines.columns_per_unit), first = unit / blocks * lines.lines_per_unit;
  const int64_t begin = unit % blocks * lines.columns_per_unit;
  return {first, min64(lines.lines_per_unit, lines.outer[0] * lines.outer[1] * lines.outer[2] - first), begin,
          min64(begin + lines.columns_per_unit, lines.width)};
}

// Walks units piece by piece, under a mask of cells of whole cache lines.
class Walk {
 public:
  Walk(const Lines& lines, int64_t unit, int64_t last_unit)
      : lines_(lines), size_(element_size(lines.tensor[kInput].dtype)), unit_(unit), last_unit_(last_unit) {
    enter();
  }

  // The next piece that counts; returns its unit, or -1 after the last. At most two blocks wide where it has more than one row, so
  // that the piece that is asked for meanwhile has about as many.
  int64_t next(Piece& piece) {
    for (;;) {
      if (column_ == range_.end) {
        range_.count -= rows_;
        if (range_.count > 0) {
          advance(lines_, line_, rows_);
          start_rows();
        } else if (++unit_ < last_unit_) {
          enter();
        } else {
          return -1;
        }
      }
      const int64_t begin = column_, blocks = rows_ > 1 ? 2 : kPieceBlocks;
      const int64_t limit = min64(range_.end, begin + blocks * kAlignment / size_);
      const bool counted = line_.mask[cell_ * lines_.cell_stride];
      do {
        const int64_t stop = (cell_ + 1) * lines_.cell_width;
        column_ = min64(stop, limit);
        if (column_ == stop) ++cell_;
      } while (column_ < limit && static_cast<bool>(line_.mask[cell_ * lines_.cell_stride]) == counted);
      if (!counted) continue;
      const TensorRef &input = lines_.tensor[kInput], &target = lines_.tensor[kTarget];
      piece = {static_cast<const char*>(input.ptr) + (line_.of[kInput] + begin) * size_,
               static_cast<const char*>(target.ptr) + (line_.of[kTarget] + begin) * size_,
               input.stride[2] * size_,
               target.stride[2] * size_,
               rows_,
               (column_ - begin) * size_ / kAlignment};
      return unit_;
    }
  }

 private:
  void enter() {
    range_ = unit_range(lines_, unit_);
    line_ = line_at(lines_, range_.first_line);
    start_rows();
  }
  void start_rows() {
    rows_ = min64(range_.count, lines_.rows_per_cell - line_.last_index % lines_.rows_per_cell);
    column_ = range_.begin;
    cell_ = column_ / lines_.cell_width;
  }

  const Lines& lines_;
  const int64_t size_;  // of an element
  int64_t unit_, last_unit_, rows_, column_, cell_;
  UnitRange range_;  // its lines that are left
  Line line_;
};

template <LossKind kKind, typename T>
struct Worker {
  const Lines& lines;
  Constants<T> constants;
  double eps;
  bool in_place;  // every tensor is of the input's type, with its elements side by side, and the loss is a sum
  bool streaming;  // the gradient is written past the caches

  template <DType kType>
  double add_in_place(const Line& line, int64_t rows, const Run* runs, int num_runs, const T* prepared) const {
    const TensorRef* const tensor = lines.tensor;
    const auto at = [&](int t) { return tensor[t] ? static_cast<Stored<kType>*>(tensor[t].ptr) + line.of[t] : nullptr; };
    if (prepared)
      return add_lines<kKind, kType, kComputeDType<T>, T>(at(kInput), tensor[kInput].stride[2], prepared, lines.width,
                                                          at(kGradInput), tensor[kGradInput].stride[2], rows, runs,
                                                          num_runs, constants, streaming);
    return add_lines<kKind, kType, kType, T>(at(kInput), tensor[kInput].stride[2], at(kTarget), tensor[kTarget].stride[2],
                                             at(kGradInput), tensor[kGradInput].stride[2], rows, runs, num_runs, constants,
                                             streaming);
  }

  // This line and the next ones, `rows` in all, cut into the same runs. `prepared`: their target, [rows][width], or null.
  // Returns the sum.
  double add_runs(const Line& line, int64_t rows, const Run* runs, int num_runs, const T* prepared) const {
    if constexpr (kComputeDType<T> == DType::kFloat64) {
      if (in_place) return add_in_place<DType::kFloat64>(line, rows, runs, num_runs, prepared);
    } else if (in_place) {
      switch (lines.tensor[kInput].dtype) {
        case DType::kBFloat16: return add_in_place<DType::kBFloat16>(line, rows, runs, num_runs, prepared);
        case DType::kFloat16: return add_in_place<DType::kFloat16>(line, rows, runs, num_runs, prepared);
        default: return add_in_place<DType::kFloat32>(line, rows, runs, num_runs, prepared);
      }
    }
    double total = 0;
    for (int64_t row = 0; row < rows; ++row) {
      for (const Run* run = runs; run < runs + num_runs; ++run) {
        const int64_t c = run->begin, n = run->end - c;
        if (!run->counted) skip_run(line, row, c, n);
        else total += add_through_buffers(line, row, c, n, nullptr, prepared ? prepared + row * lines.width + c : nullptr);
      }
    }
    return total;
  }

  // n elements of the line `row` lines on: all of them, or with `words` (n <= kChunk) those whose bit is set. `prepared`: their
  // target, or null.
  double add_through_buffers(const Line& line, int64_t row, int64_t c, int64_t n, const uint64_t* words,
                             const T* prepared) const {
    const TensorRef* const tensor = lines.tensor;
    alignas(64) T input_buffer[kChunk], target_buffer[kChunk], values[kChunk], slopes[kChunk];
    double total = 0;
    for (const int64_t end = c + n; c < end; c += kChunk) {
      const int count = static_cast<int>(min64(end - c, kChunk));
      const auto offset = [&](int t) { return line.of[t] + row * tensor[t].stride[2] + c * tensor[t].stride[3]; };
      const T* const input = read(tensor[kInput], offset(kInput), count, input_buffer);
      const T* const target = prepared ? prepared : read(tensor[kTarget], offset(kTarget), count, target_buffer);
      if (prepared) prepared += count;
      total += add_chunk<kKind>(input, target, words, count, constants, tensor[kLoss] ? values : nullptr,
                                tensor[kGradInput] ? slopes : nullptr);
      if (tensor[kLoss]) write(tensor[kLoss], offset(kLoss), values, count);
      if (!tensor[kGradInput]) continue;
      if (tensor[kGradLoss])  // input_buffer has done its work
        multiply_upstream(slopes, read(tensor[kGradLoss], offset(kGradLoss), count, input_buffer), words, count);
      write(tensor[kGradInput], offset(kGradInput), slopes, count);
    }
    return total;
  }

  // The same for elements that do not count.
  void skip_run(const Line& line, int64_t row, int64_t c, int64_t n) const {
    for (int t = 0; t < kTensors; ++t) {
      const TensorRef& tensor = lines.tensor[t];
      if ((t == kLoss || t == kGradInput) && tensor)
        fill_zero(tensor, line.of[t] + row * tensor.stride[2] + c * tensor.stride[3], n);
    }
  }

  // Columns [c, end) of a line under a mask of elements.
  double add_elements(const Line& line, int64_t c, int64_t end) const {
    double total = 0;
    for (; c < end; c += kChunk) {
      const int count = static_cast<int>(min64(end - c, kChunk));
      uint64_t words[kWords], any = 0, missing = 0;
      for (int w = 0; w * 64 < count; ++w) {
        words[w] = bool_word(line.mask + (c + w * 64) * lines.cell_stride, lines.cell_stride, min64(count - w * 64, 64));
        any |= words[w];
        missing |= words[w] ^ bits_before(count, w * 64);
      }
      const Run run{c, c + count, any != 0};
      if (!any || !missing) total += add_runs(line, 1, &run, 1, nullptr);
      else total += add_through_buffers(line, 0, c, count, words, nullptr);
    }
    return total;
  }

  // Up to kRuns runs of columns from c on under a row of cells, neighbours that agree in one; moves c, which is in `cell`.
  int find_runs(const Line& line, int64_t& c, int64_t end, int64_t& cell, Run runs[kRuns]) const {
    int num_runs = 0;
    for (int64_t stop = (cell + 1) * lines.cell_width; c < end && num_runs < kRuns; stop += lines.cell_width) {
      const bool counted = line.mask[cell * lines.cell_stride];
      for (; stop < end && static_cast<bool>(line.mask[(cell + 1) * lines.cell_stride]) == counted; ++cell)
        stop += lines.cell_width;
      runs[num_runs++] = {c, min64(stop, end), counted};
      c = min64(stop, end);
      ++cell;
    }
    return num_runs;
  }

  // Columns [c, end) of `rows` lines under one row of cells, c in `cell`.
  double add_cells(const Line& line, int64_t rows, int64_t c, int64_t end, int64_t cell) const {
    Run runs[kRuns];
    double total = 0;
    while (c < end) {
      const int num_runs = find_runs(line, c, end, cell, runs);
      total += add_runs(line, rows, runs, num_runs, nullptr);
    }
    return total;
  }

  // `rows` lines of each channel under one row of cells; each cell, over all its lines, is normalised by itself: a row of
  // patches, or a token. The target is copied to `scratch`, [channels][rows][width], in memory order.
  double add_normalized(int64_t first_line, int64_t channels, int64_t rows, T* scratch) const {
    const TensorRef& target = lines.tensor[kTarget];
    const Line first = line_at(lines, first_line);
    Run runs[kRuns];
    double total = 0;
    for (int64_t c = 0, cell = 0; c < lines.width;) {
      const int num_runs = find_runs(first, c, lines.width, cell, runs);
      for (int64_t line = 0; line < channels * rows; ++line) {
        const int64_t start = first.of[kTarget] + line / rows * target.stride[1] + line % rows * target.stride[2];
        for (const Run* run = runs; run < runs + num_runs; ++run)
          for (int64_t k = run->begin; run->counted && k < run->end; k += kChunk) {
            const int count = static_cast<int>(min64(run->end - k, kChunk));
            T* const to = scratch + line * lines.width + k;
            const T* const from = read(target, start + k * target.stride[3], count, to);
            if (from != to) std::memcpy(to, from, count * sizeof(T));
          }
      }
      for (const Run* run = runs; run < runs + num_runs; ++run)
        for (int64_t k = run->begin; run->counted && k < run->end; k += lines.cell_width)
          normalize(scratch + k, lines.width, channels * rows, lines.cell_width, eps);
      for (int64_t channel = 0; channel < channels; ++channel)
        total += add_runs(line_at(lines, first_line + channel * lines.outer[2]), rows, runs, num_runs,
                          scratch + channel * rows * lines.width);
    }
    return total;
  }

  double add_unit(int64_t unit, bool normalize, T* scratch) const {
    if (lines.columns_per_unit == 0) {
      const int64_t grid_rows = lines.outer[2] / lines.rows_per_cell, b = unit / grid_rows, y = unit % grid_rows;
      return add_normalized(b * lines.outer[1] * lines.outer[2] + y * lines.rows_per_cell, lines.outer[1],
                            lines.rows_per_cell, scratch);
    }
    const UnitRange range = unit_range(lines, unit);
    double total = 0;
    Line line = line_at(lines, range.first_line);
    for (int64_t n = 0, rows; n < range.count; n += rows) {
      if (n > 0) advance(lines, line, rows);
      rows = min64(range.count - n, lines.rows_per_cell - line.last_index % lines.rows_per_cell);
      if (normalize) {
        total += add_normalized(line.index, 1, 1, scratch);
      } else if (lines.cell_width == 1) {
        total += add_elements(line, range.begin, range.end);
      } else {
        total += add_cells(line, rows, range.begin, range.end, range.begin / lines.cell_width);
      }
    }
    return total;
  }

  // Units [begin, end) for which can_read_ahead(), each into its slot.
  void add_units(int64_t begin, int64_t end, double* slots) const {
    for (int64_t unit = begin; unit < end; ++unit) slots[unit] = 0;
    Walk walk(lines, begin, end);
    Piece pieces[kAhead + 1];  // a ring
    int64_t units[kAhead + 1];
    for (int n = 0; n <= kAhead; ++n) units[n] = n == 0 || units[n - 1] >= 0 ? walk.next(pieces[n]) : -1;
    for (int n = 0; units[n] >= 0; n = n == kAhead ? 0 : n + 1) {
      const int last = n == 0 ? kAhead : n - 1;
      slots[units[n]] += add(pieces[n], pieces[units[last] >= 0 ? last : n]);
      units[n] = units[last] >= 0 ? walk.next(pieces[n]) : -1;
    }
  }

  double add(const Piece& piece, const Piece& ahead) const {
    if constexpr (kComputeDType<T> == DType::kFloat64) {
      return add_piece<kKind, DType::kFloat64, T>(piece, ahead, constants);
    } else {
      switch (lines.tensor[kInput].dtype) {
        case DType::kBFloat16: return add_piece<kKind, DType::kBFloat16, T>(piece, ahead, constants);
        case DType::kFloat16: return add_piece<kKind, DType::kFloat16, T>(piece, ahead, constants);
        default: return add_piece<kKind, DType::kFloat32, T>(piece, ahead, constants);
      }
    }
  }
};

// Elements of target that a thread holds normalised: a row of patches, or a token.
static int64_t scratch_size(const MaskedLossParams& p) {
  if (!p.normalize_target) return 0;
  return p.patch_size > 0 ? p.size[1] * p.patch_size * p.size[3] : p.size[3];
}

// A large gradient is not read again before it has left the caches anyway; writing it past them saves reading its lines first.
// Every run has to start at a whole vector.
static bool can_stream(const Lines& lines) {
  const TensorRef& grad = lines.tensor[kGradInput];
  if (!grad) return false;
  const int64_t size = element_size(grad.dtype);
  if (lines.outer[0] * lines.outer[1] * lines.outer[2] * lines.width * size < kStreamBytes) return false;
  int64_t misaligned = reinterpret_cast<intptr_t>(grad.ptr);
  for (int d = 0; d < 3; ++d) misaligned |= grad.stride[d] * size;
  if (lines.cell_width > 1) misaligned |= lines.cell_width * size;  // a mask of elements is taken in chunks
  return misaligned % kVectorBytes == 0;
}

// The forward pass alone, over cells of whole cache lines.
static bool can_read_ahead(const Lines& lines, bool in_place, bool normalize) {
  return in_place && !normalize && !lines.tensor[kGradInput] &&
         lines.cell_width * element_size(lines.tensor[kInput].dtype) % kAlignment == 0;
}

template <LossKind kKind, typename T>
static double run(const MaskedLossParams& p, const Lines& lines, double scale) {
  const T beta = static_cast<T>(p.beta);
  bool in_place = !lines.tensor[kLoss] && !lines.tensor[kGradLoss];
  for (const TensorRef& t : lines.tensor) in_place = in_place && (!t || (t.dtype == p.input.dtype && t.stride[3] == 1));
  const Worker<kKind, T> worker{lines, {beta, 1 / beta, static_cast<T>(scale)}, p.normalize_eps, in_place,
                               can_stream(lines)};
  Arena shared(align_pointer(p.workspace));
  double* const slots = shared.take<double>(lines.units);
  const int64_t scratch_elements = scratch_size(p);
  const int threads = static_cast<int>(min64(lines.units, p.num_threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena own(shared.base + shared.used + thread_number() * align_up(scratch_elements * static_cast<int64_t>(sizeof(T))));
    T* const scratch = own.take<T>(scratch_elements);
    if (can_read_ahead(lines, in_place, p.normalize_target)) {
      const int64_t share = max64(1, lines.units / (threads * kShares));
#pragma omp for schedule(dynamic)
      for (int64_t unit = 0; unit < lines.units; unit += share)
        worker.add_units(unit, min64(unit + share, lines.units), slots);
    } else {
#pragma omp for schedule(dynamic)
      for (int64_t unit = 0; unit < lines.units; ++unit) slots[unit] = worker.add_unit(unit, p.normalize_target, scratch);
    }
    if (worker.streaming) finish_streams();
  }
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
  if (any_empty(p)) return 0;
  const int64_t element = p.input.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return kAlignment + align_up(make_lines(p).units * static_cast<int64_t>(sizeof(double))) +
         p.num_threads * align_up(scratch_size(p) * element);
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
