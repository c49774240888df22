#include "cpu/drivers/separable_conv2d.h"

#include "common/depthwise_shape.h"
#include "cpu/tensors.h"

namespace mnops {
namespace {

Tensor forward(const Tensor& x, const Tensor& depthwise_weight, const Tensor& weight, const MaybeTensor& mean,
               const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act,
               const MaybeTensor& mid_mean, const MaybeTensor& mid_var, const MaybeTensor& mid_gamma, const MaybeTensor& mid_beta,
               double mid_eps, std::string mid_act, Ints stride, Ints padding, Ints dilation) {
  const DepthwiseShape s = depthwise_shape(x, depthwise_weight, stride, padding, dilation);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == s.c && weight.size(2) == 1 && weight.size(3) == 1,
                  "separable_conv2d: weight must be (O, C, 1, 1) with x (N, C, H, W)");
  return with_kernels(x, [&](const auto& kernels, auto zero) -> Tensor {
    using T = decltype(zero);
    const Tensor xl = channels_last(x);
    const Array<T> taps(depthwise_weight, depthwise_weight.numel(), "depthwise_weight"), w(weight, weight.numel(), "weight");
    const PendingArrays<T> pending({mean, var, gamma, beta, eps, act}, s.c);
    const PendingArrays<T> mid({mid_mean, mid_var, mid_gamma, mid_beta, mid_eps, mid_act}, s.c);
    const Tensor y = empty_result(x, {s.n, weight.size(0), s.ho, s.wo});
    if (y.numel())
      separable_conv2d<T>(kernels, torch_threads(), s, weight.size(0), xl.const_data_ptr(), pending.pending, taps.data,
                          mid.pending, w.data, y.mutable_data_ptr());
    return in_layout_of(x, y);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CPU, m) { m.impl("separable_conv2d", TORCH_BOX(&forward)); }

}  // namespace mnops
