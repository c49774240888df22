// What every kernel shares: activations and their derivatives, passes over rows of channels, merging of statistics.
// Included once per instruction set, after that set's vector type; everything here has internal linkage, so no
// code compiled for one instruction set can be linked into another.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/params.h"

namespace mnops {
namespace {

#define MNOPS_INLINE inline __attribute__((always_inline))

MNOPS_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
MNOPS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MNOPS_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Every vector of channels (norms, weights, sums) is padded to this many, so that kernels load whole vectors.
constexpr int64_t channel_quantum = 16;

template <Act act, class V> MNOPS_INLINE V activate(V p) {
  if constexpr (act == Act::relu) return max(V::zero(), p);
  if constexpr (act == Act::relu6) return min(V::set1(6), max(V::zero(), p));
  if constexpr (act == Act::hardswish)
    return p * (min(V::set1(6), max(V::zero(), p + V::set1(3))) * V::set1(typename V::T(1) / 6));
  if constexpr (act == Act::silu) return p / (V::set1(1) + exp(V::zero() - p));
  return p;
}

// gz * act'(p), with torch's choice at the kinks.
template <Act act, class V> MNOPS_INLINE V activate_grad(V gz, V p) {
  const V zero = V::zero();
  if constexpr (act == Act::relu) return where_gt(p, zero, gz, zero);
  if constexpr (act == Act::relu6) return where_gt(p, zero, where_gt(V::set1(6), p, gz, zero), zero);
  if constexpr (act == Act::hardswish) {
    V slope = fma(p, V::set1(typename V::T(1) / 3), V::set1(0.5));
    slope = where_gt(p, V::set1(3), V::set1(1), slope);
    return gz * where_gt(V::set1(-3), p, zero, slope);
  }
  if constexpr (act == Act::silu) {
    V s = V::set1(1) / (V::set1(1) + exp(zero - p));
    return gz * (s * fma(p, V::set1(1) - s, V::set1(1)));
  }
  return gz;
}

// Calls f with the activation as a compile-time constant.
template <Act a> struct ActTag { static constexpr Act value = a; };
template <class F> MNOPS_INLINE void with_act(Act act, F f) {
  switch (act) {
    case Act::none: return f(ActTag<Act::none>{});
    case Act::relu: return f(ActTag<Act::relu>{});
    case Act::relu6: return f(ActTag<Act::relu6>{});
    case Act::hardswish: return f(ActTag<Act::hardswish>{});
    case Act::silu: return f(ActTag<Act::silu>{});
  }
}

MNOPS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// A whole vector where there is one, the first `left` lanes at the end of the channels.
template <class V, class S> MNOPS_INLINE V load_some(const S* p, int64_t left) {
  return left >= V::N ? V::load(p) : V::load(p, int(left));
}
template <class V, class S> MNOPS_INLINE void store_some(V v, S* p, int64_t left) {
  if (left >= V::N) v.store(p); else v.store(p, int(left));
}

// z = act((x - mean) * scale + shift) for `c` channels of one pixel, into a padded buffer.
template <Act act, class V, class S, class T>
MNOPS_INLINE void normalise(const S* x, int64_t c, const T* mean, const T* scale, const T* shift, T* z) {
  int64_t i = 0;
  for (; i + V::N <= c; i += V::N)
    activate<act>(fma(V::load(x + i) - V::load(mean + i), V::load(scale + i), V::load(shift + i))).store(z + i);
  if (i < c)
    activate<act>(fma(V::load(x + i, int(c - i)) - V::load(mean + i), V::load(scale + i), V::load(shift + i))).store(z + i);
}

// gy = g + offset + slope * (y - mean) for `c` channels of one pixel, into a padded buffer. y may be null.
template <class V, class S, class T>
MNOPS_INLINE void correct(const S* g, const S* y, int64_t c, const T* offset, const T* slope, const T* mean, T* gy) {
  for (int64_t i = 0; i < c; i += V::N) {
    V v = load_some<V>(g + i, c - i);
    if (y) v = v + fma(load_some<V>(y + i, c - i) - V::load(mean + i), V::load(slope + i), V::load(offset + i));
    v.store(gy + i);
  }
}

// Chan, Golub, LeVeque 1979: merge `count` values with sums s1 of (v - pivot), s2 of (v - pivot)^2 into one channel.
MNOPS_INLINE void merge_moments(Moments into, int64_t c, double count, double pivot, double s1, double s2) {
  const double mean = pivot + s1 / count, m2 = s2 - s1 * (s1 / count);
  const double total = into.count[c] + count, delta = mean - into.mean[c];
  into.m2[c] += m2 + delta * delta * (into.count[c] * count / total);
  into.mean[c] += delta * (count / total);
  into.count[c] = total;
}

// Adds the lanes of a vector to doubles: long sums are kept in double, short ones (a row, a block) in registers.
template <class V> MNOPS_INLINE void accumulate(double* into, V v, int64_t left) {
  typename V::T lane[V::N];
  v.store(lane);
  for (int i = 0; i < V::N && i < left; i++) into[i] += double(lane[i]);
}

// A bump allocator over a thread's scratch memory, cache-line aligned. With base null it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  template <class E> E* take(int64_t count) {
    E* p = base ? reinterpret_cast<E*>(base + used) : nullptr;
    used += (size_t(count) * sizeof(E) + 63) / 64 * 64;
    return p;
  }
};

}  // namespace
}  // namespace mnops
