// The second stage of every sum: blocks leave partial results in a workspace, these kernels add them, always in the same
// order, in fp64. No atomics: the same bits at every run. A block of finish_threads works on one channel, one of
// matrix_threads on 32 neighbouring elements of a matrix, so that a thousand partial results take some microseconds.
#pragma once
#include "cuda/launch.cuh"

namespace mnops::cuda {

constexpr int finish_threads = 128;
constexpr int matrix_threads = 1024;  // a matrix of 32 x 9 has 9 blocks: with 4 warps each, 3584 results would take 40 us

// count, mean and sum of squared deviations of some values, merged by Chan's rule: no mean is too large for the variance.
struct Moments {
  double count, mean, m2;
  __device__ __forceinline__ void merge(const Moments& b) {
    const double n = count + b.count;
    if (b.count == 0) return;
    const double delta = b.mean - mean, part = b.count / n;
    mean += delta * part;
    m2 += b.m2 + delta * delta * count * part;
    count = n;
  }
};

// partial is [3][chunks][c]: counts, means, m2. mean and biased variance of every channel, a block each.
template <class T, class P = T>
__global__ void __launch_bounds__(finish_threads)
finish_statistics(const P* __restrict__ partial, int64_t chunks, int64_t c, T* mean, T* var) {
  __shared__ Moments shared[finish_threads];
  const int64_t channel = blockIdx.x;
  Moments mine{};
  for (int64_t k = threadIdx.x; k < chunks; k += finish_threads) {
    const P* at = partial + k * c + channel;
    mine.merge({double(at[0]), double(at[chunks * c]), double(at[2 * chunks * c])});
  }
  shared[threadIdx.x] = mine;
  for (int step = finish_threads / 2; step; step /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < step) shared[threadIdx.x].merge(shared[threadIdx.x + step]);
  }
  if (threadIdx.x == 0) mean[channel] = T(shared[0].mean), var[channel] = T(shared[0].m2 / shared[0].count);
}

// partial is [chunks][2][c]: sums of gp and of gp * (x - mean). A block a channel.
//   dbeta = sum gp    dgamma = rstd sum gp (x - mean)    dmean = -gamma rstd sum gp    dvar = -1/2 gamma rstd^2 dgamma
template <class T>
__global__ void __launch_bounds__(finish_threads)
finish_sums(const T* __restrict__ partial, int64_t chunks, int64_t c, NormPointers<T> p, T* dmean, T* dvar, T* dgamma, T* dbeta) {
  __shared__ double shared[2][finish_threads];
  const int64_t channel = blockIdx.x;
  double gp = 0, gpx = 0;
  for (int64_t k = threadIdx.x; k < chunks; k += finish_threads)
    gp += double(partial[2 * k * c + channel]), gpx += double(partial[(2 * k + 1) * c + channel]);
  shared[0][threadIdx.x] = gp, shared[1][threadIdx.x] = gpx;
  for (int step = finish_threads / 2; step; step /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < step)
      for (int i = 0; i < 2; i++) shared[i][threadIdx.x] += shared[i][threadIdx.x + step];
  }
  if (threadIdx.x) return;
  gp = shared[0][0], gpx = shared[1][0];
  const double rstd = p.var ? 1 / sqrt(double(p.var[channel]) + p.eps) : 1, gamma = p.gamma ? double(p.gamma[channel]) : 1;
  if (dbeta) dbeta[channel] = T(gp);
  if (dgamma) dgamma[channel] = T(gpx * rstd);
  if (dmean) dmean[channel] = T(-gamma * rstd * gp);
  if (dvar) dvar[channel] = T(-0.5 * gamma * rstd * rstd * rstd * gpx);
}

// partial is [chunks][count]; W is the weight's dtype. A block adds 32 neighbouring elements.
template <class T, class W>
__global__ void __launch_bounds__(matrix_threads) finish_matrix(const T* __restrict__ partial, int64_t chunks, int64_t count, W* out) {
  __shared__ double shared[matrix_threads];
  const int64_t i = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
  double sum = 0;
  if (i < count)
    for (int64_t k = threadIdx.x / 32; k < chunks; k += matrix_threads / 32) sum += double(partial[k * count + i]);
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || i >= count) return;
  for (int part = 1; part < matrix_threads / 32; part++) sum += shared[part * 32 + threadIdx.x];
  narrow(typename Accumulator<W>::type(sum), out[i]);
}

}  // namespace mnops::cuda
