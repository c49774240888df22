// Pointwise convolution (a matrix product over pixels) that normalises while it packs and measures while it stores,
// forward and backward.
//
// Parallel over blocks of mc pixels. A block is packed once into column panels [k / nr][mc][nr] (the pending norm and
// activation are applied there, so they cost one pass over data that is being copied anyway); the micro-kernel then
// multiplies mr x nr tiles into a small buffer in L1, and a pass over that buffer stores, sums statistics, or applies
// the chain rule. Forward, input gradient and weight gradient are one micro-kernel with other strides:
//   forward          y [m, o] = sum_k z [m, k] W[o, k]      panels of z,  W packed by o
//   input gradient   gz[m, k] = sum_o gy[m, o] W[o, k]      panels of gy, W packed by k
//   weight gradient  gw[o, k] = sum_m gy[m, o] z[m, k]      both panels as they are
// Bytes moved: x and y once forward; g, y, x (twice, the second time from L2) and dx backward; plus the weights from
// L2/L3 once a block. It loses where k and o are both tiny (then the packing is the work).
//
// P is what is multiplied: the arithmetic type, or bf16 where the CPU has an instruction for that, whose sums are fp32. Then
// z, gy and the weights are rounded as they are packed, as stock PyTorch rounds them in bf16 or under autocast.
#pragma once
#include "cpu/kernels/common.h"

namespace mnops {
namespace {

template <class V> struct Shape {
  static constexpr int nv = Tile::nv, nr = V::N * nv, mr = Tile::mr;
};

// So many steps of k lie side by side in a packed panel of weights, [k / kr][nr][kr].
template <class P> constexpr int kr = sizeof(P) == 2 ? 4 : 1;

// put(r, v, sum over panels, then k, of A(r, k) B[k][v]); A(r, k) = a[r * rs + k * ks] inside a panel of panel_k. RS and KS
// are those strides where they are known, else 0. `ahead` makes a step at each panel.
template <class V, int MR, int RS, int KS, class Put, class Ahead>
MNOPS_INLINE void micro_kernel(const typename V::T* a, int64_t panel_stride, int64_t k, int64_t panel_k, const typename V::T* b,
                               Put put, Ahead&& ahead, int64_t rs = RS, int64_t ks = KS) {
  constexpr int NV = Shape<V>::nv, NR = Shape<V>::nr;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[r][v] = V::zero();
  // Where an FMA can take one element of a vector, a load of A serves several steps of k (of a whole panel), or several
  // rows: 0.25 loads an FMA for 8 x 2 vectors, instead of 0.63.
  if constexpr (Tile::by_element && KS == 1 && RS == NR)
    for (; k >= NR; k -= NR, a += panel_stride) {
      ahead.step();
#pragma GCC unroll 4
      for (int kk = 0; kk < NR; kk += V::N) {
        V av[MR];
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) av[r] = V::load(a + r * RS + kk);
#pragma GCC unroll 4
        for (int i = 0; i < V::N; i++, b += NR)
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++) {
            const V bv = V::load(b + v * V::N);
#pragma GCC unroll 16
            for (int r = 0; r < MR; r++) acc[r][v] = fma_element(av[r], i, bv, acc[r][v]);
          }
      }
    }
  for (; k > 0; k -= panel_k, a += panel_stride) {
    const int64_t steps = least(k, panel_k);
    const typename V::T* ak = a;
    ahead.step();
#pragma GCC unroll 4
    for (int64_t kk = 0; kk < steps; kk++, ak += KS ? KS : ks, b += NR) {
      V bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) bv[v] = V::load(b + v * V::N);
      if constexpr (Tile::by_element && RS == 1 && MR % V::N == 0) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++) acc[r][v] = fma_element(V::load(ak + r / V::N * V::N), r % V::N, bv[v], acc[r][v]);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) {
          const V av = V::set1(ak[r * (RS ? RS : rs)]);
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++) acc[r][v] = fma(av, bv[v], acc[r][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) put(r, v, acc[r][v]);
}

// The same of bf16, four steps of k at a time, and one step ahead in all: more would make this short loop longer by half. Where
// the steps of k run down the rows of A's panel (KS > 1), B is such a panel too.
template <class V, int MR, int RS, int KS, class Put, class Ahead>
MNOPS_INLINE void micro_kernel(const bf16* a, int64_t panel_stride, int64_t k, int64_t, const bf16* b, Put put, Ahead&& ahead) {
  constexpr int NR = Shape<V>::nr;
  static_assert(MR == 8 && NR == 8, "four factors of two rows each");
  using F = typename V::Factor;
  V acc[MR / 2][NR / 2];
#pragma GCC unroll 4
  for (int r = 0; r < MR / 2; r++)
#pragma GCC unroll 4
    for (int c = 0; c < NR / 2; c++) acc[r][c] = V::zero();
  auto multiply = [&](const F* av, const F* bv) {
#pragma GCC unroll 4
    for (int r = 0; r < MR / 2; r++)
#pragma GCC unroll 4
      for (int c = 0; c < NR / 2; c++) acc[r][c] = fma(av[r], bv[c], acc[r][c]);
  };
  if constexpr (KS > 1) {
    for (; k > 0; k -= 4, a += 4 * KS, b += 4 * KS) {
      F av[MR / 2], bv[NR / 2];
      F::load_transposed(a, av), F::load_transposed(b, bv);
      multiply(av, bv);
    }
  } else {
    auto multiply_packed = [&](const F* av, const bf16* packed) {
      F bv[NR / 2];
#pragma GCC unroll 4
      for (int c = 0; c < NR / 2; c++) bv[c] = F::load(packed + 8 * c);
      multiply(av, bv);
    };
    ahead.step();
    for (; k > 0; k -= NR, a += panel_stride, b += NR * NR) {
      F left[MR / 2], right[MR / 2];
#pragma GCC unroll 4
      for (int r = 0; r < MR / 2; r++) F::load_rows(a + 2 * r * RS, left[r], right[r]);
      multiply_packed(left, b);
      if (k <= 4) break;
      multiply_packed(right, b + 4 * NR);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < MR / 2; r++)
#pragma GCC unroll 2
    for (int c = 0; c < NR / 2; c += 2) {
      V two[2];
      V::to_rows(acc[r][c], acc[r][c + 1], two);
      put(2 * r, c / 2, two[0]), put(2 * r + 1, c / 2, two[1]);
    }
}

// Steps of `ahead` in the product of `rows` rows, k long, with `panels` panels of weights.
template <class V, class P> MNOPS_INLINE int64_t product_steps(int64_t rows, int64_t k, int64_t panels) {
  return (rows + Shape<V>::mr - 1) / Shape<V>::mr * (kr<P> > 1 ? 1 : (k + Shape<V>::nr - 1) / Shape<V>::nr) * panels;
}

// f(tag of a height, first row) for the micro-tiles of so many rows. Where the last one would be partly empty, as many tiles
// as it lacks rows are one row lower: the 49 pixels of a 7 x 7 map are 4 x 6 + 5 x 5, not 9 x 6.
template <class V, class P, class F> MNOPS_INLINE void in_tiles(int64_t rows, F f) {
  constexpr int MR = Shape<V>::mr;
  const int64_t tiles = (rows + MR - 1) / MR, lower = tiles * MR - rows, full = kr<P> > 1 || lower > tiles ? tiles : tiles - lower;
  int64_t r = 0;
  for (; r < full * MR; r += MR) f(IntTag<MR>{}, r);
  if constexpr (kr<P> == 1)
    for (; r < rows; r += MR - 1) f(IntTag<MR - 1>{}, r);
}

// Block product: tile[rows][nr] = panels of A times one packed panel of B, `rows` rounded up to mr. `ahead` is fetched
// meanwhile.
template <class V, class P, class Ahead>
void multiply_block(const P* a, int64_t mc, int64_t rows, int64_t k, const P* b, typename V::T* tile, Ahead&& ahead) {
  constexpr int NR = Shape<V>::nr;
  in_tiles<V, P>(rows, [&](auto height, int64_t r) {
    micro_kernel<V, height.value, NR, 1>(
        a + r * NR, mc * NR, k, NR, b, [&](int i, int v, V c) { c.store(tile + (r + i) * NR + v * V::N); }, ahead);
  });
}

// Weight gradient of one panel pair: gw[o0 .. o0 + nr)[nr] += sum over rows of gy panel^T z panel; `first`: = that.
// nr output channels are cut into micro-tiles of about mr rows: 16 = 6 + 5 + 5 on AVX2.
template <class V, int left, class P>
MNOPS_INLINE void multiply_transposed(const P* gy, const P* z, int64_t rows, bool first, typename V::T* gw) {
  constexpr int NR = Shape<V>::nr, tiles = (left + Shape<V>::mr - 1) / Shape<V>::mr, MR = (left + tiles - 1) / tiles;
  for (int r = 0; r < MR; r++) prefetch_to_write(gw + r * NR);
  auto put = [&](int r, int v, V c) {
    typename V::T* to = gw + r * NR + v * V::N;
    (first ? c : V::load(to) + c).store(to);
  };
  micro_kernel<V, MR, 1, NR>(gy, 0, rows, rows, z, put, NothingAhead{});
  if constexpr (left > MR) multiply_transposed<V, left - MR>(gy + MR, z, rows, first, gw + MR * NR);
}

// Elements of a packed panel of weights that is `k` steps long.
template <class P, class T> MNOPS_INLINE int64_t panel_size(int64_t k) {
  return round_up(k, kr<P>) * Shape<typename Vec<T>::type>::nr;
}
template <class P, class T> size_t panel_bytes(int64_t k) { return panel_size<P, T>(k) * sizeof(P); }

// Packs panels [panel_begin, panel_end) over o of a dense (o, k) matrix: panel p - panel_begin of dst holds w[p * nr + i][k],
// zero beyond o and k.
template <class P, class T> void pack_columns(const T* w, int64_t o, int64_t k, int64_t panel_begin, int64_t panel_end, void* dst) {
  using V = typename Vec<T>::type;
  constexpr int NR = Shape<V>::nr, N = V::N, KR = kr<P>;
  for (int64_t p = panel_begin; p < panel_end; p++) {
    P* const to = static_cast<P*>(dst) + (p - panel_begin) * panel_size<P, T>(k);
    for (int v = 0; v < NR; v += N) {
      const int64_t o0 = p * NR + v, rows = least(N, o - o0);
      int64_t kk = 0;
      if constexpr (KR > 1) {
        for (; kk < k; kk += KR)
          for (int i = 0; i < N; i++)
            (i < rows ? load_some<V>(w + (o0 + i) * k + kk, k - kk) : V::zero()).store(to + kk * NR + (v + i) * KR);
      } else {
        if (rows == N)
          for (; kk + N <= k; kk += N) V::transpose(w + o0 * k + kk, k, to + kk * NR + v, NR);
        for (; kk < k; kk++)
          for (int i = 0; i < N; i++) to[kk * NR + v + i] = i < rows ? w[(o0 + i) * k + kk] : T(0);
      }
    }
  }
}

// The same of panels over k, o steps long: w[o][p * nr + i].
template <class P, class T> void pack_rows(const T* w, int64_t o, int64_t k, int64_t panel_begin, int64_t panel_end, void* dst) {
  using V = typename Vec<T>::type;
  constexpr int NR = Shape<V>::nr, KR = kr<P>;
  for (int64_t p = panel_begin; p < panel_end; p++) {
    const int64_t lanes = least(NR, k - p * NR);
    for (int64_t i = 0; i < o; i += KR) {
      const T* const from = w + i * k + p * NR;
      P* const to = static_cast<P*>(dst) + (p - panel_begin) * panel_size<P, T>(o) + i * NR;
      if constexpr (KR > 1) {
        for (int j = 0; j < NR; j += V::N) {
          T rows[KR][V::N], columns[V::N][KR];
          for (int q = 0; q < KR; q++)
            (i + q < o ? load_lanes<Lanes::some, V>(from + q * k + j, lanes - j) : V::zero()).store(rows[q]);
          V::transpose(rows[0], V::N, columns[0], KR);
          for (int v = 0; v < V::N; v++) V::load(columns[v]).store(to + (j + v) * KR);
        }
      } else if (lanes == NR) {
        for (int j = 0; j < NR; j++) to[j] = from[j];
      } else {
        for (int j = 0; j < NR; j++) to[j] = j < lanes ? from[j] : T(0);
      }
    }
  }
}

// Pixels [m0, m0 + rows) of z, panels [panel_begin, panel_end) of its channels.
template <class V, class S, class P, class T>
MNOPS_INLINE void pack_pixels(const Pointwise<T>& p, int64_t m0, int64_t rows, int64_t panel_begin, int64_t panel_end, P* panels) {
  constexpr int NR = Shape<V>::nr;
  const S* x = static_cast<const S*>(p.x) + m0 * p.k;
  with_act(p.norm.act, [&](auto act) {
    for (int64_t q = panel_begin; q < panel_end; q++, panels += p.mc * NR)
      normalise<act.value, V, Shape<V>::nv>(x + q * NR, p.k, rows, least(NR, p.k - q * NR), p.norm.mean + q * NR,
                                            p.norm.scale + q * NR, p.norm.shift + q * NR, panels, NR);
  });
}

// ---------------------------------------------------------------- forward

// The packed pixels times their image's factors. A second pass, but over what lies in L1.
template <class V, class P, class T> MNOPS_INLINE void multiply_by_gate(const Pointwise<T>& p, int64_t m0, int64_t rows, P* panel, int64_t c) {
  constexpr int NV = Shape<V>::nv, NR = Shape<V>::nr;
  for (int64_t m = m0; m < m0 + rows;) {
    const int64_t n = m / p.image, end = least(m0 + rows, (n + 1) * p.image);
    V factor[NV];
    for (int v = 0; v < NV; v++) factor[v] = V::load(p.gate + n * round_up(p.k, channel_quantum) + c + v * V::N);
    for (; m < end; m++, panel += NR)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) (V::load(panel + v * V::N) * factor[v]).store(panel + v * V::N);
  }
}

template <class P, class T> size_t pointwise_forward_scratch(const Pointwise<T>& p) {
  using V = typename Vec<T>::type;
  Arena a{nullptr};
  a.take<P>(round_up(p.k, Shape<V>::nr) * p.mc);
  a.take<T>(p.mc * Shape<V>::nr);
  if (!p.packed) a.take<P>(panel_size<P, T>(p.k));
  return a.used;
}

// Stores one finished panel of y in its dtype and sums what was stored.
template <class V, class S, class T>
void store_panel(const Pointwise<T>& p, int64_t m0, int64_t rows, int64_t o0, const T* tile, Moments moments) {
  constexpr int NV = Shape<V>::nv, NR = Shape<V>::nr;
  const int64_t lanes = least(NR, p.o - o0);
  V pivot[NV], s1[NV], s2[NV];
  for (int v = 0; v < NV; v++) pivot[v] = s1[v] = s2[v] = V::zero();
  if (p.measure && moments.count[o0] > 0) {
    T mean[NR] = {};
    for (int64_t i = 0; i < lanes; i++) mean[i] = T(moments.mean[o0 + i]);
    for (int v = 0; v < NV; v++) pivot[v] = V::load(mean + v * V::N);
  } else if (p.measure) {  // no mean known yet: pivot on this block's
    for (int64_t r = 0; r < rows; r++)
      for (int v = 0; v < NV; v++) {
        const V t = V::load(tile + r * NR + v * V::N);
        pivot[v] = pivot[v] + (sizeof(S) < sizeof(T) ? rounded<S>(t) : t);  // of one value the variance is 0
      }
    for (int v = 0; v < NV; v++) pivot[v] = pivot[v] * V::set1(T(1) / T(rows));
  }
  S* y = static_cast<S*>(p.out) + m0 * p.o + o0;
  with_stores<V>(lanes == NR, p.stream, y, p.o, [&](auto how) {
    for (int64_t r = 0; r < rows; r++, y += p.o)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        V t = V::load(tile + r * NR + v * V::N);
        store_lanes<how.value>(t, y + v * V::N, lanes - v * V::N);
        if (sizeof(S) < sizeof(T)) t = rounded<S>(t);  // the statistics are those of the stored tensor
        const V d = t - pivot[v];
        s1[v] = s1[v] + d;
        s2[v] = fma(d, d, s2[v]);
      }
  });
  if (p.measure) {
    T a[NR], b[NR], c[NR];
    for (int v = 0; v < NV; v++) pivot[v].store(a + v * V::N), s1[v].store(b + v * V::N), s2[v].store(c + v * V::N);
    merge_moments(moments, o0, lanes, double(rows), a, b, c);
  }
}

// Pixels [begin, end) of y, panels [panel_begin, panel_end) of its channels.
template <class S, class P, class T = typename Arithmetic<S>::type>
void pointwise_forward(const Pointwise<T>& p, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end,
                       Moments moments, char* scratch) {
  using V = typename Vec<T>::type;
  constexpr int NR = Shape<V>::nr;
  Arena arena{scratch};
  P* z = arena.take<P>(round_up(p.k, NR) * p.mc);
  T* tile = arena.take<T>(p.mc * NR);
  P* own = p.packed ? nullptr : arena.take<P>(panel_size<P, T>(p.k));
  const P* packed = static_cast<const P*>(p.packed);
  const S* x = static_cast<const S*>(p.x);
  for (int64_t m0 = begin; m0 < end; m0 += p.mc) {
    const int64_t rows = least(p.mc, end - m0), next = m0 + rows, next_rows = least(p.mc, end - next);
    const int64_t panels = (p.k + NR - 1) / NR;
    pack_pixels<V, S>(p, m0, rows, 0, panels, z);
    for (int64_t q = 0; p.gate && q < panels; q++) multiply_by_gate<V>(p, m0, rows, z + q * p.mc * NR, q * NR);
    Ahead<S> ahead{};
    ahead.add(x + next * p.k, next_rows, p.k, p.k);
    ahead.start(product_steps<V, P>(rows, p.k, panel_end - panel_begin));
    for (int64_t j = panel_begin; j < panel_end; j++) {
      if (own) pack_columns<P>(p.weight, p.o, p.k, j, j + 1, own);
      multiply_block<V>(z, p.mc, rows, p.k, own ? own : packed + j * panel_size<P, T>(p.k), tile, ahead);
      store_panel<V, S>(p, m0, rows, j * NR, tile, moments);
    }
  }
  finish_streams();
}

// ---------------------------------------------------------------- backward

template <class P, class T> size_t pointwise_backward_scratch(const Pointwise<T>& p) {
  using V = typename Vec<T>::type;
  constexpr int NR = Shape<V>::nr;
  Arena a{nullptr};
  a.take<P>(round_up(p.o, NR) * p.mc);
  a.take<P>(round_up(p.k, NR) * p.mc);
  a.take<T>(p.mc * NR);
  if (!p.packed) a.take<P>(panel_size<P, T>(p.o));
  return a.used;
}

template <class V, class S, class P, class T>
MNOPS_INLINE void pack_incoming(const Pointwise<T>& p, int64_t m0, int64_t rows, P* panels) {
  constexpr int NR = Shape<V>::nr;
  const S* g = static_cast<const S*>(p.incoming.g) + m0 * p.o;
  const S* y = p.incoming.y ? static_cast<const S*>(p.incoming.y) + m0 * p.o : nullptr;
  with_flag(y != nullptr, [&](auto measured) {
    for (int64_t q = 0; q * NR < p.o; q++)
      correct<measured.value, V, Shape<V>::nv>(g + q * NR, y + q * NR, p.o, rows, least(NR, p.o - q * NR),
                                               p.incoming.offset + q * NR, p.incoming.slope + q * NR,
                                               p.incoming.mean + q * NR, panels + q * p.mc * NR, NR);
  });
}

// gw is [ceil(k / nr)][round_up(o, nr)][nr], added to after the first block. A few panels of gy stay in L1/L2 while all panels of z pass.
template <class V, class P, class T>
void weight_gradient(const Pointwise<T>& p, int64_t rows, P* gy, P* z, int64_t panel_begin, int64_t panel_end, bool first, T* gw) {
  constexpr int NR = Shape<V>::nr;
  const int64_t op = round_up(p.o, NR), panels = op / NR, held = most(1, 32 * 1024 / int64_t(sizeof(P)) / (rows * NR));
  if constexpr (kr<P> > 1) {  // zeros fill up the last of the steps
    const int64_t at = rows * NR, bytes = (round_up(rows, kr<P>) - rows) * NR * sizeof(P);
    for (int64_t i = 0; i < panels; i++) __builtin_memset(gy + i * p.mc * NR + at, 0, bytes);
    for (int64_t j = 0; j < panel_end - panel_begin; j++) __builtin_memset(z + j * p.mc * NR + at, 0, bytes);
  }
  for (int64_t i0 = 0; i0 < panels; i0 += held)
    for (int64_t j = panel_begin; j < panel_end; j++)
      for (int64_t i = i0; i < least(panels, i0 + held); i++)
        multiply_transposed<V, NR>(gy + i * p.mc * NR, z + (j - panel_begin) * p.mc * NR, rows, first, gw + (j * op + i * NR) * NR);
}

// Chain rule through the pending norm of one panel: gp, its sums, and dx = gp * scale.
template <Act act, class V, class S, class T>
void finish_panel(const Pointwise<T>& p, int64_t m0, int64_t rows, int64_t k0, const T* tile, NormSums sums) {
  constexpr int NV = Shape<V>::nv, NR = Shape<V>::nr;
  const int64_t lanes = least(NR, p.k - k0);
  NormBackward<V, NV> norm(p.norm, k0);
  const S* x = static_cast<const S*>(p.x) + m0 * p.k + k0;
  S* dx = static_cast<S*>(p.out) + m0 * p.k + k0;
  with_stores<V>(lanes == NR, p.stream, dx, p.k, [&](auto how) {
    for (int64_t r = 0; r < rows; r++) {
      V gz[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) gz[v] = V::load(tile + r * NR + v * V::N);
      norm.template pixel<act, how.value>(gz, x + r * p.k, dx + r * p.k, lanes);
    }
  });
  norm.add_to(sums.gp + k0, sums.gpx + k0, lanes);
}

// Pixels [begin, end), panels [panel_begin, panel_end) of x's channels.
template <class S, class P, class T = typename Arithmetic<S>::type>
void pointwise_backward(const Pointwise<T>& p, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end, T* gw,
                        NormSums sums, char* scratch) {
  using V = typename Vec<T>::type;
  constexpr int NR = Shape<V>::nr;
  Arena arena{scratch};
  P* gy = arena.take<P>(round_up(p.o, NR) * p.mc);
  P* z = arena.take<P>(round_up(p.k, NR) * p.mc);
  T* tile = arena.take<T>(p.mc * NR);
  P* own = p.packed ? nullptr : arena.take<P>(panel_size<P, T>(p.o));
  const P* packed = static_cast<const P*>(p.packed);
  const S* g = static_cast<const S*>(p.incoming.g);
  const S* y = static_cast<const S*>(p.incoming.y);
  for (int64_t m0 = begin; m0 < end; m0 += p.mc) {
    const int64_t rows = least(p.mc, end - m0), next = m0 + rows, next_rows = least(p.mc, end - next);
    Ahead<S> ahead{};
    ahead.add(g + next * p.o, next_rows, p.o, p.o);
    if (y) ahead.add(y + next * p.o, next_rows, p.o, p.o);
    ahead.add(static_cast<const S*>(p.x) + next * p.k, next_rows, p.k, p.k);
    ahead.start(product_steps<V, P>(rows, p.o, panel_end - panel_begin));
    pack_incoming<V, S>(p, m0, rows, gy);
    if (p.need_weight) pack_pixels<V, S>(p, m0, rows, panel_begin, panel_end, z);
    if (p.out)
      for (int64_t j = panel_begin; j < panel_end; j++) {
        if (own) pack_rows<P>(p.weight, p.o, p.k, j, j + 1, own);
        multiply_block<V>(gy, p.mc, rows, p.o, own ? own : packed + j * panel_size<P, T>(p.o), tile, ahead);
        with_act(p.norm.act, [&](auto act) { finish_panel<act.value, V, S>(p, m0, rows, j * NR, tile, sums); });
      }
    if (p.need_weight) weight_gradient<V>(p, rows, gy, z, panel_begin, panel_end, m0 == begin, gw);
  }
  finish_streams();
}

}  // namespace
}  // namespace mnops
