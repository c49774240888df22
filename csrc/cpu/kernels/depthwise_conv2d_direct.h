// Depthwise forward for instruction sets with 32 registers: a tile's outputs go from registers to y, and their statistics
// are summed there too (on 16 registers the weights and the tile leave no room, and whole lines are better streamed).
//
// As depthwise_conv2d.h, except that a line is [group of channel_quantum channels][column][channel_quantum]: neighbouring
// pixels of a channel vector lie a constant apart, so that every tap of a tile is addressed by an immediate.
#pragma once
#include "cpu/kernels/depthwise_conv2d.h"

namespace mnops {
namespace {

template <class T> struct DirectScratch {
  Ring<T> z;
  T* pivot;
  double *s1, *s2;      // sums of (y - pivot) and its square over the item
  int64_t group;        // elements of one group of a line
  static DirectScratch make(Arena& a, const Depthwise<T>& p) {
    const int64_t channels = round_up(p.block, channel_quantum);
    const int64_t columns = most(p.w + p.pad_left, (p.wo - 1) * p.sw + (p.kw - 1) * p.dw + 1);
    DirectScratch s;
    s.group = columns * channel_quantum;
    s.z = Ring<T>::make(a, (p.kh - 1) * p.dh + 1 + (Tile::ty - 1) * p.sh, columns * channels, p.h);
    s.pivot = a.take<T>(channels);
    s.s1 = a.take<double>(channels);
    s.s2 = a.take<double>(channels);
    return s;
  }
};

// A finished vector of y: stored in y's dtype, and what was stored is summed.
template <class V, class S, Lanes how, bool measure> struct Finish {
  int64_t lanes;
  V pivot, s1, s2;
  MNOPS_INLINE void operator()(V v, S* y) {
    store_lanes<how>(v, y, lanes);
    if constexpr (measure) {
      if constexpr (sizeof(S) < sizeof(typename V::T)) v = rounded<S>(v);
      const V d = v - pivot;
      s1 = s1 + d;
      s2 = fma(d, d, s2);
    }
  }
};

// TY x TX neighbouring outputs of one channel vector: every loaded input serves all taps of all of them.
// Loads per FMA in the stride-1 interior, K 3: 4 * 9 / (9 * 14) = 0.29 for 2 x 7, 3 * 9 / (9 * 7) = 0.43 for 1 x 7.
template <class V, int K, int S, int TY, int TX, class T, class E, class Out>
MNOPS_INLINE void direct_tile(const T* const* row, const V* w, E* const* y, int64_t stride, Out* out) {
  V acc[TY * TX];
#pragma GCC unroll 16
  for (int line = 0; line < (TY - 1) * S + K; line++) {
#pragma GCC unroll 32
    for (int col = 0; col < (TX - 1) * S + K; col++) {
      const V z = V::load(row[line] + col * channel_quantum);
#pragma GCC unroll 4
      for (int i = 0; i < TY; i++)
#pragma GCC unroll 8
        for (int t = 0; t < TX; t++) {
          const int ky = line - i * S, kx = col - t * S;
          if (ky < 0 || ky >= K || kx < 0 || kx >= K) continue;
          V& a = acc[i * TX + t];
          a = ky == 0 && kx == 0 ? z * w[0] : fma(z, w[ky * K + kx], a);
        }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < TY; i++)
#pragma GCC unroll 8
    for (int t = 0; t < TX; t++) out[i](acc[i * TX + t], y[i] + t * stride);
}

// A row of tiles; what is left of it is done by halves.
template <class V, int K, int S, int TY, int TX, class T, class E, class Out>
MNOPS_INLINE void direct_rows(const T** row, const V* w, E** y, int64_t stride, int64_t left, Out* out) {
  for (; left >= TX; left -= TX) {
    direct_tile<V, K, S, TY, TX>(row, w, y, stride, out);
    for (int k = 0; k < (TY - 1) * S + K; k++) row[k] += TX * S * channel_quantum;
    for (int i = 0; i < TY; i++) y[i] += TX * stride;
  }
  if constexpr (TX > 1)
    if (left > 0) direct_rows<V, K, S, TY, TX / 2>(row, w, y, stride, left, out);
}

template <class V, int K, int SW, int TY, bool measure, class S, class T>
void direct_convolve(const Depthwise<T>& p, const Item& it, const DirectScratch<T>& s, const T* const* row, S* y) {
  const int64_t cp = round_up(p.c, channel_quantum), stride = p.c, width = p.wo;
  for (int64_t c = 0; c < it.channels; c += V::N) {
    V w[K * K];
    const T* from = p.weight + it.c0 + c;
    for (int k = 0; k < K * K; k++, from += cp) w[k] = V::load(from);
    const T* r[(TY - 1) * SW + K];
    for (int k = 0; k < (TY - 1) * SW + K; k++) r[k] = row[k] + c / channel_quantum * s.group + c % channel_quantum;
    S* to[TY];
    for (int i = 0; i < TY; i++) to[i] = y + i * width * stride + c;
    with_lanes(it.channels - c >= V::N, [&](auto how) {
      constexpr int TX = how.value == Lanes::all ? Tile::tx : 1;
      Finish<V, S, how.value, measure> out[TY];  // a chain of sums a row, so that its latency is hidden
      for (int i = 0; i < TY; i++) out[i] = {it.channels - c, V::load(s.pivot + c), V::zero(), V::zero()};
      direct_rows<V, K, SW, TY, TX>(r, w, to, stride, width, out);
      if constexpr (measure) {
        for (int i = 1; i < TY; i++) out[0].s1 = out[0].s1 + out[i].s1, out[0].s2 = out[0].s2 + out[i].s2;
        accumulate(s.s1 + c, out[0].s1, V::N);
        accumulate(s.s2 + c, out[0].s2, V::N);
      }
    });
  }
}

template <class V, bool measure, class S, class T>  // any kernel size, stride and dilation
void direct_convolve_any(const Depthwise<T>& p, const Item& it, const DirectScratch<T>& s, const T* const* row, S* y) {
  const int64_t cp = round_up(p.c, channel_quantum);
  for (int64_t c = 0; c < it.channels; c += V::N) {
    const int64_t at = c / channel_quantum * s.group + c % channel_quantum;
    Finish<V, S, Lanes::some, measure> out{it.channels - c, V::load(s.pivot + c), V::zero(), V::zero()};
    for (int64_t x = 0; x < p.wo; x++) {
      V acc = V::zero();
      for (int ky = 0; ky < p.kh; ky++)
        for (int kx = 0; kx < p.kw; kx++)
          acc = fma(V::load(row[ky] + at + (x * p.sw + kx * p.dw) * channel_quantum),
                    V::load(p.weight + (ky * p.kw + kx) * cp + it.c0 + c), acc);
      out(acc, y + x * p.c + c);
    }
    accumulate(s.s1 + c, out.s1, V::N);
    accumulate(s.s2 + c, out.s2, V::N);
  }
}

// No mean is known before the first row: it is stored, then measured, and its mean is the pivot of all that follow.
template <class V, class S, class T>
void measure_first_row(const Depthwise<T>& p, const Item& it, const DirectScratch<T>& s, const S* y) {
  for (int64_t c = 0; c < it.channels; c += V::N) {
    V sum = V::zero(), s1 = V::zero(), s2 = V::zero();
    for (int64_t x = 0; x < p.wo; x++) sum = sum + load_some<V>(y + x * p.c + c, it.channels - c);
    const V pivot = sum * V::set1(T(1) / T(p.wo));
    for (int64_t x = 0; x < p.wo; x++) {
      const V d = load_some<V>(y + x * p.c + c, it.channels - c) - pivot;
      s1 = s1 + d;
      s2 = fma(d, d, s2);
    }
    pivot.store(s.pivot + c);
    accumulate(s.s1 + c, s1, V::N);
    accumulate(s.s2 + c, s2, V::N);
  }
}

template <class S, class T = typename Arithmetic<S>::type>
size_t depthwise_direct_scratch(const Depthwise<T>& p) {
  Arena a{nullptr};
  DirectScratch<T>::make(a, p);
  return a.used;
}

template <class S, class T = typename Arithmetic<S>::type>
void depthwise_direct(const Depthwise<T>& p, int64_t begin, int64_t end, Moments moments, char* scratch) {
  using V = typename Vec<T>::type;
  constexpr int TY = Tile::ty, most_rows = 64 + 2 * TY;  // kernels are at most 64 tall; the tensor side checks
  Arena arena{scratch};
  const DirectScratch<T> s = DirectScratch<T>::make(arena, p);
  s.z.clear_all();
  const S* xs = static_cast<const S*>(p.x);
  S* ys = static_cast<S*>(p.out);
  const bool square = p.dh == 1 && p.dw == 1 && p.sh == p.sw && p.kh == p.kw;
  const bool tuned = square && (p.sh == 1 ? p.kh == 3 || p.kh == 5 || p.kh == 7 : p.sh == 2 && (p.kh == 3 || p.kh == 5));

  const bool plain = p.norm.identity && p.norm.act == Act::none && sizeof(S) == sizeof(T);  // nothing pending: a copy

  for (int64_t i = begin; i < end; i++) {
    const Item it = work_item(p, i, p.ho);
    s.z.forget();
    const bool known = p.measure && moments.count[it.c0] > 0;
    for (int64_t c = 0; p.measure && c < it.channels; c++) {
      s.s1[c] = s.s2[c] = 0;
      s.pivot[c] = known ? T(moments.mean[it.c0 + c]) : T(0);
    }
    auto fill = [&](T* line, int64_t r) {
      const S* x = xs + ((it.n * p.h + r) * p.w) * p.c + it.c0;
      line += p.pad_left * channel_quantum;
      for (int64_t c = 0; c < it.channels; c += channel_quantum, line += s.group) {
        const int64_t channels = least(channel_quantum, it.channels - c), at = it.c0 + c;
        if (plain && channels == channel_quantum)
          for (int64_t j = 0; j < p.w; j++)
            __builtin_memcpy(line + j * channel_quantum, x + j * p.c + c, channel_quantum * sizeof(T));
        else
          with_act(p.norm.act, [&](auto act) {
            normalise<act.value, V>(x + c, p.c, p.w, channels, p.norm.mean + at, p.norm.scale + at, p.norm.shift + at, line,
                                    channel_quantum);
          });
      }
    };
    int64_t oy = it.row0;
    while (oy < it.row1) {
      const bool pivoted = known || oy > it.row0;
      const bool pair = TY == 2 && tuned && p.kh == 3 && (pivoted || !p.measure) && oy + 1 < it.row1;
      const int rows = pair ? 2 : 1, lines = (rows - 1) * p.sh + p.kh;
      const T* row[most_rows];
      for (int ky = 0; ky < lines; ky++) row[ky] = s.z.row(oy * p.sh - p.pad_top + ky * p.dh, fill);
      S* y = ys + ((it.n * p.ho + oy) * p.wo) * p.c + it.c0;
      with_flag(p.measure && pivoted, [&](auto flag) {
        constexpr bool measure = flag.value;
        if (!tuned) direct_convolve_any<V, measure>(p, it, s, row, y);
        else if (p.kh == 3 && p.sh == 1 && pair) direct_convolve<V, 3, 1, TY, measure>(p, it, s, row, y);
        else if (p.kh == 3 && p.sh == 1) direct_convolve<V, 3, 1, 1, measure>(p, it, s, row, y);
        else if (p.kh == 3 && pair) direct_convolve<V, 3, 2, TY, measure>(p, it, s, row, y);
        else if (p.kh == 3) direct_convolve<V, 3, 2, 1, measure>(p, it, s, row, y);
        else if (p.kh == 5 && p.sh == 1) direct_convolve<V, 5, 1, 1, measure>(p, it, s, row, y);
        else if (p.kh == 5) direct_convolve<V, 5, 2, 1, measure>(p, it, s, row, y);
        else direct_convolve<V, 7, 1, 1, measure>(p, it, s, row, y);
      });
      if (p.measure && !pivoted) measure_first_row<V>(p, it, s, y);
      oy += rows;
    }
    for (int64_t c = 0; p.measure && c < it.channels; c++)
      merge_moments(moments, it.c0 + c, double((it.row1 - it.row0) * p.wo), double(s.pivot[c]), s.s1[c], s.s2[c]);
  }
}

}  // namespace
}  // namespace mnops
