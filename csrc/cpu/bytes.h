// Elements of a bool tensor as bits.
#pragma once

#include "../core/mask.h"
#include "simd.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Bit k: p[k] != 0, for 64 bytes that lie side by side.
FASTATTN_INLINE uint64_t pack_bytes(const uint8_t* p) {
#if defined(__AVX512BW__)
  const __m512i v = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(v, v);
#elif defined(__AVX2__)
  uint64_t word = 0;
  for (int part = 0; part < 2; ++part) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + part);
    const __m256i is_zero = _mm256_cmpeq_epi8(v, _mm256_setzero_si256());
    word |= uint64_t{~static_cast<uint32_t>(_mm256_movemask_epi8(is_zero))} << (32 * part);
  }
  return word;
#elif defined(__SSE2__)
  uint64_t word = 0;
  for (int part = 0; part < 4; ++part) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + part);
    const __m128i is_zero = _mm_cmpeq_epi8(v, _mm_setzero_si128());
    word |= uint64_t{static_cast<uint16_t>(~_mm_movemask_epi8(is_zero))} << (16 * part);
  }
  return word;
#else
  uint64_t word = 0;
  for (int part = 0; part < 8; ++part) {
    uint64_t x;
    std::memcpy(&x, p + 8 * part, 8);
    // The top bit of each byte: the byte is not 0. The product then brings the eight bits together in the top byte.
    x = ((((x & 0x7f7f7f7f7f7f7f7full) + 0x7f7f7f7f7f7f7f7full) | x) >> 7) & 0x0101010101010101ull;
    word |= ((x * 0x0102040810204080ull) >> 56) << (8 * part);
  }
  return word;
#endif
}

// Bit k: p[k * stride] != 0, for k < count; 0 beyond. count <= 64.
FASTATTN_INLINE uint64_t bool_word(const uint8_t* p, int64_t stride, int64_t count) {
  if (stride == 1 && count == 64) return pack_bytes(p);
  uint64_t word = 0;
  for (int64_t k = 0; k < count; ++k) word |= uint64_t{p[k * stride] != 0} << k;
  return word;
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
