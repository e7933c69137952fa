// Entry points of the CPU kernels. Each kernel source is compiled once per instruction level into the namespace of that
// level; dispatch.cpp offers the same names in fastattn::cpu and picks the level at run time.
#pragma once

#include "../core/params.h"

// The level this translation unit is compiled for, by the flags it got.
#ifndef FASTATTN_ISA
#if defined(__AVX512BF16__)
#define FASTATTN_ISA avx512bf16
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FASTATTN_ISA avx512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FASTATTN_ISA avx2
#elif defined(__aarch64__)
#define FASTATTN_ISA neon
#else
#define FASTATTN_ISA baseline
#endif
#endif

#define FASTATTN_DECLARE_CPU_KERNELS                                                         \
  int64_t attention_forward_workspace(const AttentionForwardParams&);                        \
  void attention_forward(const AttentionForwardParams&);                                     \
  int64_t attention_backward_workspace(const AttentionBackwardParams&);                      \
  void attention_backward(const AttentionBackwardParams&);                                   \
  int64_t attention_weights_workspace(const AttentionWeightsParams&);                        \
  void attention_weights(const AttentionWeightsParams&);                                     \
  int64_t attention_weights_backward_workspace(const AttentionWeightsBackwardParams&);       \
  void attention_weights_backward(const AttentionWeightsBackwardParams&);                    \
  void mask_tiles(const MaskTilesParams&);                                                   \
  int64_t masked_loss_workspace(const MaskedLossParams&);                                    \
  void masked_loss(const MaskedLossParams&);                                                 \
  int64_t additive_attention_forward_workspace(const AdditiveAttentionForwardParams&);       \
  void additive_attention_forward(const AdditiveAttentionForwardParams&);                    \
  int64_t additive_attention_backward_workspace(const AdditiveAttentionBackwardParams&);     \
  void additive_attention_backward(const AdditiveAttentionBackwardParams&);                  \
  int64_t linear_masked_loss_workspace(const LinearMaskedLossParams&);                       \
  void linear_masked_loss(const LinearMaskedLossParams&);

namespace fastattn::cpu {

// The CPU tile: query rows x keys. 48 rows split evenly by every register block in use; 64 keys are one mask word.
inline constexpr int kTileM = 48;
inline constexpr int kTileN = 64;

// Up to so many queries the forward takes the way of decoding.
inline constexpr int64_t kMaxDecodeQueries = 8;

FASTATTN_DECLARE_CPU_KERNELS

// Threads a kernel may start: the number asked for, or 1 in a forked child, where OpenMP's threads are gone.
int effective_threads(int requested);

namespace baseline {
FASTATTN_DECLARE_CPU_KERNELS
}
namespace avx2 {
FASTATTN_DECLARE_CPU_KERNELS
}
namespace avx512 {
FASTATTN_DECLARE_CPU_KERNELS
}
// Kernels of its own for attention and the linear head of bfloat16 alone; all else is avx512's.
namespace avx512bf16 {
FASTATTN_DECLARE_CPU_KERNELS
}
namespace neon {
FASTATTN_DECLARE_CPU_KERNELS
}

}  // namespace fastattn::cpu

#undef FASTATTN_DECLARE_CPU_KERNELS
