// Attention backward: gradients of query, key, value and bias from the output, its gradient and lse, in one walk over the
// tiles (Dao 2023, FlashAttention-2, algorithm 2), five products a tile pair:
//     S  [48, 64]  = Q [48, D] K^T [D, 64]         K^T, V^T are transposed once per key tile
//     dP [48, 64]  = dO [48, Dv] V^T [Dv, 64]
//     P  = e^(scale S - lse), dS = P (dP - delta), in place; delta = rowsum(dO O) - dlse
//     dV [64, Dv] += P^T [64, 48] dO [48, Dv]      broadcasts walk down P; dO, Q and K are read as they lie
//     dK [64, D]  += dS^T [64, 48] Q [48, D]
//     dQ [48, D]  += dS [48, 64] K [64, D]
// Here a key is a vector lane (in the forward it is a query): what is known per row, lse and delta, is a broadcast, and the
// words of the mask and of the dropout are used as they are made. The scale of dQ and dK is applied when they are written.
//
// Order: a group is one (batch, key head) with all its query heads. It walks its key tiles; dK and dV of a tile stay in scratch
// while all its rows pass; dQ is summed in the order of the key tiles, in place where it is of the compute type, else in a
// scratch of [query heads of the group, L, D]. No two threads add to the same number:
//   * a work item is every group that adds to the same bias gradient, in the order of (batch, head); without a broadcast
//     bias gradient it is one group;
//   * when that makes too few items for the threads, the key tiles are dealt out to kMaxChunks chunks at most, each with a dQ of its
//     own, added afterwards in the order of the chunks. Columns of the bias gradient belong to one chunk.
// So the result depends on the number of threads, through the number of chunks, and on nothing else.
//
// S is summed over D as in the forward, and scale S is rounded before lse is subtracted: where one key takes all of a row, lse is
// that very number and P is exactly 1, however large the scores are.
//
// Bytes, float, D = 64: S and dP 12 KB each, K^T, V^T, K, dK, dV 16 KB each, Q, dO, dQ 12 KB each: 150 KB in L2, of which a
// product needs 40 KB and streams all but its operand B, 12 to 16 KB in L1. Registers: gemm.h.
//
// No pair of a full tile meets mask code. In a partial tile dead rows and keys at the ends are cut off; P and dS of the other
// dead pairs are replaced by 0, whatever NaN they hold; rows of K, Q and dO that are dead for the whole tile are replaced by
// zeros before they are multiplied by those, because 0 * NaN is NaN.
//
// Keys padded at random are gathered (live_keys.h): tiles count live keys, dK and dV of the others are zeros. Not so with a bias
// gradient, which is written in tiles of neighbours.
#include <cmath>

#include "../core/softmax.h"
#include "bias.h"
#include "live_keys.h"
#include "pairs.h"
#include "schedule.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int64_t kMaxChunks = 16;      // bounds the number of parts of dQ
constexpr int64_t kItemsPerThread = 2;  // fewer leave threads idle at the end

struct Plan {
  int64_t query_heads;               // per key head
  int64_t batches, heads;            // of a work item, counted in groups
  int64_t chunks, items;
  bool query_in_place;               // dQ is summed where it will lie
  int threads;
};

template <typename T>
static Plan make_plan(const AttentionBackwardParams& p) {
  Plan plan;
  const bool over_batch = p.grad_bias && p.grad_bias.stride[0] == 0, over_heads = p.grad_bias && p.grad_bias.stride[1] == 0;
  plan.threads = useful_threads(p, 2.5);
  plan.query_heads = p.heads_kv ? p.heads_q / p.heads_kv : 0;
  plan.batches = over_batch ? p.batch : min64(p.batch, 1);
  plan.heads = over_heads ? p.heads_kv : min64(p.heads_kv, 1);
  const int64_t owners = plan.batches && plan.heads ? p.batch / plan.batches * (p.heads_kv / plan.heads) : 0;
  const int64_t tiles = (p.len_k + kTileN - 1) / kTileN;
  plan.chunks = 1;
  // A bias gradient summed over the keys would be shared by the chunks.
  const bool divisible = !p.grad_bias || p.grad_bias.stride[3] != 0;
  if (owners && plan.threads > 1 && owners < kItemsPerThread * plan.threads && divisible) {
    // The parts of dQ stay below half of what the scores would take.
    const int64_t affordable = min64(kMaxChunks, p.len_k / (2 * max64(1, p.dim_qk)));
    plan.chunks = max64(1, min64(min64(tiles, affordable), (kItemsPerThread * plan.threads + owners - 1) / owners));
  }
  plan.items = owners * plan.chunks;
  plan.query_in_place = plan.chunks == 1 && rows_in_place<T>(p.grad_query.dtype, p.grad_query.stride[2], static_cast<int>(p.dim_qk));
  return plan;
}

// Scratch of one thread. Rows of K, Q, dK, dQ take ld_k, rows of V, dO, dV ld_v, rows of everything else kTileN.
template <typename T>
struct Scratch {
  int64_t ld_k, ld_v;
  T *shift, *delta;          // [query heads of a group, L]: lse, and delta
  T* grad_query;             // [query heads of a group, L, ld_k], unless in place or in parts
  T *p, *ds, *bias;          // [kTileM, kTileN]
  T *grad_key, *grad_value;  // [kTileN, ld]
  T* staging;
  Operand<T> *key_t, *value_t;   // [depth of D, kTileN], [depth of Dv, kTileN]
  Operand<T> *key, *live_key;    // [depth of kTileN, ld]
  Operand<T> *query, *grad_out;  // [kTileM, ld]
  Operand<T> *gathered_key, *gathered_value;           // [kTileN, ld], when keys are gathered; K only where pairs are multiplied
  Operand<T> *query_pairs, *grad_out_pairs, *ds_rows;  // where pairs are multiplied: [kTileM / 2, ld], [kTileM, kTileN / 2]
};

static bool gathers(const AttentionBackwardParams& p) { return can_gather(p) && !p.grad_bias; }

template <typename T>
static Scratch<T> carve(Arena& arena, const AttentionBackwardParams& p, const Plan& plan) {
  using Element = Operand<T>;
  constexpr int W = kWidth<T>;
  Scratch<T> s;
  s.ld_k = round_up(static_cast<int>(p.dim_qk), W);
  s.ld_v = round_up(static_cast<int>(p.dim_v), W);
  s.shift = arena.take<T>(plan.query_heads * p.len_q);
  s.delta = arena.take<T>(plan.query_heads * p.len_q);
  s.grad_query = arena.take<T>(plan.query_in_place || plan.chunks > 1 ? 0 : plan.query_heads * p.len_q * s.ld_k);
  s.p = arena.take<T>(kTileM * kTileN);
  s.ds = arena.take<T>(kTileM * kTileN);
  s.bias = arena.take<T>(p.bias ? kTileM * kTileN : 0);
  s.grad_key = arena.take<T>(kTileN * s.ld_k);
  s.grad_value = arena.take<T>(kTileN * s.ld_v);
  // A product that starts at a later key reads whole vectors past the end of the last row.
  s.key_t = arena.take<Element>(depth<T>(static_cast<int>(p.dim_qk)) * kTileN + W);
  s.value_t = arena.take<Element>(depth<T>(static_cast<int>(p.dim_v)) * kTileN + W);
  s.key = arena.take<Element>(depth<T>(kTileN) * s.ld_k);
  s.live_key = arena.take<Element>(depth<T>(kTileN) * s.ld_k);
  s.gathered_key = arena.take<Element>(kPairs<T> && gathers(p) ? kTileN * s.ld_k : 0);
  s.gathered_value = arena.take<Element>(gathers(p) ? kTileN * s.ld_v : 0);
  s.query = arena.take<Element>(kTileM * s.ld_k);
  s.grad_out = arena.take<Element>(kTileM * s.ld_v);
  s.query_pairs = arena.take<Element>(kPairs<T> ? kTileM / 2 * s.ld_k : 0);
  s.grad_out_pairs = arena.take<Element>(kPairs<T> ? kTileM / 2 * s.ld_v : 0);
  s.ds_rows = arena.take<Element>(kPairs<T> ? kTileM * kTileN / 2 : 0);
  s.staging = arena.take<T>(max64(W, 2) * max64(s.ld_k, s.ld_v));
  return s;
}

// The part of the workspace that the threads share.
template <typename T>
struct Shared {
  int64_t *order, *cost;  // of the items
  LiveKeyLists lists;
  T* parts;               // of dQ, [chunks, B, Hq, L, ld_k]
};

template <typename T>
static Shared<T> carve_shared(Arena& arena, const AttentionBackwardParams& p, const Plan& plan) {
  Shared<T> s;
  s.order = arena.take<int64_t>(plan.items);
  s.cost = arena.take<int64_t>(plan.items);
  s.lists = carve_live_keys(arena, p, gathers(p));
  const int64_t ld = round_up(static_cast<int>(p.dim_qk), kWidth<T>);
  s.parts = arena.take<T>(plan.chunks > 1 ? plan.chunks * p.batch * p.heads_q * p.len_q * ld : 0);
  return s;
}

// ---- one tile pair, between the products ----

// What a tile has beyond the plain softmax. Bit and column 0 are the first key of the (cut) tile.
template <typename T>
struct TileTerms {
  T scale;
  const T* bias;            // [rows][ld_bias], or null
  int64_t ld_bias;
  const uint64_t* allowed;  // [rows], bit `first_bit` + j: key j may be attended to, or null
  const uint64_t* kept;     // the same: dropout keeps the probability, or null
  int first_bit;
  T kept_scale;             // 1 / (1 - dropout p)
};

// In: p = Q K^T, ds = dO V^T. Out: p = probabilities after dropout, ds = gradient of the scores. [rows][kTileN] each.
template <typename T, bool kPlain>
static void softmax_gradient(T* p, T* ds, int rows, int keys, const T* shift, const T* delta, const TileTerms<T>& terms) {
  constexpr int W = kWidth<T>;
  const Vec<T> scale = broadcast(terms.scale), kept_scale = broadcast(terms.kept_scale);
  const Vec<T> log2e = broadcast(static_cast<T>(kLog2E));
  for (int r = 0; r < rows; ++r) {
    const Vec<T> row_shift = broadcast(shift[r]), row_delta = broadcast(delta[r]);
    const uint64_t allowed = !kPlain && terms.allowed ? terms.allowed[r] >> terms.first_bit : ~uint64_t{0};
    const uint64_t kept = !kPlain && terms.kept ? terms.kept[r] >> terms.first_bit : 0;
#pragma GCC unroll 4
    for (int j = 0; j < keys; j += W) {
      T* const p_at = p + r * kTileN + j;
      T* const ds_at = ds + r * kTileN + j;
      Vec<T> x = load(p_at), gradient = load(ds_at);
      if constexpr (kPlain) {
        x = exp2((product(x, scale) - row_shift) * log2e);
        store(p_at, x);
        store(ds_at, x * (gradient - row_delta));
      } else {
        x = terms.bias ? fma(x, scale, load(terms.bias + r * terms.ld_bias + j)) : product(x, scale);
        const VecBits<T> lanes = lanes_of<T>(allowed >> j);
        x = lanes ? exp2((x - row_shift) * log2e) : zero<T>();
        Vec<T> dropped = x;
        if (terms.kept) {
          const VecBits<T> kept_lanes = lanes_of<T>(kept >> j);
          dropped = kept_lanes ? x * kept_scale : zero<T>();
          gradient = kept_lanes ? gradient * kept_scale : zero<T>();
        }
        store(p_at, dropped);
        store(ds_at, lanes ? x * (gradient - row_delta) : zero<T>());
      }
    }
  }
}

// ---- one group ----

template <typename T>
struct Group {
  int64_t b, h_kv, first_head;  // first_head: of the query heads
  T* grad_query;                // [query heads][L] rows, where dQ is summed
  int64_t stride_head, stride_row;
};

// shift and delta of every row, and zeros in dQ. A row without keys has shift +inf, hence P = 0, and delta 0: what reaches the
// -inf of its lse may be NaN.
template <typename T>
static void prepare_rows(const AttentionBackwardParams& p, const Plan& plan, const Scratch<T>& s, const Group<T>& group) {
  constexpr int W = kWidth<T>;
  T *const out = s.staging, *const grad_out = s.staging + s.ld_v;
  const bool wide = p.lse.dtype == DType::kFloat64;
  for (int64_t g = 0; g < plan.query_heads; ++g) {
    const int64_t h = group.first_head + g;
    for (int64_t i = 0; i < p.len_q; ++i) {
      const int64_t row = g * p.len_q + i, lse_at = (group.b * p.heads_q + h) * p.len_q + i;
      const double lse = wide ? static_cast<const double*>(p.lse.ptr)[lse_at] : static_cast<const float*>(p.lse.ptr)[lse_at];
      s.shift[row] = static_cast<T>(lse_to_shift(lse));
      T delta = T(0);
      if (lse != -kInfinity<double>) {
        const auto row_of = [&](const TensorRef& x) {
          return element(x.ptr, x.dtype, group.b * x.stride[0] + h * x.stride[1] + i * x.stride[2]);
        };
        convert_row(out, row_of(p.out), p.out.dtype, static_cast<int>(p.dim_v), static_cast<int>(s.ld_v));
        convert_row(grad_out, row_of(p.grad_out), p.grad_out.dtype, static_cast<int>(p.dim_v), static_cast<int>(s.ld_v));
        Vec<T> products = zero<T>();
        for (int64_t d = 0; d < s.ld_v; d += W) products = fma(load(out + d), load(grad_out + d), products);
        delta = sum(products);
        if (p.grad_lse) {
          const void* const at = row_of(p.grad_lse);
          delta -= static_cast<T>(wide ? *static_cast<const double*>(at) : *static_cast<const float*>(at));
        }
      }
      s.delta[row] = delta;
      std::memset(group.grad_query + g * group.stride_head + i * group.stride_row, 0, p.dim_qk * sizeof(T));
    }
  }
}

// Rows of a tile as they lie, or converted, with `dead` rows zero.
template <typename T>
static Rows<T> tile_rows(const TensorRef& x, int64_t b, int64_t h, int64_t i0, int rows, int dim, uint64_t dead, T* scratch,
                         int64_t ld) {
  const void* const tile = element(x.ptr, x.dtype, b * x.stride[0] + h * x.stride[1] + i0 * x.stride[2]);
  if (!dead && rows_in_place<T>(x.dtype, x.stride[2], dim)) return {static_cast<const T*>(tile), x.stride[2]};
  convert_rows(scratch, ld, tile, x.dtype, x.stride[2], rows, dim, dead);
  return {scratch, ld};
}

// Rows of a query tile as operands: A along the columns, and B along the rows, where `dead` rows are zero.
template <typename T>
struct RowOperands {
  Rows<Operand<T>> a, b;
};

template <typename T>
static RowOperands<T> row_operands(const TensorRef& x, int64_t b, int64_t h, int64_t i0, int rows, int dim, uint64_t dead,
                                   Operand<T>* scratch, [[maybe_unused]] Operand<T>* pairs_scratch, int64_t ld) {
  if constexpr (kPairs<T>) {
    const void* const tile = element(x.ptr, x.dtype, b * x.stride[0] + h * x.stride[1] + i0 * x.stride[2]);
    zip_rows(pairs_scratch, ld, PairRows{tile, x.stride[2]}, 0, rows, dim, dead);
    return {pair_rows(scratch, ld, tile, x.stride[2], nullptr, rows, dim), {pairs_scratch, ld}};
  } else {
    const Rows<T> converted = tile_rows<T>(x, b, h, i0, rows, dim, dead, scratch, ld);
    return {converted, converted};
  }
}

static void* key_row(const TensorRef& x, int64_t b, int64_t h_kv, int64_t j) {
  return element(x.ptr, x.dtype, b * x.stride[0] + h_kv * x.stride[1] + j * x.stride[2]);
}

// Gradients of the padded keys [first, last): zeros.
static void clear_keys(const AttentionBackwardParams& p, int64_t b, int64_t h_kv, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; ++j) {
    std::memset(key_row(p.grad_key, b, h_kv, j), 0, p.dim_qk * element_size(p.grad_key.dtype));
    std::memset(key_row(p.grad_value, b, h_kv, j), 0, p.dim_v * element_size(p.grad_value.dtype));
  }
}

// Keys [j0, j0 + kTileN), counted among the live keys where these are gathered.
template <typename T>
static void key_tile(const AttentionBackwardParams& p, const Plan& plan, const Scratch<T>& s, const Group<T>& group,
                     const LiveKeys& live, int64_t j0) {
  const int tile_keys = static_cast<int>(min64(kTileN, live.count - j0));
  const int32_t* const position = live.position ? live.position + j0 : nullptr;
  const int64_t first_key = position ? position[0] : j0, last_key = position ? position[tile_keys - 1] + 1 : j0 + tile_keys;
  const int dim_qk = static_cast<int>(p.dim_qk), dim_v = static_cast<int>(p.dim_v);
  const int64_t b = group.b;
  const KeyInterval range = query_range(p.mask, b, first_key, last_key, p.len_q);
  std::memset(s.grad_key, 0, tile_keys * s.ld_k * sizeof(T));
  std::memset(s.grad_value, 0, tile_keys * s.ld_v * sizeof(T));

  const bool alone = plan.batches == 1 && (p.grad_bias.stride[1] || p.heads_q == 1);
  Rows<Operand<T>> key{nullptr, s.ld_k};
  PairRows key_pairs{key_row(p.key, b, group.h_kv, position ? 0 : j0), p.key.stride[2]};
  TileMask mask;
  uint64_t kept[kTileM];
  TileTerms<T> terms{static_cast<T>(p.scale), nullptr, 0, nullptr, nullptr, 0, static_cast<T>(1.0 / (1.0 - p.dropout.p))};
  for (int64_t g = 0; g < plan.query_heads; ++g) {
    const int64_t h = group.first_head + g;
    const bool clears = p.grad_bias && (b == 0 || p.grad_bias.stride[0]) && (h == 0 || p.grad_bias.stride[1]);
    const int64_t first = clears ? 0 : range.first / kTileM * kTileM, last = clears ? p.len_q : range.last;
    for (int64_t i0 = first; i0 < last; i0 += kTileM) {
      const int tile_rows_count = static_cast<int>(min64(kTileM, p.len_q - i0));
      const bool in_range = i0 + kTileM > range.first && i0 < range.last;
      if (in_range && position) make_gathered_mask(mask, p.mask, b, i0, tile_rows_count, position, tile_keys);
      else if (in_range) make_tile_mask(mask, p.mask, b, h, i0, tile_rows_count, j0, tile_keys);
      // A full tile overwrites its part of the bias gradient instead, unless others add to the same part.
      const bool full = in_range && mask.tile_class == TileClass::kFull;
      const bool overwrites = clears && full && p.grad_bias.stride[2] && p.grad_bias.stride[3];
      if (clears && !overwrites) clear_bias_gradient<T>(p.grad_bias, b, h, i0, tile_rows_count, j0, tile_keys);
      if (!in_range || mask.tile_class == TileClass::kEmpty) continue;

      if constexpr (kPairs<T>) {
        if (!key.ptr) {
          PairRows value_pairs{key_row(p.value, b, group.h_kv, position ? 0 : j0), p.value.stride[2]};
          if (position) {
            key_pairs = gather_pairs(s.gathered_key, key_pairs, position, tile_keys, dim_qk);
            value_pairs = gather_pairs(s.gathered_value, value_pairs, position, tile_keys, dim_v);
          }
          transpose_pairs(s.key_t, kTileN, key_pairs.ptr, key_pairs.stride, tile_keys, dim_qk, T(1));
          transpose_pairs(s.value_t, kTileN, value_pairs.ptr, value_pairs.stride, tile_keys, dim_v, T(1));
          zip_rows(s.key, s.ld_k, key_pairs, 0, tile_keys, dim_qk, 0), key.ptr = s.key;
        }
      } else if (!key.ptr) {
        if (position) {
          gather_rows(s.key, s.ld_k, key_row(p.key, b, group.h_kv, 0), p.key.dtype, p.key.stride[2], position, tile_keys, dim_qk);
          gather_rows(s.gathered_value, s.ld_v, key_row(p.value, b, group.h_kv, 0), p.value.dtype, p.value.stride[2], position,
                      tile_keys, dim_v);
          key = {s.key, s.ld_k};
          transpose_rows<T>(s.key_t, kTileN, s.key, kComputeDType<T>, s.ld_k, tile_keys, dim_qk, T(1), s.staging);
          transpose_rows<T>(s.value_t, kTileN, s.gathered_value, kComputeDType<T>, s.ld_v, tile_keys, dim_v, T(1), s.staging);
        } else {
          transpose_rows<T>(s.key_t, kTileN, key_row(p.key, b, group.h_kv, j0), p.key.dtype, p.key.stride[2], tile_keys, dim_qk,
                            T(1), s.staging);
          transpose_rows<T>(s.value_t, kTileN, key_row(p.value, b, group.h_kv, j0), p.value.dtype, p.value.stride[2], tile_keys,
                            dim_v, T(1), s.staging);
          key = tile_rows<T>(p.key, b, group.h_kv, j0, tile_keys, dim_qk, 0, s.key, s.ld_k);
        }
      }

      // Rows [top, bottom) and keys [left, right) of the tile: outside these all is dead. The holes inside are dead too.
      const int left = first_bit(mask.columns), right = end_bit(mask.columns), keys = right - left;
      int top = 0, bottom = tile_rows_count;
      uint64_t dead_rows = 0;
      if (!full) {
        while (!mask.rows[top]) ++top;
        while (!mask.rows[bottom - 1]) --bottom;
        for (int r = top; r < bottom; ++r) dead_rows |= uint64_t{mask.rows[r] == 0} << (r - top);
      }
      const int rows = bottom - top;
      const RowOperands<T> query =
          row_operands<T>(p.query, b, h, i0 + top, rows, dim_qk, dead_rows, s.query, s.query_pairs, s.ld_k);
      const RowOperands<T> grad_out =
          row_operands<T>(p.grad_out, b, h, i0 + top, rows, dim_v, dead_rows, s.grad_out, s.grad_out_pairs, s.ld_v);

      gemm_before_bias(rows, keys, depth<T>(dim_qk), query.a.ptr, query.a.ld, s.key_t + left, kTileN, s.p, kTileN,
                       position ? TensorRef{} : p.bias, b, h, i0 + top, rows, j0 + left, keys);
      // The bias gradient of a batch or head after the first has left L2 since: it is asked for as the bias is.
      gemm_before_bias(rows, keys, depth<T>(dim_v), grad_out.a.ptr, grad_out.a.ld, s.value_t + left, kTileN, s.ds, kTileN,
                       alone || position ? TensorRef{} : p.grad_bias, b, h, i0 + top, rows, j0 + left, keys);

      const T *const shift = s.shift + g * p.len_q + i0 + top, *const delta = s.delta + g * p.len_q + i0 + top;
      terms.first_bit = left;
      terms.allowed = full ? nullptr : mask.rows + top;
      if (p.bias && position) {
        gather_bias(s.bias, p.bias, b, h, i0 + top, rows, position + left, keys);
        terms.bias = s.bias;
        terms.ld_bias = kTileN;
      } else if (p.bias) {
        const Rows<T> bias = bias_rows(p.bias, b, h, i0 + top, rows, j0 + left, keys, s.bias);
        terms.bias = bias.ptr;
        terms.ld_bias = bias.ld;
      }
      if (p.dropout.p > 0) {
        if (position) make_gathered_dropout(kept, p.dropout, b, h, i0 + top, rows, position, right);
        else make_dropout_tile(kept, p.dropout, b, h, i0 + top, rows, j0);
        terms.kept = kept;
      }
      if (terms.allowed || terms.bias || terms.kept)
        softmax_gradient<T, false>(s.p, s.ds, rows, keys, shift, delta, terms);
      else
        softmax_gradient<T, true>(s.p, s.ds, rows, keys, shift, delta, terms);
      if (overwrites)
        store_bias_gradient(p.grad_bias, b, h, i0, rows, j0, keys, s.ds, alone);
      else if (p.grad_bias)
        add_bias_gradient(p.grad_bias, b, h, i0 + top, rows, j0 + left, keys, s.ds);

      Rows<Operand<T>> ds_rows{as_operand(s.ds), kTileN};
      if constexpr (kPairs<T>) {
        round_row_pairs(s.p, kTileN, rows, keys);
        round_both_pairs(s.ds, s.ds_rows, kTileN, rows, keys);
        ds_rows = {s.ds_rows, kTileN / 2};
      }
      gemm<Layout::kTransposed>(keys, dim_v, depth<T>(rows), as_operand(s.p), kTileN, grad_out.b.ptr, grad_out.b.ld,
                                s.grad_value + left * s.ld_v, s.ld_v, true);
      gemm<Layout::kTransposed>(keys, dim_qk, depth<T>(rows), as_operand(s.ds), kTileN, query.b.ptr, query.b.ld,
                                s.grad_key + left * s.ld_k, s.ld_k, true);
      Rows<Operand<T>> live_key{key.ptr + left / kTerms<Operand<T>> * key.ld, key.ld};
      const uint64_t dead_keys = ~mask.columns >> left & bits_before(keys, 0);
      if constexpr (kPairs<T>) {
        if (dead_keys || splits_pairs(left, right, tile_keys)) {
          zip_rows(s.live_key, s.ld_k, key_pairs, left, keys, dim_qk, dead_keys);
          live_key.ptr = s.live_key;
        }
      } else if (dead_keys) {
        convert_rows(s.live_key, s.ld_k, live_key.ptr, kComputeDType<T>, key.ld, keys, dim_qk, dead_keys);
        live_key = {s.live_key, s.ld_k};
      }
      T* const grad_query = group.grad_query + g * group.stride_head + (i0 + top) * group.stride_row;
      gemm<Layout::kRows>(rows, dim_qk, depth<T>(keys), ds_rows.ptr, ds_rows.ld, live_key.ptr, live_key.ld, grad_query,
                          group.stride_row, true);
    }
  }

  int64_t next = !position ? j0 : j0 ? position[-1] + 1 : 0;  // the first key not yet written
  for (int r = 0; r < tile_keys; ++r) {
    const int64_t j = position ? position[r] : j0 + r;
    clear_keys(p, b, group.h_kv, next, j);
    next = j + 1;
    store_row(key_row(p.grad_key, b, group.h_kv, j), p.grad_key.dtype, s.grad_key + r * s.ld_k, dim_qk, static_cast<T>(p.scale));
    store_row(key_row(p.grad_value, b, group.h_kv, j), p.grad_value.dtype, s.grad_value + r * s.ld_v, dim_v, T(1));
  }
  if (j0 + tile_keys == live.count) clear_keys(p, b, group.h_kv, next, p.len_k);
}

static void* grad_query_row(const AttentionBackwardParams& p, int64_t b, int64_t h, int64_t i) {
  const TensorRef& x = p.grad_query;
  return element(x.ptr, x.dtype, b * x.stride[0] + h * x.stride[1] + i * x.stride[2]);
}

template <typename T>
static void run_group(const AttentionBackwardParams& p, const Plan& plan, const Scratch<T>& s, const Shared<T>& shared, int64_t b,
                      int64_t h_kv, int64_t chunk) {
  const int64_t h = h_kv * plan.query_heads;
  Group<T> group{b, h_kv, h, s.grad_query, p.len_q * s.ld_k, s.ld_k};
  if (plan.chunks > 1)
    group.grad_query = shared.parts + ((chunk * p.batch + b) * p.heads_q + h) * p.len_q * s.ld_k;
  else if (plan.query_in_place) {
    group.grad_query = static_cast<T*>(grad_query_row(p, b, h, 0));
    group.stride_head = p.grad_query.stride[1];
    group.stride_row = p.grad_query.stride[2];
  }
  prepare_rows(p, plan, s, group);
  const LiveKeys live = shared.lists.of(b);
  for (int64_t j0 = chunk * kTileN; j0 < live.count; j0 += plan.chunks * kTileN) key_tile(p, plan, s, group, live, j0);
  if (plan.chunks > 1) return;
  for (int64_t g = 0; g < plan.query_heads; ++g)
    for (int64_t i = 0; i < p.len_q; ++i)
      store_row(grad_query_row(p, b, h + g, i), p.grad_query.dtype, group.grad_query + g * group.stride_head + i * group.stride_row,
                static_cast<int>(p.dim_qk), static_cast<T>(p.scale));
}

// The groups of a work item, in order, and its chunk.
struct ItemGroups {
  int64_t first_batch, last_batch, first_head, last_head, chunk;
};

static ItemGroups item_groups(const AttentionBackwardParams& p, const Plan& plan, int64_t item) {
  const int64_t owner = item / plan.chunks, heads = p.heads_kv / plan.heads;
  const int64_t batch = owner / heads * plan.batches, head = owner % heads * plan.heads;
  return {batch, batch + plan.batches, head, head + plan.heads, item % plan.chunks};
}

// Pairs that an item will touch, by arithmetic, or tiles where a tile map tells.
static int64_t item_cost(const AttentionBackwardParams& p, const Plan& plan, const LiveKeyLists& lists, int64_t item) {
  const ItemGroups groups = item_groups(p, plan, item);
  const bool mapped = p.mask.live_t && p.mask.block_m == kTileM && p.mask.block_n == kTileN;
  int64_t cost = 0;
  for (int64_t b = groups.first_batch; b < groups.last_batch; ++b) {
    const LiveKeys live = lists.of(b);
    for (int64_t j0 = groups.chunk * kTileN; j0 < live.count; j0 += plan.chunks * kTileN) {
      const int64_t last = min64(j0 + kTileN, live.count) - 1;
      const KeyInterval rows = live.position ? query_range(p.mask, b, live.position[j0], live.position[last] + 1, p.len_q)
                                             : query_range(p.mask, b, j0, last + 1, p.len_q);
      const int64_t in_range = max64(0, rows.last - rows.first);
      if (!mapped || !in_range) {
        cost += in_range * (groups.last_head - groups.first_head) * plan.query_heads;
        continue;
      }
      for (int64_t h = groups.first_head * plan.query_heads; h < groups.last_head * plan.query_heads; ++h) {
        const uint64_t* const live = p.mask.live_t + b * p.mask.stride_map_t_b + h * p.mask.stride_map_t_h +
                                     j0 / kTileN * p.mask.map_t_words_per_row;
        int64_t tiles = 0;
        for (int64_t w = 0; w < p.mask.map_t_words_per_row; ++w) tiles += __builtin_popcountll(live[w]);
        cost += min64(in_range, tiles * kTileM);
      }
    }
  }
  return cost;
}

template <typename T>
static int64_t workspace_bytes(const AttentionBackwardParams& p) {
  const Plan plan = make_plan<T>(p);
  Arena shared(nullptr), thread(nullptr);
  carve_shared<T>(shared, p, plan);
  carve<T>(thread, p, plan);
  return kAlignment + shared.used + plan.threads * thread.used;
}

template <typename T>
static void run(const AttentionBackwardParams& p) {
  const Plan plan = make_plan<T>(p);
  if (plan.items == 0) return;
  Arena arena(align_pointer(p.workspace)), counter(nullptr);
  const Shared<T> shared = carve_shared<T>(arena, p, plan);
  fill_live_keys(shared.lists, p.mask);
  carve<T>(counter, p, plan);
  const int64_t thread_bytes = counter.used;
  char* const scratch = arena.base + arena.used;
  for (int64_t n = 0; n < plan.items; ++n) shared.cost[n] = has_mask(p.mask) ? item_cost(p, plan, shared.lists, n) : 0;
  order_by_cost(shared.order, shared.cost, plan.items);

  const int threads = static_cast<int>(min64(plan.items, effective_threads(plan.threads)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena own(scratch + thread_number() * thread_bytes);
    const Scratch<T> s = carve<T>(own, p, plan);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < plan.items; ++n) {
      const ItemGroups groups = item_groups(p, plan, shared.order[n]);
      for (int64_t b = groups.first_batch; b < groups.last_batch; ++b)
        for (int64_t h = groups.first_head; h < groups.last_head; ++h) run_group(p, plan, s, shared, b, h, groups.chunk);
      finish_streams();
    }
    if (plan.chunks > 1) {
      const int64_t rows = p.batch * p.heads_q * p.len_q, part = rows * s.ld_k;
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row) {
        T* const first = shared.parts + row * s.ld_k;
        for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
          for (int64_t d = 0; d < s.ld_k; ++d) first[d] += first[chunk * part + d];
        const int64_t bh = row / p.len_q;
        store_row(grad_query_row(p, bh / p.heads_q, bh % p.heads_q, row % p.len_q), p.grad_query.dtype, first,
                  static_cast<int>(p.dim_qk), static_cast<T>(p.scale));
      }
    }
  }
}

}  // namespace

#if defined(__AVX512BF16__)

int64_t attention_backward_workspace(const AttentionBackwardParams& p) {
  return multiplies_pairs(p) ? workspace_bytes<float>(p) : avx512::attention_backward_workspace(p);
}

void attention_backward(const AttentionBackwardParams& p) {
  if (multiplies_pairs(p)) run<float>(p);
  else avx512::attention_backward(p);
}

#else

int64_t attention_backward_workspace(const AttentionBackwardParams& p) {
  return p.query.dtype == DType::kFloat64 ? workspace_bytes<double>(p) : workspace_bytes<float>(p);
}

void attention_backward(const AttentionBackwardParams& p) {
  if (p.query.dtype == DType::kFloat64) run<double>(p);
  else run<float>(p);
}

#endif

}  // namespace fastattn::cpu::FASTATTN_ISA
