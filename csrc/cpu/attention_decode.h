// Attention forward for a few queries and any number of keys: decoding from a cache.
//
// Bound by memory: K and V are read once, and with a row or a few for each of them hardly anything is computed. So
//  * the query heads that share a key head are rows of one problem (group x L of them): each tile of K and V is brought in once for
//    all of them. Without that a cache with groups of 4 would be read 4 times;
//  * the keys are shared out in parts of kPartKeys, so that one sequence occupies every core. A part leaves its rows' maximum, sum
//    and sum of values in the workspace; the parts of a row are merged in their order when all are done;
//  * parts begin at multiples of kPartKeys and cover only the keys that the lengths and the band leave: ragged batches are balanced
//    by the keys that live. A row's result depends on its own keys only, not on the rest of the batch, nor on the threads.
//
// Bytes: (D + Dv) of the cache's type for each key and key head. The workspace adds (Dv + 2) floats a row and part, written and read:
// below 1 % of a float32 cache for 4 rows. Work on a tile of 64 keys, float, D = 64, AVX-512, 4 rows, from L2: 0.5 us to transpose K,
// 0.6 us for the products, 0.3 us for the softmax, 1.5 us for 32 KB (1 us with one row); the rows of K and V are asked for one
// phase ahead of their use, so that the memory works meanwhile. 20 GB/s, what one core can read, would bring a tile in the same
// time. From 16-bit caches half the bytes take as much work: there a core is bound by computing.
#pragma once

#include "bias.h"
#include "forward_rows.h"
#include "schedule.h"
#include "tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int64_t kPartKeys = 8 * kTileN;

static bool is_decoding(const AttentionForwardParams& p) { return p.len_q > 0 && p.len_q <= kMaxDecodeQueries; }

constexpr int kStepKeys = 16;  // keys of a tile that are brought in at a time

// A unit is one batch entry, one key head and up to kTileM rows of its query heads.
struct DecodePlan {
  int64_t heads;         // query heads of a unit; the last of a group may have fewer
  int64_t chunks;        // units of a group
  int64_t units_a_batch, units;
  int64_t rows;          // of a unit, at most
  int64_t parts;         // of a unit, at most
};

static DecodePlan make_decode_plan(const AttentionForwardParams& p) {
  DecodePlan plan;
  const int64_t group = p.heads_kv ? p.heads_q / p.heads_kv : 0;
  plan.chunks = max64(1, ceil_div(group, max64(1, kTileM / p.len_q)));
  plan.heads = ceil_div(group, plan.chunks);
  plan.units_a_batch = plan.heads ? p.heads_kv * plan.chunks : 0;
  plan.units = p.batch * plan.units_a_batch;
  plan.rows = plan.heads * p.len_q;
  plan.parts = max64(1, ceil_div(p.len_k, kPartKeys));
  return plan;
}

// The parts of the units of batch entry b: keys [(first + n) kPartKeys, (first + n + 1) kPartKeys), cut to the live ones. At least one,
// which writes the result of rows without keys.
struct Parts {
  int64_t first, count;
  KeyInterval live;
};

static Parts parts_of(const AttentionForwardParams& p, int64_t b) {
  const KeyInterval live = key_range(p.mask, b, 0, p.len_q, p.len_k);
  if (live.first >= live.last) return {0, 1, {0, 0}};
  const int64_t first = live.first / kPartKeys;
  return {first, ceil_div(live.last, kPartKeys) - first, live};
}

// What a part knows about its rows.
template <typename T>
struct DecodeRows {
  T *out, *row_max, *row_sum;  // [rows][ld_v], [rows], [rows]
};

template <typename T>
struct DecodeScratch {
  int64_t ld_k, ld_v;
  T *query, *scores, *rescale, *key_t, *value, *bias, *staging;
  DecodeRows<T> rows;
};

template <typename T>
static DecodeRows<T> carve_rows(Arena& arena, int64_t rows, int64_t ld_v) {
  DecodeRows<T> r;
  r.out = arena.take<T>(rows * ld_v);
  r.row_max = arena.take<T>(rows);
  r.row_sum = arena.take<T>(rows);
  return r;
}

template <typename T>
static DecodeScratch<T> carve_decode(Arena& arena, const AttentionForwardParams& p, const DecodePlan& plan) {
  constexpr int W = kWidth<T>;
  DecodeScratch<T> s;
  s.ld_k = round_up(static_cast<int>(p.dim_qk), W);
  s.ld_v = round_up(static_cast<int>(p.dim_v), W);
  s.query = arena.take<T>(plan.rows * s.ld_k);
  s.scores = arena.take<T>(plan.rows * kTileN);
  s.rescale = arena.take<T>(plan.rows);
  s.key_t = arena.take<T>(p.dim_qk * kTileN);
  s.value = arena.take<T>(kTileN * s.ld_v);
  s.bias = arena.take<T>(p.bias ? plan.rows * kTileN : 0);
  s.staging = arena.take<T>(W * s.ld_k);
  s.rows = carve_rows<T>(arena, plan.rows, s.ld_v);
  return s;
}

// Asks for rows of a cache that are needed soon: the products and the softmax of a tile take about as long as its way from memory.
FASTATTN_INLINE void prefetch_rows(const TensorRef& x, int64_t offset, int64_t rows, int64_t dim) {
  const int64_t bytes = dim * element_size(x.dtype);
  for (int64_t r = 0; r < rows; ++r) {
    const char* const row = static_cast<const char*>(element(x.ptr, x.dtype, offset + r * x.stride[2]));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// One part of one unit: leaves the state of the rows in `state`.
template <typename T>
static void decode_part(const AttentionForwardParams& p, const DecodeScratch<T>& s, const ScoreScale<T>& to, int64_t b, int64_t h_kv,
                        int64_t first_head, int64_t heads, KeyInterval keys_of_part, const DecodeRows<T>& state) {
  const int len_q = static_cast<int>(p.len_q), rows = static_cast<int>(heads) * len_q;
  const int dim_qk = static_cast<int>(p.dim_qk), dim_v = static_cast<int>(p.dim_v);
  const auto row_of = [&](int r) {
    return element(p.query.ptr, p.query.dtype,
                   b * p.query.stride[0] + (first_head + r / len_q) * p.query.stride[1] + r % len_q * p.query.stride[2]);
  };
  load_few_rows(s.query, s.ld_k, row_of, p.query.dtype, rows, dim_qk, to.sign);
  for (int r = 0; r < rows; ++r) {
    state.row_max[r] = -kInfinity<T>;
    state.row_sum[r] = T(0);
  }

  const bool one_mask = !p.mask.bits || p.mask.stride_bits_h == 0;
  // An element of V is used once for each block of rows: far rows are worth a copy only when there are several blocks.
  const bool value_in_place = rows_in_place<T>(p.value.dtype, rows <= block_rows(4) ? dim_v : p.value.stride[2], dim_v);
  bool started = false;
  TileMask mask;
  uint64_t allowed[kTileM];
  for (int64_t j0 = keys_of_part.first / kTileN * kTileN; j0 < keys_of_part.last; j0 += kTileN) {
    const int tile_keys = static_cast<int>(min64(kTileN, p.len_k - j0));
    uint64_t columns = 0;
    for (int g = 0; g < heads; ++g) {
      if (g == 0 || !one_mask) make_tile_mask(mask, p.mask, b, first_head + g, 0, len_q, j0, tile_keys);
      columns |= mask.columns;
      for (int i = 0; i < len_q; ++i)
        allowed[g * len_q + i] = mask.tile_class == TileClass::kPartial ? mask.rows[i] : mask.columns;
    }
    if (!columns) continue;
    // Keys [begin, end) of the tile; those outside are dead for every row.
    const int begin = first_bit(columns), end = end_bit(columns), keys = end - begin;
    const int64_t j = j0 + begin;
    const int64_t key_at = b * p.key.stride[0] + h_kv * p.key.stride[1] + j * p.key.stride[2];
    const int64_t value_at = b * p.value.stride[0] + h_kv * p.value.stride[1] + j * p.value.stride[2];
    for (int n = 0; n < keys; n += kStepKeys) {
      const int count = keys - n < kStepKeys ? keys - n : kStepKeys;
      prefetch_rows(p.value, value_at + n * p.value.stride[2], count, dim_v);
      transpose_rows<T>(s.key_t + n, kTileN, element(p.key.ptr, p.key.dtype, key_at + n * p.key.stride[2]), p.key.dtype,
                        p.key.stride[2], count, dim_qk, T(1), s.staging);
    }
    gemm<Layout::kRows>(rows, keys, dim_qk, s.query, s.ld_k, s.key_t, kTileN, s.scores, kTileN, false);
    for (int g = 0; g < heads; ++g) {
      const int64_t h = first_head + g;
      Rows<T> bias{nullptr, 0};
      if (p.bias) bias = bias_rows(p.bias, b, h, 0, len_q, j, keys, s.bias + g * len_q * kTileN);
      for (int i = 0; i < len_q; ++i) {
        const int r = g * len_q + i;
        uint64_t kept = ~uint64_t{0};
        if (p.dropout.p > 0) kept = dropout_word(p.dropout.seed, dropout_threshold(p.dropout.p), b, h, i, j0) >> begin;
        softmax_row(s.scores + r * kTileN, keys, state.row_max + r, state.row_sum + r, s.rescale + r, to.scale, to.to_log2,
                    bias.ptr ? bias.ptr + i * bias.ld : nullptr, allowed[r] >> begin, kept);
      }
    }

    if (started) rescale_rows(state.out, s.ld_v, rows, s.rescale);
    const uint64_t holes = ~columns >> begin & bits_before(keys, 0);
    for (int n = 0; n < keys; n += kStepKeys) {
      const int count = keys - n < kStepKeys ? keys - n : kStepKeys;
      if (j0 + kTileN + n + count <= keys_of_part.last)
        prefetch_rows(p.key, key_at + (kTileN - begin + n) * p.key.stride[2], count, dim_qk);
      const void* const value = element(p.value.ptr, p.value.dtype, value_at + n * p.value.stride[2]);
      const bool in_place = value_in_place && !holes;
      if (!in_place) convert_rows(s.value, s.ld_v, value, p.value.dtype, p.value.stride[2], count, dim_v, holes >> n);
      gemm<Layout::kRows>(rows, dim_v, count, s.scores + n, kTileN, in_place ? static_cast<const T*>(value) : s.value,
                          in_place ? p.value.stride[2] : s.ld_v, state.out, s.ld_v, started || n > 0);
    }
    started = true;
  }
  if (!started) std::memset(state.out, 0, rows * s.ld_v * sizeof(T));
}

// The parts of one row in their order, as the online softmax would have met them.
template <typename T>
static void merge_row(const DecodeRows<T>* parts, int64_t count, int64_t row, int64_t ld_v, T to_log2, T* out, T* row_max,
                      T* row_sum) {
  T top = -kInfinity<T>, total = T(0);
  for (int64_t n = 0; n < count; ++n) top = parts[n].row_max[row] > top ? parts[n].row_max[row] : top;
  const T shift = softmax_shift(top);
  for (int64_t d = 0; d < ld_v; d += kWidth<T>) store(out + d, zero<T>());
  for (int64_t n = 0; n < count; ++n) {
    const Vec<T> factor = exp2(broadcast((parts[n].row_max[row] - shift) * to_log2));
    total += parts[n].row_sum[row] * factor[0];
    const T* const from = parts[n].out + row * ld_v;
    for (int64_t d = 0; d < ld_v; d += kWidth<T>) store(out + d, fma(load(from + d), factor, load<T>(out + d)));
  }
  *row_max = top;
  *row_sum = total;
}

// The workspace: where each batch entry's parts begin, the states of all parts, the threads' scratch.
template <typename T>
struct DecodeWorkspace {
  int64_t* first_part;     // [batch + 1], in the list of all parts
  DecodeRows<T>* states;   // [units][plan.parts]; the first is null when no unit can have several parts
  int64_t shared_bytes, thread_bytes;

  DecodeWorkspace(void* base, const AttentionForwardParams& p, const DecodePlan& plan) {
    Arena shared(base), thread(nullptr);
    const int64_t ld_v = carve_decode<T>(thread, p, plan).ld_v;
    const int64_t slots = plan.parts > 1 ? plan.units * plan.parts : 0;
    first_part = shared.take<int64_t>(p.batch + 1);
    states = shared.take<DecodeRows<T>>(slots);
    for (int64_t n = 0; n < slots; ++n) {
      const DecodeRows<T> state = carve_rows<T>(shared, plan.rows, ld_v);
      if (base) states[n] = state;
    }
    shared_bytes = shared.used;
    thread_bytes = thread.used;
  }
};

template <typename T>
static int64_t decode_workspace_bytes(const AttentionForwardParams& p) {
  const DecodeWorkspace<T> space(nullptr, p, make_decode_plan(p));
  return kAlignment + space.shared_bytes + useful_threads(p, 1.0) * space.thread_bytes;
}

template <typename T>
static void decode(const AttentionForwardParams& p) {
  const DecodePlan plan = make_decode_plan(p);
  if (plan.units == 0) return;
  char* const base = static_cast<char*>(align_pointer(p.workspace));
  const DecodeWorkspace<T> space(base, p, plan);
  int64_t* const first_part = space.first_part;
  first_part[0] = 0;
  for (int64_t b = 0; b < p.batch; ++b) first_part[b + 1] = first_part[b] + plan.units_a_batch * parts_of(p, b).count;
  const int64_t items = first_part[p.batch];
  const ScoreScale<T> to(p);
  const int64_t group = p.heads_q / p.heads_kv;

  [[maybe_unused]] const int threads = static_cast<int>(min64(items, effective_threads(useful_threads(p, 1.0))));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena own(base + space.shared_bytes + thread_number() * space.thread_bytes);
    const DecodeScratch<T> s = carve_decode<T>(own, p, plan);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < items; ++n) {
      int64_t b = 0;
      for (int64_t end = p.batch; end - b > 1;) {
        const int64_t middle = b + (end - b) / 2;
        if (first_part[middle] <= n) b = middle;
        else end = middle;
      }
      const Parts parts = parts_of(p, b);
      const int64_t unit = (n - first_part[b]) / parts.count, part = (n - first_part[b]) % parts.count;
      const int64_t h_kv = unit / plan.chunks, first_in_group = unit % plan.chunks * plan.heads;
      const int64_t heads = min64(plan.heads, group - first_in_group), first_head = h_kv * group + first_in_group;
      const int64_t j0 = (parts.first + part) * kPartKeys;
      const KeyInterval keys{max64(j0, parts.live.first), min64(j0 + kPartKeys, parts.live.last)};
      const DecodeRows<T>& state =
          parts.count == 1 ? s.rows : space.states[(b * plan.units_a_batch + unit) * plan.parts + part];
      decode_part(p, s, to, b, h_kv, first_head, heads, keys, state);
      if (parts.count > 1) continue;
      for (int64_t r = 0; r < heads * p.len_q; ++r)
        store_results(p, to, b, first_head + r / p.len_q, r % p.len_q, 1, state.out + r * s.ld_v, s.ld_v, state.row_max + r,
                      state.row_sum + r);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < plan.units; ++n) {
      const int64_t b = n / plan.units_a_batch, unit = n % plan.units_a_batch;
      const int64_t count = parts_of(p, b).count;
      if (count == 1) continue;
      const int64_t h_kv = unit / plan.chunks, first_in_group = unit % plan.chunks * plan.heads;
      const int64_t heads = min64(plan.heads, group - first_in_group), first_head = h_kv * group + first_in_group;
      for (int64_t r = 0; r < heads * p.len_q; ++r) {
        T top, total;
        merge_row(space.states + n * plan.parts, count, r, s.ld_v, to.to_log2, s.rows.out, &top, &total);
        store_results(p, to, b, first_head + r / p.len_q, r % p.len_q, 1, s.rows.out, s.ld_v, &top, &total);
      }
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
