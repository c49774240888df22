// Makes a pending tensor real: z = act((x - mean) * scale + shift), one read and one write, two reads where a residual
// is added; and its backward, two reads and a write with the channel sums on the side. Parallel over pixels.
#pragma once
#include "cpu/kernels/common.h"

namespace mnops {
namespace {

template <int n> struct Count { static constexpr int value = n; };

// R rows at a time, so that the norm of a vector of channels is loaded once for all of them.
template <Act act, bool added, int R, class V, class S, class T>
MNOPS_INLINE void norm_act_rows(const Rows<T>& p, const S* x, const S* residual, S* z) {
  constexpr int U = 2;  // neighbouring vectors: their loads and stores may be paired
  for (int64_t c = 0; c < p.c; c += U * V::N)
    with_lanes(p.c - c >= U * V::N, [&](auto how) {
      V mean[U], scale[U], shift[U];
#pragma GCC unroll 2
      for (int u = 0; u < U; u++) {
        const int64_t at = c + u * V::N;
        mean[u] = V::load(p.norm.mean + at), scale[u] = V::load(p.norm.scale + at), shift[u] = V::load(p.norm.shift + at);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        V v[U], beside[U];
#pragma GCC unroll 2
        for (int u = 0; u < U; u++) {
          const int64_t at = r * p.c + c + u * V::N, left = p.c - c - u * V::N;
          v[u] = load_lanes<how.value, V>(x + at, left);
          if constexpr (added) beside[u] = load_lanes<how.value, V>(residual + at, left);
        }
#pragma GCC unroll 2
        for (int u = 0; u < U; u++) {
          V out = activate<act>(fma(v[u] - mean[u], scale[u], shift[u]));
          if constexpr (added) out = out + beside[u];
          store_lanes<how.value>(out, z + r * p.c + c + u * V::N, p.c - c - u * V::N);
        }
      }
    });
}

template <class S, class T = typename Arithmetic<S>::type>
void norm_act_forward(const Rows<T>& p, int64_t begin, int64_t end) {
  using V = typename Vec<T>::type;
  const S *x = static_cast<const S*>(p.x), *residual = static_cast<const S*>(p.residual);
  S* z = static_cast<S*>(p.out);
  with_act(p.norm.act, [&](auto act) {
    with_flag(residual != nullptr, [&](auto added) {
      auto rows = [&](auto count, int64_t r) {
        const S* beside = added.value ? residual + r * p.c : nullptr;
        norm_act_rows<act.value, added.value, count.value, V>(p, x + r * p.c, beside, z + r * p.c);
      };
      int64_t r = begin;
      for (; r + 4 <= end; r += 4) rows(Count<4>{}, r);
      for (; r < end; r++) rows(Count<1>{}, r);
    });
  });
}

// Chain rule of one vector of channels down `rows` pixels that share nothing but the norm. gz(r) gives the gradient.
template <Act act, class V, class S, class T, class F>
MNOPS_INLINE void norm_backward_column(const Rows<T>& p, int64_t begin, int64_t end, int64_t c, NormSums sums, F gz) {
  NormBackward<V, 1> norm(p.norm, c);
  with_lanes(p.c - c >= V::N, [&](auto how) {
    for (int64_t r = begin; r < end; r++) {
      const V g = gz(r);
      norm.template pixel<act, how.value>(&g, static_cast<const S*>(p.x) + r * p.c + c, static_cast<S*>(p.out) + r * p.c + c, p.c - c);
    }
  });
  norm.add_to(sums.gp + c, sums.gpx + c, p.c - c);
}

constexpr int64_t rows_at_once = 16;  // fp32 sums stay in registers for this long, then go to double

template <class S, class T = typename Arithmetic<S>::type>
void norm_act_backward(const Rows<T>& p, int64_t begin, int64_t end, NormSums sums) {
  using V = typename Vec<T>::type;
  const S* g = static_cast<const S*>(p.g);
  with_act(p.norm.act, [&](auto act) {
    for (int64_t r = begin; r < end; r += rows_at_once)
      for (int64_t c = 0; c < p.c; c += V::N)
        norm_backward_column<act.value, V, S>(p, r, least(end, r + rows_at_once), c, sums,
                                              [&](int64_t i) { return load_some<V>(g + i * p.c + c, p.c - c); });
  });
}

// ---------------------------------------------------------------- and its average over an image, [n][hw][c] -> [n][c]

template <class S, class T = typename Arithmetic<S>::type>
void norm_act_pool_forward(const Rows<T>& p, int64_t begin, int64_t end) {
  using V = typename Vec<T>::type;
  with_act(p.norm.act, [&](auto act) {
    for (int64_t n = begin; n < end; n++)
      for (int64_t c = 0; c < p.c; c += V::N) {
        const int64_t lanes = least(V::N, p.c - c);
        const V mean = V::load(p.norm.mean + c), scale = V::load(p.norm.scale + c), shift = V::load(p.norm.shift + c);
        double total[V::N] = {};
        for (int64_t r0 = 0; r0 < p.hw; r0 += rows_at_once) {
          V sum = V::zero();
          for (int64_t r = r0; r < least(p.hw, r0 + rows_at_once); r++)
            sum = sum + activate<act.value>(
                            fma(load_some<V>(static_cast<const S*>(p.x) + (n * p.hw + r) * p.c + c, lanes) - mean, scale, shift));
          accumulate(total, sum, lanes);
        }
        T pooled[V::N];
        for (int i = 0; i < V::N; i++) pooled[i] = T(total[i] / double(p.hw));
        store_some(V::load(pooled), static_cast<S*>(p.out) + n * p.c + c, lanes);
      }
  });
}

template <class S, class T = typename Arithmetic<S>::type>
void norm_act_pool_backward(const Rows<T>& p, int64_t begin, int64_t end, NormSums sums) {
  using V = typename Vec<T>::type;
  with_act(p.norm.act, [&](auto act) {
    for (int64_t n = begin; n < end; n++)
      for (int64_t r = n * p.hw; r < (n + 1) * p.hw; r += rows_at_once)
        for (int64_t c = 0; c < p.c; c += V::N) {
          const V g = load_some<V>(static_cast<const S*>(p.g) + n * p.c + c, p.c - c) * V::set1(T(1) / T(p.hw));
          norm_backward_column<act.value, V, S>(p, r, least((n + 1) * p.hw, r + rows_at_once), c, sums,
                                                [&](int64_t) { return g; });
        }
  });
}

}  // namespace
}  // namespace mnops
