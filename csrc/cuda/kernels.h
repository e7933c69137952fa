// Entry points of the CUDA kernels: the names and the parameter structs of csrc/cpu/kernels.h. The sources are compiled by
// nvcc for a GPU, and by the C++ compiler against csrc/cuda/emulator for tests without one. Every pointer is a device
// pointer, and the work is queued on params.stream of the current device. A failed launch throws LaunchError (platform.h).
#pragma once

#include "../core/params.h"

namespace fastattn::cuda {

// The tile of the dense mask's map: query rows x keys. 64 keys are one mask word.
inline constexpr int kTileM = 64;
inline constexpr int kTileN = 64;

// The largest head dim, of keys and of values.
inline constexpr int kMaxHeadDim = 256;

// Up to so many queries are few (decoding): the portable forward shares their keys out over warps and blocks.
inline constexpr int kFewQueries = 16;

// What callers use (dispatch.cpp): one of the two paths below, for each problem.
int64_t attention_forward_workspace(const AttentionForwardParams&);
void attention_forward(const AttentionForwardParams&);
int64_t attention_backward_workspace(const AttentionBackwardParams&);
void attention_backward(const AttentionBackwardParams&);

// The portable path: sm_80 and later, every dtype but float64.
int64_t attention_forward_portable_workspace(const AttentionForwardParams&);
void attention_forward_portable(const AttentionForwardParams&);
int64_t attention_backward_portable_workspace(const AttentionBackwardParams&);
void attention_backward_portable(const AttentionBackwardParams&);

// The Hopper path: TMA and wgmma, sm_90 alone. `able` tells whether it runs the problem on the current device: by its
// capability, the dtype, the head dims, the strides and the features.
bool attention_forward_hopper_able(const AttentionForwardParams&);
int64_t attention_forward_hopper_workspace(const AttentionForwardParams&);
void attention_forward_hopper(const AttentionForwardParams&);
bool attention_backward_hopper_able(const AttentionBackwardParams&);
int64_t attention_backward_hopper_workspace(const AttentionBackwardParams&);
void attention_backward_hopper(const AttentionBackwardParams&);

// Operations of one path.
int64_t attention_weights_workspace(const AttentionWeightsParams&);
void attention_weights(const AttentionWeightsParams&);
int64_t attention_weights_backward_workspace(const AttentionWeightsBackwardParams&);
void attention_weights_backward(const AttentionWeightsBackwardParams&);
void mask_tiles(const MaskTilesParams&);
int64_t masked_loss_workspace(const MaskedLossParams&);
void masked_loss(const MaskedLossParams&);

}  // namespace fastattn::cuda
