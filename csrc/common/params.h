// Plain data that crosses from the tensor side to the kernels: pointers, sizes, small enums. No torch, no STL.
// T is the arithmetic type: float for fp32, fp16 and bf16 storage, double for fp64.
#pragma once
#include <cstdint>

namespace mnops {

enum class Act : int { none, relu, relu6, hardswish, silu };
enum class DType : int { f32, f64, f16, bf16 };

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

template <class S> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };

// The pending norm of a tensor, ready for the kernels: z = act((x - mean) * scale + shift), scale = gamma * rstd.
// Every vector is padded with zeros to the kernels' channel padding. No norm is mean 0, scale 1, shift 0.
template <class T> struct Norm {
  const T *mean, *scale, *shift;
  Act act;
  bool identity;           // no norm is pending (the vectors say so too)
};

// The gradient that reaches a raw output y whose statistics were used downstream:
// gy = g + offset + slope * (y - mean), offset = dmean / P, slope = 2 dvar / P. y is null where no statistic was used.
template <class T> struct Incoming {
  const void *g, *y;
  const T *offset, *slope, *mean;
};

// Running statistics of one thread, per channel, merged by Chan's rule: count, mean, sum of squared deviations.
struct Moments {
  double *count, *mean, *m2;
};

// What a norm's backward sums per channel: sum of gp and sum of gp * (x - mean), gp = gz * act'(pre).
struct NormSums {
  double *gp, *gpx;
};

// What depthwise_conv2d is asked to do, before it is cut.
struct DepthwiseShape {
  int64_t n, h, w, c, ho, wo;
  int kh, kw, sh, sw, dh, dw, pad_top, pad_left;
};

// NHWC tensors, dense. Rows of channels are c long; padded vectors (weights, norms) are channel_pad(c) long.
template <class T> struct Depthwise {
  int64_t n, h, w, c, ho, wo;
  int kh, kw, sh, sw, dh, dw, pad_top, pad_left;
  int64_t block;           // channels of one work item, a multiple of the vector
  int64_t bands, band;     // an image's rows (of y forward, of x backward) are cut into bands of `band` rows
  const void* x;
  void* out;               // y forward, dx backward (null: not wanted)
  const T* weight;         // [kh * kw][channel_pad(c)]
  Norm<T> norm;
  Incoming<T> incoming;    // backward only
  bool measure, need_weight;
  bool stream;             // store past the caches
  bool fetch;              // what is read comes from beyond the caches
};

// A matrix product over rows (pixels): y[m, o] = sum_k z[m, k] W[o, k]. Weights are packed in column panels
// [ceil(o / nr)][k][nr]. In a stem the k axis is (tap row, tap column, channel), gathered from the image.
template <class T> struct Pointwise {
  int64_t m, k, o;         // pixels, input channels (or gathered taps), output channels
  int64_t mc;              // pixels in one cache block
  const void* x;
  void* out;               // y forward, dx backward (null: not wanted)
  const void* packed;      // forward: panels over o; backward: panels over k of the transposed matrix
  const T* weight;         // the (o, k) matrix, where each panel is packed by who uses it: packed is null
  const T* gate;           // forward: of each image a factor for each channel of z (null: none), padded as norm's vectors
  int64_t image;           // its pixels
  Norm<T> norm;
  Incoming<T> incoming;    // backward only
  bool measure, need_weight;
  bool stream;             // store past the caches
};

// A depthwise convolution (its x, weight, pending norm), the norm between, and the pointwise one (its out, weights, sizes).
// Where there is a pointwise convolution before them (its x, packed weights, sizes, the norm pending on its x), the depthwise
// one reads what that gives, and has no x.
template <class T> struct Separable {
  Pointwise<T> expand;     // packed is null: none
  Depthwise<T> depthwise;
  Norm<T> mid;
  Pointwise<T> pointwise;
};

// A tensor of rows of channels: [n][hw][c].
template <class T> struct Rows {
  int64_t n, hw, c;
  const void *x, *g;
  const void* residual;    // added to z, not pooled (null: none)
  void* out;               // z forward, dx backward; pooled: [n][c]
  Norm<T> norm;
};

struct Window {            // which pixels of an image a stem multiplies: k is (tap row, tap column, channel)
  int64_t h, w, c, ho, wo;
  int kh, kw, sh, sw, pad_top, pad_left;
};

}  // namespace mnops
