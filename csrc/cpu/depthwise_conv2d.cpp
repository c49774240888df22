#include "cpu/drivers/depthwise_conv2d.h"

#include "common/depthwise_shape.h"
#include "cpu/forward.h"
#include "cpu/tensors.h"

namespace mnops {
MeasuredResult cpu::depthwise_conv2d(const Tensor& x, const Tensor& weight, const PendingTensors& norm, const Ints& stride,
                                     const Ints& padding, const Ints& dilation, bool measure) {
  const DepthwiseShape s = depthwise_shape(x, weight, stride, padding, dilation);
  check_weight(weight, x);
  return with_kernels(x, [&](const auto& kernels, auto zero) -> MeasuredResult {
    using T = decltype(zero);
    const Tensor xl = channels_last(x);
    const Array<T> w(weight, weight.numel(), "weight");
    const PendingArrays<T> pending(norm, x);
    const Measured<T> out(x, {s.n, s.c, s.ho, s.wo}, measure);
    if (out.y.numel())
      mnops::depthwise_conv2d<T>(kernels, torch_threads(), s, xl.const_data_ptr(), w.data, pending.pending,
                                 out.y.mutable_data_ptr(), out.mean_data(), out.var_data());
    return {in_layout_of(x, out.y), out.mean, out.var};
  });
}

namespace {

MeasuredResult forward(const Tensor& x, const Tensor& weight, const MaybeTensor& mean, const MaybeTensor& var,
                       const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act, Ints stride,
                       Ints padding, Ints dilation, bool measure) {
  return cpu::depthwise_conv2d(x, weight, {mean, var, gamma, beta, eps, act}, stride, padding, dilation, measure);
}

ConvGradResult backward(const Tensor& g, const MaybeTensor& g_mean, const MaybeTensor& g_var, const Tensor& y,
                        const Tensor& mean_y, const Tensor& x, const Tensor& weight, const MaybeTensor& mean,
                        const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                        std::string act, Ints stride, Ints padding, Ints dilation, bool need_input, bool need_weight) {
  const DepthwiseShape s = depthwise_shape(x, weight, stride, padding, dilation);
  check_weight(weight, x);
  return with_kernels(x, [&](const auto& kernels, auto zero) -> ConvGradResult {
    using T = decltype(zero);
    const Tensor xl = channels_last(x);
    const Array<T> w(weight, weight.numel(), "weight");
    const PendingTensors norm{mean, var, gamma, beta, eps, act};
    const PendingArrays<T> pending(norm, x);
    const OutputArrays<T> out({g, g_mean, g_var, y, mean_y}, s.c);
    STD_TORCH_CHECK(out.y.size(0) == s.n && out.y.size(1) == s.c && out.y.size(2) == s.ho && out.y.size(3) == s.wo,
                    "depthwise_conv2d_backward: y must have the shape that x and weight give");
    const Tensor dx = need_input ? empty_result(x, {s.n, s.c, s.h, s.w}) : empty_like_type(x, {0}, x.scalar_type());
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
