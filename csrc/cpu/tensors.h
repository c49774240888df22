// Tensors in and out of the CPU drivers: dtype dispatch, arrays, threads.
#pragma once
#include "common/tensors.h"
#include "cpu/dispatch.h"
#include "cpu/drivers/common.h"
#include "cpu/memory.h"

namespace mnops {

template <class T> constexpr ScalarType scalar_type_of() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

// Calls f(kernels, T) with the kernels of x's dtype and their arithmetic type.
template <class F> auto with_kernels(const Tensor& x, F f) {
  const InstructionSet& isa = instruction_set();
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(isa.f32, float());
    case ScalarType::Half: return f(isa.f16, float());
    case ScalarType::BFloat16: return f(isa.bf16, float());
    case ScalarType::Double: return f(isa.f64, double());
    default: break;
  }
  STD_TORCH_CHECK(false, "mnops: x must be float32, float64, float16 or bfloat16");
  return f(isa.f32, float());
}

// A dense array of T for a kernel: the tensor itself where it is one already.
template <class T> struct Array {
  std::optional<Tensor> tensor;
  const T* data = nullptr;
  Array() = default;
  Array(const MaybeTensor& t, int64_t count, const char* name) {
    if (!t) return;
    STD_TORCH_CHECK(t->numel() == count, "mnops: ", name, " must have ", count, " elements, got ", t->numel());
    tensor = t->scalar_type() == scalar_type_of<T>() ? *t : torch::stable::to(*t, scalar_type_of<T>());
    if (!tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
    data = static_cast<const T*>(tensor->const_data_ptr());
    STD_TORCH_CHECK(data || !count, "mnops: the memory of ", name, " was freed (sharded or resized to 0?)");
  }
};

// x (N, C, H, W) and what is pending on it. The contract of mnops.ops, as strictly: eager calls come here unchecked.
template <class T> struct PendingArrays {
  Array<T> mean, var, gamma, beta;
  Pending<T> pending;
  PendingArrays(const PendingTensors& p, const Tensor& x) : PendingArrays(p, x, x.size(1)) {}
  PendingArrays(const PendingTensors& p, const Tensor& x, int64_t c)
      : mean(vector(p.mean, c, "mean")), var(vector(p.var, c, "var")), gamma(vector(p.gamma, c, "weight of the norm")),
        beta(vector(p.beta, c, "bias of the norm")),
        pending{mean.data, var.data, gamma.data, beta.data, p.eps, parse_act(p.act)} {
    STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "mnops: C, H and W of x must be positive");
    STD_TORCH_CHECK((p.mean && p.var) || !(p.mean || p.var || p.gamma || p.beta),
                    "mnops: mean and var must be given together, and with weight or bias of the norm");
  }

 private:
  static Array<T> vector(const MaybeTensor& t, int64_t c, const char* name) {
    STD_TORCH_CHECK(!t || (t->dim() == 1 && t->scalar_type() == scalar_type_of<T>()), "mnops: ", name,
                    " must be (C,) in the dtype that x is computed in");
    return Array<T>(t, c, name);
  }
};

inline void check_weight(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() ||
                      (weight.scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double),
                  "mnops: weight must have the dtype of x, or float32 with half x");
}

// Gradients of those vectors: empty where the vector was not given.
struct PendingGradTensors {
  Tensor mean, var, gamma, beta;
  template <class T> static PendingGradTensors make(const Tensor& x, const PendingTensors& p, bool wanted) {
    auto one = [&](const MaybeTensor& t) { return empty_like_type(x, {wanted && t ? t->numel() : 0}, scalar_type_of<T>()); };
    return {one(p.mean), one(p.var), one(p.gamma), one(p.beta)};
  }
  template <class T> PendingGrads<T> pointers() const {
    auto one = [](const Tensor& t) { return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
    return {one(mean), one(var), one(gamma), one(beta)};
  }
};

// The arguments (g, g_mean, g_var, y, mean_y) of a backward schema.
struct OutputTensors {
  Tensor g;
  MaybeTensor g_mean, g_var;
  Tensor y, mean;
};

template <class T> struct OutputArrays {
  Tensor g, y;
  Array<T> g_mean, g_var, mean;
  Output<T> output;
  OutputArrays(const OutputTensors& o, int64_t c)
      : g(channels_last(o.g)), y(channels_last(o.y)), g_mean(o.g_mean, c, "g_mean"), g_var(o.g_var, c, "g_var"),
        mean(o.g_mean || o.g_var ? MaybeTensor(o.mean) : MaybeTensor(), c, "mean_y") {
    output = {g.const_data_ptr(), y.const_data_ptr(), g_mean.data, g_var.data, mean.data};
    for (int d = 0; d < 4; d++)
      STD_TORCH_CHECK(g.size(d) == y.size(d), "mnops: g must have the shape of y, got ", g.size(d), " for ", y.size(d));
    STD_TORCH_CHECK(g.scalar_type() == y.scalar_type(), "mnops: g must have the dtype of y");
  }
};

// torch's own thread pool, so that torch.set_num_threads holds and nothing is oversubscribed.
inline Threads torch_threads() {
  return {int(torch::stable::get_num_threads()), [](int tasks, const std::function<void(int)>& f) {
            if (tasks == 1) return f(0);
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t t = begin; t < end; t++) f(int(t));
            });
          }};
}

// y, mean_y, var_y of a forward op.
template <class T> struct Measured {
  Tensor y, mean, var;
  Measured(const Tensor& x, const std::vector<int64_t>& size, bool measure)
      : y(empty_result(x, size)), mean(empty_like_type(x, {measure ? size[1] : 0}, scalar_type_of<T>())),
        var(empty_like_type(x, {measure ? size[1] : 0}, scalar_type_of<T>())) {
    STD_TORCH_CHECK(!measure || y.numel() > 0, "mnops: statistics of an output with no element are not defined");
  }
  T* mean_data() const { return mean.numel() ? static_cast<T*>(mean.mutable_data_ptr()) : nullptr; }
  T* var_data() const { return var.numel() ? static_cast<T*>(var.mutable_data_ptr()) : nullptr; }
};

// The weight gradient is computed in T; a half weight gets it rounded.
inline Tensor in_dtype_of(const Tensor& weight, const Tensor& gradient) {
  return gradient.scalar_type() == weight.scalar_type() ? gradient : torch::stable::to(gradient, weight.scalar_type());
}

}  // namespace mnops
