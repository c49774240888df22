// The first convolution of a network: any kernel over the few channels of an image, as a matrix product.
//
// A tap row of a channels_last image is one run of kw * c values, and the windows of neighbouring outputs lie sw * c values
// apart. So nothing is gathered: the kh input rows of a row of outputs are copied into lines (normalised, with the zeros of
// the padding around them), and the micro-kernel of the pointwise convolution reads its factor A from there:
//   forward          y [x, o] += line[ky][x * sw * c + i] W[ky, i, o]      for every tap row ky and i in its run
//   weight gradient  gw[ky, i, o] += line[ky][x * sw * c + i] gy[x, o]
// Bytes moved: y once, and the image, which is small against it, kh / sh times from L2. It loses where rows are short.
#pragma once
#include "cpu/kernels/pointwise_conv2d.h"

namespace mnops {
namespace {

template <class T> struct StemScratch {
  T *lines, *tile, *gy, *image;  // the last two for the backward, image only where dx is wanted
  int64_t line;                  // values in one line
  static StemScratch make(Arena& a, const Pointwise<T>& p, const Window& w, bool backward) {
    constexpr int NR = Shape<typename Vec<T>::type>::nr, MR = Shape<typename Vec<T>::type>::mr;
    const int64_t line = most(w.w + w.pad_left, (w.wo - 1) * w.sw + w.kw) * w.c;
    // A whole micro-tile reads beyond the last line.
    return {a.take<T>(w.kh * line + MR * w.sw * w.c + channel_quantum), a.take<T>(p.mc * NR),
            backward ? a.take<T>(round_up(p.o, NR) * p.mc) : nullptr,
            backward && p.out ? a.take<T>(w.h * w.w * w.c + channel_quantum) : nullptr, line};
  }
};

template <class T> size_t stem_scratch(const Pointwise<T>& p, const Window& w, bool backward) {
  Arena a{nullptr};
  StemScratch<T>::make(a, p, w, backward);
  return a.used;
}

// The lines of row `row` of outputs, counted over all images. The norm's vectors are repeated for every tap.
template <class V, class S, class T> MNOPS_INLINE void fill_lines(const Pointwise<T>& p, const Window& w, int64_t row, const StemScratch<T>& s) {
  const bool plain = p.norm.identity && p.norm.act == Act::none && sizeof(S) == sizeof(T);
  const int64_t oy = row % w.ho, n = row / w.ho, left = w.pad_left * w.c, inside = w.w * w.c;
  with_act(p.norm.act, [&](auto act) {
    for (int ky = 0; ky < w.kh; ky++) {
      const int64_t iy = oy * w.sh - w.pad_top + ky;
      T* const line = s.lines + ky * s.line;
      if (iy < 0 || iy >= w.h) {
        __builtin_memset(line, 0, s.line * sizeof(T));
        continue;
      }
      const S* const x = static_cast<const S*>(p.x) + (n * w.h + iy) * inside;
      T* const to = line + left;
      __builtin_memset(line, 0, left * sizeof(T));
      __builtin_memset(to + inside, 0, (s.line - left - inside) * sizeof(T));
      if (plain) {
        __builtin_memcpy(to, x, inside * sizeof(T));
        continue;
      }
      for (int64_t i0 = 0; i0 < inside; i0 += p.k)
        for (int64_t i = 0; i < least(p.k, inside - i0); i += V::N) {
          const int64_t lanes = least(p.k, inside - i0) - i;
          const V xc = load_some<V>(x + i0 + i, lanes) - V::load(p.norm.mean + i);
          store_some(activate<act.value>(fma(xc, V::load(p.norm.scale + i), V::load(p.norm.shift + i))), to + i0 + i, lanes);
        }
    }
  });
}

// Rows [begin, end) of outputs, counted over all images.
template <class S, class T = typename Arithmetic<S>::type>
void stem_forward(const Pointwise<T>& p, const Window& w, int64_t begin, int64_t end, Moments moments, char* scratch) {
  using V = typename Vec<T>::type;
  constexpr int NR = Shape<V>::nr, MR = Shape<V>::mr;
  Arena arena{scratch};
  const StemScratch<T> s = StemScratch<T>::make(arena, p, w, false);
  const int64_t step = w.sw * w.c;
  auto multiply = [&](auto known_step, const T* packed) {
    for (int64_t x = 0; x < w.wo; x += MR)
      micro_kernel<V, MR, known_step.value, 1>(s.lines + x * step, s.line, p.k, w.kw * w.c, packed,
                                               [&](int r, int v, V c) { c.store(s.tile + (x + r) * NR + v * V::N); }, NothingAhead{}, step);
  };
  for (int64_t row = begin; row < end; row++) {
    fill_lines<V, S>(p, w, row, s);
    for (int64_t j = 0; j * NR < p.o; j++) {
      const T* const packed = static_cast<const T*>(p.packed) + j * p.k * NR;
      if (step == 6) multiply(IntTag<6>{}, packed);  // three colours at stride 2
      else multiply(IntTag<0>{}, packed);
      store_panel<V, S>(p, row * w.wo, w.wo, j * NR, s.tile, moments);
    }
  }
  finish_streams();
}

// f(tag of n), 1 <= n <= most
template <int most, class F> MNOPS_INLINE void with_rows(int64_t n, F f) {
  if constexpr (most > 1)
    if (n < most) return with_rows<most - 1>(n, f);
  f(IntTag<most>{});
}

// gw[ceil(o / nr)][k][nr] += of one row of outputs; runs are cut into equal micro-tiles of at most mr rows: 9 = 5 + 4.
template <class V, class T>
void stem_weight_gradient(const Pointwise<T>& p, const Window& w, const StemScratch<T>& s, T* gw) {
  constexpr int NR = Shape<V>::nr, MR = Shape<V>::mr;
  const int64_t run = w.kw * w.c, tiles = (run + MR - 1) / MR;
  for (int64_t j = 0; j * NR < p.o; j++)
    for (int ky = 0; ky < w.kh; ky++)
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t i = run * t / tiles, count = run * (t + 1) / tiles - i;
        T* const to = gw + (j * p.k + ky * run + i) * NR;
        with_rows<MR>(count, [&](auto rows) {
          micro_kernel<V, rows.value, 1, 0>(s.lines + ky * s.line + i, 0, w.wo, w.wo, s.gy + j * p.mc * NR,
                                            [&](int r, int v, V c) {
                                              T* const sum = to + r * NR + v * V::N;
                                              (V::load(sum) + c).store(sum);
                                            }, NothingAhead{}, 1, w.sw * w.c);
        });
      }
}

// The gradient of one row of outputs with respect to z, scattered into the image. Rarely wanted (images are data): plain.
template <class V, class T> void scatter_row(const Pointwise<T>& p, const Window& w, int64_t oy, const StemScratch<T>& s) {
  constexpr int NR = Shape<V>::nr;
  for (int64_t j = 0; j * NR < p.k; j++) {
    multiply_block<V>(s.gy, p.mc, w.wo, p.o, static_cast<const T*>(p.packed) + j * p.o * NR, s.tile, NothingAhead{});
    for (int64_t x = 0; x < w.wo; x++)
      for (int64_t i = 0; i < least(NR, p.k - j * NR); i++) {
        const int64_t k = j * NR + i, c = k % w.c, kx = k / w.c % w.kw, ky = k / w.c / w.kw;
        const int64_t iy = oy * w.sh - w.pad_top + ky, ix = x * w.sw - w.pad_left + kx;
        if (iy >= 0 && iy < w.h && ix >= 0 && ix < w.w) s.image[(iy * w.w + ix) * w.c + c] += s.tile[x * NR + i];
      }
  }
}

// Chain rule through the pending norm of one image.
template <class V, class S, class T> void finish_image(const Pointwise<T>& p, const Window& w, int64_t n, const T* image, NormSums sums) {
  const int64_t size = w.h * w.w * w.c;
  const S* x = static_cast<const S*>(p.x) + n * size;
  S* dx = static_cast<S*>(p.out) + n * size;
  with_act(p.norm.act, [&](auto act) {
    for (int64_t i = 0; i < size; i += w.c)
      for (int64_t c = 0; c < w.c; c += V::N) {
        const int64_t lanes = w.c - c;
        const V scale = V::load(p.norm.scale + c), xc = load_some<V>(x + i + c, lanes) - V::load(p.norm.mean + c);
        const V gz = load_some<V>(image + i + c, lanes);
        const V g = activate_grad<act.value>(gz, fma(xc, scale, V::load(p.norm.shift + c)));
        accumulate(sums.gp + c, g, lanes);
        accumulate(sums.gpx + c, g * xc, lanes);
        store_some(g * scale, dx + i + c, lanes);
      }
  });
}

// Rows [begin, end) of outputs; whole images where dx is wanted.
template <class S, class T = typename Arithmetic<S>::type>
void stem_backward(const Pointwise<T>& p, const Window& w, int64_t begin, int64_t end, T* gw, NormSums sums, char* scratch) {
  using V = typename Vec<T>::type;
  Arena arena{scratch};
  const StemScratch<T> s = StemScratch<T>::make(arena, p, w, true);
  for (int64_t row = begin; row < end; row++) {
    const int64_t n = row / w.ho, oy = row % w.ho;
    pack_incoming<V, S>(p, row * w.wo, w.wo, s.gy);
    if (p.need_weight) {
      fill_lines<V, S>(p, w, row, s);
      stem_weight_gradient<V>(p, w, s, gw);
    }
    if (!p.out) continue;
    if (oy == 0) __builtin_memset(s.image, 0, w.h * w.w * w.c * sizeof(T));
    scatter_row<V>(p, w, oy, s);
    if (oy == w.ho - 1) finish_image<V, S>(p, w, n, s.image, sums);
  }
}

}  // namespace
}  // namespace mnops
