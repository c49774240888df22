// What every launch shares: the current device and stream, checked launches, dtype and vector dispatch, norm vectors.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <functional>
#include <vector>

#include "common/tensors.h"
#include "cuda/device.cuh"

#ifdef MNOPS_EMULATE_CUDA  // the emulated kernels are CPU kernels of a namespace of their own
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(mnops_cuda_emulated, CPU, m, C10_UID)
#endif

namespace mnops::cuda {

// While it lives, x's device is the current one.
struct OnDeviceOf {
#ifdef MNOPS_EMULATE_CUDA
  explicit OnDeviceOf(const Tensor&) {}
#else
  torch::stable::accelerator::DeviceGuard guard;
  explicit OnDeviceOf(const Tensor& x) : guard(x.get_device_index()) {}
#endif
};

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline cudaStream_t current_stream([[maybe_unused]] const Tensor& t) {
  void* stream = nullptr;
#ifndef MNOPS_EMULATE_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
#endif
  return static_cast<cudaStream_t>(stream);
}

// kernel<<<grid, block, shared, stream>>>(args...), checked.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A... args) {
#ifdef MNOPS_EMULATE_CUDA
  (void)stream;
  emulation::machine.launch(grid, block, shared, [=] { kernel(static_cast<P>(args)...); });
#else
  if (shared > 48 << 10)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  kernel<<<grid, block, shared, stream>>>(static_cast<P>(args)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

// Blocks leave their sums in a workspace, `chunks` of the arguments A: how many is up to the kernel that serves, which
// calls this for the pointers before it is launched.
template <class A> using Prepare = std::function<void(A&)>;

constexpr int64_t most_grid_y = 65535;
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(S) with the storage type of x.
template <class F> auto with_storage(const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return f(double());
    case ScalarType::Half: return f(__half());
    case ScalarType::BFloat16: return f(__nv_bfloat16());
    default: break;
  }
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "mnops: x must be float32, float64, float16 or bfloat16");
  return f(float());
}

inline bool aligned(std::initializer_list<const void*> pointers, size_t bytes) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % bytes) return false;
  return true;
}

// f(VEC): 16-byte vectors where channels and pointers allow, single channels otherwise.
template <class S, class F> void with_vector(int64_t c, std::initializer_list<const void*> pointers, F f) {
  constexpr int wide = 16 / sizeof(S);
  if (c % wide == 0 && aligned(pointers, 16)) f(std::integral_constant<int, wide>{});
  else f(std::integral_constant<int, 1>{});
}

template <class T> constexpr ScalarType scalar_type_of() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

// Small tensors as dense arrays of T, kept alive until the kernels are queued (the allocator knows the stream).
struct Arrays {
  std::vector<Tensor> keep;
  template <class T> const T* of(const MaybeTensor& t, const Tensor& x, int64_t count, const char* name) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->numel() == count && same_device(*t, x), "mnops: ", name, " must have ", count,
                    " elements on x's device");
    const bool same = t->scalar_type() == scalar_type_of<T>();
    keep.push_back(torch::stable::contiguous(same ? *t : torch::stable::to(*t, scalar_type_of<T>())));
    return static_cast<const T*>(keep.back().const_data_ptr());
  }
};

template <class T> struct NormTensors : Arrays {
  NormPointers<T> pointers;
  NormTensors(const Tensor& x, const PendingTensors& p, int64_t c) {
    pointers = {of<T>(p.mean, x, c, "mean"),   of<T>(p.var, x, c, "var"), of<T>(p.gamma, x, c, "gamma"),
                of<T>(p.beta, x, c, "beta"), p.eps,                     parse_act(p.act)};
  }
};

// Gradients of the norm's vectors: empty where the vector was not given.
template <class T> struct NormGradTensors {
  Tensor mean, var, gamma, beta;
  NormGradTensors(const Tensor& x, const PendingTensors& p, int64_t c, bool wanted = true)
      : mean(one(x, p.mean, c, wanted)), var(one(x, p.var, c, wanted)), gamma(one(x, p.gamma, c, wanted)),
        beta(one(x, p.beta, c, wanted)) {}
  static Tensor one(const Tensor& x, const MaybeTensor& t, int64_t c, bool wanted) {
    return empty_like_type(x, {wanted && t ? c : 0}, scalar_type_of<T>());
  }
};

template <class T> T* data_or_null(const Tensor& t) { return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; }

}  // namespace mnops::cuda
