// The sizes of a depthwise convolution from its tensors, shared by depthwise_conv2d and separable_conv2d.
#pragma once
#include "common/tensors.h"

namespace mnops {

// c: channels, where they are not x's.
inline DepthwiseShape depthwise_shape(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                                      const Ints& dilation, int64_t c = -1) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(0) == (c < 0 ? x.size(1) : c) && weight.size(1) == 1 &&
                      weight.size(2) == weight.size(3),
                  "depthwise_conv2d: weight must be (C, 1, K, K) with x (N, C, H, W)");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                  "depthwise_conv2d: stride and dilation have 2 elements, padding has 4");
  DepthwiseShape s{};
  s.n = x.size(0), s.c = weight.size(0), s.h = x.size(2), s.w = x.size(3);
  s.kh = int(weight.size(2)), s.kw = int(weight.size(3));
  s.sh = int(stride[0]), s.sw = int(stride[1]), s.dh = int(dilation[0]), s.dw = int(dilation[1]);
  s.pad_top = int(padding[0]), s.pad_left = int(padding[2]);
  STD_TORCH_CHECK(s.kh >= 1 && s.kw >= 1 && s.kh <= 64 && s.kw <= 64, "depthwise_conv2d: kernels go up to 64 x 64");
  STD_TORCH_CHECK(std::max({stride[0], stride[1], dilation[0], dilation[1], *std::max_element(padding.begin(), padding.end())}) <= most_step,
                  "depthwise_conv2d: strides, dilations and padding go up to ", most_step);
  STD_TORCH_CHECK(s.sh >= 1 && s.sw >= 1 && s.dh >= 1 && s.dw >= 1, "depthwise_conv2d: stride and dilation must be at least 1");
  for (const int64_t p : padding) STD_TORCH_CHECK(p >= 0, "depthwise_conv2d: padding must not be negative, got ", p);
  s.ho = (s.h + padding[0] + padding[1] - int64_t(s.dh) * (s.kh - 1) - 1) / s.sh + 1;
  s.wo = (s.w + padding[2] + padding[3] - int64_t(s.dw) * (s.kw - 1) - 1) / s.sw + 1;
  STD_TORCH_CHECK(s.h + padding[0] + padding[1] > int64_t(s.dh) * (s.kh - 1) && s.w + padding[2] + padding[3] > int64_t(s.dw) * (s.kw - 1),
                  "depthwise_conv2d: the padded input must be at least as large as the dilated kernel");
  return s;
}

}  // namespace mnops
