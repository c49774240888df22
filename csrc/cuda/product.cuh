// The product of two tiles in shared memory, one warp's part of it: tensor cores for fp16, bf16 and tf32, plain
// multiply-adds for exact fp32 and fp64.
//
// The instructions are wrapped one by one. Where kernels are emulated each has a version in C++ that moves the same values
// between the same lanes, by the tables of the PTX manual (Warp-level matrix instructions: ldmatrix, and the fragments of
// mma.m16n8k16 and m16n8k8).
#pragma once
#include <cmath>
#include <cstring>

#include "cuda/device.cuh"

namespace mnops::cuda {

struct Tf32 {};  // names the arithmetic: fp32 storage, 10 bits of mantissa in a product, fp32 sums

// Four 8 x 8 matrices of 2-byte elements, so 16 bytes a row: lane l gives the address of row l % 8 of matrix l / 8, and gets
// word l % 4 of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#ifdef MNOPS_EMULATE_CUDA
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::machine.fail("ldmatrix of an address that is not aligned");
  const auto rows = emulation::exchange(row);
  const int lane = emulation::lane();
  for (int i = 0; i < 4; i++) std::memcpy(&to[i], static_cast<const char*>(rows.of[8 * i + lane / 4]) + lane % 4 * 4, 4);
#else
  const unsigned at = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
#endif
}

// To the nearest of tf32, ties away from zero. Products would cut the low bits off instead.
__device__ __forceinline__ void round_tf32(uint32_t& v) {
#ifdef MNOPS_EMULATE_CUDA
  if ((v & 0x7fffffffu) <= 0x7f800000u) v = (v + 0x1000u) & ~0x1fffu;
#else
  asm("cvt.rna.tf32.f32 %0, %0;" : "+r"(v));
#endif
}

#ifdef MNOPS_EMULATE_CUDA
struct Fragments {
  uint32_t a[4], b[2];
};
template <class S> float element(const uint32_t& word, int i) {
  S v;
  std::memcpy(static_cast<void*>(&v), reinterpret_cast<const char*>(&word) + i * sizeof(S), sizeof(S));
  return widen<float>(v);
}
// D is 16 x 8: lane l holds row l / 4 and the row 8 below it, columns 2 * (l % 4) and the next. A 32-byte row of A or B is
// two halves of 4 words; lane l holds word l % 4 of both: of rows l / 4 and l / 4 + 8 of A, of column l / 4 of B.
template <class S> void multiply_emulated(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto all = emulation::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = emulation::lane();
  for (int i = 0; i < 4; i++) {
    double sum = double(d[i]);
    for (int half = 0; half < 2; half++)
      for (int word = 0; word < 4; word++)
        for (int e = 0; e < int(4 / sizeof(S)); e++)
          sum += double(element<S>(all.of[lane / 4 * 4 + word].a[half * 2 + i / 2], e)) *
                 double(element<S>(all.of[(lane % 4 * 2 + i % 2) * 4 + word].b[half], e));
    d[i] = float(sum);
  }
}
#endif

// d += a b, 16 x 8 += 16 x (32 bytes) by (32 bytes) x 8.
template <class S> __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef MNOPS_EMULATE_CUDA
  multiply_emulated<S>(d, a, b);
#else
#define MNOPS_MMA(shape, type)                                                                                          \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "       \
               "{%8, %9}, {%0, %1, %2, %3};"                                                                             \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<S, __half>) MNOPS_MMA("m16n8k16", "f16");
  else if constexpr (std::is_same_v<S, __nv_bfloat16>) MNOPS_MMA("m16n8k16", "bf16");
  else MNOPS_MMA("m16n8k8", "tf32");
#undef MNOPS_MMA
#endif
}


// One warp's M x N of  C[m][n] += sum_k A[m][k] B[n][k].  A and B lie in shared memory with k innermost; their rows are
// `pitch` elements apart, a multiple of 16 bytes, odd in units of 16 bytes: then 8 rows fall into 8 different groups of
// banks. k goes up to a multiple of `depth`. MATH is the storage type itself, or Tf32.
template <class S, class MATH, int M, int N> struct WarpProduct {
  static constexpr int depth = 32 / sizeof(S);
  static_assert(M % 16 == 0 && N % 16 == 0, "tiles of m16n8, two of them in one ldmatrix of B");
  static_assert(sizeof(S) == 2 || std::is_same_v<MATH, Tf32>, "tensor cores of fp16, bf16 and tf32");
  float acc[M / 16][N / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < M / 16; i++)
#pragma unroll
      for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i][j][e] = 0;
  }
  __device__ __forceinline__ void add(const S* a, int a_pitch, const S* b, int b_pitch, int k) {
    const int lane = threadIdx.x % 32;
    a += lane % 16 * a_pitch + lane / 16 * (depth / 2);
    b += (lane % 8 + lane / 16 * 8) * b_pitch + lane / 8 % 2 * (depth / 2);
    for (int k0 = 0; k0 < k; k0 += depth) {
      uint32_t fa[M / 16][4], fb[N / 16][4];
#pragma unroll
      for (int i = 0; i < M / 16; i++) load_fragment(fa[i], a + i * 16 * a_pitch + k0);
#pragma unroll
      for (int j = 0; j < N / 16; j++) load_fragment(fb[j], b + j * 16 * b_pitch + k0);
#pragma unroll
      for (int i = 0; i < M / 16; i++)
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
          const uint32_t column[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
          multiply<S>(acc[i][j], fa[i], column);
        }
    }
  }
  static __device__ __forceinline__ void load_fragment(uint32_t (&to)[4], const S* row) {
    load_matrices(to, row);
    if constexpr (sizeof(S) == 4)
#pragma unroll
      for (int i = 0; i < 4; i++) round_tf32(to[i]);
  }
  // f(row, column, value) for every value that this lane holds.
  template <class F> __device__ __forceinline__ void each(F f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < M / 16; i++)
#pragma unroll
      for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) f(i * 16 + e / 2 * 8 + lane / 4, j * 8 + lane % 4 * 2 + e % 2, acc[i][j][e]);
  }
};

// 4 x 8 lanes over rows and columns, interleaved so that 8 lanes read 8 neighbouring rows of B and all of them one of A.
template <class T, int M, int N> struct PlainWarpProduct {
  static constexpr int depth = 16 / sizeof(T);
  static_assert(M % 4 == 0 && N % 8 == 0, "4 x 8 lanes");
  T acc[M / 4][N / 8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < M / 4; i++)
#pragma unroll
      for (int j = 0; j < N / 8; j++) acc[i][j] = 0;
  }
  __device__ __forceinline__ void add(const T* a, int a_pitch, const T* b, int b_pitch, int k) {
    const int lane = threadIdx.x % 32;
    a += lane / 8 * a_pitch;
    b += lane % 8 * b_pitch;
    for (int k0 = 0; k0 < k; k0 += depth) {
      Pack<T, depth> fa[M / 4], fb[N / 8];
#pragma unroll
      for (int i = 0; i < M / 4; i++) fa[i] = load_pack<T, depth>(a + i * 4 * a_pitch + k0);
#pragma unroll
      for (int j = 0; j < N / 8; j++) fb[j] = load_pack<T, depth>(b + j * 8 * b_pitch + k0);
#pragma unroll
      for (int q = 0; q < depth; q++)
#pragma unroll
        for (int i = 0; i < M / 4; i++)
#pragma unroll
          for (int j = 0; j < N / 8; j++) acc[i][j] = fma(fa[i].v[q], fb[j].v[q], acc[i][j]);
    }
  }
  template <class F> __device__ __forceinline__ void each(F f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < M / 4; i++)
#pragma unroll
      for (int j = 0; j < N / 8; j++) f(i * 4 + lane / 8, j * 8 + lane % 8, acc[i][j]);
  }
};
template <int M, int N> struct WarpProduct<float, float, M, N> : PlainWarpProduct<float, M, N> {};
template <int M, int N> struct WarpProduct<double, double, M, N> : PlainWarpProduct<double, M, N> {};

}  // namespace mnops::cuda
