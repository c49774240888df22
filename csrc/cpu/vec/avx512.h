// AVX-512 (F, DQ, BW, VL): 32 registers of 16 floats or 8 doubles. Half precision goes by AVX2's conversions, two halves.
// With MNOPS_EMULATE_AVX512 the intrinsics are those of SIMDe, so that any x86 CPU tests them (tools/avx512).
#pragma once
#ifdef MNOPS_EMULATE_AVX512
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#else
#include <immintrin.h>
#endif

#include <math.h>

#include "common/params.h"
#include "cpu/vec/eight_floats.h"

namespace mnops {
namespace {

struct F32x16 {
  using T = float;
  static constexpr int N = 16;
  __m512 v;

  static __m512 join(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }
  __m256 low() const { return _mm512_castps512_ps256(v); }
  __m256 high() const { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)); }

  static F32x16 zero() { return {_mm512_setzero_ps()}; }
  static F32x16 set1(float a) { return {_mm512_set1_ps(a)}; }

  static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32x16 load(const bf16* p) { return {join(load_8(p), load_8(p + 8))}; }
  static F32x16 load(const f16* p) { return {join(load_8(p), load_8(p + 8))}; }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { store_8(low(), p), store_8(high(), p + 8); }
  void store(f16* p) const { store_8(low(), p), store_8(high(), p + 8); }

  template <class S> static F32x16 load(const S* p, int n) {
    S tmp[N] = {};
    for (int i = 0; i < N && i < n; i++) tmp[i] = p[i];
    return load(tmp);
  }
  template <class S> void store(S* p, int n) const {
    S tmp[N];
    store(tmp);
    for (int i = 0; i < N && i < n; i++) p[i] = tmp[i];
  }
  void stream(float* p) const {
    _mm256_stream_ps(p, low());
    _mm256_stream_ps(p + 8, high());
  }
  void add_to(double* p) const { add_8(p, low()), add_8(p + 8, high()); }

  friend F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend F32x16 where_gt(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
  }

  // As AVX2's: 2^k * p(r), r = x - k ln 2 in two parts. k + 127 is read off the low bits of k + 1.5 * 2^23 + 127.
  friend F32x16 exp(F32x16 a) {
    a = min(set1(88.72f), max(set1(-87.33f), a));
    const __m512 magic = _mm512_set1_ps(12582912.f);
    const __m512 k = _mm512_sub_ps(_mm512_fmadd_ps(a.v, _mm512_set1_ps(1.44269504f), magic), magic);
    __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(0.693359375f), a.v);
    r = _mm512_fnmadd_ps(k, _mm512_set1_ps(-2.12194440e-4f), r);
    const float c[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    __m512 p = _mm512_set1_ps(c[0]);
    for (int i = 1; i < 8; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c[i]));
    const __m512i e = _mm512_castps_si512(_mm512_add_ps(k, _mm512_set1_ps(12582912.f + 127)));
    return {_mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(e, 23)))};
  }

  static void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
    for (int i = 0; i < 16; i += 8)
      for (int j = 0; j < 16; j += 8) transpose_8x8(src + i * src_stride + j, src_stride, dst + j * dst_stride + i, dst_stride);
  }
};

struct F64x8 {
  using T = double;
  static constexpr int N = 8;
  __m512d v;

  static F64x8 zero() { return {_mm512_setzero_pd()}; }
  static F64x8 set1(double a) { return {_mm512_set1_pd(a)}; }
  static F64x8 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void stream(double* p) const {
    _mm256_stream_pd(p, _mm512_castpd512_pd256(v));
    _mm256_stream_pd(p + 4, _mm512_extractf64x4_pd(v, 1));
  }
  void add_to(double* p) const { _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), v)); }
  static F64x8 load(const double* p, int n) {
    double tmp[N] = {};
    for (int i = 0; i < N && i < n; i++) tmp[i] = p[i];
    return load(tmp);
  }
  void store(double* p, int n) const {
    double tmp[N];
    store(tmp);
    for (int i = 0; i < N && i < n; i++) p[i] = tmp[i];
  }
  friend F64x8 operator+(F64x8 a, F64x8 b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend F64x8 operator-(F64x8 a, F64x8 b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend F64x8 operator*(F64x8 a, F64x8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend F64x8 operator/(F64x8 a, F64x8 b) { return {_mm512_div_pd(a.v, b.v)}; }
  friend F64x8 fma(F64x8 a, F64x8 b, F64x8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend F64x8 max(F64x8 a, F64x8 b) { return {_mm512_max_pd(a.v, b.v)}; }
  friend F64x8 min(F64x8 a, F64x8 b) { return {_mm512_min_pd(a.v, b.v)}; }
  friend F64x8 where_gt(F64x8 a, F64x8 b, F64x8 x, F64x8 y) {
    return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
  }
  friend F64x8 exp(F64x8 a) {  // fp64 is for gradient checks: libm lane by lane
    double tmp[N];
    a.store(tmp);
    for (double& t : tmp) t = ::exp(t);
    return load(tmp);
  }
  static void transpose(const double* src, int64_t src_stride, double* dst, int64_t dst_stride) {
    for (int i = 0; i < N; i++)
      for (int j = 0; j < N; j++) dst[j * dst_stride + i] = src[i * src_stride + j];
  }
};

inline void finish_streams() { _mm_sfence(); }

template <class T> struct Vec { using type = F32x16; };
template <> struct Vec<double> { using type = F64x8; };

struct Tile {
  static constexpr int mr = 14, nv = 1, ty = 1, tx = 8;
  static constexpr bool by_element = false;
  static constexpr bool direct = false;  // as on AVX2, where whole lines streamed were the faster way
  static constexpr const char* reason =
      "14 x 1 vector, the panels' width: 14 accumulators hide two FMA pipes' latency, each broadcast is an operand of its FMA; "
      "depthwise row of 8 pixels: 8 accumulators + 9 weights + 1 load of 32 registers";
};

}  // namespace
}  // namespace mnops
