// The table of one instruction set: every kernel as a function pointer, and what describes it. One constant per
// instruction set (csrc/cpu/isa) drives dispatch, tests and benchmarks.
#pragma once
#include <cstddef>

#include "common/params.h"

namespace mnops {

// How the (o, k) matrix of a product is packed, by panels over o (columns) or over k (rows).
template <class T> struct Packing {
  size_t (*panel_bytes)(int64_t steps);
  void (*columns)(const T* w, int64_t o, int64_t k, int64_t panel_begin, int64_t panel_end, void* dst);
  void (*rows)(const T* w, int64_t o, int64_t k, int64_t panel_begin, int64_t panel_end, void* dst);
};

template <class T> struct Kernels {
  int lanes, mr, nr;       // vector width; the matrix product's micro-tile, rows x columns

  size_t (*depthwise_forward_scratch)(const Depthwise<T>&);
  void (*depthwise_forward)(const Depthwise<T>&, int64_t begin, int64_t end, Moments, char* scratch);
  size_t (*depthwise_backward_scratch)(const Depthwise<T>&);
  void (*depthwise_backward)(const Depthwise<T>&, int64_t begin, int64_t end, double* dweight, NormSums, char* scratch);

  Packing<T> pointwise_packing, stem_packing;
  size_t (*pointwise_forward_scratch)(const Pointwise<T>&);
  size_t (*pointwise_backward_scratch)(const Pointwise<T>&);
  void (*pointwise_forward)(const Pointwise<T>&, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end, Moments,
                            char* scratch);
  void (*pointwise_backward)(const Pointwise<T>&, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end, T* gw,
                             NormSums, char* scratch);

  size_t (*stem_scratch)(const Pointwise<T>&, const Window&, bool backward);
  void (*stem_forward)(const Pointwise<T>&, const Window&, int64_t begin, int64_t end, Moments, char* scratch);
  void (*stem_backward)(const Pointwise<T>&, const Window&, int64_t begin, int64_t end, T* gw, NormSums, char* scratch);

  size_t (*separable_scratch)(const Separable<T>&);
  void (*separable_forward)(const Separable<T>&, int64_t begin, int64_t end, char* scratch);
  void (*separable_depthwise)(const Separable<T>&, int64_t begin, int64_t end, void* z, char* scratch);
  void (*separable_pointwise)(const Separable<T>&, const void* z, int64_t first, int64_t last, void* packed);

  void (*norm_act_forward)(const Rows<T>&, int64_t begin, int64_t end);
  void (*norm_act_backward)(const Rows<T>&, int64_t begin, int64_t end, NormSums);
  void (*norm_act_pool_forward)(const Rows<T>&, int64_t begin, int64_t end);
  void (*norm_act_pool_backward)(const Rows<T>&, int64_t begin, int64_t end, NormSums);
};

struct InstructionSet {
  const char *name, *tile_reason;
  Kernels<float> f32, f16, bf16;   // by storage type
  Kernels<double> f64;

  const Kernels<float>& of(DType t, float*) const { return t == DType::f16 ? f16 : t == DType::bf16 ? bf16 : f32; }
  const Kernels<double>& of(DType, double*) const { return f64; }
};

extern const InstructionSet scalar_kernels;
#ifdef MNOPS_HAS_AVX2
extern const InstructionSet avx2_kernels;
#endif
#ifdef MNOPS_HAS_AVX512
extern const InstructionSet avx512_kernels;
#endif
#ifdef MNOPS_HAS_NEON
extern const InstructionSet neon_kernels;
extern const Kernels<float> neon_bf16_kernels;  // in place of its bf16
#endif

}  // namespace mnops
