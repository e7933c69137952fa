// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the dropout rule on top of it.
#pragma once

#include <cstdint>

#include "macros.h"
#include "params.h"

namespace fastattn {

inline constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

struct PhiloxBlock {
  uint32_t word[4];
};

FASTATTN_HD static inline PhiloxBlock philox4x32(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxM0} * c0, p1 = uint64_t{kPhiloxM1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// An element is dropped iff its random word is below this. 64 bits wide: p close to 1 may round up to 2^32.
FASTATTN_HD static inline uint64_t dropout_threshold(double p) { return static_cast<uint64_t>(p * 4294967296.0); }

// Element (b, h, i, j) of the probabilities survives. h is the query head. The counter is the absolute position, so the
// choice depends neither on the tile size nor on the order of the work.
FASTATTN_HD static inline bool dropout_keeps(const DropoutParams& dropout, int64_t b, int64_t h, int64_t i, int64_t j) {
  const PhiloxBlock block = philox4x32(dropout.seed, static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(i),
                                       static_cast<uint32_t>(h), static_cast<uint32_t>(b));
  return block.word[j & 3] >= dropout_threshold(dropout.p);
}

}  // namespace fastattn
