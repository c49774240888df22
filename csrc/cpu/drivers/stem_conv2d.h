// Cuts the first convolution over rows of outputs, or over images where their gradient is wanted.
#pragma once
#include "cpu/drivers/pointwise_conv2d.h"

namespace mnops {

template <class T>
Pointwise<T> stem_product(const Kernels<T>& kernels, int64_t images, const Window& w, int64_t o) {
  Pointwise<T> p{};
  p.m = images * w.ho * w.wo, p.k = w.kh * w.kw * w.c, p.o = o;
  p.mc = ceil_div(w.wo, kernels.mr) * kernels.mr;  // a row of outputs is a block
  return p;
}

template <class T>
void stem_conv2d(const Kernels<T>& kernels, const Threads& threads, int64_t images, const Window& w, int64_t o, const void* x,
                 const T* weight, const Pending<T>& pending, void* y, T* mean, T* var) {
  Pointwise<T> p = stem_product(kernels, images, w, o);
  const int64_t rows = images * w.ho;
  const int count = int(std::min<int64_t>(rows, threads.worth(p.m * (p.k + o))));
  const NormVectors<T> norm(pending, w.c, w.c ? p.k / w.c : 1);
  p.x = x, p.out = y, p.packed = pack_matrix(kernels.stem_packing, kernels.nr, threads, weight, o, p.k, true), p.norm = norm.norm;
  p.measure = mean != nullptr, p.stream = worth_streaming(p.m * o * int64_t(sizeof(T)));
  const ThreadMoments moments(count, o);
  const size_t bytes = kernels.stem_scratch(p, w, false);
  threads.run(count, [&](int t) {
    kernels.stem_forward(p, w, rows * t / count, rows * (t + 1) / count, moments.moments(t), scratch(bytes));
  });
  if (mean) moments.write(count, o, mean, var);
}

template <class T>
void stem_conv2d_backward(const Kernels<T>& kernels, const Threads& threads, int64_t images, const Window& w, int64_t o,
                          const Output<T>& out, const void* x, const T* weight, const Pending<T>& pending, void* dx, T* dweight,
                          const PendingGrads<T>& grads) {
  Pointwise<T> p = stem_product(kernels, images, w, o);
  const int64_t units = dx ? images : images * w.ho, rows = dx ? w.ho : 1;  // of a unit of work
  const int count = int(std::clamp<int64_t>(units, 1, threads.worth(p.m * (p.k + o))));
  const NormVectors<T> norm(pending, w.c, w.c ? p.k / w.c : 1);
  const IncomingVectors<T> incoming(out, o, p.m);
  p.x = x, p.out = dx, p.packed = dx ? pack_matrix(kernels.stem_packing, kernels.nr, threads, weight, o, p.k, false) : nullptr;
  p.norm = norm.norm, p.incoming = incoming.incoming, p.need_weight = dweight != nullptr;

  const int64_t nr = kernels.nr, size = ceil_div(o, nr) * p.k * nr;
  const Buffer<T> gw = dweight ? zeros<T>(count * size) : Buffer<T>();
  const ThreadNormSums sums(count, w.c);
  const size_t bytes = kernels.stem_scratch(p, w, true);
  threads.run(count, [&](int t) {
    kernels.stem_backward(p, w, units * t / count * rows, units * (t + 1) / count * rows, dweight ? gw.get() + t * size : nullptr,
                          sums.sums(t), scratch(bytes));
  });
  if (dx) sums.write(count, w.c, pending, grads);
  for (int64_t i = 0; dweight && i < o; i++)
    for (int64_t k = 0; k < p.k; k++) {
      T total = 0;
      for (int t = 0; t < count; t++) total += gw[t * size + (i / nr * p.k + k) * nr + i % nr];
      dweight[i * p.k + k] = total;
    }
}

}  // namespace mnops
