// norm_act and norm_act_pool: the same passes over pixels, the second averaged over each image.
#include "cpu/drivers/norm_act.h"

#include "cpu/forward.h"
#include "cpu/tensors.h"

namespace mnops {
namespace {

Tensor run(bool pool, const Tensor& x, const PendingTensors& norm, const MaybeTensor& residual) {
  STD_TORCH_CHECK(x.dim() == 4, "norm_act: x must be (N, C, H, W), got ", x.dim(), " dimensions");
  if (residual) check_residual(*residual, x);
  return with_kernels(x, [&](const auto& kernels, auto zero) -> Tensor {
    using T = decltype(zero);
    const int64_t n = x.size(0), c = x.size(1), hw = x.size(2) * x.size(3);
    STD_TORCH_CHECK(!pool || hw > 0, "norm_act_pool: the average of an empty map is not defined");
    const Tensor xl = channels_last(x);
    const Tensor rl = residual ? channels_last(*residual) : xl;
    const PendingArrays<T> pending(norm, x);
    const Tensor z = pool ? empty_like_type(x, {n, c}, x.scalar_type()) : empty_result(x, {n, c, x.size(2), x.size(3)});
    if (z.numel())
      norm_act<T>(kernels, torch_threads(), n, hw, c, pool, xl.const_data_ptr(), pending.pending,
                  residual ? rl.const_data_ptr() : nullptr, z.mutable_data_ptr());
    return pool ? z : in_layout_of(x, z);
  });
}

}  // namespace

Tensor cpu::norm_act(const Tensor& x, const PendingTensors& norm, const MaybeTensor& residual) {
  return run(false, x, norm, residual);
}
Tensor cpu::norm_act_pool(const Tensor& x, const PendingTensors& norm) { return run(true, x, norm, std::nullopt); }

namespace {

Tensor forward(const Tensor& x, const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& gamma,
               const MaybeTensor& beta, double eps, std::string act, const MaybeTensor& residual) {
  return cpu::norm_act(x, {mean, var, gamma, beta, eps, act}, residual);
}

Tensor forward_pool(const Tensor& x, const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& gamma,
                    const MaybeTensor& beta, double eps, std::string act) {
  return cpu::norm_act_pool(x, {mean, var, gamma, beta, eps, act});
}

template <bool pool>
NormGradResult backward(const Tensor& g, const Tensor& x, const MaybeTensor& mean, const MaybeTensor& var,
                        const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act) {
  STD_TORCH_CHECK(x.dim() == 4 && g.dim() == (pool ? 2 : 4) && g.scalar_type() == x.scalar_type(),
                  "norm_act_backward: g must be as the output, in x's dtype");
  return with_kernels(x, [&](const auto& kernels, auto zero) -> NormGradResult {
    using T = decltype(zero);
    const int64_t n = x.size(0), c = x.size(1), hw = x.size(2) * x.size(3);
    STD_TORCH_CHECK(g.numel() == (pool ? n * c : n * c * hw), "norm_act_backward: g must have the shape of the output");
    const Tensor xl = channels_last(x), gl = pool ? torch::stable::contiguous(g) : channels_last(g);
    const PendingTensors norm{mean, var, gamma, beta, eps, act};
    const PendingArrays<T> pending(norm, x);
    const Tensor dx = empty_result(x, {n, c, x.size(2), x.size(3)});
    const PendingGradTensors grads = PendingGradTensors::make<T>(x, norm, true);
    norm_act_backward<T>(kernels, torch_threads(), n, hw, c, pool, gl.const_data_ptr(), xl.const_data_ptr(), pending.pending,
                         dx.mutable_data_ptr(), grads.pointers<T>());
    return {in_layout_of(x, dx), grads.mean, grads.var, grads.gamma, grads.beta};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&forward));
  m.impl("norm_act_backward", TORCH_BOX(&backward<false>));
  m.impl("norm_act_pool", TORCH_BOX(&forward_pool));
  m.impl("norm_act_pool_backward", TORCH_BOX(&backward<true>));
}

}  // namespace mnops
