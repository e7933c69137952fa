// Attention forward: O = softmax(scale Q K^T + bias) V with an online softmax, one pass over the keys.
//
// A work item is one (batch, head) and up to kMaxSubTiles x 48 query rows. It walks the key tiles (64 keys) that its rows can
// reach; each is brought in once and used by every 48-row sub-tile of the item, unless the mask says that the pair is empty:
//     S^T [64, 48]  = K [64, D] Q^T [D, 48]        Q^T is transposed once per item; K is read as it lies
//     P^T [64, 48]  = 2^(c (S^T - m)), in place    c = scale log2 e; m, l: running maximum and sum, one lane a query
//     O   [48, Dv] += P [48, 64] V [64, Dv]        broadcasts walk P^T forwards; V is read as it lies
// Scores are kept transposed because then a query is a vector lane: row maximum and sum are plain vector operations, with
// no horizontal reduction, and K, like V, needs no packing. Both tiles are copied to scratch only to change their type, to
// pad a row to whole vectors, or because their rows lie far apart.
//
// Bytes, float, D = 64: Q^T 12 KB, S^T 12 KB, O 12 KB per sub-tile, K and V 16 KB each. S^T, one operand and the block of
// the other stay in L1; an item (8 sub-tiles) stays in L2. Registers: gemm.h.
//
// No pair of a full tile meets mask code. In a partial tile dead keys at the ends are cut off; scores of the other dead
// pairs are replaced, never added to, so NaN in a dead key does not spread; rows of V that are dead for the whole sub-tile
// are replaced by zeros, because 0 * NaN is NaN. Keys padded at random are gathered: live_keys.h.
//
// A row's result depends on its own sequence of key tiles only: not on threads, on the order of the items or on their size.
#include "attention_decode.h"
#include "bias.h"
#include "forward_rows.h"
#include "live_keys.h"
#include "pairs.h"
#include "schedule.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kMaxSubTiles = 8;
constexpr int64_t kItemBytes = 256 * 1024;  // Q^T and O of an item: within L2 beside the tiles of K and V
constexpr int64_t kItemsPerThread = 4;      // smaller items rather than idle threads

// How the problem is cut up.
struct Plan {
  int sub_tiles;          // per item
  int64_t rows_per_item;
  int64_t items_per_head;
  int64_t items;
  int threads;
};

template <typename T>
static Plan make_plan(const AttentionForwardParams& p) {
  const int64_t tiles = (p.len_q + kTileM - 1) / kTileM, heads = p.batch * p.heads_q;
  const int threads = useful_threads(p, 1.0);
  const int64_t tile_bytes = kTileM * (p.dim_qk + p.dim_v) * static_cast<int64_t>(sizeof(T));
  int64_t sub_tiles = max64(1, min64(kMaxSubTiles, kItemBytes / max64(1, tile_bytes)));
  while (sub_tiles > 1 && heads * ((tiles + sub_tiles - 1) / sub_tiles) < kItemsPerThread * threads) --sub_tiles;
  const int64_t items_per_head = (tiles + sub_tiles - 1) / sub_tiles;
  if (items_per_head) sub_tiles = (tiles + items_per_head - 1) / items_per_head;  // even items
  return {static_cast<int>(sub_tiles), sub_tiles * kTileM, items_per_head, heads * items_per_head, threads};
}

// Scratch of one thread. Leading dimensions: rows of O and V take ld_v, rows of K and Q ld_k, rows of S^T and Q^T the
// padded height of the sub-tile, at most kTileM.
template <typename T>
struct Scratch {
  int64_t ld_k, ld_v;
  Operand<T>* query;         // per sub-tile, like the next three
  T *out, *row_max, *row_sum;
  T *scores, *rescale;
  Operand<T> *key, *key_t, *value, *live_value;
  Operand<T>* gathered_value;  // where pairs are multiplied and keys gathered: rows of V
  T *bias, *gathered_bias, *staging;
};

template <typename T>
static Scratch<T> carve(Arena& arena, const AttentionForwardParams& p, const Plan& plan) {
  using Element = Operand<T>;
  constexpr int W = kWidth<T>;
  Scratch<T> s;
  s.ld_k = round_up(depth<T>(static_cast<int>(p.dim_qk)), W);
  s.ld_v = round_up(static_cast<int>(p.dim_v), W);
  s.query = arena.take<Element>(plan.sub_tiles * kTileM * s.ld_k);
  s.out = arena.take<T>(plan.sub_tiles * kTileM * s.ld_v);
  s.row_max = arena.take<T>(plan.sub_tiles * kTileM);
  s.row_sum = arena.take<T>(plan.sub_tiles * kTileM);
  s.scores = arena.take<T>(kTileN * kTileM);
  s.rescale = arena.take<T>(kTileM);
  s.key = arena.take<Element>(kTileN * s.ld_k);
  s.key_t = arena.take<Element>(p.len_q % kTileM > 0 && p.len_q % kTileM <= kFewRows ? kTileN * s.ld_k : 0);
  s.value = arena.take<Element>(depth<T>(kTileN) * s.ld_v);
  s.live_value = arena.take<Element>(depth<T>(kTileN) * s.ld_v);
  s.gathered_value = arena.take<Element>(kPairs<T> && can_gather(p) ? kTileN * s.ld_v : 0);
  s.bias = arena.take<T>(p.bias ? kTileN * kTileM : 0);
  s.gathered_bias = arena.take<T>(p.bias && can_gather(p) ? kTileN * kTileM : 0);
  s.staging = arena.take<T>(W * max64(s.ld_k, kTileN));
  return s;
}

// ---- softmax of one tile, in place ----

// What has to be done to the scores of a tile before the exponential.
template <typename T>
struct ScoreTerms {
  T scale;                  // applied with the bias
  T to_log2;                // c of the head of this file, or log2 e where the scale has been applied
  const T* bias;            // [keys][ld], or null
  const uint64_t* allowed;  // [keys], bit r: row r may attend, or null
  const uint64_t* kept;     // [keys], bit r: dropout keeps the probability, or null
};

// kVectors vectors of queries, `lane` the first of them. scores [keys][ld]. Writes probabilities (relative to the new running
// maximum, after dropout) and the factor by which what was accumulated before must be rescaled.
template <typename T, int kVectors, bool kReplace>
FASTATTN_NOINLINE void softmax_lanes(T* scores, int64_t ld, int keys, int lane, T* row_max, T* row_sum, T* rescale,
                          const ScoreTerms<T>& terms) {
  constexpr int W = kWidth<T>;
  const Vec<T> minus_inf = broadcast(-kInfinity<T>), to_log2 = broadcast(terms.to_log2);
  Vec<T> top[kVectors], old_max[kVectors], shift[kVectors], total[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) top[v] = minus_inf;
  scores += lane;
  for (int j = 0; j < keys; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* const at = scores + j * ld + v * W;
      Vec<T> x = load<T>(at);
      if constexpr (kReplace) {
        if (terms.bias) x = fma(x, broadcast(terms.scale), load<T>(terms.bias + j * ld + lane + v * W));
        if (terms.allowed) x = lanes_of<T>(terms.allowed[j] >> (lane + v * W)) ? x : minus_inf;
        store(at, x);
      }
      top[v] = max(x, top[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    old_max[v] = load<T>(row_max + lane + v * W);
    const Vec<T> new_max = max(top[v], old_max[v]);
    store(row_max + lane + v * W, new_max);
    shift[v] = new_max == minus_inf ? zero<T>() : new_max;
    total[v] = zero<T>();
  }
  for (int j = 0; j < keys; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* const at = scores + j * ld + v * W;
      Vec<T> x = exp2((load<T>(at) - shift[v]) * to_log2);
      total[v] += x;
      if constexpr (kReplace) {
        if (terms.kept) x = lanes_of<T>(terms.kept[j] >> (lane + v * W)) ? x : zero<T>();
      }
      store(at, x);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vec<T> factor = exp2((old_max[v] - shift[v]) * to_log2);
    store(rescale + lane + v * W, factor);
    T* const sum = row_sum + lane + v * W;
    store(sum, fma(load<T>(sum), factor, total[v]));
  }
}

template <typename T, bool kReplace>
static void softmax_tile(T* scores, int64_t ld, int keys, int padded_rows, T* row_max, T* row_sum, T* rescale,
                         const ScoreTerms<T>& terms) {
  constexpr int W = kWidth<T>, kVectors = kVectorRegisters == 32 ? 3 : 2;  // beside the constants of exp2
  int lane = 0;
  for (; lane + kVectors * W <= padded_rows; lane += kVectors * W)
    softmax_lanes<T, kVectors, kReplace>(scores, ld, keys, lane, row_max, row_sum, rescale, terms);
  for (; lane < padded_rows; lane += W)
    softmax_lanes<T, 1, kReplace>(scores, ld, keys, lane, row_max, row_sum, rescale, terms);
}

// ---- one work item ----

template <typename T>
struct SubTile {
  int64_t i0;
  int rows, padded_rows;
  bool few;      // rows <= kFewRows: query is Q, else Q^T
  bool started;  // O holds something
  Operand<T>* query;
  T *out, *row_max, *row_sum;
};

// A sub-tile against keys j0 + begin .. j0 + begin + keys - 1 of a tile that is not empty, counted among the live keys where
// these are gathered.
template <typename T>
struct TilePair {
  int64_t b, h, j0;
  const int32_t* position;  // of the tile's keys where these are gathered, else null
  int begin, keys;
  Rows<Operand<T>> key;  // the first of those keys
  const TileMask* mask;
  T scale, to_log2;  // of ScoreTerms

  bool partial() const { return mask->tile_class == TileClass::kPartial; }
};

// Both leave the probabilities in s.scores, as an operand, and advance row_max, row_sum and s.rescale: first P^T
// [depth of the keys][padded_rows].
template <typename T, typename Prefetch>
static void probabilities(const AttentionForwardParams& p, const Scratch<T>& s, const SubTile<T>& sub, const TilePair<T>& pair,
                          const Prefetch& prefetch) {
  const int ld = sub.padded_rows;
  gemm_before_bias(pair.keys, sub.rows, depth<T>(static_cast<int>(p.dim_qk)), pair.key.ptr, pair.key.ld, sub.query, ld, s.scores, ld,
                   pair.position ? TensorRef{} : p.bias, pair.b, pair.h, sub.i0, sub.rows, pair.j0 + pair.begin, pair.keys);
  prefetch(1);
  ScoreTerms<T> terms{pair.scale, pair.to_log2, nullptr, nullptr, nullptr};
  uint64_t allowed[kTileN], kept_rows[kTileM], kept[kTileN];
  if (p.bias) {
    if (pair.position) {
      gather_bias(s.gathered_bias, p.bias, pair.b, pair.h, sub.i0, sub.rows, pair.position + pair.begin, pair.keys);
      transpose_rows<T>(s.bias, ld, s.gathered_bias, kComputeDType<T>, kTileN, sub.rows, pair.keys, T(1), s.staging);
    } else {
      load_transposed(s.bias, ld, p.bias, pair.b, pair.h, sub.i0, sub.rows, pair.j0 + pair.begin, pair.keys, T(1), s.staging);
    }
    terms.bias = s.bias;
  }
  if (pair.partial()) {
    transpose_bits(allowed, pair.mask->rows);
    terms.allowed = allowed + pair.begin;
  }
  if (p.dropout.p > 0) {
    if (pair.position)
      make_gathered_dropout(kept_rows, p.dropout, pair.b, pair.h, sub.i0, sub.rows, pair.position, pair.begin + pair.keys);
    else
      make_dropout_tile(kept_rows, p.dropout, pair.b, pair.h, sub.i0, sub.rows, pair.j0);
    transpose_bits(kept, kept_rows);
    terms.kept = kept + pair.begin;
  }
  if (terms.bias || terms.allowed || terms.kept)
    softmax_tile<T, true>(s.scores, ld, pair.keys, ld, sub.row_max, sub.row_sum, s.rescale, terms);
  else
    softmax_tile<T, false>(s.scores, ld, pair.keys, ld, sub.row_max, sub.row_sum, s.rescale, terms);
  if constexpr (kPairs<T>) round_row_pairs(s.scores, ld, pair.keys, ld);
}

// P [rows][kTileN].
template <typename T>
static void probabilities_of_few(const AttentionForwardParams& p, const Scratch<T>& s, const SubTile<T>& sub,
                                 const TilePair<T>& pair) {
  const uint64_t all = bits_before(pair.keys, 0);
  Rows<T> bias{nullptr, 0};
  uint64_t dropout_words[kTileM];
  if (p.bias && pair.position) {
    gather_bias(s.gathered_bias, p.bias, pair.b, pair.h, sub.i0, sub.rows, pair.position + pair.begin, pair.keys);
    bias = {s.gathered_bias, kTileN};
  } else if (p.bias) {
    bias = bias_rows(p.bias, pair.b, pair.h, sub.i0, sub.rows, pair.j0 + pair.begin, pair.keys, s.bias);
  }
  if (p.dropout.p > 0 && pair.position)
    make_gathered_dropout(dropout_words, p.dropout, pair.b, pair.h, sub.i0, sub.rows, pair.position, pair.begin + pair.keys);
  else if (p.dropout.p > 0)
    make_dropout_tile(dropout_words, p.dropout, pair.b, pair.h, sub.i0, sub.rows, pair.j0);
  const int dim_qk = static_cast<int>(p.dim_qk);
  if constexpr (kPairs<T>) {
    transpose_pairs(s.key_t, kTileN, pair.key.ptr, 2 * pair.key.ld, pair.keys, dim_qk, T(1));
    gemm<Layout::kRows>(sub.rows, pair.keys, depth<T>(dim_qk), sub.query, s.ld_k, s.key_t, kTileN, s.scores, kTileN, false);
  } else {
    few_scores(s.scores, pair.key.ptr, kComputeDType<T>, pair.key.ld, pair.keys, sub.query, s.ld_k, sub.rows, dim_qk, s.key_t,
               s.staging);
  }
  for (int r = 0; r < sub.rows; ++r) {
    uint64_t allowed = all, kept = all;
    if (pair.partial()) allowed &= pair.mask->rows[r] >> pair.begin;
    if (p.dropout.p > 0) kept = dropout_words[r] >> pair.begin;
    T* const scores = s.scores + r * kTileN;
    softmax_row(scores, pair.keys, sub.row_max + r, sub.row_sum + r, s.rescale + r, pair.scale,
                pair.to_log2, bias.ptr ? bias.ptr + r * bias.ld : nullptr, allowed, kept);
  }
  if constexpr (kPairs<T>) round_rows(s.scores, kTileN, sub.rows, pair.keys);
}

// Rows [first, last) of query head h.
struct ItemRows {
  int64_t b, h, first, last;
};

static ItemRows item_rows(const AttentionForwardParams& p, const Plan& plan, int64_t item) {
  const int64_t bh = item / plan.items_per_head, first = item % plan.items_per_head * plan.rows_per_item;
  return {bh / p.heads_q, bh % p.heads_q, first, min64(p.len_q, first + plan.rows_per_item)};
}

// Asks for part 0, 1 or 2 of what a sub-tile will write and of what the sub-tile in its place of the next item will read. A third at
// a time, with a product or a softmax in between: a core can wait for some twenty lines at once.
static void prefetch_part(const AttentionForwardParams& p, const ItemRows& rows, const ItemRows& next, int64_t i0, int64_t count,
                          int part) {
  const auto row_of = [](const TensorRef& x, const ItemRows& item, int64_t i) {
    return static_cast<const char*>(element(x.ptr, x.dtype, item.b * x.stride[0] + item.h * x.stride[1] + i * x.stride[2]));
  };
  const int64_t out_bytes = p.dim_v * element_size(p.out.dtype), query_bytes = p.dim_qk * element_size(p.query.dtype);
  for (int64_t r = count * part / 3; r < count * (part + 1) / 3; ++r) {
    const int64_t next_row = min64(next.first + i0 - rows.first + r, next.last - 1);
    const char *const out = row_of(p.out, rows, i0 + r), *const query = row_of(p.query, next, next_row);
    for (int64_t at = 0; at < out_bytes; at += 64) prefetch_for_write(out + at);
    for (int64_t at = 0; at < query_bytes; at += 64) __builtin_prefetch(query + at, 0, 3);
  }
}

// `next`: the item that this thread is likely to take after this one.
template <typename T>
static void run_item(const AttentionForwardParams& p, const Plan& plan, const Scratch<T>& s, const LiveKeyLists& lists, int64_t item,
                     int64_t next) {
  constexpr int W = kWidth<T>;
  const ItemRows item_is = item_rows(p, plan, item), next_is = item_rows(p, plan, next);
  const int64_t b = item_is.b, h = item_is.h, first_row = item_is.first, last_row = item_is.last;
  const int64_t h_kv = h / (p.heads_q / p.heads_kv);
  const int dim_qk = static_cast<int>(p.dim_qk), dim_v = static_cast<int>(p.dim_v);

  const ScoreScale<T> to(p);
  const LiveKeys live = lists.of(b);
  const KeyInterval range = live.among(key_range(p.mask, b, first_row, last_row, p.len_k));

  SubTile<T> sub_tiles[kMaxSubTiles];
  int count = 0;
  for (int64_t i0 = first_row; i0 < last_row; i0 += kTileM, ++count) {
    SubTile<T>& sub = sub_tiles[count];
    sub.i0 = i0;
    sub.rows = static_cast<int>(min64(kTileM, last_row - i0));
    sub.padded_rows = round_up(sub.rows, W);
    sub.few = sub.rows <= kFewRows;
    sub.started = false;
    sub.query = s.query + count * kTileM * s.ld_k;
    sub.out = s.out + count * kTileM * s.ld_v;
    sub.row_max = s.row_max + count * kTileM;
    sub.row_sum = s.row_sum + count * kTileM;
    for (int r = 0; r < sub.padded_rows; ++r) {
      sub.row_max[r] = -kInfinity<T>;
      sub.row_sum[r] = T(0);
    }
    const void* const query = element(p.query.ptr, p.query.dtype,
                                      b * p.query.stride[0] + h * p.query.stride[1] + i0 * p.query.stride[2]);
    if constexpr (kPairs<T>) {
      if (sub.few) copy_pair_rows(sub.query, s.ld_k, query, p.query.stride[2], nullptr, sub.rows, dim_qk, to.sign);
      else transpose_pairs(sub.query, sub.padded_rows, query, p.query.stride[2], sub.rows, dim_qk, to.sign);
    } else if (sub.few) {
      const auto row_of = [&](int r) { return element(query, p.query.dtype, r * p.query.stride[2]); };
      load_few_rows(sub.query, s.ld_k, row_of, p.query.dtype, sub.rows, dim_qk, to.sign);
    } else {
      transpose_rows<T>(sub.query, sub.padded_rows, query, p.query.dtype, p.query.stride[2], sub.rows, dim_qk, to.sign,
                        s.staging);
    }
  }

  const bool key_in_place = rows_in_place<T>(p.key.dtype, p.key.stride[2], dim_qk);
  const bool value_in_place = rows_in_place<T>(p.value.dtype, p.value.stride[2], dim_v);
  TileMask mask;

  for (int64_t j0 = range.first / kTileN * kTileN; j0 < range.last; j0 += kTileN) {
    const int tile_keys = static_cast<int>(min64(kTileN, live.count - j0));
    const int32_t* const position = live.position ? live.position + j0 : nullptr;
    const int64_t first_key = position ? 0 : j0;  // of the rows below
    const void* const key_rows = element(p.key.ptr, p.key.dtype,
                                         b * p.key.stride[0] + h_kv * p.key.stride[1] + first_key * p.key.stride[2]);
    const void* const value_rows = element(p.value.ptr, p.value.dtype,
                                           b * p.value.stride[0] + h_kv * p.value.stride[1] + first_key * p.value.stride[2]);
    Rows<Operand<T>> key{nullptr, s.ld_k}, value{nullptr, s.ld_v};
    PairRows value_pairs{value_rows, p.value.stride[2]};

    for (int n = 0; n < count; ++n) {
      SubTile<T>& sub = sub_tiles[n];
      if (position) make_gathered_mask(mask, p.mask, b, sub.i0, sub.rows, position, tile_keys);
      else make_tile_mask(mask, p.mask, b, h, sub.i0, sub.rows, j0, tile_keys);
      if (mask.tile_class == TileClass::kEmpty) continue;
      if constexpr (kPairs<T>) {
        if (!key.ptr) {
          key = pair_rows(s.key, s.ld_k, key_rows, p.key.stride[2], position, tile_keys, dim_qk);
          if (position) value_pairs = gather_pairs(s.gathered_value, value_pairs, position, tile_keys, dim_v);
          zip_rows(s.value, s.ld_v, value_pairs, 0, tile_keys, dim_v, 0), value.ptr = s.value;
        }
      } else if (!key.ptr && position) {
        gather_rows(s.key, s.ld_k, key_rows, p.key.dtype, p.key.stride[2], position, tile_keys, dim_qk), key.ptr = s.key;
        gather_rows(s.value, s.ld_v, value_rows, p.value.dtype, p.value.stride[2], position, tile_keys, dim_v), value.ptr = s.value;
      } else if (!key.ptr) {
        if (key_in_place) key = {static_cast<const T*>(key_rows), p.key.stride[2]};
        else convert_rows(s.key, s.ld_k, key_rows, p.key.dtype, p.key.stride[2], tile_keys, dim_qk), key.ptr = s.key;
        if (value_in_place) value = {static_cast<const T*>(value_rows), p.value.stride[2]};
        else convert_rows(s.value, s.ld_v, value_rows, p.value.dtype, p.value.stride[2], tile_keys, dim_v), value.ptr = s.value;
      }
      const auto prefetch = [&, last_tile = j0 + kTileN >= range.last](int part) {
        if (last_tile) prefetch_part(p, item_is, next_is, sub.i0, sub.rows, part);
      };
      prefetch(0);

      // Keys [begin, end) of the tile; those outside are dead for the whole sub-tile.
      const int begin = first_bit(mask.columns), end = end_bit(mask.columns), keys = end - begin;

      const TilePair<T> pair{b, h, j0, position, begin, keys, {key.ptr + begin * key.ld, key.ld}, &mask, to.scale, to.to_log2};
      if (sub.few)
        probabilities_of_few(p, s, sub, pair);
      else
        probabilities(p, s, sub, pair, prefetch);
      prefetch(2);

      const Operand<T>* v = value.ptr + begin / kTerms<Operand<T>> * value.ld;
      int64_t ld_v = value.ld;
      const uint64_t holes = ~mask.columns >> begin & bits_before(keys, 0);
      if constexpr (kPairs<T>) {
        if (holes || splits_pairs(begin, end, tile_keys)) {
          zip_rows(s.live_value, s.ld_v, value_pairs, begin, keys, dim_v, holes);
          v = s.live_value;
        }
      } else if (holes) {
        convert_rows(s.live_value, s.ld_v, v, kComputeDType<T>, value.ld, keys, dim_v, holes);
        v = s.live_value;
        ld_v = s.ld_v;
      }
      if (sub.started) rescale_rows(sub.out, s.ld_v, sub.rows, s.rescale);
      if (sub.few)
        gemm<Layout::kRows>(sub.rows, dim_v, depth<T>(keys), as_operand(s.scores), kTileN, v, ld_v, sub.out, s.ld_v, sub.started);
      else
        gemm<Layout::kTransposed>(sub.rows, dim_v, depth<T>(keys), as_operand(s.scores), sub.padded_rows, v, ld_v, sub.out, s.ld_v,
                                  sub.started);
      sub.started = true;
    }
  }

  for (int n = 0; n < count; ++n) {
    const SubTile<T>& sub = sub_tiles[n];
    if (!sub.started) std::memset(sub.out, 0, sub.rows * s.ld_v * sizeof(T));
    store_results(p, to, b, h, sub.i0, sub.rows, sub.out, s.ld_v, sub.row_max, sub.row_sum);
  }
}

// ---- the work list ----

// Pairs an item will touch, by arithmetic, or tiles where a tile map tells.
static int64_t item_cost(const AttentionForwardParams& p, const Plan& plan, const LiveKeyLists& lists, int64_t item) {
  const int64_t bh = item / plan.items_per_head, b = bh / p.heads_q, h = bh % p.heads_q;
  const int64_t first = item % plan.items_per_head * plan.rows_per_item, last = min64(p.len_q, first + plan.rows_per_item);
  const LiveKeys live = lists.of(b);
  int64_t cost = 0;
  for (int64_t i0 = first; i0 < last; i0 += kTileM) {
    const KeyInterval keys = live.among(key_range(p.mask, b, i0, min64(last, i0 + kTileM), p.len_k));
    int64_t sub_cost = max64(0, keys.last - keys.first);
    if (p.mask.live && p.mask.block_m == kTileM && p.mask.block_n == kTileN) {
      const uint64_t* live = p.mask.live + b * p.mask.stride_map_b + h * p.mask.stride_map_h +
                             i0 / kTileM * p.mask.map_words_per_row;
      int64_t tiles = 0;
      for (int64_t w = 0; w < p.mask.map_words_per_row; ++w) tiles += __builtin_popcountll(live[w]);
      sub_cost = min64(sub_cost, tiles * kTileN);
    }
    cost += sub_cost;
  }
  return cost;
}

template <typename T>
static int64_t workspace_bytes(const AttentionForwardParams& p) {
  if constexpr (!kPairs<T>)
    if (is_decoding(p)) return decode_workspace_bytes<T>(p);
  const Plan plan = make_plan<T>(p);
  Arena shared(nullptr), thread(nullptr);
  shared.take<int64_t>(plan.items);
  shared.take<int64_t>(plan.items);
  carve_live_keys(shared, p, can_gather(p));
  carve<T>(thread, p, plan);
  return kAlignment + shared.used + plan.threads * thread.used;
}

template <typename T>
static void run(const AttentionForwardParams& p) {
  if constexpr (!kPairs<T>)
    if (is_decoding(p)) return decode<T>(p);
  const Plan plan = make_plan<T>(p);
  if (plan.items == 0) return;
  Arena shared(align_pointer(p.workspace)), counter(nullptr);
  int64_t* const order = shared.take<int64_t>(plan.items);
  int64_t* const cost = shared.take<int64_t>(plan.items);
  const LiveKeyLists lists = carve_live_keys(shared, p, can_gather(p));
  fill_live_keys(lists, p.mask);
  carve<T>(counter, p, plan);
  [[maybe_unused]] const int64_t thread_bytes = counter.used;
  char* const scratch = shared.base + shared.used;
  const bool sorted = has_mask(p.mask);
  if (sorted) {
    for (int64_t n = 0; n < plan.items; ++n) cost[n] = item_cost(p, plan, lists, n);
    order_by_cost(order, cost, plan.items);
  }

  // Small items follow each other in memory: a thread takes some in a row.
  [[maybe_unused]] const int64_t run_length = sorted ? 1 : max64(1, min64(8, plan.items / (8 * plan.threads)));
  [[maybe_unused]] const int threads = static_cast<int>(min64(plan.items, effective_threads(plan.threads)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena own(scratch + thread_number() * thread_bytes);
    const Scratch<T> s = carve<T>(own, p, plan);
#pragma omp for schedule(dynamic, run_length)
    for (int64_t n = 0; n < plan.items; ++n) {
      const int64_t next = min64(n + 1, plan.items - 1);
      run_item<T>(p, plan, s, lists, sorted ? order[n] : n, sorted ? order[next] : next);
    }
  }
}

}  // namespace

#if defined(__AVX512BF16__)

int64_t attention_forward_workspace(const AttentionForwardParams& p) {
  return multiplies_pairs(p) ? workspace_bytes<float>(p) : avx512::attention_forward_workspace(p);
}

void attention_forward(const AttentionForwardParams& p) {
  if (multiplies_pairs(p)) run<float>(p);
  else avx512::attention_forward(p);
}

#else

int64_t attention_forward_workspace(const AttentionForwardParams& p) {
  return p.query.dtype == DType::kFloat64 ? workspace_bytes<double>(p) : workspace_bytes<float>(p);
}

void attention_forward(const AttentionForwardParams& p) {
  if (p.query.dtype == DType::kFloat64) run<double>(p);
  else run<float>(p);
}

#endif

}  // namespace fastattn::cpu::FASTATTN_ISA
