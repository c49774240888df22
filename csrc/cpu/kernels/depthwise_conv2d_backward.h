// The backward of a depthwise convolution that normalised on load, in one pass down the rows: the gradient of x, of the weight
// and the sums of the pending norm. g, y and x are read once, dx is written once; lines and groups as in depthwise_conv2d.h.
//
// Written over q = ix + pad_left = S * m + phase. The taps of phase are kx = phase + S * j, and tap j reads output
// column m - j:   gz[q] += w[ky, kx] gy[m - j]    gw[ky, kx] += z[q] gy[m - j]
// The same holds down the rows, so an input row of phase f meets the taps ky = f + S * i only.
#pragma once
#include "cpu/kernels/depthwise_conv2d.h"

namespace mnops {
namespace {

template <class T> struct BackwardScratch {
  Ring<T> gy;
  T *z, *gz;             // one group of one row each, in q columns
  T *gw;                 // [kh * kw][channels], one item's sums
  double *gp, *gpx;      // the norm's sums over one item
  int64_t margin;        // elements of the zero columns left of gy's first
  static BackwardScratch make(Arena& a, const Depthwise<T>& p) {
    const int64_t channels = round_up(p.block, channel_quantum), reach = (p.kw - 1) * p.dw;
    const int64_t columns = (p.w + p.pad_left + p.sw - 1) / p.sw, margin = (reach + p.sw - 1) / p.sw;
    BackwardScratch s;
    s.margin = margin * channel_quantum;
    s.gy = Ring<T>::make(a, (p.kh - 1) * p.dh / p.sh + 1, margin + most(p.wo, columns), channels, p.ho);
    s.z = a.take<T>(columns * p.sw * channel_quantum);
    s.gz = a.take<T>(columns * p.sw * channel_quantum);
    s.gw = a.take<T>(p.kh * p.kw * channels);
    s.gp = a.take<double>(channels);
    s.gpx = a.take<double>(channels);
    return s;
  }
};

constexpr int taps_of(int k, int s, int phase) { return (k - phase + s - 1) / s; }

// gz of one channel vector along a row. `row[i]` is the gy line of tap ky = FY + S * i, shifted so that row[i][m] is
// column m.
template <class V, int K, int S, int FY, int TX, class T>
MNOPS_INLINE void input_grad_tile(const T* const* row, int64_t m, const V* w, T* gz) {
  constexpr int J = (K - 1) / S, NY = taps_of(K, S, FY);
  V acc[TX * S];
  for (int t = 0; t < TX * S; t++) acc[t] = V::zero();
#pragma GCC unroll 8
  for (int i = 0; i < NY; i++) {
#pragma GCC unroll 16
    for (int col = -J; col < TX; col++) {
      const V gy = V::load(row[i] + (m + col) * channel_quantum);
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
  for (int t = 0; t < TX * S; t++) acc[t].store(gz + (m * S + t) * channel_quantum);
}

// gw of one channel vector along a row, for the taps of NY lines, in registers.
template <class V, int K, int S, int NY, int TX, class T>
MNOPS_INLINE void weight_grad_tile(const T* const* row, int64_t m, const T* z, V* acc) {
  constexpr int J = (K - 1) / S;
  V zq[TX * S];
#pragma GCC unroll 8
  for (int t = 0; t < TX * S; t++) zq[t] = V::load(z + (m * S + t) * channel_quantum);
#pragma GCC unroll 16
  for (int col = -J; col < TX; col++) {  // outside: the sums of all lines take turns, so that their latency is hidden
#pragma GCC unroll 8
    for (int i = 0; i < NY; i++) {
      const V gy = V::load(row[i] + (m + col) * channel_quantum);
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

// One group of one row: gz and the weight gradient. weight and gw are the group's, cp and ps apart.
template <class V, int K, int S, int FY, class T>
void gradient_group(const Depthwise<T>& p, const BackwardScratch<T>& s, const T* const* row, const T* weight, int64_t cp, T* gw,
                    int64_t ps, int64_t channels) {
  constexpr int NY = taps_of(K, S, FY), TX = S == 1 ? Tile::tx : (Tile::tx + 1) / 2;
  constexpr int group = K == 3 ? NY : 1;  // lines whose taps fit in registers together
  const int64_t first = p.pad_left / S, last = (p.w + p.pad_left + S - 1) / S;
  for (int64_t c = 0; c < channels; c += V::N) {
    const T* r[NY];
    for (int i = 0; i < NY; i++) r[i] = row[i] + c;
    if (p.out) {
      V w[NY * K];
      for (int i = 0; i < NY; i++)
        for (int kx = 0; kx < K; kx++) w[i * K + kx] = V::load(weight + ((FY + S * i) * K + kx) * cp + c);
      int64_t m = first;
      for (; m + TX <= last; m += TX) input_grad_tile<V, K, S, FY, TX>(r, m, w, s.gz + c);
      for (; m < last; m++) input_grad_tile<V, K, S, FY, 1>(r, m, w, s.gz + c);
    }
    if (p.need_weight)
      for (int i = 0; i < NY; i += group) {
        V acc[group * K];
        for (int k = 0; k < group * K; k++) acc[k] = V::zero();
        int64_t m = first;
        for (; m + TX <= last; m += TX) weight_grad_tile<V, K, S, group, TX>(r + i, m, s.z + c, acc);
        for (; m < last; m++) weight_grad_tile<V, K, S, group, 1>(r + i, m, s.z + c, acc);
        for (int g = 0; g < group; g++)
          for (int kx = 0; kx < K; kx++) {
            T* to = gw + ((FY + S * (i + g)) * K + kx) * ps + c;
            (V::load(to) + acc[g * K + kx]).store(to);
          }
      }
  }
}

template <class V, class T>  // any kernel size, stride and dilation; lines by tap row, null where no output row meets it
void gradient_group_any(const Depthwise<T>& p, const BackwardScratch<T>& s, const T* const* line, const T* weight, int64_t cp,
                        T* gw, int64_t ps, int64_t channels) {
  for (int64_t c = 0; c < channels; c += V::N)
    for (int64_t ix = 0; ix < p.w; ix++) {
      const int64_t q = ix + p.pad_left;
      const V z = p.need_weight ? V::load(s.z + q * channel_quantum + c) : V::zero();
      V gz = V::zero();
      for (int ky = 0; ky < p.kh; ky++)
        for (int kx = 0; kx < p.kw && line[ky]; kx++) {
          const int64_t at = q - kx * p.dw;
          if (at % p.sw != 0) continue;
          const int64_t ox = at < 0 ? -1 : at / p.sw;
          if (ox < 0 || ox >= p.wo) continue;
          const V gy = V::load(line[ky] + ox * channel_quantum + c);
          gz = fma(gy, V::load(weight + (ky * p.kw + kx) * cp + c), gz);
          T* to = gw + (ky * p.kw + kx) * ps + c;
          fma(gy, z, V::load(to)).store(to);
        }
      gz.store(s.gz + q * channel_quantum + c);
    }
}

// Chain rule through the pending norm of one group of one row; c0 is its first channel, c that in the item.
template <Act act, class V, class S, class T>
void finish_gradient(const Depthwise<T>& p, const BackwardScratch<T>& s, int64_t c0, int64_t c, int64_t channels, const S* x,
                     S* dx, Ahead<S>& ahead) {
  constexpr int U = int(channel_quantum) / V::N;
  NormBackward<V, U> norm(p.norm, c0);
  with_stores<V>(channels == channel_quantum, p.stream, dx, p.c, [&](auto how) {
    for (int64_t j = 0; j < p.w;) {
      ahead.step();
      for (const int64_t end = least(p.w, j + stretch); j < end; j++) {
        const T* from = s.gz + (j + p.pad_left) * channel_quantum;
        V gz[U];
#pragma GCC unroll 16
        for (int u = 0; u < U; u++) gz[u] = V::load(from + u * V::N);
        norm.template pixel<act, how.value>(gz, x + j * p.c, dx + j * p.c, channels);
      }
    }
  });
  norm.add_to(s.gp + c, s.gpx + c, channel_quantum);
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
  const int64_t ps = round_up(p.block, channel_quantum), cp = round_up(p.c, channel_quantum);
  s.gy.clear_all();
  __builtin_memset(s.z, 0, (p.w + p.pad_left + p.sw - 1) / p.sw * p.sw * channel_quantum * sizeof(T));
  const S* xs = static_cast<const S*>(p.x);
  const S* gs = static_cast<const S*>(p.incoming.g);
  const S* ys = static_cast<const S*>(p.incoming.y);
  S* dxs = static_cast<S*>(p.out);

  for (int64_t i = begin; i < end; i++) {
    const Item it = work_item(p, i, p.h);
    s.gy.forget();
    __builtin_memset(s.gw, 0, p.kh * p.kw * ps * sizeof(T));
    for (int64_t c = 0; c < ps; c++) s.gp[c] = s.gpx[c] = 0;
    auto y_row = [&](int64_t r) { return ((it.n * p.ho + r) * p.wo) * p.c + it.c0; };
    for (int64_t iy = it.row0; iy < it.row1; iy++) {
      const int64_t x_row = ((it.n * p.h + iy) * p.w) * p.c + it.c0;
      const S* const x = xs + x_row;
      S* const dx = dxs ? dxs + x_row : nullptr;
      const T* line[most_rows];
      Fresh<T> fresh;
      const int64_t q = iy + p.pad_top;
      for (int ky = 0; ky < p.kh; ky++) {
        const int64_t at = q - ky * p.dh;
        line[ky] = at % p.sh != 0 ? nullptr : s.gy.row(at < 0 ? -1 : at / p.sh, fresh) + s.margin;
      }
      Ahead<S> ahead{};  // the row to be stored, and what the next one is the first to need
      if (p.fetch && dx && !p.stream) ahead.add(dx, p.w, it.channels, p.c);
      if (p.fetch && iy + 1 < it.row1) ahead.add(x + p.w * p.c, p.w, it.channels, p.c);
      if (p.fetch && (q + 1) % p.sh == 0 && (q + 1) / p.sh < p.ho) {
        ahead.add(gs + y_row((q + 1) / p.sh), p.wo, it.channels, p.c);
        if (ys) ahead.add(ys + y_row((q + 1) / p.sh), p.wo, it.channels, p.c);
      }
      ahead.start((it.channels + channel_quantum - 1) / channel_quantum * stretches(p.w) * (p.need_weight + (dx != nullptr)));
      for (int64_t c = 0; c < it.channels; c += channel_quantum) {
        const int64_t channels = least(channel_quantum, it.channels - c), c0 = it.c0 + c, at = c / channel_quantum * s.gy.group;
        for (int f = 0; f < fresh.count; f++) {
          const int64_t from = y_row(fresh.lines[f].row) + c;
          with_flag(ys != nullptr, [&](auto measured) {
            correct<measured.value, V>(gs + from, ys + from, p.c, p.wo, channels, p.incoming.offset + c0, p.incoming.slope + c0,
                                       p.incoming.mean + c0, fresh.lines[f].line + at + s.margin, channel_quantum);
          });
        }
        if (p.need_weight) normalise_group<V>(p, x + c, c0, channels, s.z, ahead);
        const T *group[most_rows], *met[most_rows];  // all lines, and those of this row's phase, in order of tap
        int count = 0;
        for (int ky = 0; ky < p.kh; ky++) {
          group[ky] = line[ky] ? line[ky] + at : nullptr;
          if (line[ky]) met[count++] = group[ky];
        }
        const T* const weight = p.weight + c0;
        T* const gw = s.gw + c;
        with_window(p, [&](auto k, auto stride) {
          constexpr int K = k.value, SW = stride.value;
          if constexpr (K == 0) gradient_group_any<V>(p, s, group, weight, cp, gw, ps, channels);
          else if (SW == 2 && q % 2) gradient_group<V, K, SW, SW - 1>(p, s, met, weight, cp, gw, ps, channels);
          else gradient_group<V, K, SW, 0>(p, s, met, weight, cp, gw, ps, channels);
        });
        if (dx) with_act(p.norm.act, [&](auto act) { finish_gradient<act.value, V>(p, s, c0, c, channels, x + c, dx + c, ahead); });
      }
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
