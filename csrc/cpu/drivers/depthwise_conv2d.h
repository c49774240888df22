// Cuts a depthwise convolution into (image, band of rows, block of channels).
#pragma once
#include "cpu/drivers/common.h"

namespace mnops {

template <class T> Depthwise<T> plan_depthwise(const DepthwiseShape& s, int threads, int64_t rows) {
  Depthwise<T> p{};
  p.n = s.n, p.h = s.h, p.w = s.w, p.c = s.c, p.ho = s.ho, p.wo = s.wo;
  p.kh = s.kh, p.kw = s.kw, p.sh = s.sh, p.sw = s.sw, p.dh = s.dh, p.dw = s.dw, p.pad_top = s.pad_top, p.pad_left = s.pad_left;
  // The ring of normalised lines stays in L2, at least two cache lines of channels at a time. Wide blocks read memory in
  // long runs: from 48 to 96 KiB the backward took 3 to 30 % less, from 96 to 192 KiB 2 to 10 %.
  const int64_t line_bytes = int64_t(sizeof(T)) * ((s.kh - 1) * s.dh + 1) * (s.w + s.kw);
  int64_t block = std::clamp<int64_t>(192 * 1024 / line_bytes / 16 * 16, 32, 1024);
  // Four items a thread, so that the last one does not decide: blocks of channels first, then bands of rows.
  const int64_t items = threads > 1 ? 4 * threads : 1;
  if (s.n > 0 && s.n < items) block = std::min(block, std::max<int64_t>(32, padded(ceil_div(s.c, ceil_div(items, s.n)))));
  block = std::max<int64_t>(channel_padding, std::min(block, padded(s.c)));
  p.block = padded(ceil_div(s.c, std::max<int64_t>(1, ceil_div(s.c, block))));  // blocks of one size
  p.block = std::max<int64_t>(channel_padding, p.block);
  const int64_t cut = std::max<int64_t>(1, s.n * ceil_div(s.c, p.block));
  p.bands = cut >= items ? 1 : std::clamp<int64_t>(ceil_div(items, cut), 1, std::max<int64_t>(1, rows / (4 * s.kh)));
  p.band = std::max<int64_t>(1, ceil_div(rows, p.bands));
  p.bands = ceil_div(rows, p.band);
  return p;
}

// (C, 1, kh, kw) -> [kh * kw][padded(C)]
template <class T> Buffer<T> pack_depthwise_weight(const T* w, int64_t c, int64_t taps) {
  const int64_t size = padded(c);
  Buffer<T> packed = zeros<T>(taps * size);
  for (int64_t k = 0; k < taps; k++)  // taps outside: a stride of many channels would meet in one set of the cache
    for (int64_t i = 0; i < c; i++) packed[k * size + i] = w[i * taps + k];
  return packed;
}

template <class T>
void depthwise_conv2d(const Kernels<T>& kernels, const Threads& threads, const DepthwiseShape& s, const void* x, const T* weight,
                      const Pending<T>& pending, void* y, T* mean, T* var) {
  const int count = threads.worth(s.n * s.ho * s.wo * s.c);
  Depthwise<T> p = plan_depthwise<T>(s, count, s.ho);
  const NormVectors<T> norm(pending, s.c);
  const Buffer<T> packed = pack_depthwise_weight(weight, s.c, int64_t(s.kh) * s.kw);
  p.x = x, p.out = y, p.weight = packed.get(), p.norm = norm.norm, p.measure = mean != nullptr;
  p.stream = worth_streaming(s.n * s.ho * s.wo * s.c * int64_t(sizeof(T)));
  p.fetch = worth_fetching(s.n * s.h * s.w * s.c * int64_t(sizeof(T)));
  const ThreadMoments moments(count, s.c);
  const int64_t items = p.n * p.bands * ceil_div(p.c, p.block);
  const size_t bytes = kernels.depthwise_forward_scratch(p);
  threads.run(count, [&](int t) {
    kernels.depthwise_forward(p, items * t / count, items * (t + 1) / count, moments.moments(t), scratch(bytes));
  });
  if (mean) moments.write(count, s.c, mean, var);
}

template <class T>
void depthwise_conv2d_backward(const Kernels<T>& kernels, const Threads& threads, const DepthwiseShape& s, const Output<T>& out,
                               const void* x, const T* weight, const Pending<T>& pending, void* dx, T* dweight,
                               const PendingGrads<T>& grads) {
  const int count = threads.worth(s.n * s.h * s.w * s.c);
  Depthwise<T> p = plan_depthwise<T>(s, count, s.h);
  const NormVectors<T> norm(pending, s.c);
  const IncomingVectors<T> incoming(out, s.c, s.n * s.ho * s.wo);
  const int64_t taps = int64_t(s.kh) * s.kw;
  const Buffer<T> packed = pack_depthwise_weight(weight, s.c, taps);
  p.x = x, p.out = dx, p.weight = packed.get(), p.norm = norm.norm, p.incoming = incoming.incoming;
  p.need_weight = dweight != nullptr;
  p.stream = worth_streaming(s.n * s.h * s.w * s.c * int64_t(sizeof(T)));
  p.fetch = worth_fetching(s.n * s.h * s.w * s.c * int64_t(sizeof(T)));
  const ThreadNormSums sums(count, s.c);
  const PerThread gw(count, taps, s.c);
  const int64_t items = p.n * p.bands * ceil_div(p.c, p.block);
  const size_t bytes = kernels.depthwise_backward_scratch(p);
  threads.run(count, [&](int t) {
    kernels.depthwise_backward(p, items * t / count, items * (t + 1) / count, gw.of(t), sums.sums(t), scratch(bytes));
  });
  if (dx) sums.write(count, s.c, pending, grads);
  for (int64_t k = 0; dweight && k < taps; k++)
    for (int64_t i = 0; i < s.c; i++) {
      double total = 0;
      for (int t = 0; t < count; t++) total += gw.of(t, k)[i];
      dweight[i * taps + k] = T(total);
    }
}

}  // namespace mnops
