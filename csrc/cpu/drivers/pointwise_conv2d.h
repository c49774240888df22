// Cuts a matrix product over pixels into blocks that fit the caches, packs the weights, reduces the weight gradient.
#pragma once
#include "cpu/drivers/common.h"

namespace mnops {

template <class T> int64_t block_of_pixels(int64_t bytes, int64_t channels, int64_t pixels, int mr) {
  const int64_t mc = std::clamp<int64_t>(bytes / int64_t(sizeof(T)) / std::max<int64_t>(1, channels), mr, 192);
  return std::max<int64_t>(mr, std::min(mc, ceil_div(pixels, mr) * mr) / mr * mr);
}

// Packed whole, the weights are written and read once more than they are used. Where the pixels are few against them, each
// panel is packed where it is needed, and the pixels, all in one block, stay in the caches meanwhile.
inline bool few_pixels(int64_t m, int64_t k) { return m < k / 2; }

// Packs the (o, k) matrix by panels over o (forward) or over k (backward), on all threads, into shared scratch memory.
template <class T>
const void* pack_matrix(const Packing<T>& packing, int nr, const Threads& threads, const T* w, int64_t o, int64_t k, bool by_output) {
  const int64_t panels = ceil_div(by_output ? o : k, nr), size = packing.panel_bytes(by_output ? k : o);
  char* const packed = scratch<Scratch::packed>(panels * size);
  const int count = threads.worth(o * k);
  threads.run(count, [&](int t) {
    const int64_t first = panels * t / count, last = panels * (t + 1) / count;
    (by_output ? packing.columns : packing.rows)(w, o, k, first, last, packed + first * size);
  });
  return packed;
}

// Factors for the channels of each image, (n, k), each of `pixels` pixels.
template <class T> struct Gate {
  const T* data = nullptr;
  int64_t pixels = 1;
};

template <class T>
void pointwise_conv2d(const Kernels<T>& kernels, const Threads& threads, int64_t m, int64_t k, int64_t o, const void* x,
                      const T* weight, const Pending<T>& pending, void* y, T* mean, T* var, const Gate<T>& gate = {},
                      const void* packed = nullptr) {
  Pointwise<T> p{};
  p.m = m, p.k = k, p.o = o;
  const int count = threads.worth(m * (k + o) + k * o);
  const NormVectors<T> norm(pending, k);
  p.x = x, p.out = y, p.weight = weight, p.norm = norm.norm, p.measure = mean != nullptr;
  p.stream = worth_streaming(m * o * int64_t(sizeof(T)));

  const int64_t images = gate.data ? m / gate.pixels : 0;
  const Buffer<T> gates = zeros<T>(images * padded(k));
  for (int64_t n = 0; n < images; n++) std::copy_n(gate.data + n * k, k, gates.get() + n * padded(k));
  p.gate = gate.data ? gates.get() : nullptr, p.image = gate.pixels;

  // A block of z in half of L2. Few pixels against the weights (a small batch on a late layer): the output channels are cut
  // instead, and all of z is one block.
  const int64_t panels = ceil_div(o, kernels.nr);
  const bool by_panel = few_pixels(m, k) && panels >= count;
  p.mc = by_panel ? ceil_div(m, kernels.mr) * kernels.mr : block_of_pixels<T>(192 * 1024, k, m, kernels.mr);
  p.packed = packed ? packed : by_panel ? nullptr : pack_matrix(kernels.pointwise_packing, kernels.nr, threads, weight, o, k, true);
  const ThreadMoments moments(count, o);
  const size_t bytes = kernels.pointwise_forward_scratch(p);
  threads.run(count, [&](int t) {
    const int64_t rows = ceil_div(m, kernels.mr);
    const int64_t begin = by_panel ? 0 : rows * t / count * kernels.mr, end = by_panel ? m : std::min(m, rows * (t + 1) / count * kernels.mr);
    const int64_t first = by_panel ? panels * t / count : 0, last = by_panel ? panels * (t + 1) / count : panels;
    kernels.pointwise_forward(p, begin, end, first, last, moments.moments(t), scratch(bytes));
  });
  if (mean) moments.write(count, o, mean, var);
}

template <class T>
void pointwise_conv2d_backward(const Kernels<T>& kernels, const Threads& threads, int64_t m, int64_t k, int64_t o,
                               const Output<T>& out, const void* x, const T* weight, const Pending<T>& pending, void* dx,
                               T* dweight, const PendingGrads<T>& grads) {
  Pointwise<T> p{};
  p.m = m, p.k = k, p.o = o;
  const int count = threads.worth(m * (k + o));
  const NormVectors<T> norm(pending, k);
  const IncomingVectors<T> incoming(out, o, m);
  p.x = x, p.out = dx, p.weight = weight, p.norm = norm.norm, p.incoming = incoming.incoming;
  p.need_weight = dweight != nullptr;
  p.stream = worth_streaming(m * k * int64_t(sizeof(T)));
  // Blocks of gy and z together in L2, with room for the panel of weights that meets them.
  p.mc = block_of_pixels<T>(288 * 1024, k + o, m, kernels.mr);

  // Threads share the pixels, each with a weight gradient of its own, added up at the end. Where that gradient is large
  // against the pixels (late layers, small batches) they share x's channels instead: each packs gy again, and owns a
  // part of one gradient.
  const int64_t nr = kernels.nr, op = ceil_div(o, nr) * nr, panels = ceil_div(k, nr), size = panels * nr * op;
  const bool by_panel = panels >= count && m < 4 * k;
  const bool one_block = by_panel && few_pixels(m, k);
  if (one_block) p.mc = ceil_div(m, kernels.mr) * kernels.mr;
  p.packed = one_block || !dx ? nullptr : pack_matrix(kernels.pointwise_packing, kernels.nr, threads, weight, o, k, false);
  const int copies = by_panel ? 1 : count;
  T* const gw = dweight ? reinterpret_cast<T*>(scratch<Scratch::gradient>(copies * size * sizeof(T))) : nullptr;
  const ThreadNormSums sums(count, k);
  const size_t bytes = kernels.pointwise_backward_scratch(p);
  threads.run(count, [&](int t) {
    const int64_t first = by_panel ? panels * t / count : 0, last = by_panel ? panels * (t + 1) / count : panels;
    T* const own = dweight ? gw + (by_panel ? 0 : t * size) : nullptr;
    const int64_t rows = ceil_div(m, kernels.mr);
    const int64_t begin = by_panel ? 0 : rows * t / count * kernels.mr;
    const int64_t end = by_panel ? m : std::min(m, rows * (t + 1) / count * kernels.mr);
    if (own && begin >= end) std::memset(own, 0, size * sizeof(T));  // nothing to sum
    kernels.pointwise_backward(p, begin, end, first, last, own, sums.sums(t), scratch(bytes));
  });
  if (dx) sums.write(count, k, pending, grads);
  if (!dweight) return;
  const int sharers = threads.worth(size);
  threads.run(sharers, [&](int t) {  // [panel of k][o][nr] of every thread -> (o, k)
    for (int64_t j = panels * t / sharers; j < panels * (t + 1) / sharers; j++)
      for (int64_t i = 0; i < o; i++) {
        const T* from = gw + (j * op + i) * nr;
        T* const to = dweight + i * k + j * nr;
        const int64_t lanes = std::min(nr, k - j * nr);
        std::copy_n(from, lanes, to);
        for (int s = 1; s < copies; s++) {
          from += size;
          for (int64_t l = 0; l < lanes; l++) to[l] += from[l];
        }
      }
  });
}

}  // namespace mnops
