#include "cpu/drivers/depthwise_conv2d.h"

#include "cpu/tensors.h"

namespace mnops {
namespace {

DepthwiseShape shape_of(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1,
                  "depthwise_conv2d: weight must be (C, 1, K, K) with x (N, C, H, W)");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                  "depthwise_conv2d: stride and dilation have 2 elements, padding has 4");
  DepthwiseShape s{};
  s.n = x.size(0), s.c = x.size(1), s.h = x.size(2), s.w = x.size(3);
  s.kh = int(weight.size(2)), s.kw = int(weight.size(3));
  s.sh = int(stride[0]), s.sw = int(stride[1]), s.dh = int(dilation[0]), s.dw = int(dilation[1]);
  s.pad_top = int(padding[0]), s.pad_left = int(padding[2]);
  STD_TORCH_CHECK(s.kh >= 1 && s.kw >= 1 && s.kh <= 64 && s.kw <= 64, "depthwise_conv2d: kernels go up to 64 x 64");
  STD_TORCH_CHECK(s.sh >= 1 && s.sw >= 1 && s.dh >= 1 && s.dw >= 1, "depthwise_conv2d: stride and dilation must be at least 1");
  for (const int64_t p : padding) STD_TORCH_CHECK(p >= 0, "depthwise_conv2d: padding must not be negative, got ", p);
  s.ho = (s.h + padding[0] + padding[1] - int64_t(s.dh) * (s.kh - 1) - 1) / s.sh + 1;
  s.wo = (s.w + padding[2] + padding[3] - int64_t(s.dw) * (s.kw - 1) - 1) / s.sw + 1;
  STD_TORCH_CHECK(s.h + padding[0] + padding[1] > int64_t(s.dh) * (s.kh - 1) && s.w + padding[2] + padding[3] > int64_t(s.dw) * (s.kw - 1),
                  "depthwise_conv2d: the padded input must be at least as large as the dilated kernel");
  return s;
}

MeasuredResult forward(const Tensor& x, const Tensor& weight, const MaybeTensor& mean, const MaybeTensor& var,
                       const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act, Ints stride,
                       Ints padding, Ints dilation, bool measure) {
  const DepthwiseShape s = shape_of(x, weight, stride, padding, dilation);
  return with_kernels(x, [&](const auto& kernels, auto zero) -> MeasuredResult {
    using T = decltype(zero);
    const Tensor xl = channels_last(x);
    const Array<T> w(weight, weight.numel(), "weight");
    const PendingArrays<T> pending({mean, var, gamma, beta, eps, act}, s.c);
    const Measured<T> out(x, {s.n, s.c, s.ho, s.wo}, measure);
    if (out.y.numel())
      depthwise_conv2d<T>(kernels, torch_threads(), s, xl.const_data_ptr(), w.data, pending.pending, out.y.mutable_data_ptr(),
                          out.mean_data(), out.var_data());
    return {in_layout_of(x, out.y), out.mean, out.var};
  });
}

ConvGradResult backward(const Tensor& g, const MaybeTensor& g_mean, const MaybeTensor& g_var, const Tensor& y,
                        const Tensor& mean_y, const Tensor& x, const Tensor& weight, const MaybeTensor& mean,
                        const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                        std::string act, Ints stride, Ints padding, Ints dilation, bool need_input, bool need_weight) {
  const DepthwiseShape s = shape_of(x, weight, stride, padding, dilation);
  return with_kernels(x, [&](const auto& kernels, auto zero) -> ConvGradResult {
    using T = decltype(zero);
    const Tensor xl = channels_last(x);
    const Array<T> w(weight, weight.numel(), "weight");
    const PendingTensors norm{mean, var, gamma, beta, eps, act};
    const PendingArrays<T> pending(norm, s.c);
    const OutputArrays<T> out({g, g_mean, g_var, y, mean_y}, s.c);
    STD_TORCH_CHECK(out.y.size(0) == s.n && out.y.size(1) == s.c && out.y.size(2) == s.ho && out.y.size(3) == s.wo,
                    "depthwise_conv2d_backward: y must have the shape that x and weight give");
    const Tensor dx = need_input ? empty_channels_last(x, {s.n, s.c, s.h, s.w}) : empty_like_type(x, {0}, x.scalar_type());
    const Tensor dw = need_weight ? empty_like_type(x, {s.c, 1, s.kh, s.kw}, scalar_type_of<T>())
                                  : empty_like_type(x, {0}, weight.scalar_type());
    const PendingGradTensors grads = PendingGradTensors::make<T>(x, norm, need_input);
    depthwise_conv2d_backward<T>(kernels, torch_threads(), s, out.output, xl.const_data_ptr(), w.data, pending.pending,
                                 need_input ? dx.mutable_data_ptr() : nullptr,
                                 need_weight ? static_cast<T*>(dw.mutable_data_ptr()) : nullptr, grads.pointers<T>());
    return {need_input ? in_layout_of(x, dx) : dx, in_dtype_of(weight, dw), grads.mean, grads.var, grads.gamma, grads.beta};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&forward));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&backward));
}

}  // namespace mnops
