// What every kernel shares: storage types, vectors of channels, asynchronous copies, activations, the pending norm.
// Compiled by nvcc, or by a C++ compiler over emulation/cuda.h where MNOPS_EMULATE_CUDA is defined.
#pragma once
#ifdef MNOPS_EMULATE_CUDA
#include "cuda/emulation/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/params.h"

namespace mnops::cuda {

// ---- storage S and arithmetic T ----

template <class S> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };

template <class T> __device__ __forceinline__ T widen(float v) { return T(v); }
template <class T> __device__ __forceinline__ T widen(double v) { return T(v); }
template <class T> __device__ __forceinline__ T widen(__half v) { return __half2float(v); }
template <class T> __device__ __forceinline__ T widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(double v, double& to) { to = v; }
__device__ __forceinline__ void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// VEC channels of one pixel, moved in one access.
template <class S, int VEC> struct alignas(sizeof(S) * VEC) Pack {
  S v[VEC];
};
template <class S, int VEC> __device__ __forceinline__ Pack<S, VEC> load_pack(const S* from) {
  return *reinterpret_cast<const Pack<S, VEC>*>(from);
}
template <class S, int VEC> __device__ __forceinline__ void store_pack(S* to, const Pack<S, VEC>& pack) {
  *reinterpret_cast<Pack<S, VEC>*>(to) = pack;
}
template <class S, int VEC> __device__ __forceinline__ Pack<S, VEC> zero_pack() {  // bits 0 are 0 in every S
  return Pack<S, VEC>{};
}

// A pack as it is moved, a register for 4 bytes. Halves are taken apart by widen_pack, where they are used: in a Pack the
// compiler would do so right after the load, and wait for it there.
template <class S, int VEC>
using Bits = Pack<std::conditional_t<sizeof(S) * VEC % 4, uint16_t, uint32_t>, (int(sizeof(S)) * VEC + 3) / 4>;
template <class S, int VEC> __device__ __forceinline__ Bits<S, VEC> load_bits(const S* from) {
  return *reinterpret_cast<const Bits<S, VEC>*>(from);
}
// To global memory in one access, where the compiler may store one element after the other.
template <class S, int VEC> __device__ __forceinline__ void store_bits(S* to, const Pack<S, VEC>& pack) {
  Bits<S, VEC> bits;
  memcpy(&bits, static_cast<const void*>(&pack), sizeof(pack));
#ifndef MNOPS_EMULATE_CUDA
  if constexpr (sizeof(pack) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 ::"l"(to), "r"(bits.v[0]), "r"(bits.v[1]), "r"(bits.v[2]), "r"(bits.v[3]) : "memory");
    return;
  }
  if constexpr (sizeof(pack) == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(bits.v[0]), "r"(bits.v[1]) : "memory");
    return;
  }
#endif
  *reinterpret_cast<Bits<S, VEC>*>(to) = bits;
}

// The values of a pack. bf16 two at a time by hand: an instruction each, where the compiler takes two.
template <class T, class S, int VEC> __device__ __forceinline__ void widen_pack(const Pack<S, VEC>& from, T (&to)[VEC]) {
  if constexpr (std::is_same_v<S, __nv_bfloat16> && VEC % 2 == 0) {
#pragma unroll
    for (int i = 0; i < VEC; i += 2) {
      uint32_t both, high;
      memcpy(&both, static_cast<const void*>(&from.v[i]), 4);
      high = both & 0xffff0000u, both <<= 16;
      memcpy(&to[i], &both, 4), memcpy(&to[i + 1], &high, 4);
    }
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) to[i] = widen<T>(from.v[i]);
  }
}
template <class T, class S, int VEC> __device__ __forceinline__ void narrow_pack(const T (&from)[VEC], Pack<S, VEC>& to) {
#ifndef MNOPS_EMULATE_CUDA  // the same rounding, two to an instruction
  if constexpr (std::is_same_v<S, __nv_bfloat16> && VEC % 2 == 0) {
#pragma unroll
    for (int i = 0; i < VEC; i += 2) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(from[i], from[i + 1]);
      to.v[i] = both.x, to.v[i + 1] = both.y;
    }
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < VEC; i++) narrow(from[i], to.v[i]);
}

template <class S, class T, int VEC> __device__ __forceinline__ void widen_bits(const Bits<S, VEC>& from, T (&to)[VEC]) {
  Pack<S, VEC> pack;
  memcpy(static_cast<void*>(&pack), &from, sizeof(pack));
  widen_pack(pack, to);
}

// The same value, but the compiler no longer knows how it came about: it would compute it again at every use.
__device__ __forceinline__ uint32_t opaque(uint32_t v) {
#ifndef MNOPS_EMULATE_CUDA
  asm("" : "+r"(v));
#endif
  return v;
}
template <class P> __device__ __forceinline__ P* opaque(P* global) {
#ifndef MNOPS_EMULATE_CUDA
  asm("" : "+l"(global));
  __builtin_assume(__isGlobal(global));  // else loads would look for the kind of memory
#endif
  return global;
}

// ---- shared memory and copies into it ----

// The dynamic shared memory of the block, 16-byte aligned; the launch says how much.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef MNOPS_EMULATE_CUDA
  return reinterpret_cast<unsigned char*>(emulation::machine.shared.data());
#else
  extern __shared__ __align__(16) unsigned char mnops_dynamic_shared[];
  return mnops_dynamic_shared;
#endif
}

// SIZE bytes (4, 8 or 16) from global to shared memory, or zeros where `there` is false: then `from` is not read, but must
// be a valid address. In flight until wait_copies; visible to other threads after a barrier that follows it.
template <int SIZE> __device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  static_assert(SIZE == 4 || SIZE == 8 || SIZE == 16, "what cp.async moves");
#ifdef MNOPS_EMULATE_CUDA
  emulation::copy_async(to, from, there ? SIZE : 0, SIZE);
#else
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  const int bytes = there ? SIZE : 0;
  if constexpr (SIZE == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(SIZE), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#ifdef MNOPS_EMULATE_CUDA
  emulation::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int NEWEST> __device__ __forceinline__ void wait_copies() {  // all but the newest groups of this thread are there
#ifdef MNOPS_EMULATE_CUDA
  emulation::copy_async_wait(NEWEST);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
#endif
}

// ---- activations ----

template <class T> __device__ __forceinline__ T activate(Act act, T p) {
  const T low = p < T(0) ? T(0) : p;  // NaN passes, as in torch
  switch (act) {
    case Act::relu: return low;
    case Act::relu6: return low > T(6) ? T(6) : low;
    case Act::hardswish: {
      const T s = p + T(3);
      return p * (s < T(0) ? T(0) : s > T(6) ? T(6) : s) * T(1.0 / 6);  // a division is ten instructions
    }
    case Act::silu: return p / (T(1) + exp(-p));
    default: return p;
  }
}

template <class T> __device__ __forceinline__ T activate_grad(Act act, T g, T p) {  // torch's choice at the kinks
  switch (act) {
    case Act::relu: return p > T(0) ? g : T(0);
    case Act::relu6: return p > T(0) && p < T(6) ? g : T(0);
    case Act::hardswish: return p < T(-3) ? T(0) : p > T(3) ? g : g * (p * T(1.0 / 3) + T(0.5));
    case Act::silu: {
      const T s = T(1) / (T(1) + exp(-p));
      return g * s * (T(1) + p * (T(1) - s));
    }
    default: return g;
  }
}

// none, relu and relu6 as bounds: two instructions for any of them, where the kernel is not compiled for each.
template <class T> struct Bounds {
  T low, high;
  __device__ __forceinline__ explicit Bounds(Act act)
      : low(act == Act::none ? T(-INFINITY) : T(0)), high(act == Act::relu6 ? T(6) : T(INFINITY)) {}
  static bool serve(Act act) { return act == Act::none || act == Act::relu || act == Act::relu6; }
};
template <class T> __device__ __forceinline__ T clamp(T p, T low, T high) {  // NaN passes
#ifndef MNOPS_EMULATE_CUDA
  if constexpr (std::is_same_v<T, float>) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(p) : "f"(low));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(p) : "f"(high));
    return p;
  }
#endif
  p = p < low ? low : p;
  return p > high ? high : p;
}

// ---- the pending norm ----

template <class T> struct NormPointers {
  const T *mean, *var, *gamma, *beta;  // each may be null
  double eps;
  Act act;
};

template <class T> __device__ __forceinline__ T norm_scale(const NormPointers<T>& p, int64_t c) {
  return (p.gamma ? p.gamma[c] : T(1)) / (p.var ? sqrt(p.var[c] + T(p.eps)) : T(1));
}

template <class T, int VEC> struct NormRegisters {
  T mean[VEC], scale[VEC], shift[VEC];
  __device__ __forceinline__ void load(const NormPointers<T>& p, int64_t c) {
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      mean[i] = p.mean ? p.mean[c + i] : T(0);
      scale[i] = norm_scale(p, c + i);
      shift[i] = p.beta ? p.beta[c + i] : T(0);
    }
  }
  __device__ __forceinline__ T pre(T x, int i) const { return (x - mean[i]) * scale[i] + shift[i]; }
};

// The same in one multiply-add, for half precision storage: there |mean| / std of 1000 has cost x its digits already.
// fp32 and fp64 subtract the mean first.
template <class S, class T, int VEC> struct FoldedNorm : NormRegisters<T, VEC> {
  using Plain = NormRegisters<T, VEC>;
  static constexpr bool folded = sizeof(S) == 2;
  __device__ __forceinline__ void load(const NormPointers<T>& p, int64_t c) {
    Plain::load(p, c);
    if (folded)
#pragma unroll
      for (int i = 0; i < VEC; i++) this->shift[i] -= this->mean[i] * this->scale[i];
  }
  __device__ __forceinline__ T pre(T x, int i) const { return folded ? x * this->scale[i] + this->shift[i] : Plain::pre(x, i); }
};

// The gradient that reaches a raw output y whose statistics were used: gy = g + offset + slope * (y - mean),
// offset = g_mean / P, slope = 2 g_var / P.
template <class T> struct IncomingPointers {
  const T *g_mean, *g_var, *mean;  // null where the statistic was not used
  double count;                    // P: values a channel
};

template <class S, class T, int VEC> struct FoldedIncoming {
  static constexpr bool folded = sizeof(S) == 2;
  T mean[VEC], slope[VEC], offset[VEC];
  __device__ __forceinline__ void load(const IncomingPointers<T>& p, int64_t c) {
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      mean[i] = p.g_var ? p.mean[c + i] : T(0);
      slope[i] = p.g_var ? T(2) * p.g_var[c + i] / T(p.count) : T(0);
      offset[i] = p.g_mean ? p.g_mean[c + i] / T(p.count) : T(0);
      if (folded) offset[i] -= mean[i] * slope[i];
    }
  }
  __device__ __forceinline__ T gy(T g, T y, int i) const { return g + (offset[i] + (folded ? y : y - mean[i]) * slope[i]); }
};

}  // namespace mnops::cuda
