// Depthwise convolution that normalises on load and measures on store, forward and backward.
//
// Parallel over work items: (image, band of rows, block of channels). Inside an item the kernel walks down the rows.
// Each input row is read once, normalised once into a line of a small ring buffer (padded with zeros, so the
// convolution itself has no bounds test), and serves every tap from there. Bytes moved: x and y once forward,
// g, y, x and dx once backward; the floor of the fused form. Lines live in L1/L2: a block of channels is chosen so.
// It loses where an image is a pixel or two wide: the ring then costs as much as the convolution.
#pragma once
#include "cpu/kernels/common.h"

namespace mnops {
namespace {

// One row of lines: pixel stride is a cache line more than the block, so that pixels of wide blocks do not all
// fall into the same few L1 sets.
MNOPS_INLINE int64_t line_stride(int64_t block) { return round_up(block, channel_quantum) + channel_quantum; }

struct Item {
  int64_t n, c0, channels, row0, row1;
};

template <class T> MNOPS_INLINE Item work_item(const Depthwise<T>& p, int64_t index, int64_t rows) {
  const int64_t blocks = (p.c + p.block - 1) / p.block;
  const int64_t b = index % blocks, band = index / blocks % p.bands, n = index / blocks / p.bands;
  return {n, b * p.block, least(p.block, p.c - b * p.block), band * p.band, least(rows, (band + 1) * p.band)};
}

// A ring of lines, filled on demand: the line of row r stays until a row that shares its slot is asked for.
template <class T> struct Ring {
  T* lines;
  int64_t* tag;
  int64_t slots, line_size, rows;
  const T* zeros;

  static Ring make(Arena& arena, int64_t slots, int64_t line_size, int64_t rows) {
    Ring r{arena.take<T>((slots + 1) * line_size), arena.take<int64_t>(slots), slots, line_size, rows, nullptr};
    r.zeros = r.lines + slots * line_size;
    return r;
  }
  void clear_all() const { __builtin_memset(lines, 0, (slots + 1) * line_size * sizeof(T)); }
  void forget() const { for (int64_t i = 0; i < slots; i++) tag[i] = -1; }
  template <class F> MNOPS_INLINE const T* row(int64_t r, F fill) const {
    if (r < 0 || r >= rows) return zeros;
    T* line = lines + r % slots * line_size;
    if (tag[r % slots] != r) fill(line, tag[r % slots] = r);
    return line;
  }
};

// ---------------------------------------------------------------- forward

template <class T> struct ForwardScratch {
  Ring<T> z;
  T *out, *pivot;       // one row of y, as computed
  double *s1, *s2;      // sums of (y - pivot) and its square over the item
  static ForwardScratch make(Arena& a, const Depthwise<T>& p) {
    const int64_t ps = line_stride(p.block);
    const int64_t columns = most(p.w + p.pad_left, (p.wo - 1) * p.sw + (p.kw - 1) * p.dw + 1);
    ForwardScratch s;
    s.z = Ring<T>::make(a, (p.kh - 1) * p.dh + 1, columns * ps, p.h);
    s.out = a.take<T>(p.wo * ps);
    s.pivot = a.take<T>(ps);
    s.s1 = a.take<double>(ps);
    s.s2 = a.take<double>(ps);
    return s;
  }
};

// TX neighbouring outputs of one channel vector: every loaded input serves all taps of all of them.
template <class V, int K, int S, int TX, class T, class Put>
MNOPS_INLINE void convolve_tile(const T* const* row, int64_t at, int64_t ps, const V* w, Put put) {
  V acc[TX];
  for (int t = 0; t < TX; t++) acc[t] = V::zero();
#pragma GCC unroll 8
  for (int ky = 0; ky < K; ky++) {
#pragma GCC unroll 16
    for (int col = 0; col < (TX - 1) * S + K; col++) {
      const V z = V::load(row[ky] + at + col * ps);
#pragma GCC unroll 8
      for (int t = 0; t < TX; t++) {
        const int kx = col - t * S;
        if (kx >= 0 && kx < K) acc[t] = fma(z, w[ky * K + kx], acc[t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < TX; t++) put(acc[t], t);
}

template <class V, class S, int K, int SW, class T>
void convolve_row(const Depthwise<T>& p, const Item& it, const T* const* row, int64_t ps, T* out, Ahead<S>& ahead) {
  constexpr int TX = Tile::tx;
  const int64_t cp = round_up(p.c, channel_quantum);
  constexpr int64_t stretch = 4 * TX;  // of pixels between two fetches
  ahead.start((it.channels + V::N - 1) / V::N * ((p.wo + stretch - 1) / stretch));
  for (int64_t c = 0; c < it.channels; c += V::N) {
    V w[K * K];
    for (int k = 0; k < K * K; k++) w[k] = V::load(p.weight + k * cp + it.c0 + c);
    const T* r[K];
    for (int k = 0; k < K; k++) r[k] = row[k] + c;
    int64_t x = 0;
    auto put = [&](V v, int t) { v.store(out + (x + t) * ps + c); };
    for (int64_t end = stretch; x < p.wo / TX * TX; end += stretch) {
      ahead.step();
      for (; x < least(end, p.wo / TX * TX); x += TX) convolve_tile<V, K, SW, TX>(r, x * SW * ps, ps, w, put);
    }
    for (; x < p.wo; x++) convolve_tile<V, K, SW, 1>(r, x * SW * ps, ps, w, put);
  }
}

template <class V, class T>  // any kernel size, stride and dilation
void convolve_row_any(const Depthwise<T>& p, const Item& it, const T* const* row, int64_t ps, T* out) {
  const int64_t cp = round_up(p.c, channel_quantum);
  for (int64_t c = 0; c < it.channels; c += V::N)
    for (int64_t x = 0; x < p.wo; x++) {
      V acc = V::zero();
      for (int ky = 0; ky < p.kh; ky++)
        for (int kx = 0; kx < p.kw; kx++)
          acc = fma(V::load(row[ky] + (x * p.sw + kx * p.dw) * ps + c),
                    V::load(p.weight + (ky * p.kw + kx) * cp + it.c0 + c), acc);
      acc.store(out + x * ps + c);
    }
}

// Stores a finished row in y's dtype and sums what was stored.
template <class V, class S, class T>
void store_row(const Depthwise<T>& p, const Item& it, const ForwardScratch<T>& s, int64_t ps, S* y, bool first) {
  constexpr int U = int(channel_quantum) / V::N;
  for (int64_t c = 0; c < it.channels; c += channel_quantum) {
    const int64_t left = it.channels - c;
    if (p.measure && first) {  // no mean known yet: pivot on this row's
      V sum[U];
      for (int u = 0; u < U; u++) sum[u] = V::zero();
      for (int64_t x = 0; x < p.wo; x++)
        for (int u = 0; u < U; u++) sum[u] = sum[u] + V::load(s.out + x * ps + c + u * V::N);
      for (int u = 0; u < U; u++) (sum[u] * V::set1(T(1) / T(p.wo))).store(s.pivot + c + u * V::N);
    }
    V pivot[U], s1[U], s2[U];
    for (int u = 0; u < U; u++) pivot[u] = V::load(s.pivot + c + u * V::N), s1[u] = s2[u] = V::zero();
    with_stores<V>(left >= channel_quantum, p.stream, y + c, p.c, [&](auto lanes) {
      for (int64_t x = 0; x < p.wo; x++) {
#pragma GCC unroll 16
        for (int u = 0; u < U; u++) {
          V v = V::load(s.out + x * ps + c + u * V::N);
          store_lanes<lanes.value>(v, y + x * p.c + c + u * V::N, left - u * V::N);
          if (sizeof(S) < sizeof(T)) v = rounded<S>(v);  // the statistics are those of the stored tensor
          const V d = v - pivot[u];
          s1[u] = s1[u] + d;
          s2[u] = fma(d, d, s2[u]);
        }
      }
    });
    if (p.measure)
      for (int u = 0; u < U; u++) {
        accumulate(s.s1 + c + u * V::N, s1[u], V::N);
        accumulate(s.s2 + c + u * V::N, s2[u], V::N);
      }
  }
}

template <class S, class T = typename Arithmetic<S>::type>
size_t depthwise_forward_scratch(const Depthwise<T>& p) {
  Arena a{nullptr};
  ForwardScratch<T>::make(a, p);
  return a.used;
}

template <class S, class T = typename Arithmetic<S>::type>
void depthwise_forward(const Depthwise<T>& p, int64_t begin, int64_t end, Moments moments, char* scratch) {
  using V = typename Vec<T>::type;
  Arena arena{scratch};
  const ForwardScratch<T> s = ForwardScratch<T>::make(arena, p);
  const int64_t ps = line_stride(p.block);
  s.z.clear_all();
  const S* xs = static_cast<const S*>(p.x);
  S* ys = static_cast<S*>(p.out);
  const bool dense = p.dh == 1 && p.dw == 1 && p.sh == p.sw && p.kh == p.kw;

  for (int64_t i = begin; i < end; i++) {
    const Item it = work_item(p, i, p.ho);
    s.z.forget();
    const bool known = p.measure && moments.count[it.c0] > 0;
    if (p.measure)
      for (int64_t c = 0; c < it.channels; c++) {
        s.s1[c] = s.s2[c] = 0;
        s.pivot[c] = known ? T(moments.mean[it.c0 + c]) : T(0);
      }
    auto fill = [&](T* line, int64_t r) {
      const S* x = xs + ((it.n * p.h + r) * p.w) * p.c + it.c0;
      with_act(p.norm.act, [&](auto act) {
        normalise<act.value, V>(x, p.c, p.w, it.channels, p.norm.mean + it.c0, p.norm.scale + it.c0, p.norm.shift + it.c0,
                                line + p.pad_left * ps, ps);
      });
    };
    for (int64_t oy = it.row0; oy < it.row1; oy++) {
      constexpr int most_rows = 64;  // kernels are at most this tall; the tensor side checks
      const T* row[most_rows];
      const int64_t top = oy * p.sh - p.pad_top;
      for (int ky = 0; ky < p.kh; ky++) row[ky] = s.z.row(top + ky * p.dh, fill);
      S* y = ys + ((it.n * p.ho + oy) * p.wo) * p.c + it.c0;
      Ahead<S> ahead{};  // the row to be stored, and the input rows that the next one is the first to need
      if (p.fetch && !p.stream) ahead.add(y, p.wo, it.channels, p.c);
      for (int64_t r = top + p.kh; p.fetch && r < least(p.h, top + p.kh + p.sh); r++)
        if (r >= 0 && ahead.count < 4) ahead.add(xs + ((it.n * p.h + r) * p.w) * p.c + it.c0, p.w, it.channels, p.c);
      if (dense && p.kh == 3 && p.sh == 1) convolve_row<V, S, 3, 1>(p, it, row, ps, s.out, ahead);
      else if (dense && p.kh == 3 && p.sh == 2) convolve_row<V, S, 3, 2>(p, it, row, ps, s.out, ahead);
      else if (dense && p.kh == 5 && p.sh == 1) convolve_row<V, S, 5, 1>(p, it, row, ps, s.out, ahead);
      else if (dense && p.kh == 5 && p.sh == 2) convolve_row<V, S, 5, 2>(p, it, row, ps, s.out, ahead);
      else if (dense && p.kh == 7 && p.sh == 1) convolve_row<V, S, 7, 1>(p, it, row, ps, s.out, ahead);
      else convolve_row_any<V>(p, it, row, ps, s.out);
      store_row<V, S>(p, it, s, ps, y, !known && oy == it.row0);
    }
    if (p.measure)
      for (int64_t c = 0; c < it.channels; c++)
        merge_moments(moments, it.c0 + c, double((it.row1 - it.row0) * p.wo), double(s.pivot[c]), s.s1[c], s.s2[c]);
  }
  finish_streams();
}

// ---------------------------------------------------------------- backward
// Written over q = ix + pad_left = S * m + phase. The taps of phase are kx = phase + S * j, and tap j reads output
// column m - j:   gz[q] += w[ky, kx] gy[m - j]    gw[ky, kx] += z[q] gy[m - j]
// The same holds down the rows, so an input row of phase f meets the taps ky = f + S * i only.

template <class T> struct BackwardScratch {
  Ring<T> gy;
  T *z, *gz;             // one row each, in q columns
  T *gw;                 // [kh * kw][ps], one item's sums
  double *gp, *gpx;      // the norm's sums over one item
  int64_t margin;        // zero columns left of gy's first
  static BackwardScratch make(Arena& a, const Depthwise<T>& p) {
    const int64_t ps = line_stride(p.block), reach = (p.kw - 1) * p.dw;
    const int64_t columns = (p.w + p.pad_left + p.sw - 1) / p.sw;
    BackwardScratch s;
    s.margin = (reach + p.sw - 1) / p.sw;
    s.gy = Ring<T>::make(a, (p.kh - 1) * p.dh / p.sh + 1, (s.margin + most(p.wo, columns)) * ps, p.ho);
    s.z = a.take<T>(columns * p.sw * ps);
    s.gz = a.take<T>(columns * p.sw * ps);
    s.gw = a.take<T>(p.kh * p.kw * ps);
    s.gp = a.take<double>(ps);
    s.gpx = a.take<double>(ps);
    return s;
  }
};

constexpr int taps_of(int k, int s, int phase) { return (k - phase + s - 1) / s; }

// gz of one channel vector along a row. `row[i]` is the gy line of tap ky = FY + S * i, shifted so that row[i][m] is
// column m.
template <class V, int K, int S, int FY, int TX, class T>
MNOPS_INLINE void input_grad_tile(const T* const* row, int64_t m, int64_t ps, const V* w, T* gz) {
  constexpr int J = (K - 1) / S, NY = taps_of(K, S, FY);
  V acc[TX * S];
  for (int t = 0; t < TX * S; t++) acc[t] = V::zero();
#pragma GCC unroll 8
  for (int i = 0; i < NY; i++) {
#pragma GCC unroll 16
    for (int col = -J; col < TX; col++) {
      const V gy = V::load(row[i] + (m + col) * ps);
#pragma GCC unroll 8
      for (int t = 0; t < TX; t++)
#pragma GCC unroll 2
        for (int f = 0; f < S; f++) {
          const int kx = f + S * (t - col);
          if (t >= col && kx < K) acc[t * S + f] = fma(gy, w[i * K + kx], acc[t * S + f]);
        }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < TX * S; t++) acc[t].store(gz + (m * S + t) * ps);
}

// gw of one channel vector along a row, for the taps of NY lines, in registers.
template <class V, int K, int S, int NY, int TX, class T>
MNOPS_INLINE void weight_grad_tile(const T* const* row, int64_t m, int64_t ps, const T* z, V* acc) {
  constexpr int J = (K - 1) / S;
  V zq[TX * S];
#pragma GCC unroll 8
  for (int t = 0; t < TX * S; t++) zq[t] = V::load(z + (m * S + t) * ps);
#pragma GCC unroll 8
  for (int i = 0; i < NY; i++) {
#pragma GCC unroll 16
    for (int col = -J; col < TX; col++) {
      const V gy = V::load(row[i] + (m + col) * ps);
#pragma GCC unroll 8
      for (int t = 0; t < TX; t++)
#pragma GCC unroll 2
        for (int f = 0; f < S; f++) {
          const int kx = f + S * (t - col);
          if (t >= col && kx < K) acc[i * K + kx] = fma(gy, zq[t * S + f], acc[i * K + kx]);
        }
    }
  }
}

template <class V, class E, int K, int S, int FY, class T>
void gradient_row(const Depthwise<T>& p, const Item& it, const BackwardScratch<T>& s, const T* const* row, int64_t ps,
                  Ahead<E>& ahead) {
  constexpr int NY = taps_of(K, S, FY), TX = S == 1 ? Tile::tx : (Tile::tx + 1) / 2;
  constexpr int group = K == 3 ? NY : 1;  // lines whose taps fit in registers together
  const int64_t cp = round_up(p.c, channel_quantum);
  const int64_t first = p.pad_left / S, last = (p.w + p.pad_left + S - 1) / S;
  constexpr int64_t stretch = 4 * TX;
  const int64_t tiled = first + (last - first) / TX * TX;
  ahead.start((it.channels + V::N - 1) / V::N * ((last - first + stretch - 1) / stretch));
  for (int64_t c = 0; c < it.channels; c += V::N) {
    const T* r[NY];
    for (int i = 0; i < NY; i++) r[i] = row[i] + c;
    if (p.out) {
      V w[NY * K];
      for (int i = 0; i < NY; i++)
        for (int kx = 0; kx < K; kx++) w[i * K + kx] = V::load(p.weight + ((FY + S * i) * K + kx) * cp + it.c0 + c);
      int64_t m = first;
      for (int64_t end = first + stretch; m < tiled; end += stretch) {
        ahead.step();
        for (; m < least(end, tiled); m += TX) input_grad_tile<V, K, S, FY, TX>(r, m, ps, w, s.gz + c);
      }
      for (; m < last; m++) input_grad_tile<V, K, S, FY, 1>(r, m, ps, w, s.gz + c);
    }
    if (p.need_weight)
      for (int i = 0; i < NY; i += group) {
        V acc[group * K];
        for (int k = 0; k < group * K; k++) acc[k] = V::zero();
        int64_t m = first;
        for (; m + TX <= last; m += TX) weight_grad_tile<V, K, S, group, TX>(r + i, m, ps, s.z + c, acc);
        for (; m < last; m++) weight_grad_tile<V, K, S, group, 1>(r + i, m, ps, s.z + c, acc);
        for (int g = 0; g < group; g++)
          for (int kx = 0; kx < K; kx++) {
            T* to = s.gw + ((FY + S * (i + g)) * K + kx) * ps + c;
            (V::load(to) + acc[g * K + kx]).store(to);
          }
      }
  }
}

template <class V, class T>  // any kernel size, stride and dilation; lines by tap row, null where no output row meets it
void gradient_row_any(const Depthwise<T>& p, const Item& it, const BackwardScratch<T>& s, const T* const* line, int64_t ps) {
  const int64_t cp = round_up(p.c, channel_quantum);
  for (int64_t c = 0; c < it.channels; c += V::N)
    for (int64_t ix = 0; ix < p.w; ix++) {
      const int64_t q = ix + p.pad_left;
      const V z = p.need_weight ? V::load(s.z + q * ps + c) : V::zero();
      V gz = V::zero();
      for (int ky = 0; ky < p.kh; ky++)
        for (int kx = 0; kx < p.kw && line[ky]; kx++) {
          const int64_t at = q - kx * p.dw;
          if (at % p.sw != 0) continue;
          const int64_t ox = at < 0 ? -1 : at / p.sw;
          if (ox < 0 || ox >= p.wo) continue;
          const V gy = V::load(line[ky] + ox * ps + c);
          gz = fma(gy, V::load(p.weight + (ky * p.kw + kx) * cp + it.c0 + c), gz);
          T* to = s.gw + (ky * p.kw + kx) * ps + c;
          fma(gy, z, V::load(to)).store(to);
        }
      gz.store(s.gz + q * ps + c);
    }
}

// Chain rule through the pending norm of one row, a cache line of channels at a time.
template <Act act, class V, class S, class T>
void finish_row(const Depthwise<T>& p, const Item& it, const BackwardScratch<T>& s, int64_t ps, const S* x, S* dx) {
  constexpr int U = int(channel_quantum) / V::N;
  for (int64_t c = 0; c < it.channels; c += channel_quantum) {
    const int64_t lanes = it.channels - c;
    NormBackward<V, U> norm(p.norm, it.c0 + c);
    with_stores<V>(lanes >= channel_quantum, p.stream, dx + c, p.c, [&](auto how) {
      for (int64_t j = 0; j < p.w; j++) {
        const T* from = s.gz + (j + p.pad_left) * ps + c;
        V gz[U];
#pragma GCC unroll 16
        for (int u = 0; u < U; u++) gz[u] = V::load(from + u * V::N);
        norm.template pixel<act, how.value>(gz, x + j * p.c + c, dx + j * p.c + c, lanes);
      }
    });
    norm.add_to(s.gp + c, s.gpx + c, channel_quantum);
  }
}

template <class S, class T = typename Arithmetic<S>::type>
size_t depthwise_backward_scratch(const Depthwise<T>& p) {
  Arena a{nullptr};
  BackwardScratch<T>::make(a, p);
  return a.used;
}

// dweight is [kh * kw][channel_pad(c)] and the norm's sums [channel_pad(c)], this thread's own, added to.
template <class S, class T = typename Arithmetic<S>::type>
void depthwise_backward(const Depthwise<T>& p, int64_t begin, int64_t end, double* dweight, NormSums sums, char* scratch) {
  using V = typename Vec<T>::type;
  Arena arena{scratch};
  const BackwardScratch<T> s = BackwardScratch<T>::make(arena, p);
  const int64_t ps = line_stride(p.block), cp = round_up(p.c, channel_quantum);
  const int64_t q_columns = (p.w + p.pad_left + p.sw - 1) / p.sw * p.sw;
  s.gy.clear_all();
  __builtin_memset(s.z, 0, q_columns * ps * sizeof(T));
  const S* xs = static_cast<const S*>(p.x);
  const S* gs = static_cast<const S*>(p.incoming.g);
  const S* ys = static_cast<const S*>(p.incoming.y);
  S* dxs = static_cast<S*>(p.out);
  const bool dense = p.dh == 1 && p.dw == 1 && p.sh == p.sw && p.kh == p.kw;

  for (int64_t i = begin; i < end; i++) {
    const Item it = work_item(p, i, p.h);
    s.gy.forget();
    __builtin_memset(s.gw, 0, p.kh * p.kw * ps * sizeof(T));
    for (int64_t c = 0; c < ps; c++) s.gp[c] = s.gpx[c] = 0;
    auto fill = [&](T* line, int64_t r) {
      const int64_t at = ((it.n * p.ho + r) * p.wo) * p.c + it.c0;
      const T *offset = p.incoming.offset + it.c0, *slope = p.incoming.slope + it.c0, *mean = p.incoming.mean + it.c0;
      with_flag(ys != nullptr, [&](auto measured) {
        correct<measured.value, V>(gs + at, ys + at, p.c, p.wo, it.channels, offset, slope, mean, line + s.margin * ps, ps);
      });
    };
    for (int64_t iy = it.row0; iy < it.row1; iy++) {
      const S* x = xs + ((it.n * p.h + iy) * p.w) * p.c + it.c0;
      if (p.need_weight)
        with_act(p.norm.act, [&](auto act) {
          normalise<act.value, V>(x, p.c, p.w, it.channels, p.norm.mean + it.c0, p.norm.scale + it.c0, p.norm.shift + it.c0,
                                  s.z + p.pad_left * ps, ps);
        });
      constexpr int most_rows = 64;
      const T* line[most_rows];
      const int64_t q = iy + p.pad_top;
      for (int ky = 0; ky < p.kh; ky++) {
        const int64_t at = q - ky * p.dh;
        line[ky] = at % p.sh != 0 ? nullptr : s.gy.row(at < 0 ? -1 : at / p.sh, fill) + s.margin * ps;
      }
      const T* met[most_rows];  // the lines of this row's phase, in order of tap
      int count = 0;
      for (int ky = 0; ky < p.kh; ky++)
        if (line[ky]) met[count++] = line[ky];
      Ahead<S> ahead{};
      S* dx = dxs ? dxs + ((it.n * p.h + iy) * p.w) * p.c + it.c0 : nullptr;
      if (p.fetch && dx && !p.stream) ahead.add(dx, p.w, it.channels, p.c);
      if (p.fetch && iy + 1 < it.row1) ahead.add(x + p.w * p.c, p.w, it.channels, p.c);
      if (p.fetch && (q + 1) % p.sh == 0 && (q + 1) / p.sh < p.ho) {
        const int64_t at = ((it.n * p.ho + (q + 1) / p.sh) * p.wo) * p.c + it.c0;
        ahead.add(gs + at, p.wo, it.channels, p.c);
        if (ys) ahead.add(ys + at, p.wo, it.channels, p.c);
      }
      if (dense && p.kh == 3 && p.sh == 1) gradient_row<V, S, 3, 1, 0>(p, it, s, met, ps, ahead);
      else if (dense && p.kh == 3 && p.sh == 2 && q % 2 == 0) gradient_row<V, S, 3, 2, 0>(p, it, s, met, ps, ahead);
      else if (dense && p.kh == 3 && p.sh == 2) gradient_row<V, S, 3, 2, 1>(p, it, s, met, ps, ahead);
      else if (dense && p.kh == 5 && p.sh == 1) gradient_row<V, S, 5, 1, 0>(p, it, s, met, ps, ahead);
      else if (dense && p.kh == 5 && p.sh == 2 && q % 2 == 0) gradient_row<V, S, 5, 2, 0>(p, it, s, met, ps, ahead);
      else if (dense && p.kh == 5 && p.sh == 2) gradient_row<V, S, 5, 2, 1>(p, it, s, met, ps, ahead);
      else if (dense && p.kh == 7 && p.sh == 1) gradient_row<V, S, 7, 1, 0>(p, it, s, met, ps, ahead);
      else gradient_row_any<V>(p, it, s, line, ps);
      if (dx)
        with_act(p.norm.act, [&](auto act) {
          finish_row<act.value, V, S>(p, it, s, ps, x, dx);
        });
    }
    for (int64_t c = 0; c < it.channels; c++) {
      sums.gp[it.c0 + c] += s.gp[c];
      sums.gpx[it.c0 + c] += s.gpx[c];
    }
    if (p.need_weight)
      for (int k = 0; k < p.kh * p.kw; k++)
        for (int64_t c = 0; c < it.channels; c++) dweight[k * cp + it.c0 + c] += double(s.gw[k * ps + c]);
  }
  finish_streams();
}

}  // namespace
}  // namespace mnops
