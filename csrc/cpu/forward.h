// The forward ops of the CPU, for those that are made of several of them.
#pragma once
#include "common/tensors.h"

namespace mnops::cpu {

MeasuredResult depthwise_conv2d(const Tensor& x, const Tensor& weight, const PendingTensors& norm, const Ints& stride,
                                const Ints& padding, const Ints& dilation, bool measure);
// packed: the weight, by pack_pointwise. gate: (N, C), for inference: factors of x's channels behind its norm, in the dtype that x is computed in.
MeasuredResult pointwise_conv2d(const Tensor& x, const Tensor& weight, const PendingTensors& norm, bool measure,
                                const MaybeTensor& gate = std::nullopt, const MaybeTensor& packed = std::nullopt);
MeasuredResult stem_conv2d(const Tensor& x, const Tensor& weight, const PendingTensors& norm, const Ints& stride,
                           const Ints& padding, bool measure);
Tensor separable_conv2d(const Tensor& x, const Tensor& depthwise_weight, const Tensor& weight, const PendingTensors& norm,
                        const PendingTensors& mid, const Ints& stride, const Ints& padding, const Ints& dilation,
                        const MaybeTensor& packed = std::nullopt);
// The same of pointwise_conv2d(x, expand_weight), on whose output `norm` is pending; `on_x` is on x.
Tensor inverted_residual(const Tensor& x, const Tensor& expand_weight, const Tensor& depthwise_weight, const Tensor& weight,
                         const PendingTensors& on_x, const PendingTensors& norm, const PendingTensors& mid, const Ints& stride,
                         const Ints& padding, const Ints& dilation, const MaybeTensor& expand_packed, const MaybeTensor& packed);
Tensor norm_act(const Tensor& x, const PendingTensors& norm, const MaybeTensor& residual);
Tensor norm_act_pool(const Tensor& x, const PendingTensors& norm);

}  // namespace mnops::cpu
