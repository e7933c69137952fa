// Attention weights W = exp(scores - lse), after dropout, per head or averaged over the heads; and their gradients.
//
// Both kernels keep scores transposed, as the forward does: a query is a vector lane, so lse is a vector and a sum over
// keys is lane by lane; Q^T is made once per query tile, K is read as it lies:
//     S^T [64, 48] = K [64, D] Q^T [D, 48]
//     P^T          = e^(scale S^T - lse), in place; rounded as in the forward and the backward (attention_backward.cpp)
// Forward: a work item is a query tile of one batch (averaged) or one head, and a run of key tiles. Averaged, a key tile
// meets every head in order before the sum is transposed and written: no tensor per head exists. Every element of the
// output is written once, zeros where the mask leaves nothing.
// Backward, from the gradient dW of W with lse held for an input of its own:
//     dS^T [64, 48] = P^T dW^T (1 / H when averaged, and the dropout factor)
//     dQ [48, D] += dS K,  dlse -= sum over keys of dS      in the order of the key tiles; local to the query tile
//     dK [64, D] += dS^T Q                                  in scratch of [S, D], in the order of (head, query tile)
// No two threads add to the same number: a work item is every (batch, key head) that adds to the same bias gradient, in
// order; without a broadcast bias gradient it is one. When that makes too few items for the threads, the query tiles are
// dealt out to kMaxChunks chunks at most, each with a dK of its own, added afterwards in the order of the chunks. So the
// result depends on the number of chunks, and with that on the number of threads, and on nothing else.
//
// Bytes, float, D = 64: Q^T 12 KB for each head, S^T and the sum 12 KB each, K 16 KB; backward: + dW^T 12 KB, Q 12 KB,
// dQ 12 KB, and dK streams. Registers: gemm.h.
//
// No pair of a full tile meets mask code. P^T and dS^T of dead pairs are replaced by 0, whatever NaN they hold; rows of K and
// Q that are dead for the whole tile are replaced by zeros before they are multiplied by those, because 0 * NaN is NaN.
#include "../core/softmax.h"
#include "bias.h"
#include "schedule.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int64_t kItemsPerThread = 4;  // fewer leave threads idle at the end
constexpr int64_t kMaxChunks = 16;      // bounds the memory for the parts of dK

// ---- one tile pair ----

// Scratch that both kernels take for a tile pair.
template <typename T>
struct TileScratch {
  int64_t ld;  // of rows of K and Q
  T *scores, *key, *bias, *staging;
};

template <typename T>
static TileScratch<T> carve_tile(Arena& arena, const AttentionParams& p) {
  constexpr int W = kWidth<T>;
  TileScratch<T> s;
  s.ld = round_up(static_cast<int>(p.dim_qk), W);
  s.scores = arena.take<T>(kTileN * kTileM);
  s.key = arena.take<T>(kTileN * s.ld);
  s.bias = arena.take<T>(p.bias ? kTileN * kTileM : 0);
  s.staging = arena.take<T>(W * max64(s.ld, kTileN));
  return s;
}

// Rows [i0, i0 + rows) of query head h.
template <typename T>
struct QueryTile {
  int64_t b, h, i0;
  int rows, padded_rows;
  const T *query_t, *shift;  // [D][padded_rows], [padded_rows]: lse
};

// What a tile pair has beyond the plain softmax; bit r of a word is row r.
struct TileBits {
  TileMask mask;
  uint64_t allowed[kTileN], kept[kTileN];
  bool partial, dropout;
};

static const void* rows_at(const TensorRef& x, int64_t b, int64_t h, int64_t i) {
  return element(x.ptr, x.dtype, b * x.stride[0] + h * x.stride[1] + i * x.stride[2]);
}
static void* rows_at(TensorRef& x, int64_t b, int64_t h, int64_t i) {
  return element(x.ptr, x.dtype, b * x.stride[0] + h * x.stride[1] + i * x.stride[2]);
}

template <typename T>
static QueryTile<T> load_query(const AttentionParams& p, const TileScratch<T>& s, int64_t b, int64_t h, int64_t i0,
                               T* query_t, T* shift) {
  const int rows = static_cast<int>(min64(kTileM, p.len_q - i0)), padded_rows = round_up(rows, kWidth<T>);
  transpose_rows<T>(query_t, padded_rows, rows_at(p.query, b, h, i0), p.query.dtype, p.query.stride[2], rows,
                    static_cast<int>(p.dim_qk), T(1), s.staging);
  const void* const lse = element(p.lse.ptr, p.lse.dtype, (b * p.heads_q + h) * p.len_q + i0);
  for (int r = 0; r < padded_rows; ++r)  // +inf: no probability, on an empty row and on one that does not exist
    shift[r] = r < rows ? static_cast<T>(lse_to_shift(p.lse.dtype == DType::kFloat64 ? static_cast<const double*>(lse)[r]
                                                                                     : static_cast<const float*>(lse)[r]))
                        : kInfinity<T>;
  return {b, h, i0, rows, padded_rows, query_t, shift};
}

// Scores of the tile pair, K Q^T without scale, and the bits that go with them. False: the mask leaves nothing.
template <typename T>
static bool load_scores(const AttentionParams& p, const TileScratch<T>& s, const QueryTile<T>& q, int64_t j0, int keys,
                        Rows<T>& key, TileBits& bits) {
  make_tile_mask(bits.mask, p.mask, q.b, q.h, q.i0, q.rows, j0, keys);
  if (bits.mask.tile_class == TileClass::kEmpty) return false;
  const int dim = static_cast<int>(p.dim_qk);
  if (!key.ptr) {
    const void* const tile = rows_at(p.key, q.b, q.h / (p.heads_q / p.heads_kv), j0);
    if (rows_in_place<T>(p.key.dtype, p.key.stride[2], dim)) {
      key = {static_cast<const T*>(tile), p.key.stride[2]};
    } else {
      convert_rows(s.key, s.ld, tile, p.key.dtype, p.key.stride[2], keys, dim);
      key = {s.key, s.ld};
    }
  }
  gemm<Layout::kRows, T>(keys, q.rows, dim, key.ptr, key.ld, q.query_t, q.padded_rows, s.scores, q.padded_rows, false);
  if (p.bias)
    load_transposed(s.bias, q.padded_rows, p.bias, q.b, q.h, q.i0, q.rows, j0, keys, T(1), s.staging);
  bits.partial = bits.mask.tile_class == TileClass::kPartial;
  if (bits.partial) transpose_bits(bits.allowed, bits.mask.rows);
  bits.dropout = p.dropout.p > 0;
  if (bits.dropout) {
    uint64_t kept_rows[kTileM];
    make_dropout_tile(kept_rows, p.dropout, q.b, q.h, q.i0, q.rows, j0);
    transpose_bits(bits.kept, kept_rows);
  }
  return true;
}

// Probabilities, before dropout, of key j and the rows from `lane` on.
template <typename T>
FASTATTN_INLINE Vec<T> probability(const T* scores, const T* bias, const TileBits& bits, int64_t ld, int j, int lane,
                                   Vec<T> scale, Vec<T> shift) {
  Vec<T> x = load(scores + j * ld + lane);
  x = bias ? fma(x, scale, load(bias + j * ld + lane)) : product(x, scale);
  x = exp2((x - shift) * broadcast(static_cast<T>(kLog2E)));
  return bits.partial ? (lanes_of<T>(bits.allowed[j] >> lane) ? x : zero<T>()) : x;
}
template <typename T>
FASTATTN_INLINE Vec<T> after_dropout(Vec<T> x, const TileBits& bits, int j, int lane) {
  return bits.dropout ? (lanes_of<T>(bits.kept[j] >> lane) ? x : zero<T>()) : x;
}

// sum (+)= P^T after dropout, without the dropout factor. [keys][padded_rows]
template <typename T>
static void add_probabilities(T* sum, bool first, const AttentionParams& p, const TileScratch<T>& s, const QueryTile<T>& q,
                              const TileBits& bits, int keys) {
  const Vec<T> scale = broadcast(static_cast<T>(p.scale));
  const T* const bias = p.bias ? s.bias : nullptr;
  const int64_t ld = q.padded_rows;
  for (int lane = 0; lane < q.padded_rows; lane += kWidth<T>) {
    const Vec<T> shift = load(q.shift + lane);
    for (int j = 0; j < keys; ++j) {
      const Vec<T> x = after_dropout<T>(probability(s.scores, bias, bits, ld, j, lane, scale, shift), bits, j, lane);
      store(sum + j * ld + lane, first ? x : x + load(sum + j * ld + lane));
    }
  }
}

// ---- forward ----

struct ForwardPlan {
  int64_t heads;            // of a work item: all when averaged, else 1
  int64_t tiles_per_item;   // key tiles
  int64_t items_per_row;    // work items that share a query tile
  int64_t items;
};

static ForwardPlan forward_plan(const AttentionWeightsParams& p) {
  ForwardPlan plan;
  plan.heads = p.average_heads ? p.heads_q : min64(p.heads_q, 1);
  const int64_t rows = p.batch * (p.average_heads ? 1 : p.heads_q) * ceil_div(p.len_q, kTileM);
  const int64_t tiles = ceil_div(p.len_k, kTileN);
  const int64_t runs = min64(tiles, max64(1, ceil_div(kItemsPerThread * p.num_threads, max64(rows, 1))));
  plan.tiles_per_item = runs ? ceil_div(tiles, runs) : 0;
  plan.items_per_row = runs ? ceil_div(tiles, plan.tiles_per_item) : 0;
  plan.items = rows * plan.items_per_row;
  return plan;
}

template <typename T>
struct ForwardScratch {
  TileScratch<T> tile;
  T *query_t, *shift;  // per head of the item
  T *sum, *rows;       // [kTileN][kTileM] and its transpose
};

template <typename T>
static ForwardScratch<T> carve(Arena& arena, const AttentionWeightsParams& p, const ForwardPlan& plan) {
  ForwardScratch<T> s;
  s.tile = carve_tile<T>(arena, p);
  s.query_t = arena.take<T>(plan.heads * p.dim_qk * kTileM);
  s.shift = arena.take<T>(plan.heads * kTileM);
  s.sum = arena.take<T>(kTileN * kTileM);
  s.rows = arena.take<T>(kTileM * kTileN);
  return s;
}

template <typename T>
static void run_item(const AttentionWeightsParams& p, const ForwardPlan& plan, const ForwardScratch<T>& s, int64_t item) {
  const int64_t tiles_q = ceil_div(p.len_q, kTileM), heads = p.average_heads ? 1 : p.heads_q;
  const int64_t run = item % plan.items_per_row, row = item / plan.items_per_row;
  const int64_t i0 = row % tiles_q * kTileM, h0 = row / tiles_q % heads, b = row / tiles_q / heads;
  const int64_t first = run * plan.tiles_per_item * kTileN, last = min64(p.len_k, first + plan.tiles_per_item * kTileN);
  const T factor = static_cast<T>(1.0 / (static_cast<double>(plan.heads) * (1.0 - p.dropout.p)));
  const auto query_tile = [&](int64_t h, bool load) -> QueryTile<T> {
    T* const query_t = s.query_t + h * p.dim_qk * kTileM;
    T* const shift = s.shift + h * kTileM;
    if (load) return load_query(p, s.tile, b, h0 + h, i0, query_t, shift);
    const int rows = static_cast<int>(min64(kTileM, p.len_q - i0));
    return {b, h0 + h, i0, rows, round_up(rows, kWidth<T>), query_t, shift};
  };
  for (int64_t h = 0; h < plan.heads; ++h) query_tile(h, true);
  const int rows = static_cast<int>(min64(kTileM, p.len_q - i0)), padded_rows = round_up(rows, kWidth<T>);
  TileBits bits;
  for (int64_t j0 = first; j0 < last; j0 += kTileN) {
    const int keys = static_cast<int>(min64(kTileN, p.len_k - j0));
    bool any = false;
    Rows<T> key{nullptr, 0};
    for (int64_t h = 0; h < plan.heads; ++h) {
      // Query heads of one group share the tile of K.
      if (h % (p.heads_q / p.heads_kv) == 0) key.ptr = nullptr;
      const QueryTile<T> q = query_tile(h, false);
      if (!load_scores(p, s.tile, q, j0, keys, key, bits)) continue;
      add_probabilities(s.sum, !any, p, s.tile, q, bits, keys);
      any = true;
    }
    if (any)
      transpose_rows<T>(s.rows, kTileN, s.sum, kComputeDType<T>, padded_rows, keys, rows, factor, s.tile.staging);
    else
      std::memset(s.rows, 0, rows * kTileN * sizeof(T));
    for (int r = 0; r < rows; ++r) {
      const TensorRef& out = p.weights;
      store_row(element(out.ptr, out.dtype, b * out.stride[0] + h0 * out.stride[1] + (i0 + r) * out.stride[2] + j0),
                out.dtype, s.rows + r * kTileN, keys, T(1));
    }
  }
}

template <typename T>
static int64_t workspace_bytes(const AttentionWeightsParams& p) {
  const ForwardPlan plan = forward_plan(p);
  Arena thread(nullptr);
  carve<T>(thread, p, plan);
  return kAlignment + p.num_threads * thread.used;
}

template <typename T>
static void run(const AttentionWeightsParams& p) {
  const ForwardPlan plan = forward_plan(p);
  Arena counter(nullptr);
  carve<T>(counter, p, plan);
  char* const scratch = static_cast<char*>(align_pointer(p.workspace));
  const int threads = static_cast<int>(max64(1, min64(plan.items, p.num_threads)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena own(scratch + thread_number() * counter.used);
    const ForwardScratch<T> s = carve<T>(own, p, plan);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < plan.items; ++item) run_item(p, plan, s, item);
  }
}

// ---- backward ----

struct BackwardPlan {
  int64_t query_heads;     // per key head
  int64_t batches, heads;  // of a work item; heads are key heads
  int64_t chunks, items;
};

static BackwardPlan backward_plan(const AttentionWeightsBackwardParams& p) {
  BackwardPlan plan;
  const bool over_batch = p.grad_bias && p.grad_bias.stride[0] == 0, over_heads = p.grad_bias && p.grad_bias.stride[1] == 0;
  plan.query_heads = p.heads_kv ? p.heads_q / p.heads_kv : 0;
  plan.batches = over_batch ? p.batch : min64(p.batch, 1);
  plan.heads = over_heads ? p.heads_kv : min64(p.heads_kv, 1);
  const int64_t owners = plan.batches && plan.heads ? p.batch / plan.batches * (p.heads_kv / plan.heads) : 0;
  plan.chunks = 1;
  // A bias gradient summed over the queries would be shared by the chunks.
  const bool divisible = !p.grad_bias || p.grad_bias.stride[2] != 0;
  if (owners && p.num_threads > 1 && divisible)
    plan.chunks = max64(1, min64(min64(ceil_div(p.len_q, kTileM), kMaxChunks), kItemsPerThread * p.num_threads / owners));
  plan.items = owners * plan.chunks;
  return plan;
}

template <typename T>
struct BackwardScratch {
  TileScratch<T> tile;
  T *query_t, *shift;    // [D][kTileM], [kTileM]
  T *query, *grad_query; // [kTileM][ld]
  T *live_query, *live_key;
  T *grad_weights;       // [kTileN][kTileM]
  T *grad_lse;           // [kTileM]
  T *grad_scores;        // [kTileM][kTileN], for the bias
  T *grad_key;           // [S][ld], unless in parts
};

template <typename T>
static BackwardScratch<T> carve(Arena& arena, const AttentionWeightsBackwardParams& p, const BackwardPlan& plan) {
  BackwardScratch<T> s;
  s.tile = carve_tile<T>(arena, p);
  s.query_t = arena.take<T>(p.dim_qk * kTileM);
  s.shift = arena.take<T>(kTileM);
  s.query = arena.take<T>(kTileM * s.tile.ld);
  s.grad_query = arena.take<T>(kTileM * s.tile.ld);
  s.live_query = arena.take<T>(kTileM * s.tile.ld);
  s.live_key = arena.take<T>(kTileN * s.tile.ld);
  s.grad_weights = arena.take<T>(kTileN * kTileM);
  s.grad_lse = arena.take<T>(kTileM);
  s.grad_scores = arena.take<T>(p.grad_bias ? kTileM * kTileN : 0);
  s.grad_key = arena.take<T>(plan.chunks > 1 ? 0 : p.len_k * s.tile.ld);
  return s;
}

// In: scores = K Q^T, grad_weights = dW^T. Out: scores = dS^T; adds its sum over the keys to grad_lse.
template <typename T>
static void score_gradients(const AttentionWeightsBackwardParams& p, const BackwardScratch<T>& s, const QueryTile<T>& q,
                            const TileBits& bits, int keys) {
  const Vec<T> scale = broadcast(static_cast<T>(p.scale));
  const T* const bias = p.bias ? s.tile.bias : nullptr;
  const int64_t ld = q.padded_rows;
  for (int lane = 0; lane < q.padded_rows; lane += kWidth<T>) {
    const Vec<T> shift = load(q.shift + lane);
    Vec<T> total = zero<T>();
    for (int j = 0; j < keys; ++j) {
      const Vec<T> x = probability(s.tile.scores, bias, bits, ld, j, lane, scale, shift);
      Vec<T> ds = x * after_dropout<T>(load(s.grad_weights + j * ld + lane), bits, j, lane);
      // Where nothing may be attended to, dW may hold anything.
      if (bits.partial) ds = lanes_of<T>(bits.allowed[j] >> lane) ? ds : zero<T>();
      total += ds;
      store(s.tile.scores + j * ld + lane, ds);
    }
    store(s.grad_lse + lane, load(s.grad_lse + lane) + total);
  }
}

// One query tile of head h with every key tile. grad_key: [S][ld] of the group.
template <typename T>
static void run_query_tile(const AttentionWeightsBackwardParams& p, const BackwardScratch<T>& s, int64_t b, int64_t h,
                           int64_t i0, T* grad_key) {
  const int dim = static_cast<int>(p.dim_qk);
  const int64_t ld = s.tile.ld;
  const QueryTile<T> q = load_query(p, s.tile, b, h, i0, s.query_t, s.shift);
  convert_rows(s.query, ld, rows_at(p.query, b, h, i0), p.query.dtype, p.query.stride[2], q.rows, dim);
  std::memset(s.grad_query, 0, q.rows * ld * sizeof(T));
  std::memset(s.grad_lse, 0, kTileM * sizeof(T));
  const T factor = static_cast<T>(1.0 / ((p.average_heads ? static_cast<double>(p.heads_q) : 1.0) * (1.0 - p.dropout.p)));
  const bool clears = p.grad_bias && (b == 0 || p.grad_bias.stride[0]) && (h == 0 || p.grad_bias.stride[1]);
  TileBits bits;
  for (int64_t j0 = 0; j0 < p.len_k; j0 += kTileN) {
    const int keys = static_cast<int>(min64(kTileN, p.len_k - j0));
    if (clears) clear_bias_gradient<T>(p.grad_bias, b, h, i0, q.rows, j0, keys);
    Rows<T> key{nullptr, 0};
    if (!load_scores(p, s.tile, q, j0, keys, key, bits)) continue;
    load_transposed(s.grad_weights, q.padded_rows, p.grad_weights, b, h, i0, q.rows, j0, keys, factor, s.tile.staging);
    score_gradients(p, s, q, bits, keys);

    const T* const ds_t = s.tile.scores;
    if (p.grad_bias) {
      transpose_rows<T>(s.grad_scores, kTileN, ds_t, kComputeDType<T>, q.padded_rows, keys, q.rows, T(1), s.tile.staging);
      add_bias_gradient(p.grad_bias, b, h, i0, q.rows, j0, keys, s.grad_scores);
    }
    Rows<T> query{s.query, ld};
    uint64_t dead_rows = 0, dead_keys = 0;
    if (bits.partial) {
      for (int r = 0; r < q.rows; ++r) dead_rows |= uint64_t{bits.mask.rows[r] == 0} << r;
      dead_keys = ~bits.mask.columns & bits_before(keys, 0);
    }
    if (dead_rows) {
      convert_rows(s.live_query, ld, s.query, kComputeDType<T>, ld, q.rows, dim, dead_rows);
      query.ptr = s.live_query;
    }
    if (dead_keys) {
      convert_rows(s.live_key, ld, key.ptr, kComputeDType<T>, key.ld, keys, dim, dead_keys);
      key = {s.live_key, ld};
    }
    gemm<Layout::kTransposed, T>(q.rows, dim, keys, ds_t, q.padded_rows, key.ptr, key.ld, s.grad_query, ld, true);
    gemm<Layout::kRows, T>(keys, dim, q.rows, ds_t, q.padded_rows, query.ptr, query.ld, grad_key + j0 * ld, ld, true);
  }
  TensorRef grad_query = p.grad_query, grad_lse = p.grad_lse;
  for (int r = 0; r < q.rows; ++r)
    store_row(rows_at(grad_query, b, h, i0 + r), grad_query.dtype, s.grad_query + r * ld, dim, static_cast<T>(p.scale));
  store_row(element(grad_lse.ptr, grad_lse.dtype, (b * p.heads_q + h) * p.len_q + i0), grad_lse.dtype, s.grad_lse, q.rows,
            T(-1));
}

template <typename T>
static void store_grad_key(const AttentionWeightsBackwardParams& p, int64_t b, int64_t h_kv, int64_t j, const T* row) {
  TensorRef grad_key = p.grad_key;
  store_row(rows_at(grad_key, b, h_kv, j), grad_key.dtype, row, static_cast<int>(p.dim_qk), static_cast<T>(p.scale));
}

// One chunk of the query tiles of every query head of a key head. `parts` [chunks, B, Hkv, S, ld], or null.
template <typename T>
static void run_group(const AttentionWeightsBackwardParams& p, const BackwardPlan& plan, const BackwardScratch<T>& s, T* parts,
                      int64_t b, int64_t h_kv, int64_t chunk) {
  const int64_t ld = s.tile.ld;
  T* const grad_key = parts ? parts + ((chunk * p.batch + b) * p.heads_kv + h_kv) * p.len_k * ld : s.grad_key;
  std::memset(grad_key, 0, p.len_k * ld * sizeof(T));
  for (int64_t h = h_kv * plan.query_heads; h < (h_kv + 1) * plan.query_heads; ++h)
    for (int64_t i0 = chunk * kTileM; i0 < p.len_q; i0 += plan.chunks * kTileM) run_query_tile(p, s, b, h, i0, grad_key);
  if (parts) return;
  for (int64_t j = 0; j < p.len_k; ++j) store_grad_key(p, b, h_kv, j, grad_key + j * ld);
}

template <typename T>
static T* carve_parts(Arena& arena, const AttentionWeightsBackwardParams& p, const BackwardPlan& plan) {
  const int64_t ld = round_up(static_cast<int>(p.dim_qk), kWidth<T>);
  return arena.take<T>(plan.chunks > 1 ? plan.chunks * p.batch * p.heads_kv * p.len_k * ld : 0);
}

template <typename T>
static int64_t workspace_bytes(const AttentionWeightsBackwardParams& p) {
  const BackwardPlan plan = backward_plan(p);
  Arena shared(nullptr), thread(nullptr);
  carve_parts<T>(shared, p, plan);
  carve<T>(thread, p, plan);
  return kAlignment + shared.used + p.num_threads * thread.used;
}

template <typename T>
static void run(const AttentionWeightsBackwardParams& p) {
  const BackwardPlan plan = backward_plan(p);
  if (plan.items == 0) return;
  Arena shared(align_pointer(p.workspace)), counter(nullptr);
  T* const block = carve_parts<T>(shared, p, plan);
  T* const parts = plan.chunks > 1 ? block : nullptr;
  carve<T>(counter, p, plan);
  const int threads = static_cast<int>(min64(plan.items, p.num_threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena own(shared.base + shared.used + thread_number() * counter.used);
    const BackwardScratch<T> s = carve<T>(own, p, plan);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < plan.items; ++item) {
      const int64_t owner = item / plan.chunks, heads = p.heads_kv / plan.heads;
      const int64_t batch = owner / heads * plan.batches, head = owner % heads * plan.heads;
      for (int64_t b = batch; b < batch + plan.batches; ++b)
        for (int64_t h = head; h < head + plan.heads; ++h) run_group(p, plan, s, parts, b, h, item % plan.chunks);
    }
    if (parts) {
      const int64_t rows = p.batch * p.heads_kv * p.len_k, part = rows * s.tile.ld;
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row) {
        T* const first = parts + row * s.tile.ld;
        for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
          for (int64_t d = 0; d < s.tile.ld; ++d) first[d] += first[chunk * part + d];
        const int64_t bh = row / p.len_k;
        store_grad_key(p, bh / p.heads_kv, bh % p.heads_kv, row % p.len_k, first);
      }
    }
  }
}

}  // namespace

int64_t attention_weights_workspace(const AttentionWeightsParams& p) {
  return p.query.dtype == DType::kFloat64 ? workspace_bytes<double>(p) : workspace_bytes<float>(p);
}

void attention_weights(const AttentionWeightsParams& p) {
  if (p.query.dtype == DType::kFloat64) run<double>(p);
  else run<float>(p);
}

int64_t attention_weights_backward_workspace(const AttentionWeightsBackwardParams& p) {
  return p.query.dtype == DType::kFloat64 ? workspace_bytes<double>(p) : workspace_bytes<float>(p);
}

void attention_weights_backward(const AttentionWeightsBackwardParams& p) {
  if (p.query.dtype == DType::kFloat64) run<double>(p);
  else run<float>(p);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
