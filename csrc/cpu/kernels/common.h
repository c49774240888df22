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

MNOPS_INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// A whole vector where there is one, the first `left` lanes at the end of the channels.
template <class V, class S> MNOPS_INLINE V load_some(const S* p, int64_t left) {
  return left >= V::N ? V::load(p) : V::load(p, int(left));
}
template <class V, class S> MNOPS_INLINE void store_some(V v, S* p, int64_t left) {
  if (left >= V::N) v.store(p); else v.store(p, int(left));
}

// Chan, Golub, LeVeque 1979: merge `count` values, with sums s1 of (v - pivot) and s2 of (v - pivot)^2, into each of `channels`
// channels from c on, which have all seen as many. Only two divisions in all: a small image has few values a channel.
template <class T, class Sum>
MNOPS_INLINE void merge_moments(Moments into, int64_t c, int64_t channels, double count, const T* pivot, const Sum* s1,
                                const Sum* s2) {
  const double total = into.count[c] + count, each = 1 / count, share = count / total, weight = into.count[c] * share;
  double *const n = into.count + c, *const mu = into.mean + c, *const m2 = into.m2 + c;
  for (int64_t i = 0; i < channels; i++) {
    const double rest = double(s1[i]) * each, delta = double(pivot[i]) + rest - mu[i];
    m2[i] += double(s2[i]) - double(s1[i]) * rest + delta * delta * weight;
    mu[i] += delta * share;
    n[i] = total;
  }
}

// Adds the lanes of a vector to doubles: long sums are kept in double, short ones (a row, a block) in registers.
template <class V> MNOPS_INLINE void accumulate(double* into, V v, int64_t left) {
  if (left >= V::N) return v.add_to(into);
  typename V::T lane[V::N];
  v.store(lane);
  for (int i = 0; i < left; i++) into[i] += double(lane[i]);
}

// How a run of vectors is stored: some of the lanes, all of them, or all of them past the caches. A loop is compiled for
// each, so that there are no tests inside. Streaming saves the read of a cache line that is about to be overwritten; it
// wants whole aligned lines, and pays where the tensor does not fit the last-level cache anyway.
enum class Lanes { some, all, stream };
template <Lanes l> struct LanesTag { static constexpr Lanes value = l; };
template <class F> MNOPS_INLINE void with_lanes(bool all, F f) {
  if (all) f(LanesTag<Lanes::all>{}); else f(LanesTag<Lanes::some>{});
}
template <class V, class S, class F> MNOPS_INLINE void with_stores(bool all, bool stream, const S* to, int64_t stride, F f) {
  if constexpr (sizeof(S) == sizeof(typename V::T) && V::N * sizeof(S) >= 32) {  // whole lines, by stores in a row
    if (all && stream && reinterpret_cast<uintptr_t>(to) % 64 == 0 && stride * sizeof(S) % 64 == 0)
      return f(LanesTag<Lanes::stream>{});
  }
  with_lanes(all, f);
}
template <Lanes lanes, class V, class S> MNOPS_INLINE V load_lanes(const S* p, int64_t left) {
  if constexpr (lanes != Lanes::some) return V::load(p);
  return left <= 0 ? V::zero() : load_some<V>(p, left);
}
template <Lanes lanes, class V, class S> MNOPS_INLINE void store_lanes(V v, S* p, int64_t left) {
  if constexpr (lanes == Lanes::stream) v.stream(p);
  else if constexpr (lanes == Lanes::all) v.store(p);
  else if (left > 0) store_some(v, p, left);
}

template <int n> struct IntTag { static constexpr int value = n; };
template <bool b> struct BoolTag { static constexpr bool value = b; };
template <class F> MNOPS_INLINE void with_flag(bool b, F f) {
  if (b) f(BoolTag<true>{}); else f(BoolTag<false>{});
}

// What a vector reads as after it was stored in S.
template <class S, class V> MNOPS_INLINE V rounded(V v) {
  S stored[V::N];
  v.store(stored);
  return V::load(stored);
}

// Rows that are soon touched for the first time, fetched from memory into L2 while others are computed: a few lines at each
// step, in the order of their addresses. Many at once would fill the core's line buffers and hold it up.
template <class S> struct Ahead {
  static constexpr bool idle = false;
  static constexpr int64_t line = 64 / int64_t(sizeof(S));
  struct Row {
    const S* at;
    int64_t stride, runs, lines;  // runs of `lines` lines, `stride` apart
  } rows[4] = {};
  int64_t count = 0, total = 0, per_step = 0, row = 0, run = 0;
  const S* next = nullptr;  // of the `left` lines of this run
  int64_t left = 0;

  void add(const S* first, int64_t pixels, int64_t channels, int64_t stride) {
    const bool whole = channels == stride;
    const Row r{first, stride, whole ? 1 : pixels, ((whole ? pixels : 1) * channels + line - 1) / line};
    rows[count++] = r, total += r.runs * r.lines;
  }
  bool full() const { return count == 4; }
  void start(int64_t steps) {
    per_step = (total + steps - 1) / most(1, steps);
    next = rows[0].at, left = rows[0].lines;
  }
  MNOPS_INLINE void step() {
    for (int64_t budget = per_step; budget > 0;) {
      const int64_t n = least(budget, left);
      for (int64_t i = 0; i < n; i++, next += line) __builtin_prefetch(next, 0, 2);
      budget -= n, left -= n;
      if (left == 0) turn();
      if (per_step == 0) return;
    }
  }

 private:
  void turn() {  // to the next run
    if (++run == rows[row].runs) run = 0, row++;
    if (row == count) per_step = 0;
    else next = rows[row].at + run * rows[row].stride, left = rows[row].lines;
  }
};
struct NothingAhead {
  static constexpr bool idle = true;
  void step() {}
};
constexpr int64_t stretch = 16;  // pixels of a pass between two steps
MNOPS_INLINE int64_t stretches(int64_t pixels) { return (pixels + stretch - 1) / stretch; }

// z = act((x - mean) * scale + shift) for `c` channels of `pixels` pixels, x_stride and z_stride apart. U vectors (a cache
// line of channels) at a time, their norm in registers; z is padded to whole vectors.
template <Act act, class V, int U = V::N >= 4 ? 16 / V::N : 2, class S, class T, class Z, class Ahead = NothingAhead>
MNOPS_INLINE void normalise(const S* x, int64_t x_stride, int64_t pixels, int64_t c, const T* mean, const T* scale,
                            const T* shift, Z* z, int64_t z_stride, Ahead&& ahead = {}) {
  for (int64_t i = 0; i < c; i += U * V::N)
    with_lanes(c - i >= U * V::N, [&](auto lanes) {
      const int used = lanes.value == Lanes::all ? U : int((c - i + V::N - 1) / V::N);
      V m[U], s[U], h[U];
      for (int u = 0; u < used; u++)
        m[u] = V::load(mean + i + u * V::N), s[u] = V::load(scale + i + u * V::N), h[u] = V::load(shift + i + u * V::N);
      for (int64_t j = 0; j < pixels;) {
        ahead.step();
        for (const int64_t end = ahead.idle ? pixels : least(pixels, j + stretch); j < end; j++) {
          V v[U] = {};  // all loads before the first store: they may then be paired
#pragma GCC unroll 4
          for (int u = 0; u < (lanes.value == Lanes::all ? U : used); u++)
            v[u] = load_lanes<lanes.value, V>(x + j * x_stride + i + u * V::N, c - i - u * V::N);
#pragma GCC unroll 4
          for (int u = 0; u < (lanes.value == Lanes::all ? U : used); u++)
            activate<act>(fma(v[u] - m[u], s[u], h[u])).store(z + j * z_stride + i + u * V::N);
        }
      }
    });
}

// gy = g + offset + slope * (y - mean), likewise. Unmeasured, gy = g and y is not read.
template <bool measured, class V, int U = V::N >= 4 ? 16 / V::N : 2, class S, class T, class Z>
MNOPS_INLINE void correct(const S* g, const S* y, int64_t stride, int64_t pixels, int64_t c, const T* offset, const T* slope,
                          const T* mean, Z* gy, int64_t gy_stride) {
  for (int64_t i = 0; i < c; i += U * V::N)
    with_lanes(c - i >= U * V::N, [&](auto lanes) {
      const int used = lanes.value == Lanes::all ? U : int((c - i + V::N - 1) / V::N);
      V m[U], s[U], o[U];
      for (int u = 0; u < used; u++)
        m[u] = V::load(mean + i + u * V::N), s[u] = V::load(slope + i + u * V::N), o[u] = V::load(offset + i + u * V::N);
      for (int64_t j = 0; j < pixels; j++)
#pragma GCC unroll 2
        for (int u = 0; u < (lanes.value == Lanes::all ? U : used); u++) {
          const int64_t at = j * stride + i + u * V::N, left = c - i - u * V::N;
          V v = load_lanes<lanes.value, V>(g + at, left);
          if constexpr (measured) v = v + fma(load_lanes<lanes.value, V>(y + at, left) - m[u], s[u], o[u]);
          v.store(gy + j * gy_stride + i + u * V::N);
        }
    });
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
  template <Act act, Lanes how, class S> MNOPS_INLINE void pixel(const V* gz, const S* x, S* dx, int64_t lanes) {
#pragma GCC unroll 16
    for (int u = 0; u < U; u++) {
      const V xc = load_lanes<how, V>(x + u * V::N, lanes - u * V::N) - mean[u];
      const V g = activate_grad<act>(gz[u], fma(xc, scale[u], shift[u]));
      gp[u] = gp[u] + g;
      gpx[u] = fma(g, xc, gpx[u]);
      store_lanes<how>(g * scale[u], dx + u * V::N, lanes - u * V::N);
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
