// stem_conv2d forward. A block takes tiles of 128 output pixels and multiplies their taps with the weights: fp16 and bf16 on
// tensor cores, fp32 and fp64 by multiply-adds. The result goes through shared memory, so that it is stored 16 bytes a
// thread, and a thread always stores the same channels, whose statistics it sums on the way. y is written as NHWC or NCHW.
// Bytes moved: x and y once, the floor. What else it takes a pixel is 27 gathers of some ten instructions, and for fp32
// 864 multiply-adds (3x3, 32 outputs): as long as 176 bytes of fp32 take.
#include <algorithm>

#include "cuda/product.cuh"
#include "cuda/stem_conv2d.cuh"

namespace mnops::cuda {
namespace {

using namespace stem;

// A thread's sums of squares are about its first value, which costs at most its number of values times eps: so it stays
// below 512 of them. (A block's tiles times pixels times channels over threads.)
constexpr int most_values = 512;

template <class S, int OUT> struct ForwardTile {
  static constexpr int pixels = 128, vec = 16 / sizeof(S), pad = 16 / sizeof(S);
  static constexpr int pitch = taps_a_step + pad, y_pitch = OUT + pad;
  static constexpr int vectors = OUT / vec, rows = threads / vectors;  // a thread stores every rows-th pixel
  static constexpr int z_bytes = pixels * pitch * int(sizeof(S)), y_bytes = pixels * y_pitch * int(sizeof(S));
  static constexpr int moment_bytes = (3 * rows + 1) * OUT * int(sizeof(typename Accumulator<S>::type));
  static constexpr int tile_bytes = z_bytes > y_bytes ? z_bytes : y_bytes;
  static constexpr int first_bytes = tile_bytes > moment_bytes ? tile_bytes : moment_bytes;  // one after the other
  static constexpr int weight_bytes = OUT * pitch * int(sizeof(S));
  static constexpr int bytes = first_bytes + weight_bytes + pixels * int(sizeof(Corner));
  static constexpr int tiles_a_block = most_values / (pixels / rows);
  using Product = WarpProduct<S, S, pixels / warps, OUT>;
  static_assert(threads % vectors == 0 && pixels % rows == 0, "every thread keeps its channels");
  static_assert(bytes <= 48 << 10, "without asking for more shared memory");
  static_assert(taps_a_step % Product::depth == 0 && weight_bytes % 16 == 0 && first_bytes % 16 == 0, "whole steps");
  static_assert(pitch * sizeof(S) % 32 == 16, "an odd number of 16-byte units: no conflicts of banks");
  static_assert(tiles_a_block >= 1, "a tile alone stays below most_values");
};

// Grid: blocks of `tiles` tiles, of outputs. packed: y is stored 16 bytes at a time.
template <class S, class T, int OUT>
__global__ void __launch_bounds__(threads) stem_conv2d_forward(StemForward<S, T> a, bool packed, int64_t tiles) {
  using Tile = ForwardTile<S, OUT>;
  const StemShape& s = a.size;
  S* const z = reinterpret_cast<S*>(dynamic_shared());
  S* const out = z;
  S* const w = reinterpret_cast<S*>(dynamic_shared() + Tile::first_bytes);
  Corner* const corners = reinterpret_cast<Corner*>(dynamic_shared() + Tile::first_bytes + Tile::weight_bytes);
  const int lane = threadIdx.x % 32, o0 = blockIdx.y * OUT;
  const bool planes = s.y.c != 1;  // neighbouring threads store neighbouring channels, in NCHW neighbouring pixels
  const int vector = planes ? threadIdx.x / Tile::rows : threadIdx.x % Tile::vectors;
  const int row0 = planes ? threadIdx.x % Tile::rows : threadIdx.x / Tile::vectors, c0 = vector * Tile::vec;
  int count = 0;
  T pivot[Tile::vec] = {}, sum[Tile::vec] = {}, squares[Tile::vec] = {};
  Tap<T> tap;
  typename Tile::Product product;
  const int64_t begin = int64_t(blockIdx.x) * tiles;
  Pixel at(s, begin * Tile::pixels);
  for (int64_t tile = begin; tile < begin + tiles; tile++, at.advance(s, Tile::pixels)) {
    const int64_t first = tile * Tile::pixels;
    if (first >= s.pixels) break;
    find_corners<Tile::pixels>(corners, first, at, s);
    product.clear();
    for (int t0 = 0; t0 < s.taps; t0 += taps_a_step) {
      if (tile == begin || s.taps > taps_a_step) {
        tap.set(s, a.norm, t0 + lane);
        for (int o = threadIdx.x / 32; o < OUT; o += warps) {
          const bool there = tap.there && o0 + o < s.o;
          const int64_t place = (int64_t(o0) + o) * s.taps + tap.place(s);
          narrow(there ? weight_at<S, T>(a.weight, a.wide_weight, place) : T(0), w[o * Tile::pitch + lane]);
        }
      }
      __syncthreads();
      gather<Tile::pixels>(z, Tile::pitch, corners, tap, a.x, s, a.norm.act);
      __syncthreads();
      product.add(z + threadIdx.x / 32 * (Tile::pixels / warps) * Tile::pitch, Tile::pitch, w, Tile::pitch, taps_a_step);
      __syncthreads();
    }
    product.each([&](int row, int o, T value) {
      narrow(value, out[(threadIdx.x / 32 * (Tile::pixels / warps) + row) * Tile::y_pitch + o]);
    });
    __syncthreads();
    for (int q = row0; q < Tile::pixels && first + q < s.pixels; q += Tile::rows) {
      const Pack<S, Tile::vec> pack = load_pack<S, Tile::vec>(out + q * Tile::y_pitch + c0);
      S* const to = a.y + corners[q].to + (o0 + c0) * s.y.c;
      if (packed && o0 + c0 < s.o) {
        store_pack<S, Tile::vec>(to, pack);
      } else {
#pragma unroll
        for (int i = 0; i < Tile::vec; i++)
          if (o0 + c0 + i < s.o) to[i * s.y.c] = pack.v[i];
      }
      if (a.statistics) {
#pragma unroll
        for (int i = 0; i < Tile::vec; i++) {
          const T value = widen<T>(pack.v[i]);
          if (count == 0) pivot[i] = value;
          sum[i] += value - pivot[i];
          squares[i] += (value - pivot[i]) * (value - pivot[i]);
        }
        count++;
      }
    }
    __syncthreads();
  }
  if (!a.statistics) return;
  // The threads of a channel are merged in order, their means relative to the first thread's first value.
  T* const shared = reinterpret_cast<T*>(dynamic_shared());
  T* const origin = shared + 3 * Tile::rows * OUT;
  if (row0 == 0)
#pragma unroll
    for (int i = 0; i < Tile::vec; i++) origin[c0 + i] = pivot[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::vec; i++) {
    const T mean = count ? sum[i] / T(count) : T(0);
    T* const at = shared + row0 * OUT + c0 + i;
    at[0] = T(count), at[Tile::rows * OUT] = (pivot[i] - origin[c0 + i]) + mean, at[2 * Tile::rows * OUT] = squares[i] - sum[i] * mean;
  }
  __syncthreads();
  for (int o = threadIdx.x; o < OUT && o0 + o < s.o; o += threads) {
    T n = 0, mean = 0, m2 = 0;
    for (int row = 0; row < Tile::rows; row++) {
      const T* const at = shared + row * OUT + o;
      if (at[0] == 0) continue;
      const T delta = at[Tile::rows * OUT] - mean, total = n + at[0];
      mean = n == 0 ? at[Tile::rows * OUT] : mean + delta * (at[0] / total);
      m2 += at[2 * Tile::rows * OUT] + (n == 0 ? T(0) : delta * delta * n * (at[0] / total));
      n = total;
    }
    double* const to = a.statistics + int64_t(blockIdx.x) * s.o + o0 + o;
    const int64_t kind = int64_t(gridDim.x) * s.o;
    to[0] = n, to[kind] = double(origin[o]) + mean, to[2 * kind] = m2;
  }
}

template <class S, class T, int OUT>
void run(StemForward<S, T>& a, const Prepare<StemForward<S, T>>& prepare, cudaStream_t stream) {
  using Tile = ForwardTile<S, OUT>;
  const StemShape& s = a.size;
  const bool packed = s.y.c == 1 && s.o % Tile::vec == 0 && aligned({a.y}, 16);
  const int64_t tiles = ceil_div(s.pixels, Tile::pixels);
  const int64_t each = std::min<int64_t>(ceil_div(tiles, most_sums), Tile::tiles_a_block);
  const dim3 grid(unsigned(ceil_div(tiles, each)), unsigned(ceil_div(s.o, OUT)));
  a.chunks = grid.x;
  prepare(a);
  launch(stem_conv2d_forward<S, T, OUT>, grid, threads, Tile::bytes, stream, a, packed, each);
}

}  // namespace

template <class S, class T>
void stem_forward(StemForward<S, T>& a, const Prepare<StemForward<S, T>>& prepare, cudaStream_t stream) {
  if constexpr (sizeof(S) < 8)
    if (a.size.o > 32) return run<S, T, 64>(a, prepare, stream);
  run<S, T, 32>(a, prepare, stream);
}

template void stem_forward(StemForward<float, float>&, const Prepare<StemForward<float, float>>&, cudaStream_t);
template void stem_forward(StemForward<double, double>&, const Prepare<StemForward<double, double>>&, cudaStream_t);
template void stem_forward(StemForward<__half, float>&, const Prepare<StemForward<__half, float>>&, cudaStream_t);
template void stem_forward(StemForward<__nv_bfloat16, float>&, const Prepare<StemForward<__nv_bfloat16, float>>&, cudaStream_t);

}  // namespace mnops::cuda
