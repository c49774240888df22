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

// gy = g + offset + slope * (y - mean) for `c` channels of one pixel, into a padded buffer.
template <bool measured, class V, class S, class T>
MNOPS_INLINE void correct(const S* g, const S* y, int64_t c, const T* offset, const T* slope, const T* mean, T* gy) {
  int64_t i = 0;
  for (; i + V::N <= c; i += V::N) {
    V v = V::load(g + i);
    if (measured) v = v + fma(V::load(y + i) - V::load(mean + i), V::load(slope + i), V::load(offset + i));
    v.store(gy + i);
  }
  if (i < c) {
    V v = V::load(g + i, int(c - i));
    if (measured) v = v + fma(V::load(y + i, int(c - i)) - V::load(mean + i), V::load(slope + i), V::load(offset + i));
    v.store(gy + i);
  }
}

// Calls f with whether all lanes are there as a compile-time constant: loops over whole vectors have no tests inside.
template <bool b> struct BoolTag { static constexpr bool value = b; };
template <class F> MNOPS_INLINE void with_bool(bool b, F f) {
  if (b) f(BoolTag<true>{}); else f(BoolTag<false>{});
}
template <bool whole, class V, class S> MNOPS_INLINE V load_lanes(const S* p, int64_t left) {
  if constexpr (whole) return V::load(p);
  return left <= 0 ? V::zero() : load_some<V>(p, left);
}
template <bool whole, class V, class S> MNOPS_INLINE void store_lanes(V v, S* p, int64_t left) {
  if constexpr (whole) v.store(p);
  else if (left > 0) store_some(v, p, left);
}

// What a vector reads as after it was stored in S.
template <class S, class V> MNOPS_INLINE V rounded(V v) {
  S stored[V::N];
  v.store(stored);
  return V::load(stored);
}

// Chain rule through a pending norm for U vectors of channels: gp = gz * act'(pre), its sums, and dx = gp * scale.
template <class V, int U> struct NormBackward {
  V mean[U], scale[U], shift[U], gp[U], gpx[U];
  template <class T> MNOPS_INLINE NormBackward(const Norm<T>& n, int64_t c) {
    for (int u = 0; u < U; u++) {
      mean[u] = V::load(n.mean + c + u * V::N), scale[u] = V::load(n.scale + c + u * V::N);
      shift[u] = V::load(n.shift + c + u * V::N), gp[u] = gpx[u] = V::zero();
    }
  }
  template <Act act, bool whole, class S> MNOPS_INLINE void pixel(const V* gz, const S* x, S* dx, int64_t lanes) {
#pragma GCC unroll 16
    for (int u = 0; u < U; u++) {
      const V xc = load_lanes<whole, V>(x + u * V::N, lanes - u * V::N) - mean[u];
      const V g = activate_grad<act>(gz[u], fma(xc, scale[u], shift[u]));
      gp[u] = gp[u] + g;
      gpx[u] = fma(g, xc, gpx[u]);
      store_lanes<whole>(g * scale[u], dx + u * V::N, lanes - u * V::N);
    }
  }
  MNOPS_INLINE void add_to(double* gp_sum, double* gpx_sum, int64_t lanes) const {
    for (int u = 0; u < U; u++) {
      accumulate(gp_sum + u * V::N, gp[u], lanes - u * V::N);
      accumulate(gpx_sum + u * V::N, gpx[u], lanes - u * V::N);
    }
  }
};

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
