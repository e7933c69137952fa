// Additive attention: O_i = sum_j softmax_j(w . tanh(q_i + k_j)) v_j, forward and backward, with an online softmax over tiles of
// 48 queries x 64 keys; no tensor of queries x keys.
//
// The tanh costs no exponential: tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^(2 q) e^(2 k)), and e^(2 q) and e^(2 k) are computed once
// for each query and each key tile. Two features share one division, w1 / x1 + w2 / x2 = (w1 x2 + w2 x1) / (x1 x2): five
// multiplications and additions and half a division for two features. Dividing is both faster and more exact than an estimate of
// the reciprocal with a step of Newton's. A score is summed in chunks of 32 features, sum w - 2 sum w r each, so that what
// cancels is small; a chunk of the key tile, [32, 64], stays in L1 while all queries pass.
//
// Three paths, chosen for each pair of tiles by their largest |q| and |k|:
//   plain     no product e^(2 q) e^(2 k) exceeds 2^60, so that x1 x2 is finite;
//   clamped   x is cut off at 2^60, where 2 r is far below what the type tells from 0;
//   direct    an |x| beyond the guard, whose exponential the type does not hold: e^(2 (q + k)) for each pair.
//
// Scores: a key is a lane, e^(2 k) is transposed. Gradients: d tanh(x) / dx = 4 r (1 - r), and a feature is a lane: then the sums over
// queries and keys are plain additions,
//     u = dS_ij r (1 - r),  dQ_i += 4 w u,  dK_j += 4 w u,  dw += dS_ij (1 - 2 r)
// and two queries share one division. 1 - r is formed as r e^(2 q) e^(2 k), which loses no digits where r is close to 1.
//
// Order: as in attention_backward.cpp. A work item of the backward is one batch, or a share of its key tiles when there are few
// batches; dQ and dw are then summed in parts, which are added in a fixed order.
#include <cmath>

#include "../core/softmax.h"
#include "forward_rows.h"
#include "schedule.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kChunk = 32;     // features, even
constexpr int kRowBlock = 4;   // queries that pass a vector of keys, or of features, together

enum class Path { kPlain, kClamped, kDirect };

template <typename T>
constexpr T kGuard = sizeof(T) == 8 ? T(340) : T(43);  // e^(2 x) is a normal number up to here
template <typename T>
constexpr T kLargest = T(int64_t{1} << 60);

template <typename T>
static Path choose_path(T largest_query, T largest_key) {
  if (!(largest_query <= kGuard<T> && largest_key <= kGuard<T>)) return Path::kDirect;
  return largest_query + largest_key <= T(20.79) ? Path::kPlain : Path::kClamped;  // 30 ln 2 = 20.794
}

// ---- e^(2 x) ----

// x[0 .. count) = e^(2 x), in whole vectors; returns the largest |x|, NaN apart. 2 x = n ln 2 + y with ln 2 in two parts, so that the
// error stays one of rounding however large x is; e^y by its series, |y| <= ln 2 / 2. Beyond kGuard the result is not used.
template <typename T>
static T exponentials(T* x, int64_t count) {
  constexpr bool kFloat = sizeof(T) == sizeof(float);
  constexpr int kDegree = kFloat ? 7 : 13;  // what is left out: 5e-9, 4e-18
  const Vec<T> magic = broadcast(kFloat ? T(12582912.0) : T(6755399441055744.0));
  const Vec<T> high = broadcast(kFloat ? T(-0.693359375) : T(-6.93145751953125e-1));
  const Vec<T> low = broadcast(kFloat ? T(2.12194440e-4) : T(-1.42860682030941723212e-6));
  Vec<T> largest = zero<T>();
  for (int64_t n = 0; n < count; n += kWidth<T>) {
    const Vec<T> v = load(x + n), twice = v + v;
    const Vec<T> number = v == v ? v : zero<T>();  // Arm's maximum would keep a NaN, and lose what its lane holds besides
    largest = max(number, max(-number, largest));
    const Vec<T> t = fma(twice, broadcast(T(kLog2E)), magic), whole = t - magic;
    const Vec<T> y = fma(whole, low, fma(whole, high, twice));
    Vec<T> p = zero<T>();
#pragma GCC unroll 16
    for (int k = kDegree; k >= 0; --k) {
      double factorial = 1;
      for (int m = 2; m <= k; ++m) factorial *= m;
      p = fma(p, y, broadcast(static_cast<T>(1.0 / factorial)));
    }
    p = add_to_exponent<T, kFloat ? 23 : 52>(p, t);
    store(x + n, v == v ? p : v);
  }
  return horizontal_max(largest);
}

// No more than `largest`; a NaN stays.
template <typename T>
FASTATTN_INLINE Vec<T> cut_off(Vec<T> x, T largest) {
  return x > broadcast(largest) ? broadcast(largest) : x;
}

// e^(2 (q + k)), cut off, from the factors or, for the direct path, from q and k.
template <typename T, Path kPath>
FASTATTN_INLINE Vec<T> exponential(Vec<T> q, Vec<T> k) {
  if constexpr (kPath == Path::kDirect) return exp2(cut_off<T>((q + k) * broadcast(static_cast<T>(2 * kLog2E)), 60));
  else if constexpr (kPath == Path::kClamped) return cut_off<T>(q * k, kLargest<T>);
  else return q * k;
}

// 1 + e^(2 (q + k)), the same.
template <typename T, Path kPath>
FASTATTN_INLINE Vec<T> one_plus_exponential(Vec<T> q, Vec<T> k) {
  if constexpr (kPath == Path::kDirect) return broadcast(T(1)) + exponential<T, kPath>(q, k);
  else if constexpr (kPath == Path::kClamped) return cut_off<T>(fma(q, k, broadcast(T(1))), kLargest<T>);
  else return fma(q, k, broadcast(T(1)));
}

// ---- scores of a tile ----

// kRows queries against one vector of keys: scores (+)= sum w - 2 sum w r over `count` features, an even number. query [kRows][ld],
// key_t [count][kTileN].
template <typename T, int kRows, Path kPath>
FASTATTN_NOINLINE void score_block(int count, const T* __restrict query, int64_t ld, const T* __restrict key_t,
                                   const T* __restrict weight, T weight_sum, T* __restrict scores, bool accumulate) {
  Vec<T> acc[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) acc[i] = zero<T>();
  for (int d = 0; d < count; d += 2) {
    const Vec<T> k1 = load(key_t + d * kTileN), k2 = load(key_t + (d + 1) * kTileN);
    const Vec<T> w1 = broadcast(weight[d]), w2 = broadcast(weight[d + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> q1 = broadcast(query[i * ld + d]), q2 = broadcast(query[i * ld + d + 1]);
      const Vec<T> x1 = one_plus_exponential<T, kPath>(q1, k1), x2 = one_plus_exponential<T, kPath>(q2, k2);
      acc[i] += fma(w1, x2, w2 * x1) / (x1 * x2);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const Vec<T> sum = fma(acc[i], broadcast(T(-2)), broadcast(weight_sum));
    T* const at = scores + i * kTileN;
    store(at, accumulate ? sum + load(at) : sum);
  }
}

template <typename T>
struct Weights {
  int features;        // padded to whole vectors; the weights there are 0
  const T *w, *sums;   // [features], [chunks]: of each chunk
};

// scores [rows][kTileN], keys [begin, end) in whole vectors. query [rows][weights.features], key_t [weights.features][kTileN].
template <typename T, Path kPath>
static void score_tile(const Weights<T>& weights, const T* query, int rows, const T* key_t, int begin, int end, T* scores) {
  const int64_t ld = weights.features;
  for (int c = 0; c < weights.features; c += kChunk) {
    const int count = weights.features - c < kChunk ? weights.features - c : kChunk;
    for (int j = begin; j < end; j += kWidth<T>) {
      for (int i = 0; i < rows; i += kRowBlock) {
        const T *const q = query + i * ld + c, *const k = key_t + c * kTileN + j;
        T* const s = scores + i * kTileN + j;
        switch (rows - i) {
          case 1: score_block<T, 1, kPath>(count, q, ld, k, weights.w + c, weights.sums[c / kChunk], s, c > 0); break;
          case 2: score_block<T, 2, kPath>(count, q, ld, k, weights.w + c, weights.sums[c / kChunk], s, c > 0); break;
          case 3: score_block<T, 3, kPath>(count, q, ld, k, weights.w + c, weights.sums[c / kChunk], s, c > 0); break;
          default: score_block<T, 4, kPath>(count, q, ld, k, weights.w + c, weights.sums[c / kChunk], s, c > 0);
        }
      }
    }
  }
}

template <typename T>
static void score_tile(Path path, const Weights<T>& weights, const T* query, int rows, const T* key_t, int begin, int end,
                       T* scores) {
  if (path == Path::kPlain) score_tile<T, Path::kPlain>(weights, query, rows, key_t, begin, end, scores);
  else if (path == Path::kClamped) score_tile<T, Path::kClamped>(weights, query, rows, key_t, begin, end, scores);
  else score_tile<T, Path::kDirect>(weights, query, rows, key_t, begin, end, scores);
}

// ---- operands ----

FASTATTN_INLINE void* row_at(const TensorRef& x, int64_t b, int64_t i) {
  return element(x.ptr, x.dtype, b * x.stride[0] + i * x.stride[1]);
}

// Whole vectors, and one where there is no feature at all: then every score is 0.
template <typename T>
static int64_t padded_features(const AdditiveAttentionParams& p) {
  return round_up(static_cast<int>(max64(1, p.features)), kWidth<T>);
}

// Rows i .. i + rows - 1 as T, [rows][ld], zero from dim on; rows in `zero_rows` are zeros.
template <typename T>
static void copy_rows(T* dst, int64_t ld, const TensorRef& x, int64_t b, int64_t i, int rows, int64_t dim, uint64_t zero_rows) {
  convert_rows(dst, ld, row_at(x, b, i), x.dtype, x.stride[1], rows, static_cast<int>(dim), zero_rows);
}

// key_t [ld][kTileN] of rows [keys][ld] in scratch.
template <typename T>
static void transpose_tile(T* key_t, const T* key, int64_t ld, int keys, T* staging) {
  transpose_rows<T>(key_t, kTileN, key, kComputeDType<T>, ld, keys, static_cast<int>(ld), T(1), staging);
}

template <typename T>
static Weights<T> load_weights(const AdditiveAttentionParams& p, T* w, T* sums, int64_t ld) {
  convert_row(w, p.score_weight.ptr, p.score_weight.dtype, static_cast<int>(p.features), static_cast<int>(ld));
  for (int64_t c = 0; c < ld; c += kChunk) {
    double sum = 0;
    for (int64_t d = c; d < min64(ld, c + kChunk); ++d) sum += w[d];
    sums[c / kChunk] = static_cast<T>(sum);
  }
  return {static_cast<int>(ld), w, sums};
}

// A tile of keys. `key` is e^(2 k), or k itself where some |k| is beyond the guard: then, or where a tile of queries is, the pair
// takes the direct path, with k as it is.
template <typename T>
struct KeyTile {
  T *rows, *transposed;  // of which `direct` tells what they hold
  T largest;             // |k|
  bool direct;
  uint64_t dead;         // keys that nobody attends to: zeros
};

template <typename T>
static void load_key_tile(KeyTile<T>& tile, const AdditiveAttentionParams& p, int64_t ld, int64_t b, int64_t j0, int keys, bool direct,
                          T* staging) {
  copy_rows(tile.rows, ld, p.key, b, j0, keys, p.features, tile.dead);
  tile.direct = direct;
  if (!direct) tile.largest = exponentials(tile.rows, keys * ld);
  transpose_tile(tile.transposed, tile.rows, ld, keys, staging);
}

// Brings the tile into the form that the path needs. Only problems with numbers beyond the guard ever change it.
template <typename T>
static bool fit_key_tile(KeyTile<T>& tile, Path path, const AdditiveAttentionParams& p, int64_t ld, int64_t b, int64_t j0, int keys,
                         T* staging) {
  if ((path == Path::kDirect) == tile.direct) return false;
  load_key_tile(tile, p, ld, b, j0, keys, path == Path::kDirect, staging);
  return true;
}

// ---- forward ----

constexpr int kMaxSubTiles = 8;
constexpr int64_t kItemBytes = 256 * 1024;  // e^(2 Q) and O of an item: within L2 beside the tiles of K and V
constexpr int64_t kItemsPerThread = 4;      // smaller items rather than idle threads

struct Plan {
  int sub_tiles;  // per item
  int64_t rows_per_item, items_per_batch, items;
};

template <typename T>
static Plan make_plan(const AdditiveAttentionForwardParams& p) {
  const int64_t tiles = ceil_div(p.len_q, kTileM), tile_bytes = kTileM * (p.features + p.dim_v) * static_cast<int64_t>(sizeof(T));
  int64_t sub_tiles = max64(1, min64(kMaxSubTiles, kItemBytes / max64(1, tile_bytes)));
  while (sub_tiles > 1 && p.batch * ceil_div(tiles, sub_tiles) < kItemsPerThread * p.num_threads) --sub_tiles;
  const int64_t items_per_batch = ceil_div(tiles, sub_tiles);
  if (items_per_batch) sub_tiles = ceil_div(tiles, items_per_batch);  // even items
  return {static_cast<int>(sub_tiles), sub_tiles * kTileM, items_per_batch, p.batch * items_per_batch};
}

// Rows of Q and K take ld, rows of O and V ld_v.
template <typename T>
struct Scratch {
  int64_t ld, ld_v;
  T *query, *out, *row_max, *row_sum;  // per sub-tile
  T *scores, *rescale, *key, *key_t, *value, *direct_query, *staging, *weight, *weight_sums;
  TileMask* masks;
};

template <typename T>
static Scratch<T> carve(Arena& arena, const AdditiveAttentionForwardParams& p, const Plan& plan) {
  constexpr int W = kWidth<T>;
  Scratch<T> s;
  s.ld = padded_features<T>(p);
  s.ld_v = round_up(static_cast<int>(p.dim_v), W);
  s.query = arena.take<T>(plan.sub_tiles * kTileM * s.ld);
  s.out = arena.take<T>(plan.sub_tiles * kTileM * s.ld_v);
  s.row_max = arena.take<T>(plan.sub_tiles * kTileM);
  s.row_sum = arena.take<T>(plan.sub_tiles * kTileM);
  s.scores = arena.take<T>(kTileM * kTileN);
  s.rescale = arena.take<T>(kTileM);
  s.key = arena.take<T>(kTileN * s.ld);
  s.key_t = arena.take<T>(kTileN * s.ld);
  s.value = arena.take<T>(kTileN * s.ld_v);
  s.direct_query = arena.take<T>(kTileM * s.ld);
  s.staging = arena.take<T>(W * s.ld);
  s.weight = arena.take<T>(s.ld);
  s.weight_sums = arena.take<T>(s.ld / kChunk + 1);
  s.masks = arena.take<TileMask>(plan.sub_tiles);
  return s;
}

// One sub-tile of an item.
template <typename T>
struct SubTile {
  int64_t i0;
  int rows;
  bool started;  // O holds something
  T largest;     // |q|
  T *query, *out, *row_max, *row_sum;
};

template <typename T>
static void run_item(const AdditiveAttentionForwardParams& p, const Plan& plan, const Scratch<T>& s, const Weights<T>& weights,
                     int64_t item) {
  constexpr int W = kWidth<T>;
  const int64_t b = item / plan.items_per_batch, first_row = item % plan.items_per_batch * plan.rows_per_item;
  const int64_t last_row = min64(p.len_q, first_row + plan.rows_per_item);
  const int dim_v = static_cast<int>(p.dim_v);

  SubTile<T> sub_tiles[kMaxSubTiles];
  int count = 0;
  for (int64_t i0 = first_row; i0 < last_row; i0 += kTileM, ++count) {
    const int rows = static_cast<int>(min64(kTileM, last_row - i0));
    SubTile<T>& sub = sub_tiles[count];
    sub = {i0, rows, false, T(0), s.query + count * kTileM * s.ld, s.out + count * kTileM * s.ld_v, s.row_max + count * kTileM,
           s.row_sum + count * kTileM};
    copy_rows(sub.query, s.ld, p.query, b, i0, rows, p.features, 0);
    sub.largest = exponentials(sub.query, rows * s.ld);
    for (int r = 0; r < rows; ++r) {
      sub.row_max[r] = -kInfinity<T>;
      sub.row_sum[r] = T(0);
    }
  }

  const bool value_in_place = rows_in_place<T>(p.value.dtype, p.value.stride[1], dim_v);
  const KeyInterval range = key_range(p.mask, b, first_row, last_row, p.len_k);
  for (int64_t j0 = range.first / kTileN * kTileN; j0 < range.last; j0 += kTileN) {
    const int keys = static_cast<int>(min64(kTileN, p.len_k - j0));
    uint64_t live = 0;
    for (int n = 0; n < count; ++n) {
      make_tile_mask(s.masks[n], p.mask, b, 0, sub_tiles[n].i0, sub_tiles[n].rows, j0, keys);
      live |= s.masks[n].columns;
    }
    if (!live) continue;
    const uint64_t dead = ~live & bits_before(keys, 0);
    KeyTile<T> key{s.key, s.key_t, T(0), false, dead};
    load_key_tile(key, p, s.ld, b, j0, keys, false, s.staging);
    Rows<T> value{s.value, s.ld_v};
    if (value_in_place && !dead) value = {static_cast<const T*>(row_at(p.value, b, j0)), p.value.stride[1]};
    else copy_rows(s.value, s.ld_v, p.value, b, j0, keys, p.dim_v, dead);

    for (int n = 0; n < count; ++n) {
      SubTile<T>& sub = sub_tiles[n];
      const TileMask& mask = s.masks[n];
      if (mask.tile_class == TileClass::kEmpty) continue;
      const bool partial = mask.tile_class == TileClass::kPartial;
      const int begin = first_bit(mask.columns) / W * W, end = end_bit(mask.columns);
      const Path path = choose_path(sub.largest, key.largest);
      const T* query = sub.query;
      if (path == Path::kDirect) {
        copy_rows(s.direct_query, s.ld, p.query, b, sub.i0, sub.rows, p.features, 0);
        query = s.direct_query;
      }
      fit_key_tile(key, path, p, s.ld, b, j0, keys, s.staging);
      score_tile(path, weights, query, sub.rows, key.transposed, begin, end, s.scores);
      for (int r = 0; r < sub.rows; ++r) {
        const uint64_t allowed = partial ? mask.rows[r] : bits_before(end, 0);
        softmax_row(s.scores + r * kTileN + begin, end - begin, sub.row_max + r, sub.row_sum + r, s.rescale + r, T(1),
                    static_cast<T>(kLog2E), static_cast<const T*>(nullptr), allowed >> begin, ~uint64_t{0});
      }
      if (sub.started) rescale_rows(sub.out, s.ld_v, sub.rows, s.rescale);
      gemm<Layout::kRows>(sub.rows, dim_v, end - begin, s.scores + begin, kTileN, value.ptr + begin * value.ld, value.ld, sub.out,
                          s.ld_v, sub.started);
      sub.started = true;
    }
  }

  for (int n = 0; n < count; ++n) {
    const SubTile<T>& sub = sub_tiles[n];
    if (!sub.started) std::memset(sub.out, 0, sub.rows * s.ld_v * sizeof(T));
    for (int r = 0; r < sub.rows; ++r) {
      const int64_t i = sub.i0 + r;
      store_row(row_at(p.out, b, i), p.out.dtype, sub.out + r * s.ld_v, dim_v, softmax_normalizer(sub.row_sum[r]));
      const double lse = softmax_lse(softmax_shift(sub.row_max[r]), sub.row_sum[r]);
      void* const row_lse = element(p.lse.ptr, p.lse.dtype, b * p.len_q + i);
      if (p.lse.dtype == DType::kFloat64) *static_cast<double*>(row_lse) = lse;
      else *static_cast<float*>(row_lse) = static_cast<float>(lse);
    }
  }
}

// Pairs an item will touch, by arithmetic, or tiles where a tile map tells.
static int64_t item_cost(const AdditiveAttentionForwardParams& p, const Plan& plan, int64_t item) {
  const int64_t b = item / plan.items_per_batch, first = item % plan.items_per_batch * plan.rows_per_item;
  const int64_t last = min64(p.len_q, first + plan.rows_per_item);
  int64_t cost = 0;
  for (int64_t i0 = first; i0 < last; i0 += kTileM) {
    const KeyInterval keys = key_range(p.mask, b, i0, min64(last, i0 + kTileM), p.len_k);
    int64_t sub_cost = max64(0, keys.last - keys.first);
    if (p.mask.live && p.mask.block_m == kTileM && p.mask.block_n == kTileN) {
      const uint64_t* const live = p.mask.live + b * p.mask.stride_map_b + i0 / kTileM * p.mask.map_words_per_row;
      int64_t tiles = 0;
      for (int64_t w = 0; w < p.mask.map_words_per_row; ++w) tiles += __builtin_popcountll(live[w]);
      sub_cost = min64(sub_cost, tiles * kTileN);
    }
    cost += sub_cost;
  }
  return cost;
}

template <typename T>
static int64_t workspace_bytes(const AdditiveAttentionForwardParams& p) {
  const Plan plan = make_plan<T>(p);
  Arena shared(nullptr), thread(nullptr);
  shared.take<int64_t>(plan.items);
  shared.take<int64_t>(plan.items);
  carve<T>(thread, p, plan);
  return kAlignment + shared.used + p.num_threads * thread.used;
}

template <typename T>
static void run(const AdditiveAttentionForwardParams& p) {
  const Plan plan = make_plan<T>(p);
  if (plan.items == 0) return;
  Arena shared(align_pointer(p.workspace)), counter(nullptr);
  int64_t* const order = shared.take<int64_t>(plan.items);
  int64_t* const cost = shared.take<int64_t>(plan.items);
  carve<T>(counter, p, plan);
  const int64_t thread_bytes = counter.used;
  char* const scratch = shared.base + shared.used;
  for (int64_t n = 0; n < plan.items; ++n) cost[n] = has_mask(p.mask) ? item_cost(p, plan, n) : 0;
  order_by_cost(order, cost, plan.items);

  const int threads = static_cast<int>(min64(plan.items, effective_threads(p.num_threads)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena own(scratch + thread_number() * thread_bytes);
    const Scratch<T> s = carve<T>(own, p, plan);
    const Weights<T> weights = load_weights(p, s.weight, s.weight_sums, s.ld);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < plan.items; ++n) run_item<T>(p, plan, s, weights, order[n]);
  }
}

// ---- backward: gradients of a tile of scores ----

// kRows queries against `keys` keys, for one vector of features: what dS gives to them and to the weight. query, grad_query:
// kRows rows at that vector; ds: kRows rows at the first key; key, grad_key [keys][W].
template <typename T, int kRows, Path kPath>
FASTATTN_NOINLINE void gradient_block(int keys, const T* const* query, const T* const* ds, T* const* grad_query, int feature,
                                      const T* __restrict key, T* __restrict grad_key, T* __restrict grad_weight) {
  constexpr int W = kWidth<T>;
  Vec<T> q[kRows], gq[kRows], gw = zero<T>();
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    q[i] = load(query[i] + feature);
    gq[i] = zero<T>();
  }
  for (int j = 0; j < keys; ++j) {
    const Vec<T> k = load(key + j * W);
    Vec<T> gk = load(grad_key + j * W), e[kRows], r[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) e[i] = exponential<T, kPath>(q[i], k);
#pragma GCC unroll 4
    for (int i = 0; i + 1 < kRows; i += 2) {
      const Vec<T> x1 = e[i] + T(1), x2 = e[i + 1] + T(1), both = broadcast(T(1)) / (x1 * x2);
      r[i] = both * x2;
      r[i + 1] = both * x1;
    }
    if constexpr (kRows % 2) r[kRows - 1] = broadcast(T(1)) / (e[kRows - 1] + T(1));
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> part = broadcast(ds[i][j]) * r[i], u = part * (r[i] * e[i]);
      gw += part;
      gq[i] += u;
      gk += u;
    }
    store(grad_key + j * W, gk);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) store(grad_query[i] + feature, load(grad_query[i] + feature) + gq[i]);
  store(grad_weight + feature, load(grad_weight + feature) + gw);
}

// Rows of the tile that attend to something, and where their operands lie.
template <typename T>
struct GradientRows {
  int count;
  const T *query[kTileM], *ds[kTileM];
  T* grad_query[kTileM];
};

// key, grad_key [features / W][kTileN][W], keys [begin, end); ds at key 0.
template <typename T, Path kPath>
static void gradient_tile(const GradientRows<T>& rows, int features, const T* key, T* grad_key, int begin, int end,
                          T* grad_weight) {
  constexpr int W = kWidth<T>;
  const int keys = end - begin;
  for (int d = 0; d < features; d += W) {
    const T* const k = key + (d * kTileN + begin * W);
    T* const gk = grad_key + (d * kTileN + begin * W);
    for (int i = 0; i < rows.count; i += kRowBlock) {
      const T *const *const q = rows.query + i, *const *const ds = rows.ds + i;
      T* const* const gq = rows.grad_query + i;
      switch (rows.count - i) {
        case 1: gradient_block<T, 1, kPath>(keys, q, ds, gq, d, k, gk, grad_weight); break;
        case 2: gradient_block<T, 2, kPath>(keys, q, ds, gq, d, k, gk, grad_weight); break;
        case 3: gradient_block<T, 3, kPath>(keys, q, ds, gq, d, k, gk, grad_weight); break;
        default: gradient_block<T, 4, kPath>(keys, q, ds, gq, d, k, gk, grad_weight);
      }
    }
  }
}

// ---- backward: the problem ----

constexpr int64_t kMaxChunks = 16;  // parts of dQ

struct BackwardPlan {
  int64_t tiles_q, chunks, items;  // chunks: shares of the key tiles of a batch
};

static BackwardPlan make_backward_plan(const AdditiveAttentionBackwardParams& p) {
  const int64_t tiles_k = ceil_div(p.len_k, kTileN), wanted = 2 * p.num_threads;
  int64_t chunks = 1;
  if (p.batch && p.num_threads > 1 && p.batch < wanted)
    chunks = max64(1, min64(min64(kMaxChunks, tiles_k), ceil_div(wanted, p.batch)));
  return {ceil_div(p.len_q, kTileM), chunks, p.batch * chunks};
}

template <typename T>
struct BackwardScratch {
  int64_t ld, ld_v;
  T *query, *shift, *delta, *largest;                     // [L, ld] e^(2 Q), [L], [L], [tiles]
  T *p, *ds;                                              // [kTileM, kTileN]
  T *key, *key_t, *key_blocks, *grad_key, *value, *value_t, *grad_value, *grad_out, *direct_query;
  T *staging, *row, *weight, *weight_sums, *tile_weight;  // tile_weight: sum of dS r of one tile
  TileMask* masks;                                        // [tiles]
};

template <typename T>
static BackwardScratch<T> carve(Arena& arena, const AdditiveAttentionBackwardParams& p, const BackwardPlan& plan) {
  constexpr int W = kWidth<T>;
  BackwardScratch<T> s;
  s.ld = padded_features<T>(p);
  s.ld_v = round_up(static_cast<int>(p.dim_v), W);
  s.query = arena.take<T>(p.len_q * s.ld);
  s.shift = arena.take<T>(p.len_q);
  s.delta = arena.take<T>(p.len_q);
  s.largest = arena.take<T>(plan.tiles_q);
  s.p = arena.take<T>(kTileM * kTileN);
  s.ds = arena.take<T>(kTileM * kTileN);
  s.key = arena.take<T>(kTileN * s.ld);
  s.key_t = arena.take<T>(kTileN * s.ld);
  s.key_blocks = arena.take<T>(kTileN * s.ld);
  s.grad_key = arena.take<T>(kTileN * s.ld);
  s.value = arena.take<T>(kTileN * s.ld_v);
  s.value_t = arena.take<T>(kTileN * s.ld_v);
  s.grad_value = arena.take<T>(kTileN * s.ld_v);
  s.grad_out = arena.take<T>(kTileM * s.ld_v);
  s.direct_query = arena.take<T>(kTileM * s.ld);
  s.staging = arena.take<T>(W * max64(s.ld, s.ld_v));
  s.row = arena.take<T>(max64(s.ld, s.ld_v));
  s.weight = arena.take<T>(s.ld);
  s.weight_sums = arena.take<T>(s.ld / kChunk + 1);
  s.tile_weight = arena.take<T>(s.ld);
  s.masks = arena.take<TileMask>(plan.tiles_q);
  return s;
}

// Shared by the threads: dQ / 4 w in parts [chunks, B, L, ld], and dw in parts [B, chunks, ld].
template <typename T>
static void carve_shared(Arena& arena, const AdditiveAttentionBackwardParams& p, const BackwardPlan& plan, T** grad_query,
                         double** grad_weight) {
  const int64_t ld = padded_features<T>(p);
  *grad_query = arena.take<T>(plan.chunks * p.batch * p.len_q * ld);
  *grad_weight = arena.take<double>(plan.items * ld);
}

// e^(2 Q), lse and delta of the rows of a batch. A row without keys has zeros for Q, shift +inf, hence P = 0, and delta 0: what
// reaches the -inf of its lse may be NaN.
template <typename T>
static void prepare_rows(const AdditiveAttentionBackwardParams& p, const BackwardScratch<T>& s, int64_t b) {
  constexpr int W = kWidth<T>;
  const bool wide = p.lse.dtype == DType::kFloat64;
  const auto number = [&](const TensorRef& x, int64_t at) {
    return wide ? static_cast<const double*>(x.ptr)[at] : static_cast<const float*>(x.ptr)[at];
  };
  for (int64_t i0 = 0; i0 < p.len_q; i0 += kTileM) {
    const int rows = static_cast<int>(min64(kTileM, p.len_q - i0));
    uint64_t empty = 0;
    for (int r = 0; r < rows; ++r) {
      const int64_t i = i0 + r;
      const double lse = number(p.lse, b * p.len_q + i);
      s.shift[i] = static_cast<T>(lse_to_shift(lse));
      s.delta[i] = T(0);
      if (lse == -kInfinity<double>) {
        empty |= uint64_t{1} << r;
        continue;
      }
      convert_row(s.row, row_at(p.out, b, i), p.out.dtype, static_cast<int>(p.dim_v), static_cast<int>(s.ld_v));
      convert_row(s.grad_out, row_at(p.grad_out, b, i), p.grad_out.dtype, static_cast<int>(p.dim_v), static_cast<int>(s.ld_v));
      Vec<T> products = zero<T>();
      for (int64_t d = 0; d < s.ld_v; d += W) products = fma(load(s.row + d), load(s.grad_out + d), products);
      s.delta[i] = sum(products);
      if (p.grad_lse) s.delta[i] -= static_cast<T>(number(p.grad_lse, b * p.grad_lse.stride[0] + i * p.grad_lse.stride[1]));
    }
    copy_rows(s.query + i0 * s.ld, s.ld, p.query, b, i0, rows, p.features, empty);
    s.largest[i0 / kTileM] = exponentials(s.query + i0 * s.ld, rows * s.ld);
  }
}

// In: p = scores, ds = dO V^T. Out: p = probabilities, ds = gradient of the scores; 0 where the mask forbids. Returns the sum of ds.
template <typename T>
static double softmax_gradient(T* p, T* ds, int rows, int begin, int end, const T* shift, const T* delta, const TileMask& mask) {
  constexpr int W = kWidth<T>;
  const Vec<T> log2e = broadcast(static_cast<T>(kLog2E));
  double total = 0;
  for (int r = 0; r < rows; ++r) {
    const uint64_t allowed = mask.tile_class == TileClass::kPartial ? mask.rows[r] : bits_before(end, 0);
    Vec<T> row_sum = zero<T>();
    for (int j = begin; j < end; j += W) {
      T *const p_at = p + r * kTileN + j, *const ds_at = ds + r * kTileN + j;
      const VecBits<T> lanes = lanes_of<T>(allowed >> j);
      const Vec<T> x = lanes ? exp2((load(p_at) - broadcast(shift[r])) * log2e) : zero<T>();
      const Vec<T> gradient = lanes ? x * (load(ds_at) - broadcast(delta[r])) : zero<T>();
      store(p_at, x);
      store(ds_at, gradient);
      row_sum += gradient;
    }
    total += sum(row_sum);
  }
  return total;
}

// dst [ld / W][kTileN][W] of rows [keys][ld].
template <typename T>
static void block_features(T* dst, const T* src, int64_t ld, int keys) {
  constexpr int W = kWidth<T>;
  for (int j = 0; j < keys; ++j)
    for (int64_t d = 0; d < ld; d += W) store(dst + d * kTileN + j * W, load(src + j * ld + d));
}

// 4 w times a row of u, as a gradient.
template <typename T>
static void store_gradient(void* dst, DType dtype, T* row, const T* weight, int64_t ld, int64_t features) {
  for (int64_t d = 0; d < ld; d += kWidth<T>) store(row + d, load(row + d) * load(weight + d));
  store_row(dst, dtype, row, static_cast<int>(features), T(4));
}

// grad_query [L, ld] and grad_weight [ld] are added to.
template <typename T>
static void key_tile(const AdditiveAttentionBackwardParams& p, const BackwardScratch<T>& s, const Weights<T>& weights, int64_t b,
                     int64_t j0, T* grad_query, double* grad_weight) {
  constexpr int W = kWidth<T>;
  const int keys = static_cast<int>(min64(kTileN, p.len_k - j0)), dim_v = static_cast<int>(p.dim_v);
  std::memset(s.grad_key, 0, kTileN * s.ld * sizeof(T));
  std::memset(s.grad_value, 0, kTileN * s.ld_v * sizeof(T));

  const KeyInterval range = query_range(p.mask, b, j0, j0 + keys, p.len_q);
  const int64_t first = range.first / kTileM * kTileM;
  uint64_t live = 0;
  for (int64_t i0 = first; i0 < range.last; i0 += kTileM) {
    TileMask& mask = s.masks[i0 / kTileM];
    make_tile_mask(mask, p.mask, b, 0, i0, static_cast<int>(min64(kTileM, p.len_q - i0)), j0, keys);
    live |= mask.columns;
  }
  if (live) {
    const uint64_t dead = ~live & bits_before(keys, 0);
    KeyTile<T> key{s.key, s.key_t, T(0), false, dead};
    load_key_tile(key, p, s.ld, b, j0, keys, false, s.staging);
    block_features(s.key_blocks, s.key, s.ld, keys);
    copy_rows(s.value, s.ld_v, p.value, b, j0, keys, p.dim_v, dead);
    transpose_tile(s.value_t, s.value, s.ld_v, keys, s.staging);

    for (int64_t i0 = first; i0 < range.last; i0 += kTileM) {
      const TileMask& mask = s.masks[i0 / kTileM];
      if (mask.tile_class == TileClass::kEmpty) continue;
      const int rows = static_cast<int>(min64(kTileM, p.len_q - i0));
      const int begin = first_bit(mask.columns) / W * W, end = end_bit(mask.columns);
      const Path path = choose_path(s.largest[i0 / kTileM], key.largest);
      const T* query = s.query + i0 * s.ld;
      uint64_t dead_rows = 0;
      GradientRows<T> live_rows;
      live_rows.count = 0;
      for (int r = 0; r < rows; ++r)
        if (mask.tile_class == TileClass::kPartial && !mask.rows[r]) dead_rows |= uint64_t{1} << r;
      if (path == Path::kDirect) {
        copy_rows(s.direct_query, s.ld, p.query, b, i0, rows, p.features, dead_rows);
        query = s.direct_query;
      }
      if (fit_key_tile(key, path, p, s.ld, b, j0, keys, s.staging)) block_features(s.key_blocks, s.key, s.ld, keys);
      for (int r = 0; r < rows; ++r) {
        if (dead_rows >> r & 1) continue;
        live_rows.query[live_rows.count] = query + r * s.ld;
        live_rows.ds[live_rows.count] = s.ds + r * kTileN + begin;
        live_rows.grad_query[live_rows.count++] = grad_query + (i0 + r) * s.ld;
      }
      copy_rows(s.grad_out, s.ld_v, p.grad_out, b, i0, rows, p.dim_v, dead_rows);

      score_tile(path, weights, query, rows, key.transposed, begin, end, s.p);
      gemm<Layout::kRows>(rows, end - begin, dim_v, s.grad_out, s.ld_v, s.value_t + begin, kTileN, s.ds + begin, kTileN, false);
      const double ds_sum = softmax_gradient(s.p, s.ds, rows, begin, end, s.shift + i0, s.delta + i0, mask);
      gemm<Layout::kTransposed>(end - begin, dim_v, rows, s.p + begin, kTileN, s.grad_out, s.ld_v, s.grad_value + begin * s.ld_v,
                                s.ld_v, true);
      std::memset(s.tile_weight, 0, s.ld * sizeof(T));
      const int features = static_cast<int>(s.ld);
      if (path == Path::kPlain)
        gradient_tile<T, Path::kPlain>(live_rows, features, s.key_blocks, s.grad_key, begin, end, s.tile_weight);
      else if (path == Path::kClamped)
        gradient_tile<T, Path::kClamped>(live_rows, features, s.key_blocks, s.grad_key, begin, end, s.tile_weight);
      else
        gradient_tile<T, Path::kDirect>(live_rows, features, s.key_blocks, s.grad_key, begin, end, s.tile_weight);
      for (int64_t d = 0; d < s.ld; ++d) grad_weight[d] += ds_sum - 2.0 * s.tile_weight[d];
    }
  }

  for (int j = 0; j < keys; ++j) {
    for (int64_t d = 0; d < s.ld; d += W) store(s.row + d, load(s.grad_key + d * kTileN + j * W));
    store_gradient(row_at(p.grad_key, b, j0 + j), p.grad_key.dtype, s.row, weights.w, s.ld, p.features);
    store_row(row_at(p.grad_value, b, j0 + j), p.grad_value.dtype, s.grad_value + j * s.ld_v, dim_v, T(1));
  }
}

template <typename T>
static int64_t workspace_bytes(const AdditiveAttentionBackwardParams& p) {
  const BackwardPlan plan = make_backward_plan(p);
  Arena shared(nullptr), thread(nullptr);
  T* grad_query;
  double* grad_weight;
  carve_shared<T>(shared, p, plan, &grad_query, &grad_weight);
  carve<T>(thread, p, plan);
  return kAlignment + shared.used + p.num_threads * thread.used;
}

template <typename T>
static void run(const AdditiveAttentionBackwardParams& p) {
  const BackwardPlan plan = make_backward_plan(p);
  Arena shared(align_pointer(p.workspace)), counter(nullptr);
  T* grad_query;
  double* grad_weight;
  carve_shared<T>(shared, p, plan, &grad_query, &grad_weight);
  carve<T>(counter, p, plan);
  const int64_t thread_bytes = counter.used;
  char* const scratch = shared.base + shared.used;
  const int64_t ld = padded_features<T>(p), part = p.batch * p.len_q * ld;
  const int threads = static_cast<int>(max64(1, min64(plan.items, effective_threads(p.num_threads))));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena own(scratch + thread_number() * thread_bytes);
    const BackwardScratch<T> s = carve<T>(own, p, plan);
    const Weights<T> weights = load_weights(p, s.weight, s.weight_sums, s.ld);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < plan.items; ++item) {
      const int64_t b = item / plan.chunks, chunk = item % plan.chunks;
      T* const own_query = grad_query + chunk * part + b * p.len_q * ld;
      double* const own_weight = grad_weight + item * ld;
      std::memset(own_query, 0, p.len_q * ld * sizeof(T));
      std::memset(own_weight, 0, ld * sizeof(double));
      prepare_rows(p, s, b);
      for (int64_t j0 = chunk * kTileN; j0 < p.len_k; j0 += plan.chunks * kTileN)
        key_tile(p, s, weights, b, j0, own_query, own_weight);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.batch * p.len_q; ++row) {
      T* const first = grad_query + row * ld;
      for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
        for (int64_t d = 0; d < ld; ++d) first[d] += first[chunk * part + d];
      store_gradient(row_at(p.grad_query, row / p.len_q, row % p.len_q), p.grad_query.dtype, first, weights.w, ld, p.features);
    }
#pragma omp single
    {
      for (int64_t d = 0; d < p.features; ++d) {
        double total = 0;
        for (int64_t item = 0; item < plan.items; ++item) total += grad_weight[item * ld + d];
        s.row[d] = static_cast<T>(total);
      }
      store_row(p.grad_score_weight.ptr, p.grad_score_weight.dtype, s.row, static_cast<int>(p.features), T(1));
    }
  }
}

}  // namespace

int64_t additive_attention_forward_workspace(const AdditiveAttentionForwardParams& p) {
  return p.query.dtype == DType::kFloat64 ? workspace_bytes<double>(p) : workspace_bytes<float>(p);
}

void additive_attention_forward(const AdditiveAttentionForwardParams& p) {
  if (p.query.dtype == DType::kFloat64) run<double>(p);
  else run<float>(p);
}

int64_t additive_attention_backward_workspace(const AdditiveAttentionBackwardParams& p) {
  return p.query.dtype == DType::kFloat64 ? workspace_bytes<double>(p) : workspace_bytes<float>(p);
}

void additive_attention_backward(const AdditiveAttentionBackwardParams& p) {
  if (p.query.dtype == DType::kFloat64) run<double>(p);
  else run<float>(p);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
