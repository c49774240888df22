// The layer between tensors and kernels: cuts an op into tasks, prepares per-channel vectors, merges what the threads
// sum. It knows raw pointers and sizes only, so the torch ops and the NumPy bindings share it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernels/table.h"

namespace mnops {

constexpr int64_t channel_padding = 16;  // == channel_quantum of the kernels
inline int64_t padded(int64_t c) { return (c + channel_padding - 1) / channel_padding * channel_padding; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs f(0) .. f(tasks - 1), concurrently where there are threads. Work is cut by the number of threads alone, so
// results are repeatable for a given number.
struct Threads {
  int count;
  std::function<void(int, const std::function<void(int)>&)> run;

  // Threads worth waking for this many elements.
  int worth(int64_t elements) const { return int(std::clamp<int64_t>(elements / 16384, 1, count)); }

  // Calls make() on each of `threads` threads, and what it returned with 0 .. chunks - 1, which nobody sums up. A thread does
  // its own part first, the same of every op, because what another core wrote comes slowly (14 GB/s in place of 75 of its own
  // L2); then it helps the others, so that a core that is held up for a while delays them by a chunk at most.
  template <class Make> void share(int threads, int64_t chunks, Make make) const {
    std::vector<std::atomic<int64_t>> next(threads);
    for (int t = 0; t < threads; t++) next[t] = chunks * t / threads;
    run(threads, [&](int own) {
      const auto f = make();
      for (int k = 0; k < threads; k++) {
        const int t = (own + k) % threads;
        for (int64_t i; (i = next[t]++) < chunks * (t + 1) / threads;) f(i);
      }
    });
  }
};

// Whether an output is so large that it has left the last-level cache before the next op reads it: then it is stored past
// the caches, which saves reading the lines that it overwrites. (Depthwise 112 x 112 x 64 at batch 16, stride 2, backward:
// 10.0 ms to 7.0 ms. Below 8 MiB nothing was gained.)
inline bool worth_streaming(int64_t bytes) { return bytes >= int64_t(8) << 20; }

// Whether an input is so large that it comes from beyond the second-level cache: then its next rows are fetched early.
inline bool worth_fetching(int64_t bytes) { return bytes >= int64_t(1) << 20; }

// Cache-line aligned memory, not initialised.
struct Aligned {
  void operator()(void* p) const { std::free(p); }
};
template <class E> using Buffer = std::unique_ptr<E[], Aligned>;
template <class E> Buffer<E> uninitialised(size_t count) {
  void* p = std::aligned_alloc(64, std::max<size_t>((count * sizeof(E) + 63) / 64 * 64, 64));
  if (!p) throw std::bad_alloc();
  return Buffer<E>(static_cast<E*>(p));
}
template <class E> Buffer<E> zeros(size_t count) {
  Buffer<E> b = uninitialised<E>(count);
  std::memset(b.get(), 0, count * sizeof(E));
  return b;
}

// A thread's scratch memory, kept between calls: kernels ask for the same few hundred KiB again and again. One piece is its
// own, the others are what it shares with the threads that it has work for it.
enum class Scratch { own, packed, gradient };
template <Scratch piece = Scratch::own> char* scratch(size_t bytes) {
  static thread_local Buffer<char> memory;
  static thread_local size_t size = 0;
  if (bytes > size) {
    memory.reset();
    memory = uninitialised<char>(bytes);
    size = bytes;
  }
  return memory.get();
}

// The pending norm as it comes: any vector may be null.
template <class T> struct Pending {
  const T *mean = nullptr, *var = nullptr, *gamma = nullptr, *beta = nullptr;
  double eps = 0;
  Act act = Act::none;
};

// mean, scale = gamma / sqrt(var + eps), shift = beta, padded with zeros; `repeat` copies one after the other.
template <class T> struct NormVectors {
  Buffer<T> data;
  Norm<T> norm;
  NormVectors(const Pending<T>& p, int64_t c, int64_t repeat = 1) {
    const int64_t size = padded(c * repeat) + channel_padding;  // a whole vector can be loaded at any channel
    data = zeros<T>(3 * size);
    T *mean = data.get(), *scale = mean + size, *shift = scale + size;
    if (p.mean) std::copy_n(p.mean, c, mean);
    if (p.beta) std::copy_n(p.beta, c, shift);
    std::fill_n(scale, c, T(1));
    if (p.gamma) std::copy_n(p.gamma, c, scale);
    for (int64_t i = 0; p.var && i < c; i++) scale[i] = T(double(scale[i]) / std::sqrt(double(p.var[i]) + p.eps));
    for (int64_t i = 0; i < c * (repeat - 1); i++) mean[c + i] = mean[i], scale[c + i] = scale[i], shift[c + i] = shift[i];
    norm = {mean, scale, shift, p.act, !p.mean && !p.gamma && !p.beta};
  }
};

// Gradients of the pending norm's vectors; a null one is not wanted.
template <class T> struct PendingGrads {
  T *mean = nullptr, *var = nullptr, *gamma = nullptr, *beta = nullptr;
};

// The gradient that reaches a measured output, as it comes.
template <class T> struct Output {
  const void *g = nullptr, *y = nullptr;
  const T *g_mean = nullptr, *g_var = nullptr, *mean = nullptr;
  T g_scale = 1;
};

// offset = dmean / P and slope = 2 dvar / P. Where neither statistic was used, y is not read at all.
template <class T> struct IncomingVectors {
  Buffer<T> data;
  Incoming<T> incoming;
  IncomingVectors(const Output<T>& out, int64_t c, int64_t count) {
    const int64_t size = padded(c) + channel_padding;
    data = zeros<T>(3 * size);
    T *offset = data.get(), *slope = offset + size, *mean = slope + size;
    const bool used = out.g_mean || out.g_var;
    for (int64_t i = 0; used && i < c; i++) {
      offset[i] = out.g_mean ? T(double(out.g_mean[i]) / double(count)) : T(0);
      slope[i] = out.g_var ? T(2 * double(out.g_var[i]) / double(count)) : T(0);
      mean[i] = out.mean[i];
    }
    incoming = {out.g, used ? out.y : nullptr, offset, slope, mean};
  }
};

// One set of per-channel doubles for each thread.
struct PerThread {
  Buffer<double> data;
  int64_t vectors, size;
  PerThread(int threads, int64_t vectors, int64_t c)
      : data(zeros<double>(threads * vectors * padded(c))), vectors(vectors), size(padded(c)) {}
  double* of(int thread, int64_t vector = 0) const { return data.get() + (thread * vectors + vector) * size; }
};

struct ThreadMoments : PerThread {
  ThreadMoments(int threads, int64_t c) : PerThread(threads, 3, c) {}
  Moments moments(int t) const { return {of(t, 0), of(t, 1), of(t, 2)}; }

  // Chan's rule over the threads, in order. The variance is biased, as BatchNorm normalises with.
  template <class T> void write(int threads, int64_t c, T* mean, T* var) const {
    for (int64_t i = 0; i < c; i++) {
      double n = 0, mu = 0, m2 = 0;
      for (int t = 0; t < threads; t++) {
        const Moments m = moments(t);
        if (m.count[i] == 0) continue;
        const double total = n + m.count[i], delta = m.mean[i] - mu;
        m2 += m.m2[i] + delta * delta * (n * m.count[i] / total);
        mu += delta * (m.count[i] / total);
        n = total;
      }
      mean[i] = T(mu);
      var[i] = T(m2 > 0 || m2 != m2 ? m2 / n : 0);
    }
  }
};

struct ThreadNormSums : PerThread {
  ThreadNormSums(int threads, int64_t c) : PerThread(threads, 2, c) {}
  NormSums sums(int t) const { return {of(t, 0), of(t, 1)}; }

  //   dbeta = sum gp                      dgamma = rstd sum gp (x - mean)
  //   dmean = -gamma rstd sum gp          dvar = -1/2 gamma rstd^2 dgamma
  template <class T> void write(int threads, int64_t c, const Pending<T>& p, const PendingGrads<T>& to) const {
    for (int64_t i = 0; i < c; i++) {
      double gp = 0, gpx = 0;
      for (int t = 0; t < threads; t++) gp += of(t, 0)[i], gpx += of(t, 1)[i];
      const double rstd = p.var ? 1 / std::sqrt(double(p.var[i]) + p.eps) : 1, gamma = p.gamma ? double(p.gamma[i]) : 1;
      if (to.beta) to.beta[i] = T(gp);
      if (to.gamma) to.gamma[i] = T(gpx * rstd);
      if (to.mean) to.mean[i] = T(-gamma * rstd * gp);
      if (to.var) to.var[i] = T(-0.5 * gamma * rstd * rstd * rstd * gpx);
    }
  }
};

}  // namespace mnops
