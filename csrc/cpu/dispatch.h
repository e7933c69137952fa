// The instruction levels of this build, and the one in use.
#pragma once

#include <cstdint>

namespace fastattn::cpu {

inline constexpr int kMaxLevels = 4;

// Names of the levels of this build that this CPU can run, widest last; returns how many.
int supported_levels(const char* names[kMaxLevels]);

// Name of the level in use: FASTATTN_CPU_LEVEL of the environment, else the widest supported one; chosen at the first call.
// nullptr when FASTATTN_CPU_LEVEL names something else.
const char* level_name();

// Asks the system to back memory that is about to be written with huge pages, where it leaves the choice to the program (Linux): one
// page fault for 2 MB instead of 512. A hint; whatever lies there stays.
void advise_huge_pages(void* memory, int64_t bytes);

}  // namespace fastattn::cpu
