// Depthwise convolution, its norm and activation, and the pointwise convolution behind it, for inference: the
// depthwise result goes into the column panels of the matrix product, and never to memory.
//
// Pixels of y are one stream over images and rows. A block of them is convolved from a ring of normalised lines (as in
// depthwise_conv2d.h, all channels of a row in one line), normalised as it leaves the registers, stored as panels that
// fit L2, and multiplied; the product is stored from registers. Bytes moved: x and y once, and the weights from L2/L3
// once a block. It loses where an image is a pixel or two wide.
//
// An inverted residual has a pointwise convolution before these. Then a line is not loaded: a row of x, packed once, times the
// weights gives it, normalised as it leaves the registers, so that the expanded tensor, six times x, is never stored either.
#pragma once
#include "cpu/kernels/depthwise_conv2d.h"
#include "cpu/kernels/pointwise_conv2d.h"

namespace mnops {
namespace {

// A finished vector of the depthwise result: normalised, into the panels.
template <Act act, class V> struct Activate {
  V mean, scale, shift;
  template <class P> MNOPS_INLINE void operator()(V v, P* to) { activate<act>(fma(v - mean, scale, shift)).store(to); }
};

// Outputs [begin, end) of one group of one row, c its first channel: pixel x is row r0 + x of the panels z.
template <Act act, class V, int K, int S, class P, class T>
void convolve_to_panels(const Separable<T>& p, const T* const* row, int64_t begin, int64_t end, int64_t c0, P* z, int64_t rows,
                        int64_t r0) {
  constexpr int NR = Shape<V>::nr;
  const Depthwise<T>& d = p.depthwise;
  const int64_t cp = round_up(d.c, channel_quantum);
  for (int64_t c = c0; c < least(d.c, c0 + channel_quantum); c += V::N) {
    P* to = z + (c / NR * rows + r0 + begin) * NR + c % NR;
    Activate<act, V> out{V::load(p.mid.mean + c), V::load(p.mid.scale + c), V::load(p.mid.shift + c)};
    const T* r[K > 0 ? K : most_rows];
    for (int k = 0; k < (K > 0 ? K : d.kh); k++) r[k] = row[k] + c - c0 + (K > 0 ? begin * S * channel_quantum : 0);
    if constexpr (K > 0) {
      V w[K * K];
      for (int k = 0; k < K * K; k++) w[k] = V::load(d.weight + k * cp + c);
      convolve_tiles<V, K, S, 1, Tile::tx>(r, w, &to, NR, end - begin, &out);
    } else {
      convolve_any<V>(d, r, d.weight + c, begin, to, NR, end - begin, out);
    }
  }
}

template <class P, class T> struct SeparableScratch {
  Ring<T> lines;
  P *z, *panel;        // of one block; of weights, where they are packed as they are used
  P* row;              // of x, before it is expanded
  static SeparableScratch make(Arena& a, const Separable<T>& p) {
    const Depthwise<T>& d = p.depthwise;
    const int64_t columns = most(d.w + d.pad_left, (d.wo - 1) * d.sw + (d.kw - 1) * d.dw + 1);
    const Ring<T> lines = Ring<T>::make(a, (d.kh - 1) * d.dh + 1, columns, d.c, d.n * d.h);
    constexpr int NR = Shape<typename Vec<T>::type>::nr;
    P* const z = a.take<P>(round_up(d.c, NR) * p.pointwise.mc);
    return {lines, z, p.pointwise.packed ? nullptr : a.take<P>(panel_size<P, T>(d.c)),
            p.expand.packed ? a.take<P>(round_up(p.expand.k, NR) * p.expand.mc) : nullptr};
  }
};

// Zeros where nothing else is written: the line outside the image and the columns beside it.
template <class T> void start(const Separable<T>& p, const Ring<T>& lines) {
  const Depthwise<T>& d = p.depthwise;
  const int64_t before = d.pad_left * channel_quantum, after = before + d.w * channel_quantum;
  for (T* group = lines.lines; group < lines.zeros; group += lines.group) {
    __builtin_memset(group, 0, before * sizeof(T));
    __builtin_memset(group + after, 0, (lines.group - after) * sizeof(T));
  }
  __builtin_memset(lines.lines + lines.slots * lines.size, 0, lines.size * sizeof(T));
  lines.forget();
}

template <class P, class T> size_t separable_scratch(const Separable<T>& p) {
  Arena a{nullptr};
  SeparableScratch<P, T>::make(a, p);
  return a.used;
}

// A tile of the expanded row, normalised, into its line: `count` pixels and nr channels. Not inlined, as multiply_tile.
template <class V, Act act, class P, class T>
__attribute__((noinline)) void expand_tile(const P* row, int64_t panel_stride, int64_t k, const P* packed, const T* mean,
                                           const T* scale, const T* shift, T* line, int64_t count) {
  constexpr int NR = Shape<V>::nr, MR = Shape<V>::mr;
  auto put = [&](int r, int v, V c) {
    const int i = v * V::N;
    if (r < count) activate<act>(fma(c - V::load(mean + i), V::load(scale + i), V::load(shift + i))).store(line + r * channel_quantum + i);
  };
  micro_kernel<V, MR, NR, 1>(row, panel_stride, k, NR, packed, put, NothingAhead{});
}

// The lines of rows that are needed for the first time: x's row, packed with what is pending on it, times the weights.
template <class S, class P, class T>
void expand_rows(const Separable<T>& p, const Ring<T>& lines, const Fresh<T>& fresh, P* row) {
  using V = typename Vec<T>::type;
  constexpr int NR = Shape<V>::nr, MR = Shape<V>::mr;
  const Pointwise<T>& q = p.expand;
  const Norm<T>& norm = p.depthwise.norm;
  const int64_t w = p.depthwise.w;
  for (int f = 0; f < fresh.count; f++) {
    pack_pixels<V, S>(q, fresh.lines[f].row * w, w, 0, (q.k + NR - 1) / NR, row);
    for (int64_t c = 0; c < q.o; c += NR) {
      const P* const packed = static_cast<const P*>(q.packed) + c / NR * panel_size<P, T>(q.k);
      T* const line = fresh.lines[f].line + c / channel_quantum * lines.group + p.depthwise.pad_left * channel_quantum + c % channel_quantum;
      with_act(norm.act, [&](auto act) {
        for (int64_t x = 0; x < w; x += MR)
          expand_tile<V, act.value>(row + x * NR, q.mc * NR, q.k, packed, norm.mean + c, norm.scale + c, norm.shift + c,
                                    line + x * channel_quantum, w - x);
      });
    }
  }
}

// Pixels [begin, end) of the stream -> rows [to, to + end - begin) of the panels z, which have `rows` rows.
template <class S, class P, class T>
void depthwise_to_panels(const Separable<T>& p, const SeparableScratch<P, T>& s, int64_t begin, int64_t end, P* z, int64_t rows,
                         int64_t to) {
  const Ring<T>& lines = s.lines;
  using V = typename Vec<T>::type;
  const Depthwise<T>& d = p.depthwise;
  for (int64_t m = begin; m < end;) {
    const int64_t ox = m % d.wo, oy = m / d.wo % d.ho, n = m / d.wo / d.ho, last = least(d.wo, ox + end - m);
    const T *row[most_rows], *group[most_rows];
    Fresh<T> fresh;
    for (int ky = 0; ky < d.kh; ky++) {
      const int64_t iy = oy * d.sh - d.pad_top + ky * d.dh;
      row[ky] = iy < 0 || iy >= d.h ? lines.zeros : lines.row(n * d.h + iy, fresh);
    }
    const int64_t r0 = to + (m - begin) - ox;
    if (s.row) expand_rows<S>(p, lines, fresh, s.row);
    for (int64_t c = 0; c < d.c; c += channel_quantum) {
      const int64_t at = c / channel_quantum * lines.group;
      for (int f = 0; f < fresh.count && !s.row; f++)
        normalise_group<V>(d, static_cast<const S*>(d.x) + fresh.lines[f].row * d.w * d.c + c, c, least(channel_quantum, d.c - c),
                           fresh.lines[f].line + at, NothingAhead{});
      for (int ky = 0; ky < d.kh; ky++) group[ky] = row[ky] + at;
      with_act(p.mid.act, [&](auto act) {
        with_window(d, [&](auto k, auto stride) {
          convolve_to_panels<act.value, V, k.value, stride.value>(p, group, ox, last, c, z, rows, r0);
        });
      });
    }
    m += last - ox;
  }
}

// One tile of y, MR pixels high, stored from registers: `count` pixels and `lanes` channels of it. Not inlined: g++ then has
// all the registers for the product.
template <class V, int MR, class S, Lanes how, class P, class A>
__attribute__((noinline)) void multiply_tile(const P* z, int64_t panel_stride, int64_t k, const P* packed, S* y, int64_t stride,
                                             int64_t count, int64_t lanes, Ahead<A>& ahead) {
  constexpr int NR = Shape<V>::nr;
  auto put = [&](int r, int v, V c) {
    if (r < count) store_lanes<how>(c, y + r * stride + v * V::N, lanes - v * V::N);
  };
  micro_kernel<V, MR, NR, 1>(z, panel_stride, k, NR, packed, put, ahead);
}

// One panel of y: rows [0, count) of the panels z are pixels m0 and on. `ahead` is fetched meanwhile.
template <class S, class P, class T, class A>
void multiply_to_output(const Pointwise<T>& p, const P* z, int64_t m0, int64_t count, int64_t panel, const P* packed,
                        Ahead<A>& ahead) {
  using V = typename Vec<T>::type;
  constexpr int NR = Shape<V>::nr;
  const int64_t lanes = least(NR, p.o - panel * NR);
  S* const y = static_cast<S*>(p.out) + m0 * p.o + panel * NR;
  with_stores<V>(lanes == NR, p.stream, y, p.o, [&](auto how) {
    in_tiles<V, P>(count, [&](auto height, int64_t r) {
      multiply_tile<V, height.value, S, how.value>(z + r * NR, p.mc * NR, p.k, packed, y + r * p.o, p.o, count - r, lanes, ahead);
    });
  });
}

// Panels [first, last) of y, each packed just before it is used.
template <class S, class P, class T>
void multiply_packing(const Pointwise<T>& p, const P* z, int64_t m0, int64_t count, int64_t first, int64_t last, P* packed) {
  using V = typename Vec<T>::type;
  constexpr int NR = Shape<V>::nr;
  for (int64_t j = first; j < last; j++) {
    pack_columns<P>(p.weight, p.o, p.k, j, j + 1, packed);
    Ahead<T> weights{};
    if (j + 1 < last) weights.add(p.weight + (j + 1) * NR * p.k, least(NR, p.o - (j + 1) * NR), p.k, p.k);
    weights.start(product_steps<V, P>(count, p.k, 1));
    multiply_to_output<S>(p, z, m0, count, j, packed, weights);
  }
}

// Rows of x, of all images, that the pixels before m of the stream read.
template <class T> MNOPS_INLINE int64_t rows_read(const Depthwise<T>& d, int64_t m) {
  const int64_t oy = (m - 1) / d.wo % d.ho, n = (m - 1) / d.wo / d.ho;
  return n * d.h + most(0, least(d.h, oy * d.sh - d.pad_top + (d.kh - 1) * d.dh + 1));
}

// Pixels [begin, end), all channels of y, from weights packed beforehand or, where the pixels are one block, as they go.
template <class S, class P, class T = typename Arithmetic<S>::type>
void separable_forward(const Separable<T>& p, int64_t begin, int64_t end, char* scratch) {
  Arena arena{scratch};
  const auto s = SeparableScratch<P, T>::make(arena, p);
  const Pointwise<T>& q = p.pointwise;
  using V = typename Vec<T>::type;
  const bool expand = p.expand.packed;
  const int64_t panels = (q.o + Shape<V>::nr - 1) / Shape<V>::nr, row = p.depthwise.w * (expand ? p.expand.k : q.k);
  const S* const x = static_cast<const S*>(expand ? p.expand.x : p.depthwise.x);
  start(p, s.lines);
  for (int64_t m0 = begin; m0 < end; m0 += q.mc) {
    const int64_t count = least(q.mc, end - m0), next = m0 + count;
    depthwise_to_panels<S>(p, s, m0, next, s.z, q.mc, 0);
    if (!q.packed) {
      multiply_packing<S>(q, s.z, m0, count, 0, panels, s.panel);
      continue;
    }
    const int64_t read = rows_read(p.depthwise, next);
    Ahead<S> ahead{};
    ahead.add(x + read * row, rows_read(p.depthwise, least(end, next + q.mc)) - read, row, row);
    ahead.start(product_steps<V, P>(count, q.k, panels));
    for (int64_t j = 0; j < panels; j++)
      multiply_to_output<S>(q, s.z, m0, count, j, static_cast<const P*>(q.packed) + j * panel_size<P, T>(q.k), ahead);
  }
  finish_streams();
}

// The same in two steps, for few pixels and large weights: pixels [begin, end) into panels that all threads share,
template <class S, class P, class T = typename Arithmetic<S>::type>
void separable_depthwise(const Separable<T>& p, int64_t begin, int64_t end, void* z, char* scratch) {
  Arena arena{scratch};
  const auto s = SeparableScratch<P, T>::make(arena, p);
  start(p, s.lines);
  depthwise_to_panels<S>(p, s, begin, end, static_cast<P*>(z), p.pointwise.mc, begin);
}

// then panels [first, last) of y for all pixels; `packed`: room for a panel.
template <class S, class P, class T = typename Arithmetic<S>::type>
void separable_pointwise(const Separable<T>& p, const void* z, int64_t first, int64_t last, void* packed) {
  const Pointwise<T>& q = p.pointwise;
  if (q.packed) {
    Ahead<S> nothing{};
    for (int64_t j = first; j < last; j++)
      multiply_to_output<S>(q, static_cast<const P*>(z), 0, q.m, j, static_cast<const P*>(q.packed) + j * panel_size<P, T>(q.k), nothing);
  } else {
    multiply_packing<S>(q, static_cast<const P*>(z), 0, q.m, first, last, static_cast<P*>(packed));
  }
  finish_streams();
}

}  // namespace
}  // namespace mnops
