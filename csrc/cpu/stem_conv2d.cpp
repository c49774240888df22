#include "cpu/forward.h"
#include "cpu/matmul_conv2d.h"

namespace mnops {
namespace {

Window window_of(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == weight.size(3),
                  "stem_conv2d: weight must be (O, C, K, K) with x (N, C, H, W)");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4, "stem_conv2d: stride has 2 elements, padding has 4");
  for (const int64_t s : stride) STD_TORCH_CHECK(s >= 1 && s <= most_step, "stem_conv2d: strides are from 1 to ", most_step, ", got ", s);
  for (const int64_t p : padding)
    STD_TORCH_CHECK(p >= 0 && p <= most_step, "stem_conv2d: padding must not be negative, and at most ", most_step, ", got ", p);
  Window w{};
  w.h = x.size(2), w.w = x.size(3), w.c = x.size(1), w.kh = int(weight.size(2)), w.kw = int(weight.size(3));
  w.sh = int(stride[0]), w.sw = int(stride[1]), w.pad_top = int(padding[0]), w.pad_left = int(padding[2]);
  STD_TORCH_CHECK(w.h + padding[0] + padding[1] >= w.kh && w.w + padding[2] + padding[3] >= w.kw,
                  "stem_conv2d: the padded input must be at least as large as the kernel");
  w.ho = (w.h + padding[0] + padding[1] - w.kh) / w.sh + 1;
  w.wo = (w.w + padding[2] + padding[3] - w.kw) / w.sw + 1;
  return w;
}

MatmulShape shape_of(const Tensor& x, const Tensor& weight, const Window& w) {
  return {x.size(0) * w.ho * w.wo, w.kh * w.kw * w.c, weight.size(0), {x.size(0), weight.size(0), w.ho, w.wo}, &w};
}

}  // namespace

MeasuredResult cpu::stem_conv2d(const Tensor& x, const Tensor& weight, const PendingTensors& norm, const Ints& stride,
                                const Ints& padding, bool measure) {
  const Window w = window_of(x, weight, stride, padding);
  return matmul_forward(shape_of(x, weight, w), x, weight, norm, measure);
}

namespace {

MeasuredResult forward(const Tensor& x, const Tensor& weight, const MaybeTensor& mean, const MaybeTensor& var,
                       const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act, Ints stride,
                       Ints padding, bool measure) {
  return cpu::stem_conv2d(x, weight, {mean, var, gamma, beta, eps, act}, stride, padding, measure);
}

ConvGradResult backward(const Tensor& g, const MaybeTensor& g_mean, const MaybeTensor& g_var, const Tensor& y,
                        const Tensor& mean_y, const Tensor& x, const Tensor& weight, const MaybeTensor& mean,
                        const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                        std::string act, Ints stride, Ints padding, bool need_input, bool need_weight) {
  const Window w = window_of(x, weight, stride, padding);
  return matmul_backward(shape_of(x, weight, w), {g, g_mean, g_var, y, mean_y}, x, weight, {mean, var, gamma, beta, eps, act},
                         need_input, need_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CPU, m) {
  m.impl("stem_conv2d", TORCH_BOX(&forward));
  m.impl("stem_conv2d_backward", TORCH_BOX(&backward));
}

}  // namespace mnops
