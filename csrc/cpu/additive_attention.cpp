// Additive attention: O_i = sum_j softmax_j(w . tanh(q_i + k_j)) v_j, forward and backward, with an online softmax over tiles of
// 48 queries x 64 keys; no tensor of queries x keys.
//
// The tanh costs no exponential: tanh(q + k) = 1 - 2 r with r = f / (a + f), a = e^(2 q) and f = e^(-2 k), which are computed once
// for each query and each key tile; so is w f. Four features share one division,
//     w1 f1 / x1 + w2 f2 / x2 = (w1 f1 x2 + w2 f2 x1) / (x1 x2),  x = a + f,  and two such sums likewise:
// nine multiplications and multiply-adds, five additions and one division. Dividing is both faster and more exact than an estimate
// of the reciprocal with a step of Newton's. A score is summed in chunks of 32 features, sum w - 2 sum w r each, so that what
// cancels is small; a chunk of the key tile, twice [32, 64], stays in L1 while all queries pass.
//
// Three paths, chosen by the largest |q| and |k|, in the forward for kRowBlock queries and a tile of keys, in the backward for each pair
// of tiles:
//   plain     every x is between 2^-29 and 2^30, so that the products of four are numbers of the type;
//   wide      the products of two are, and two features share a division;
//   direct    beyond that: e^(2 (q + k)) for each pair, cut off at 2^60, where 2 r is far below what the type tells from 0.
// The weights are scaled by a power of 2 for it, which brings the largest to [2, 4).
//
// Scores: a key is a lane, f is transposed. Gradients: d tanh(x) / dx = 4 r (1 - r), and a feature is a lane: then the sums over
// queries and keys are plain additions,
//     u = dS_ij r (1 - r),  dQ_i += 4 w u,  dK_j += 4 w u,  dw += dS_ij (1 - 2 r)
// and two queries share one division. 1 - r is formed as a / (a + f), which loses no digits where r is close to 1.
//
// Order of the backward: key tiles, and for each the tiles of queries. The scores' gradients of a few tens of pairs of tiles are made
// first, a pair at a time; then what they give to dQ, dK and dw by features, and to dV by its columns. So threads share a batch
// without a private copy of a gradient, and every sum is made in the same order for any number of them.
#include <cmath>

#include "../core/softmax.h"
#include "forward_rows.h"
#include "schedule.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kChunk = 32;     // features, even
constexpr int kRowBlock = 4;   // queries that pass a vector of keys, or of features, together

enum class Path { kPlain, kWide, kDirect };

// Largest |q| and |k| of the paths: e^20 is below 2^29, e^40 below 2^58; e^160 below 2^231, e^340 below 2^491.
template <typename T>
constexpr T kPlainLimit = sizeof(T) == 8 ? T(80) : T(10);
template <typename T>
constexpr T kWideLimit = sizeof(T) == 8 ? T(170) : T(20);

template <typename T>
static Path choose_path(T largest_query, T largest_key) {
  if (!(largest_query <= kWideLimit<T> && largest_key <= kWideLimit<T>)) return Path::kDirect;
  return largest_query <= kPlainLimit<T> && largest_key <= kPlainLimit<T> ? Path::kPlain : Path::kWide;
}

// ---- e^(2 x), e^(-2 x) ----

// x[0 .. count) = e^(factor x), factor 2 or -2, in whole vectors; returns the largest |x|, NaN apart. 2 x = n ln 2 + y with ln 2 in two parts, so that the
// error stays one of rounding however large x is; e^y by its series, |y| <= ln 2 / 2. Beyond kWideLimit the result is not used.
template <typename T>
static T exponentials(T* x, int64_t count, T factor) {
  constexpr bool kFloat = sizeof(T) == sizeof(float);
  constexpr int kDegree = kFloat ? 7 : 13;  // what is left out: 5e-9, 4e-18
  const Vec<T> magic = broadcast(kFloat ? T(12582912.0) : T(6755399441055744.0));
  const Vec<T> high = broadcast(kFloat ? T(-0.693359375) : T(-6.93145751953125e-1));
  const Vec<T> low = broadcast(kFloat ? T(2.12194440e-4) : T(-1.42860682030941723212e-6));
  Vec<T> largest = zero<T>();
  for (int64_t n = 0; n < count; n += kWidth<T>) {
    const Vec<T> v = load(x + n), twice = v * factor;
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

// e^(2 (q + k)), cut off; a NaN stays.
template <typename T>
FASTATTN_INLINE Vec<T> direct_exponential(Vec<T> q, Vec<T> k) {
  const Vec<T> x = (q + k) * broadcast(static_cast<T>(2 * kLog2E)), largest = broadcast(T(60));
  return exp2(x > largest ? largest : x);
}

// ---- scores of a tile ----

// kRows queries against one vector of keys: scores (+)= weight_sum - scale sum w r over `count` features, a multiple of 4. query
// [kRows][ld]; key_t and, unless the path is direct, weight [count][kTileN]: f and w f, or k and w.
template <typename T, int kRows, Path kPath>
FASTATTN_NOINLINE void score_block(int count, const T* __restrict query, int64_t ld, const T* __restrict key_t,
                                   const T* __restrict weight, T scale, T weight_sum, T* __restrict scores, bool accumulate) {
  constexpr int kShare = kPath == Path::kPlain ? 4 : 2;
  Vec<T> acc[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) acc[i] = zero<T>();
  for (int d = 0; d < count; d += kShare) {
    Vec<T> k[kShare], w[kShare];
#pragma GCC unroll 4
    for (int n = 0; n < kShare; ++n) {
      k[n] = load(key_t + (d + n) * kTileN);
      w[n] = kPath == Path::kDirect ? broadcast(weight[d + n]) : load(weight + (d + n) * kTileN);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      Vec<T> x[kShare];
#pragma GCC unroll 4
      for (int n = 0; n < kShare; ++n) {
        const Vec<T> q = broadcast(query[i * ld + d + n]);
        x[n] = kPath == Path::kDirect ? direct_exponential<T>(q, k[n]) + T(1) : q + k[n];
      }
      if constexpr (kShare == 4) {
        const Vec<T> x12 = x[0] * x[1], x34 = x[2] * x[3];
        const Vec<T> sum12 = fma(w[0], x[1], w[1] * x[0]), sum34 = fma(w[2], x[3], w[3] * x[2]);
        acc[i] += fma(sum12, x34, sum34 * x12) / (x12 * x34);
      } else {
        acc[i] += fma(w[0], x[1], w[1] * x[0]) / (x[0] * x[1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const Vec<T> sum = fma(acc[i], broadcast(-scale), broadcast(weight_sum));
    T* const at = scores + i * kTileN;
    store(at, accumulate ? sum + load(at) : sum);
  }
}

template <typename T>
struct Weights {
  int features;              // padded to whole vectors, and to a multiple of 4; the weights there are 0
  const T *w, *scaled;       // [features]; scaled by a power of 2
  T scale;                   // w = scaled scale / 2
  const T* sums;             // [chunks]: of w, of each chunk
};

// A tile of keys. It holds f = e^(-2 k), or k itself where some |k| is beyond the guard: then, or where a tile of queries is, the pair
// takes the direct path, with k as it is.
template <typename T>
struct KeyTile {
  T *rows, *transposed, *weighted;  // f or k; of f alone: w f, transposed
  T largest;                        // |k|
  bool direct;                      // the tile holds k
  uint64_t dead;                    // keys that nobody attends to: zeros
};

// scores [rows][kTileN], keys [begin, end) in whole vectors. query [rows][weights.features].
template <typename T, Path kPath>
static void score_tile(const Weights<T>& weights, const T* query, int rows, const KeyTile<T>& key, int begin, int end, T* scores) {
  const int64_t ld = weights.features;
  for (int c = 0; c < weights.features; c += kChunk) {
    const int count = weights.features - c < kChunk ? weights.features - c : kChunk;
    const T sum = weights.sums[c / kChunk], scale = weights.scale;
    for (int j = begin; j < end; j += kWidth<T>) {
      const T* const k = key.transposed + c * kTileN + j;
      const T* const w = kPath == Path::kDirect ? weights.scaled + c : key.weighted + c * kTileN + j;
      for (int i = 0; i < rows; i += kRowBlock) {
        const T* const q = query + i * ld + c;
        T* const s = scores + i * kTileN + j;
        switch (rows - i) {
          case 1: score_block<T, 1, kPath>(count, q, ld, k, w, scale, sum, s, c > 0); break;
          case 2: score_block<T, 2, kPath>(count, q, ld, k, w, scale, sum, s, c > 0); break;
          case 3: score_block<T, 3, kPath>(count, q, ld, k, w, scale, sum, s, c > 0); break;
          default: score_block<T, 4, kPath>(count, q, ld, k, w, scale, sum, s, c > 0);
        }
      }
    }
  }
}

template <typename T>
static void score_tile(Path path, const Weights<T>& weights, const T* query, int rows, const KeyTile<T>& key, int begin, int end,
                       T* scores) {
  if (path == Path::kPlain) score_tile<T, Path::kPlain>(weights, query, rows, key, begin, end, scores);
  else if (path == Path::kWide) score_tile<T, Path::kWide>(weights, query, rows, key, begin, end, scores);
  else score_tile<T, Path::kDirect>(weights, query, rows, key, begin, end, scores);
}

// ---- operands ----

FASTATTN_INLINE void* row_at(const TensorRef& x, int64_t b, int64_t i) {
  return element(x.ptr, x.dtype, b * x.stride[0] + i * x.stride[1]);
}

// Whole vectors and fours, and one where there is no feature at all: then every score is 0.
template <typename T>
static int64_t padded_features(const AdditiveAttentionParams& p) {
  return round_up(static_cast<int>(max64(1, p.features)), kWidth<T> < 4 ? 4 : kWidth<T>);
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

// w, scaled [ld]. A largest weight that is 0 or no number stays.
template <typename T>
static Weights<T> load_weights(const AdditiveAttentionParams& p, T* w, T* scaled, T* sums, int64_t ld) {
  convert_row(w, p.score_weight.ptr, p.score_weight.dtype, static_cast<int>(p.features), static_cast<int>(ld));
  T largest = T(0);
  for (int64_t c = 0; c < ld; c += kChunk) {
    double sum = 0;
    for (int64_t d = c; d < min64(ld, c + kChunk); ++d) {
      sum += w[d];
      largest = std::fabs(w[d]) > largest ? std::fabs(w[d]) : largest;
    }
    sums[c / kChunk] = static_cast<T>(sum);
  }
  const int exponent = largest > T(0) && largest < kInfinity<T> ? std::ilogb(largest) - 1 : 0;
  for (int64_t d = 0; d < ld; ++d) scaled[d] = std::ldexp(w[d], -exponent);
  return {static_cast<int>(ld), w, scaled, static_cast<T>(std::ldexp(2.0, exponent)), sums};
}

template <typename T>
static void load_key_tile(KeyTile<T>& tile, const Weights<T>& weights, const AdditiveAttentionParams& p, int64_t b, int64_t j0,
                          int keys, bool direct, T* staging) {
  const int64_t ld = weights.features;
  copy_rows(tile.rows, ld, p.key, b, j0, keys, p.features, tile.dead);
  tile.direct = direct;
  if (!direct) tile.largest = exponentials(tile.rows, keys * ld, T(-2));
  const int width = round_up(keys, kWidth<T>);
  for (int64_t c = 0; c < ld; c += kChunk) {  // in L1
    const int count = static_cast<int>(min64(kChunk, ld - c));
    T* const chunk = tile.transposed + c * kTileN;
    transpose_rows<T>(chunk, kTileN, tile.rows + c, kComputeDType<T>, ld, keys, count, T(1), staging);
    if (direct) continue;
    for (int d = 0; d < count; ++d) {
      const Vec<T> w = broadcast(weights.scaled[c + d]);
      for (int j = 0; j < width; j += kWidth<T>)
        store(tile.weighted + (c + d) * kTileN + j, load(chunk + d * kTileN + j) * w);
    }
  }
}

// Brings the tile into the form that the path needs. Only problems with numbers beyond the guard ever change it.
template <typename T>
static void fit_key_tile(KeyTile<T>& tile, Path path, const Weights<T>& weights, const AdditiveAttentionParams& p, int64_t b,
                         int64_t j0, int keys, T* staging) {
  if ((path == Path::kDirect) != tile.direct) load_key_tile(tile, weights, p, b, j0, keys, path == Path::kDirect, staging);
}

// ---- forward ----

constexpr int kMaxSubTiles = 8;
constexpr int64_t kItemBytes = 384 * 1024;  // e^(2 Q) and O of an item: within L2 beside the tiles of K and V
constexpr int64_t kItemsPerThread = 4;      // smaller items rather than idle threads

struct Plan {
  int sub_tiles, sub_rows;  // per item; queries of a sub-tile
  int64_t rows_per_item, items_per_batch, items;
};

template <typename T>
static Plan make_plan(const AdditiveAttentionForwardParams& p) {
  const int64_t tiles = ceil_div(p.len_q, kTileM), tile_bytes = kTileM * (p.features + p.dim_v) * static_cast<int64_t>(sizeof(T));
  int64_t sub_tiles = max64(1, min64(kMaxSubTiles, kItemBytes / max64(1, tile_bytes)));
  if (has_mask(p.mask) || tiles == 0) {
    while (sub_tiles > 1 && p.batch * ceil_div(tiles, sub_tiles) < kItemsPerThread * p.num_threads) --sub_tiles;
    const int64_t items_per_batch = ceil_div(tiles, sub_tiles);
    if (items_per_batch) sub_tiles = ceil_div(tiles, items_per_batch);  // even items
    return {static_cast<int>(sub_tiles), kTileM, sub_tiles * kTileM, items_per_batch, p.batch * items_per_batch};
  }
  // Without a mask items take the same time, and sub-tiles may have any height: few items, each of which prepares all keys, and the
  // same number for every thread where there are few for each.
  int64_t items_per_batch = ceil_div(tiles, sub_tiles);
  while (items_per_batch < tiles && p.batch * items_per_batch < kItemsPerThread * p.num_threads &&
         (p.batch * items_per_batch < 2 * p.num_threads || p.batch * items_per_batch % p.num_threads))
    ++items_per_batch;
  const int64_t rows = ceil_div(p.len_q, items_per_batch);
  sub_tiles = ceil_div(rows, kTileM);
  const int sub_rows = round_up(static_cast<int>(ceil_div(rows, sub_tiles)), kRowBlock);
  items_per_batch = ceil_div(p.len_q, sub_tiles * sub_rows);
  return {static_cast<int>(sub_tiles), sub_rows, sub_tiles * sub_rows, items_per_batch, p.batch * items_per_batch};
}

// Rows of Q and K take ld, rows of O and V ld_v.
template <typename T>
struct Scratch {
  int64_t ld, ld_v;
  T *query, *out, *row_max, *row_sum;  // per sub-tile
  T *scores, *rescale, *key, *key_t, *key_weighted, *value, *direct_query, *staging, *weight, *weight_scaled, *weight_sums;
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
  s.key_weighted = arena.take<T>(kTileN * s.ld);
  s.value = arena.take<T>(kTileN * s.ld_v);
  s.direct_query = arena.take<T>(kTileM * s.ld);
  s.staging = arena.take<T>(W * s.ld);
  s.weight = arena.take<T>(s.ld);
  s.weight_scaled = arena.take<T>(s.ld);
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

// Largest |x| of a row, NaN apart. `row` is scratch, [ld].
template <typename T>
static T row_largest(const TensorRef& x, int64_t b, int64_t i, int64_t dim, T* row, int64_t ld) {
  convert_row(row, row_at(x, b, i), x.dtype, static_cast<int>(dim), static_cast<int>(ld));
  T largest = T(0);
  for (int64_t d = 0; d < dim; ++d) largest = std::fabs(row[d]) > largest ? std::fabs(row[d]) : largest;
  return largest;
}

// The scores of a pair of tiles that the plain path may not take as a whole. Each kRowBlock queries choose by themselves and the keys
// that they attend to: a choice for all of the item would depend on its size, hence on the number of threads.
template <typename T>
static void score_large(const AdditiveAttentionForwardParams& p, const Scratch<T>& s, const Weights<T>& weights,
                        const SubTile<T>& sub, const TileMask& mask, int64_t b, int64_t j0, int keys, KeyTile<T>& key, int begin,
                        int end) {
  T largest_key[kTileN];
  for (int j = 0; j < keys; ++j)
    largest_key[j] = key.dead >> j & 1 ? T(0) : row_largest(p.key, b, j0 + j, p.features, s.staging, s.ld);
  Path paths[kTileM / kRowBlock];
  for (int r = 0; r < sub.rows; r += kRowBlock) {
    uint64_t columns = 0;
    T largest_query = T(0), largest = T(0);
    for (int i = r; i < r + kRowBlock && i < sub.rows; ++i) {
      columns |= mask.tile_class == TileClass::kPartial ? mask.rows[i] : bits_before(keys, 0);
      const T of_row = row_largest(p.query, b, sub.i0 + i, p.features, s.staging, s.ld);
      largest_query = of_row > largest_query ? of_row : largest_query;
    }
    for (int j = 0; j < keys; ++j)
      if (columns >> j & 1 && largest_key[j] > largest) largest = largest_key[j];
    paths[r / kRowBlock] = choose_path(largest_query, largest);
  }
  copy_rows(s.direct_query, s.ld, p.query, b, sub.i0, sub.rows, p.features, 0);
  for (int pass = 0; pass < 2; ++pass) {  // so that the keys change their form once
    const bool direct = pass == 1;
    for (int r = 0; r < sub.rows; r += kRowBlock) {
      const Path path = paths[r / kRowBlock];
      if ((path == Path::kDirect) != direct) continue;
      fit_key_tile(key, path, weights, p, b, j0, keys, s.staging);
      score_tile(path, weights, (direct ? s.direct_query : sub.query) + r * s.ld, sub.rows - r < kRowBlock ? sub.rows - r : kRowBlock,
                 key, begin, end, s.scores + r * kTileN);
    }
  }
}

template <typename T>
static void run_item(const AdditiveAttentionForwardParams& p, const Plan& plan, const Scratch<T>& s, const Weights<T>& weights,
                     int64_t item) {
  constexpr int W = kWidth<T>;
  const int64_t b = item / plan.items_per_batch, first_row = item % plan.items_per_batch * plan.rows_per_item;
  const int64_t last_row = min64(p.len_q, first_row + plan.rows_per_item);
  const int dim_v = static_cast<int>(p.dim_v);

  SubTile<T> sub_tiles[kMaxSubTiles];
  int count = 0;
  for (int64_t i0 = first_row; i0 < last_row; i0 += plan.sub_rows, ++count) {
    const int rows = static_cast<int>(min64(plan.sub_rows, last_row - i0));
    SubTile<T>& sub = sub_tiles[count];
    sub = {i0, rows, false, T(0), s.query + count * kTileM * s.ld, s.out + count * kTileM * s.ld_v, s.row_max + count * kTileM,
           s.row_sum + count * kTileM};
    copy_rows(sub.query, s.ld, p.query, b, i0, rows, p.features, 0);
    sub.largest = exponentials(sub.query, rows * s.ld, T(2));
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
    KeyTile<T> key{s.key, s.key_t, s.key_weighted, T(0), false, dead};
    load_key_tile(key, weights, p, b, j0, keys, false, s.staging);
    Rows<T> value{s.value, s.ld_v};
    if (value_in_place && !dead) value = {static_cast<const T*>(row_at(p.value, b, j0)), p.value.stride[1]};
    else copy_rows(s.value, s.ld_v, p.value, b, j0, keys, p.dim_v, dead);

    for (int n = 0; n < count; ++n) {
      SubTile<T>& sub = sub_tiles[n];
      const TileMask& mask = s.masks[n];
      if (mask.tile_class == TileClass::kEmpty) continue;
      const bool partial = mask.tile_class == TileClass::kPartial;
      const int begin = first_bit(mask.columns) / W * W, end = end_bit(mask.columns);
      if (choose_path(sub.largest, key.largest) == Path::kPlain) {
        fit_key_tile(key, Path::kPlain, weights, p, b, j0, keys, s.staging);
        score_tile(Path::kPlain, weights, sub.query, sub.rows, key, begin, end, s.scores);
      } else {
        score_large(p, s, weights, sub, mask, b, j0, keys, key, begin, end);
      }
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
    const Weights<T> weights = load_weights<T>(p, s.weight, s.weight_scaled, s.weight_sums, s.ld);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < plan.items; ++n) run_item<T>(p, plan, s, weights, order[n]);
  }
}

// ---- backward: gradients of a tile of scores ----

// kRows queries against `keys` keys, for one vector of features: what dS gives to them and to the weight. query, grad_query:
// kRows rows at that vector; ds: kRows rows at the first key; key, grad_key [keys][W]. Query and key: a and f, or q and k.
template <typename T, int kRows, bool kDirect>
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
    const Vec<T> k = load(key + j * W), f = kDirect ? broadcast(T(1)) : k;
    Vec<T> gk = load(grad_key + j * W), a[kRows], inverse[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) a[i] = kDirect ? direct_exponential<T>(q[i], k) : q[i];
#pragma GCC unroll 4
    for (int i = 0; i + 1 < kRows; i += 2) {
      const Vec<T> x1 = a[i] + f, x2 = a[i + 1] + f, both = broadcast(T(1)) / (x1 * x2);
      inverse[i] = both * x2;
      inverse[i + 1] = both * x1;
    }
    if constexpr (kRows % 2) inverse[kRows - 1] = broadcast(T(1)) / (a[kRows - 1] + f);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> part = broadcast(ds[i][j]) * (f * inverse[i]), u = part * (a[i] * inverse[i]);
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
template <typename T, bool kDirect>
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
        case 1: gradient_block<T, 1, kDirect>(keys, q, ds, gq, d, k, gk, grad_weight); break;
        case 2: gradient_block<T, 2, kDirect>(keys, q, ds, gq, d, k, gk, grad_weight); break;
        case 3: gradient_block<T, 3, kDirect>(keys, q, ds, gq, d, k, gk, grad_weight); break;
        default: gradient_block<T, 4, kDirect>(keys, q, ds, gq, d, k, gk, grad_weight);
      }
    }
  }
}

// ---- backward: the problem ----

// Where there are few batches all threads share one after the other, else each takes batches of its own. Of a batch, `group` key
// tiles are taken at a time, and of its tiles of queries `chunk`: their pairs' P and dS are in memory together. Neither changes the
// order of any sum.
struct BackwardPlan {
  bool shared;
  int64_t tiles_q, group, chunk;
};

static BackwardPlan make_backward_plan(const AdditiveAttentionBackwardParams& p) {
  const bool shared = p.num_threads > 1 && p.batch < 2 * p.num_threads;
  const int64_t pairs = shared ? max64(32, 4 * p.num_threads) : 8;
  const int64_t tiles_q = ceil_div(p.len_q, kTileM), chunk = max64(1, min64(tiles_q, pairs));
  return {shared, tiles_q, shared ? max64(1, min64(ceil_div(p.len_k, kTileN), pairs / chunk)) : 1, chunk};
}

// body(n) for n < count; by all threads if `shared`, which then meet at the end.
template <typename Body>
static void for_each(bool shared, int64_t count, Body body) {
  if (shared) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < count; ++n) body(n);
  } else {
    for (int64_t n = 0; n < count; ++n) body(n);
  }
}

// A pair of tiles.
struct Pair {
  TileMask mask;
  Path path;
  double ds_sum;
};

// dQ is summed, divided by 4 w, where it belongs: it has the compute type and whole vectors.
template <typename T>
static bool sums_in_place(const AdditiveAttentionBackwardParams& p) {
  return p.grad_query.dtype == kComputeDType<T> && p.features == padded_features<T>(p);
}

// Of a batch; of all threads, or of the one that takes it.
template <typename T>
struct BatchScratch {
  T *query, *shift, *delta, *largest;  // [L, ld] e^(2 Q), [L], [L], [tiles]
  T* grad_query;                       // [L, ld], unless in place
  T *p, *ds;                           // [group, chunk, kTileM, kTileN]
  Pair* pairs;                         // [group, tiles]
};

template <typename T>
static BatchScratch<T> carve_batch(Arena& arena, const AdditiveAttentionBackwardParams& p, const BackwardPlan& plan) {
  const int64_t ld = padded_features<T>(p);
  BatchScratch<T> s;
  s.query = arena.take<T>(p.len_q * ld);
  s.shift = arena.take<T>(p.len_q);
  s.delta = arena.take<T>(p.len_q);
  s.largest = arena.take<T>(plan.tiles_q);
  s.grad_query = arena.take<T>(sums_in_place<T>(p) ? 0 : p.len_q * ld);
  s.p = arena.take<T>(plan.group * plan.chunk * kTileM * kTileN);
  s.ds = arena.take<T>(plan.group * plan.chunk * kTileM * kTileN);
  s.pairs = arena.take<Pair>(plan.group * plan.tiles_q);
  return s;
}

// Of a thread.
template <typename T>
struct BackwardScratch {
  int64_t ld, ld_v;
  T *key, *key_t, *key_weighted, *value, *value_t, *grad_out, *direct_query;
  T *key_blocks, *grad_key, *grad_value;
  T *staging, *row, *weight, *weight_scaled, *weight_sums, *tile_weight;  // tile_weight: sum of dS r of one pair
};

template <typename T>
static BackwardScratch<T> carve(Arena& arena, const AdditiveAttentionBackwardParams& p) {
  constexpr int W = kWidth<T>;
  BackwardScratch<T> s;
  s.ld = padded_features<T>(p);
  s.ld_v = round_up(static_cast<int>(p.dim_v), W);
  s.key = arena.take<T>(kTileN * s.ld);
  s.key_t = arena.take<T>(kTileN * s.ld);
  s.key_weighted = arena.take<T>(kTileN * s.ld);
  s.value = arena.take<T>(kTileN * s.ld_v);
  s.value_t = arena.take<T>(kTileN * s.ld_v);
  s.grad_out = arena.take<T>(kTileM * s.ld_v);
  s.direct_query = arena.take<T>(kTileM * s.ld);
  s.key_blocks = arena.take<T>(kTileN * s.ld);
  s.grad_key = arena.take<T>(kTileN * s.ld);
  s.grad_value = arena.take<T>(kTileN * s.ld_v);
  s.staging = arena.take<T>(W * max64(s.ld, s.ld_v));
  s.row = arena.take<T>(max64(s.ld, s.ld_v));
  s.weight = arena.take<T>(s.ld);
  s.weight_scaled = arena.take<T>(s.ld);
  s.weight_sums = arena.take<T>(s.ld / kChunk + 1);
  s.tile_weight = arena.take<T>(s.ld);
  return s;
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

template <typename T>
struct Backward {
  const AdditiveAttentionBackwardParams& p;
  const BackwardPlan& plan;
  const BatchScratch<T>& batch;
  const BackwardScratch<T>& s;
  const Weights<T>& weights;
  int64_t b;
  double* grad_weight;  // [ld], of the batch
  int rank, ranks;      // of this thread among those that share the batch

  static constexpr int W = kWidth<T>;

  int rows_of(int64_t tile) const { return static_cast<int>(min64(kTileM, p.len_q - tile * kTileM)); }
  int keys_from(int64_t j0) const { return static_cast<int>(min64(kTileN, p.len_k - j0)); }
  T* grad_query_row(int64_t i) const {
    return sums_in_place<T>(p) ? static_cast<T*>(row_at(p.grad_query, b, i)) : batch.grad_query + i * s.ld;
  }
  // Columns [first, last) of `count`, whole vectors, are this thread's.
  struct Columns {
    int first, last;
  };
  Columns own_columns(int64_t count, int part) const {
    const int64_t vectors = count / W;
    return {static_cast<int>(vectors * part / ranks) * W, static_cast<int>(vectors * (part + 1) / ranks) * W};
  }

  // e^(2 Q), lse and delta of a tile of queries. A row without keys has zeros for Q, shift +inf, hence P = 0, and delta 0: what
  // reaches the -inf of its lse may be NaN.
  void prepare_rows(int64_t tile) const {
    const bool wide = p.lse.dtype == DType::kFloat64;
    const auto number = [&](const TensorRef& x, int64_t at) {
      return wide ? static_cast<const double*>(x.ptr)[at] : static_cast<const float*>(x.ptr)[at];
    };
    const int64_t i0 = tile * kTileM;
    const int rows = rows_of(tile);
    uint64_t empty = 0;
    for (int r = 0; r < rows; ++r) {
      const int64_t i = i0 + r;
      const double lse = number(p.lse, b * p.len_q + i);
      batch.shift[i] = static_cast<T>(lse_to_shift(lse));
      batch.delta[i] = T(0);
      std::memset(grad_query_row(i), 0, s.ld * sizeof(T));
      if (lse == -kInfinity<double>) {
        empty |= uint64_t{1} << r;
        continue;
      }
      convert_row(s.row, row_at(p.out, b, i), p.out.dtype, static_cast<int>(p.dim_v), static_cast<int>(s.ld_v));
      convert_row(s.grad_out, row_at(p.grad_out, b, i), p.grad_out.dtype, static_cast<int>(p.dim_v), static_cast<int>(s.ld_v));
      Vec<T> products = zero<T>();
      for (int64_t d = 0; d < s.ld_v; d += W) products = fma(load(s.row + d), load(s.grad_out + d), products);
      batch.delta[i] = sum(products);
      if (p.grad_lse) batch.delta[i] -= static_cast<T>(number(p.grad_lse, b * p.grad_lse.stride[0] + i * p.grad_lse.stride[1]));
    }
    copy_rows(batch.query + i0 * s.ld, s.ld, p.query, b, i0, rows, p.features, empty);
    batch.largest[tile] = exponentials(batch.query + i0 * s.ld, rows * s.ld, T(2));
  }

  Pair& pair_at(int64_t g, int64_t tile) const { return batch.pairs[g * plan.tiles_q + tile]; }
  int64_t scores_at(int64_t g, int64_t tile) const { return (g * plan.chunk + tile % plan.chunk) * kTileM * kTileN; }

  uint64_t dead_keys(int64_t g, int keys) const {
    uint64_t live = 0;
    for (int64_t tile = 0; tile < plan.tiles_q; ++tile) live |= pair_at(g, tile).mask.columns;
    return ~live & bits_before(keys, 0);
  }
  // Rows that attend to none of the keys.
  static uint64_t dead_rows(const TileMask& mask, int rows) {
    uint64_t dead = 0;
    for (int r = 0; r < rows; ++r)
      if (mask.tile_class == TileClass::kPartial && !mask.rows[r]) dead |= uint64_t{1} << r;
    return dead;
  }

  // P and dS of a pair. `key` and V^T hold tile `loaded` of the group.
  void score_pair(int64_t first_key, int64_t g, int64_t tile, KeyTile<T>& key, int64_t& loaded) const {
    Pair& pair = pair_at(g, tile);
    const TileMask& mask = pair.mask;
    if (mask.tile_class == TileClass::kEmpty) return;
    const int64_t j0 = first_key + g * kTileN, i0 = tile * kTileM;
    const int rows = rows_of(tile), keys = keys_from(j0), dim_v = static_cast<int>(p.dim_v);
    if (g != loaded) {
      key.dead = dead_keys(g, keys);
      load_key_tile(key, weights, p, b, j0, keys, false, s.staging);
      copy_rows(s.value, s.ld_v, p.value, b, j0, keys, p.dim_v, key.dead);
      transpose_tile(s.value_t, s.value, s.ld_v, keys, s.staging);
      loaded = g;
    }
    const int begin = first_bit(mask.columns) / W * W, end = end_bit(mask.columns);
    const uint64_t dead = dead_rows(mask, rows);
    const T* query = batch.query + i0 * s.ld;
    pair.path = choose_path(batch.largest[tile], key.largest);
    if (pair.path == Path::kDirect) {
      copy_rows(s.direct_query, s.ld, p.query, b, i0, rows, p.features, dead);
      query = s.direct_query;
    }
    fit_key_tile(key, pair.path, weights, p, b, j0, keys, s.staging);
    T *const scores = batch.p + scores_at(g, tile), *const ds = batch.ds + scores_at(g, tile);
    copy_rows(s.grad_out, s.ld_v, p.grad_out, b, i0, rows, p.dim_v, dead);
    score_tile(pair.path, weights, query, rows, key, begin, end, scores);
    gemm<Layout::kRows>(rows, end - begin, dim_v, s.grad_out, s.ld_v, s.value_t + begin, kTileN, ds + begin, kTileN, false);
    pair.ds_sum = softmax_gradient(scores, ds, rows, begin, end, batch.shift + i0, batch.delta + i0, mask);
  }

  // key_blocks [width / W][kTileN][W]: f, or k. Where the thread has the batch to itself, `key` holds the tile.
  void load_blocks(KeyTile<T>& key, int64_t j0, int keys, Columns columns, uint64_t dead, Path path) const {
    const int width = columns.last - columns.first;
    if (!plan.shared) {
      fit_key_tile(key, path, weights, p, b, j0, keys, s.staging);
    } else {
      convert_rows(s.key, width, element(row_at(p.key, b, j0), p.key.dtype, columns.first), p.key.dtype, p.key.stride[1], keys,
                   static_cast<int>(max64(0, min64(width, p.features - columns.first))), dead);
      if (path != Path::kDirect) exponentials(s.key, keys * width, T(-2));
    }
    for (int j = 0; j < keys; ++j)
      for (int d = 0; d < width; d += W) store(s.key_blocks + d * kTileN + j * W, load(s.key + j * width + d));
  }

  // What the pairs of key tile g and the tiles of queries [first, last) give to some features of dQ, dK and dw.
  void add_features(KeyTile<T>& key, int64_t j0, int64_t g, int64_t first, int64_t last, Columns columns) const {
    const int width = columns.last - columns.first, keys = keys_from(j0);
    if (width == 0) return;
    if (first == 0) std::memset(s.grad_key, 0, kTileN * width * sizeof(T));
    enum { kNothing, kExponentials, kKeys } loaded = kNothing;
    const uint64_t dead = dead_keys(g, keys);
    for (int64_t tile = first; tile < last; ++tile) {
      const Pair& pair = pair_at(g, tile);
      if (pair.mask.tile_class == TileClass::kEmpty) continue;
      const int64_t i0 = tile * kTileM;
      const int rows = rows_of(tile), begin = first_bit(pair.mask.columns) / W * W, end = end_bit(pair.mask.columns);
      const bool direct = pair.path == Path::kDirect;
      if (loaded != (direct ? kKeys : kExponentials)) {
        load_blocks(key, j0, keys, columns, dead, pair.path);
        loaded = direct ? kKeys : kExponentials;
      }
      const uint64_t dead_queries = dead_rows(pair.mask, rows);
      if (direct) copy_rows(s.direct_query, s.ld, p.query, b, i0, rows, p.features, dead_queries);
      const T* const query = (direct ? s.direct_query : batch.query + i0 * s.ld) + columns.first;
      const T* const ds = batch.ds + scores_at(g, tile) + begin;
      GradientRows<T> live_rows;
      live_rows.count = 0;
      for (int r = 0; r < rows; ++r) {
        if (dead_queries >> r & 1) continue;
        live_rows.query[live_rows.count] = query + r * s.ld;
        live_rows.ds[live_rows.count] = ds + r * kTileN;
        live_rows.grad_query[live_rows.count++] = grad_query_row(i0 + r) + columns.first;
      }
      std::memset(s.tile_weight, 0, width * sizeof(T));
      if (direct) gradient_tile<T, true>(live_rows, width, s.key_blocks, s.grad_key, begin, end, s.tile_weight);
      else gradient_tile<T, false>(live_rows, width, s.key_blocks, s.grad_key, begin, end, s.tile_weight);
      for (int d = 0; d < width; ++d) grad_weight[columns.first + d] += pair.ds_sum - 2.0 * s.tile_weight[d];
    }
    if (last < plan.tiles_q) return;
    const int64_t features = max64(0, min64(width, p.features - columns.first));
    for (int j = 0; j < keys; ++j) {
      for (int d = 0; d < width; d += W) store(s.row + d, load(s.grad_key + d * kTileN + j * W));
      store_gradient(element(row_at(p.grad_key, b, j0 + j), p.grad_key.dtype, columns.first), p.grad_key.dtype, s.row,
                     weights.w + columns.first, width, features);
    }
  }

  // The same for some columns of dV.
  void add_values(int64_t j0, int64_t g, int64_t first, int64_t last, Columns columns) const {
    const int width = columns.last - columns.first, keys = keys_from(j0);
    const int dim = static_cast<int>(max64(0, min64(width, p.dim_v - columns.first)));
    if (width == 0) return;
    if (first == 0) std::memset(s.grad_value, 0, kTileN * width * sizeof(T));
    for (int64_t tile = first; tile < last; ++tile) {
      const TileMask& mask = pair_at(g, tile).mask;
      if (mask.tile_class == TileClass::kEmpty) continue;
      const int rows = rows_of(tile), begin = first_bit(mask.columns) / W * W, end = end_bit(mask.columns);
      convert_rows(s.grad_out, width, element(row_at(p.grad_out, b, tile * kTileM), p.grad_out.dtype, columns.first),
                   p.grad_out.dtype, p.grad_out.stride[1], rows, dim, dead_rows(mask, rows));
      gemm<Layout::kTransposed>(end - begin, dim, rows, batch.p + scores_at(g, tile) + begin, kTileN, s.grad_out, width,
                                s.grad_value + begin * width, width, true);
    }
    if (last < plan.tiles_q) return;
    for (int j = 0; j < keys; ++j)
      store_row(element(row_at(p.grad_value, b, j0 + j), p.grad_value.dtype, columns.first), p.grad_value.dtype,
                s.grad_value + j * width, dim, T(1));
  }

  // 4 w times a row of u, as a gradient.
  static void store_gradient(void* dst, DType dtype, T* row, const T* weight, int64_t ld, int64_t features) {
    for (int64_t d = 0; d < ld; d += W) store(row + d, load(row + d) * load(weight + d));
    store_row(dst, dtype, row, static_cast<int>(features), T(4));
  }

  void run() const {
    const bool shared = plan.shared;
    if (rank == 0) std::memset(grad_weight, 0, s.ld * sizeof(double));
    for_each(shared, plan.tiles_q, [&](int64_t tile) { prepare_rows(tile); });
    const Columns features = own_columns(s.ld, rank), values = own_columns(s.ld_v, ranks - 1 - rank);
    const int64_t tiles_k = ceil_div(p.len_k, kTileN);
    for (int64_t first_tile = 0; first_tile < tiles_k; first_tile += plan.group) {
      const int64_t j0 = first_tile * kTileN, group = min64(plan.group, tiles_k - first_tile);
      for_each(shared, group * plan.tiles_q, [&](int64_t n) {
        const int64_t g = n / plan.tiles_q, tile = n % plan.tiles_q, j = j0 + g * kTileN;
        make_tile_mask(pair_at(g, tile).mask, p.mask, b, 0, tile * kTileM, rows_of(tile), j, keys_from(j));
      });
      KeyTile<T> key{s.key, s.key_t, s.key_weighted, T(0), false, 0};
      int64_t loaded = -1;
      for (int64_t first = 0; first == 0 || first < plan.tiles_q; first += plan.chunk) {
        const int64_t last = min64(plan.tiles_q, first + plan.chunk), count = last - first;
        if (shared) loaded = -1;
        for_each(shared, group * count,
                 [&](int64_t n) { score_pair(j0, n / count, first + n % count, key, loaded); });
        for (int64_t g = 0; g < group; ++g) {
          add_features(key, j0 + g * kTileN, g, first, last, features);
          add_values(j0 + g * kTileN, g, first, last, values);
        }
        if (shared) {
#pragma omp barrier
        }
      }
    }
    for_each(shared, plan.tiles_q, [&](int64_t tile) {
      for (int64_t i = tile * kTileM; i < tile * kTileM + rows_of(tile); ++i)
        store_gradient(row_at(p.grad_query, b, i), p.grad_query.dtype, grad_query_row(i), weights.w, s.ld, p.features);
    });
  }
};

template <typename T>
static int64_t workspace_bytes(const AdditiveAttentionBackwardParams& p) {
  const BackwardPlan plan = make_backward_plan(p);
  Arena weights(nullptr), batch(nullptr), thread(nullptr);
  weights.take<double>(p.batch * padded_features<T>(p));
  carve_batch<T>(batch, p, plan);
  carve<T>(thread, p);
  return kAlignment + weights.used + (plan.shared ? 1 : p.num_threads) * batch.used + p.num_threads * thread.used;
}

template <typename T>
static void run(const AdditiveAttentionBackwardParams& p) {
  const BackwardPlan plan = make_backward_plan(p);
  const int64_t ld = padded_features<T>(p);
  Arena shared(align_pointer(p.workspace)), counter(nullptr);
  double* const grad_weight = shared.take<double>(p.batch * ld);  // [B, ld]
  BatchScratch<T> common{};
  if (plan.shared) common = carve_batch<T>(shared, p, plan);
  else carve_batch<T>(counter, p, plan);
  carve<T>(counter, p);
  const int64_t thread_bytes = counter.used;
  char* const scratch = shared.base + shared.used;
  const int allowed = effective_threads(p.num_threads);
  const int threads = plan.shared ? allowed : static_cast<int>(max64(1, min64(p.batch, allowed)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena own(scratch + thread_number() * thread_bytes);
    const BatchScratch<T> batch = plan.shared ? common : carve_batch<T>(own, p, plan);
    const BackwardScratch<T> s = carve<T>(own, p);
    const Weights<T> weights = load_weights<T>(p, s.weight, s.weight_scaled, s.weight_sums, s.ld);
    if (plan.shared) {
      for (int64_t b = 0; b < p.batch; ++b)
        Backward<T>{p, plan, batch, s, weights, b, grad_weight + b * ld, thread_number(), thread_count()}.run();
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < p.batch; ++b) Backward<T>{p, plan, batch, s, weights, b, grad_weight + b * ld, 0, 1}.run();
    }
#pragma omp single
    {
      for (int64_t d = 0; d < p.features; ++d) {
        double total = 0;
        for (int64_t b = 0; b < p.batch; ++b) total += grad_weight[b * ld + d];
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
