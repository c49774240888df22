// stem_conv2d: a network's first, dense convolution, as a product over the taps gathered from the image. What its launches
// (stem_conv2d.cu) and its kernels (stem_conv2d_forward.cu, stem_conv2d_backward.cu) share.
//
// A block takes tiles of output pixels. Its warps gather the taps (T = K * K * C, 27 for 3x3 on RGB; a lane a tap) of every
// pixel into shared memory, normalised. x may have any strides (NHWC, NCHW, a slice): its elements come through L1, where
// the windows of neighbouring pixels overlap.
#pragma once
#include "cuda/launch.cuh"

namespace mnops::cuda {

struct Strides {
  int64_t n, c, h, w;
};

struct StemShape {
  int64_t n, pixels;  // of y: n * ho * wo
  int c, h, w, o, ho, wo, kh, kw, sh, sw, pad_top, pad_left, taps;
  Strides x, y;
};

template <class S, class T> struct StemForward {
  StemShape size;
  const S* x;
  const void* weight;
  bool wide_weight;    // in T, else in S
  S* y;                // NHWC or NCHW
  double* statistics;  // [3][chunks][o]: count, mean, sum of squared deviations; null: not wanted
  int64_t chunks;
  NormPointers<T> norm;
};

template <class S, class T> struct StemBackward {
  StemShape size;
  const S *g, *y, *x;  // g and y are NHWC
  const void* weight;
  bool wide_weight;
  S* dx;               // dense NHWC
  T* partial;          // of the weight: [chunks][o][c * kh * kw]; of the input: [chunks][2][c], gp and gp * (x - mean)
  int64_t chunks;
  NormPointers<T> norm;
  IncomingPointers<T> incoming;
};

template <class S, class T>
void stem_forward(StemForward<S, T>& a, const Prepare<StemForward<S, T>>& prepare, cudaStream_t stream);
template <class S, class T>
void stem_backward_weight(StemBackward<S, T>& a, const Prepare<StemBackward<S, T>>& prepare, cudaStream_t stream);
template <class S, class T>
void stem_backward_input(StemBackward<S, T>& a, const Prepare<StemBackward<S, T>>& prepare, cudaStream_t stream);

namespace stem {

constexpr int threads = 128, warps = threads / 32;
constexpr int taps_a_step = 32;  // a lane each
#ifdef MNOPS_EMULATE_CUDA
constexpr int64_t most_sums = 4;     // so that small tests have blocks of several tiles
#else
constexpr int64_t most_sums = 2048;  // blocks that leave partial sums: a second stage of some microseconds
#endif

// Where the window of an output pixel begins in x (beyond the last pixel, nowhere), and where it lies in y.
struct alignas(16) Corner {
  int64_t at, to;
  int h, w;
};
constexpr int nowhere = -(1 << 30);

struct Pixel {
  int64_t n;
  int h, w;
  // Divisions of 64 bits, a hundred instructions each, are for before a loop; in it, `by` steps on in the rows.
  __device__ __forceinline__ Pixel(const StemShape& s, int64_t p) : n(p / s.wo / s.ho), h(int(p / s.wo % s.ho)), w(int(p % s.wo)) {}
  __device__ __forceinline__ void advance(const StemShape& s, int by) {
    h += (w + by) / s.wo, w = (w + by) % s.wo;
    n += h / s.ho, h %= s.ho;
  }
};

// Of the PIXELS from pixel number `first` on, which lies at `at`.
template <int PIXELS>
__device__ __forceinline__ void find_corners(Corner* corners, int64_t first, const Pixel& at, const StemShape& s) {
  for (int q = threadIdx.x; q < PIXELS; q += threads) {
    if (first + q < s.pixels) {
      Pixel p = at;
      p.advance(s, q);
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
  __device__ __forceinline__ void set(const StemShape& s, const NormPointers<T>& p, int t) {
    there = t < s.taps;
    t = there ? t : 0;
    row = t / (s.kw * s.c), column = t / s.c % s.kw, channel = t % s.c;
    at = row * s.x.h + column * s.x.w + channel * s.x.c;
    norm.load(p, channel);
  }
  __device__ __forceinline__ int64_t place(const StemShape& s) const {  // in (C, kh, kw)
    return (int64_t(channel) * s.kh + row) * s.kw + column;
  }
};

constexpr int at_once = 8;  // loads of a thread under way; beside an activation the compiler would leave one

// z at this lane's tap of all pixels, [PIXELS][pitch] in E.
template <int PIXELS, class S, class T, class E>
__device__ __forceinline__ void gather(E* tile, int pitch, const Corner* corners, const Tap<T>& tap, const S* x, const StemShape& s,
                                       Act act) {
  static_assert(PIXELS % (warps * at_once) == 0, "whole groups of loads");
  for (int q0 = threadIdx.x / 32; q0 < PIXELS; q0 += warps * at_once) {
    Pack<S, 1> raw[at_once];
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < at_once; i++) {
      const Corner corner = corners[q0 + i * warps];
      const bool inside =
          tap.there && unsigned(corner.h + tap.row) < unsigned(s.h) && unsigned(corner.w + tap.column) < unsigned(s.w);
      raw[i] = inside ? load_pack<S, 1>(x + corner.at + tap.at) : zero_pack<S, 1>();
      mask |= uint32_t(inside) << i;
    }
#pragma unroll
    for (int i = 0; i < at_once; i++) {
      const T z = mask >> i & 1 ? activate(act, tap.norm.pre(widen<T>(raw[i].v[0]), 0)) : T(0);
      narrow(z, tile[(q0 + i * warps) * pitch + threadIdx.x % 32]);
    }
  }
}

template <class S, class T> __device__ __forceinline__ T weight_at(const void* weight, bool wide, int64_t i) {
  return wide ? static_cast<const T*>(weight)[i] : widen<T>(static_cast<const S*>(weight)[i]);
}

}  // namespace stem
}  // namespace mnops::cuda
