// What the masked losses share: the loss of one difference and its slope, and the moments of a target that is normalised.
#pragma once

#include <cmath>

#include "../core/mask.h"
#include "simd.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// The loss of one difference d = input - target.

template <typename T>
struct Constants {
  T beta, inverse_beta;
  T scale;  // of the gradient
};

// Lanes of a comparison are -1 or 0. sign(NaN) = 0, as in torch.
template <typename T>
FASTATTN_INLINE Vec<T> sign(Vec<T> d) {
  return (d > zero<T>() ? broadcast(T(1)) : zero<T>()) - (d < zero<T>() ? broadcast(T(1)) : zero<T>());
}
template <typename T>
FASTATTN_INLINE Vec<T> absolute(Vec<T> d) {
  return d < zero<T>() ? -d : d;
}

template <LossKind kKind, typename T>
FASTATTN_INLINE Vec<T> value(Vec<T> d, const Constants<T>& c) {
  if constexpr (kKind == LossKind::kL2) return d * d;
  const Vec<T> size = absolute<T>(d);
  if constexpr (kKind == LossKind::kL1) return size;
  return size < c.beta ? d * d * (T(0.5) * c.inverse_beta) : size - T(0.5) * c.beta;
}

template <LossKind kKind, typename T>
FASTATTN_INLINE Vec<T> slope(Vec<T> d, const Constants<T>& c) {
  if constexpr (kKind == LossKind::kL2) return d + d;
  if constexpr (kKind == LossKind::kL1) return sign<T>(d);
  return absolute<T>(d) < c.beta ? d * c.inverse_beta : sign<T>(d);
}

template <typename T>
FASTATTN_INLINE Vec<T> load_up_to(const T* p, int64_t n) {
  if (n >= kWidth<T>) return load(p);
  Vec<T> v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}
template <typename T>
FASTATTN_INLINE void store_up_to(T* p, Vec<T> v, int64_t n) {
  if (n >= kWidth<T>) store(p, v);
  else std::memcpy(p, &v, n * sizeof(T));
}

// Sum over `rows` rows of n elements of x - high - low, or of its square.
template <typename T>
static double sum_deviations(const T* x, int64_t stride, int64_t rows, int64_t n, T high, T low, bool squares) {
  constexpr int W = kWidth<T>;
  constexpr int64_t kBlock = 16 * W;
  double total = 0;
  Vec<T> block_sum = zero<T>();
  int64_t pending = 0;
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
      const int64_t end = min64(n, k0 + kBlock);
      for (int64_t k = k0; k < end; k += W) {
        Vec<T> d = load_up_to(x + k, end - k) - high - low;
        if (end - k < W) d = lanes_of<T>(bits_before(end, k)) ? d : zero<T>();
        block_sum += squares ? d * d : d;
      }
      pending += (end - k0 + W - 1) / W * W;  // short runs take a whole addition too
      if (pending < kBlock) continue;
      total += sum(block_sum);
      block_sum = zero<T>();
      pending = 0;
    }
  }
  return total + sum(block_sum);
}

// What a patch or token is normalised by: x = (x - mean) / sqrt(variance + eps), the mean as the sum of two numbers.
template <typename T>
struct Moments {
  T high, low, factor;

  T normalized(T x) const { return (x - high - low) * factor; }
};

// Of `rows` rows of n elements. Deviations are taken from the first element, then from the mean as the sum of two numbers: a
// spread that is small beside the mean keeps its digits.
template <typename T>
static Moments<T> moments(const T* x, int64_t stride, int64_t rows, int64_t n, double eps) {
  const double start = static_cast<double>(x[0]), count = static_cast<double>(rows * n);
  const double mean = start + sum_deviations(x, stride, rows, n, x[0], T(0), false) / count;
  const T high = static_cast<T>(mean), low = static_cast<T>(mean - static_cast<double>(high));
  const double squares = sum_deviations(x, stride, rows, n, high, low, true);
  return {high, low, static_cast<T>(1.0 / std::sqrt(squares / (count - 1.0) + eps))};
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
