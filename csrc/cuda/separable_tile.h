// How separable_conv2d cuts its work: plain arithmetic, tested on the host. A block computes the depthwise result of a
// rectangle of at most `pixels` output pixels, all channels, into shared memory (the slab), then multiplies it with
// `outputs` output channels at a time.
#pragma once
#include <cstdint>

namespace mnops::cuda {

// Shared memory of a device, bytes, and how many multiprocessors share the work.
struct DeviceLimits {
  int64_t shared_block, shared_multiprocessor;
  int multiprocessors;
};
constexpr int64_t reserved_a_block = 1024;  // by the driver, of the multiprocessor's shared memory

struct SeparableShape {
  int64_t n;
  int c, h, w, o, ho, wo, kh, kw, sh, sw, dh, dw, pad_top, pad_left;
};

// Rows of the tile table. A warp's part of the product is at least 16 x 16.
struct SeparableRow {
  int pixels, outputs, threads;
};
constexpr SeparableRow separable_rows[] = {
    // The weights come from L2, and the product's operands from shared memory, once for all pixels of a block: 128 x 128
    // reads both least. Many outputs, and up to 256 channels in half precision for two blocks on an H100's multiprocessor.
    {128, 128, 256},
    // Up to 64 outputs, of which nothing is computed in vain; 7 x 7 maps; two blocks of more channels.
    {64, 64, 256},
    // Half precision of 1024 channels in the 99 KiB of sm_86, sm_89 and sm_120; small maps, small batches.
    {32, 64, 256},
    // fp32 of 1024 channels there; the last resort before the plain kernels.
    {16, 64, 128},
};
constexpr int separable_row_count = sizeof(separable_rows) / sizeof(separable_rows[0]);

constexpr int separable_chunk = 32;      // channels of one pass of the depthwise part: 64 bytes of a pixel, two sectors
constexpr int separable_step_bytes = 128;  // of a row of weights at a time: a line

constexpr int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// Bytes of shared memory. Rows of the slab and of the weights have 16 bytes more than they need: an odd number of 16-byte
// units, so that eight rows lie in eight different groups of banks. What lies in `work` is used one after the other.
struct SeparableLayout {
  int slab_pitch, patch_h, patch_w;
  int64_t slab, weights, patch, vectors, work, total;
};
inline SeparableLayout separable_layout(const SeparableShape& s, const SeparableRow& row, int itemsize, int th, int tw) {
  SeparableLayout l{};
  l.slab_pitch = int(round_up(int64_t(s.c) * itemsize, 32) + 16) / itemsize;
  l.patch_h = (th - 1) * s.sh + (s.kh - 1) * s.dh + 1, l.patch_w = (tw - 1) * s.sw + (s.kw - 1) * s.dw + 1;
  l.slab = int64_t(row.pixels) * l.slab_pitch * itemsize;
  l.weights = 2 * int64_t(row.outputs) * (separable_step_bytes + 16);                  // two steps: one is on its way
  l.patch = int64_t(l.patch_h) * l.patch_w * separable_chunk * itemsize;
  l.vectors = int64_t(s.kh * s.kw + 6) * separable_chunk * 4;                          // taps and two norms
  const int64_t out = int64_t(row.pixels) * (row.outputs * itemsize + 16), depthwise = 2 * (l.patch + l.vectors);
  l.work = out > depthwise ? out : depthwise;
  l.total = l.slab + l.weights + l.work;
  return l;
}

struct SeparablePlan {
  int row = -1;            // of the table; -1: nothing fits, the plain kernels serve
  int th = 0, tw = 0;      // a block's output pixels
  int groups = 1;          // blocks that share a rectangle's outputs: each computes the depthwise part again
  SeparableLayout layout{};
};

// The rectangle of at most `pixels` pixels with which fewest pixels are loaded and computed.
inline void separable_rectangle(const SeparableShape& s, int pixels, int& th, int& tw) {
  double best = 0;
  for (int w = 1; w <= pixels && w <= s.wo; w++) {
    const int h = pixels / w < s.ho ? pixels / w : s.ho;
    const double tiles = double((s.ho + h - 1) / h) * double((s.wo + w - 1) / w);
    const double patch = double((h - 1) * int64_t(s.sh) + (s.kh - 1) * int64_t(s.dh) + 1) *
                         double((w - 1) * int64_t(s.sw) + (s.kw - 1) * int64_t(s.dw) + 1);
    const double cost = tiles * (patch + pixels);
    if (best == 0 || cost < best) best = cost, th = h, tw = w;
  }
}

// What a row is expected to cost, in values moved a pixel of y: x with its halo, y, and the weights, which come from L2 at
// a third of the price; times what is computed in vain. A block that has a multiprocessor to itself waits for memory while
// nobody multiplies, a multiprocessor without a block waits altogether. An estimate: no GPU has been asked.
inline double separable_cost(const SeparableShape& s, const SeparableRow& row, const SeparablePlan& p, const DeviceLimits& d) {
  const double tiles = double(s.n) * ((s.ho + p.th - 1) / p.th) * ((s.wo + p.tw - 1) / p.tw), useful = double(s.n) * s.ho * s.wo;
  const double patch = double(p.layout.patch_h) * p.layout.patch_w / row.pixels;
  const double values = p.groups * patch * s.c + s.o + double(s.c) * s.o / row.pixels / 3;
  const double vain = tiles * row.pixels / useful * (s.o <= row.outputs / 2 ? 1.5 : 1);
  const double alone = 2 * (p.layout.total + reserved_a_block) <= d.shared_multiprocessor ? 1 : 1.5;
  const double idle = d.multiprocessors / (tiles * p.groups);
  return values * vain * alone * (idle > 1 ? idle : 1);
}

// The cheapest row that fits; tests ask for one of them.
inline SeparablePlan separable_plan(const SeparableShape& s, int itemsize, const DeviceLimits& d, int only = -1) {
  SeparablePlan best;
  double least = 0;
  for (int i = 0; i < separable_row_count; i++) {
    if (only >= 0 && i != only) continue;
    const SeparableRow& row = separable_rows[i];
    SeparablePlan p;
    p.row = i;
    separable_rectangle(s, row.pixels, p.th, p.tw);
    const double reach_h = double(s.kh - 1) * s.dh, reach_w = double(s.kw - 1) * s.dw;  // in doubles: it may be huge
    if ((double(p.th) * s.sh + reach_h) * (double(p.tw) * s.sw + reach_w) > 1 << 20 || s.c > 1 << 20) continue;
    p.layout = separable_layout(s, row, itemsize, p.th, p.tw);
    if (p.layout.total > d.shared_block) continue;
    // Where rectangles are few, several blocks share each: half of the multiprocessors would idle otherwise.
    const int64_t tiles = s.n * ((s.ho + p.th - 1) / p.th) * int64_t((s.wo + p.tw - 1) / p.tw);
    const int64_t blocks = (s.o + row.outputs - 1) / row.outputs, groups = tiles * 2 > d.multiprocessors ? 1 : d.multiprocessors / tiles;
    p.groups = int(groups < blocks ? groups : blocks);
    const double cost = separable_cost(s, row, p, d);
    if (best.row < 0 || cost < least) least = cost, best = p;
  }
  return best;
}

}  // namespace mnops::cuda
