// Tensors as every native backend sees them: layouts, results, the arguments of the schemas. What the stable ABI lacks
// (is_contiguous of a memory format) is made up for here.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

inline Tensor empty_channels_last(const Tensor& like, const std::vector<int64_t>& size) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt, MemoryFormat::ChannelsLast);
}
inline Tensor empty_like_type(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  return torch::stable::empty(size, type, std::nullopt, like.device(), std::nullopt, std::nullopt);
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
