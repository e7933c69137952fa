// A linear prediction head fused with the masked loss: the predictions of the counted tokens, their loss and every gradient,
// of which only a block of predictions at a time exists.
//
// The counted tokens are taken kTokens at a time. Their rows of hidden are gathered, in the compute type; then
//   phase 1, a work item for each chunk of kFeatures predictions and each part of kPart tokens:
//     prediction = hidden W^T + bias, which becomes the slope of the loss, in place;
//   phase 2, an item for each block of kColumns columns of grad_hidden, and one for each chunk of rows of grad_weight:
//     grad_hidden = slopes W;  grad_weight += slopes^T hidden;  grad_bias += sum over the tokens of slopes.
// No two items write the same number and every sum is made in a fixed order, so results do not depend on the threads. Blocks of W
// are copied to scratch, where they lie side by side in the compute type: each copied element serves kTokens rows.
//
// Where the CPU multiplies pairs of bfloat16 numbers (pairs.h) the three products take those, with sums in float. Hidden and W are
// multiplied as they are; the slopes are rounded for the products of phase 2, as by torch's linear in bfloat16. The loss, grad_bias
// and grad_target come from what is not rounded.
#include "gemm.h"
#include "loss_terms.h"
#include "pairs.h"
#include "schedule.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kTokens = 256;
constexpr int kFeatures = 96;
constexpr int kPart = 64;     // tokens
constexpr int kColumns = 48;
constexpr int kParts = kTokens / kPart;

// Elements of a row, padded to whole cache lines, an odd number of them: rows below each other then share no cache set.
template <typename T>
static int64_t row_size(int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  return (ceil_div(n, kLine) | 1) * kLine;
}

template <typename T>
struct Head {
  const LinearMaskedLossParams& p;
  using Element = Operand<T>;

  int64_t chunks, hidden_ld, pairs_ld;
  bool backward;       // some gradient needs the slopes of all chunks at once
  Constants<T> constants;
  // Shared scratch
  int64_t* tokens;     // b * N + n of those that count
  Element* hidden;         // [kTokens][hidden_ld]
  Element* hidden_pairs;   // [kTokens / 2][pairs_ld], pairs along the tokens
  Element* slopes;         // [chunks][kTokens][kFeatures], or their pairs along the tokens, [chunks][kTokens / 2][kFeatures]
  Element* slope_rows;     // [chunks][kTokens][kFeatures / 2], pairs along the features
  T* slope_sums;           // [chunks][kParts][kFeatures], over the tokens of a part
  Moments<T>* moment;      // [kTokens]
  double* sums;            // [chunks][kParts]

  struct Scratch {     // of a thread
    Element *panel, *block;      // [depth of E][kFeatures]; [depth of kFeatures][kColumns]
    T *staging, *bias;           // of transpose_rows, [kFeatures]
    T *target, *predictions;     // [P] when normalised, else [kFeatures]; [kPart][kFeatures]
    T* product;                  // [max(kTokens, kFeatures)][kColumns]
  };

  explicit Head(const LinearMaskedLossParams& params) : p(params) {
    chunks = ceil_div(p.dim_out, kFeatures);
    hidden_ld = row_size<Element>(depth<T>(static_cast<int>(p.dim_in)));
    pairs_ld = row_size<Element>(p.dim_in);
    backward = p.grad_hidden || p.grad_weight || p.grad_bias;
  }

  void take(Arena& arena) {
    tokens = arena.take<int64_t>(num_tokens());
    hidden = arena.take<Element>(kTokens * hidden_ld);
    hidden_pairs = arena.take<Element>(kPairs<T> && p.grad_weight ? kTokens / 2 * pairs_ld : 0);
    slopes = arena.take<Element>(backward ? chunks * kTokens * kFeatures / kTerms<Element> : 0);
    slope_rows = arena.take<Element>(kPairs<T> && backward ? chunks * kTokens * kFeatures / 2 : 0);
    slope_sums = arena.take<T>(p.grad_bias ? chunks * kParts * kFeatures : 0);
    moment = arena.take<Moments<T>>(p.normalize_target ? kTokens : 0);
    sums = arena.take<double>(chunks * kParts);
  }
  void take(Arena& arena, Scratch& own) const {
    own.panel = arena.take<Element>(depth<T>(static_cast<int>(p.dim_in)) * kFeatures);
    own.staging = arena.take<T>(kWidth<T> * align_up(p.dim_in));
    own.bias = arena.take<T>(kFeatures);
    own.target = arena.take<T>(p.normalize_target ? max64(p.dim_out, kFeatures) : kFeatures);
    own.predictions = arena.take<T>(backward && !kPairs<T> ? 0 : kPart * kFeatures);
    own.block = arena.take<Element>(depth<T>(kFeatures) * kColumns);
    own.product = arena.take<T>(max64(kTokens, kFeatures) * kColumns);
  }

  int64_t tokens_per_sample() const { return p.grid_height * p.grid_width; }
  int64_t num_tokens() const { return p.batch * tokens_per_sample(); }
  int features_of(int64_t chunk) const { return static_cast<int>(min64(kFeatures, p.dim_out - chunk * kFeatures)); }

  bool counts(int64_t token) const {
    const int64_t b = token / tokens_per_sample(), n = token % tokens_per_sample();
    return p.mask[b * p.mask_stride[0] + n / p.grid_width * p.mask_stride[1] + n % p.grid_width * p.mask_stride[2]];
  }
  int64_t row_of(const TensorRef& tensor, int64_t token) const {
    return token / tokens_per_sample() * tensor.stride[0] + token % tokens_per_sample() * tensor.stride[1];
  }

  // Calls visit(offset, stride, k, n) for the runs of features [first, first + count) of a token in the target: n of them, from the
  // k-th on, lie `stride` elements apart.
  template <typename Visit>
  void for_runs(const TensorRef& target, int64_t token, int64_t first, int64_t count, Visit visit) const {
    const int64_t side = p.patch_size;
    if (side == 0) {
      visit(row_of(target, token) + first * target.stride[2], target.stride[2], int64_t{0}, count);
      return;
    }
    const int64_t b = token / tokens_per_sample(), n = token % tokens_per_sample();
    const int64_t corner = b * target.stride[0] + n / p.grid_width * side * target.stride[2] +
                           n % p.grid_width * side * target.stride[3];
    for (int64_t k = 0; k < count;) {
      const int64_t f = first + k, x = f % side, y = f / side % side, c = f / (side * side);
      const int64_t length = min64(side - x, count - k);
      visit(corner + c * target.stride[1] + y * target.stride[2] + x * target.stride[3], target.stride[3], k, length);
      k += length;
    }
  }

  void read_target(T* to, int64_t token, int64_t first, int64_t count) const {
    for_runs(p.target, token, first, count, [&](int64_t offset, int64_t stride, int64_t k, int64_t n) {
      if (stride == 1) convert_row(to + k, element(p.target.ptr, p.target.dtype, offset), p.target.dtype, static_cast<int>(n), 0);
      else
        for (int64_t i = 0; i < n; ++i)
          to[k + i] = static_cast<T>(load_scalar(element(p.target.ptr, p.target.dtype, offset + i * stride), p.target.dtype));
    });
  }
  // -1 times the slopes; zeros when `slopes` is null.
  void write_grad_target(const T* of, int64_t token, int64_t first, int64_t count) const {
    const TensorRef& grad = p.grad_target;
    const T nothing[kFeatures] = {};
    for_runs(grad, token, first, count, [&](int64_t offset, int64_t stride, int64_t k, int64_t n) {
      const int64_t step = stride == 1 ? min64(n, kFeatures) : 1;
      for (int64_t i = 0; i < n; i += step)
        store_row(element(grad.ptr, grad.dtype, offset + i * stride), grad.dtype, of ? of + k + i : nothing,
                  static_cast<int>(min64(step, n - i)), T(-1));
    });
  }

  void skip(int64_t token) const {
    if (p.grad_hidden)
      std::memset(element(p.grad_hidden.ptr, p.grad_hidden.dtype, row_of(p.grad_hidden, token)), 0,
                  p.dim_in * element_size(p.grad_hidden.dtype));
    if (p.grad_target) write_grad_target(nullptr, token, 0, p.dim_out);
  }

  // Rows r and, if there are so many, r + 1 of the block, r even.
  void gather(const int64_t* block, int64_t r, int64_t rows, const Scratch& own) const {
    const int count = static_cast<int>(min64(2, rows - r)), dim = static_cast<int>(p.dim_in);
    for (int64_t row = r; row < r + count; ++row) {
      const void* const from = element(p.hidden.ptr, p.hidden.dtype, row_of(p.hidden, block[row]));
      if constexpr (kPairs<T>) copy_pair_rows(hidden + row * hidden_ld, hidden_ld, from, 0, nullptr, 1, dim, 1.0f);
      else convert_row(hidden + row * hidden_ld, from, p.hidden.dtype, dim, static_cast<int>(hidden_ld));
      if (!p.normalize_target) continue;
      read_target(own.target, block[row], 0, p.dim_out);
      moment[row] = moments(own.target, p.dim_out, 1, p.dim_out, p.normalize_eps);
    }
    if constexpr (kPairs<T>)
      if (p.grad_weight)
        zip_rows(hidden_pairs + r / 2 * pairs_ld, pairs_ld, PairRows{hidden + r * hidden_ld, 2 * hidden_ld}, 0, count, dim, 0);
  }

  const void* weight_at(int64_t f, int64_t column) const {
    return element(p.weight.ptr, p.weight.dtype, f * p.weight.stride[0] + column);
  }

  // The columns of W^T for a chunk, and its bias.
  void load_chunk(int64_t chunk, const Scratch& own) const {
    const int count = features_of(chunk), dim = static_cast<int>(p.dim_in);
    const void* const from = weight_at(chunk * kFeatures, 0);
    if constexpr (kPairs<T>) transpose_pairs(own.panel, kFeatures, from, p.weight.stride[0], count, dim, 1.0f);
    else transpose_rows(own.panel, kFeatures, from, p.weight.dtype, p.weight.stride[0], count, dim, T(1), own.staging);
    if (p.bias)
      convert_row(own.bias, element(p.bias.ptr, p.bias.dtype, chunk * kFeatures), p.bias.dtype, count, kFeatures);
    else std::memset(own.bias, 0, kFeatures * sizeof(T));
  }

  // Predictions to slopes, in place, for one token; returns the sum of its losses.
  template <LossKind kKind>
  double finish_row(T* predictions, const T* bias, const T* target, int count) const {
    constexpr int W = kWidth<T>;
    Vec<T> total = zero<T>();
    for (int k = 0; k < count; k += W) {
      Vec<T> d = load(predictions + k) + load(bias + k) - load_up_to(target + k, count - k);
      if (count - k < W) d = lanes_of<T>(bits_before(count, k)) ? d : zero<T>();
      total += value<kKind, T>(d, constants);
      store(predictions + k, slope<kKind, T>(d, constants) * constants.scale);
    }
    return sum(total);
  }

  // Phase 1: tokens [first, last) of the block. The panel of the chunk is loaded.
  double predict(const int64_t* block, int64_t chunk, int first, int last, const Scratch& own) const {
    const int count = features_of(chunk);
    T* out = own.predictions;
    if constexpr (!kPairs<T>)
      if (backward) out = slopes + (chunk * kTokens + first) * kFeatures;
    gemm<Layout::kRows>(last - first, count, depth<T>(static_cast<int>(p.dim_in)), hidden + first * hidden_ld, hidden_ld,
                        own.panel, kFeatures, out, kFeatures, false);
    double total = 0;
    for (int r = first; r < last; ++r) {
      T* const row = out + (r - first) * kFeatures;
      read_target(own.target, block[r], chunk * kFeatures, count);
      if (p.normalize_target)
        for (int k = 0; k < count; ++k) own.target[k] = moment[r].normalized(own.target[k]);
      switch (p.kind) {
        case LossKind::kL1: total += finish_row<LossKind::kL1>(row, own.bias, own.target, count); break;
        case LossKind::kSmoothL1: total += finish_row<LossKind::kSmoothL1>(row, own.bias, own.target, count); break;
        default: total += finish_row<LossKind::kL2>(row, own.bias, own.target, count);
      }
      if (p.grad_target) write_grad_target(row, block[r], chunk * kFeatures, count);
    }
    if (p.grad_bias) sum_rows(slope_sums + (chunk * kParts + first / kPart) * kFeatures, out, last - first);
    if constexpr (kPairs<T>) {
      if (!backward) return total;
      const int rows = last - first;
      round_both_pairs(out, slope_rows + (chunk * kTokens + first) * kFeatures / 2, kFeatures, rows, count);
      std::memcpy(slopes + (chunk * kTokens + first) * kFeatures / 2, out, depth<T>(rows) * kFeatures * sizeof(Element));
    }
    return total;
  }

  // Phase 2: columns from `column` on of the block's rows of grad_hidden.
  void add_hidden(const int64_t* block, int rows, int64_t column, const Scratch& own) const {
    const int width = static_cast<int>(min64(kColumns, p.dim_in - column));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int count = features_of(chunk);
      const void* const from = weight_at(chunk * kFeatures, column);
      const Element* of = slopes + chunk * kTokens * kFeatures;
      if constexpr (kPairs<T>) {
        of = slope_rows + chunk * kTokens * kFeatures / 2;
        zip_rows(own.block, kColumns, PairRows{from, p.weight.stride[0]}, 0, count, width, 0);
      } else {
        convert_rows(own.block, kColumns, from, p.weight.dtype, p.weight.stride[0], count, width);
      }
      gemm<Layout::kRows>(rows, width, depth<T>(count), of, kFeatures / kTerms<Element>, own.block, kColumns, own.product, kColumns,
                          chunk > 0);
    }
    for (int r = 0; r < rows; ++r)
      store_row(element(p.grad_hidden.ptr, p.grad_hidden.dtype, row_of(p.grad_hidden, block[r]) + column), p.grad_hidden.dtype,
                own.product + r * kColumns, width, T(1));
  }

  // Phase 2: the rows of a chunk in grad_weight and grad_bias; `first` the first block, which finds nothing to add to.
  void add_weight(int rows, int64_t chunk, bool first, const Scratch& own) const {
    const int count = features_of(chunk);
    if (p.grad_bias) {
      const T* const parts = slope_sums + chunk * kParts * kFeatures;
      for (int r = 0; r < rows; r += kPart) add_row(own.product, parts + r / kPart * kFeatures, kFeatures, r == 0);
      add_row(static_cast<T*>(p.grad_bias.ptr) + chunk * kFeatures, own.product, count, first);
    }
    if (!p.grad_weight) return;
    const Element* const of = slopes + chunk * kTokens * kFeatures / kTerms<Element>;
    const Element* const with = kPairs<T> ? hidden_pairs : hidden;
    T* const grad = static_cast<T*>(p.grad_weight.ptr) + chunk * kFeatures * p.dim_in;
    for (int64_t column = 0; column < p.dim_in; column += kColumns) {
      const int width = static_cast<int>(min64(kColumns, p.dim_in - column));
      gemm<Layout::kTransposed>(count, width, depth<T>(rows), of, kFeatures, with + column, pairs_ld, own.product, kColumns, false);
      for (int f = 0; f < count; ++f) add_row(grad + f * p.dim_in + column, own.product + f * kColumns, width, first);
    }
  }

  // to[k] = sum over `count` rows.
  static void sum_rows(T* to, const T* rows, int count) {
    constexpr int W = kWidth<T>;
    for (int k = 0; k < kFeatures; k += W) {
      // In two steps: a rounding error grows with the length of the chain.
      Vec<T> total = zero<T>();
      for (int r0 = 0; r0 < count; r0 += 16) {
        Vec<T> part = zero<T>();
        for (int r = r0; r < r0 + 16 && r < count; ++r) part += load(rows + r * kFeatures + k);
        total += part;
      }
      store(to + k, total);
    }
  }
  static void add_row(T* to, const T* from, int count, bool first) {
    constexpr int W = kWidth<T>;
    for (int k = 0; k < count; k += W) {
      const Vec<T> x = load_up_to(from + k, count - k);
      store_up_to(to + k, first ? x : load_up_to(to + k, count - k) + x, count - k);
    }
  }
};

template <typename T>
static int64_t workspace_bytes(const LinearMaskedLossParams& p) {
  Head<T> head(p);
  typename Head<T>::Scratch own;
  Arena shared(nullptr), each(nullptr);
  head.take(shared);
  head.take(each, own);
  return kAlignment + shared.used + p.num_threads * each.used;
}

template <typename T>
static double run(const LinearMaskedLossParams& p) {
  Head<T> head(p);
  Arena shared(align_pointer(p.workspace));
  head.take(shared);
  const int64_t num_tokens = head.num_tokens();
  int64_t counted = 0;
  for (int64_t token = 0; token < num_tokens; ++token)
    if (head.counts(token)) head.tokens[counted++] = token;
  // Nothing counted: the sum is 0, and so is the mean.
  const double scale = p.reduction == Reduction::kSum ? 1.0
                       : 1.0 / static_cast<double>(max64(1, (p.reduction == Reduction::kMean ? num_tokens : counted) * p.dim_out));
  const T beta = static_cast<T>(p.beta);
  head.constants = {beta, 1 / beta, static_cast<T>(scale)};
  if (counted == 0 || p.dim_out == 0) {
    if (p.grad_weight) std::memset(p.grad_weight.ptr, 0, p.dim_out * p.dim_in * sizeof(T));
    if (p.grad_bias) std::memset(p.grad_bias.ptr, 0, p.dim_out * sizeof(T));
  }
  // Blocks of nearly equal size.
  const int64_t blocks = p.dim_out ? ceil_div(counted, kTokens) : 0, block_size = blocks ? ceil_div(counted, blocks) : 1;
  const int64_t column_items = p.grad_hidden ? ceil_div(p.dim_in, kColumns) : 0;
  const int64_t items = column_items + (p.grad_weight || p.grad_bias ? head.chunks : 0);
  constexpr int64_t kSerial = 1 << 18;  // multiplications not worth another thread
  const double work = static_cast<double>(counted) * static_cast<double>(p.dim_in) * static_cast<double>(p.dim_out);
  const int threads = work < kSerial ? 1 : p.num_threads;
  double total = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    typename Head<T>::Scratch own;
    Arena piece(nullptr);
    head.take(piece, own);
    Arena mine(shared.base + shared.used + thread_number() * piece.used);
    head.take(mine, own);
    int64_t loaded = -1;  // the chunk in this thread's panel
#pragma omp for schedule(static)
    for (int64_t token = 0; token < num_tokens; ++token)
      if (blocks == 0 || !head.counts(token)) head.skip(token);
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t* const block = head.tokens + n * block_size;
      const int rows = static_cast<int>(min64(block_size, counted - n * block_size));
      const int64_t parts = ceil_div(rows, kPart);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; r += 2) head.gather(block, r, rows, own);
#pragma omp for schedule(static)
      for (int64_t item = 0; item < head.chunks * parts; ++item) {
        const int64_t chunk = item / parts;
        const int first = static_cast<int>(item % parts * kPart);
        if (chunk != loaded) head.load_chunk(loaded = chunk, own);
        head.sums[item] = head.predict(block, chunk, first, static_cast<int>(min64(first + kPart, rows)), own);
      }
      // The sums are written again only behind the barrier at the end of the next block's gathering.
#pragma omp single nowait
      for (int64_t item = 0; item < head.chunks * parts; ++item) total += head.sums[item];
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < items; ++item) {
        if (item < column_items) head.add_hidden(block, rows, item * kColumns, own);
        else head.add_weight(rows, item - column_items, n == 0, own);
      }
    }
  }
  return total * scale;
}

}  // namespace

#if defined(__AVX512BF16__)

int64_t linear_masked_loss_workspace(const LinearMaskedLossParams& p) {
  return p.hidden.dtype == DType::kBFloat16 ? workspace_bytes<float>(p) : avx512::linear_masked_loss_workspace(p);
}

void linear_masked_loss(const LinearMaskedLossParams& p) {
  if (p.hidden.dtype != DType::kBFloat16) return avx512::linear_masked_loss(p);
  const double loss = run<float>(p);
  store_row(p.loss.ptr, p.loss.dtype, &loss, 1, 1.0);
}

#else

int64_t linear_masked_loss_workspace(const LinearMaskedLossParams& p) {
  return p.hidden.dtype == DType::kFloat64 ? workspace_bytes<double>(p) : workspace_bytes<float>(p);
}

void linear_masked_loss(const LinearMaskedLossParams& p) {
  const double loss = p.hidden.dtype == DType::kFloat64 ? run<double>(p) : run<float>(p);
  store_row(p.loss.ptr, p.loss.dtype, &loss, 1, 1.0);
}

#endif

}  // namespace fastattn::cpu::FASTATTN_ISA
