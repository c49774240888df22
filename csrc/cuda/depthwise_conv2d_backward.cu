// depthwise_conv2d backward, tuned, in one kernel: dx, the weight gradient and the sums of the norm's gradients. 3x3 and
// 5x5, stride 1 and 2, NHWC, fp32, fp16, bf16.
//
// Around a cell of STRIDE x STRIDE pixels of x the same OPEN x OPEN pixels of gy feed both gradients:
// gz += w[tap] * gy[tap], dw[tap] += z * gy[tap]. A thread owns VEC channels of STRIP neighbouring cells and slides down the
// rows of cells, with the window of gy, the taps and their gradients in registers; g, y and x are loaded a row ahead. Bytes
// moved: g, y and x once, dx once: the floor, but for the overlap of strips, which the L1 has, and OPEN - 1 rows of g and y
// a band. The weight gradient and the sums go to a workspace, a row a block, and are added by finish.cuh: no atomics.
// It loses where bands are short (a batch of one), and where STRIP does not divide the width.
#include "cuda/depthwise_conv2d.cuh"
#include "cuda/tiles.cuh"

namespace mnops::cuda {
namespace {

template <class S, class T, int K, int STRIDE, bool CLAMP>
__global__ void __launch_bounds__((BackwardTile<S, T, K, STRIDE>::THREADS), (BackwardTile<S, T, K, STRIDE>::resident(CLAMP)))
depthwise_conv2d_backward(DepthwiseBackward<S, T> a, DepthwiseCut k) {
  using Tile = BackwardTile<S, T, K, STRIDE>;
  constexpr int VEC = Tile::VEC, STRIP = Tile::STRIP, OPEN = Tile::OPEN, WINDOW = Tile::WINDOW, COLUMNS = Tile::COLUMNS;
  constexpr int TAPS = K * K, CHANNELS = 128 / int(sizeof(S)), AT_ONCE = 4;  // sums added up in shared memory at a time
  constexpr int for_sums = Tile::THREADS * VEC * AT_ONCE, for_taps = CHANNELS * TAPS;
  __shared__ T shared[for_sums > for_taps ? for_sums : for_taps];
  const DepthwiseShape& s = a.size;
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x), threads = int(blockDim.x * blockDim.y);
  const int64_t block_c = int64_t(blockIdx.x) * blockDim.x * VEC, c0 = block_c + threadIdx.x * VEC;
  const int channels = int(s.c - block_c < blockDim.x * VEC ? s.c - block_c : blockDim.x * VEC);

  for (int i = thread; i < channels * TAPS; i += threads) shared[i] = a.weight[block_c * TAPS + i];
  __syncthreads();
  T sums[TAPS + 2][VEC] = {};  // of the taps, of gp, of gp * (x - mean)
  if (c0 < s.c) {
    T taps[TAPS][VEC];
#pragma unroll
    for (int q = 0; q < TAPS; q++)
#pragma unroll
      for (int v = 0; v < VEC; v++) taps[q][v] = shared[(threadIdx.x * VEC + v) * TAPS + q];
    FoldedNorm<S, T, VEC> norm;
    norm.load(a.norm, c0);
    FoldedIncoming<S, T, VEC> incoming;
    incoming.load(a.incoming, c0);
    const Bounds<T> bounds(a.norm.act);
    const int height = int(s.h), width = int(s.w), out_height = int(s.ho);
    const int c = int(s.c), in_pitch = width * c, out_pitch = int(s.wo) * c;
    const unsigned step = opaque(unsigned(s.dw * c));

    for (int64_t lane = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; lane < k.lanes; lane += int64_t(gridDim.y) * blockDim.y) {
      const LanePosition at(lane, k, s);
      const int first_row = k.first_row + at.band * k.band, first_column = k.first_column + at.strip * STRIP;
      const int out_h = at.phase_h + s.dh * first_row, out_w = at.phase_w + s.dw * (first_column - (OPEN - 1));
      const int in_h = STRIDE * out_h - s.pad_top, in_w = STRIDE * (out_w + s.dw * (OPEN - 1)) - s.pad_left;
      const uint32_t out_mask = columns_inside<WINDOW>(out_w, s.dw, int(s.wo)), in_mask = columns_inside<COLUMNS>(in_w, s.dw, width);
      int rows = (height - in_h + s.dh * STRIDE - 1) / (s.dh * STRIDE);
      rows = rows < k.band ? rows : k.band;
      if (rows <= 0 || !in_mask) continue;

      const auto out_inside = [&](int i) { return out_h + s.dh * i >= 0 && out_h + s.dh * i < out_height; };
      const auto in_inside = [&](int i, int e) {
        const int h = in_h + s.dh * (STRIDE * i + e);
        return h >= 0 && h < height;
      };
      const int64_t out_image = at.n * s.ho * out_pitch + out_w * c + c0, in_image = at.n * s.h * in_pitch + in_w * c + c0;
      const auto out_row = [&](int i) { return out_image + int64_t(out_h + s.dh * i) * out_pitch; };
      const auto in_row = [&](int i, int e) { return in_image + int64_t(in_h + s.dh * (STRIDE * i + e)) * in_pitch; };
      Bits<S, VEC> raw_g[WINDOW] = {}, raw_y[WINDOW] = {}, raw_x[STRIDE][COLUMNS] = {};
      const auto load_out = [&](int i) {
        if (!out_inside(i)) return;
        load_row<S, VEC>(a.g + out_row(i), step, out_mask, raw_g);
        if (a.y) load_row<S, VEC>(a.y + out_row(i), step, out_mask, raw_y);
      };
      const auto load_in = [&](int i) {
#pragma unroll
        for (int e = 0; e < STRIDE; e++)
          if (in_inside(i, e)) load_row<S, VEC>(a.x + in_row(i, e), step, in_mask, raw_x[e]);
      };
      T window[OPEN][WINDOW][VEC];  // row i of gy lies in window[(i + OPEN - 1) % OPEN]
      const auto take_out = [&](int i, T(&to)[WINDOW][VEC]) {
        const uint32_t mask = out_inside(i) ? out_mask : 0u;
#pragma unroll
        for (int j = 0; j < WINDOW; j++) {
          T g[VEC], y[VEC];
          widen_bits<S>(raw_g[j], g), widen_bits<S>(raw_y[j], y);
#pragma unroll
          for (int v = 0; v < VEC; v++) to[j][v] = mask >> j & 1 ? incoming.gy(g[v], y[v], v) : T(0);
        }
      };
#pragma unroll
      for (int i = 0; i < OPEN - 1; i++) {
        load_out(i - (OPEN - 1));
        take_out(i - (OPEN - 1), window[i]);
      }
      load_out(0), load_in(0);
      for (int base = 0; base < rows; base += OPEN)
#pragma unroll
        for (int turn = 0; turn < OPEN; turn++) {  // unrolled: the window turns without moving a register
          const int i = base + turn;
          if (i >= rows) break;
          take_out(i, window[(turn + OPEN - 1) % OPEN]);
          Bits<S, VEC> now_x[STRIDE][COLUMNS];
#pragma unroll
          for (int e = 0; e < STRIDE; e++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) now_x[e][j] = in_mask >> j & 1 ? raw_x[e][j] : Bits<S, VEC>{};
          if (i + 1 < rows) load_out(i + 1), load_in(i + 1);
#pragma unroll
          for (int e = 0; e < STRIDE; e++) {
            if (!in_inside(i, e)) continue;
            S* const dx_row = opaque(a.dx + in_row(i, e));
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
              const bool there = in_mask >> j & 1;
              const int f = j % STRIDE, b0 = j / STRIDE + OPEN - 1;
              T x[VEC], pre[VEC], z[VEC], gz[VEC] = {};
              widen_bits<S>(now_x[e][j], x);
#pragma unroll
              for (int v = 0; v < VEC; v++) {
                pre[v] = norm.pre(x[v], v);
                if (CLAMP) z[v] = clamp(pre[v], there ? bounds.low : T(0), there ? bounds.high : T(0));
                else z[v] = there ? activate(a.norm.act, pre[v]) : T(0);
              }
#pragma unroll
              for (int p = 0; p < OPEN; p++)
#pragma unroll
                for (int q = 0; q < OPEN; q++)
                  if (e + STRIDE * p < K && f + STRIDE * q < K) {
                    const int tap = (e + STRIDE * p) * K + f + STRIDE * q, row = (turn + OPEN - 1 + OPEN - p) % OPEN;
#pragma unroll
                    for (int v = 0; v < VEC; v++) {
                      gz[v] += taps[tap][v] * window[row][b0 - q][v];
                      sums[tap][v] += z[v] * window[row][b0 - q][v];
                    }
                  }
              Pack<S, VEC> pack;
              T dx[VEC];
#pragma unroll
              for (int v = 0; v < VEC; v++) {
                T gp;
                if (CLAMP) gp = z[v] <= bounds.low || z[v] >= bounds.high ? T(0) : gz[v];  // so that pre need not be kept
                else gp = activate_grad(a.norm.act, gz[v], pre[v]);
                if (!there) gp = T(0);
                sums[TAPS][v] += gp, sums[TAPS + 1][v] += gp * (x[v] - norm.mean[v]);
                dx[v] = gp * norm.scale[v];
              }
              narrow_pack(dx, pack);
              if (there && a.dx) store_bits(dx_row + j * step, pack);
            }
          }
        }
    }
  }

#pragma unroll
  for (int first = 0; first < TAPS + 2; first += AT_ONCE) {
    __syncthreads();
#pragma unroll
    for (int q = 0; q < AT_ONCE; q++)
      if (first + q < TAPS + 2)
#pragma unroll
        for (int v = 0; v < VEC; v++) shared[(q * Tile::THREADS + thread) * VEC + v] = sums[first + q][v];
    __syncthreads();
    for (int i = thread; i < AT_ONCE * channels; i += threads) {
      const int q = first + i / channels, channel = i % channels;
      if (q >= TAPS + 2) continue;
      T total = 0;
      for (int y = 0; y < int(blockDim.y); y++)
        total += shared[((q - first) * Tile::THREADS + y * int(blockDim.x)) * VEC + channel];
      const int64_t c = block_c + channel, row = blockIdx.y;
      if (q < TAPS) {
        if (a.taps) a.taps[(row * s.c + c) * TAPS + q] = total;
      } else if (a.sums) a.sums[(row * 2 + q - TAPS) * s.c + c] = total;
    }
  }
}

// The first cell and how many there are along one dimension of a phase. Phase p of the output, p + d * i, meets the padded
// pixels p * stride + d * t, t = stride * i + tap: cell i holds `stride` of them. The range is that of the phase with most
// on either side.
struct Cells {
  int64_t first, count;
  Cells(int64_t size, int64_t before, int64_t stride, int64_t dilation) {
    const auto floor = [](int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); };
    const int64_t first_tap = -floor((dilation - 1) * stride - before, dilation), last_tap = (size - 1 + before) / dilation;
    first = floor(first_tap, stride), count = floor(last_tap, stride) - first + 1;
  }
};

template <class S, int K, int STRIDE>
void run(DepthwiseBackward<S, float>& a, const Prepare<DepthwiseBackward<S, float>>& prepare, cudaStream_t stream) {
  const DepthwiseShape& s = a.size;
  const Cells rows(s.h, s.pad_top, STRIDE, s.dh), columns(s.w, s.pad_left, STRIDE, s.dw);
  DepthwiseCut k = depthwise_cut<BackwardTile<S, float, K, STRIDE>, S>(s, rows.count, columns.count);
  k.first_row = int(rows.first), k.first_column = int(columns.first);
  a.chunks = k.grid.y;
  prepare(a);
  if (Bounds<float>::serve(a.norm.act)) launch(depthwise_conv2d_backward<S, float, K, STRIDE, true>, k.grid, k.block, 0, stream, a, k);
  else launch(depthwise_conv2d_backward<S, float, K, STRIDE, false>, k.grid, k.block, 0, stream, a, k);
}

}  // namespace

template <class S>
bool depthwise_backward(DepthwiseBackward<S, float>& a, const Prepare<DepthwiseBackward<S, float>>& prepare, cudaStream_t stream) {
  const DepthwiseShape& s = a.size;
  return depthwise_tuned(s, [&](auto kernel, auto stride) {
    constexpr int K = decltype(kernel)::value, STRIDE = decltype(stride)::value, VEC = BackwardTraits<S, K, STRIDE>::VEC;
    // With a common factor of stride and dilation the phases of the output meet in some pixels of x and miss others.
    const bool apart = STRIDE == 1 || (s.dh % STRIDE && s.dw % STRIDE);
    if (!apart || s.c % VEC || !aligned({a.g, a.y, a.x, a.dx}, VEC * sizeof(S))) return false;
    run<S, K, STRIDE>(a, prepare, stream);
    return true;
  });
}

template bool depthwise_backward(DepthwiseBackward<float, float>&, const Prepare<DepthwiseBackward<float, float>>&, cudaStream_t);
template bool depthwise_backward(DepthwiseBackward<__half, float>&, const Prepare<DepthwiseBackward<__half, float>>&, cudaStream_t);
template bool depthwise_backward(DepthwiseBackward<__nv_bfloat16, float>&, const Prepare<DepthwiseBackward<__nv_bfloat16, float>>&, cudaStream_t);

}  // namespace mnops::cuda
