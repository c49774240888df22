// stem_conv2d backward.
//
// Weight gradient: gy and the taps, both fp32 in shared memory; each warp multiplies its own pixels of a tile, 32 outputs by
// 32 taps in registers, exact in every dtype. Bytes moved: x, g and, where a statistic was used, y once: the floor; more
// than 32 outputs or taps read them again.
//
// Gradient of the input: plain, one element a thread, for no image needs one. It reads g once for every window.
#include <algorithm>

#include "cuda/stem_conv2d.cuh"

namespace mnops::cuda {
namespace {

using namespace stem;

template <class S, class T>
__device__ __forceinline__ T incoming_at(const StemBackward<S, T>& a, const FoldedIncoming<S, T, 1>& incoming, int64_t i) {
  return incoming.gy(widen<T>(a.g[i]), a.incoming.g_var ? widen<T>(a.y[i]) : T(0), 0);
}

// ---- weight gradient ----

template <class T> struct GradientTile {
  static constexpr int pixels = 64, out = 32, pitch = taps_a_step + 16 / int(sizeof(T));
  static constexpr int tile_bytes = pixels * pitch * int(sizeof(T));
  static constexpr int sum_bytes = warps * out * taps_a_step * int(sizeof(T));
  static constexpr int bytes = 2 * tile_bytes + pixels * int(sizeof(Corner));
  static_assert(out % 4 == 0 && out == taps_a_step, "4 x 8 lanes, 8 outputs by 4 taps each");
  static_assert(pixels % warps == 0 && sum_bytes <= 2 * tile_bytes, "the sums of the warps lie where the tiles were");
};

// Grid: blocks of `tiles` tiles of pixels, of outputs, of taps.
template <class S, class T> __global__ void __launch_bounds__(threads) stem_conv2d_dweight(StemBackward<S, T> a, int64_t tiles) {
  using Tile = GradientTile<T>;
  const StemShape& s = a.size;
  constexpr int pitch = Tile::pitch;
  T* const z = reinterpret_cast<T*>(dynamic_shared());
  T* const gy = z + Tile::pixels * pitch;
  Corner* const corners = reinterpret_cast<Corner*>(dynamic_shared() + 2 * Tile::tile_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, o0 = blockIdx.y * Tile::out;
  const bool there = o0 + lane < s.o;
  FoldedIncoming<S, T, 1> incoming{};
  if (there) incoming.load(a.incoming, o0 + lane);
  Tap<T> tap;
  tap.set(s, a.norm, blockIdx.z * taps_a_step + lane);
  T sum[8][4] = {};  // of outputs lane / 8 * 8 and on, taps lane % 8 * 4 and on
  const int64_t begin = int64_t(blockIdx.x) * tiles;
  Pixel at(s, begin * Tile::pixels);
  for (int64_t tile = begin; tile < begin + tiles; tile++, at.advance(s, Tile::pixels)) {
    const int64_t first = tile * Tile::pixels;
    if (first >= s.pixels) break;
    find_corners<Tile::pixels>(corners, first, at, s);
    for (int q0 = warp; q0 < Tile::pixels; q0 += warps * at_once) {
      Pack<S, 1> raw_g[at_once], raw_y[at_once];
#pragma unroll
      for (int i = 0; i < at_once; i++) {
        const int64_t pixel = first + q0 + i * warps, from = pixel * s.o + o0 + lane;
        const bool inside = there && pixel < s.pixels;
        raw_g[i] = inside ? load_pack<S, 1>(a.g + from) : zero_pack<S, 1>();
        raw_y[i] = inside && a.incoming.g_var ? load_pack<S, 1>(a.y + from) : zero_pack<S, 1>();
      }
#pragma unroll
      for (int i = 0; i < at_once; i++) {
        const bool inside = there && first + q0 + i * warps < s.pixels;
        const T v = incoming.gy(widen<T>(raw_g[i].v[0]), widen<T>(raw_y[i].v[0]), 0);
        gy[(q0 + i * warps) * pitch + lane] = inside ? v : T(0);
      }
    }
    __syncthreads();
    gather<Tile::pixels>(z, pitch, corners, tap, a.x, s, a.norm.act);
    __syncthreads();
    for (int q = warp; q < Tile::pixels; q += warps) {
      T a[8], b[4];
#pragma unroll
      for (int i = 0; i < 8; i++) a[i] = gy[q * pitch + lane / 8 * 8 + i];
#pragma unroll
      for (int j = 0; j < 4; j++) b[j] = z[q * pitch + lane % 8 * 4 + j];
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] = fma(a[i], b[j], sum[i][j]);
    }
    __syncthreads();
  }
  T* const sums = z;  // [warps][out][taps]
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) sums[(warp * Tile::out + lane / 8 * 8 + i) * taps_a_step + lane % 8 * 4 + j] = sum[i][j];
  __syncthreads();
  if (!tap.there) return;
  for (int o = warp; o < Tile::out && o0 + o < s.o; o += warps) {
    T total = 0;
    for (int part = 0; part < warps; part++) total += sums[(part * Tile::out + o) * taps_a_step + lane];
    a.partial[(int64_t(blockIdx.x) * s.o + o0 + o) * s.taps + tap.place(s)] = total;
  }
}

// ---- gradient of the input ----

// One element of x a thread. Grid: blocks of `chunk` pixels of x, channels.
template <class S, class T>
__global__ void __launch_bounds__(threads, 4) stem_conv2d_dx(StemBackward<S, T> a, int64_t pixels, int64_t chunk) {
  __shared__ T shared[2][threads];
  const StemShape& s = a.size;
  const int c = blockIdx.y;
  NormRegisters<T, 1> norm;
  norm.load(a.norm, c);
  T gp = 0, gpx = 0;
  const int64_t begin = int64_t(blockIdx.x) * chunk, end = begin + chunk < pixels ? begin + chunk : pixels;
  for (int64_t p = begin + threadIdx.x; p < end; p += threads) {
    const int64_t image = p / (int64_t(s.h) * s.w);
    const int h = int(p / s.w % s.h), w = int(p % s.w);
    T gz = 0;
    for (int i = 0; i < s.kh; i++) {
      const int oh = (h + s.pad_top - i) / s.sh;
      if (h + s.pad_top < i || (h + s.pad_top - i) % s.sh || oh >= s.ho) continue;
      for (int j = 0; j < s.kw; j++) {
        const int ow = (w + s.pad_left - j) / s.sw;
        if (w + s.pad_left < j || (w + s.pad_left - j) % s.sw || ow >= s.wo) continue;
        const int64_t at = ((image * s.ho + oh) * s.wo + ow) * s.o, place = (int64_t(c) * s.kh + i) * s.kw + j;
        for (int o = 0; o < s.o; o++) {
          FoldedIncoming<S, T, 1> incoming;
          incoming.load(a.incoming, o);
          gz = fma(incoming_at(a, incoming, at + o), weight_at<S, T>(a.weight, a.wide_weight, int64_t(o) * s.taps + place), gz);
        }
      }
    }
    const T value = widen<T>(a.x[image * s.x.n + h * s.x.h + w * s.x.w + c * s.x.c]);
    const T v = activate_grad(a.norm.act, gz, norm.pre(value, 0));
    gp += v;
    gpx += v * (value - norm.mean[0]);
    narrow(v * norm.scale[0], a.dx[p * s.c + c]);
  }
  shared[0][threadIdx.x] = gp, shared[1][threadIdx.x] = gpx;
  for (int step = threads / 2; step; step /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < step)
      for (int k = 0; k < 2; k++) shared[k][threadIdx.x] += shared[k][threadIdx.x + step];
  }
  if (threadIdx.x == 0)
    for (int k = 0; k < 2; k++) a.partial[(int64_t(blockIdx.x) * 2 + k) * s.c + c] = shared[k][0];
}

}  // namespace

template <class S, class T>
void stem_backward_weight(StemBackward<S, T>& a, const Prepare<StemBackward<S, T>>& prepare, cudaStream_t stream) {
  using Tile = GradientTile<T>;
  const StemShape& s = a.size;
  const int64_t tiles = ceil_div(s.pixels, Tile::pixels), each = std::max<int64_t>(1, ceil_div(tiles, most_sums / 2));
  const dim3 grid(unsigned(ceil_div(tiles, each)), unsigned(ceil_div(s.o, Tile::out)), unsigned(ceil_div(s.taps, taps_a_step)));
  a.chunks = grid.x;
  prepare(a);
  if (grid.x) launch(stem_conv2d_dweight<S, T>, grid, threads, Tile::bytes, stream, a, each);
}

template <class S, class T>
void stem_backward_input(StemBackward<S, T>& a, const Prepare<StemBackward<S, T>>& prepare, cudaStream_t stream) {
  const StemShape& s = a.size;
  const int64_t pixels = s.n * s.h * s.w, chunk = std::max<int64_t>(threads, ceil_div(pixels, most_sums));
  const dim3 grid(unsigned(ceil_div(pixels, chunk)), unsigned(s.c));
  a.chunks = grid.x;
  prepare(a);
  if (grid.x) launch(stem_conv2d_dx<S, T>, grid, threads, 0, stream, a, pixels, chunk);
}

template void stem_backward_weight(StemBackward<float, float>&, const Prepare<StemBackward<float, float>>&, cudaStream_t);
template void stem_backward_weight(StemBackward<double, double>&, const Prepare<StemBackward<double, double>>&, cudaStream_t);
template void stem_backward_weight(StemBackward<__half, float>&, const Prepare<StemBackward<__half, float>>&, cudaStream_t);
template void stem_backward_weight(StemBackward<__nv_bfloat16, float>&, const Prepare<StemBackward<__nv_bfloat16, float>>&, cudaStream_t);
template void stem_backward_input(StemBackward<float, float>&, const Prepare<StemBackward<float, float>>&, cudaStream_t);
template void stem_backward_input(StemBackward<double, double>&, const Prepare<StemBackward<double, double>>&, cudaStream_t);
template void stem_backward_input(StemBackward<__half, float>&, const Prepare<StemBackward<__half, float>>&, cudaStream_t);
template void stem_backward_input(StemBackward<__nv_bfloat16, float>&, const Prepare<StemBackward<__nv_bfloat16, float>>&, cudaStream_t);

}  // namespace mnops::cuda
