// The attention backward of float32 problems in full precision: FMA on 64 x 64 tiles, 256 threads, 4 x 4 sums a thread.
//
// Two products. `multiply_transposed`: X Y^T of two times 64 rows, which pass through shared memory in chunks of 32
// columns; a thread has rows y + 16 r and columns x + 16 c, and reads 8 vectors of four floats for 64 FMA, without bank
// conflicts. `multiply`: W Y with W [64, 64] in shared memory and Y in chunks of 64 columns; a thread has rows y + 16 r
// and four neighbouring columns of each chunk. Registers: dQ, or dK and dV, take HEAD_DIM / 4 each, S and dP 16 each.
// At head dim 256 dK and dV are two launches. Shared memory: chunks 18 KiB, P and dS 17 KiB each, mask words 0.5 KiB:
// 53 KiB.
//
// scale S is rounded before lse is subtracted: where one key takes all of a row, P is exactly 1, however large the
// scores are.
#include "attention_backward.h"
#include "attention_backward_dbias.h"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;
constexpr int kColumns = 32, kStride = kColumns + 4;          // of a chunk in multiply_transposed
constexpr int kWideColumns = 64, kWideStride = kWideColumns + 4;  // in multiply, and of P and dS

struct Shared {
  float* chunk;     // X and Y [64][kStride] each, or Y [64][kWideStride]
  float *p, *ds;    // [64][kWideStride]
  uint64_t* words;  // [64] mask words of the queries, and `any`
};

constexpr int kChunkFloats = 2 * kTile * kStride > kTile * kWideStride ? 2 * kTile * kStride : kTile * kWideStride;
constexpr int kSharedBytes = (kChunkFloats + 2 * kTile * kWideStride) * 4 + (kTile + 1) * 8;
static_assert(kChunkFloats * 4 >= kBiasSumBytes && kChunkFloats % 4 == 0, "the bias gradient ends in the chunks");

FASTATTN_DEVICE Shared carve(unsigned char* shared) {
  Shared s;
  s.chunk = reinterpret_cast<float*>(shared);
  s.p = s.chunk + kChunkFloats;
  s.ds = s.p + kTile * kWideStride;
  s.words = reinterpret_cast<uint64_t*>(s.ds + kTile * kWideStride);
  return s;
}

// to [64][STRIDE] = columns column0 .. + COLUMNS - 1 of 64 rows of x from row0; zero beyond the ends, and where `live`
// says no.
template <int COLUMNS, int STRIDE, typename Live>
FASTATTN_DEVICE void load_chunk(float* to, const Plane<float>& x, int row0, int column0, int thread, const Live& live) {
  constexpr int kLanes = COLUMNS / 4;
#pragma unroll
  for (int n = 0; n < kTile * kLanes; n += kThreads) {
    const int r = (n + thread) / kLanes, c = (n + thread) % kLanes * 4, column = column0 + c;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row0 + r < x.rows && column < x.columns && live(r)) {
      const float* const from = x.ptr + (row0 + r) * x.row_stride + column;
      if (x.vectors && column + 4 <= x.columns) {
        v = *reinterpret_cast<const float4*>(from);
      } else {
        v.x = from[0];
        if (column + 1 < x.columns) v.y = from[1];
        if (column + 2 < x.columns) v.z = from[2];
        if (column + 3 < x.columns) v.w = from[3];
      }
    }
    *reinterpret_cast<float4*>(to + r * STRIDE + c) = v;
  }
}

struct EveryRow {
  FASTATTN_DEVICE_MEMBER bool operator()(int) const { return true; }
};

// c[r][q] = row row_x + y + 16 r of X times row row_y + x + 16 q of Y, summed over the columns in order.
FASTATTN_DEVICE void multiply_transposed(float (&c)[4][4], float* chunk, const Plane<float>& x, int row_x, const Plane<float>& y,
                                         int row_y, int thread) {
  float *const at_x = chunk, *const at_y = chunk + kTile * kStride;
#pragma unroll
  for (int r = 0; r < 4; ++r) c[r][0] = c[r][1] = c[r][2] = c[r][3] = 0.0f;
  for (int column = 0; column < x.columns; column += kColumns) {
    __syncthreads();
    load_chunk<kColumns, kStride>(at_x, x, row_x, column, thread, EveryRow{});
    load_chunk<kColumns, kStride>(at_y, y, row_y, column, thread, EveryRow{});
    __syncthreads();
#pragma unroll 1
    for (int d = 0; d < kColumns; d += 4) {
      float4 u[4], v[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        u[r] = *reinterpret_cast<const float4*>(at_x + (thread / 16 + r * 16) * kStride + d);
        v[r] = *reinterpret_cast<const float4*>(at_y + (thread % 16 + r * 16) * kStride + d);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          c[r][q] = __fmaf_rn(u[r].x, v[q].x, c[r][q]);
          c[r][q] = __fmaf_rn(u[r].y, v[q].y, c[r][q]);
          c[r][q] = __fmaf_rn(u[r].z, v[q].z, c[r][q]);
          c[r][q] = __fmaf_rn(u[r].w, v[q].w, c[r][q]);
        }
    }
  }
}

// c[n][r] += row y + 16 r of `weights` [64][kWideStride] times Y, columns 64 n + 4 x .. + 3, of the rows of Y that are
// live. The weights have been written by everybody before the first barrier in here.
template <int N, typename Live>
FASTATTN_DEVICE void multiply(float (&c)[N][4][4], const float* weights, float* chunk, const Plane<float>& y, int row_y, int thread,
                              const Live& live) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (n * kWideColumns >= y.columns) break;
    __syncthreads();
    load_chunk<kWideColumns, kWideStride>(chunk, y, row_y, n * kWideColumns, thread, live);
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < kTile; k += 4) {
      float4 w[4], v[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        w[r] = *reinterpret_cast<const float4*>(weights + (thread / 16 + r * 16) * kWideStride + k);
        v[r] = *reinterpret_cast<const float4*>(chunk + (k + r) * kWideStride + thread % 16 * 4);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float factor[4] = {w[r].x, w[r].y, w[r].z, w[r].w};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          c[n][r][0] = __fmaf_rn(factor[m], v[m].x, c[n][r][0]);
          c[n][r][1] = __fmaf_rn(factor[m], v[m].y, c[n][r][1]);
          c[n][r][2] = __fmaf_rn(factor[m], v[m].z, c[n][r][2]);
          c[n][r][3] = __fmaf_rn(factor[m], v[m].w, c[n][r][3]);
        }
      }
    }
  }
}

template <int N>
FASTATTN_DEVICE void store(const Plane<float>& to, int row0, const float (&c)[N][4][4], float factor, int thread) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = row0 + thread / 16 + r * 16, column = n * kWideColumns + thread % 16 * 4;
      if (row >= to.rows) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (column + e < to.columns) to.ptr[row * to.row_stride + column + e] = c[n][r][e] * factor;
    }
}

// lse and delta of a row. A row without keys has lse +inf here, hence P = 0; so has a row that does not exist.
struct RowState {
  float lse, delta;
};

FASTATTN_DEVICE RowState row_state(const BackwardArguments& a, int64_t b, int64_t h, int64_t i) {
  if (i >= a.p.len_q) return {INFINITY, 0.0f};
  const int64_t at = (b * a.p.heads_q + h) * a.p.len_q + i;
  const float lse = static_cast<const float*>(a.p.lse.ptr)[at];
  return {lse == -INFINITY ? INFINITY : lse, a.delta[at]};
}

// One pair: from S and dP to P after dropout (without its factor) and dS.
template <bool GENERAL>
FASTATTN_DEVICE void pair_gradient(float& s, float& dp, const ScoreTerms& terms, const RowState& row, int64_t i, int64_t j, bool allowed) {
  const float scale = static_cast<float>(terms.p.scale);
  const float x = GENERAL && terms.has_bias ? __fmaf_rn(s, scale, terms.bias(i, j)) : __fmul_rn(s, scale);
  const float probability = exp2f((x - row.lse) * static_cast<float>(kLog2E));
  float gradient = dp, dropped = probability;
  if (GENERAL && terms.has_dropout) {
    const PhiloxBlock block = philox4x32(terms.seed, static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(i),
                                         static_cast<uint32_t>(terms.h), static_cast<uint32_t>(terms.b));
    const uint32_t low = j & 1 ? block.word[1] : block.word[0], high = j & 1 ? block.word[3] : block.word[2];
    const bool kept = (j & 2 ? high : low) >= terms.threshold;
    gradient = kept ? gradient * terms.kept_scale : 0.0f;
    dropped = kept ? probability : 0.0f;
  }
  s = allowed ? dropped : 0.0f;
  dp = allowed ? probability * (gradient - row.delta) : 0.0f;
}

// ---- dQ: a block owns 64 query rows ----

template <int HEAD_DIM, bool GENERAL>
FASTATTN_KERNEL(kThreads, 1) attention_backward_dq_float32_kernel(const FASTATTN_GRID_CONSTANT BackwardArguments a) {
  FASTATTN_SHARED(shared);
  const Shared s = carve(shared);
  const AttentionBackwardParams& p = a.p;
  const int thread = threadIdx.x, y = thread / 16, x = thread % 16;
  const unsigned tiles = static_cast<unsigned>((p.len_q + kTile - 1) / kTile), heads = static_cast<unsigned>(p.heads_q);
  const int b = blockIdx.x / tiles / heads, h = blockIdx.x / tiles % heads, h_kv = h / (heads / static_cast<unsigned>(p.heads_kv));
  const int i0 = (tiles - 1 - blockIdx.x % tiles) * kTile;
  const Plane<float> query = plane_of<float>(p.query, b, h, p.len_q, p.dim_qk), key = plane_of<float>(p.key, b, h_kv, p.len_k, p.dim_qk);
  const Plane<float> grad_out = plane_of<float>(p.grad_out, b, h, p.len_q, p.dim_v);
  const Plane<float> value = plane_of<float>(p.value, b, h_kv, p.len_k, p.dim_v);
  const ScoreTerms terms(p, b, h);
  RowState rows[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) rows[r] = row_state(a, b, h, i0 + y + r * 16);
  float grad_query[HEAD_DIM / 64][4][4] = {};

  const auto step = [&](auto masked, int j0) {
    constexpr bool kMasked = decltype(masked)::value;
    uint64_t* const any = s.words + kTile;
    if constexpr (kMasked) {
      __syncthreads();  // the words of the tile before have been read
      stage_mask_words<kTile, 64, kThreads>(s.words, any, p.mask, a.summary, b, h, i0, j0, p.len_k, thread);
    }
    float scores[4][4], gradients[4][4];
    multiply_transposed(scores, s.chunk, query, i0, key, j0, thread);
    multiply_transposed(gradients, s.chunk, grad_out, i0, value, j0, thread);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const bool allowed = !kMasked || (s.words[y + r * 16] >> (x + q * 16) & 1);
        pair_gradient<GENERAL>(scores[r][q], gradients[r][q], terms, rows[r], i0 + y + r * 16, j0 + x + q * 16, allowed);
        s.ds[(y + r * 16) * kWideStride + x + q * 16] = gradients[r][q];
      }
    if constexpr (kMasked) {
      const uint64_t live = *any;
      multiply(grad_query, s.ds, s.chunk, key, j0, thread, [&](int k) { return live >> k & 1; });
    } else {
      multiply(grad_query, s.ds, s.chunk, key, j0, thread, EveryRow{});
    }
  };
  KeyTiles<kTile, kTile> cursor(p.mask, a.summary, b, h, i0, p.len_q, p.len_k);
  int tile;
  bool full;
  while (cursor.next(tile, full)) {
    if (full) step(std::false_type{}, tile * kTile);
    else step(std::true_type{}, tile * kTile);
  }
  store(plane_of<float>(p.grad_query, b, h, p.len_q, p.dim_qk), i0, grad_query, static_cast<float>(p.scale), thread);
}

// ---- dK, dV: a block owns 64 keys; rows of its tiles are keys, columns are queries ----

template <int HEAD_DIM, bool GENERAL, bool KEY, bool VALUE>
FASTATTN_KERNEL(kThreads, 1) attention_backward_dkv_float32_kernel(const FASTATTN_GRID_CONSTANT BackwardArguments a) {
  FASTATTN_SHARED(shared);
  const Shared s = carve(shared);
  const AttentionBackwardParams& p = a.p;
  const int thread = threadIdx.x, y = thread / 16, x = thread % 16;
  const unsigned tiles = static_cast<unsigned>((p.len_k + kTile - 1) / kTile), heads = static_cast<unsigned>(p.heads_kv);
  const int b = blockIdx.x / tiles / heads, h_kv = blockIdx.x / tiles % heads, j0 = blockIdx.x % tiles * kTile;
  const int group = static_cast<unsigned>(p.heads_q) / heads;
  const Plane<float> key = plane_of<float>(p.key, b, h_kv, p.len_k, p.dim_qk), value = plane_of<float>(p.value, b, h_kv, p.len_k, p.dim_v);
  float grad_key[KEY ? HEAD_DIM / 64 : 1][4][4] = {}, grad_value[VALUE ? HEAD_DIM / 64 : 1][4][4] = {};

  for (int h = h_kv * group; h < (h_kv + 1) * group; ++h) {
    const Plane<float> query = plane_of<float>(p.query, b, h, p.len_q, p.dim_qk);
    const Plane<float> grad_out = plane_of<float>(p.grad_out, b, h, p.len_q, p.dim_v);
    const ScoreTerms terms(p, b, h);
    const auto step = [&](auto masked, int i0) {
      constexpr bool kMasked = decltype(masked)::value;
      if constexpr (kMasked) {
        __syncthreads();  // the words of the tile before have been read
        stage_mask_words<kTile, 64, kThreads>(s.words, s.words + kTile, p.mask, a.summary, b, h, i0, j0, p.len_k, thread);
      }
      float scores[4][4], gradients[4][4] = {};
      multiply_transposed(scores, s.chunk, key, j0, query, i0, thread);
      if constexpr (KEY) multiply_transposed(gradients, s.chunk, value, j0, grad_out, i0, thread);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int i = i0 + x + q * 16;
        const RowState row = row_state(a, b, h, i);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const bool allowed = !kMasked || (s.words[x + q * 16] >> (y + r * 16) & 1);
          pair_gradient<GENERAL>(scores[r][q], gradients[r][q], terms, row, i, j0 + y + r * 16, allowed);
          if (VALUE) s.p[(y + r * 16) * kWideStride + x + q * 16] = scores[r][q];
          if (KEY) s.ds[(y + r * 16) * kWideStride + x + q * 16] = gradients[r][q];
        }
      }
      const auto live = [&](int row) { return !kMasked || s.words[row] != 0; };
      if constexpr (VALUE) multiply(grad_value, s.p, s.chunk, grad_out, i0, thread, live);
      if constexpr (KEY) multiply(grad_key, s.ds, s.chunk, query, i0, thread, live);
    };
    QueryTiles<kTile, kTile> cursor(p.mask, a.summary, b, h, j0, p.len_q, p.len_k);
    int tile;
    bool full;
    while (cursor.next(tile, full)) {
      if (full) step(std::false_type{}, tile * kTile);
      else step(std::true_type{}, tile * kTile);
    }
  }
  if constexpr (KEY)
    store(plane_of<float>(p.grad_key, b, h_kv, p.len_k, p.dim_qk), j0, grad_key, static_cast<float>(p.scale), thread);
  if constexpr (VALUE)
    store(plane_of<float>(p.grad_value, b, h_kv, p.len_k, p.dim_v), j0, grad_value, static_cast<float>(1.0 / (1.0 - p.dropout.p)),
          thread);
}

// ---- dbias ----

FASTATTN_KERNEL(kThreads, 1)
attention_backward_dbias_float32_kernel(const FASTATTN_GRID_CONSTANT BackwardArguments a, const FASTATTN_GRID_CONSTANT BiasPlan plan) {
  FASTATTN_SHARED(shared);
  const Shared s = carve(shared);
  const AttentionBackwardParams& p = a.p;
  const int thread = threadIdx.x, y = thread / 16, x = thread % 16;
  float sum[4][4] = {};
  BiasTerms walk(a, plan);
  BiasTerm t;
  while (walk.next(t)) {
    const int64_t h_kv = t.h / (p.heads_q / p.heads_kv);
    __syncthreads();  // the words of the term before have been read
    stage_mask_words<kTile, 64, kThreads>(s.words, s.words + kTile, p.mask, a.summary, t.b, t.h, t.i0, t.j0, p.len_k, thread);
    float scores[4][4], gradients[4][4];
    multiply_transposed(scores, s.chunk, plane_of<float>(p.query, t.b, t.h, p.len_q, p.dim_qk), t.i0,
                        plane_of<float>(p.key, t.b, h_kv, p.len_k, p.dim_qk), t.j0, thread);
    multiply_transposed(gradients, s.chunk, plane_of<float>(p.grad_out, t.b, t.h, p.len_q, p.dim_v), t.i0,
                        plane_of<float>(p.value, t.b, h_kv, p.len_k, p.dim_v), t.j0, thread);
    const ScoreTerms terms(p, static_cast<int>(t.b), static_cast<int>(t.h));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const RowState row = row_state(a, t.b, t.h, t.i0 + y + r * 16);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const bool allowed = s.words[y + r * 16] >> (x + q * 16) & 1;
        pair_gradient<true>(scores[r][q], gradients[r][q], terms, row, t.i0 + y + r * 16, t.j0 + x + q * 16, allowed);
        sum[r][q] += gradients[r][q];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int q = 0; q < 4; ++q) s.chunk[(y + r * 16) * kBiasSumStride + x + q * 16] = sum[r][q];
  __syncthreads();
  store_bias_tile<kThreads>(a, plan, s.chunk, thread);
}

template <typename Kernel>
void start(const char* name, Kernel kernel, const BackwardArguments& a, int64_t blocks) {
  if (blocks) launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kSharedBytes, a.p.stream, a);
}

template <int HEAD_DIM, bool GENERAL>
void run(const BackwardArguments& a) {
  const AttentionBackwardParams& p = a.p;
  const int64_t query_blocks = p.batch * p.heads_q * ceil_div(p.len_q, kTile);
  const int64_t key_blocks = p.batch * p.heads_kv * ceil_div(p.len_k, kTile);
  const char* const dkv = "attention_backward_dkv_float32_kernel";
  start("attention_backward_dq_float32_kernel", attention_backward_dq_float32_kernel<HEAD_DIM, GENERAL>, a, query_blocks);
  if constexpr (HEAD_DIM <= 128) {
    start(dkv, attention_backward_dkv_float32_kernel<HEAD_DIM, GENERAL, true, true>, a, key_blocks);
  } else {  // both would not fit the registers
    start(dkv, attention_backward_dkv_float32_kernel<HEAD_DIM, GENERAL, false, true>, a, key_blocks);
    start(dkv, attention_backward_dkv_float32_kernel<HEAD_DIM, GENERAL, true, false>, a, key_blocks);
  }
}

template <bool GENERAL>
void run(const BackwardArguments& a) {
  const int64_t dim = max64(a.p.dim_qk, a.p.dim_v);
  if (dim <= 64) run<64, GENERAL>(a);
  else if (dim <= 128) run<128, GENERAL>(a);
  else run<256, GENERAL>(a);
}

}  // namespace

void attention_backward_float32(const BackwardArguments& arguments, const BiasPlan& plan) {
  if (is_general(arguments.p)) run<true>(arguments);
  else run<false>(arguments);
  if (plan.own_tiles)
    launch("attention_backward_dbias_float32_kernel", attention_backward_dbias_float32_kernel,
           dim3(static_cast<unsigned>(plan.own_tiles * plan.splits)), dim3(kThreads), kSharedBytes, arguments.p.stream, arguments, plan);
}

}  // namespace fastattn::cuda
