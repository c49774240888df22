// Depthwise convolution, its norm and activation, and the pointwise convolution behind it, for inference: the
// depthwise result goes into the column panels of the matrix product, and never to memory.
//
// Pixels of y are one stream over images and rows. A block of them is convolved from a ring of normalised lines (as in
// depthwise_conv2d.h, all channels of a row in one line), normalised as it leaves the registers, stored as panels that
// fit L2, and multiplied; the product is stored from registers. Bytes moved: x and y once, and the weights from L2/L3
// once a block. It loses where an image is a pixel or two wide.
#pragma once
#include "cpu/kernels/depthwise_conv2d.h"
#include "cpu/kernels/pointwise_conv2d.h"

namespace mnops {
namespace {

// One vector of channels of a row of outputs, from a kernel known at compile time.
template <class V, int K, int S, int TX, class T, class Put>
MNOPS_INLINE void convolve_run(const T* const* row, int64_t x, int64_t end, int64_t ps, const V* w, Put put) {
  for (; x + TX <= end; x += TX) convolve_tile<V, K, S, TX>(row, x * S * ps, ps, w, [&](V v, int t) { put(v, x + t); });
  if constexpr (TX > 1)
    if (x < end) convolve_run<V, K, S, TX / 2>(row, x, end, ps, w, put);
}

// Outputs [begin, end) of one row, all channels: pixel x is row r0 + x of the panels z.
template <Act act, class V, int K, int S, class P, class T>
void convolve_to_panels(const Separable<T>& p, const T* const* row, int64_t begin, int64_t end, int64_t ps, P* z, int64_t rows,
                        int64_t r0) {
  constexpr int NR = Shape<V>::nr;
  const Depthwise<T>& d = p.depthwise;
  const int64_t cp = round_up(d.c, channel_quantum);
  for (int64_t c = 0; c < d.c; c += V::N) {
    P* const to = z + (c / NR * rows + r0) * NR + c % NR;
    const V mean = V::load(p.mid.mean + c), scale = V::load(p.mid.scale + c), shift = V::load(p.mid.shift + c);
    auto put = [&](V v, int64_t x) { activate<act>(fma(v - mean, scale, shift)).store(to + x * NR); };
    if constexpr (K > 0) {
      V w[K * K];
      const T* r[K];
      for (int k = 0; k < K * K; k++) w[k] = V::load(d.weight + k * cp + c);
      for (int k = 0; k < K; k++) r[k] = row[k] + c;
      convolve_run<V, K, S, Tile::tx>(r, begin, end, ps, w, put);
    } else {  // any kernel size, stride and dilation
      for (int64_t x = begin; x < end; x++) {
        V acc = V::zero();
        for (int ky = 0; ky < d.kh; ky++)
          for (int kx = 0; kx < d.kw; kx++)
            acc = fma(V::load(row[ky] + (x * d.sw + kx * d.dw) * ps + c), V::load(d.weight + (ky * d.kw + kx) * cp + c), acc);
        put(acc, x);
      }
    }
  }
}

template <class P, class T> struct SeparableScratch {
  Ring<T> lines;
  P *z, *panel;        // of one block; of weights, where they are packed as they are used
  static SeparableScratch make(Arena& a, const Separable<T>& p) {
    const Depthwise<T>& d = p.depthwise;
    const int64_t columns = most(d.w + d.pad_left, (d.wo - 1) * d.sw + (d.kw - 1) * d.dw + 1);
    const Ring<T> lines = Ring<T>::make(a, (d.kh - 1) * d.dh + 1, columns * line_stride(d.c), d.n * d.h);
    P* const z = a.take<P>(round_up(d.c, Shape<typename Vec<T>::type>::nr) * p.pointwise.mc);
    return {lines, z, p.pointwise.packed ? nullptr : a.take<P>(panel_size<P, T>(d.c))};
  }
};

// Zeros where nothing else is written: the line outside the image and the columns beside it.
template <class T> void start(const Separable<T>& p, const Ring<T>& lines) {
  const Depthwise<T>& d = p.depthwise;
  const int64_t ps = line_stride(d.c), before = d.pad_left * ps, inside = d.w * ps;
  for (int64_t i = 0; i < lines.slots; i++) {
    T* const line = lines.lines + i * lines.line_size;
    __builtin_memset(line, 0, before * sizeof(T));
    __builtin_memset(line + before + inside, 0, (lines.line_size - before - inside) * sizeof(T));
  }
  __builtin_memset(lines.lines + lines.slots * lines.line_size, 0, lines.line_size * sizeof(T));
  lines.forget();
}

template <class P, class T> size_t separable_scratch(const Separable<T>& p) {
  Arena a{nullptr};
  SeparableScratch<P, T>::make(a, p);
  return a.used;
}

// Pixels [begin, end) of the stream -> rows [to, to + end - begin) of the panels z, which have `rows` rows.
template <class S, class P, class T>
void depthwise_to_panels(const Separable<T>& p, const Ring<T>& lines, int64_t begin, int64_t end, P* z, int64_t rows, int64_t to) {
  using V = typename Vec<T>::type;
  const Depthwise<T>& d = p.depthwise;
  const int64_t ps = line_stride(d.c);
  const bool dense = d.dh == 1 && d.dw == 1 && d.sh == d.sw && d.kh == d.kw;
  auto fill = [&](T* line, int64_t r) {
    with_act(d.norm.act, [&](auto act) {
      normalise<act.value, V>(static_cast<const S*>(d.x) + r * d.w * d.c, d.c, d.w, d.c, d.norm.mean, d.norm.scale, d.norm.shift,
                              line + d.pad_left * ps, ps);
    });
  };
  for (int64_t m = begin; m < end;) {
    const int64_t ox = m % d.wo, oy = m / d.wo % d.ho, n = m / d.wo / d.ho, last = least(d.wo, ox + end - m);
    constexpr int most_rows = 64;  // kernels are at most this tall; the tensor side checks
    const T* row[most_rows];
    for (int ky = 0; ky < d.kh; ky++) {
      const int64_t iy = oy * d.sh - d.pad_top + ky * d.dh;
      row[ky] = iy < 0 || iy >= d.h ? lines.zeros : lines.row(n * d.h + iy, fill);
    }
    const int64_t r0 = to + (m - begin) - ox;
    with_act(p.mid.act, [&](auto act) {
      constexpr Act a = act.value;
      if (dense && d.kh == 3 && d.sh == 1) convolve_to_panels<a, V, 3, 1>(p, row, ox, last, ps, z, rows, r0);
      else if (dense && d.kh == 3 && d.sh == 2) convolve_to_panels<a, V, 3, 2>(p, row, ox, last, ps, z, rows, r0);
      else if (dense && d.kh == 5 && d.sh == 1) convolve_to_panels<a, V, 5, 1>(p, row, ox, last, ps, z, rows, r0);
      else if (dense && d.kh == 5 && d.sh == 2) convolve_to_panels<a, V, 5, 2>(p, row, ox, last, ps, z, rows, r0);
      else convolve_to_panels<a, V, 0, 0>(p, row, ox, last, ps, z, rows, r0);
    });
    m += last - ox;
  }
}

// One tile of y, stored from registers: `count` pixels and `lanes` channels of it. Not inlined: g++ then has all the
// registers for the product.
template <class V, class S, Lanes how, class P, class A>
__attribute__((noinline)) void multiply_tile(const P* z, int64_t panel_stride, int64_t k, const P* packed, S* y, int64_t stride,
                                             int64_t count, int64_t lanes, Ahead<A>& ahead) {
  constexpr int NR = Shape<V>::nr, MR = Shape<V>::mr;
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
  constexpr int NR = Shape<V>::nr, MR = Shape<V>::mr;
  const int64_t lanes = least(NR, p.o - panel * NR);
  S* const y = static_cast<S*>(p.out) + m0 * p.o + panel * NR;
  with_stores<V>(lanes == NR, p.stream, y, p.o, [&](auto how) {
    for (int64_t r = 0; r < count; r += MR)
      multiply_tile<V, S, how.value>(z + r * NR, p.mc * NR, p.k, packed, y + r * p.o, p.o, count - r, lanes, ahead);
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
    weights.start(product_steps<V>(count, p.k, 1));
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
  const int64_t panels = (q.o + Shape<V>::nr - 1) / Shape<V>::nr, row = p.depthwise.w * q.k;
  start(p, s.lines);
  for (int64_t m0 = begin; m0 < end; m0 += q.mc) {
    const int64_t count = least(q.mc, end - m0), next = m0 + count;
    depthwise_to_panels<S>(p, s.lines, m0, next, s.z, q.mc, 0);
    if (!q.packed) {
      multiply_packing<S>(q, s.z, m0, count, 0, panels, s.panel);
      continue;
    }
    const int64_t read = rows_read(p.depthwise, next);
    Ahead<S> ahead{};
    ahead.add(static_cast<const S*>(p.depthwise.x) + read * row, rows_read(p.depthwise, least(end, next + q.mc)) - read, row, row);
    ahead.start(product_steps<V>(count, q.k, panels));
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
  depthwise_to_panels<S>(p, s.lines, begin, end, static_cast<P*>(z), p.pointwise.mc, begin);
}

// then panels [first, last) of y for all pixels.
template <class S, class P, class T = typename Arithmetic<S>::type>
void separable_pointwise(const Separable<T>& p, const void* z, int64_t first, int64_t last, void* packed) {
  multiply_packing<S>(p.pointwise, static_cast<const P*>(z), 0, p.pointwise.m, first, last, static_cast<P*>(packed));
  finish_streams();
}

}  // namespace
}  // namespace mnops
