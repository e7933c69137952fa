// The little that the C++ tests need: checks that count failures and go on, and a generator with a fixed sequence.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>

namespace fastattn::test {

inline int failures = 0;

inline bool report(bool ok, const char* file, int line, const char* what) {
  if (!ok && ++failures <= 20) std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
  return ok;
}

// For main's return value.
inline int result(const char* name) {
  std::printf("%s: %s\n", name, failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}

// splitmix64: the same numbers on every platform.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  // In [low, high], both ends included.
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  bool chance(double p) { return uniform() < p; }
  // Roughly normal, variance 1.
  double normal() {
    double sum = -6.0;
    for (int n = 0; n < 12; ++n) sum += uniform();
    return sum;
  }

 private:
  uint64_t state_;
};

}  // namespace fastattn::test

#define CHECK(condition) ::fastattn::test::report((condition), __FILE__, __LINE__, #condition)
