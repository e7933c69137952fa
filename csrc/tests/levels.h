// Runs a test at every instruction level that this CPU has.
#pragma once

#include <cstdlib>
#include <string>

#include "../cpu/dispatch.h"
#include "check.h"

namespace fastattn::test {

// For main. Without arguments the program runs itself once per level, since a process keeps the level it starts with.
inline int run_every_level(int argc, char** argv, const char* name, void (*tests)()) {
  if (argc > 1) {
    tests();
    return result(cpu::level_name());
  }
  const char* names[cpu::kMaxLevels];
  const int levels = cpu::supported_levels(names);
  for (int n = 0; n < levels; ++n) {
    const std::string command = std::string("FASTATTN_CPU_LEVEL=") + names[n] + " '" + argv[0] + "' run";
    CHECK(std::system(command.c_str()) == 0);
  }
  CHECK(levels > 0);
  return result(name);
}

}  // namespace fastattn::test
