// Vectors of the level's width: the compiler's vector extension, with intrinsics only where the compiler would not find the
// instruction (fused multiply-add, maximum, half precision, conversion of 16-bit types). Arithmetic, comparisons and
// `mask ? a : b` are the language's own.
//
// Everything here has internal linkage: each level has its own copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define FASTATTN_INLINE static inline __attribute__((always_inline))
// A kernel's inner loop keeps a function, and the registers, to itself.
#if defined(__clang__)
#define FASTATTN_NOINLINE static __attribute__((noinline))
#else
#define FASTATTN_NOINLINE static __attribute__((noinline, noclone))
#endif

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

template <typename T>
struct VecOf;
template <>
struct VecOf<float> {
  using type = float __attribute__((vector_size(kVectorBytes)));
  using bits = int32_t __attribute__((vector_size(kVectorBytes)));
  using words = uint32_t __attribute__((vector_size(kVectorBytes)));
  using halves = uint16_t __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct VecOf<double> {
  using type = double __attribute__((vector_size(kVectorBytes)));
  using bits = int64_t __attribute__((vector_size(kVectorBytes)));
  using words = uint64_t __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VecOf<uint32_t> {
  using type = uint32_t __attribute__((vector_size(kVectorBytes)));
  using bits = int32_t __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
using VecBits = typename VecOf<T>::bits;  // also the type of a comparison
using VecHalves = VecOf<float>::halves;   // kWidth<float> numbers of 16 bits

template <typename T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <typename T>
FASTATTN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
FASTATTN_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <typename T>
FASTATTN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
template <typename T>
FASTATTN_INLINE Vec<T> zero() {
  return Vec<T>{};
}
// A store past the caches, to an address aligned to the size of v: the line is not read first, and does not push others out.
// Other threads see it after finish_streams().
template <typename V>
FASTATTN_INLINE void stream(void* p, V v) {
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) {
    __m128i x;
    std::memcpy(&x, &v, sizeof v);
    _mm_stream_si128(static_cast<__m128i*>(p), x);
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 32) {
    __m256i x;
    std::memcpy(&x, &v, sizeof v);
    _mm256_stream_si256(static_cast<__m256i*>(p), x);
    return;
  }
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) {
    __m512i x;
    std::memcpy(&x, &v, sizeof v);
    _mm512_stream_si512(static_cast<__m512i*>(p), x);
    return;
  }
#endif
  std::memcpy(p, &v, sizeof v);
}
FASTATTN_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
template <typename To, typename From>
FASTATTN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// a * b + c, rounded once where the level has the instruction.
FASTATTN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
FASTATTN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__ARM_NEON)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// What sums of products of T are kept in, and how many products one element takes part in: a uint32_t is two bfloat16 numbers.
template <typename T>
struct SumOf {
  using type = T;
  static constexpr int terms = 1;
};
template <>
struct SumOf<uint32_t> {
  using type = float;
  static constexpr int terms = 2;
};
template <typename T>
using Sum = typename SumOf<T>::type;
template <typename T>
constexpr int kTerms = SumOf<T>::terms;

#if defined(__AVX512BF16__)
// Both products of every pair added to c. Subnormal operands and results count as zero.
FASTATTN_INLINE Vec<float> fma(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> c) {
  return _mm512_dpbf16_ps(c, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
}
#endif

// a * b rounded, and not contracted by the compiler with what is added to it: for a sum that must be exact where it cancels.
template <typename V>
FASTATTN_INLINE V product(V a, V b) {
  V x = a * b;
#if defined(__SSE2__)
  asm("" : "+v"(x));
#elif defined(__ARM_NEON)
  asm("" : "+w"(x));
#endif
  return x;
}

// Lane-wise maximum; the second operand when either is NaN (x86). On Arm a NaN stays a NaN.
FASTATTN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#elif defined(__ARM_NEON)
  return vmaxq_f32(a, b);
#else
  return a > b ? a : b;
#endif
}
FASTATTN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
  return _mm256_max_pd(a, b);
#elif defined(__SSE2__)
  return _mm_max_pd(a, b);
#elif defined(__ARM_NEON)
  return vmaxq_f64(a, b);
#else
  return a > b ? a : b;
#endif
}

// Sum of the lanes: the halves are added lane by lane, then the halves of that, down to one; a fixed order.
template <typename T, int kLanes>
FASTATTN_INLINE T sum_lanes(const T* lanes) {
  if constexpr (kLanes == 1) {
    return lanes[0];
  } else {
    typedef T Half __attribute__((vector_size(kLanes / 2 * sizeof(T))));
    Half low, high;
    std::memcpy(&low, lanes, sizeof low);
    std::memcpy(&high, lanes + kLanes / 2, sizeof high);
    low += high;
    T half[kLanes / 2];
    std::memcpy(half, &low, sizeof low);
    return sum_lanes<T, kLanes / 2>(half);
  }
}
FASTATTN_INLINE float sum(Vec<float> v) {
  float lanes[kWidth<float>];
  store(lanes, v);
  return sum_lanes<float, kWidth<float>>(lanes);
}
FASTATTN_INLINE double sum(Vec<double> v) {
  double lanes[kWidth<double>];
  store(lanes, v);
  return sum_lanes<double, kWidth<double>>(lanes);
}
// Largest lane; lanes are not NaN.
template <typename V>
FASTATTN_INLINE auto horizontal_max(V v) {
  auto largest = v[0];
  for (unsigned lane = 1; lane < sizeof(V) / sizeof(v[0]); ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

// p * 2^n, n in the low bits of t. Unsigned: where x is out of range this wraps, and the result is not used.
template <typename T, int kFractionBits>
FASTATTN_INLINE Vec<T> add_to_exponent(Vec<T> p, Vec<T> t) {
  using Words = typename VecOf<T>::words;
  return bit_cast<Vec<T>>(bit_cast<Words>(p) + (bit_cast<Words>(t) << kFractionBits));
}

// 2^x for x < 127.5. Exactly 1 at 0, exactly 0 below the normal numbers (-inf included), NaN for NaN. Subnormal results are
// flushed on purpose: some CPUs take over a hundred cycles for each product with one.
//
// Degree 5 with p(0) = 1, minimax on the interval: relative error 9e-8 before rounding, below 2e-7 after (degree 6: 8e-8,
// at 0.2 ns a vector more; degree 4: 2.9e-6).
FASTATTN_INLINE Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
  // 2^x = 2^floor(x) 2^r, r = x - floor(x) in [0, 1): one instruction each for r and for the scaling, which takes the floor itself.
  const __mmask16 normal = _mm512_cmp_ps_mask(x, broadcast(-126.0f), _CMP_NLT_UQ);
  const Vec<float> r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec<float> p = broadcast(1.86713008681e-3f);
  p = fma(p, r, broadcast(9.01703027537e-3f));
  p = fma(p, r, broadcast(5.57999131501e-2f));
  p = fma(p, r, broadcast(2.40164450136e-1f));
  p = fma(p, r, broadcast(6.93151311807e-1f));
  p = fma(p, r, broadcast(1.0f));
  return _mm512_maskz_scalef_ps(normal, p, x);
#else
  // x = n + r with n the nearest integer: adding 1.5 * 2^23 leaves n in the low bits of the sum, from where a shift moves it to
  // the exponent.
  const Vec<float> magic = broadcast(12582912.0f);
  const Vec<float> t = x + magic;
  const Vec<float> r = x - (t - magic);
  Vec<float> p = broadcast(1.32647271237e-3f);
  p = fma(p, r, broadcast(9.67151264482e-3f));
  p = fma(p, r, broadcast(5.55073374350e-2f));
  p = fma(p, r, broadcast(2.40222420853e-1f));
  p = fma(p, r, broadcast(6.93146977599e-1f));
  p = fma(p, r, broadcast(1.0f));
  p = add_to_exponent<float, 23>(p, t);
  // The bits of a NaN may have become a number by the shift; the maximum gives the NaN itself.
  return x >= broadcast(-126.0f) ? p : max(zero<float>(), x);
#endif
}
// The same in double: degree 11, relative error 4.7e-17 before rounding.
FASTATTN_INLINE Vec<double> exp2(Vec<double> x) {
  const Vec<double> magic = broadcast(6755399441055744.0);
  const Vec<double> t = x + magic;
  const Vec<double> r = x - (t - magic);
  Vec<double> p = broadcast(4.35694613178162446e-10);
  p = fma(p, r, broadcast(7.07075053830704529e-9));
  p = fma(p, r, broadcast(1.01786385799711449e-7));
  p = fma(p, r, broadcast(1.32154519450502373e-6));
  p = fma(p, r, broadcast(1.52527326451464879e-5));
  p = fma(p, r, broadcast(1.54035304260857775e-4));
  p = fma(p, r, broadcast(1.33335581474187954e-3));
  p = fma(p, r, broadcast(9.61812910761637017e-3));
  p = fma(p, r, broadcast(5.55041086648185116e-2));
  p = fma(p, r, broadcast(2.40226506959100832e-1));
  p = fma(p, r, broadcast(6.93147180559945329e-1));
  p = fma(p, r, broadcast(1.0));
  p = add_to_exponent<double, 52>(p, t);
  return x >= broadcast(-1022.0) ? p : max(zero<double>(), x);
}

// Lanes whose bit in `word` is set, bit 0 for lane 0.
template <typename T>
FASTATTN_INLINE VecBits<T> lanes_of(uint64_t word) {
  VecBits<T> bit;
  for (int lane = 0; lane < kWidth<T>; ++lane) bit[lane] = 1 << lane;
  using Lane = decltype(bit[0] + 0);
  return ((static_cast<Lane>(word) - VecBits<T>{}) & bit) != 0;
}

// Asks for a line that will be written: for the right to write it at once, which an ordinary prefetch does not ask for.
FASTATTN_INLINE void prefetch_for_write(const void* p) {
#if defined(__AVX2__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));  // no hint but a nop where a CPU lacks it
#else
  __builtin_prefetch(p, 1, 3);
#endif
}

// ---- 64-bit integers ----

using VecWide = uint64_t __attribute__((vector_size(kVectorBytes)));

// Product of the low 32 bits of each lane; the high bits are ignored.
FASTATTN_INLINE VecWide multiply_low_words(VecWide a, VecWide b) {
#if defined(__AVX512F__)
  return bit_cast<VecWide>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecWide>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<VecWide>(_mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#elif defined(__ARM_NEON)
  return bit_cast<VecWide>(vmull_u32(vmovn_u64(bit_cast<uint64x2_t>(a)), vmovn_u64(bit_cast<uint64x2_t>(b))));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// ---- 16-bit storage ----

FASTATTN_INLINE VecHalves load_halves(const uint16_t* p) {
  VecHalves v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FASTATTN_INLINE void store_halves(uint16_t* p, VecHalves v) { std::memcpy(p, &v, sizeof v); }

using VecWords = uint32_t __attribute__((vector_size(kVectorBytes)));

FASTATTN_INLINE VecWords widen(VecHalves v) { return __builtin_convertvector(v, VecWords); }
FASTATTN_INLINE VecHalves narrow(VecWords v) { return __builtin_convertvector(v, VecHalves); }
FASTATTN_INLINE VecWords words(uint32_t x) { return x - VecWords{}; }
FASTATTN_INLINE VecWords choose(VecBits<float> lanes, VecWords yes, VecWords no) {
  return (bit_cast<VecWords>(lanes) & yes) | (~bit_cast<VecWords>(lanes) & no);
}

FASTATTN_INLINE Vec<float> from_bfloat16(VecHalves v) { return bit_cast<Vec<float>>(widen(v) << 16); }

// Round to nearest even; a NaN keeps its upper bits and is made quiet, so that rounding cannot carry it into infinity.
FASTATTN_INLINE VecHalves to_bfloat16(Vec<float> x) {
  const VecWords u = bit_cast<VecWords>(x);
  const VecWords rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return narrow(choose(x == x, rounded, u | 0x400000u) >> 16);
}

FASTATTN_INLINE Vec<float> from_float16(VecHalves v) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bit_cast<__m256i>(v));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(v));
#elif defined(__ARM_NEON)
  return vcvt_f32_f16(bit_cast<float16x4_t>(v));
#else
  // The exponent is moved by a product, which also normalises subnormal numbers; infinity and NaN are put right after.
  const VecWords u = widen(v), magnitude = (u & 0x7fffu) << 13;
  const VecWords scaled = bit_cast<VecWords>(bit_cast<Vec<float>>(magnitude) * broadcast(5.192296858534828e33f));  // 2^112
  const VecBits<float> finite = bit_cast<VecBits<float>>(magnitude) < 0x0f800000;
  return bit_cast<Vec<float>>(choose(finite, scaled, magnitude | 0x7f800000u) | (u & 0x8000u) << 16);
#endif
}

// Round to nearest even; beyond 65504 infinity, as torch does.
FASTATTN_INLINE VecHalves to_float16(Vec<float> x) {
#if defined(__AVX512F__)
  return bit_cast<VecHalves>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bit_cast<VecHalves>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__ARM_NEON)
  return bit_cast<VecHalves>(vcvt_f16_f32(x));
#else
  const VecWords u = bit_cast<VecWords>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const VecBits<float> magnitude = bit_cast<VecBits<float>>(a);
  // Below 2^-14: adding 1/2 rounds at the last bit of a subnormal number, and leaves that number in the low bits.
  const VecWords tiny = bit_cast<VecWords>(bit_cast<Vec<float>>(a) + 0.5f) - 0x3f000000u;
  const VecWords normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  VecWords half = choose(magnitude < 0x38800000, tiny, normal);
  half = choose(magnitude < 0x477ff000, half, words(0x7c00u));
  half = choose(magnitude > 0x7f800000, words(0x7e00u), half);
  return narrow(half | sign);
#endif
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
