#include "cpu/matmul_conv2d.h"

namespace mnops {
namespace {

MatmulShape shape_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 1 && weight.size(3) == 1,
                  "pointwise_conv2d: weight must be (O, C, 1, 1) with x (N, C, H, W)");
  return {x.size(0) * x.size(2) * x.size(3), x.size(1), weight.size(0), {x.size(0), weight.size(0), x.size(2), x.size(3)}, nullptr};
}

MeasuredResult forward(const Tensor& x, const Tensor& weight, const MaybeTensor& mean, const MaybeTensor& var,
                       const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act, bool measure) {
  return matmul_forward(shape_of(x, weight), x, weight, {mean, var, gamma, beta, eps, act}, measure);
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
}

}  // namespace mnops
