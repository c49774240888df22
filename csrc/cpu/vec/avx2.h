// AVX2 + FMA + F16C: 16 registers of 8 floats or 4 doubles.
#pragma once
#include <immintrin.h>

#include <math.h>

#include "common/params.h"
#include "cpu/vec/eight_floats.h"

namespace mnops {
namespace {

struct F32x8 {
  using T = float;
  static constexpr int N = 8;
  __m256 v;

  static F32x8 zero() { return {_mm256_setzero_ps()}; }
  static F32x8 set1(float a) { return {_mm256_set1_ps(a)}; }

  static F32x8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F32x8 load(const bf16* p) { return {load_8(p)}; }
  static F32x8 load(const f16* p) { return {load_8(p)}; }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { store_8(v, p); }
  void store(f16* p) const { store_8(v, p); }

  template <class S> static F32x8 load(const S* p, int n) {
    S tmp[N] = {};
    for (int i = 0; i < N && i < n; i++) tmp[i] = p[i];
    return load(tmp);
  }
  template <class S> void store(S* p, int n) const {
    S tmp[N];
    store(tmp);
    for (int i = 0; i < N && i < n; i++) p[i] = tmp[i];
  }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void add_to(double* p) const { add_8(p, v); }

  friend F32x8 operator+(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend F32x8 operator-(F32x8 a, F32x8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend F32x8 operator*(F32x8 a, F32x8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend F32x8 operator/(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend F32x8 max(F32x8 a, F32x8 b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend F32x8 min(F32x8 a, F32x8 b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend F32x8 where_gt(F32x8 a, F32x8 b, F32x8 x, F32x8 y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
  }

  // exp by 2^k * p(r), r = x - k ln 2 in two parts; the Taylor polynomial of degree 7 on |r| <= ln2 / 2 is
  // good to an ulp of fp32. Clamped where fp32 over- or underflows.
  friend F32x8 exp(F32x8 a) {
    a = min(set1(88.72f), max(set1(-87.33f), a));
    __m256 k = _mm256_round_ps(_mm256_mul_ps(a.v, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(k, _mm256_set1_ps(0.693359375f), a.v);
    r = _mm256_fnmadd_ps(k, _mm256_set1_ps(-2.12194440e-4f), r);
    const float c[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    __m256 p = _mm256_set1_ps(c[0]);
    for (int i = 1; i < 8; i++) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c[i]));
    __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(p, _mm256_castsi256_ps(e))};
  }

  static void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
    transpose_8x8(src, src_stride, dst, dst_stride);
  }
};

struct F64x4 {
  using T = double;
  static constexpr int N = 4;
  __m256d v;

  static F64x4 zero() { return {_mm256_setzero_pd()}; }
  static F64x4 set1(double a) { return {_mm256_set1_pd(a)}; }
  static F64x4 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void stream(double* p) const { _mm256_stream_pd(p, v); }
  void add_to(double* p) const { _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), v)); }
  static F64x4 load(const double* p, int n) {
    double tmp[N] = {};
    for (int i = 0; i < N && i < n; i++) tmp[i] = p[i];
    return load(tmp);
  }
  void store(double* p, int n) const {
    double tmp[N];
    store(tmp);
    for (int i = 0; i < N && i < n; i++) p[i] = tmp[i];
  }
  friend F64x4 operator+(F64x4 a, F64x4 b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend F64x4 operator-(F64x4 a, F64x4 b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend F64x4 operator*(F64x4 a, F64x4 b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend F64x4 operator/(F64x4 a, F64x4 b) { return {_mm256_div_pd(a.v, b.v)}; }
  friend F64x4 fma(F64x4 a, F64x4 b, F64x4 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  friend F64x4 max(F64x4 a, F64x4 b) { return {_mm256_max_pd(a.v, b.v)}; }
  friend F64x4 min(F64x4 a, F64x4 b) { return {_mm256_min_pd(a.v, b.v)}; }
  friend F64x4 where_gt(F64x4 a, F64x4 b, F64x4 x, F64x4 y) {
    return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ))};
  }
  friend F64x4 exp(F64x4 a) {  // fp64 is for gradient checks: libm lane by lane
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

template <class T> struct Vec { using type = F32x8; };
template <> struct Vec<double> { using type = F64x4; };

struct Tile {
  static constexpr int mr = 6, nv = 2, ty = 1, tx = 4;
  static constexpr bool by_element = false;
  static constexpr bool direct = false;  // 16 registers do not hold a tile and its statistics
  static constexpr const char* reason =
      "6 x 2 vectors: 12 accumulators + 2 panel vectors + 1 broadcast of 16 registers; "
      "depthwise row of 4 pixels: 4 accumulators + 9 weights + 1 load";
};

}  // namespace
}  // namespace mnops
