// Tensors as every native backend sees them: layouts, results, the arguments of the schemas. What the stable ABI lacks
// (is_contiguous of a memory format) is made up for here.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/params.h"

namespace mnops {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

constexpr int64_t most_step = int64_t(1) << 30;  // strides, dilations and padding are ints in the kernels

inline bool is_channels_last(const Tensor& t) {  // dense NHWC; the stride of a dimension of size 1 says nothing
  const int64_t order[4] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (const int64_t d : order) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}
inline Tensor channels_last(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 0 || t.const_data_ptr(), "mnops: a tensor's memory was freed (sharded or resized to 0?)");
  return is_channels_last(t) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}
// The layout rule of every op: contiguous NCHW in, contiguous NCHW out; everything else is channels_last.
inline bool wants_nchw(const Tensor& x) { return x.is_contiguous() && !is_channels_last(x); }
inline Tensor in_layout_of(const Tensor& x, const Tensor& y) { return wants_nchw(x) ? torch::stable::contiguous(y) : y; }

// Not torch::stable::empty, which looks the operator up by its name at every call (1 us).
inline Tensor empty_strided(const Tensor& like, const Ints& size, const Ints& strides, int32_t dtype) {
  int32_t device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(), dtype, device, index, &result));
  return Tensor(result);
}
// The shim's number of a type: float32, float64 or that of `like`.
inline int32_t dtype_of(const Tensor& like, ScalarType type) {
  if (type == ScalarType::Float) return aoti_torch_dtype_float32();
  if (type == ScalarType::Double) return aoti_torch_dtype_float64();
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return dtype;
}
inline Tensor empty_channels_last(const Tensor& like, const Ints& size, ScalarType type) {
  const int64_t c = size[1], h = size[2], w = size[3];
  return empty_strided(like, size, {h * w * c, 1, w * c, c}, dtype_of(like, type));
}
inline Tensor empty_channels_last(const Tensor& like, const Ints& size) {
  return empty_channels_last(like, size, like.scalar_type());
}
inline Tensor empty_like_type(const Tensor& like, const Ints& size, ScalarType type) {
  Ints strides(size.size(), 1);
  for (size_t d = size.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(size[d], 1);
  return empty_strided(like, size, strides, dtype_of(like, type));
}

// The arguments (mean, var, gamma, beta, eps, act) of a schema.
struct PendingTensors {
  MaybeTensor mean, var, gamma, beta;
  double eps;
  std::string act;
};

inline Act parse_act(const std::string& name) {
  const char* names[] = {"none", "relu", "relu6", "hardswish", "silu"};
  for (int i = 0; i < 5; i++)
    if (name == names[i]) return Act(i);
  STD_TORCH_CHECK(false, "mnops: act must be one of none, relu, relu6, hardswish, silu, got ", name);
  return Act::none;
}

inline void check_residual(const Tensor& residual, const Tensor& x) {
  bool same = residual.dim() == x.dim() && residual.scalar_type() == x.scalar_type() && residual.is_cuda() == x.is_cuda();
  for (int64_t d = 0; same && d < x.dim(); d++) same = residual.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "norm_act: residual must have the shape, dtype and device of x");
}

using MeasuredResult = std::tuple<Tensor, Tensor, Tensor>;
using ConvGradResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using NormGradResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace mnops
