// Chooses the instruction level at run time and forwards every kernel to it. Compiled without any instruction flag: this is
// what runs before the CPU is known.
#include "dispatch.h"

#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastattn::cpu {
namespace {

struct Kernels {
  const char* name;
  bool (*supported)();
  int64_t (*attention_forward_workspace)(const AttentionForwardParams&);
  void (*attention_forward)(const AttentionForwardParams&);
  int64_t (*attention_backward_workspace)(const AttentionBackwardParams&);
  void (*attention_backward)(const AttentionBackwardParams&);
  int64_t (*attention_weights_workspace)(const AttentionWeightsParams&);
  void (*attention_weights)(const AttentionWeightsParams&);
  int64_t (*attention_weights_backward_workspace)(const AttentionWeightsBackwardParams&);
  void (*attention_weights_backward)(const AttentionWeightsBackwardParams&);
  void (*mask_tiles)(const MaskTilesParams&);
  int64_t (*masked_loss_workspace)(const MaskedLossParams&);
  void (*masked_loss)(const MaskedLossParams&);
  int64_t (*additive_attention_forward_workspace)(const AdditiveAttentionForwardParams&);
  void (*additive_attention_forward)(const AdditiveAttentionForwardParams&);
  int64_t (*additive_attention_backward_workspace)(const AdditiveAttentionBackwardParams&);
  void (*additive_attention_backward)(const AdditiveAttentionBackwardParams&);
  int64_t (*linear_masked_loss_workspace)(const LinearMaskedLossParams&);
  void (*linear_masked_loss)(const LinearMaskedLossParams&);
};

// The kernels of a level; attention itself and the linear head may come from another one.
#define FASTATTN_LEVEL(level, pairs)                                                                             \
  {#pairs, supports_##pairs, pairs::attention_forward_workspace, pairs::attention_forward,                       \
   pairs::attention_backward_workspace, pairs::attention_backward, level::attention_weights_workspace,           \
   level::attention_weights, level::attention_weights_backward_workspace, level::attention_weights_backward,     \
   level::mask_tiles, level::masked_loss_workspace, level::masked_loss,                                          \
   level::additive_attention_forward_workspace, level::additive_attention_forward,                               \
   level::additive_attention_backward_workspace, level::additive_attention_backward,                             \
   pairs::linear_masked_loss_workspace, pairs::linear_masked_loss}

[[maybe_unused]] bool supports_baseline() { return true; }
[[maybe_unused]] bool supports_neon() { return true; }  // part of the AArch64 ABI
#if defined(__x86_64__)
// These ask the operating system too: registers that it does not save do not count.
[[maybe_unused]] bool supports_avx2() {
  // Every CPU with AVX2 has F16C, whose name clang does not accept here.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
[[maybe_unused]] bool supports_avx512() {
  return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#if defined(FASTATTN_HAVE_AVX512BF16)
bool supports_avx512bf16() { return supports_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

// From the narrowest to the widest.
constexpr Kernels kLevels[] = {
#if defined(FASTATTN_HAVE_BASELINE)
    FASTATTN_LEVEL(baseline, baseline),
#endif
#if defined(FASTATTN_HAVE_AVX2)
    FASTATTN_LEVEL(avx2, avx2),
#endif
#if defined(FASTATTN_HAVE_AVX512)
    FASTATTN_LEVEL(avx512, avx512),
#endif
#if defined(FASTATTN_HAVE_AVX512BF16)
    FASTATTN_LEVEL(avx512, avx512bf16),
#endif
#if defined(FASTATTN_HAVE_NEON)
    FASTATTN_LEVEL(neon, neon),
#endif
};
static_assert(sizeof kLevels / sizeof kLevels[0] <= kMaxLevels, "kMaxLevels is the longest list of levels");

const Kernels* choose() {
  const char* const asked = std::getenv("FASTATTN_CPU_LEVEL");
  const Kernels* chosen = nullptr;
  for (const Kernels& level : kLevels)
    if (level.supported() && (!asked || !*asked || !std::strcmp(asked, level.name))) chosen = &level;
  return chosen;
}

const Kernels* chosen() {
  static const Kernels* const level = choose();
  return level;
}

// OpenMP's threads do not survive fork: a parallel region in the child would wait for them for ever.
bool forked = false;
[[maybe_unused]] const int watches_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int supported_levels(const char* names[kMaxLevels]) {
  int count = 0;
  for (const Kernels& level : kLevels)
    if (level.supported()) names[count++] = level.name;
  return count;
}

const char* level_name() { return chosen() ? chosen()->name : nullptr; }

void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + page - 1) / page * page, last = (start + static_cast<uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

int effective_threads(int requested) { return forked || requested < 1 ? 1 : requested; }

#define FASTATTN_FORWARD(result, name, Params) \
  result name(const Params& params) { return chosen()->name(params); }

FASTATTN_FORWARD(int64_t, attention_forward_workspace, AttentionForwardParams)
FASTATTN_FORWARD(void, attention_forward, AttentionForwardParams)
FASTATTN_FORWARD(int64_t, attention_backward_workspace, AttentionBackwardParams)
FASTATTN_FORWARD(void, attention_backward, AttentionBackwardParams)
FASTATTN_FORWARD(int64_t, attention_weights_workspace, AttentionWeightsParams)
FASTATTN_FORWARD(void, attention_weights, AttentionWeightsParams)
FASTATTN_FORWARD(int64_t, attention_weights_backward_workspace, AttentionWeightsBackwardParams)
FASTATTN_FORWARD(void, attention_weights_backward, AttentionWeightsBackwardParams)
FASTATTN_FORWARD(void, mask_tiles, MaskTilesParams)
FASTATTN_FORWARD(int64_t, masked_loss_workspace, MaskedLossParams)
FASTATTN_FORWARD(void, masked_loss, MaskedLossParams)
FASTATTN_FORWARD(int64_t, additive_attention_forward_workspace, AdditiveAttentionForwardParams)
FASTATTN_FORWARD(void, additive_attention_forward, AdditiveAttentionForwardParams)
FASTATTN_FORWARD(int64_t, additive_attention_backward_workspace, AdditiveAttentionBackwardParams)
FASTATTN_FORWARD(void, additive_attention_backward, AdditiveAttentionBackwardParams)
FASTATTN_FORWARD(int64_t, linear_masked_loss_workspace, LinearMaskedLossParams)
FASTATTN_FORWARD(void, linear_masked_loss, LinearMaskedLossParams)

}  // namespace fastattn::cpu
