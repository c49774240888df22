#include "cpu/drivers/separable_conv2d.h"

#include "common/depthwise_shape.h"
#include "cpu/forward.h"
#include "cpu/matmul_conv2d.h"

namespace mnops {

// expand_weight: null, or that of a pointwise convolution before the block, on whose output `norm` is pending.
static Tensor block(const Tensor& x, const Tensor* expand_weight, const Tensor& depthwise_weight, const Tensor& weight,
                    const PendingTensors& on_x, const PendingTensors& norm, const PendingTensors& mid_norm, const Ints& stride,
                    const Ints& padding, const Ints& dilation, const MaybeTensor& expand_packed, const MaybeTensor& packed) {
  const Tensor* const e = expand_weight;
  STD_TORCH_CHECK(!e || (x.dim() == 4 && e->dim() == 4 && e->size(1) == x.size(1) && e->size(2) == 1 && e->size(3) == 1),
                  "pointwise_conv2d: weight must be (O, C, 1, 1) with x (N, C, H, W)");
  const DepthwiseShape s = depthwise_shape(x, depthwise_weight, stride, padding, dilation, e ? e->size(0) : -1);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == s.c && weight.size(2) == 1 && weight.size(3) == 1,
                  "separable_conv2d: weight must be (O, C, 1, 1) with x (N, C, H, W)");
  check_weight(depthwise_weight, x), check_weight(weight, x), check_weight(e ? *e : weight, x);
  return with_kernels(x, [&](const auto& kernels, auto zero) -> Tensor {
    using T = decltype(zero);
    const Tensor xl = channels_last(x);
    const Array<T> taps(depthwise_weight, depthwise_weight.numel(), "depthwise_weight"), w(weight, weight.numel(), "weight");
    const PendingArrays<T> before(on_x, x), pending(norm, x, s.c), mid(mid_norm, x, s.c);
    const Array<T> first = e ? Array<T>(*e, e->numel(), "weight") : Array<T>();
    const Expand<T> expand{x.size(1), first.data, before.pending, packed_data(kernels, expand_packed, e ? *e : weight, x)};
    const Tensor y = empty_result(x, {s.n, weight.size(0), s.ho, s.wo});
    if (y.numel())
      mnops::separable_conv2d<T>(kernels, torch_threads(), s, weight.size(0), xl.const_data_ptr(), pending.pending, taps.data,
                                 mid.pending, w.data, y.mutable_data_ptr(), e ? &expand : nullptr, packed_data(kernels, packed, weight, x));
    return in_layout_of(x, y);
  });
}

Tensor cpu::separable_conv2d(const Tensor& x, const Tensor& depthwise_weight, const Tensor& weight, const PendingTensors& norm,
                             const PendingTensors& mid, const Ints& stride, const Ints& padding, const Ints& dilation,
                             const MaybeTensor& packed) {
  return block(x, nullptr, depthwise_weight, weight, {{}, {}, {}, {}, 0, "none"}, norm, mid, stride, padding, dilation, {}, packed);
}
Tensor cpu::inverted_residual(const Tensor& x, const Tensor& expand_weight, const Tensor& depthwise_weight, const Tensor& weight,
                              const PendingTensors& on_x, const PendingTensors& norm, const PendingTensors& mid, const Ints& stride,
                              const Ints& padding, const Ints& dilation, const MaybeTensor& expand_packed,
                              const MaybeTensor& packed) {
  return block(x, &expand_weight, depthwise_weight, weight, on_x, norm, mid, stride, padding, dilation, expand_packed, packed);
}

namespace {

Tensor forward(const Tensor& x, const Tensor& depthwise_weight, const Tensor& weight, const MaybeTensor& mean,
               const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act,
               const MaybeTensor& mid_mean, const MaybeTensor& mid_var, const MaybeTensor& mid_gamma, const MaybeTensor& mid_beta,
               double mid_eps, std::string mid_act, Ints stride, Ints padding, Ints dilation) {
  return cpu::separable_conv2d(x, depthwise_weight, weight, {mean, var, gamma, beta, eps, act},
                               {mid_mean, mid_var, mid_gamma, mid_beta, mid_eps, mid_act}, stride, padding, dilation);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CPU, m) { m.impl("separable_conv2d", TORCH_BOX(&forward)); }

}  // namespace mnops
