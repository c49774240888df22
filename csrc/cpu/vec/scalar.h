// One lane: the readable version of every kernel, and the fallback for any CPU.
#pragma once
#include <math.h>

#include <string.h>

#include "common/params.h"

namespace mnops {
namespace {

inline float bf16_to_float(uint16_t bits) {
  uint32_t u = uint32_t(bits) << 16;
  float f;
  ::memcpy(&f, &u, 4);
  return f;
}
inline uint16_t float_to_bf16(float f) {  // round to nearest even, NaN stays NaN
  uint32_t u;
  ::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
#ifdef __aarch64__  // g++ 12 has no _Float16 in C++ there
using half = __fp16;
#else
using half = _Float16;
#endif
inline float f16_to_float(uint16_t bits) {
  half h;
  ::memcpy(&h, &bits, 2);
  return float(h);
}
inline uint16_t float_to_f16(float f) {
  half h = half(f);
  uint16_t bits;
  ::memcpy(&bits, &h, 2);
  return bits;
}

inline float load1(const float* p) { return *p; }
inline double load1(const double* p) { return *p; }
inline float load1(const bf16* p) { return bf16_to_float(p->bits); }
inline float load1(const f16* p) { return f16_to_float(p->bits); }
inline void store1(float* p, float v) { *p = v; }
inline void store1(double* p, double v) { *p = v; }
inline void store1(bf16* p, float v) { p->bits = float_to_bf16(v); }
inline void store1(f16* p, float v) { p->bits = float_to_f16(v); }

// A vector type V has: T, N, load/store for each storage type (whole and the first n lanes), zero, set1,
// arithmetic, fma, fnma-free min/max that return the second operand for NaN (so that NaN passes through
// activations as in torch), where(a > b, x, y), exp, and an N x N transpose.
template <class Scalar> struct Lane {
  using T = Scalar;
  static constexpr int N = 1;
  T v;
  static Lane zero() { return {T(0)}; }
  static Lane set1(T a) { return {a}; }
  template <class S> static Lane load(const S* p) { return {load1(p)}; }
  template <class S> static Lane load(const S* p, int n) { return {n > 0 ? load1(p) : T(0)}; }
  template <class S> void store(S* p) const { store1(p, v); }
  template <class S> void store(S* p, int n) const { if (n > 0) store1(p, v); }
  void add_to(double* p) const { *p += double(v); }
  friend Lane operator+(Lane a, Lane b) { return {a.v + b.v}; }
  friend Lane operator-(Lane a, Lane b) { return {a.v - b.v}; }
  friend Lane operator*(Lane a, Lane b) { return {a.v * b.v}; }
  friend Lane operator/(Lane a, Lane b) { return {a.v / b.v}; }
  friend Lane fma(Lane a, Lane b, Lane c) { return {a.v * b.v + c.v}; }
  friend Lane max(Lane a, Lane b) { return {a.v > b.v ? a.v : b.v}; }
  friend Lane min(Lane a, Lane b) { return {a.v < b.v ? a.v : b.v}; }
  friend Lane where_gt(Lane a, Lane b, Lane x, Lane y) { return {a.v > b.v ? x.v : y.v}; }
  friend Lane exp(Lane a) { return {sizeof(T) == 4 ? T(::expf(float(a.v))) : T(::exp(double(a.v)))}; }
  static void transpose(const T* src, int64_t, T* dst, int64_t) { *dst = *src; }
};

inline void finish_streams() {}

template <class T> struct Vec { using type = Lane<T>; };

struct Tile {  // of the matrix product, and of the depthwise row
  static constexpr int mr = 4, nv = 4, ty = 1, tx = 1;
  static constexpr bool by_element = false;
  static constexpr bool direct = false;  // 16 registers do not hold a tile and its statistics
  static constexpr const char* reason = "a scalar register each; 4 x 4 keeps the loop overhead small";
};

}  // namespace
}  // namespace mnops
