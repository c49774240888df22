// The tensor side shared by pointwise_conv2d and stem_conv2d: products over the pixels of an image or over its windows.
#pragma once
#include "cpu/drivers/pointwise_conv2d.h"
#include "cpu/drivers/stem_conv2d.h"
#include "cpu/tensors.h"

namespace mnops {

// A weight (O, C, kh, kw) as the dense (O, K) matrix that the product wants: for a stem K is (tap row, tap column,
// channel), the order in which a window of a channels_last image lies.
template <class T> Array<T> weight_matrix(const Tensor& weight) {
  const bool taps = weight.size(2) * weight.size(3) > 1;
  return Array<T>(taps ? torch::stable::transpose(torch::stable::reshape(weight, {weight.size(0), weight.size(1), -1}), 1, 2) : weight,
                  weight.numel(), "weight");
}

// The memory of `packed`, where that is of such a weight, and packed for x's dtype.
template <class T> const void* packed_data(const Kernels<T>& kernels, const MaybeTensor& packed, const Tensor& weight, const Tensor& x) {
  if (!packed || weight.scalar_type() != x.scalar_type()) return nullptr;
  const int64_t bytes = ceil_div(weight.size(0), kernels.nr) * kernels.pointwise_packing.panel_bytes(weight.size(1));
  STD_TORCH_CHECK(packed->scalar_type() == ScalarType::Float && packed->numel() == ceil_div(bytes, 4), "mnops: the packed weight must have ",
                  ceil_div(bytes, 4), " elements, got ", packed->numel());
  return packed->const_data_ptr();
}

struct MatmulShape {
  int64_t m, k, o;
  std::vector<int64_t> y_size;
  const Window* window;  // null for a pointwise convolution
};

// gate: (N, C) in the dtype that x is computed in: factors of what is multiplied. packed: by pack_pointwise.
inline MeasuredResult matmul_forward(const MatmulShape& s, const Tensor& x, const Tensor& weight, const PendingTensors& norm,
                                     bool measure, const MaybeTensor& gate = std::nullopt, const MaybeTensor& packed = std::nullopt) {
  check_weight(weight, x);
  return with_kernels(x, [&](const auto& kernels, auto zero) -> MeasuredResult {
    using T = decltype(zero);
    const Tensor xl = channels_last(x);
    const Array<T> w = weight_matrix<T>(weight);
    const PendingArrays<T> pending(norm, x);
    const Measured<T> out(x, s.y_size, measure);
    const Array<T> gates(gate, x.size(0) * s.k, "gate");
    const Gate<T> factors{gates.data, x.size(2) * x.size(3)};
    void* const y = out.y.mutable_data_ptr();
    if (out.y.numel() && s.window)
      stem_conv2d<T>(kernels, torch_threads(), x.size(0), *s.window, s.o, xl.const_data_ptr(), w.data, pending.pending, y,
                     out.mean_data(), out.var_data());
    else if (out.y.numel())
      pointwise_conv2d<T>(kernels, torch_threads(), s.m, s.k, s.o, xl.const_data_ptr(), w.data, pending.pending, y, out.mean_data(),
                          out.var_data(), factors, packed_data(kernels, packed, weight, x));
    return {in_layout_of(x, out.y), out.mean, out.var};
  });
}

inline ConvGradResult matmul_backward(const MatmulShape& s, const OutputTensors& output, const Tensor& x, const Tensor& weight,
                                      const PendingTensors& norm, bool need_input, bool need_weight) {
  check_weight(weight, x);
  return with_kernels(x, [&](const auto& kernels, auto zero) -> ConvGradResult {
    using T = decltype(zero);
    const Tensor xl = channels_last(x);
    const Array<T> w = weight_matrix<T>(weight);
    const PendingArrays<T> pending(norm, x);
    const OutputArrays<T> out(output, s.o);
    for (int d = 0; d < 4; d++)
      STD_TORCH_CHECK(out.y.size(d) == s.y_size[d], "mnops: y must have the shape that x and weight give");
    const Tensor dx = need_input ? empty_result(x, {x.size(0), x.size(1), x.size(2), x.size(3)})
                                 : empty_like_type(x, {0}, x.scalar_type());
    const int64_t c = weight.size(1), taps = weight.size(2) * weight.size(3);
    Tensor dw = !need_weight ? empty_like_type(x, {0}, weight.scalar_type())
                : taps > 1   ? empty_like_type(x, {s.o, taps, c}, scalar_type_of<T>())
                             : empty_result(x, {s.o, c, 1, 1}, scalar_type_of<T>());  // dense in any layout
    const PendingGradTensors grads = PendingGradTensors::make<T>(x, norm, need_input);
    void* const dx_data = need_input ? dx.mutable_data_ptr() : nullptr;
    T* const dw_data = need_weight ? static_cast<T*>(dw.mutable_data_ptr()) : nullptr;
    if (s.window)
      stem_conv2d_backward<T>(kernels, torch_threads(), x.size(0), *s.window, s.o, out.output, xl.const_data_ptr(), w.data,
                              pending.pending, dx_data, dw_data, grads.pointers<T>());
    else
      pointwise_conv2d_backward<T>(kernels, torch_threads(), s.m, s.k, s.o, out.output, xl.const_data_ptr(), w.data,
                                   pending.pending, dx_data, dw_data, grads.pointers<T>());
    if (need_weight && taps > 1)
      dw = torch::stable::reshape(torch::stable::contiguous(torch::stable::transpose(dw, 1, 2)),
                                  {s.o, c, weight.size(2), weight.size(3)});
    return {need_input ? in_layout_of(x, dx) : dx, in_dtype_of(weight, dw), grads.mean, grads.var, grads.gamma, grads.beta};
  });
}

}  // namespace mnops
