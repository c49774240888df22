// NEON as every AArch64 CPU has it (armv8-a): 32 registers of 4 floats or 2 doubles. fp16 is converted by the base
// instructions, bf16 by shifts; where the file that includes this one is compiled for it, by bfcvtn, and bf16 is multiplied.
#pragma once
#include <arm_neon.h>
#include <math.h>

#include "common/params.h"

namespace mnops {
namespace {

struct F32x4 {
  using T = float;
  static constexpr int N = 4;
  float32x4_t v;

  static F32x4 zero() { return {vdupq_n_f32(0)}; }
  static F32x4 set1(float a) { return {vdupq_n_f32(a)}; }

  static F32x4 load(const float* p) { return {vld1q_f32(p)}; }
  static F32x4 load(const bf16* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))}; }
  static F32x4 load(const f16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))}; }

  void store(float* p) const { vst1q_f32(p, v); }
  void store(bf16* p) const { vst1_u16(&p->bits, to_bf16()); }
  void store(f16* p) const { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

  template <class S> static F32x4 load(const S* p, int n) {
    S tmp[N] = {};
    for (int i = 0; i < n; i++) tmp[i] = p[i];
    return load(tmp);
  }
  template <class S> void store(S* p, int n) const {
    S tmp[N];
    store(tmp);
    for (int i = 0; i < n; i++) p[i] = tmp[i];
  }

  void add_to(double* p) const {
    vst1q_f64(p, vaddq_f64(vld1q_f64(p), vcvt_f64_f32(vget_low_f32(v))));
    vst1q_f64(p + 2, vaddq_f64(vld1q_f64(p + 2), vcvt_high_f64_f32(v)));
  }

  friend F32x4 operator+(F32x4 a, F32x4 b) { return {vaddq_f32(a.v, b.v)}; }
  friend F32x4 operator-(F32x4 a, F32x4 b) { return {vsubq_f32(a.v, b.v)}; }
  friend F32x4 operator*(F32x4 a, F32x4 b) { return {vmulq_f32(a.v, b.v)}; }
  friend F32x4 operator/(F32x4 a, F32x4 b) { return {vdivq_f32(a.v, b.v)}; }
  friend F32x4 fma(F32x4 a, F32x4 b, F32x4 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  friend F32x4 fma_element(F32x4 a, int i, F32x4 b, F32x4 c) {  // c + a[i] * b; i is a constant once inlined
    return {i == 0   ? vfmaq_laneq_f32(c.v, b.v, a.v, 0)
            : i == 1 ? vfmaq_laneq_f32(c.v, b.v, a.v, 1)
            : i == 2 ? vfmaq_laneq_f32(c.v, b.v, a.v, 2)
                     : vfmaq_laneq_f32(c.v, b.v, a.v, 3)};
  }
  friend F32x4 max(F32x4 a, F32x4 b) { return {vmaxq_f32(a.v, b.v)}; }  // NaN if either is
  friend F32x4 min(F32x4 a, F32x4 b) { return {vminq_f32(a.v, b.v)}; }
  friend F32x4 where_gt(F32x4 a, F32x4 b, F32x4 x, F32x4 y) { return {vbslq_f32(vcgtq_f32(a.v, b.v), x.v, y.v)}; }

  // 2^k * p(r), r = x - k ln 2 in two parts; p is the Taylor polynomial of degree 7, an ulp of fp32 on |r| <= ln2 / 2.
  friend F32x4 exp(F32x4 a) {
    a = min(set1(88.72f), max(set1(-87.33f), a));
    const float32x4_t k = vrndnq_f32(vmulq_n_f32(a.v, 1.44269504f));
    float32x4_t r = vfmsq_f32(a.v, k, vdupq_n_f32(0.693359375f));
    r = vfmsq_f32(r, k, vdupq_n_f32(-2.12194440e-4f));
    const float c[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    float32x4_t p = vdupq_n_f32(c[0]);
    for (int i = 1; i < 8; i++) p = vfmaq_f32(vdupq_n_f32(c[i]), p, r);
    const int32x4_t e = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(k), vdupq_n_s32(127)), 23);
    return {vmulq_f32(p, vreinterpretq_f32_s32(e))};
  }

  static void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {  // dst[j][i] = src[i][j]
    const float32x4_t a = vld1q_f32(src), b = vld1q_f32(src + src_stride);
    const float32x4_t c = vld1q_f32(src + 2 * src_stride), d = vld1q_f32(src + 3 * src_stride);
    const float64x2_t ab0 = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab1 = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t cd0 = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd1 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    vst1q_f32(dst, vreinterpretq_f32_f64(vtrn1q_f64(ab0, cd0)));
    vst1q_f32(dst + dst_stride, vreinterpretq_f32_f64(vtrn1q_f64(ab1, cd1)));
    vst1q_f32(dst + 2 * dst_stride, vreinterpretq_f32_f64(vtrn2q_f64(ab0, cd0)));
    vst1q_f32(dst + 3 * dst_stride, vreinterpretq_f32_f64(vtrn2q_f64(ab1, cd1)));
  }

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  // Two rows of four bf16, a factor of bfmmla: c (2 x 2) + a (2 x 4) b^T (4 x 2), in fp32.
  struct Factor {
    bfloat16x8_t v;
    static Factor load(const bf16* p) { return {vld1q_bf16(reinterpret_cast<const bfloat16_t*>(p))}; }
    static void load_rows(const bf16* p, Factor& left, Factor& right) {  // halves of two rows of eight
      const float64x2_t a = vreinterpretq_f64_bf16(load(p).v), b = vreinterpretq_f64_bf16(load(p + 8).v);
      left.v = vreinterpretq_bf16_f64(vzip1q_f64(a, b)), right.v = vreinterpretq_bf16_f64(vzip2q_f64(a, b));
    }
    static void load_transposed(const bf16* p, Factor* four) {  // columns of four rows of eight
      const uint16x8_t a = vld1q_u16(&p->bits), b = vld1q_u16(&p->bits + 8);
      const uint16x8_t c = vld1q_u16(&p->bits + 16), d = vld1q_u16(&p->bits + 24);
      const uint16x8_t ac0 = vzip1q_u16(a, c), ac1 = vzip2q_u16(a, c), bd0 = vzip1q_u16(b, d), bd1 = vzip2q_u16(b, d);
      four[0].v = vreinterpretq_bf16_u16(vzip1q_u16(ac0, bd0)), four[1].v = vreinterpretq_bf16_u16(vzip2q_u16(ac0, bd0));
      four[2].v = vreinterpretq_bf16_u16(vzip1q_u16(ac1, bd1)), four[3].v = vreinterpretq_bf16_u16(vzip2q_u16(ac1, bd1));
    }
    friend F32x4 fma(Factor a, Factor b, F32x4 c) { return {vbfmmlaq_f32(c.v, a.v, b.v)}; }
  };
  // Two such 2 x 2 products side by side, as two rows.
  static void to_rows(F32x4 left, F32x4 right, F32x4* two) {
    const float64x2_t l = vreinterpretq_f64_f32(left.v), r = vreinterpretq_f64_f32(right.v);
    two[0].v = vreinterpretq_f32_f64(vzip1q_f64(l, r)), two[1].v = vreinterpretq_f32_f64(vzip2q_f64(l, r));
  }
#endif

 private:
  uint16x4_t to_bf16() const {  // round to nearest even; NaN stays NaN
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    return vreinterpret_u16_bf16(vcvt_bf16_f32(v));
#else
    const uint32x4_t u = vreinterpretq_u32_f32(v);
    const uint32x4_t rounded = vsraq_n_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), vshlq_n_u32(u, 15), 31);
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(u, vdupq_n_u32(0x400000))), 16);
#endif
  }
};

struct F64x2 {
  using T = double;
  static constexpr int N = 2;
  float64x2_t v;

  static F64x2 zero() { return {vdupq_n_f64(0)}; }
  static F64x2 set1(double a) { return {vdupq_n_f64(a)}; }
  static F64x2 load(const double* p) { return {vld1q_f64(p)}; }
  void store(double* p) const { vst1q_f64(p, v); }
  static F64x2 load(const double* p, int n) { return n > 1 ? load(p) : F64x2{vsetq_lane_f64(n > 0 ? *p : 0, vdupq_n_f64(0), 0)}; }
  void store(double* p, int n) const {
    if (n > 1) store(p);
    else if (n > 0) *p = vgetq_lane_f64(v, 0);
  }
  void add_to(double* p) const { vst1q_f64(p, vaddq_f64(vld1q_f64(p), v)); }
  friend F64x2 operator+(F64x2 a, F64x2 b) { return {vaddq_f64(a.v, b.v)}; }
  friend F64x2 operator-(F64x2 a, F64x2 b) { return {vsubq_f64(a.v, b.v)}; }
  friend F64x2 operator*(F64x2 a, F64x2 b) { return {vmulq_f64(a.v, b.v)}; }
  friend F64x2 operator/(F64x2 a, F64x2 b) { return {vdivq_f64(a.v, b.v)}; }
  friend F64x2 fma(F64x2 a, F64x2 b, F64x2 c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
  friend F64x2 fma_element(F64x2 a, int i, F64x2 b, F64x2 c) {
    return {i == 0 ? vfmaq_laneq_f64(c.v, b.v, a.v, 0) : vfmaq_laneq_f64(c.v, b.v, a.v, 1)};
  }
  friend F64x2 max(F64x2 a, F64x2 b) { return {vmaxq_f64(a.v, b.v)}; }
  friend F64x2 min(F64x2 a, F64x2 b) { return {vminq_f64(a.v, b.v)}; }
  friend F64x2 where_gt(F64x2 a, F64x2 b, F64x2 x, F64x2 y) { return {vbslq_f64(vcgtq_f64(a.v, b.v), x.v, y.v)}; }
  friend F64x2 exp(F64x2 a) {  // fp64 is for gradient checks: libm lane by lane
    const double lanes[] = {::exp(vgetq_lane_f64(a.v, 0)), ::exp(vgetq_lane_f64(a.v, 1))};
    return load(lanes);
  }
  static void transpose(const double* src, int64_t src_stride, double* dst, int64_t dst_stride) {
    const float64x2_t a = vld1q_f64(src), b = vld1q_f64(src + src_stride);
    vst1q_f64(dst, vtrn1q_f64(a, b));
    vst1q_f64(dst + dst_stride, vtrn2q_f64(a, b));
  }
};

inline void finish_streams() {}

template <class T> struct Vec { using type = F32x4; };
template <> struct Vec<double> { using type = F64x2; };

struct Tile {
  static constexpr int mr = 8, nv = 2, ty = 2, tx = 7;
  static constexpr bool direct = true, by_element = true;
  static constexpr const char* reason =
      "8 x 2 vectors: 16 accumulators + 8 rows of four k + 2 panel vectors of 32 registers; depthwise 2 x 7 pixels: "
      "14 accumulators + 9 weights + 3 of statistics + loads, and MobileNet's widths at 224 are multiples of 7";
};

}  // namespace
}  // namespace mnops
