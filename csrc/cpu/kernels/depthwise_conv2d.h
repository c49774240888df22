// Depthwise convolution that normalises on load and measures on store, forward; depthwise_conv2d_backward.h has its backward.
//
// Parallel over work items: (image, band of rows, block of channels). Inside an item the kernel walks down the rows, and along
// each row by groups of channel_quantum channels, a cache line of fp32. Each input row is read once, normalised once into a line
// of a small ring buffer (padded with zeros, so the convolution itself has no bounds test), and serves every tap from there.
// A line is [group][column][channel_quantum]: what one group of a row needs lies together in L1, neighbouring pixels a constant
// apart; the lines of the rows before come from L2. Meanwhile the next rows are fetched from memory, in the order of their
// addresses whatever the order of the work. Bytes moved: x and y once forward; g, y, x and dx once backward; the floor of the
// fused form. It loses where an image is a pixel or two wide: the ring then costs as much as the convolution.
#pragma once
#include "cpu/kernels/common.h"

namespace mnops {
namespace {

struct Item {
  int64_t n, c0, channels, row0, row1;
};

template <class T> MNOPS_INLINE Item work_item(const Depthwise<T>& p, int64_t index, int64_t rows) {
  const int64_t blocks = (p.c + p.block - 1) / p.block;
  const int64_t b = index % blocks, band = index / blocks % p.bands, n = index / blocks / p.bands;
  return {n, b * p.block, least(p.block, p.c - b * p.block), band * p.band, least(rows, (band + 1) * p.band)};
}

constexpr int most_rows = 64 + 2 * Tile::ty;  // kernels are at most 64 tall; the tensor side checks

// Lines that the rows at hand are the first to need.
template <class T> struct Fresh {
  struct Line {
    T* line;
    int64_t row;
  } lines[most_rows];
  int count = 0;
};

// A ring of lines: the line of row r stays until a row that shares its slot is asked for.
template <class T> struct Ring {
  T* lines;
  int64_t* tag;
  int64_t slots, group, size, rows;  // elements of one group of a line, of a line
  const T* zeros;

  static Ring make(Arena& arena, int64_t slots, int64_t columns, int64_t channels, int64_t rows) {
    const int64_t group = columns * channel_quantum, size = round_up(channels, channel_quantum) / channel_quantum * group;
    Ring r{arena.take<T>((slots + 1) * size), arena.take<int64_t>(slots), slots, group, size, rows, nullptr};
    r.zeros = r.lines + slots * size;
    return r;
  }
  void clear_all() const { __builtin_memset(lines, 0, (slots + 1) * size * sizeof(T)); }
  void forget() const { for (int64_t i = 0; i < slots; i++) tag[i] = -1; }
  MNOPS_INLINE const T* row(int64_t r, Fresh<T>& fresh) const {
    if (r < 0 || r >= rows) return zeros;
    T* const line = lines + r % slots * size;
    if (tag[r % slots] != r) fresh.lines[fresh.count++] = {line, tag[r % slots] = r};
    return line;
  }
};

// One group of a row of x into its group of a line, a copy where nothing is pending; c0 is its first channel.
template <class V, class S, class T, class Ahead>
void normalise_group(const Depthwise<T>& p, const S* x, int64_t c0, int64_t channels, T* line, Ahead&& ahead) {
  line += p.pad_left * channel_quantum;
  if (p.norm.identity && p.norm.act == Act::none && sizeof(S) == sizeof(T) && channels == channel_quantum) {
    for (int64_t j = 0; j < p.w; j++, x += p.c, line += channel_quantum) {
      if (j % stretch == 0) ahead.step();
      __builtin_memcpy(line, x, channel_quantum * sizeof(T));
    }
    return;
  }
  with_act(p.norm.act, [&](auto act) {
    normalise<act.value, V>(x, p.c, p.w, channels, p.norm.mean + c0, p.norm.scale + c0, p.norm.shift + c0, line, channel_quantum,
                            ahead);
  });
}

// TY x TX neighbouring outputs of one channel vector: every loaded input serves all taps of all of them. out[i](v, to) takes
// those of row i, `stride` apart.
// Loads per FMA in the stride-1 interior, K 3: 4 * 9 / (9 * 14) = 0.29 for 2 x 7, 3 * 6 / (9 * 4) = 0.5 for 1 x 4.
template <class V, int K, int S, int TY, int TX, class T, class E, class Out>
MNOPS_INLINE void convolve_tile(const T* const* row, const V* w, E* const* y, int64_t stride, Out* out) {
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
MNOPS_INLINE void convolve_tiles(const T** row, const V* w, E** y, int64_t stride, int64_t left, Out* out) {
  for (; left >= TX; left -= TX) {
    convolve_tile<V, K, S, TY, TX>(row, w, y, stride, out);
    for (int k = 0; k < (TY - 1) * S + K; k++) row[k] += TX * S * channel_quantum;
    for (int i = 0; i < TY; i++) y[i] += TX * stride;
  }
  if constexpr (TX > 1)
    if (left > 0) convolve_tiles<V, K, S, TY, TX / 2>(row, w, y, stride, left, out);
}

// One vector of channels of a row of outputs, any kernel size, stride and dilation.
template <class V, class T, class E, class Out>
void convolve_any(const Depthwise<T>& p, const T* const* row, const T* weight, int64_t x, E* y, int64_t stride, int64_t left,
                  Out& out) {
  const int64_t cp = round_up(p.c, channel_quantum);
  for (; left > 0; left--, x++, y += stride) {
    V acc = V::zero();
    for (int ky = 0; ky < p.kh; ky++)
      for (int kx = 0; kx < p.kw; kx++)
        acc = fma(V::load(row[ky] + (x * p.sw + kx * p.dw) * channel_quantum), V::load(weight + (ky * p.kw + kx) * cp), acc);
    out(acc, y);
  }
}

// Calls f(tag of K, tag of S) where there is a tile for the kernel size and stride, with 0 and 0 elsewhere.
template <class T, class F> MNOPS_INLINE void with_window(const Depthwise<T>& p, F f) {
  const bool square = p.dh == 1 && p.dw == 1 && p.sh == p.sw && p.kh == p.kw;
  if (square && p.kh == 3 && p.sh == 1) f(IntTag<3>{}, IntTag<1>{});
  else if (square && p.kh == 3 && p.sh == 2) f(IntTag<3>{}, IntTag<2>{});
  else if (square && p.kh == 5 && p.sh == 1) f(IntTag<5>{}, IntTag<1>{});
  else if (square && p.kh == 5 && p.sh == 2) f(IntTag<5>{}, IntTag<2>{});
  else if (square && p.kh == 7 && p.sh == 1) f(IntTag<7>{}, IntTag<1>{});
  else f(IntTag<0>{}, IntTag<0>{});
}

// ---------------------------------------------------------------- forward

template <class T> struct ForwardScratch {
  Ring<T> z;
  T *out, *pivot;       // one group of one row of y, as computed
  double *s1, *s2;      // sums of (y - pivot) and its square over the item
  static ForwardScratch make(Arena& a, const Depthwise<T>& p) {
    const int64_t channels = round_up(p.block, channel_quantum);
    const int64_t columns = most(p.w + p.pad_left, (p.wo - 1) * p.sw + (p.kw - 1) * p.dw + 1);
    ForwardScratch s;
    s.z = Ring<T>::make(a, (p.kh - 1) * p.dh + 1 + (Tile::ty - 1) * p.sh, columns, channels, p.h);
    s.out = a.take<T>(p.wo * channel_quantum);
    s.pivot = a.take<T>(channels);
    s.s1 = a.take<double>(channels);
    s.s2 = a.take<double>(channels);
    return s;
  }
};

// What becomes of a finished vector: kept for store_group, or at once stored in y's dtype, and what was stored is summed.
struct Keep {
  template <class V, class T> MNOPS_INLINE void operator()(V v, T* to) { v.store(to); }
};
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

// One group of one row of y, into s.out; c is its first channel in the item.
template <class V, int K, int SW, class T>
MNOPS_INLINE void convolve_group(const Depthwise<T>& p, const T* weight, const ForwardScratch<T>& s, const T* const* row,
                                 int64_t channels) {
  const int64_t cp = round_up(p.c, channel_quantum);
  Keep keep;
  for (int64_t c = 0; c < channels; c += V::N) {
    T* to = s.out + c;
    const T* r[K > 0 ? K : most_rows];
    for (int k = 0; k < (K > 0 ? K : p.kh); k++) r[k] = row[k] + c;
    if constexpr (K > 0) {
      V w[K * K];
      for (int k = 0; k < K * K; k++) w[k] = V::load(weight + k * cp + c);
      convolve_tiles<V, K, SW, 1, Tile::tx>(r, w, &to, channel_quantum, p.wo, &keep);
    } else {
      convolve_any<V>(p, r, weight + c, 0, to, channel_quantum, p.wo, keep);
    }
  }
}

// Stores a finished group of a row in y's dtype and sums what was stored.
template <class V, class S, class T>
void store_group(const Depthwise<T>& p, const ForwardScratch<T>& s, int64_t c, int64_t channels, S* y, bool first) {
  constexpr int U = int(channel_quantum) / V::N;
  if (p.measure && first) {  // no mean known yet: pivot on this row's
    V sum[U];
    for (int u = 0; u < U; u++) sum[u] = V::zero();
    for (int64_t x = 0; x < p.wo; x++)
      for (int u = 0; u < U; u++) sum[u] = sum[u] + V::load(s.out + x * channel_quantum + u * V::N);
    for (int u = 0; u < U; u++) (sum[u] * V::set1(T(1) / T(p.wo))).store(s.pivot + c + u * V::N);
  }
  V pivot[U], s1[U], s2[U];
  for (int u = 0; u < U; u++) pivot[u] = V::load(s.pivot + c + u * V::N), s1[u] = s2[u] = V::zero();
  with_stores<V>(channels == channel_quantum, p.stream, y, p.c, [&](auto lanes) {
    for (int64_t x = 0; x < p.wo; x++) {
#pragma GCC unroll 16
      for (int u = 0; u < U; u++) {
        V v = V::load(s.out + x * channel_quantum + u * V::N);
        store_lanes<lanes.value>(v, y + x * p.c + u * V::N, channels - u * V::N);
        if (sizeof(S) < sizeof(T)) v = rounded<S>(v);  // the statistics are those of the stored tensor
        const V d = v - pivot[u];
        s1[u] = s1[u] + d;
        s2[u] = fma(d, d, s2[u]);
      }
    }
  });
  if (p.measure)
    for (int u = 0; u < U; u++) accumulate(s.s1 + c + u * V::N, s1[u], V::N), accumulate(s.s2 + c + u * V::N, s2[u], V::N);
}

// One group of TY rows of y from registers to memory, measured on the way, where a tile and its statistics fit the registers.
// Not inlined: the tile then has them all.
template <class V, int K, int SW, int TY, bool measure, class S, class T>
__attribute__((noinline)) void finish_group(const Depthwise<T>& p, const T* weight, const ForwardScratch<T>& s,
                                            const T* const* row, int64_t c0, int64_t channels, S* y) {
  const int64_t cp = round_up(p.c, channel_quantum), stride = p.c, width = p.wo;
  for (int64_t c = 0; c < channels; c += V::N) {
    V w[K * K];
    const T* from = weight + c;
    for (int k = 0; k < K * K; k++, from += cp) w[k] = V::load(from);
    const T* r[(TY - 1) * SW + K];
    for (int k = 0; k < (TY - 1) * SW + K; k++) r[k] = row[k] + c;
    S* to[TY];
    for (int i = 0; i < TY; i++) to[i] = y + i * width * stride + c;
    with_lanes(channels - c >= V::N, [&](auto how) {
      constexpr int TX = how.value == Lanes::all ? Tile::tx : 1;
      Finish<V, S, how.value, measure> out[TY];  // a chain of sums a row, so that its latency is hidden
      for (int i = 0; i < TY; i++) out[i] = {channels - c, V::load(s.pivot + c0 + c), V::zero(), V::zero()};
      convolve_tiles<V, K, SW, TY, TX>(r, w, to, stride, width, out);
      if constexpr (measure) {
        for (int i = 1; i < TY; i++) out[0].s1 = out[0].s1 + out[i].s1, out[0].s2 = out[0].s2 + out[i].s2;
        accumulate(s.s1 + c0 + c, out[0].s1, V::N);
        accumulate(s.s2 + c0 + c, out[0].s2, V::N);
      }
    });
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
  s.z.clear_all();
  const S* xs = static_cast<const S*>(p.x);
  S* ys = static_cast<S*>(p.out);

  for (int64_t i = begin; i < end; i++) {
    const Item it = work_item(p, i, p.ho);
    s.z.forget();
    const bool known = p.measure && moments.count[it.c0] > 0;
    for (int64_t c = 0; p.measure && c < it.channels; c++) {
      s.s1[c] = s.s2[c] = 0;
      s.pivot[c] = known ? T(moments.mean[it.c0 + c]) : T(0);
    }
    auto x_row = [&](int64_t r) { return xs + ((it.n * p.h + r) * p.w) * p.c + it.c0; };
    with_window(p, [&](auto k, auto stride) {
      constexpr int K = k.value, SW = stride.value;
      constexpr bool direct = Tile::direct && K > 0;
      for (int64_t oy = it.row0, rows; oy < it.row1; oy += rows) {
        const bool pivoted = known || !p.measure || oy > it.row0;
        const bool pair = direct && Tile::ty == 2 && K == 3 && pivoted && oy + 1 < it.row1;
        rows = pair ? 2 : 1;
        const int64_t top = oy * p.sh - p.pad_top, lines = (rows - 1) * p.sh + p.kh;
        const T* row[most_rows];
        Fresh<T> fresh;
        for (int ky = 0; ky < lines; ky++) row[ky] = s.z.row(top + ky * p.dh, fresh);
        S* const y = ys + ((it.n * p.ho + oy) * p.wo) * p.c + it.c0;
        Ahead<S> ahead{};  // the row to be stored, and the input rows that the next one is the first to need
        if (p.fetch && !p.stream) ahead.add(y, p.wo, it.channels, p.c);
        for (int64_t r = most(0, top + lines); p.fetch && r < least(p.h, top + lines + p.sh) && !ahead.full(); r++)
          ahead.add(x_row(r), p.w, it.channels, p.c);
        ahead.start((it.channels + channel_quantum - 1) / channel_quantum * fresh.count * stretches(p.w));
        for (int64_t c = 0; c < it.channels; c += channel_quantum) {
          const int64_t channels = least(channel_quantum, it.channels - c), at = c / channel_quantum * s.z.group;
          const T* const weight = p.weight + it.c0 + c;
          for (int f = 0; f < fresh.count; f++)
            normalise_group<V>(p, x_row(fresh.lines[f].row) + c, it.c0 + c, channels, fresh.lines[f].line + at, ahead);
          const T* r[most_rows];
          for (int ky = 0; ky < lines; ky++) r[ky] = row[ky] + at;
          if constexpr (direct) {
            if (pivoted) {
              with_flag(p.measure, [&](auto measure) {
                if (pair) finish_group<V, K, SW, K == 3 ? Tile::ty : 1, measure.value>(p, weight, s, r, c, channels, y + c);
                else finish_group<V, K, SW, 1, measure.value>(p, weight, s, r, c, channels, y + c);
              });
              continue;
            }
          }
          convolve_group<V, K, SW>(p, weight, s, r, channels);
          store_group<V>(p, s, c, channels, y + c, !known && oy == it.row0);
        }
      }
    });
    if (p.measure)
      merge_moments(moments, it.c0, it.channels, double((it.row1 - it.row0) * p.wo), s.pivot, s.s1, s.s2);
  }
  finish_streams();
}

}  // namespace
}  // namespace mnops
