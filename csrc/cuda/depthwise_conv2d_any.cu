// depthwise_conv2d, plain: every kernel, stride, dilation, padding and channel count, NHWC and NCHW, all dtypes with fp64.
//
// Forward: a thread for a pixel of a channel; x is read K * K times, mostly from the L1. Backward: dx and the norm's sums in
// one kernel, the weight gradient in another, 8 taps at a time. In a block x counts channels and y pixels; x is 1 in NCHW,
// so that neighbouring threads have neighbouring addresses in both layouts. Sums go to a workspace: no atomics.
// It serves what the tuned kernels do not, several times slower than they would.
#include "cuda/depthwise_conv2d.cuh"

namespace mnops::cuda {
namespace {

constexpr int threads_per_block = 256;
constexpr int pixels_per_thread = 8;
constexpr int taps_at_once = 8;

// Element strides of x and of y, in either layout.
struct Strides {
  int64_t n, c, h, w;
  Strides(bool nchw, int64_t channels, int64_t height, int64_t width)
      : n(channels * height * width), c(nchw ? height * width : 1), h(nchw ? width : width * channels), w(nchw ? 1 : channels) {}
};
struct Layout {
  Strides x, y;
  Layout(const DepthwiseShape& s, bool nchw) : x(nchw, s.c, s.h, s.w), y(nchw, s.c, s.ho, s.wo) {}
};

struct Pixel {
  int64_t n, h, w;
  __device__ __forceinline__ Pixel(int64_t i, int64_t height, int64_t width)
      : n(i / (height * width)), h(i / width % height), w(i % width) {}
};

// The sum over threadIdx.y of COUNT values, in order, for the threads of threadIdx.y 0.
template <int COUNT, class T> __device__ __forceinline__ void sum_over_rows(T (&values)[COUNT]) {
  __shared__ T shared[COUNT][threads_per_block];
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
  for (int q = 0; q < COUNT; q++) shared[q][thread] = values[q];
  __syncthreads();
  if (threadIdx.y) return;
#pragma unroll
  for (int q = 0; q < COUNT; q++)
    for (int y = 1; y < int(blockDim.y); y++) values[q] += shared[q][y * int(blockDim.x) + thread];
}

template <class S, class T>
__global__ void __launch_bounds__(threads_per_block) depthwise_conv2d_any_forward(DepthwiseForward<S, T> a, Layout at) {
  const DepthwiseShape& s = a.size;
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, pixels = s.n * s.ho * s.wo;
  T count = 0, pivot = 0, sum1 = 0, sum2 = 0;
  if (c < s.c) {
    NormRegisters<T, 1> norm;
    norm.load(a.norm, c);
    for (int64_t i = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; i < pixels; i += int64_t(gridDim.y) * blockDim.y) {
      const Pixel p(i, s.ho, s.wo);
      T sum = 0;
      for (int ky = 0; ky < s.kh; ky++) {
        const int64_t h = p.h * s.sh - s.pad_top + int64_t(ky) * s.dh;
        if (h < 0 || h >= s.h) continue;
        for (int kx = 0; kx < s.kw; kx++) {
          const int64_t w = p.w * s.sw - s.pad_left + int64_t(kx) * s.dw;
          if (w < 0 || w >= s.w) continue;
          const T x = widen<T>(a.x[p.n * at.x.n + c * at.x.c + h * at.x.h + w * at.x.w]);
          sum += activate(a.norm.act, norm.pre(x, 0)) * a.weight[(c * s.kh + ky) * s.kw + kx];
        }
      }
      S stored;
      narrow(sum, stored);
      a.y[p.n * at.y.n + c * at.y.c + p.h * at.y.h + p.w * at.y.w] = stored;
      const T value = widen<T>(stored);
      if (count == T(0)) pivot = value;
      count += T(1), sum1 += value - pivot, sum2 += (value - pivot) * (value - pivot);
    }
  }
  if (!a.statistics) return;
  __shared__ T pivots[threads_per_block];
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  pivots[thread] = pivot;
  __syncthreads();
  // The mean first, as a distance from the first thread's pivot, which is near it; then the squares around the mean.
  const T near = pivots[threadIdx.x], n = count == T(0) ? T(1) : count;
  const T d = count == T(0) ? T(0) : (pivot - near) + sum1 / n;
  T moments[2] = {count, count * d};
  sum_over_rows(moments);
  __syncthreads();  // the pivots have been read
  if (threadIdx.y == 0) pivots[threadIdx.x] = moments[1] / (moments[0] == T(0) ? T(1) : moments[0]);
  __syncthreads();
  const T mean = pivots[threadIdx.x];
  T squares[1] = {sum2 - sum1 * sum1 / n + count * (d - mean) * (d - mean)};
  sum_over_rows(squares);
  if (threadIdx.y || c >= s.c) return;
  T* out = a.statistics + int64_t(blockIdx.y) * s.c + c;
  out[0] = moments[0], out[a.chunks * s.c] = near + mean, out[2 * a.chunks * s.c] = squares[0];
}

template <class S, class T>
__device__ __forceinline__ T incoming_at(const DepthwiseBackward<S, T>& a, const FoldedIncoming<S, T, 1>& incoming, int64_t i) {
  return incoming.gy(widen<T>(a.g[i]), a.y ? widen<T>(a.y[i]) : T(0), 0);
}

template <class S, class T>
__global__ void __launch_bounds__(threads_per_block) depthwise_conv2d_any_dx(DepthwiseBackward<S, T> a, Layout at) {
  const DepthwiseShape& s = a.size;
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, pixels = s.n * s.h * s.w;
  T sums[2] = {};
  if (c < s.c) {
    NormRegisters<T, 1> norm;
    norm.load(a.norm, c);
    FoldedIncoming<S, T, 1> incoming;
    incoming.load(a.incoming, c);
    for (int64_t i = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; i < pixels; i += int64_t(gridDim.y) * blockDim.y) {
      const Pixel p(i, s.h, s.w);
      T gz = 0;
      for (int ky = 0; ky < s.kh; ky++) {
        const int64_t up = p.h + s.pad_top - int64_t(ky) * s.dh;
        if (up < 0 || up % s.sh || up / s.sh >= s.ho) continue;
        for (int kx = 0; kx < s.kw; kx++) {
          const int64_t left = p.w + s.pad_left - int64_t(kx) * s.dw;
          if (left < 0 || left % s.sw || left / s.sw >= s.wo) continue;
          const int64_t out = p.n * at.y.n + c * at.y.c + up / s.sh * at.y.h + left / s.sw * at.y.w;
          gz += incoming_at(a, incoming, out) * a.weight[(c * s.kh + ky) * s.kw + kx];
        }
      }
      const int64_t here = p.n * at.x.n + c * at.x.c + p.h * at.x.h + p.w * at.x.w;
      const T x = widen<T>(a.x[here]), gp = activate_grad(a.norm.act, gz, norm.pre(x, 0));
      sums[0] += gp, sums[1] += gp * (x - norm.mean[0]);
      narrow(gp * norm.scale[0], a.dx[here]);
    }
  }
  sum_over_rows(sums);
  if (threadIdx.y || c >= s.c) return;
  for (int q = 0; q < 2; q++) a.sums[(int64_t(blockIdx.y) * 2 + q) * s.c + c] = sums[q];
}

template <class S, class T>
__global__ void __launch_bounds__(threads_per_block) depthwise_conv2d_any_dweight(DepthwiseBackward<S, T> a, Layout at) {
  const DepthwiseShape& s = a.size;
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, pixels = s.n * s.ho * s.wo;
  const int taps = s.kh * s.kw, first = int(blockIdx.z) * taps_at_once;
  T sums[taps_at_once] = {};
  if (c < s.c) {
    NormRegisters<T, 1> norm;
    norm.load(a.norm, c);
    FoldedIncoming<S, T, 1> incoming;
    incoming.load(a.incoming, c);
    for (int64_t i = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; i < pixels; i += int64_t(gridDim.y) * blockDim.y) {
      const Pixel p(i, s.ho, s.wo);
      const T gy = incoming_at(a, incoming, p.n * at.y.n + c * at.y.c + p.h * at.y.h + p.w * at.y.w);
#pragma unroll
      for (int q = 0; q < taps_at_once; q++) {
        const int64_t h = p.h * s.sh - s.pad_top + int64_t((first + q) / s.kw) * s.dh;
        const int64_t w = p.w * s.sw - s.pad_left + int64_t((first + q) % s.kw) * s.dw;
        if (first + q >= taps || h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
        const T x = widen<T>(a.x[p.n * at.x.n + c * at.x.c + h * at.x.h + w * at.x.w]);
        sums[q] += gy * activate(a.norm.act, norm.pre(x, 0));
      }
    }
  }
  sum_over_rows(sums);
  if (threadIdx.y || c >= s.c) return;
#pragma unroll
  for (int q = 0; q < taps_at_once; q++)
    if (first + q < taps) a.taps[(int64_t(blockIdx.y) * s.c + c) * taps + first + q] = sums[q];
}

struct Cut {
  dim3 grid, block;
  Cut(const DepthwiseShape& s, bool nchw, int64_t pixels) {
    int x = 1;
    while (!nchw && x < 32 && x < s.c) x *= 2;
    block = dim3(x, threads_per_block / x);
    const int64_t chunks = ceil_div(pixels, int64_t(block.y) * pixels_per_thread);
    grid = dim3(unsigned(ceil_div(s.c, x)), unsigned(chunks < 1024 ? chunks : 1024));
  }
};

}  // namespace

template <class S, class T>
void depthwise_forward_any(DepthwiseForward<S, T>& a, bool nchw, const Prepare<DepthwiseForward<S, T>>& prepare, cudaStream_t stream) {
  const Cut k(a.size, nchw, a.size.n * a.size.ho * a.size.wo);
  a.chunks = k.grid.y;
  prepare(a);
  launch(depthwise_conv2d_any_forward<S, T>, k.grid, k.block, 0, stream, a, Layout(a.size, nchw));
}

template <class S, class T>
void depthwise_backward_any(DepthwiseBackward<S, T>& a, bool nchw, const Prepare<DepthwiseBackward<S, T>>& prepare, cudaStream_t stream) {
  Cut k(a.size, nchw, a.size.n * a.size.h * a.size.w);
  a.chunks = k.grid.y;
  prepare(a);
  const Layout layout(a.size, nchw);
  if (a.dx) launch(depthwise_conv2d_any_dx<S, T>, k.grid, k.block, 0, stream, a, layout);
  k.grid.z = unsigned(ceil_div(a.size.kh * a.size.kw, taps_at_once));
  if (a.taps) launch(depthwise_conv2d_any_dweight<S, T>, k.grid, k.block, 0, stream, a, layout);
}

#define MNOPS_INSTANTIATE(S, T)                                                                                          \
  template void depthwise_forward_any(DepthwiseForward<S, T>&, bool, const Prepare<DepthwiseForward<S, T>>&, cudaStream_t); \
  template void depthwise_backward_any(DepthwiseBackward<S, T>&, bool, const Prepare<DepthwiseBackward<S, T>>&, cudaStream_t);
MNOPS_INSTANTIATE(float, float)
MNOPS_INSTANTIATE(double, double)
MNOPS_INSTANTIATE(__half, float)
MNOPS_INSTANTIATE(__nv_bfloat16, float)
#undef MNOPS_INSTANTIATE

}  // namespace mnops::cuda
