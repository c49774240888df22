// BatchNorm's running statistics, both in one call: as stock operations they are five.
#include "cpu/tensors.h"

namespace mnops {
namespace {

template <class T> void lerp(const Tensor& running, const Tensor& batch, double momentum, double factor) {
  T* const to = static_cast<T*>(running.mutable_data_ptr());
  const T* const from = static_cast<const T*>(batch.const_data_ptr());
  const T weight = T(momentum), scale = T(factor);
  for (int64_t i = 0; i < running.numel(); i++) to[i] += weight * (from[i] * scale - to[i]);
}

void update_running(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var, double momentum,
                    double unbias) {
  const ScalarType type = running_mean.scalar_type();
  for (const Tensor* t : {&running_mean, &running_var, &mean, &var})
    STD_TORCH_CHECK(t->is_contiguous() && t->numel() == mean.numel() && t->scalar_type() == type &&
                        (type == ScalarType::Float || type == ScalarType::Double),
                    "update_running: vectors must be dense, of one length, all float32 or all float64");
  const auto one = type == ScalarType::Float ? lerp<float> : lerp<double>;
  one(running_mean, mean, momentum, 1);
  one(running_var, var, momentum, unbias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CPU, m) { m.impl("update_running", TORCH_BOX(&update_running)); }

}  // namespace mnops
