// Cuts norm_act over pixels and norm_act_pool over images. residual may be null, and is for norm_act alone.
#pragma once
#include "cpu/drivers/common.h"

namespace mnops {

template <class T>
void norm_act(const Kernels<T>& kernels, const Threads& threads, int64_t n, int64_t hw, int64_t c, bool pool, const void* x,
              const Pending<T>& pending, const void* residual, void* z) {
  const NormVectors<T> norm(pending, c);
  const Rows<T> p{n, hw, c, x, nullptr, residual, z, norm.norm};
  const int64_t rows = pool ? n : n * hw;
  const int count = threads.worth(n * hw * c);
  threads.run(count, [&](int t) {
    (pool ? kernels.norm_act_pool_forward : kernels.norm_act_forward)(p, rows * t / count, rows * (t + 1) / count);
  });
}

template <class T>
void norm_act_backward(const Kernels<T>& kernels, const Threads& threads, int64_t n, int64_t hw, int64_t c, bool pool,
                       const void* g, const void* x, const Pending<T>& pending, void* dx, const PendingGrads<T>& grads) {
  const NormVectors<T> norm(pending, c);
  const Rows<T> p{n, hw, c, x, g, nullptr, dx, norm.norm};
  const int64_t rows = pool ? n : n * hw;
  const int count = threads.worth(n * hw * c);
  const ThreadNormSums sums(count, c);
  threads.run(count, [&](int t) {
    (pool ? kernels.norm_act_pool_backward : kernels.norm_act_backward)(p, rows * t / count, rows * (t + 1) / count, sums.sums(t));
  });
  sums.write(count, c, pending, grads);
}

}  // namespace mnops
