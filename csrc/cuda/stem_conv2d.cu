// stem_conv2d: a network's first, dense convolution, as a product over the taps gathered from the image.
//
// Forward: a block takes tiles of 128 output pixels. Its warps gather the taps (T = K * K * C, 27 for 3x3 on RGB; a lane a
// tap) of every pixel into shared memory, normalised, and multiply them with the weights: fp16 and bf16 on tensor cores,
// fp32 and fp64 by multiply-adds. The result goes through shared memory, so that it is stored 16 bytes a thread, and a
// thread always stores the same channels, whose statistics it sums on the way. x may have any strides (NHWC, NCHW, a
// slice): its elements come through L1, where the windows of neighbouring pixels overlap. y is written as NHWC or NCHW.
// Bytes moved: x and y once, the floor. What else it takes a pixel is 27 gathers of some ten instructions, and for fp32
// 864 multiply-adds (3x3, 32 outputs): as long as 176 bytes of fp32 take.
//
// Weight gradient: gy and the taps, both fp32 in shared memory; each warp multiplies its own pixels of a tile, 32 outputs by
// 32 taps in registers, exact in every dtype. Bytes moved: x, g and, where a statistic was used, y once: the floor; more
// than 32 outputs or taps read them again.
//
// Gradient of the input: plain, one element a thread, for no image needs one. It reads g once for every window.
#include <algorithm>

#include "cuda/finish.cuh"
#include "cuda/product.cuh"

namespace mnops::cuda {
namespace {

constexpr int threads = 128, warps = threads / 32;
constexpr int taps_a_step = 32;  // a lane each
// A thread's sums of squares are about its first value, which costs at most its number of values times eps: so it stays
// below 512 of them. (A block's tiles times pixels times channels over threads.)
constexpr int most_values = 512;

struct Strides {
  int64_t n, c, h, w;
};

struct Stem {
  int64_t pixels;  // of y: n * ho * wo
  int c, h, w, o, ho, wo, kh, kw, sh, sw, pad_top, pad_left, taps;
  Strides x, y;
};

// Where the window of an output pixel begins in x (beyond the last pixel, nowhere), and where it lies in y.
struct alignas(16) Corner {
  int64_t at, to;
  int h, w;
};
constexpr int nowhere = -(1 << 30);

struct Pixel {
  int64_t n;
  int h, w;
};
__device__ __forceinline__ Pixel pixel_of(const Stem& s, int64_t p) {
  const int64_t row = p / s.wo;
  return {row / s.ho, int(row % s.ho), int(p % s.wo)};
}

template <int PIXELS> __device__ __forceinline__ void find_corners(Corner* corners, int64_t first, const Stem& s) {
  for (int q = threadIdx.x; q < PIXELS; q += threads) {
    if (first + q < s.pixels) {
      const Pixel p = pixel_of(s, first + q);
      const int h = p.h * s.sh - s.pad_top, w = p.w * s.sw - s.pad_left;
      corners[q] = {p.n * s.x.n + h * s.x.h + w * s.x.w, p.n * s.y.n + p.h * s.y.h + p.w * s.y.w, h, w};
    } else {
      corners[q] = {0, 0, nowhere, nowhere};
    }
  }
}

// A tap: its row, column and channel (channels innermost, as in a channels_last image), and the channel's norm.
template <class T> struct Tap {
  int row, column, channel;
  bool there;
  int64_t at;
  NormRegisters<T, 1> norm;
  __device__ __forceinline__ void set(const Stem& s, const NormPointers<T>& p, int t) {
    there = t < s.taps;
    t = there ? t : 0;
    row = t / (s.kw * s.c), column = t / s.c % s.kw, channel = t % s.c;
    at = row * s.x.h + column * s.x.w + channel * s.x.c;
    norm.load(p, channel);
  }
  __device__ __forceinline__ int64_t place(const Stem& s) const {  // in (C, kh, kw)
    return (int64_t(channel) * s.kh + row) * s.kw + column;
  }
};

// z at this lane's tap of all pixels, [PIXELS][pitch] in E.
template <int PIXELS, class S, class T, class E>
__device__ __forceinline__ void gather(E* tile, int pitch, const Corner* corners, const Tap<T>& tap, const S* __restrict__ x,
                                       const Stem& s, Act act) {
#pragma unroll 8
  for (int q = threadIdx.x / 32; q < PIXELS; q += warps) {
    const Corner corner = corners[q];
    const bool inside =
        tap.there && unsigned(corner.h + tap.row) < unsigned(s.h) && unsigned(corner.w + tap.column) < unsigned(s.w);
    const T z = inside ? activate(act, tap.norm.pre(widen<T>(x[corner.at + tap.at]), 0)) : T(0);
    narrow(z, tile[q * pitch + threadIdx.x % 32]);
  }
}

template <class S, class T> __device__ __forceinline__ T weight_at(const void* weight, bool wide, int64_t i) {
  return wide ? static_cast<const T*>(weight)[i] : widen<T>(static_cast<const S*>(weight)[i]);
}

// ---- forward ----

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

// moments: [3][blocks][o] where y is measured, else null. tiles: of a block.
template <class S, class T, int OUT>
__global__ void __launch_bounds__(threads)
stem_forward(const S* __restrict__ x, const void* __restrict__ weight, bool wide_weight, S* __restrict__ y, double* moments, bool packed,
             int64_t tiles, Stem s, NormPointers<T> norm) {
  using Tile = ForwardTile<S, OUT>;
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
  for (int64_t tile = begin; tile < begin + tiles; tile++) {
    const int64_t first = tile * Tile::pixels;
    if (first >= s.pixels) break;
    find_corners<Tile::pixels>(corners, first, s);
    product.clear();
    for (int t0 = 0; t0 < s.taps; t0 += taps_a_step) {
      if (tile == begin || s.taps > taps_a_step) {
        tap.set(s, norm, t0 + lane);
        for (int o = threadIdx.x / 32; o < OUT; o += warps) {
          const bool there = tap.there && o0 + o < s.o;
          const int64_t at = (int64_t(o0) + o) * s.taps + tap.place(s);
          narrow(there ? weight_at<S, T>(weight, wide_weight, at) : T(0), w[o * Tile::pitch + lane]);
        }
      }
      __syncthreads();
      gather<Tile::pixels>(z, Tile::pitch, corners, tap, x, s, norm.act);
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
      S* const to = y + corners[q].to + (o0 + c0) * s.y.c;
      if (packed && o0 + c0 < s.o) {
        store_pack<S, Tile::vec>(to, pack);
      } else {
#pragma unroll
        for (int i = 0; i < Tile::vec; i++)
          if (o0 + c0 + i < s.o) to[i * s.y.c] = pack.v[i];
      }
      if (moments) {
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
  if (!moments) return;
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
    double* const to = moments + int64_t(blockIdx.x) * s.o + o0 + o;
    const int64_t kind = int64_t(gridDim.x) * s.o;
    to[0] = n, to[kind] = double(origin[o]) + mean, to[2 * kind] = m2;
  }
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

// gy of the stored g, and of y where a statistic was used.
template <class T> struct IncomingRegisters {
  T offset, slope, mean;
  __device__ __forceinline__ void load(const IncomingPointers<T>& p, int64_t c) {
    offset = p.g_mean ? p.g_mean[c] / T(p.count) : T(0);
    slope = p.g_var ? T(2) * p.g_var[c] / T(p.count) : T(0);
    mean = p.g_var ? p.mean[c] : T(0);
  }
};

// partial: [blocks][o][c * kh * kw]. g and y are NHWC. Grid: blocks of pixels, of outputs, of taps.
template <class S, class T>
__global__ void __launch_bounds__(threads)
stem_backward_weight(const S* __restrict__ g, const S* __restrict__ y, const S* __restrict__ x, T* __restrict__ partial,
                     int64_t tiles, Stem s, NormPointers<T> norm, IncomingPointers<T> incoming) {
  using Tile = GradientTile<T>;
  constexpr int pitch = Tile::pitch;
  T* const z = reinterpret_cast<T*>(dynamic_shared());
  T* const gy = z + Tile::pixels * pitch;
  Corner* const corners = reinterpret_cast<Corner*>(dynamic_shared() + 2 * Tile::tile_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, o0 = blockIdx.y * Tile::out;
  const bool there = o0 + lane < s.o;
  IncomingRegisters<T> in{};
  if (there) in.load(incoming, o0 + lane);
  Tap<T> tap;
  tap.set(s, norm, blockIdx.z * taps_a_step + lane);
  T sum[8][4] = {};  // of outputs lane / 8 * 8 and on, taps lane % 8 * 4 and on
  const int64_t begin = int64_t(blockIdx.x) * tiles;
  for (int64_t tile = begin; tile < begin + tiles; tile++) {
    const int64_t first = tile * Tile::pixels;
    if (first >= s.pixels) break;
    find_corners<Tile::pixels>(corners, first, s);
#pragma unroll 4
    for (int q = warp; q < Tile::pixels; q += warps) {
      const int64_t at = (first + q) * s.o + o0 + lane;
      T v = 0;
      if (there && first + q < s.pixels) {
        v = widen<T>(g[at]) + in.offset;
        if (incoming.g_var) v += in.slope * (widen<T>(y[at]) - in.mean);
      }
      gy[q * pitch + lane] = v;
    }
    __syncthreads();
    gather<Tile::pixels>(z, pitch, corners, tap, x, s, norm.act);
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
    partial[(int64_t(blockIdx.x) * s.o + o0 + o) * s.taps + tap.place(s)] = total;
  }
}

// ---- gradient of the input ----

// partial: [blocks][2][c], sums of gp and of gp * (x - mean). g and y are NHWC, dx is dense NHWC. Grid: blocks of `chunk`
// pixels of x, channels.
template <class S, class T>
__global__ void __launch_bounds__(threads, 4)
stem_backward_input(const S* __restrict__ g, const S* __restrict__ y, const S* __restrict__ x, const void* __restrict__ weight,
                    bool wide_weight, S* __restrict__ dx, T* __restrict__ partial, int64_t pixels, int64_t chunk, Stem s,
                    NormPointers<T> norm, IncomingPointers<T> incoming) {
  __shared__ T shared[2][threads];
  const int c = blockIdx.y;
  NormRegisters<T, 1> n;
  n.load(norm, c);
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
          IncomingRegisters<T> in;
          in.load(incoming, o);
          T v = widen<T>(g[at + o]) + in.offset;
          if (incoming.g_var) v += in.slope * (widen<T>(y[at + o]) - in.mean);
          gz = fma(v, weight_at<S, T>(weight, wide_weight, int64_t(o) * s.taps + place), gz);
        }
      }
    }
    const T value = widen<T>(x[image * s.x.n + h * s.x.h + w * s.x.w + c * s.x.c]);
    const T v = activate_grad(norm.act, gz, n.pre(value, 0));
    gp += v;
    gpx += v * (value - n.mean[0]);
    narrow(v * n.scale[0], dx[p * s.c + c]);
  }
  shared[0][threadIdx.x] = gp, shared[1][threadIdx.x] = gpx;
  for (int step = threads / 2; step; step /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < step)
      for (int k = 0; k < 2; k++) shared[k][threadIdx.x] += shared[k][threadIdx.x + step];
  }
  if (threadIdx.x == 0)
    for (int k = 0; k < 2; k++) partial[(int64_t(blockIdx.x) * 2 + k) * s.c + c] = shared[k][0];
}

// ---- host ----

#ifdef MNOPS_EMULATE_CUDA
constexpr int64_t most_sums = 4;        // so that small tests have blocks of several tiles
#else
constexpr int64_t most_sums = 2048;     // blocks that leave partial sums: a second stage of some microseconds
#endif
constexpr int64_t most_size = 1 << 29;  // rows, columns, channels, taps are ints in the kernels, and so are sums of two

Stem shape_of(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1),
                  "stem_conv2d: weight must be (O, C, K, K) with x (N, C, H, W)");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4, "stem_conv2d: stride has 2 elements, padding has 4");
  STD_TORCH_CHECK(stride[0] >= 1 && stride[1] >= 1, "stem_conv2d: stride must be at least 1");
  const int64_t taps = weight.size(1) * weight.size(2) * weight.size(3);
  for (const int64_t size : {x.size(1), x.size(2), x.size(3), weight.size(0), taps, stride[0], stride[1], padding[0], padding[1],
                             padding[2], padding[3]})
    STD_TORCH_CHECK(size >= 0 && size < most_size, "stem_conv2d: sizes, strides and padding go up to ", most_size, ", got ", size);
  const int64_t h = x.size(2) + padding[0] + padding[1] - weight.size(2), w = x.size(3) + padding[2] + padding[3] - weight.size(3);
  STD_TORCH_CHECK(taps > 0 && h >= 0 && w >= 0, "stem_conv2d: the padded input must be at least as large as the kernel");
  Stem s{};
  s.c = int(x.size(1)), s.h = int(x.size(2)), s.w = int(x.size(3)), s.o = int(weight.size(0));
  s.kh = int(weight.size(2)), s.kw = int(weight.size(3)), s.taps = int(taps);
  s.sh = int(stride[0]), s.sw = int(stride[1]), s.pad_top = int(padding[0]), s.pad_left = int(padding[2]);
  s.ho = int(h / s.sh) + 1, s.wo = int(w / s.sw) + 1;
  s.pixels = x.size(0) * s.ho * s.wo;
  s.x = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  STD_TORCH_CHECK(ceil_div(s.o, 32) <= most_grid_y && ceil_div(s.taps, taps_a_step) <= most_grid_y && s.c <= most_grid_y,
                  "stem_conv2d: channels and taps go up to 65535 blocks");
  return s;
}

// A dense weight of x's dtype, or of the arithmetic's.
struct Weight {
  Tensor tensor;
  bool wide;
  Weight(const Tensor& x, const Tensor& weight)
      : tensor(torch::stable::contiguous(weight)), wide(weight.scalar_type() != x.scalar_type()) {
    STD_TORCH_CHECK(same_device(x, weight) && (!wide || weight.scalar_type() == ScalarType::Float),
                    "stem_conv2d: weight must be on x's device, in x's dtype or float32");
  }
  const void* data() const { return tensor.const_data_ptr(); }
};

MeasuredResult forward(const Tensor& x, const Tensor& weight, const MaybeTensor& mean, const MaybeTensor& var,
                       const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act, Ints stride,
                       Ints padding, bool measure) {
  Stem s = shape_of(x, weight, stride, padding);
  const Weight w(x, weight);
  const OnDeviceOf guard(x);
  const cudaStream_t stream = current_stream(x);
  return with_storage(x, [&](auto storage) -> MeasuredResult {
    using S = decltype(storage);
    using T = typename Accumulator<S>::type;
    const NormTensors<T> norm(x, {mean, var, gamma, beta, eps, act}, s.c);
    const std::vector<int64_t> size{x.size(0), s.o, s.ho, s.wo};
    const Tensor y = wants_nchw(x) ? empty_like_type(x, size, x.scalar_type()) : empty_channels_last(x, size);
    const Tensor mean_y = empty_like_type(x, {measure ? s.o : 0}, scalar_type_of<T>());
    const Tensor var_y = empty_like_type(x, {measure ? s.o : 0}, scalar_type_of<T>());
    STD_TORCH_CHECK(!measure || y.numel() > 0, "mnops: statistics of an output with no element are not defined");
    if (y.numel() == 0) return {y, mean_y, var_y};
    s.y = {y.stride(0), y.stride(1), y.stride(2), y.stride(3)};
    if (s.o == 1) s.y.c = 1;
    S* const out = static_cast<S*>(y.mutable_data_ptr());
    auto run = [&](auto outputs) {
      using Tile = ForwardTile<S, decltype(outputs)::value>;
      const bool packed = s.y.c == 1 && s.o % Tile::vec == 0 && aligned({out}, 16);
      const int64_t tiles = ceil_div(s.pixels, Tile::pixels);
      const int64_t each = std::min<int64_t>(ceil_div(tiles, most_sums), Tile::tiles_a_block);
      const dim3 grid(unsigned(ceil_div(tiles, each)), unsigned(ceil_div(s.o, decltype(outputs)::value)));
      const Tensor moments = empty_like_type(x, {3, measure ? int64_t(grid.x) : 0, s.o}, ScalarType::Double);
      launch(stem_forward<S, T, decltype(outputs)::value>, grid, threads, Tile::bytes, stream, static_cast<const S*>(x.const_data_ptr()),
             w.data(), w.wide, out, data_or_null<double>(moments), packed, each, s, norm.pointers);
      if (measure)
        launch(finish_statistics<T, double>, unsigned(s.o), finish_threads, 0, stream, data_or_null<double>(moments), int64_t(grid.x), int64_t(s.o),
               data_or_null<T>(mean_y), data_or_null<T>(var_y));
    };
    if constexpr (sizeof(S) < 8)
      if (s.o > 32) {
        run(std::integral_constant<int, 64>{});
        return {y, mean_y, var_y};
      }
    run(std::integral_constant<int, 32>{});
    return {y, mean_y, var_y};
  });
}

ConvGradResult backward(const Tensor& g, const MaybeTensor& g_mean, const MaybeTensor& g_var, const Tensor& y,
                        const Tensor& mean_y, const Tensor& x, const Tensor& weight, const MaybeTensor& mean,
                        const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                        std::string act, Ints stride, Ints padding, bool need_input, bool need_weight) {
  const Stem s = shape_of(x, weight, stride, padding);
  const Weight w(x, weight);
  for (const Tensor* t : {&g, &y})
    STD_TORCH_CHECK(t->dim() == 4 && t->size(0) == x.size(0) && t->size(1) == s.o && t->size(2) == s.ho && t->size(3) == s.wo &&
                        t->scalar_type() == x.scalar_type() && same_device(*t, x),
                    "stem_conv2d_backward: g and y must have the shape that x and weight give, x's dtype and device");
  const OnDeviceOf guard(x);
  const cudaStream_t stream = current_stream(x);
  return with_storage(x, [&](auto storage) -> ConvGradResult {
    using S = decltype(storage);
    using T = typename Accumulator<S>::type;
    const PendingTensors args{mean, var, gamma, beta, eps, act};
    const NormTensors<T> norm(x, args, s.c);
    Arrays arrays;
    IncomingPointers<T> incoming{arrays.of<T>(g_mean, x, s.o, "g_mean"), arrays.of<T>(g_var, x, s.o, "g_var"), nullptr, double(s.pixels)};
    if (g_var) incoming.mean = arrays.of<T>(mean_y, x, s.o, "mean_y");
    const Tensor gl = channels_last(g), yl = g_var ? channels_last(y) : gl;
    const S* const from_x = static_cast<const S*>(x.const_data_ptr());
    const S* const from_g = static_cast<const S*>(gl.const_data_ptr());
    const S* const from_y = static_cast<const S*>(yl.const_data_ptr());

    const Tensor dw = need_weight ? empty_like_type(x, {s.o, s.c, s.kh, s.kw}, weight.scalar_type())
                                  : empty_like_type(x, {0}, weight.scalar_type());
    if (dw.numel()) {
      using Tile = GradientTile<T>;
      const int64_t tiles = ceil_div(s.pixels, Tile::pixels), each = std::max<int64_t>(1, ceil_div(tiles, most_sums / 2));
      const dim3 grid(unsigned(ceil_div(tiles, each)), unsigned(ceil_div(s.o, Tile::out)), unsigned(ceil_div(s.taps, taps_a_step)));
      const Tensor partial = empty_like_type(x, {int64_t(grid.x), dw.numel()}, scalar_type_of<T>());
      if (grid.x)
        launch(stem_backward_weight<S, T>, grid, threads, Tile::bytes, stream, from_g, from_y, from_x, data_or_null<T>(partial), each, s,
               norm.pointers, incoming);
      auto finish = [&](auto storage_of_weight) {
        using W = decltype(storage_of_weight);
        launch(finish_matrix<T, W>, unsigned(ceil_div(dw.numel(), 32)), finish_threads, 0, stream, data_or_null<T>(partial),
               int64_t(grid.x), dw.numel(), static_cast<W*>(dw.mutable_data_ptr()));
      };
      if (w.wide) finish(float());
      else finish(S());
    }

    const Tensor dx = need_input ? empty_channels_last(x, {x.size(0), s.c, s.h, s.w}) : empty_like_type(x, {0}, x.scalar_type());
    const NormGradTensors<T> grads(x, args, s.c, need_input);
    if (need_input) {
      const int64_t pixels = x.size(0) * s.h * s.w, chunk = std::max<int64_t>(threads, ceil_div(pixels, most_sums));
      const dim3 grid(unsigned(ceil_div(pixels, chunk)), unsigned(s.c));
      const Tensor partial = empty_like_type(x, {int64_t(grid.x), 2, s.c}, scalar_type_of<T>());
      if (grid.x)
        launch(stem_backward_input<S, T>, grid, threads, 0, stream, from_g, from_y, from_x, w.data(), w.wide,
               static_cast<S*>(dx.mutable_data_ptr()), data_or_null<T>(partial), pixels, chunk, s, norm.pointers, incoming);
      launch(finish_sums<T>, unsigned(s.c), finish_threads, 0, stream, data_or_null<T>(partial), int64_t(grid.x), int64_t(s.c),
             norm.pointers, data_or_null<T>(grads.mean), data_or_null<T>(grads.var), data_or_null<T>(grads.gamma),
             data_or_null<T>(grads.beta));
    }
    return {need_input ? in_layout_of(x, dx) : dx, dw, grads.mean, grads.var, grads.gamma, grads.beta};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CUDA, m) {
  m.impl("stem_conv2d", TORCH_BOX(&forward));
  m.impl("stem_conv2d_backward", TORCH_BOX(&backward));
}

}  // namespace mnops::cuda
