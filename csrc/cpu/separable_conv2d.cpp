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
  check_weight(depthwise_weight, x), check_weight(weight, x);
  return with_kernels(x, [&](const auto& kernels, auto zero) -> Tensor {
    using T = decltype(zero);
    const Tensor xl = channels_last(x);
    const Array<T> taps(depthwise_weight, depthwise_weight.numel(), "depthwise_weight"), w(weight, weight.numel(), "weight");
    const PendingArrays<T> pending({mean, var, gamma, beta, eps, act}, x);
    const PendingArrays<T> mid({mid_mean, mid_var, mid_gamma, mid_beta, mid_eps, mid_act}, x);
    const Tensor y = empty_result(x, {s.n, weight.size(0), s.ho, s.wo});
    if (y.numel())
      separable_conv2d<T>(kernels, torch_threads(), s, weight.size(0), xl.const_data_ptr(), pending.pending, taps.data,
                          mid.pending, w.data, y.mutable_data_ptr());
    return in_layout_of(x, y);
  });
}

Tensor chain(const Tensor& x, std::vector<Tensor> tensors, std::vector<double> eps, std::string act, Ints geometry) {
  STD_TORCH_CHECK(!eps.empty() && eps.size() % 2 == 0 && tensors.size() == 5 * eps.size() && geometry.size() == 4 * eps.size(),
                  "separable_chain: a block has 10 tensors, 2 eps and 8 ints of geometry, got ", tensors.size(), ", ", eps.size(),
                  " and ", geometry.size());
  Tensor y = x;
  for (size_t i = 0; 2 * i < eps.size(); i++) {
    const Tensor* const t = &tensors[10 * i];
    const int64_t* const g = &geometry[8 * i];
    y = forward(y, t[0], t[1], t[2], t[3], t[4], t[5], eps[2 * i], act, t[6], t[7], t[8], t[9], eps[2 * i + 1], act, {g[0], g[1]},
                {g[2], g[3], g[4], g[5]}, {g[6], g[7]});
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CPU, m) {
  m.impl("separable_conv2d", TORCH_BOX(&forward));
  m.impl("separable_chain", TORCH_BOX(&chain));
}

}  // namespace mnops
