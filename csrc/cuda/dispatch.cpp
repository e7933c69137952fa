// Chooses the path of a problem: Hopper's where it runs it and has enough to do, else the portable one.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastattn::cuda {
namespace {

// Few queries are the portable forward's, which shares their keys out over blocks: on the Hopper path a head is one block.
bool suits_hopper(const AttentionForwardParams& params) { return params.len_q > kFewQueries; }
bool suits_hopper(const AttentionBackwardParams&) { return true; }

// FASTATTN_CUDA_PATH=portable|hopper forces one; asking for Hopper's where it cannot run the problem is an error.
template <typename Params>
bool use_hopper(const char* operation, const Params& params, bool (*able)(const Params&)) {
  const char* const asked = std::getenv("FASTATTN_CUDA_PATH");
  const std::string path = asked ? asked : "";
  if (path.empty()) return suits_hopper(params) && able(params);
  if (path == "portable") return false;
  if (path != "hopper") throw std::invalid_argument("FASTATTN_CUDA_PATH must be portable or hopper, got '" + path + "'");
  if (!able(params))
    throw std::runtime_error(std::string(operation) + ": FASTATTN_CUDA_PATH=hopper, and that path cannot run this problem here");
  return true;
}

}  // namespace

#if !defined(FASTATTN_HAVE_HOPPER)
// A build for other architectures leaves the Hopper sources out.
bool attention_forward_hopper_able(const AttentionForwardParams&) { return false; }
int64_t attention_forward_hopper_workspace(const AttentionForwardParams&) { return 0; }
void attention_forward_hopper(const AttentionForwardParams&) {}
bool attention_backward_hopper_able(const AttentionBackwardParams&) { return false; }
int64_t attention_backward_hopper_workspace(const AttentionBackwardParams&) { return 0; }
void attention_backward_hopper(const AttentionBackwardParams&) {}
#endif

#define FASTATTN_CHOOSE(name, Params)                                          \
  int64_t name##_workspace(const Params& params) {                             \
    return use_hopper(#name, params, name##_hopper_able)                       \
               ? name##_hopper_workspace(params)                               \
               : name##_portable_workspace(params);                            \
  }                                                                            \
  void name(const Params& params) {                                            \
    use_hopper(#name, params, name##_hopper_able) ? name##_hopper(params)      \
                                                  : name##_portable(params);   \
  }

FASTATTN_CHOOSE(attention_forward, AttentionForwardParams)
FASTATTN_CHOOSE(attention_backward, AttentionBackwardParams)

const char* toolkit() {
#if defined(FASTATTN_CUDA_TOOLKIT)
  return FASTATTN_CUDA_TOOLKIT;
#else
  return "emulated";
#endif
}

}  // namespace fastattn::cuda
