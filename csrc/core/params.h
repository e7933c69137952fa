// The launch contract: one struct per operation, shared by the CPU and the CUDA kernels. Plain pointers, sizes and
// strides; nothing here knows Python or torch. Strides count elements, not bytes. The caller allocates every output
// and the workspace.
#pragma once

#include <cstdint>
#include <limits>

namespace fastattn {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// A band limit that excludes nothing.
inline constexpr int64_t kUnlimited = int64_t{1} << 62;

// A tensor of up to four dimensions read or written in place. A broadcast dimension has stride 0.
struct TensorRef {
  void* ptr = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  DType dtype = DType::kFloat32;

  explicit operator bool() const { return ptr != nullptr; }
};

// Which keys each query may attend to: the AND of every part that is present.
struct MaskParams {
  // Band on j - i: band_low <= j - i <= band_high. The alignment is already folded in.
  int64_t band_low = -kUnlimited;
  int64_t band_high = kUnlimited;
  // j <= i or j < prefix_lengths[b]
  const int64_t* prefix_lengths = nullptr;
  int64_t stride_prefix_b = 0;
  // j < key_lengths[b]
  const int64_t* key_lengths = nullptr;
  int64_t stride_key_lengths_b = 0;
  // key_keep[b, j] != 0
  const uint8_t* key_keep = nullptr;
  int64_t stride_keep_b = 0, stride_keep_j = 0;
  // query_segments[b, i] == key_segments[b, j]
  const int64_t* query_segments = nullptr;
  const int64_t* key_segments = nullptr;
  int64_t stride_qseg_b = 0, stride_qseg_i = 0, stride_kseg_b = 0, stride_kseg_j = 0;
  // Dense part, packed by mask_tiles: bit (j & 63) of word [b, h, i, j >> 6], row length words_per_row; bits at or
  // beyond S are 0. `live` and `full` are bitmaps over tiles of block_m x block_n: bit (kt & 63) of word
  // [b, h, qt, kt >> 6] tells that the tile has any / has only attending pairs. Broadcast b, h have stride 0.
  const uint64_t* bits = nullptr;
  int64_t stride_bits_b = 0, stride_bits_h = 0, words_per_row = 0;
  const uint64_t* live = nullptr;
  const uint64_t* full = nullptr;
  int64_t stride_map_b = 0, stride_map_h = 0, map_words_per_row = 0;
  // The transposed bitmaps: bit (qt & 63) of word [b, h, kt, qt >> 6].
  const uint64_t* live_t = nullptr;
  const uint64_t* full_t = nullptr;
  int64_t stride_map_t_b = 0, stride_map_t_h = 0, map_t_words_per_row = 0;
  int64_t block_m = 0, block_n = 0;
};

struct DropoutParams {
  double p = 0.0;      // probability that an element is dropped; 0 switches dropout off
  uint64_t seed = 0;   // Philox key
  const uint64_t* seed_ptr = nullptr;  // CUDA: the key in device memory, read there instead of `seed`
};

// The problem that forward, backward and weights share.
struct AttentionParams {
  int64_t batch = 0, heads_q = 0, heads_kv = 0, len_q = 0, len_k = 0, dim_qk = 0, dim_v = 0;
  double scale = 1.0;
  TensorRef query, key, value;   // [B, Hq, L, D], [B, Hkv, S, D], [B, Hkv, S, Dv]; last stride 1
  TensorRef bias;                // [B, Hq, L, S] by strides, any of them 0; null when there is none
  MaskParams mask;
  DropoutParams dropout;
  TensorRef lse;                 // [B, Hq, L] contiguous; float64 for float64 problems, else float32
  int num_threads = 1;           // CPU
  void* stream = nullptr;        // CUDA: the cudaStream_t to launch on
  void* workspace = nullptr;     // as many bytes as the operation's *_workspace function asks for
  int64_t workspace_bytes = 0;
};

struct AttentionForwardParams : AttentionParams {
  TensorRef out;                 // [B, Hq, L, Dv]; last stride 1
};

struct AttentionBackwardParams : AttentionParams {
  TensorRef out, grad_out;       // [B, Hq, L, Dv]; last stride 1
  TensorRef grad_lse;            // [B, Hq, L] by strides, dtype of lse; null when there is none
  TensorRef grad_query, grad_key, grad_value;  // shapes of query, key, value; last stride 1
  // Shape of the bias itself: stride 0 in every dimension that the bias broadcasts. Contiguous in its own shape and of
  // the accumulation dtype (float64 for float64 problems, else float32). Null when no bias gradient is wanted.
  TensorRef grad_bias;
};

struct AttentionWeightsParams : AttentionParams {
  TensorRef weights;             // [B, L, S] when average_heads (stride[1] = 0 stands for the head), else [B, Hq, L, S]
  bool average_heads = true;
};

struct AttentionWeightsBackwardParams : AttentionParams {
  TensorRef grad_weights;        // as weights above, any strides
  bool average_heads = true;
  TensorRef grad_query, grad_key;  // shapes of query, key; last stride 1
  TensorRef grad_lse;            // [B, Hq, L] contiguous, dtype of lse
  TensorRef grad_bias;           // as in AttentionBackwardParams
};

// Packs the AND of several bool masks and marks its tiles.
struct MaskTilesParams {
  static constexpr int kMaxMasks = 8;
  int num_masks = 0;
  const uint8_t* mask[kMaxMasks] = {};
  int64_t mask_stride[kMaxMasks][4] = {};  // [B, H, L, S], 0 where broadcast
  int64_t batch = 0, heads = 0, len_q = 0, len_k = 0;  // of the outputs, after broadcasting the masks together
  int64_t block_m = 0, block_n = 0;        // block_n is a multiple of 64
  uint64_t *bits = nullptr, *live = nullptr, *full = nullptr, *live_t = nullptr, *full_t = nullptr;  // contiguous
  int num_threads = 1;           // CPU
  void* stream = nullptr;        // CUDA: the cudaStream_t to launch on
};

enum class LossKind : int32_t { kL2 = 0, kL1 = 1, kSmoothL1 = 2 };
enum class Reduction : int32_t { kMaskedMean = 0, kSum = 1, kMean = 2, kNone = 3 };

// Masked reconstruction loss over a problem folded to 4 dimensions. Two layouts:
//   patch_size > 0: input [B, C, H, W], mask [B, H/p, W/p];
//   patch_size = 0: input folded to [n0, n1, n2, n3], mask the same by strides (0 where it broadcasts).
struct MaskedLossParams {
  LossKind kind = LossKind::kL2;
  Reduction reduction = Reduction::kMaskedMean;
  double beta = 1.0;             // smooth l1
  int64_t size[4] = {1, 1, 1, 1};
  int64_t patch_size = 0;
  TensorRef input, target;       // any strides
  const uint8_t* mask = nullptr;
  int64_t mask_stride[4] = {0, 0, 0, 0};   // patch layout uses the first three
  bool normalize_target = false;           // per patch (images, over C*p*p) or per token (last dimension); unbiased variance
  double normalize_eps = 1e-6;
  // "none": [size] elementwise loss, zero where not counted; otherwise one element. Accumulation dtype for the scalar.
  TensorRef loss;
  TensorRef grad_input;          // null when not wanted; d loss / d input for an upstream gradient of 1 (all elements written)
  TensorRef grad_loss;           // "none" only: upstream gradient by strides; null means 1
  int num_threads = 1;           // CPU
  void* stream = nullptr;        // CUDA: the cudaStream_t to launch on
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// Additive attention: out_i = sum_j softmax_j(w . tanh(q_i + k_j)) v_j. The mask has one head, number 0.
struct AdditiveAttentionParams {
  int64_t batch = 0, len_q = 0, len_k = 0, features = 0, dim_v = 0;
  TensorRef query, key, value;   // [B, L, A], [B, S, A], [B, S, Dv]; last stride 1
  TensorRef score_weight;        // [A] contiguous, of any dtype
  MaskParams mask;
  TensorRef lse;                 // [B, L] contiguous; float64 for float64 problems, else float32
  int num_threads = 1;           // CPU
  void* stream = nullptr;        // CUDA: the cudaStream_t to launch on
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

struct AdditiveAttentionForwardParams : AdditiveAttentionParams {
  TensorRef out;                 // [B, L, Dv]; last stride 1
};

struct AdditiveAttentionBackwardParams : AdditiveAttentionParams {
  TensorRef out, grad_out;       // [B, L, Dv]; last stride 1
  TensorRef grad_lse;            // [B, L] by strides, dtype of lse; null when there is none
  TensorRef grad_query, grad_key, grad_value;  // shapes of query, key, value; last stride 1
  TensorRef grad_score_weight;   // [A] contiguous, of the dtype of score_weight
};

// Masked reconstruction loss of a linear prediction: input = hidden weight^T + bias, at the counted tokens alone. Two layouts of
// the target, feature f of token (b, n):
//   patch_size = 0: target [B, N, P], mask [B, 1, N];
//   patch_size > 0: target [B, C, H, W] with P = C p p, feature (c, y, x) in this order is pixel (y, x) of channel c of the patch;
//                   mask [B, H/p, W/p], whose cells in row order are the tokens.
struct LinearMaskedLossParams {
  LossKind kind = LossKind::kL2;
  Reduction reduction = Reduction::kMaskedMean;  // not kNone
  double beta = 1.0;             // smooth l1
  int64_t batch = 0, grid_height = 1, grid_width = 0, dim_in = 0, dim_out = 0;  // N = grid_height * grid_width, E, P
  int64_t patch_size = 0;
  TensorRef hidden;              // [B, N, E]; last stride 1
  TensorRef weight, bias;        // [P, E], [P]; last stride 1, dtype of hidden; bias null when there is none
  TensorRef target;              // any strides
  const uint8_t* mask = nullptr;
  int64_t mask_stride[3] = {0, 0, 0};
  bool normalize_target = false;           // per token, over its P features; unbiased variance
  double normalize_eps = 1e-6;
  TensorRef loss;                // one element of the accumulation dtype
  // Each null when not wanted; for an upstream gradient of 1, all elements written. Those of weight and bias are contiguous and of
  // the accumulation dtype (float64 for float64 problems, else float32); last stride 1 in that of hidden.
  TensorRef grad_hidden, grad_weight, grad_bias, grad_target;
  int num_threads = 1;           // CPU
  void* stream = nullptr;        // CUDA: the cudaStream_t to launch on
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

}  // namespace fastattn
