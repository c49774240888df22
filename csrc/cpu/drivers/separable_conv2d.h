// Cuts a separable block over pixels or, where the weights are large against them, over pixels and then over channels.
#pragma once
#include "cpu/drivers/depthwise_conv2d.h"
#include "cpu/drivers/pointwise_conv2d.h"

namespace mnops {

// A pointwise convolution from k channels before the block, whose output, with `pending` on it, is what the block reads.
template <class T> struct Expand {
  int64_t k;
  const T* weight;
  Pending<T> on_x;
  const void* packed;
};

template <class T>
void separable_conv2d(const Kernels<T>& kernels, const Threads& threads, const DepthwiseShape& s, int64_t o, const void* x,
                      const Pending<T>& pending, const T* depthwise_weight, const Pending<T>& mid, const T* weight, void* y,
                      const Expand<T>* expand = nullptr, const void* packed_weight = nullptr) {
  const int64_t m = s.n * s.ho * s.wo, panels = ceil_div(o, kernels.nr), size = kernels.pointwise_packing.panel_bytes(s.c);
  const int count = threads.worth(m * (s.c + o) + m * s.c * o / 48);  // 48 products take the time of an element
  const NormVectors<T> norm(pending, s.c), mid_norm(mid, s.c);
  const Buffer<T> taps = pack_depthwise_weight(depthwise_weight, s.c, int64_t(s.kh) * s.kw);
  Separable<T> p{};
  Depthwise<T>& d = p.depthwise;
  d.n = s.n, d.h = s.h, d.w = s.w, d.c = s.c, d.ho = s.ho, d.wo = s.wo;
  d.kh = s.kh, d.kw = s.kw, d.sh = s.sh, d.sw = s.sw, d.dh = s.dh, d.dw = s.dw, d.pad_top = s.pad_top, d.pad_left = s.pad_left;
  d.block = s.c, d.x = x, d.weight = taps.get(), d.norm = norm.norm;
  p.mid = mid_norm.norm;
  Pointwise<T>& q = p.pointwise;
  q.m = m, q.k = s.c, q.o = o, q.out = y, q.weight = weight, q.packed = packed_weight;
  q.stream = worth_streaming(m * o * int64_t(sizeof(T)));

  const int64_t k = expand ? expand->k : 0, expand_panels = expand ? ceil_div(s.c, kernels.nr) : 0;
  const NormVectors<T> norm_of_x(expand ? expand->on_x : Pending<T>(), k);
  p.expand.m = s.n * s.h * s.w, p.expand.k = k, p.expand.o = s.c, p.expand.x = x, p.expand.norm = norm_of_x.norm;
  p.expand.mc = ceil_div(s.w, kernels.mr) * kernels.mr;

  const int64_t most_chunks = count > 1 ? 4 * count : 1;
  const int64_t rows = ceil_div(m, kernels.mr);
  auto pixels = [&](int64_t i, int64_t chunks) { return std::min(m, rows * i / chunks * kernels.mr); };
  auto equally = [&](int64_t i) { return m * i / count; };  // where a part is one block: tiles of two heights fill it
  // Packing a matrix takes as long as multiplying some 8 pixels with it, and reading what another core packed longer: each
  // thread packs its own. Where its pixels are few against the weights, the threads share the panels instead.
  if (!expand && few_pixels(m * 4 / count, s.c) && panels >= count) {
    q.mc = rows * kernels.mr;
    void* const z = scratch<Scratch::packed>(q.mc * padded(s.c) * sizeof(T));
    const size_t bytes = kernels.separable_scratch(p);
    threads.run(count, [&](int t) { kernels.separable_depthwise(p, equally(t), equally(t + 1), z, scratch(bytes)); });
    const int64_t chunks = std::min(panels, most_chunks);
    threads.share(count, chunks, [&] {
      void* const packed = scratch(size);
      return [&, packed](int64_t i) {
        kernels.separable_pointwise(p, z, panels * i / chunks, panels * (i + 1) / chunks, packed);
      };
    });
    return;
  }
  const int64_t most = block_of_pixels<T>(192 * 1024, s.c, m, kernels.mr), each = ceil_div(ceil_div(m, count), kernels.mr) * kernels.mr;
  if (!expand && each * s.c * int64_t(sizeof(T)) <= 256 * 1024) {  // one block each: the packed weights need not be kept
    q.mc = each;
    threads.run(count, [&](int t) {
      kernels.separable_forward(p, equally(t), equally(t + 1), scratch(kernels.separable_scratch(p)));
    });
    return;
  }
  // Rows at the edge of a chunk are expanded twice: then chunks are images, or as few as there are threads.
  const int64_t chunks = !expand ? std::clamp<int64_t>(m / most / count * count, count, most_chunks)
                                 : std::clamp<int64_t>(s.n, count, most_chunks);
  const int64_t chunk = ceil_div(rows, chunks) * kernels.mr;  // cut into equal blocks
  q.mc = ceil_div(ceil_div(chunk, ceil_div(chunk, most)), kernels.mr) * kernels.mr;
  threads.share(count, chunks, [&] {
    Separable<T> own = p;
    const int64_t expand_size = kernels.pointwise_packing.panel_bytes(k);
    char* const packed = scratch<Scratch::packed>(panels * size + expand_panels * expand_size);
    if (!packed_weight) kernels.pointwise_packing.columns(weight, o, s.c, 0, panels, packed), own.pointwise.packed = packed;
    if (expand) own.expand.packed = expand->packed ? expand->packed : packed + panels * size;
    if (expand && !expand->packed)
      kernels.pointwise_packing.columns(expand->weight, s.c, k, 0, expand_panels, packed + panels * size);
    return [&, own](int64_t i) {
      kernels.separable_forward(own, pixels(i, chunks), pixels(i + 1, chunks), scratch(kernels.separable_scratch(own)));
    };
  });
}

}  // namespace mnops
