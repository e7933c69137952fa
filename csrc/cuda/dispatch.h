// What was built into this library.
#pragma once

namespace fastattn::cuda {

// Whether the kernels are executed on the CPU, by csrc/cuda/emulator.
#if defined(FASTATTN_EMULATE)
inline constexpr bool kEmulated = true;
#else
inline constexpr bool kEmulated = false;
#endif

// The compute capabilities, such as 90, that the portable kernels were compiled for; a GPU later than the last one compiles
// that one's PTX anew when it first loads it.
#if !defined(FASTATTN_ARCHITECTURES)
#define FASTATTN_ARCHITECTURES 80, 90, 100  // those that the emulator can be
#endif
inline constexpr int kArchitectures[] = {FASTATTN_ARCHITECTURES};

// Version of the toolkit, such as "13.0"; "emulated" without one.
const char* toolkit();

}  // namespace fastattn::cuda
