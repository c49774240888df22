#include "cpu/forward.h"
#include "cpu/matmul_conv2d.h"

namespace mnops {
namespace {

MatmulShape shape_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 1 && weight.size(3) == 1,
                  "pointwise_conv2d: weight must be (O, C, 1, 1) with x (N, C, H, W)");
  return {x.size(0) * x.size(2) * x.size(3), x.size(1), weight.size(0), {x.size(0), weight.size(0), x.size(2), x.size(3)}, nullptr};
}

}  // namespace

MeasuredResult cpu::pointwise_conv2d(const Tensor& x, const Tensor& weight, const PendingTensors& norm, bool measure,
                                     const MaybeTensor& gate, const MaybeTensor& packed) {
  return matmul_forward(shape_of(x, weight), x, weight, norm, measure, gate, packed);
}

namespace {

MeasuredResult forward(const Tensor& x, const Tensor& weight, const MaybeTensor& mean, const MaybeTensor& var,
                       const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act, bool measure) {
  return cpu::pointwise_conv2d(x, weight, {mean, var, gamma, beta, eps, act}, measure);
}

Tensor pack_pointwise(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1, "pack_pointwise: weight must be (O, C, 1, 1)");
  return with_kernels(weight, [&](const auto& kernels, auto zero) -> Tensor {
    using T = decltype(zero);
    const int64_t o = weight.size(0), c = weight.size(1), panels = ceil_div(o, kernels.nr);
    const Array<T> w(weight, weight.numel(), "weight");
    const Tensor packed = empty_like_type(weight, {ceil_div(panels * kernels.pointwise_packing.panel_bytes(c), 4)}, ScalarType::Float);
    if (packed.numel()) kernels.pointwise_packing.columns(w.data, o, c, 0, panels, packed.mutable_data_ptr());
    return packed;
  });
}

ConvGradResult backward(const Tensor& g, const MaybeTensor& g_mean, const MaybeTensor& g_var, const Tensor& y,
                        const Tensor& mean_y, const Tensor& x, const Tensor& weight, const MaybeTensor& mean,
                        const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                        std::string act, bool need_input, bool need_weight) {
  return matmul_backward(shape_of(x, weight), {g, g_mean, g_var, y, mean_y}, x, weight, {mean, var, gamma, beta, eps, act},
                         need_input, need_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CPU, m) {
  m.impl("pointwise_conv2d", TORCH_BOX(&forward));
  m.impl("pointwise_conv2d_backward", TORCH_BOX(&backward));
  m.impl("pack_pointwise", TORCH_BOX(&pack_pointwise));
}

}  // namespace mnops
