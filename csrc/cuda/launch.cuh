// What every CUDA launch shares: the current stream, checks, storage types, 16-byte vectors of channels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/tensors.h"

namespace mnops::cuda {

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class S> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };

template <class T> __device__ __forceinline__ T widen(float v) { return v; }
template <class T> __device__ __forceinline__ T widen(double v) { return v; }
template <class T> __device__ __forceinline__ T widen(__half v) { return __half2float(v); }
template <class T> __device__ __forceinline__ T widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(double v, double& to) { to = v; }
__device__ __forceinline__ void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// VEC channels of one pixel, moved in one access: 16 bytes where the channel count allows it.
template <class S, int VEC> struct alignas(sizeof(S) * VEC) Pack {
  S v[VEC];
};

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

template <class T> __device__ __forceinline__ T activate(Act act, T p) {
  const T low = p < T(0) ? T(0) : p;  // NaN passes, as in torch
  switch (act) {
    case Act::relu: return low;
    case Act::relu6: return low > T(6) ? T(6) : low;
    case Act::hardswish: {
      const T s = p + T(3);
      return p * (s < T(0) ? T(0) : s > T(6) ? T(6) : s) / T(6);
    }
    case Act::silu: return p / (T(1) + exp(-p));
    default: return p;
  }
}

template <class T> __device__ __forceinline__ T activate_grad(Act act, T g, T p) {  // torch's choice at the kinks
  switch (act) {
    case Act::relu: return p > T(0) ? g : T(0);
    case Act::relu6: return p > T(0) && p < T(6) ? g : T(0);
    case Act::hardswish: return p < T(-3) ? T(0) : p > T(3) ? g : g * (p / T(3) + T(0.5));
    case Act::silu: {
      const T s = T(1) / (T(1) + exp(-p));
      return g * s * (T(1) + p * (T(1) - s));
    }
    default: return g;
  }
}

}  // namespace mnops::cuda
