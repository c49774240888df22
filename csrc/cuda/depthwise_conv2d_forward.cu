// depthwise_conv2d forward, tuned: 3x3 and 5x5, stride 1 and 2, NHWC, fp32, fp16, bf16.
//
// A thread owns VEC channels (neighbouring threads the next ones: a warp reads whole lines) of STRIP neighbouring pixels of
// y and slides down the rows: every row of x is loaded once in a band, a row ahead of its use, normalised in registers and
// added to the OPEN rows of sums that it is part of. No shared memory but for the taps and the last sums. Bytes moved: x
// once, but for STRIDE columns' overlap of strips, which the L1 has, and K - STRIDE rows' overlap of bands (2 in 28); y
// once: the floor is x + y. Statistics: each thread's around its own first value, merged by block, then by finish.cuh.
// It loses where bands are short (a batch of one), and where STRIP does not divide the width.
#include "cuda/depthwise_conv2d.cuh"
#include "cuda/tiles.cuh"

namespace mnops::cuda {
namespace {

template <class S, class T, int K, int STRIDE, bool CLAMP>
__global__ void __launch_bounds__((ForwardTile<S, T, K, STRIDE>::THREADS), (ForwardTile<S, T, K, STRIDE>::resident(CLAMP)))
depthwise_conv2d_forward(DepthwiseForward<S, T> a, DepthwiseCut k) {
  using Tile = ForwardTile<S, T, K, STRIDE>;
  constexpr int VEC = Tile::VEC, STRIP = Tile::STRIP, NEW = Tile::NEW, SEEN = Tile::SEEN, OPEN = Tile::OPEN;
  constexpr int COLUMNS = Tile::COLUMNS, TAPS = K * K, CHANNELS = 128 / int(sizeof(S));
  constexpr int for_sums = Tile::THREADS * (2 * VEC + 1), for_taps = CHANNELS * TAPS;
  __shared__ T shared[for_sums > for_taps ? for_sums : for_taps];
  const DepthwiseShape& s = a.size;
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x), threads = int(blockDim.x * blockDim.y);
  const int64_t block_c = int64_t(blockIdx.x) * blockDim.x * VEC, c0 = block_c + threadIdx.x * VEC;
  const int channels = int(s.c - block_c < blockDim.x * VEC ? s.c - block_c : blockDim.x * VEC);

  for (int i = thread; i < channels * TAPS; i += threads) shared[i] = a.weight[block_c * TAPS + i];
  __syncthreads();
  T taps[TAPS][VEC] = {}, pivot[VEC] = {}, sum1[VEC] = {}, sum2[VEC] = {};
  int count = 0;
  if (c0 < s.c) {
#pragma unroll
    for (int q = 0; q < TAPS; q++)
#pragma unroll
      for (int v = 0; v < VEC; v++) taps[q][v] = shared[(threadIdx.x * VEC + v) * TAPS + q];
    FoldedNorm<S, T, VEC> norm;
    norm.load(a.norm, c0);
    const Bounds<T> bounds(a.norm.act);
    const int height = int(s.h), width = int(s.w);
    const int c = int(s.c);
    const unsigned step = opaque(unsigned(s.dw * c));
    const int64_t in_pitch = s.w * c, out_pitch = s.wo * c;

    for (int64_t lane = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; lane < k.lanes; lane += int64_t(gridDim.y) * blockDim.y) {
      const LanePosition at(lane, k, s);
      const int out_w = at.phase_w + s.dw * (at.strip * STRIP), out_h = at.phase_h + s.dh * (at.band * k.band);
      const int in_w = at.phase_w * STRIDE - s.pad_left + s.dw * (at.strip * STRIP * STRIDE);
      const int in_h = at.phase_h * STRIDE - s.pad_top + s.dh * (at.band * k.band * STRIDE + SEEN);
      const uint32_t in_mask = columns_inside<COLUMNS>(in_w, s.dw, width), out_mask = columns_inside<STRIP>(out_w, s.dw, int(s.wo));
      int rows = (int(s.ho) - out_h + s.dh - 1) / s.dh;
      rows = rows < k.band ? rows : k.band;
      if (rows <= 0 || !out_mask) continue;

      // Rows of step i: at i < 0 they fill the sums of the first rows of y; those that none needs are left out.
      const auto row = [&](int i, int t) { return in_h + s.dh * (STRIDE * i + t); };
      const auto inside = [&](int i, int t) {
        return (i > 1 - OPEN || SEEN + t >= STRIDE * (OPEN - 1)) && row(i, t) >= 0 && row(i, t) < height;
      };
      const S* const x = opaque(a.x + at.n * height * in_pitch + in_w * c + c0);
      S* const y = opaque(a.y + at.n * s.ho * out_pitch + out_w * c + c0);
      const auto load = [&](int i, int t, Bits<S, VEC>(&to)[COLUMNS]) {
        load_row_padded<S, VEC>(x + row(i, t) * in_pitch, step, inside(i, t) ? in_mask : 0u, to);
      };
      T open[OPEN][STRIP][VEC] = {};  // of y's row i + r, open at step i, the sums lie in open[(turn + r) % OPEN]
      Bits<S, VEC> raw[NEW][COLUMNS] = {};
#pragma unroll
      for (int t = 0; t < NEW; t++) load(1 - OPEN, t, raw[t]);
      for (int base = 1 - OPEN; base < rows; base += OPEN)
#pragma unroll
        for (int turn = 0; turn < OPEN; turn++) {  // unrolled: the sums take turns without moving a register
          const int i = base + turn;
          if (i >= rows) break;
          Bits<S, VEC> now[NEW][COLUMNS];
#pragma unroll
          for (int t = 0; t < NEW; t++) {
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) now[t][j] = raw[t][j];
            if (i + 1 < rows) load(i + 1, t, raw[t]);
          }
#pragma unroll
          for (int t = 0; t < NEW; t++) {
            if (!inside(i, t)) continue;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
              const bool there = in_mask >> j & 1;  // padding is 0 after the activation
              const T low = there ? bounds.low : T(0), high = there ? bounds.high : T(0);
              T z[VEC];
              widen_bits<S>(now[t][j], z);
#pragma unroll
              for (int v = 0; v < VEC; v++) {
                z[v] = norm.pre(z[v], v);
                if (CLAMP) z[v] = clamp(z[v], low, high);
                else z[v] = there ? activate(a.norm.act, z[v]) : T(0);
              }
#pragma unroll
              for (int r = 0; r < OPEN; r++)
#pragma unroll
                for (int o = 0; o < STRIP; o++) {
                  const int y_tap = SEEN + t - STRIDE * r, x_tap = j - o * STRIDE;
                  if (y_tap >= 0 && x_tap >= 0 && x_tap < K)
#pragma unroll
                    for (int v = 0; v < VEC; v++) open[(turn + r) % OPEN][o][v] += z[v] * taps[y_tap * K + x_tap][v];
                }
            }
          }
          T(&sums)[STRIP][VEC] = open[turn];
          if (i >= 0) {
            S* const out = opaque(y + (out_h + s.dh * i) * out_pitch);
#pragma unroll
            for (int o = 0; o < STRIP; o++) {
              Pack<S, VEC> pack;
              narrow_pack(sums[o], pack);
              T stored[VEC];
              widen_pack(pack, stored);
              if (o == 0 && count == 0)
#pragma unroll
                for (int v = 0; v < VEC; v++) pivot[v] = stored[v];
              if (out_mask >> o & 1) {
                store_bits(out + o * step, pack);
                count++;
#pragma unroll
                for (int v = 0; v < VEC; v++) {
                  const T away = stored[v] - pivot[v];
                  sum1[v] += away, sum2[v] += away * away;
                }
              }
            }
          }
#pragma unroll
          for (int o = 0; o < STRIP; o++)
#pragma unroll
            for (int v = 0; v < VEC; v++) sums[o][v] = 0;
        }
    }
  }

  if (!a.statistics) return;  // for all threads or none
  __syncthreads();            // the taps have been read
  T* const means = shared;
  T* const squares = means + Tile::THREADS * VEC;
  T* const counts = squares + Tile::THREADS * VEC;
  const T n = T(count ? count : 1);
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    means[thread * VEC + v] = pivot[v] + sum1[v] / n;
    squares[thread * VEC + v] = sum2[v] - sum1[v] * sum1[v] / n;
  }
  counts[thread] = T(count);
  __syncthreads();
  for (int i = thread; i < channels; i += threads) {
    const int x = i / VEC, row = int(blockDim.x);
    int first = 0;  // whose mean is near all others, so that differences keep their digits
    while (first < int(blockDim.y) - 1 && counts[first * row + x] == T(0)) first++;
    const T near = means[first * row * VEC + i];
    T total = 0, away = 0, m2 = 0;
    for (int y = first; y < int(blockDim.y); y++) {
      const T part = counts[y * row + x];
      total += part, away += part == T(0) ? T(0) : part * (means[y * row * VEC + i] - near);
    }
    away /= total == T(0) ? T(1) : total;
    for (int y = first; y < int(blockDim.y); y++) {
      const T part = counts[y * row + x], d = (means[y * row * VEC + i] - near) - away;
      m2 += part == T(0) ? T(0) : squares[y * row * VEC + i] + part * d * d;
    }
    T* out = a.statistics + int64_t(blockIdx.y) * s.c + block_c + i;
    out[0] = total, out[a.chunks * s.c] = near + away, out[2 * a.chunks * s.c] = m2;
  }
}

template <class S, int K, int STRIDE>
void run(DepthwiseForward<S, float>& a, const Prepare<DepthwiseForward<S, float>>& prepare, cudaStream_t stream) {
  const DepthwiseShape& s = a.size;
  const DepthwiseCut k = depthwise_cut<ForwardTile<S, float, K, STRIDE>, S>(s, ceil_div(s.ho, s.dh), ceil_div(s.wo, s.dw));
  a.chunks = k.grid.y;
  prepare(a);
  if (Bounds<float>::serve(a.norm.act)) launch(depthwise_conv2d_forward<S, float, K, STRIDE, true>, k.grid, k.block, 0, stream, a, k);
  else launch(depthwise_conv2d_forward<S, float, K, STRIDE, false>, k.grid, k.block, 0, stream, a, k);
}

}  // namespace

template <class S>
bool depthwise_forward(DepthwiseForward<S, float>& a, const Prepare<DepthwiseForward<S, float>>& prepare, cudaStream_t stream) {
  return depthwise_tuned(a.size, [&](auto kernel, auto stride) {
    constexpr int K = decltype(kernel)::value, STRIDE = decltype(stride)::value, VEC = ForwardTraits<S, K, STRIDE>::VEC;
    if (a.size.c % VEC || !aligned({a.x, a.y}, VEC * sizeof(S))) return false;
    run<S, K, STRIDE>(a, prepare, stream);
    return true;
  });
}

template bool depthwise_forward(DepthwiseForward<float, float>&, const Prepare<DepthwiseForward<float, float>>&, cudaStream_t);
template bool depthwise_forward(DepthwiseForward<__half, float>&, const Prepare<DepthwiseForward<__half, float>>&, cudaStream_t);
template bool depthwise_forward(DepthwiseForward<__nv_bfloat16, float>&, const Prepare<DepthwiseForward<__nv_bfloat16, float>>&, cudaStream_t);

}  // namespace mnops::cuda
